"""ViT of timm and of transformers."""

import functools
import json
import tempfile
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from benchmarks.peers import Case, randomized

_NAMES_IN_FILES = {  # since release 5 a model has other names in memory
  ".layers.": ".encoder.layer.",
  "attention.o_proj.": "attention.output.dense.",
  "attention.q_proj.": "attention.attention.query.",
  "attention.k_proj.": "attention.attention.key.",
  "attention.v_proj.": "attention.attention.value.",
  "mlp.fc1.": "intermediate.dense.",
  "mlp.fc2.": "output.dense.",
}


class ViTWithNamesOfFiles(ViTForImageClassification):
  """ViTForImageClassification, its arrays named as `save_pretrained` does."""

  def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {_in_file(name): array for name, array in super().state_dict(*args, **kwargs).items()}

  def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
    for name, parameter in super().named_parameters(*args, **kwargs):
      yield _in_file(name), parameter


class ViTFeatures(ViTModel):
  """ViTModel, which gives the class token's output [B, D]."""

  def forward(self, images_BxCxHxW: torch.Tensor) -> torch.Tensor:
    return super().forward(images_BxCxHxW).last_hidden_state[:, 0]


def _in_file(name: str) -> str:
  for ours, theirs in _NAMES_IN_FILES.items():
    name = name.replace(ours, theirs)
  return name


def _timm(architecture: str, **args: Any) -> Case:
  model = timm.create_model(architecture, **args)
  with tempfile.NamedTemporaryFile("r") as file:
    save_config_for_hf(model, file.name)
    config = json.load(file)
  return Case(randomized(model), config, model.patch_embed.img_size)


def _transformers(kind: type[torch.nn.Module], **sizes: Any) -> Case:
  config = ViTConfig(**sizes)
  return Case(randomized(kind(config)), json.loads(config.to_json_string()), config.image_size)


_small = functools.partial(
  _timm,
  img_size=16,
  patch_size=8,
  embed_dim=16,
  depth=2,
  num_heads=2,
  mlp_ratio=2,
  num_classes=5,
)
_SMALL = {
  "image_size": 16,
  "patch_size": 8,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 32,
}

CASES = {
  "timm_vit_cls": functools.partial(_small, "vit_tiny_patch16_224"),
  "timm_vit_avg": functools.partial(_small, "vit_tiny_patch16_224", global_pool="avg"),
  "timm_vit_oblong": functools.partial(_small, "vit_tiny_patch16_224", img_size=(16, 24)),
  "timm_vit_gap": functools.partial(_small, "vit_base_patch16_siglip_gap_224"),
  "timm_vit_map": functools.partial(_small, "vit_so400m_patch16_siglip_256"),
  "transformers_vit": functools.partial(
    _transformers, ViTWithNamesOfFiles, num_labels=5, layer_norm_eps=1e-3, **_SMALL
  ),
  "transformers_vit_features": functools.partial(
    _transformers, ViTFeatures, hidden_act="gelu_new", **_SMALL
  ),
}

FULL_CASES = {
  name: functools.partial(_timm, name) for name in ("vit_small_patch16_224", "vit_base_patch16_224")
} | {
  "transformers_vit_base": functools.partial(_transformers, ViTWithNamesOfFiles, num_labels=1000)
}
