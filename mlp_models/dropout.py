"""Dropout whose masks belong to the examples.

Whether an element is kept is a pure function of (key, layer, how often the layer was called before,
the example's place in the global batch, the element's index in the example). Neither devices nor
microbatches change a mask.

A model calls `start` once. From there each example's seed travels to the layers in a Flax rng
stream, as keys do; without the stream (evaluation) dropout changes nothing.
"""

import functools
import math
import zlib
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng
from jax import Array

_STREAM = "example_seeds"


def start(model: nn.Module, batch_size: int, positions_B: Array | None, train: bool) -> None:
  """Gives all layers of a model the seeds of the examples, drawn from its "dropout" key.

  Args:
    model: bound, with `rngs={"dropout": key}` if `train` is True.
    batch_size: B.
    positions_B: int32, each example's place in the global batch; None for 0, 1, ..., B-1.
    train: False for evaluation, in which nothing is dropped and no key is needed.
  Raises:
    flax.errors.InvalidRngError: in training, no "dropout" key was given.
    ValueError: positions of another shape.
  """
  assert model.scope is not None
  model.scope.rngs.pop(_STREAM, None)
  if not train:
    return
  if positions_B is None:
    positions_B = jnp.arange(batch_size)
  if positions_B.shape != (batch_size,):
    raise ValueError(f"positions have shape {positions_B.shape}, the batch has {batch_size} images")
  seeds_B = positions_B.astype(jnp.uint32)
  for word in jax.random.key_data(model.make_rng("dropout")):
    seeds_B = hash32(seeds_B ^ word)
  model.scope.rngs |= stream(seeds_B)
  model.scope.rng_counters.setdefault(_STREAM, 0)


def stream(seeds_B: Array) -> dict[str, LazyRng]:
  """The `rngs` for a single layer, from uint32 seeds of the examples."""
  return {_STREAM: LazyRng(seeds_B, ())}


def layer_seeds(layer: nn.Module) -> Array | None:
  """uint32 [B], others for each layer and at each of its calls; None in evaluation."""
  assert layer.scope is not None
  if _STREAM not in layer.scope.rngs:
    return None
  seeds_B = layer.scope.rngs[_STREAM].rng
  calls = layer.scope.rng_counters[_STREAM]
  layer.scope.rng_counters[_STREAM] += 1
  if calls:
    seeds_B = hash32(seeds_B ^ jnp.uint32(calls))
  return hash32(seeds_B ^ jnp.uint32(zlib.crc32("/".join(layer.path).encode())))


def continue_at(module: nn.Module, calls: Array) -> None:
  """Makes the masks of a module's layers those of layers that were called `calls` times before.

  For the body of a loop, which is traced once.

  Args:
    module: whose layers have not been called in the body.
    calls: int32 [].
  """
  assert module.scope is not None
  if _STREAM in module.scope.rngs:
    seeds_B = module.scope.rngs[_STREAM].rng
    again_B = hash32(seeds_B ^ calls.astype(jnp.uint32))
    module.scope.rngs |= stream(jnp.where(calls > 0, again_B, seeds_B))
    module.scope.rng_counters = dict.fromkeys(module.scope.rngs, 0)  # of layers inside, too


class Dropout(nn.Module):
  """Sets a share `rate` of each example's elements [B, ...] to zero, scales the rest by 1/(1-rate).

  Follows Srivastava et al., "Dropout", 2014, section 10 (scaling in training, not in evaluation).
  """

  rate: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return drop(x, layer_seeds(self), self.rate)


class DropPath(nn.Module):
  """Sets a share `rate` of the examples of a residual branch [B, ...] to zero, scales the rest.

  Follows Huang et al., "Deep Networks with Stochastic Depth" (arXiv:1603.09382), section 3, scaled
  by 1 / (1 - rate) in training instead of by 1 - rate in evaluation.
  """

  rate: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    if self.rate == 0:
      return x
    kept = jnp.ones((x.shape[0], *[1] * (x.ndim - 1)), x.dtype)
    return x * drop(kept, layer_seeds(self), self.rate)


def path_rates(rate: float, num_blocks: int) -> list[float]:
  """`DropPath`'s rate of each block: from 0 in the first, linearly to `rate` in the last."""
  return [rate * i / max(1, num_blocks - 1) for i in range(num_blocks)]


def drop(x: Array, seeds_B: Array | None, rate: float, axes: Sequence[int] | None = None) -> Array:
  """What `Dropout` does, with the seeds given.

  Args:
    x: [B, ...], any float dtype.
    seeds_B: those of `layer_seeds`; None changes nothing.
    rate: probability of an element to be dropped, from 0 to below 1.
    axes: all but the first, in the order in which elements are counted; None: 1, 2, ...
  """
  if seeds_B is None or rate == 0:
    return x
  return _drop(x, seeds_B, rate, tuple(axes or range(1, x.ndim)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _drop(x: Array, seeds_B: Array, rate: float, axes: tuple[int, ...]) -> Array:
  index = jnp.uint32(0)
  for i, axis in enumerate(axes):
    place = jax.lax.broadcasted_iota(jnp.uint32, (1, *x.shape[1:]), axis)
    stride = math.prod(x.shape[later] for later in axes[i + 1 :])
    index = index + place * jnp.uint32(stride % 2**32)
  # xor, not a sum: the sequences of two seeds then meet here and there, and never run in parallel.
  bits = hash32(index * jnp.uint32(0x9E3779B9) ^ seeds_B.reshape(-1, *[1] * (x.ndim - 1)))
  kept = (x.astype(jnp.float32) / (1 - rate)).astype(x.dtype)  # bfloat16 has no 0.9
  return jnp.where(bits >= jnp.uint32(round(rate * 2**32)), kept, 0)


# Dropout is linear and its own transpose, so the backward pass needs the seeds only: computing the
# mask again costs less than keeping it.
_drop.defvjp(
  lambda x, seeds_B, rate, axes: (_drop(x, seeds_B, rate, axes), seeds_B),
  lambda rate, axes, seeds_B, gradient: (_drop(gradient, seeds_B, rate, axes), None),
)


def hash32(x: Array) -> Array:
  """Hashes uint32 to uint32, one to one, so that any bit flips every other half of the time.

  An integer hash, not `jax.random`: XLA fuses it into the product with the mask. The constants are
  `lowbias32` of Chris Wellons' Hash Function Prospector (github.com/skeeto/hash-prospector).
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)
