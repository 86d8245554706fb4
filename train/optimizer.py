"""AdamW, the plateau that lowers its learning rate, the best epoch so far and early stopping.

They follow Keras 3 (AdamW, ReduceLROnPlateau, EarlyStopping) and are built from optax's parts. All
state is arrays, so that a checkpoint holds it.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ReduceLROnPlateauState

Array = jax.Array
Mode = Literal["min", "max"]
BEST: dict[str, Mode] = {"val_loss": "min", "val_accuracy": "max"}  # metrics to choose weights by


def make_optimizer(config) -> optax.GradientTransformationExtraArgs:
  """AdamW over all parameters as in Keras: biases and norms decay, too.

  Args:
    config: learning_rate, weight_decay, independent_weight_decay, b1, b2, epsilon. The decay is
      multiplied by the learning rate (Keras 3, optax: param -= learning_rate * weight_decay *
      param). With `independent_weight_decay` neither the learning rate nor the plateau changes it
      (TensorFlow Addons: param -= weight_decay * param).
  Returns:
    A transformation whose `update(grads, state, params, learning_rate_scale=scale)` multiplies the
    learning rate by the plateau's scale (float or float32 []) in that step.
  Follows Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2.
  """
  adam = scale_by_keras_adam(b1=config.b1, b2=config.b2, epsilon=config.epsilon)
  learning_rate = _scale_by_learning_rate(config.learning_rate)
  if config.independent_weight_decay:
    return optax.chain(adam, learning_rate, optax.add_decayed_weights(-config.weight_decay))
  return optax.chain(adam, optax.add_decayed_weights(config.weight_decay), learning_rate)


def scale_by_keras_adam(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
  """`optax.scale_by_adam` with epsilon as in Keras: added to the uncorrected root.

  Step t (from 1) gives m sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + epsilon). In optax's form, which
  corrects both moments, this is an epsilon of epsilon / sqrt(1 - b2^t): 32 times as large at t = 1
  and b2 = 0.999, which matters for the first steps of weights whose gradients are near epsilon.
  Follows Kingma and Ba, "Adam" (arXiv:1412.6980), the reordered form at the end of section 2.
  """

  def update(grads, state, params=None):
    del params
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
    count = optax.safe_increment(state.count)
    correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
    updates = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + epsilon), mu, nu)
    return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

  return optax.GradientTransformation(optax.scale_by_adam().init, update)


def _scale_by_learning_rate(learning_rate: float) -> optax.GradientTransformationExtraArgs:
  def update(updates, state, params=None, *, learning_rate_scale, **extra_args):
    del params, extra_args
    step_size = -learning_rate * learning_rate_scale
    return jax.tree.map(lambda u: step_size * u, updates), state

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
