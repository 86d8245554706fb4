"""Refuses impossible configs in one line, before anything costly starts."""

from ml_collections import ConfigDict
from PIL import ImageColor

import mlp_models
from train.errors import ConfigError
from train.optimizer import BEST


def check_config(config: ConfigDict) -> None:
  """Raises ConfigError for the first knob that is out of range or contradicts another."""

  def require(holds: bool, key: str, need: str) -> None:
    if not holds:
      value = config
      for part in key.split("."):
        value = value[part]
      raise ConfigError(f"config.{key} = {value!r}: {need}")

  if "model" not in config:
    raise ConfigError("the config has no `model`: choose a file such as configs/mixer.py")
  require(config.epochs >= 1, "epochs", "at least 1")
  require(config.batch_size >= 1, "batch_size", "at least 1")
  require(config.microbatch is None or config.microbatch >= 1, "microbatch", "at least 1, or None")
  require(config.cpu_microbatch >= 1, "cpu_microbatch", "at least 1")
  require(config.steps_per_call >= 1, "steps_per_call", "at least 1")
  for axis in ("data", "fsdp"):
    require(config.mesh[axis] == -1 or config.mesh[axis] >= 1, f"mesh.{axis}", "at least 1, or -1")
  require(config.mesh.data != -1 or config.mesh.fsdp != -1, "mesh.fsdp", "only one axis can be -1")
  require(0 <= config.seed < 2**32, "seed", "from 0 to 2**32 - 1")
  require(config.checkpoint_seconds > 0, "checkpoint_seconds", "more than 0")
  limit, workers = config.data.in_memory_bytes, config.data.workers
  require(limit is None or limit >= 0, "data.in_memory_bytes", "at least 0, or None")
  require(workers is None or workers >= 1, "data.workers", "at least 1, or None")
  most = config.data.max_images
  require(most is None or most >= 1, "data.max_images", "at least 1, or None")
  try:
    ImageColor.getrgb(config.data.background)
  except ValueError:
    require(False, "data.background", "a colour's name, or #rrggbb")
  require(0 <= config.augment.zoom < 1, "augment.zoom", "at least 0 and less than 1")
  require(0 <= config.augment.rotation <= 0.5, "augment.rotation", "from 0 to 0.5 of a turn")
  require(
    0 < config.optimizer.learning_rate < 2.0**128,  # a float32
    "optimizer.learning_rate",
    "a number above 0, less than 3.4e38",
  )
  require(0 <= config.optimizer.weight_decay < 1, "optimizer.weight_decay", "from 0 to below 1")
  require(0 <= config.optimizer.b1 < 1, "optimizer.b1", "at least 0 and less than 1")
  require(0 <= config.optimizer.b2 < 1, "optimizer.b2", "at least 0 and less than 1")
  require(config.optimizer.epsilon > 0, "optimizer.epsilon", "more than 0")
  require(0 < config.plateau.factor <= 1, "plateau.factor", "more than 0, at most 1 (1: none)")
  require(config.plateau.patience >= 1, "plateau.patience", "at least 1 epoch")
  require(config.plateau.min_delta > 0, "plateau.min_delta", "more than 0")
  require(config.early_stop_patience >= 0, "early_stop_patience", "at least 0 (0: never stop)")
  require(config.best_metric in BEST, "best_metric", " or ".join(BEST))
  require(config.nonfinite in ("stop", "skip"), "nonfinite", "stop or skip")
  try:
    mlp_models.create(**config.model, dtype=config.dtype, remat=config.remat)
  except (TypeError, ValueError) as error:
    raise ConfigError(f"config.model: {error}") from None
