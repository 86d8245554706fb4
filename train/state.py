"""TrainState: all there is to save, and how it is made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Sharding
from ml_collections import ConfigDict

import mlp_models
from train import optimizer
from train.data import DatasetInfo

Array = jax.Array


class Sums(struct.PyTreeNode):
  """What is summed over examples: float32 scalars. Divided by `count` they are the metrics."""

  loss: Array  # cross-entropy, in nats
  correct: Array  # examples whose label has the largest logit; of equal ones the first counts
  top5: Array  # examples whose label is among the five largest logits
  count: Array

  @classmethod
  def zero(cls) -> "Sums":
    return cls(**{name: jnp.zeros((), jnp.float32) for name in cls.__dataclass_fields__})

  def means(self) -> dict[str, float]:
    """`loss`, `accuracy` and `top5`, the last two as fractions, as Python floats."""
    loss, correct, top5, count = (float(x) for x in jax.device_get(jax.tree.leaves(self)))
    return {"loss": loss / count, "accuracy": correct / count, "top5": top5 / count}


class Weights(struct.PyTreeNode):
  """What evaluation and prediction need of a TrainState."""

  params: dict
  mean: Array  # float32 [channels], of the training images, in pixel units
  variance: Array  # float32 [channels]


class TrainState(struct.PyTreeNode):
  """A run at some step. What comes next is a pure function of this and of the config."""

  step: Array  # int32 []: updates done
  epoch: Array  # int32 []: epochs finished, their evaluation included
  params: dict
  opt_state: optax.OptState
  plateau: optax.OptState  # `plateau.scale` multiplies the learning rate
  best: optimizer.Best
  sums: Sums  # over the training examples of the epoch under way
  mean: Array  # float32 [channels], of the training images, in pixel units
  variance: Array  # float32 [channels]
  seed: Array  # uint32 []: not a PRNG key, which would tie the checkpoint to JAX's key type

  def weights(self) -> Weights:
    """Params and channel statistics, without what only training needs."""
    return Weights(self.params, self.mean, self.variance)


def make_model(config: ConfigDict, num_classes: int) -> nn.Module:
  """The model of `config.model`, computing in `config.dtype`.

  Raises:
    ValueError: a size or name in `config.model` is wrong.
  """
  return mlp_models.create(
    **config.model, num_classes=num_classes, dtype=config.dtype, remat=config.remat
  )


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and variance of each channel of uint8 images [N, H, W, C]: float32 [C] each, exact.

  Counts each of the 256 values a channel, a few images at a time: what it makes is small beside
  the images.
  """
  values = np.arange(256, dtype=np.float64)
  counts = np.zeros((images.shape[-1], 256), np.int64)
  for start in range(0, len(images), 1024):
    channels = np.moveaxis(images[start : start + 1024], -1, 0)
    counts += [np.bincount(channel.ravel(), minlength=256) for channel in channels]
  shares = counts / counts.sum(1, keepdims=True)
  mean = shares @ values
  variance = shares @ values**2 - mean**2
  return mean.astype(np.float32), variance.astype(np.float32)


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
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    epoch=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.make_optimizer(config.optimizer).init(params),
    plateau=optimizer.make_plateau(config.plateau).init(params),
    best=optimizer.init_best(optimizer.BEST[config.best_metric]),
    sums=Sums.zero(),
    mean=jnp.asarray(mean),
    variance=jnp.asarray(variance),
    seed=jnp.asarray(config.seed, jnp.uint32),
  )


def new_state(
  config: ConfigDict, info: DatasetInfo, images: np.ndarray, sharding: Sharding
) -> TrainState:
  """The state before the first step, on the devices of `sharding`.

  Args:
    images: the training images, uint8 [N, H, W, C], for their statistics.
  """
  init = jax.jit(functools.partial(init_state, config, info), out_shardings=sharding)
  return init(*channel_statistics(images))


def abstract_state(config: ConfigDict, info: DatasetInfo) -> TrainState:
  """Shapes and dtypes of what `init_state` gives; nothing is computed."""
  channel = jax.ShapeDtypeStruct(info.image_shape[-1:], jnp.float32)
  return jax.eval_shape(functools.partial(init_state, config, info), channel, channel)
