"""Refuses impossible configs in one line, before anything costly starts."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import ImageColor

import mlp_models
from train.data.framing import INTERPOLATIONS, MODES
from train.devices.machine import memory_limit
from train.devices.mesh import FSDP
from train.errors import ConfigError, printable, shown
from train.knobs import check_knobs, is_for_weights
from train.optimizer import BEST, split_frozen
from train.schedule import NAMES as SCHEDULES
from train.update_rules import MOMENTS, RULES

_MOST = 2**20  # no batch is as large, and no model as wide
_INT32 = 2**31 - 1  # the state counts in int32
_FLOAT32 = 1e38  # it computes in float32

# Least and greatest value of a number, both included, and what the message adds.
_RANGES: dict[str, tuple[float, float, str]] = {
  "epochs": (1, 10**6, ""),
  "batch_size": (1, _MOST, ""),
  "microbatch": (1, _MOST, ", or None"),
  "cpu_microbatch": (1, _MOST, ""),
  "steps_per_call": (1, _MOST, ""),
  "mesh.data": (1, _MOST, ", or -1"),
  "mesh.fsdp": (1, _MOST, ", or -1"),
  "data.decode_size": (1, 2**15, ", or None"),
  "data.in_memory_bytes": (0, 2**63, ", or None"),
  "data.max_images": (1, 2**63, ", or None"),
  "data.workers": (1, 1000, ", or None"),
  "augment.randaugment_ops": (0, 10, " (0: none)"),
  "augment.randaugment_magnitude": (0, 30, ""),
  "plateau.patience": (1, _INT32, " epoch"),
  "schedule.warmup_steps": (0, _INT32, " (0: none)"),
  "early_stop_patience": (0, _INT32, " (0: never stop)"),
}
# Greatest sizes of a model; _MOST for the others.
_LARGEST = {"image_size": 2**15, "num_blocks": 1000, "num_iterations": 1000}
_LAYERS = 100  # most layers of an MLP
_ANYTHING = {"mesh.data": -1, "mesh.fsdp": -1}  # values that are no numbers, besides None


def check_config(config: ConfigDict) -> None:
  """Raises ConfigError for the first knob that is out of range or contradicts another."""
  check_knobs(config)

  def require(holds: bool, key: str, need: str) -> None:
    if not holds:
      raise ConfigError(f"config.{key} = {shown(_get(config, key))}: {need}")

  for key, (least, most, words) in _RANGES.items():
    if (value := _get(config, key)) is not None and value != _ANYTHING.get(key):
      require(value >= least, key, f"at least {least}{words}")
      require(value <= most, key, f"at most {most:,}{words}")
  require(config.mesh.data != -1 or config.mesh.fsdp != -1, "mesh.fsdp", "only one axis can be -1")
  require(0 <= config.seed < 2**32, "seed", "from 0 to 2**32 - 1")
  _check_data(config, require)
  require(0 < config.checkpoint_seconds < math.inf, "checkpoint_seconds", "a number above 0")
  _check_augment(config.augment, require)
  _check_optimizer(config, require)
  require(0 < config.plateau.min_delta < _FLOAT32, "plateau.min_delta", "a number above 0")
  require(0 < config.plateau.factor <= 1, "plateau.factor", "more than 0, at most 1 (1: none)")
  _check_schedule(config.schedule, require)
  require(0 <= config.ema_decay < 1, "ema_decay", "from 0 (none) to below 1")
  require(0 <= config.label_smoothing < 1, "label_smoothing", "from 0 (none) to below 1")
  named = all(isinstance(name, str) and name for name in config.freeze)
  require(named, "freeze", "names of parameters, such as patch_embed,block0, or backbone")
  require(config.best_metric in BEST, "best_metric", " or ".join(BEST))
  require(config.nonfinite in ("stop", "skip"), "nonfinite", "stop or skip")
  need = (
    "this config needs weights: a .safetensors or .npz file, a folder, a workdir or hf://ORG/NAME"
  )
  require(bool(config.init) or not is_for_weights(config), "init", need)
  if not config.init:  # else the weights give the rest of the model
    check_model(config)


def check_model(config: ConfigDict) -> None:
  """Raises ConfigError if `config.model` makes no model, or one larger than any."""
  given = config.model.to_dict()
  if "variant" in given:  # it decides what is None
    given = {name: value for name, value in given.items() if value is not None}
  try:
    mlp_models.create(**given, dtype=config.dtype, remat=config.remat)
  except (TypeError, ValueError) as error:
    raise ConfigError(f"config.model: {printable(str(error))}") from None
  size = config.model.get("image_size")
  if isinstance(size, tuple | list):  # as images are decoded, cropped and warped
    raise ConfigError(
      f"config.model.image_size = {shown(size)}: training takes squares: choose one side, such as "
      f"--config.model.image_size={min(size)}"
    )
  for name, value in config.model.items():
    largest = _LARGEST.get(name, _MOST)
    sizes = value if isinstance(value, tuple | list) else [value]
    if len(sizes) > _LAYERS:
      raise ConfigError(f"config.model.{name} = {shown(value)}: at most {_LAYERS} layers")
    if any(isinstance(size, int) and size > largest for size in sizes):
      raise ConfigError(f"config.model.{name} = {shown(value)}: at most {largest:,}")


def _check_optimizer(config: ConfigDict, require: Callable[[bool, str, str], None]) -> None:
  """The part of `check_config` for `config.optimizer`."""
  knobs = config.optimizer
  require(knobs.name in RULES, "optimizer.name", f"one of {', '.join(RULES)}")
  for name in ("learning_rate", "epsilon"):
    require(0 < knobs[name] < _FLOAT32, f"optimizer.{name}", "a number above 0")
  require(0 <= knobs.weight_decay < 1, "optimizer.weight_decay", "from 0 to below 1")
  require(knobs.decay in ("all", "kernels"), "optimizer.decay", "all or kernels")
  for name in ("b1", "b2", "momentum"):
    require(0 <= knobs[name] < 1, f"optimizer.{name}", "at least 0 and less than 1")
  require(0 <= knobs.clip_norm < _FLOAT32, "optimizer.clip_norm", "a number, or 0 for no limit")
  require(0 < knobs.layer_decay <= 1, "optimizer.layer_decay", "more than 0, at most 1 (1: none)")
  makes_sense = not (knobs.independent_weight_decay and knobs.name == "lamb")
  require(
    makes_sense, "optimizer.independent_weight_decay", "not with lamb, whose trust ratio scales it"
  )


def _check_data(config: ConfigDict, require: Callable[[bool, str, str], None]) -> None:
  """The part of `check_config` for `config.data`."""
  data = config.data
  try:
    ImageColor.getrgb(data.background)
  except ValueError:
    require(False, "data.background", "a colour's name, or #rrggbb")
  crop_is_fine = data.crop is None or 0 < data.crop <= 1
  require(crop_is_fine, "data.crop", "more than 0, at most 1 (1: the whole side)")
  require(data.crop_mode in MODES, "data.crop_mode", " or ".join(MODES))
  is_known = data.interpolation in (None, *INTERPOLATIONS)
  require(is_known, "data.interpolation", " or ".join(INTERPOLATIONS))
  require(len(data.mean) in (0, 1, 3, 4), "data.mean", "one value, one for each channel, or ()")
  require(len(data.variance) == len(data.mean), "data.variance", "as many values as data.mean")
  # Deviations of images between 0 and 1 would be below 1: the usual mistake.
  for name, least, most in (("mean", 0, 255), ("variance", 1, 255**2)):
    are_numbers = all(isinstance(x, int | float) and least <= x <= most for x in data[name])
    require(
      are_numbers, f"data.{name}", f"numbers from {least} to {most:,}, for pixels of 0 to 255"
    )


def _check_augment(augment: ConfigDict, require: Callable[[bool, str, str], None]) -> None:
  """The part of `check_config` for `config.augment`."""
  require(0 <= augment.zoom < 1, "augment.zoom", "at least 0 and less than 1")
  require(0 <= augment.rotation <= 0.5, "augment.rotation", "from 0 to 0.5 of a turn")
  require(0 <= augment.shift <= 0.5, "augment.shift", "from 0 to 0.5 of a side")
  require(0 <= augment.crop <= 1, "augment.crop", "from 0 (none) to 1")
  require(1 <= augment.crop_aspect <= 100, "augment.crop_aspect", "from 1 (as the image) to 100")
  require(0 <= augment.erase <= 1, "augment.erase", "from 0 (none) to 1")
  require(0 <= augment.mixup <= 100, "augment.mixup", "from 0 (none) to 100")
  require(0 <= augment.cutmix <= 100, "augment.cutmix", "from 0 (none) to 100")
  require(0 < augment.mix_probability <= 1, "augment.mix_probability", "above 0, at most 1")
  is_alone = not (augment.trivial_augment and augment.randaugment_ops)
  require(is_alone, "augment.trivial_augment", "only with augment.randaugment_ops=0")


def _check_schedule(schedule: ConfigDict, require: Callable[[bool, str, str], None]) -> None:
  """The part of `check_config` for `config.schedule`."""
  require(schedule.name in SCHEDULES, "schedule.name", f"one of {', '.join(SCHEDULES)}")
  fraction = schedule.warmup_fraction
  require(0 <= fraction < 1, "schedule.warmup_fraction", "from 0 (none) to below 1")
  is_once = not (schedule.warmup_steps and fraction)
  require(is_once, "schedule.warmup_fraction", "warmup_steps is given, too: give one of the two")
  require(0 <= schedule.final <= 1, "schedule.final", "from 0 to 1")


def check_memory(config: ConfigDict, mesh: Mesh) -> None:
  """Raises ConfigError if a step can't fit the memory, whatever the compiler does.

  Counted are float32 parameters, the optimizer's moments and the average of those that train, and
  the images that are computed at a time; only shapes are computed. It is also an error if
  `config.freeze` names what the model lacks.

  Args:
    config: accepted by `check_config`.
  """
  size = config.model.image_size
  microbatch = config.microbatch or 1
  images = 4 * 3 * size**2 * microbatch  # of one device
  parameters = _parameters(config)
  trained = _trained_parameters(config) if config.freeze else parameters
  copies = MOMENTS[config.optimizer.name] + bool(config.ema_decay)
  state = 4 * (parameters + copies * trained) // mesh.shape[FSDP]
  device = mesh.local_devices[0]
  if device.platform == "cpu":
    needed, limit = len(mesh.local_devices) * (images + state), memory_limit()
  else:
    needed, limit = images + state, (device.memory_stats() or {}).get("bytes_limit", math.inf)
  if needed > limit:
    raise ConfigError(
      f"config.model needs {needed / 2**30:,.1f} GiB for parameters, optimizer state and "
      f"{microbatch} images of {size} x {size} pixels on a device, and there are "
      f"{limit / 2**30:,.1f}: choose smaller sizes, or larger patches"
    )


def _parameters(config: ConfigDict) -> int:
  """Parameters of the model, as if for one class."""

  def count(num_blocks: int) -> int:
    sizes = {"num_blocks": num_blocks}
    for field in ("num_iterations", "num_cross_attends"):  # from the second on they share weights
      if field in config.model:
        sizes[field] = min(2, config.model[field])
    return _count(_shapes(config, **sizes))

  if "num_blocks" not in config.model:  # a variant of a paper has a few dozen
    return _count(_shapes(config))
  one = count(1)
  return one + (config.model.num_blocks - 1) * (count(2) - one)  # blocks are alike


def _trained_parameters(config: ConfigDict) -> int:
  """Parameters that train, as if for one class."""
  return _count(split_frozen(_shapes(config), config.freeze)[0])


def _shapes(config: ConfigDict, **sizes: int) -> Any:
  """The parameters of the model with other `sizes`, for one class: shapes only."""
  model = mlp_models.create(**config.model.to_dict() | sizes | {"num_classes": 1})
  size = config.model.image_size

  def init() -> Any:
    return model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]

  return jax.eval_shape(init)


def _count(shapes: Any) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def _get(config: ConfigDict, key: str) -> Any:
  value: Any = config
  for part in key.split("."):
    value = value[part]
  return value
