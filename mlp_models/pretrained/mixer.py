"""Layouts of MLP-Mixer's weights: timm's `mixer_*`, and the authors' npz files."""

from mlp_models.pretrained import rules, timm
from mlp_models.pretrained.rules import Config, Fields, Layout, Rule, Shapes

_PAPER: Fields = {
  "shared_norm": False,
  "head_norm": True,
  "norm_epsilon": 1e-6,
  "head_init": "zeros",
  "dropout_rate": 0.0,
}


def _timm_fields(shapes: Shapes, config: Config) -> Fields:
  token_units, num_tokens = shapes["blocks.0.mlp_tokens.fc1.weight"]
  if shapes["blocks.0.mlp_tokens.fc2.weight"] != (num_tokens, token_units):
    raise ValueError("its MLPs have gates (timm's gmixer), those of MLP-Mixer have none")
  width, _, patch_size, _ = shapes["stem.proj.weight"]
  return _PAPER | {
    "image_size": rules.image_size(
      num_tokens, "blocks.0.mlp_tokens", patch_size, timm.image_shape(config)
    ),
    "patch_size": patch_size,
    "width": width,
    "num_blocks": rules.count(shapes, "blocks.{}."),
    "token_units": token_units,
    "channel_units": shapes["blocks.0.mlp_channels.fc1.weight"][0],
    "gelu": timm.gelu(config),
    "norm_epsilon": timm.norm_epsilon(config),
    "num_classes": shapes.get("head.weight", (0,))[0],
    "assumed": [] if timm.tells_gelu(config) else ["gelu"],
    "notes": timm.global_pool(config)[1],
  }


def _timm_rules(fields: Fields, shapes: Shapes) -> list[Rule]:
  table = rules.conv_patches("stem.proj", "patch_embed", fields["patch_size"])
  for i in range(fields["num_blocks"]):
    theirs, ours = f"blocks.{i}", f"block{i}"
    for norm in ("norm1", "norm2"):
      table += rules.norm(f"{theirs}.{norm}", f"{ours}/{norm}")
    for their_mlp, our_mlp in (("mlp_tokens", "token_mlp"), ("mlp_channels", "channel_mlp")):
      table += rules.linear(f"{theirs}.{their_mlp}.fc1", f"{ours}/{our_mlp}/in")
      table += rules.linear(f"{theirs}.{their_mlp}.fc2", f"{ours}/{our_mlp}/out")
  table += rules.norm("norm", "norm")
  return table + (rules.linear("head", "head") if fields["num_classes"] else [])


_TIMM_SIZES = {(8, 512): "s", (12, 768): "b", (24, 1024): "l"}  # by blocks and width


def _timm_model(fields: Fields, shapes: Shapes) -> timm.Model:
  args = timm.mlp_mixer(fields, shapes)
  units, width = (fields["token_units"], fields["channel_units"]), fields["width"]
  args["mlp_ratio"] = [timm.mlp_ratio(number, width) for number in units]
  size = _TIMM_SIZES.get((fields["num_blocks"], width))
  if size and fields["patch_size"] in (16, 32):
    fixed = ("patch_size", "num_blocks", "embed_dim", "num_classes")
    return timm.Model(f"mixer_{size}{fields['patch_size']}_224", timm.without(args, fixed))
  return timm.Model("", args, "timm.models.mlp_mixer.MlpMixer(**model_args)")


def _npz_fields(shapes: Shapes, config: Config) -> Fields:
  num_tokens, token_units = shapes["MixerBlock_0/token_mixing/Dense_0/kernel"]
  patch_size, _, _, width = shapes["stem/kernel"]
  return _PAPER | {
    "image_size": rules.image_size(num_tokens, "MixerBlock_0/token_mixing", patch_size),
    "patch_size": patch_size,
    "width": width,
    "num_blocks": rules.count(shapes, "MixerBlock_{}/"),
    "token_units": token_units,
    "channel_units": shapes["MixerBlock_0/channel_mixing/Dense_0/kernel"][1],
    "gelu": "tanh",
    "num_classes": shapes.get("head/bias", (0,))[0],
  }


def _npz_rules(fields: Fields, shapes: Shapes) -> list[Rule]:
  patch_size, width = fields["patch_size"], fields["width"]
  their_shape, our_shape = (patch_size, patch_size, -1, width), (-1, width)
  table = [
    rules.reshaped("stem/kernel", "patch_embed/kernel", their_shape, our_shape),
    rules.same("stem/bias", "patch_embed/bias"),
  ]
  for i in range(fields["num_blocks"]):
    theirs, ours = f"MixerBlock_{i}", f"block{i}"
    table += _npz_layer(f"{theirs}/LayerNorm_0", f"{ours}/norm1", "scale")
    table += _npz_layer(f"{theirs}/LayerNorm_1", f"{ours}/norm2", "scale")
    for their_mlp, our_mlp in (("token_mixing", "token_mlp"), ("channel_mixing", "channel_mlp")):
      table += _npz_layer(f"{theirs}/{their_mlp}/Dense_0", f"{ours}/{our_mlp}/in", "kernel")
      table += _npz_layer(f"{theirs}/{their_mlp}/Dense_1", f"{ours}/{our_mlp}/out", "kernel")
  table += _npz_layer("pre_head_layer_norm", "norm", "scale")
  return table + (_npz_layer("head", "head", "kernel") if fields["num_classes"] else [])


def _npz_layer(theirs: str, ours: str, weight: str) -> list[Rule]:
  return [rules.same(f"{theirs}/{leaf}", f"{ours}/{leaf}") for leaf in (weight, "bias")]


LAYOUTS = (
  Layout(
    project="timm",
    family="mixer",
    marks=("stem.proj.weight", "blocks.0.mlp_tokens.fc1.weight"),
    fields=_timm_fields,
    rules=_timm_rules,
    model=_timm_model,
  ),
  # google-research/vision_transformer and big_vision; Flax's gelu is the tanh kind.
  Layout(
    project="npz",
    family="mixer",
    marks=("stem/kernel", "MixerBlock_0/token_mixing/Dense_0/kernel"),
    fields=_npz_fields,
    rules=_npz_rules,
    prefixes=("params/", "opt/target/"),
  ),
)
