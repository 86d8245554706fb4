"""ViT in the names of timm and transformers; vit_npz.py has those of the JAX projects.

timm: its class VisionTransformer with `Block`s, pooled by "token", "avg" or "map". transformers:
ViTForImageClassification and ViTModel. Layer scale, registers, norms of queries and keys and the
like have arrays that no rule reads, so that such files are refused by the names of these arrays.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlp_models.layers import grid
from mlp_models.pretrained.rules import (
  Config,
  Fields,
  Layout,
  Rule,
  Shapes,
  conv_patches,
  count,
  image_size,
  into_heads,
  linear,
  norm,
  oblong,
  out_of_heads,
  reshaped,
  timm_image_shape,
  transformers_gelu,
)

QKV = ("query", "key", "value")


def vit_fields(
  patches: tuple[int, ...],
  num_positions: int,
  hidden: int,
  has_class_token: bool,
  image_shape: tuple[int, int] | None = None,
  **others: Any,
) -> Fields:
  """The fields of a model without dropout.

  patches: the patch embedding's (D, P, P).
  num_positions: rows of the position embeddings, with or without one for the class token.
  image_shape: (H, W) that a config says, if they differ.
  others: fields, num_heads and pool among them.
  """
  width, patch_size, patch_width = patches
  if patch_size != patch_width:
    raise ValueError(f"patches of {patch_size} x {patch_width} pixels are not square")
  if width % others["num_heads"]:
    raise ValueError(f"{others['num_heads']} heads do not divide the width {width}")
  tokens = {"position": "learned", "class_token": has_class_token and others["pool"] != "cls"}
  if image_shape:
    are_patches = num_positions == math.prod(grid(image_shape, patch_size))
  else:  # a grid's size and that size plus 1 are never both squares: no file is read in two ways
    are_patches = math.isqrt(num_positions) ** 2 == num_positions
  num_patches = num_positions - int(has_class_token and not are_patches)
  tokens["image_size"] = image_size(num_patches, "the position embedding", patch_size, image_shape)
  sizes: Fields = {"patch_size": patch_size, "width": width}
  sizes |= {"head_dim": width // others["num_heads"], "mlp_units": (hidden, width)}
  rates = dict.fromkeys(("dropout_rate", "attention_dropout_rate", "head_dropout_rate"), 0.0)
  rest = {"head_units": (), "gelu_last": False, "attention_init": "papers", "head_init": "zeros"}
  return sizes | tokens | rates | rest | others


def _num_heads(width: int, known: int | None) -> tuple[int, list[str]]:
  """The number of heads, and what to say if it is not known but a convention."""
  if known:
    return known, []
  heads = 16 if width > 1024 else max(1, width // 64)  # models wider than L have 16
  return heads, [f"without a config: num_heads {heads}, as is usual for width {width}"]


def token_rules(fields: Fields, shapes: Shapes, cls: str, position: str | None) -> list[Rule]:
  """The class token and the position embeddings, if there are such."""
  width, path, rules = fields["width"], "position/embedding", []
  has_class_token = fields["class_token"] or fields["pool"] == "cls"
  if has_class_token:
    rules.append(reshaped(cls, "class_token", (1, 1, width), (width,)))
  num_patches = math.prod(grid(fields["image_size"], fields["patch_size"]))
  if position and has_class_token and shapes.get(position, (0, 0))[-2] == num_patches:
    # The class token has no position: zeros in ours.
    zeros = np.zeros((1, width), np.float32)
    rules.append(
      Rule(
        position,
        (path,),
        lambda x: [np.concatenate([zeros, x.reshape(-1, width)])],
        lambda x: x[0][None, 1:],
      )
    )
  elif position:
    rules.append(reshaped(position, path, (1, -1, width), (-1, width)))
  return rules


# timm.

# Heads by a word in the architecture's name, and of two whose name misleads.
_TIMM_HEADS = {"tiny": 3, "small": 6, "medium": 8, "base": 12, "large": 16, "so400m": 16}
_TIMM_HEADS |= dict.fromkeys(("huge", "giant", "giantopt", "gigantic"), 16)
_TIMM_HEADS |= {"test_vit": 2, "vit_base_patch16_gap_224": 16}
# Architectures whose gelu is the one with tanh.
_TIMM_TANH = re.compile(
  r"vit_((base_patch32|so400m_patch16|giantopt_patch16)_siglip(_gap)?_\d+"
  r"|large_patch16_siglip(_gap)?_512)"
)


def _timm_fields(shapes: Shapes, config: Config) -> Fields:
  width, _, *patch = shapes["patch_embed.proj.weight"]
  name = config.get("architecture", "")
  args: Mapping[str, Any] = config.get("model_args") or {}
  gelu = args.get("act_layer") or ("gelu_tanh" if _TIMM_TANH.fullmatch(name) else "gelu")
  if gelu not in ("gelu", "gelu_tanh"):
    raise ValueError(f"the activation {gelu!r} is not supported, only 'gelu' and 'gelu_tanh' are")
  if args.get("norm_layer", "layernorm") != "layernorm" or args.get("pool_include_prefix"):
    raise ValueError("norm_layer and pool_include_prefix are not supported")
  if more := [token for token in ("reg_token", "dist_token") if token in shapes]:
    raise ValueError(f"{more[0]} is not supported")
  known = [_TIMM_HEADS[word] for word in (name, *name.split("_")) if word in _TIMM_HEADS]
  num_heads, notes = _num_heads(width, args.get("num_heads") or next(iter(known), None))
  return vit_fields(
    patches=(width, *patch),
    num_positions=shapes["pos_embed"][-2],
    image_shape=timm_image_shape(config),
    num_classes=shapes.get("head.weight", (0,))[0],
    num_blocks=count(shapes, "blocks.{}."),
    num_heads=num_heads,
    notes=notes,
    hidden=shapes["blocks.0.mlp.fc1.weight"][0],
    pool=_timm_pool(shapes, args.get("global_pool") or config.get("global_pool")),
    has_class_token="cls_token" in shapes,
    gelu="tanh" if gelu == "gelu_tanh" else "exact",
    norm_epsilon=1e-6,
  )


def _timm_pool(shapes: Shapes, global_pool: str | None) -> str:
  """The field `pool`; without a config, what timm's default is for such arrays."""
  norm_is_last = "fc_norm.weight" in shapes
  if "attn_pool.latent" in shapes:
    if norm_is_last:
      raise ValueError("fc_norm after attn_pool is not supported")
    return "map"
  if global_pool is None:
    global_pool = "avg" if norm_is_last or "cls_token" not in shapes else "token"
  pools = {"token": "cls", "avg": "mean_norm" if norm_is_last else "mean"}
  if global_pool not in pools:
    raise ValueError(f"global_pool {global_pool!r} is not supported")
  return pools[global_pool]


def _timm_rules(fields: Fields, shapes: Shapes) -> list[Rule]:
  heads = fields["num_heads"]
  norm_is_last = fields["pool"] == "mean_norm" or "fc_norm.weight" in shapes
  rules = [
    *conv_patches("patch_embed.proj", "patch_embed", fields["patch_size"]),
    *token_rules(fields, shapes, "cls_token", "pos_embed"),
    *norm("fc_norm" if norm_is_last else "norm", "norm"),
  ]
  for i in range(fields["num_blocks"]):
    theirs, ours = f"blocks.{i}", f"block{i}"
    qkv = [f"{ours}/attention/{part}" for part in QKV]
    rules += norm(f"{theirs}.norm1", f"{ours}/norm1")
    rules += into_heads(f"{theirs}.attn.qkv", qkv, heads)
    rules += out_of_heads(f"{theirs}.attn.proj", f"{ours}/attention/out", heads)
    rules += norm(f"{theirs}.norm2", f"{ours}/norm2")
    rules += _mlp(f"{theirs}.mlp.fc1", f"{theirs}.mlp.fc2", f"{ours}/mlp")
  if fields["pool"] == "map":
    rules.append(reshaped("attn_pool.latent", "pool/probe", (1, 1, -1), (1, -1)))
    rules += into_heads("attn_pool.q", ["pool/attention/query"], heads)
    rules += into_heads("attn_pool.kv", ["pool/attention/key", "pool/attention/value"], heads)
    rules += out_of_heads("attn_pool.proj", "pool/attention/out", heads)
    rules += norm("attn_pool.norm", "pool/norm")
    rules += _mlp("attn_pool.mlp.fc1", "attn_pool.mlp.fc2", "pool/mlp")
  return rules + (linear("head", "head") if fields["num_classes"] else [])


def _mlp(first: str, second: str, ours: str) -> list[Rule]:
  return linear(first, f"{ours}/dense0") + linear(second, f"{ours}/dense1")


# transformers.


def _transformers_fields(shapes: Shapes, config: Config) -> Fields:
  width, _, *patch = shapes["embeddings.patch_embeddings.projection.weight"]
  block, names = _transformers_names(shapes)
  num_heads, notes = _num_heads(width, config.get("num_attention_heads"))
  return vit_fields(
    patches=(width, *patch),
    num_positions=shapes["embeddings.position_embeddings"][-2],
    image_shape=oblong(config.get("image_size")),
    num_classes=shapes.get("classifier.weight", (0,))[0],
    num_blocks=count(shapes, f"{block}."),
    num_heads=num_heads,
    notes=notes,
    hidden=shapes[f"{block.format(0)}.{names['dense0']}.weight"][0],
    pool="cls",
    has_class_token=True,
    gelu=transformers_gelu(config, "gelu"),
    norm_epsilon=config.get("layer_norm_eps", 1e-12),
  )


def _transformers_names(shapes: Shapes) -> tuple[str, dict[str, str]]:
  """How a block is called, and the layers in it: in files, and in the memory of release 5."""
  if "layers.0.layernorm_before.weight" in shapes:
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    names = {ours: f"attention.{theirs}" for ours, theirs in names.items()}
    return "layers.{}", names | {"dense0": "mlp.fc1", "dense1": "mlp.fc2"}
  names = {part: f"attention.attention.{part}" for part in QKV}
  names |= {"out": "attention.output.dense"}
  return "encoder.layer.{}", names | {"dense0": "intermediate.dense", "dense1": "output.dense"}


def _transformers_rules(fields: Fields, shapes: Shapes) -> list[Rule]:
  heads, (block, names) = fields["num_heads"], _transformers_names(shapes)
  patch_embed = "embeddings.patch_embeddings.projection"
  rules = [
    *conv_patches(patch_embed, "patch_embed", fields["patch_size"]),
    *token_rules(fields, shapes, "embeddings.cls_token", "embeddings.position_embeddings"),
    *norm("layernorm", "norm"),
  ]
  for i in range(fields["num_blocks"]):
    theirs, ours = block.format(i), f"block{i}"
    rules += norm(f"{theirs}.layernorm_before", f"{ours}/norm1")
    for part in QKV:
      rules += into_heads(f"{theirs}.{names[part]}", [f"{ours}/attention/{part}"], heads)
    rules += out_of_heads(f"{theirs}.{names['out']}", f"{ours}/attention/out", heads)
    rules += norm(f"{theirs}.layernorm_after", f"{ours}/norm2")
    rules += _mlp(f"{theirs}.{names['dense0']}", f"{theirs}.{names['dense1']}", f"{ours}/mlp")
  return rules + (linear("classifier", "head") if fields["num_classes"] else [])


LAYOUTS: tuple[Layout, ...] = (
  Layout(
    project="timm",
    family="vit",
    marks=("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"),
    fields=_timm_fields,
    rules=_timm_rules,
  ),
  Layout(
    project="transformers",
    family="vit",
    marks=("embeddings.cls_token", "embeddings.patch_embeddings.projection.weight"),
    fields=_transformers_fields,
    rules=_transformers_rules,
    prefixes=("vit.",),
    ignored=(r"pooler\..*", r"embeddings\.mask_token"),
  ),
)
