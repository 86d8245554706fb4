"""What timm's config.json says of a model, and what it must say for timm to make ours again."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mlp_models.pretrained.rules import Config, Fields, Shapes, oblong

_GELUS = {"gelu": "exact", "gelu_tanh": "tanh"}  # ours by timm's act_layer
NORM_EPSILON = 1e-6  # of timm's norms, unless our own config.json says another


class Model(NamedTuple):
  """How timm makes a model.

  architecture: the name that `timm.create_model` takes; "" if it has none of these sizes.
  args: its arguments.
  otherwise: without an architecture, the call that takes the arguments.
  gelu_is_named: whether `act_layer` may be a name, as config.json needs it, or must be a class.
  """

  architecture: str
  args: dict[str, Any]
  otherwise: str = ""
  gelu_is_named: bool = False


def args_of(config: Config) -> Mapping[str, Any]:
  """The arguments of a model's class that a config gives."""
  return config.get("model_args") or {}


def image_shape(config: Config) -> tuple[int, int] | None:
  """(H, W) of the images that a config says; None if they are square, or not said."""
  shape = args_of(config).get("img_size")
  if not shape:
    found = {**config, **(config.get("pretrained_cfg") or {})}.get("input_size")
    shape = found[1:] if found else None
  return oblong(shape)


def gelu(config: Config, default: str = "exact") -> str:
  """The field `gelu`. Raises ValueError if the activation is another one."""
  act_layer = args_of(config).get("act_layer")
  if act_layer is None:
    return default
  if act_layer not in _GELUS:
    known = " and ".join(map(repr, _GELUS))
    raise ValueError(f"the activation {act_layer!r} is not supported, only {known} are")
  return _GELUS[act_layer]


def tells_gelu(config: Config) -> bool:
  """Whether a config does: every architecture has its own, and `save` names it if it is not."""
  return "architecture" in config or "mlp_models" in config or "act_layer" in args_of(config)


def act_layer(gelu: str) -> str:
  """timm's name of a gelu."""
  return next(name for name, ours in _GELUS.items() if ours == gelu)


def norm_epsilon(config: Config) -> float:
  """The epsilon of the norms, which timm has no name for: from `save`, or timm's own."""
  return float((config.get("mlp_models") or {}).get("norm_epsilon", NORM_EPSILON))


def global_pool(config: Config) -> tuple[str | None, list[str]]:
  """The pooling that a config names, None if it does not, and a note if it is none at all."""
  args = args_of(config)
  name = args["global_pool"] if "global_pool" in args else config.get("global_pool")
  if name != "":
    return name, []
  return None, [
    "config.json has global_pool '': timm gives logits of each token, this model pools them first"
  ]


def mlp_ratio(units: int, width: int) -> float:
  """The ratio of which timm makes the units of a hidden layer again: int(ratio * width)."""
  ratio = units / width
  return ratio if int(ratio * width) == units else (units + 0.5) / width


def mlp_mixer(fields: Fields, shapes: Shapes) -> dict[str, Any]:
  """The arguments of timm's class MlpMixer that gMLP has as well."""
  return {
    "num_classes": fields["num_classes"],
    "img_size": fields["image_size"],
    "in_chans": shapes["stem.proj.weight"][1],
    "patch_size": fields["patch_size"],
    "num_blocks": fields["num_blocks"],
    "embed_dim": fields["width"],
  }


def without(args: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
  """Arguments without those that an architecture's name fixes, and which timm takes only once."""
  return {name: value for name, value in args.items() if name not in names}
