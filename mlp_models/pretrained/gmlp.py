"""Layout of gMLP's weights: timm's `gmlp_*`."""

from mlp_models.pretrained import rules, timm
from mlp_models.pretrained.rules import Config, Fields, Layout, Rule, Shapes


def _timm_fields(shapes: Shapes, config: Config) -> Fields:
  num_tokens, _ = shapes["blocks.0.mlp_channels.gate.proj.weight"]
  width, _, patch_size, _ = shapes["stem.proj.weight"]
  return {
    "image_size": rules.image_size(
      num_tokens, "blocks.0.mlp_channels.gate", patch_size, timm.image_shape(config)
    ),
    "patch_size": patch_size,
    "width": width,
    "num_blocks": rules.count(shapes, "blocks.{}."),
    "hidden_units": shapes["blocks.0.mlp_channels.fc1.weight"][0],
    "head_norm": True,
    "head_init": "zeros",
    "dropout_rate": 0.0,
    "gelu": timm.gelu(config),
    "norm_epsilon": timm.norm_epsilon(config),
    "gate_norm_epsilon": 1e-5,  # PyTorch's default, where the other norms are told 1e-6
    "num_classes": shapes.get("head.weight", (0,))[0],
    "assumed": [] if timm.tells_gelu(config) else ["gelu"],
    "notes": timm.global_pool(config)[1],
  }


def _timm_rules(fields: Fields, shapes: Shapes) -> list[Rule]:
  table = rules.conv_patches("stem.proj", "patch_embed", fields["patch_size"])
  for i in range(fields["num_blocks"]):
    theirs, ours = f"blocks.{i}", f"block{i}"
    table += rules.norm(f"{theirs}.norm", f"{ours}/norm1")
    table += rules.linear(f"{theirs}.mlp_channels.fc1", f"{ours}/proj_in")
    table += rules.norm(f"{theirs}.mlp_channels.gate.norm", f"{ours}/norm2")
    table += rules.linear(f"{theirs}.mlp_channels.gate.proj", f"{ours}/spatial")
    table += rules.linear(f"{theirs}.mlp_channels.fc2", f"{ours}/proj_out")
  table += rules.norm("norm", "norm")
  return table + (rules.linear("head", "head") if fields["num_classes"] else [])


_TIMM_SIZES = {128: "ti", 256: "s", 512: "b"}  # by width


def _timm_model(fields: Fields, shapes: Shapes) -> timm.Model:
  args, width = timm.mlp_mixer(fields, shapes), fields["width"]
  sizes = fields["patch_size"], fields["num_blocks"], fields["hidden_units"]
  if width in _TIMM_SIZES and sizes == (16, 30, 6 * width):
    fixed = ("patch_size", "num_blocks", "embed_dim", "num_classes")
    return timm.Model(f"gmlp_{_TIMM_SIZES[width]}16_224", timm.without(args, fixed))
  args["mlp_ratio"] = timm.mlp_ratio(fields["hidden_units"], width)
  classes = "block_layer=SpatialGatingBlock, mlp_layer=GatedMlp"
  return timm.Model("", args, f"timm.models.mlp_mixer.MlpMixer(**model_args, {classes})")


LAYOUTS = (
  Layout(
    project="timm",
    family="gmlp",
    marks=("stem.proj.weight", "blocks.0.mlp_channels.gate.proj.weight"),
    fields=_timm_fields,
    rules=_timm_rules,
    model=_timm_model,
  ),
)
