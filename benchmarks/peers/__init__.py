"""Models of timm and transformers that ours are compared with, by family.

Each module beside this file has CASES, small models for the golden files of `make_golden_peers.py`,
and FULL_CASES, those of published weights, for tests/test_peers_full.py. Nothing here imports JAX.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
  """A model in evaluation, with all parameters and buffers drawn at random.

  model: of float images [B, 3, H, W]; gives logits, or an object with `.logits`. Its `state_dict`
    has the names of published files.
  config: what the config.json beside published weights holds.
  image_size: in pixels; or (H, W).
  """

  model: torch.nn.Module
  config: dict[str, Any]
  image_size: int | tuple[int, int]

  def logits(self, images: torch.Tensor) -> torch.Tensor:
    output = self.model(images)
    return getattr(output, "logits", output)


def cases(kind: str) -> dict[str, Callable[[], Case]]:
  """CASES or FULL_CASES, by `kind`, of all families."""
  return {
    name: make
    for module in pkgutil.iter_modules(__path__)
    for name, make in getattr(importlib.import_module(f"{__name__}.{module.name}"), kind).items()
  }


def randomized(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
  """The model in evaluation, with norms' scales near one and everything else near zero.

  A weight's deviation is 1 / sqrt(inputs), so that what it computes keeps its size.
  """
  generator = torch.Generator().manual_seed(seed)
  scales = {
    f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.LayerNorm)
  }
  for name, array in model.state_dict().items():
    noise = torch.randn(array.shape, generator=generator)
    if name in scales:
      array.copy_(1 + 0.1 * noise)
    elif array.is_floating_point():
      array.copy_(noise * (0.1 if array.ndim < 2 else array[0].numel() ** -0.5))
  return model.eval()


def of_timm(architecture: str, model: torch.nn.Module | None = None) -> Case:
  """A model of timm, with the config.json that timm writes.

  model: in the place of the architecture's own, whose sizes `timm.create_model` does not change.
  """
  import timm

  known = timm.get_pretrained_cfg(architecture).to_dict()
  model = model or timm.create_model(architecture)
  config = {
    "architecture": architecture,
    "num_classes": model.num_classes,
    "num_features": model.num_features,
    "pretrained_cfg": {key: known[key] for key in ("mean", "std", "interpolation", "crop_pct")},
  }
  embed = next(part for part in model.modules() if isinstance(part, timm.layers.PatchEmbed))
  return Case(randomized(model), config, embed.img_size[0])
