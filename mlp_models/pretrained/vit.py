"""ViT in the names of timm and transformers; vit_npz.py has those of the JAX projects.

timm: its class VisionTransformer with `Block`s, pooled by "token", "avg" or "map". transformers:
ViTForImageClassification and ViTModel. Layer scale, registers, norms of queries and keys and the
like have arrays that no rule reads, so that such files are refused by the names of these arrays.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlp_models.pretrained import timm
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
  is_grid,
  linear,
  norm,
  oblong,
  out_of_heads,
  reshaped,
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
  reads_class_token = others["pool"] in ("cls", "cls_norm")
  tokens = {"position": "learned", "class_token": has_class_token and not reads_class_token}
  are_patches = is_grid(num_positions, patch_size, image_shape)
  num_patches = num_positions - int(has_class_token and not are_patches)
  tokens["image_size"] = image_size(num_patches, "the position embedding", patch_size, image_shape)
  sizes: Fields = {"patch_size": patch_size, "width": width}
  sizes |= {"head_dim": width // others["num_heads"], "mlp_units": (hidden, width)}
  rates = dict.fromkeys(("dropout_rate", "attention_dropout_rate", "head_dropout_rate"), 0.0)
  rest = {"head_units": (), "gelu_last": False, "attention_init": "papers", "head_init": "zeros"}
  return sizes | tokens | rates | rest | others


def _usual_heads(width: int) -> int:
  """The number of heads where nothing tells it: models wider than L have 16."""
  return 16 if width > 1024 else max(1, width // 64)


def _are_patches(shapes: Shapes, position: str, fields: Fields) -> bool:
  """Whether position embeddings are those of the patches alone; a usual file's are not."""
  size = fields["patch_size"], oblong(fields["image_size"])
  return position in shapes and is_grid(shapes[position][-2], *size)


def token_rules(fields: Fields, shapes: Shapes, cls: str, position: str | None) -> list[Rule]:
  """The class token and the position embeddings, if there are such."""
  width, path, rules = fields["width"], "position/embedding", []
  has_class_token = fields["class_token"] or fields["pool"] in ("cls", "cls_norm")
  if has_class_token:
    rules.append(reshaped(cls, "class_token", (1, 1, width), (width,)))
  if position and has_class_token and _are_patches(shapes, position, fields):
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
  args = timm.args_of(config)
  if args.get("norm_layer", "layernorm") != "layernorm" or args.get("pool_include_prefix"):
    raise ValueError("norm_layer and pool_include_prefix are not supported")
  if more := [token for token in ("reg_token", "dist_token") if token in shapes]:
    raise ValueError(f"{more[0]} is not supported")
  known = [_TIMM_HEADS[word] for word in (name, *name.split("_")) if word in _TIMM_HEADS]
  num_heads = args.get("num_heads") or next(iter(known), None)
  global_pool, notes = timm.global_pool(config)
  is_known = {"num_heads": num_heads, "pool": not notes, "gelu": timm.tells_gelu(config)}
  assumed = [field for field, known in is_known.items() if not known]
  return vit_fields(
    patches=(width, *patch),
    num_positions=shapes["pos_embed"][-2],
    image_shape=timm.image_shape(config),
    num_classes=shapes.get("head.weight", (0,))[0],
    num_blocks=count(shapes, "blocks.{}."),
    num_heads=num_heads or _usual_heads(width),
    assumed=assumed,
    notes=notes,
    hidden=shapes["blocks.0.mlp.fc1.weight"][0],
    pool=_timm_pool(shapes, global_pool),
    has_class_token="cls_token" in shapes,
    qkv_bias="blocks.0.attn.qkv.bias" in shapes,
    gelu=timm.gelu(config, "tanh" if _TIMM_TANH.fullmatch(name) else "exact"),
    norm_epsilon=timm.norm_epsilon(config),
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
  pools = {"token": "cls", "avg": "mean"}
  if global_pool not in pools:
    raise ValueError(f"global_pool {global_pool!r} is not supported")
  return pools[global_pool] + ("_norm" if norm_is_last else "")


def _timm_rules(fields: Fields, shapes: Shapes) -> list[Rule]:
  heads = fields["num_heads"]
  norm_is_last = fields["pool"] in ("cls_norm", "mean_norm")
  rules = [
    *conv_patches("patch_embed.proj", "patch_embed", fields["patch_size"]),
    *token_rules(fields, shapes, "cls_token", "pos_embed"),
    *norm("fc_norm" if norm_is_last else "norm", "norm"),
  ]
  for i in range(fields["num_blocks"]):
    theirs, ours = f"blocks.{i}", f"block{i}"
    qkv = [f"{ours}/attention/{part}" for part in QKV]
    rules += norm(f"{theirs}.norm1", f"{ours}/norm1")
    rules += into_heads(f"{theirs}.attn.qkv", qkv, heads, fields["qkv_bias"])
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


def _timm_unusual(params: Mapping[str, np.ndarray]) -> Shapes:
  """Where the class token's position is zero, timm has none (`no_embed_class`)."""
  position = params.get("position/embedding")
  if position is None or "class_token" not in params or position[0].any():
    return {}
  return {"pos_embed": (1, len(position) - 1, position.shape[1])}


def _timm_model(fields: Fields, shapes: Shapes) -> timm.Model:
  """Each of timm's architectures takes any size: the one of our width, and what it is told."""
  width, pool = fields["width"], fields["pool"]
  if fields["num_heads"] * fields["head_dim"] != width:
    raise ValueError(f"num_heads x head_dim must be the width, {width}")
  size = {192: "tiny", 384: "small", 1024: "large"}.get(width, "base")
  pools = {"cls": "token", "cls_norm": "token", "mean": "avg", "mean_norm": "avg", "map": "map"}
  args = {
    "img_size": fields["image_size"],
    "patch_size": fields["patch_size"],
    "in_chans": shapes["patch_embed.proj.weight"][1],
    "embed_dim": width,
    "depth": fields["num_blocks"],
    "num_heads": fields["num_heads"],
    "mlp_ratio": timm.mlp_ratio(fields["mlp_units"][0], width),
    "qkv_bias": fields["qkv_bias"],
    "class_token": "cls_token" in shapes,
    "no_embed_class": "cls_token" in shapes and _are_patches(shapes, "pos_embed", fields),
    "fc_norm": pool.endswith("_norm"),
    "global_pool": pools[pool],
    "act_layer": timm.act_layer(fields["gelu"]),
  }
  return timm.Model(f"vit_{size}_patch16_224", args, gelu_is_named=True)


def _mlp(first: str, second: str, ours: str) -> list[Rule]:
  return linear(first, f"{ours}/dense0") + linear(second, f"{ours}/dense1")


# transformers.


def _transformers_fields(shapes: Shapes, config: Config) -> Fields:
  width, _, *patch = shapes["embeddings.patch_embeddings.projection.weight"]
  block, names = _transformers_names(shapes)
  num_heads = config.get("num_attention_heads")
  return vit_fields(
    patches=(width, *patch),
    num_positions=shapes["embeddings.position_embeddings"][-2],
    image_shape=oblong(config.get("image_size")),
    num_classes=shapes.get("classifier.weight", (0,))[0],
    num_blocks=count(shapes, f"{block}."),
    num_heads=num_heads or _usual_heads(width),
    assumed=[] if num_heads else ["num_heads", "gelu"],
    hidden=shapes[f"{block.format(0)}.{names['dense0']}.weight"][0],
    pool="cls",
    has_class_token=True,
    qkv_bias=f"{block.format(0)}.{names['query']}.bias" in shapes,
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
      ours_part = [f"{ours}/attention/{part}"]
      rules += into_heads(f"{theirs}.{names[part]}", ours_part, heads, fields["qkv_bias"])
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
    unusual=_timm_unusual,
    model=_timm_model,
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
