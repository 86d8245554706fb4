"""Layout of FNet's weights: the encoder's layers of transformers' models of text.

What reads text is left out, so `fields` gives a model of images whose patch embedding and positions
start anew, with the head.
"""

from mlp_models.pretrained import rules
from mlp_models.pretrained.rules import Config, Fields, Layout, Rule, Shapes


def _fields(shapes: Shapes, config: Config) -> Fields:
  hidden_units, width = shapes["encoder.layer.0.intermediate.dense.weight"]
  return {
    "image_size": 224,
    "patch_size": 16,
    "width": width,
    "num_blocks": rules.count(shapes, "encoder.layer.{}."),
    "hidden_units": hidden_units,
    "gelu": rules.transformers_gelu(config, "gelu_new"),
    "norm_epsilon": config.get("layer_norm_eps", 1e-12),
    "num_classes": 0,
    "assumed": [] if "hidden_act" in config else ["gelu"],
  }


def _rules(fields: Fields, shapes: Shapes) -> list[Rule]:
  table = []
  for i in range(fields["num_blocks"]):
    theirs, ours = f"encoder.layer.{i}", f"block{i}"
    table += rules.norm(f"{theirs}.fourier.output.LayerNorm", f"{ours}/norm1")
    table += rules.linear(f"{theirs}.intermediate.dense", f"{ours}/ffn/in")
    table += rules.linear(f"{theirs}.output.dense", f"{ours}/ffn/out")
    table += rules.norm(f"{theirs}.output.LayerNorm", f"{ours}/norm2")
  return table


LAYOUTS = (
  Layout(
    project="transformers",
    family="fnet",
    marks=("encoder.layer.0.fourier.output.LayerNorm.weight",),
    fields=_fields,
    rules=_rules,
    prefixes=("fnet.",),
    lacks=("patch_embed/", "position/"),
    ignored=(
      r"embeddings\..*",
      r"pooler\..*",
      r"(cls|classifier|qa_outputs)\..*",
      r"encoder\.layer\.\d+\.fourier\.self\..*",  # matrices of the Fourier transform, for TPUs
    ),
  ),
)
