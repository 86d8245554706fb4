"""TrainState, all that a checkpoint saves, and how it is initialised."""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

import mlp_models
from train import optimizer, schedule
from train.data.splits import DatasetInfo
from train.devices.mesh import state_shardings

Array = jax.Array


class Sums(struct.PyTreeNode):
  """Sums over examples, float32 scalars; divided by `count` they are the metrics."""

  loss: Array  # cross-entropy, in nats
  correct: Array  # examples whose label has the largest logit; on a tie the first class wins
  top5: Array  # examples whose label is among the five largest logits
  count: Array

  @classmethod
  def zero(cls) -> "Sums":
    return cls(**{name: jnp.zeros((), jnp.float32) for name in cls.__dataclass_fields__})

  def means(self) -> dict[str, float]:
    """`loss`, `accuracy` and `top5`, the last two as fractions, as Python floats.

    NaN if no example was counted, as in an epoch whose updates were all skipped.
    """
    loss, correct, top5, count = (float(x) for x in jax.device_get(jax.tree.leaves(self)))
    count = count or math.nan
    return {"loss": loss / count, "accuracy": correct / count, "top5": top5 / count}


class Weights(struct.PyTreeNode):
  """The part of a TrainState that evaluation and prediction need."""

  params: dict
  mean: Array  # float32 [channels], of the training images, in pixel units
  variance: Array  # float32 [channels]


class TrainState(struct.PyTreeNode):
  """A run at some step. The rest of the run is a pure function of this and of the config.

  VERSION goes up when the fields change, or how a step uses them: checkpoints of another version
  are refused. mlp_models 0.3 writes 2, 0.2 wrote 1, 0.1 none. A field that is None leaves nothing
  in a checkpoint, so that adding one that may be None needs no new version.
  """

  VERSION: ClassVar[int] = 2
  step: Array  # int32 []: updates done
  epoch: Array  # int32 []: epochs finished, their evaluation included
  params: dict
  opt_state: optax.OptState
  plateau: optax.OptState  # `plateau.scale` multiplies the learning rate
  best: optimizer.Best
  sums: Sums  # over the training examples of the epoch under way
  mean: Array  # float32 [channels], of the training images, in pixel units
  variance: Array  # float32 [channels]
  skipped: Array  # int32 []: steps without an update because loss or gradients were not finite
  stopped: Array  # bool []: the next step is not finite; from there on nothing changes any more
  seed: Array  # uint32 []: not a PRNG key, which would tie the checkpoint to JAX's key type
  average: dict | None = None  # of the params that train, over the steps; None: not averaged

  def weights(self) -> Weights:
    """Params, averaged if they are, and channel statistics: what evaluation and prediction use."""
    params = self.params
    if self.average is not None:
      params = unflatten_dict(flatten_dict(params) | flatten_dict(self.average))
    return Weights(params, self.mean, self.variance)

  def begin_average(self) -> "TrainState":
    """The average begun anew with the params, if they are averaged."""
    if self.average is None:
      return self
    params = flatten_dict(self.params)
    return self.replace(
      average=unflatten_dict({name: jnp.copy(params[name]) for name in flatten_dict(self.average)})
    )


def saved_fields(tree: TrainState | Weights) -> dict[str, Any]:
  """What a checkpoint holds: not the fields that are None, which orbax would record and then demand
  of every template."""
  return {name: value for name, value in vars(tree).items() if value is not None}


def count_parameters(params: dict) -> int:
  """Number of elements in a tree of arrays."""
  return sum(x.size for x in jax.tree.leaves(params))


def make_model(config: ConfigDict, num_classes: int) -> nn.Module:
  """The model of `config.model`, computing in `config.dtype`.

  Raises:
    ValueError: a size or name in `config.model` is wrong.
  """
  return mlp_models.create(
    **config.model, num_classes=num_classes, dtype=config.dtype, remat=config.remat
  )


def apply_model(model: nn.Module, params: dict, images: Array, **options) -> Array:
  """The logits of `model.apply({"params": params}, images, **options)`."""
  logits = model.apply({"params": params}, images, **options)
  assert isinstance(logits, Array)  # not a pair of logits and variables
  return logits


def init_state(
  config: ConfigDict, info: DatasetInfo, mean: np.ndarray, variance: np.ndarray
) -> TrainState:
  """The state before the first step.

  Args:
    mean, variance: float32 [channels], of the training images, in pixel units.
  """
  size, channels = config.model.image_size, info.image_shape[-1]
  model = make_model(config, info.num_classes)
  images = jnp.zeros((1, size, size, channels), jnp.float32)
  params = model.init(jax.random.key(config.seed), images)["params"]
  trained, _ = optimizer.split_frozen(params, config.freeze)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    epoch=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.make_optimizer(config.optimizer, config.freeze).init(params),
    plateau=optimizer.make_plateau(schedule.plateau(config)).init(params),
    best=optimizer.init_best(optimizer.BEST[config.best_metric]),
    sums=Sums.zero(),
    mean=jnp.asarray(mean),
    variance=jnp.asarray(variance),
    skipped=jnp.zeros((), jnp.int32),
    stopped=jnp.zeros((), jnp.bool),
    seed=jnp.asarray(config.seed, jnp.uint32),
    average=jax.tree.map(jnp.copy, trained) if config.ema_decay else None,
  )


def update_average(average: dict | None, trained: dict, updates: Array, decay: float) -> Any:
  """The exponential moving average after one more update: decay * average + (1 - decay) * params.

  Early on the decay is less, (1 + updates) / (10 + updates), so that the initial weights, which are
  random, are soon forgotten. Follows TensorFlow's `tf.train.ExponentialMovingAverage` with
  `num_updates`.

  Args:
    average: None: nothing is averaged, and None is returned.
    trained: the parameters that train, after the update.
    updates: int32 [], steps done so far, this one included.
  """
  if average is None:
    return None
  kept = jnp.minimum(decay, (1 + updates) / (10 + updates))
  return jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, average, trained)


def make_init(config: ConfigDict, info: DatasetInfo, mesh: Mesh) -> jax.stages.Wrapped:
  """`init_state` for a run, jitted: (mean, variance) -> the state, laid out on the mesh."""
  init = jax.jit(functools.partial(init_state, config, info))  # traced once for both uses
  shapes = jax.eval_shape(init, *abstract_statistics(info))
  return jax.jit(init, out_shardings=state_shardings(shapes, mesh))


def abstract_state(init: Callable, info: DatasetInfo) -> TrainState:
  """Shapes, dtypes and shardings that `init`, from `make_init`, returns; nothing is computed."""
  return jax.eval_shape(init, *abstract_statistics(info))


def abstract_statistics(info: DatasetInfo) -> list[jax.ShapeDtypeStruct]:
  """Shapes and dtypes of the two results of `channel_statistics`."""
  return [jax.ShapeDtypeStruct(info.image_shape[-1:], jnp.float32)] * 2
