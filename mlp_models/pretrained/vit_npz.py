"""ViT in the names of google-research/vision_transformer and of google-research/big_vision."""

import numpy as np

from mlp_models.pretrained.rules import (
  Config,
  Fields,
  Layout,
  Rule,
  Shapes,
  count,
  reshaped,
  same,
)
from mlp_models.pretrained.vit import QKV, token_rules, vit_fields

_BLOCK = "Transformer/encoderblock"
_NPZ_POSITIONS = (
  "pos_embedding",
  "Transformer/posembed_input/pos_embedding",
  "Transformer/pos_embedding",
)


def _npz_fields(shapes: Shapes, config: Config) -> Fields:
  del config  # there is none
  *patch, _, width = shapes["embedding/kernel"]
  has_class_token, position = "cls" in shapes, _npz_position(shapes)
  others: Fields = {"gelu": "tanh", "norm_epsilon": 1e-6}
  if not position:
    others |= {"position": "sincos2d"}
  if "pre_logits/kernel" in shapes:
    others |= {"head_units": (shapes["pre_logits/kernel"][1],), "head_activation": "tanh"}
  layers = {ours: theirs for theirs, ours in _npz_layers(shapes)}
  block = _BLOCK if _is_stacked(shapes) else f"{_BLOCK}_0"
  return vit_fields(
    patches=(width, *patch),
    # Fixed positions leave no array: 224 pixels, as in the published files of this kind.
    num_positions=shapes[position][-2] if position else (224 // patch[0]) ** 2,
    num_classes=shapes.get("head/bias", (0,))[0],
    num_blocks=count(shapes, f"{_BLOCK}_{{}}/") or shapes[f"{block}/LayerNorm_0/scale"][0],
    num_heads=shapes[f"{block}/{layers['attention/query']}/bias"][-2],
    hidden=shapes[f"{block}/{layers['mlp/dense0']}/bias"][-1],
    pool="map" if "MAPHead_0/probe" in shapes else "cls" if has_class_token else "mean",
    has_class_token=has_class_token,
    **others,
  )


def _npz_position(shapes: Shapes) -> str | None:
  return next((name for name in _NPZ_POSITIONS if name in shapes), None)


def _is_stacked(shapes: Shapes) -> bool:
  """Whether one array holds a parameter of all blocks, as blocks in a scan have it."""
  return f"{_BLOCK}/LayerNorm_0/scale" in shapes


def _npz_layers(shapes: Shapes) -> list[tuple[str, str]]:
  """Their and our names of the layers in a block."""
  attention, norm2, mlp = "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"
  if f"{_BLOCK}_0/LayerNorm_2/scale" in shapes:  # vision_transformer counts all kinds in one row
    attention, norm2, mlp = "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"
  return [
    ("LayerNorm_0", "norm1"),
    *((f"{attention}/{part}", f"attention/{part}") for part in (*QKV, "out")),
    (norm2, "norm2"),
    *((f"{mlp}/Dense_{n}", f"mlp/dense{n}") for n in range(2)),
  ]


def _npz_rules(fields: Fields, shapes: Shapes) -> list[Rule]:
  width, patch_size, blocks = fields["width"], fields["patch_size"], range(fields["num_blocks"])
  position, is_stacked = _npz_position(shapes), _is_stacked(shapes)
  in_block = _npz_layers(shapes)
  layers = [("Transformer/encoder_norm", "norm")]
  if fields["head_units"]:
    layers.append(("pre_logits", "head_mlp/dense0"))
  if fields["num_classes"]:
    layers.append(("head", "head"))
  if not is_stacked:
    layers += [(f"{_BLOCK}_{i}/{a}", f"block{i}/{b}") for i in blocks for a, b in in_block]
  kernel_shape = (patch_size, patch_size, -1, width)
  rules = [
    reshaped("embedding/kernel", "patch_embed/kernel", kernel_shape, (-1, width)),
    same("embedding/bias", "patch_embed/bias"),
    *token_rules(fields, shapes, "cls", position),
  ]
  if fields["pool"] == "map":
    rules.append(reshaped("MAPHead_0/probe", "pool/probe", (1, 1, width), (1, width)))
    names = {"LayerNorm_0": "norm"} | {a: b for a, b in _npz_layers({}) if "/" in b}
    layers += [(f"MAPHead_0/{theirs}", f"pool/{ours}") for theirs, ours in names.items()]
  rules += [same(a, b) for layer in layers for a, b in _npz_leaves(*layer)]
  if is_stacked:
    for theirs, ours in (pair for layer in in_block for pair in _npz_leaves(*layer)):
      paths = tuple(f"block{i}/{ours}" for i in blocks)
      rules.append(Rule(f"{_BLOCK}/{theirs}", paths, list, np.stack))
  return rules


def _npz_leaves(theirs: str, ours: str) -> list[tuple[str, str]]:
  """Their and our names of a layer's arrays, which both keep alike."""
  weight = "scale" if "LayerNorm" in theirs or theirs.endswith("_norm") else "kernel"
  return [(f"{theirs}/{leaf}", f"{ours}/{leaf}") for leaf in (weight, "bias")]


LAYOUTS: tuple[Layout, ...] = (
  Layout(
    project="npz",
    family="vit",
    marks=("embedding/kernel", "Transformer/encoder_norm/scale"),
    fields=_npz_fields,
    rules=_npz_rules,
    prefixes=("params/img/", "params/", "opt/target/"),
    ignored=(r"txt/.*", "t", "b"),  # of a model of images and texts
  ),
)
