"""How the learning rate goes over a run: up in the warm-up, then down by the schedule.

What is here depends on the step alone. The plateau (`optimizer.make_plateau`) looks at results, and
its scale multiplies the schedule's factor.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from train.errors import ConfigError

Array = jax.Array
Schedule = Callable[[int | Array], float | Array]  # step -> factor of the learning rate

_SHAPES = {  # from 1 to 0, by the fraction of the way from the end of the warm-up to the last step
  "plateau": None,
  "constant": None,
  "linear": lambda way: 1 - way,
  "cosine": lambda way: (1 + jnp.cos(jnp.pi * way)) / 2,
}
NAMES = tuple(_SHAPES)


def make_schedule(config: ConfigDict, total_steps: int) -> Schedule:
  """Makes (step, from 0) -> what the learning rate is multiplied by in this step (float32 []).

  Over W steps of warm-up it rises linearly, (step + 1) / W, so that the first step learns as well.
  From then on "linear" and "cosine" go from 1 to `final`, which the last step has; "plateau" and
  "constant" stay at 1.

  Args:
    config: of the run; `config.schedule` is used.
    total_steps: of the whole run, all epochs together.
  Cosine: Loshchilov and Hutter, "SGDR" (arXiv:1608.03983, equation 5), without restarts. Warm-up:
  Goyal et al. (arXiv:1706.02677, section 2.2).
  """
  shape, final = _SHAPES[config.schedule.name], config.schedule.final
  warmup = warmup_steps(config, total_steps)
  decay = max(1, total_steps - 1 - warmup)

  def schedule(step: int | Array) -> float | Array:
    factor: float | Array = 1.0
    if warmup:
      factor = jnp.minimum(1.0, (step + 1) / warmup)
    if shape:
      way = jnp.clip((step - warmup) / decay, 0.0, 1.0)
      factor *= final + (1 - final) * shape(way)
    return factor

  return schedule


def learning_rate(config: ConfigDict, total_steps: int, step: int, plateau_scale: Array) -> float:
  """The learning rate of one step (from 0), for people to read.

  Args:
    plateau_scale: of the state, `state.plateau.scale`.
  """
  factor = make_schedule(config, total_steps)(step)
  return config.optimizer.learning_rate * float(plateau_scale) * float(factor)


def warmup_steps(config: ConfigDict, total_steps: int) -> int:
  """Steps of the warm-up, in a run of `total_steps`."""
  fraction = round(config.schedule.warmup_fraction * total_steps)
  return config.schedule.warmup_steps or fraction


def check_warmup(config: ConfigDict, total_steps: int) -> None:
  """Raises ConfigError if the run ends before its warm-up does."""
  if (warmup := warmup_steps(config, total_steps)) >= total_steps and warmup > 1:
    name = "warmup_steps" if config.schedule.warmup_steps else "warmup_fraction"
    raise ConfigError(
      f"config.schedule.{name} = {config.schedule[name]:,}: the run ends after {total_steps:,} "
      "steps; choose fewer, or more epochs"
    )


def depends_on_epochs(config: ConfigDict) -> bool:
  """Whether a run of more epochs has other learning rates from its first step on."""
  return bool(_SHAPES[config.schedule.name] or config.schedule.warmup_fraction)


def plateau(config: ConfigDict) -> ConfigDict:
  """`config.plateau`; under "constant" with a factor of 1, which never lowers the rate."""
  if config.schedule.name != "constant":
    return config.plateau
  return ConfigDict(config.plateau.to_dict() | {"factor": 1.0})
