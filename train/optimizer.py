"""The optimizer and which arrays it trains, the plateau that lowers its rate, and early stopping.

They follow Keras 3 (AdamW, ReduceLROnPlateau, EarlyStopping) and are built from optax's parts. All
state is arrays, so that a checkpoint holds it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from optax.contrib import ReduceLROnPlateauState

from train.errors import ConfigError, shown
from train.update_rules import kernels, make_rule

Array = jax.Array
Mode = Literal["min", "max"]
BEST: dict[str, Mode] = {"val_loss": "min", "val_accuracy": "max"}  # metrics to choose weights by
_BACKBONE = "backbone"  # in `freeze`: all but the head
_HEAD = "head"  # the layer that num_classes=0 leaves out, in every family
# What follows the blocks, by the beginning of its name: no family has it before them.
_AFTER_BLOCKS = ("norm", "pool", "query", "decoder", "head")


def make_optimizer(
  config, freeze: Sequence[str] = (), sharding: NamedSharding | None = None
) -> optax.GradientTransformationExtraArgs:
  """The optimizer of a run, over all parameters that train.

  Args:
    config: `name` and what `update_rules.make_rule` takes; learning_rate, weight_decay, decay,
      independent_weight_decay, clip_norm, layer_decay. The weight decay is added to the rule's
      update, never to the gradients, and is multiplied by the learning rate (Keras 3, optax:
      param -= learning_rate * weight_decay * param), in LAMB by the trust ratio, too. With
      `independent_weight_decay` neither learning rate, schedule nor plateau changes it (TensorFlow
      Addons: param -= weight_decay * param). `decay`: "all" decays biases and norms, too, as in
      Keras; "kernels" only what `update_rules.kernels` says. `clip_norm`: the largest norm of all
      gradients together, before the rule; 0.0: none. `layer_decay`: see `learning_rate_factors`.
    freeze: as for `split_frozen`.
    sharding: as for `update_rules.orthogonalize`; the results are the same without.
  Returns:
    A transformation for all parameters; its state, gradients and updates are trees of those that
    train. `update(grads, state, params, learning_rate_scale=scale)` multiplies the learning rate by
    the plateau's scale (float or float32 []) in that step.
  Follows Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithms 1 and 2.
  """
  decays = kernels if config.decay == "kernels" else None
  learning_rate = _scale_by_learning_rate(config.learning_rate)
  parts = [make_rule(config, sharding)]
  if config.clip_norm:
    parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
  if config.independent_weight_decay:
    parts += [learning_rate, optax.add_decayed_weights(-config.weight_decay, decays)]
  else:
    parts.append(optax.add_decayed_weights(config.weight_decay, decays))
    if config.name == "lamb":
      parts.append(optax.scale_by_trust_ratio())
    parts.append(learning_rate)
  chain = optax.chain(*parts)

  def init(params):
    return chain.init(split_frozen(params, freeze)[0])

  def update(grads, state, params, **extra_args):
    trained, _ = split_frozen(params, freeze)
    if config.layer_decay != 1.0:
      factors = learning_rate_factors(params, config.layer_decay)
      extra_args["factors"] = {name: factors[name] for name in flatten_dict(trained, sep="/")}
    return chain.update(grads, state, trained, **extra_args)

  return optax.GradientTransformationExtraArgs(init, update)


def split_frozen(params: dict, freeze: Sequence[str]) -> tuple[dict, dict]:
  """The parameters that train, and those that do not: two trees that `join` makes one again.

  Args:
    params: of a model, or a tree with the same names.
    freeze: what does not train, beginnings of paths such as "patch_embed" or "latent/block0";
      "backbone" is all but the head.
  Raises:
    ConfigError: one of `freeze` is not there, or nothing is left to train.
  """
  if not freeze:
    return params, {}
  flat = flatten_dict(params, sep="/")
  frozen: set[str] = set()
  for beginning in freeze:
    if beginning == _BACKBONE:
      found = {name for name in flat if name.partition("/")[0] != _HEAD}
    else:
      found = {name for name in flat if f"{name}/".startswith(f"{beginning.rstrip('/')}/")}
    if not found:
      names = ", ".join([_BACKBONE, *params])
      raise ConfigError(f"config.freeze: the model has no {shown(beginning)}: there are {names}")
    frozen |= found
  if len(frozen) == len(flat):
    raise ConfigError("config.freeze: nothing is left to train")

  def part(is_frozen: bool) -> dict:
    return unflatten_dict({k: v for k, v in flat.items() if (k in frozen) == is_frozen}, sep="/")

  return part(False), part(True)


def join(trained: dict, frozen: dict) -> dict:
  """The tree that `split_frozen` has split."""
  if not frozen:
    return trained
  return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))


def learning_rate_factors(params: dict, layer_decay: float) -> dict[str, float]:
  """What the learning rate of each parameter is multiplied by, by its path.

  layer_decay ** (the number of blocks + 1 - depth): lower layers learn less. Embeddings, positions,
  latents and whatever else comes before the blocks are at depth 0, block i is at depth i + 1; the
  norm after the blocks and the head have the full rate. Perceiver's blocks are those of its latent
  transformer, and its cross-attention comes before them.
  Follows Clark et al., "ELECTRA" (arXiv:2003.10555), and He et al., "MAE" (arXiv:2111.06377,
  appendix A.1).
  """
  names = list(flatten_dict(params, sep="/"))
  blocks = {name: int(found[1]) for name in names if (found := re.search(r"\bblock(\d+)/", name))}
  top = max(blocks.values(), default=-1) + 2

  def depth(name: str) -> int:
    if name in blocks:
      return blocks[name] + 1
    return top if name.startswith(_AFTER_BLOCKS) else 0

  return {name: layer_decay ** (top - depth(name)) for name in names}


def _scale_by_learning_rate(learning_rate: float) -> optax.GradientTransformationExtraArgs:
  def update(
    updates,
    state,
    params=None,
    *,
    learning_rate_scale,
    factors: Mapping[str, float] | None = None,
    **extra_args,
  ):
    del params, extra_args
    step_size = -learning_rate * learning_rate_scale
    if factors is None:
      return jax.tree.map(lambda u: step_size * u, updates), state
    flat = flatten_dict(updates, sep="/")
    scaled = {name: factors[name] * step_size * u for name, u in flat.items()}
    return unflatten_dict(scaled, sep="/"), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_plateau(config) -> optax.GradientTransformationExtraArgs:
  """Keras' ReduceLROnPlateau without cooldown; its state's `scale` multiplies the learning rate.

  Args:
    config: `factor` (1.0 for no plateau: the scale stays 1), `patience` in epochs, `min_delta`,
      the absolute fall below the best loss that counts as an improvement.
  Returns:
    A transformation; `init(params)` makes its state and `end_of_epoch` updates it.
  Raises:
    ValueError: factor is not in (0, 1], or min_delta is not positive.
  """
  patience, factor = config.patience, config.factor
  if factor == 1.0:  # optax refuses 1; endless patience keeps the state's structure
    patience, factor = jnp.iinfo(jnp.int32).max, 0.5
  return optax.contrib.reduce_on_plateau(
    factor=factor, patience=patience, rtol=0.0, atol=config.min_delta
  )


def end_of_epoch(
  plateau: optax.GradientTransformationExtraArgs, state: ReduceLROnPlateauState, val_loss: Any
) -> ReduceLROnPlateauState:
  """The plateau's state after an epoch with this validation loss (float or float32 [])."""
  _, state = plateau.update({}, state, value=jnp.asarray(val_loss, jnp.float32))
  return state


class Best(NamedTuple):
  """The best value of the watched metric, and its epoch.

  value: float32 [], inf ("min") or -inf ("max") before the first epoch.
  epoch: int32 [], counted from 1; 0 while no epoch has been the best.
  """

  value: Array
  epoch: Array


def init_best(mode: Mode) -> Best:
  """The Best before the first epoch. mode: "min" for a loss, "max" for an accuracy."""
  return Best(jnp.float32(jnp.inf if mode == "min" else -jnp.inf), jnp.int32(0))


def update_best(best: Best, value: Any, epoch: Any, mode: Mode) -> Best:
  """`best` after `epoch` (from 1) ended with `value`. A tie or a NaN is no improvement."""
  value = jnp.asarray(value, jnp.float32)
  improved = value < best.value if mode == "min" else value > best.value
  return Best(
    jnp.where(improved, value, best.value),
    jnp.where(improved, jnp.int32(epoch), best.epoch),
  )


def should_stop(best: Best, epoch: int, patience: int) -> bool:
  """Whether `epoch` was the `patience`th in a row without improvement; never if patience is 0.

  Follows Keras' EarlyStopping with min_delta 0.
  """
  return bool(patience) and epoch - int(best.epoch) >= patience
