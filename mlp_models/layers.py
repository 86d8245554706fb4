"""What the five models share: patches, dense layers, initial values and dropout.

Shapes: B batch, H W image, C channels, P patch size, T S tokens, D F widths.
"""

import functools
import math
import zlib
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def rows_times(x: Array, kernel_DxF: Array, **options) -> Array:
  """[..., D] times [D, F] is [..., F]; `options` are those of `jax.lax.dot_general`."""
  # As a product of two matrices, so that its gradients are, too. With the axes of batch and tokens
  # left apart, XLA takes a slower way to the kernel's gradient on a CPU: MLP-Mixer's gradients take
  # 14 % longer.
  rows = x.reshape(-1, x.shape[-1])
  if len(rows) < kernel_DxF.shape[1]:
    rows = _gradient_in_columns(rows)
  product = jax.lax.dot_general(rows, kernel_DxF, (((1,), (0,)), ((), ())), **options)
  return product.reshape(*x.shape[:-1], kernel_DxF.shape[-1])


@jax.custom_vjp
def _gradient_in_columns(x: Array) -> Array:
  """x itself; its gradient [R, D] is computed as [D, R]."""
  return x


# The gradient is then the kernel times columns, and not rows times the transposed kernel, of which
# XLA makes a copy on a CPU: 20 -> 11 ms for 16 rows and a kernel of [9216, 2048], and the gradients
# of ViT take 3 % less. The barrier keeps XLA from turning the product around again.
_gradient_in_columns.defvjp(
  lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient.T).T,)
)


def _dense_product(x: Array, kernel_DxF: Array, dimension_numbers, **options) -> Array:
  del dimension_numbers  # nn.Dense always contracts the last axis with the kernel's first
  return rows_times(x, kernel_DxF, **options)


# Initial values and constants are those of Keras, where the reference numbers come from.
Dense = functools.partial(
  nn.Dense, kernel_init=nn.initializers.glorot_uniform(), dot_general=_dense_product
)


def gelu(x: Array) -> Array:
  """x times the normal distribution function of x, exact (arXiv:1606.08415, section 2)."""
  # jax.nn.gelu takes erfc, and MLP-Mixer's step 3 % longer on a CPU. In float32, because 1 + erf(x)
  # has few digits left where x is far below zero.
  y = x.astype(jnp.float32)
  return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


@jax.custom_vjp
def standardize(x: Array) -> Array:
  """Shifts and scales the last axis to mean 0 and variance 1 (nearly: 1e-6 is added to it)."""
  return _standardize_forward(x)[0]


# With a derivative of its own: with the one that JAX derives, which XLA on a CPU computes anew in
# each fusion that reads it, the gradients of FNet, gMLP and MLP-Mixer take 3 to 5 % longer. The
# variance is E[x^2] - E[x]^2, as in flax by default: x is read once.
def _standardize_forward(x):
  mean = x.mean(axis=-1, keepdims=True)
  variance = (x * x).mean(axis=-1, keepdims=True) - mean * mean
  factor = jax.lax.rsqrt(jnp.maximum(variance, 0) + 1e-6)
  return (x - mean) * factor, (x, mean, factor)


def _standardize_backward(kept, gradient):
  x, mean, factor = kept
  y = (x - mean) * factor
  along_y = (gradient * y).mean(axis=-1, keepdims=True)
  return (factor * (gradient - gradient.mean(axis=-1, keepdims=True) - y * along_y),)


standardize.defvjp(_standardize_forward, _standardize_backward)


class LayerNorm(nn.Module):
  """Layer normalization (arXiv:1607.06450) of the last axis, computed in float32."""

  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale_D = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias_D = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    y = standardize(x.astype(jnp.float32)) * scale_D + bias_D
    return y.astype(self.dtype)


def uniform_symmetric(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
  """Uniform in [-0.05, 0.05), the initial values of a Keras Embedding."""
  return jax.random.uniform(key, shape, dtype, -0.05, 0.05)


def check_patches(image_size: int, patch_size: int) -> None:
  """Raises ValueError unless square patches tile the square image."""
  if image_size % patch_size:
    raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")


def check_residual(name: str, units: Sequence[int], width: int) -> None:
  """Raises ValueError unless an MLP of these units can be added to its input."""
  if not units or units[-1] != width:
    raise ValueError(
      f"{name} {tuple(units)} must end in width {width}: its output joins a residual"
    )


def remat(block: type[nn.Module], on: bool) -> type[nn.Module]:
  """The block, or one that keeps only its inputs and computes the rest again for the gradients.

  Follows Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174).
  """
  return nn.remat(block) if on else block


def patches(images_BxHxWxC: Array, image_size: int, patch_size: int) -> Array:
  """Cuts images into patches, row by row; a patch is flattened as (height, width, channel).

  Args:
    images_BxHxWxC: preprocessed images, any float dtype, H = W = image_size.
    image_size: in pixels.
    patch_size: in pixels.
  Returns:
    [B, T, P*P*C] with T = (image_size / patch_size)**2, same dtype.
  Raises:
    ValueError: images of another rank, size or of an integer dtype.
  """
  shape = images_BxHxWxC.shape
  if len(shape) != 4 or shape[1:3] != (image_size, image_size):
    raise ValueError(
      f"images have shape {shape}, the model takes [B, {image_size}, {image_size}, C]"
    )
  if not jnp.issubdtype(images_BxHxWxC.dtype, jnp.floating):
    raise ValueError(f"images are {images_BxHxWxC.dtype}, the model takes preprocessed floats")
  batch, _, _, channels = shape
  side = image_size // patch_size
  x = images_BxHxWxC.reshape(batch, side, patch_size, side, patch_size, channels)
  return x.swapaxes(2, 3).reshape(batch, side * side, patch_size * patch_size * channels)


class TokenDense(nn.Module):
  """A dense layer over the tokens: [B, T, D] -> [B, features, D]."""

  features: int
  dtype: DTypeLike
  bias_init: nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    shape = (x_BxTxD.shape[1], self.features)
    kernel_TxS = self.param("kernel", nn.initializers.glorot_uniform(), shape)
    bias_S = self.param("bias", self.bias_init, (self.features,))
    x_BxTxD, kernel_TxS, bias_S = nn.dtypes.promote_dtype(
      x_BxTxD, kernel_TxS, bias_S, dtype=self.dtype
    )
    product = jax.lax.platform_dependent(kernel_TxS, x_BxTxD, cpu=_mix_each, default=_mix_all)
    return product + bias_S[:, None]


def _mix_each(kernel_TxS: Array, x_BxTxD: Array) -> Array:
  # One small product an example, forward and backward, and nothing is transposed. The other way
  # MLP-Mixer's gradients take a fifth longer on a CPU. It makes a kernel an example, for its
  # gradient too, which is little in a CPU's microbatch but may be much in an accelerator's batch.
  kernel_BxTxS = jnp.broadcast_to(kernel_TxS, (len(x_BxTxD), *kernel_TxS.shape))
  return jnp.einsum("bts,btd->bsd", kernel_BxTxS, x_BxTxD)


def _mix_all(kernel_TxS: Array, x_BxTxD: Array) -> Array:
  return jnp.einsum("ts,btd->bsd", kernel_TxS, x_BxTxD)


class PositionEmbedding(nn.Module):
  """Adds a learned row to each token: [B, T, D] -> [B, T, D]."""

  init: nn.initializers.Initializer

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    embedding_TxD = self.param("embedding", self.init, x_BxTxD.shape[1:])
    return x_BxTxD + embedding_TxD.astype(x_BxTxD.dtype)


# Dropout.
#
# Whether an element is kept is a pure function of (key, layer, the example's position in the global
# batch, the element's index in the example), so neither devices nor microbatches change a mask. The
# bits come from an integer hash and not from `jax.random`: XLA fuses it into the product, where
# threefry takes several times as long as the product itself on a CPU.


def mix(x: Array) -> Array:
  """Hashes uint32 to uint32, one to one, so that any bit flips every other half of the time.

  The constants are `lowbias32` of Chris Wellons' Hash Function Prospector
  (github.com/skeeto/hash-prospector).
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def example_seeds(module: nn.Module, batch_size: int, positions_B: Array | None) -> Array:
  """Draws the seed of each example from the module's "dropout" key.

  Args:
    module: the model, given `rngs={"dropout": key}`.
    batch_size: B.
    positions_B: int32, each example's place in the global batch; None for 0, 1, ..., B-1.
  Returns:
    uint32 [B], to be handed to every layer with dropout.
  Raises:
    flax.errors.InvalidRngError: no "dropout" key was given.
    ValueError: positions of another shape.
  """
  if positions_B is None:
    positions_B = jnp.arange(batch_size)
  if positions_B.shape != (batch_size,):
    raise ValueError(f"positions have shape {positions_B.shape}, the batch has {batch_size} images")
  seeds_B = positions_B.astype(jnp.uint32)
  for word in jax.random.key_data(module.make_rng("dropout")):
    seeds_B = mix(seeds_B ^ word)
  return seeds_B


def fold_in(seeds_B: Array | None, number: int) -> Array | None:
  """Other seeds for each number; None (evaluation) stays None."""
  return None if seeds_B is None else mix(seeds_B ^ jnp.uint32(number))


class Dropout(nn.Module):
  """Sets a share `rate` of each example's elements to zero and scales the others by 1/(1-rate).

  Takes x [B, ...] and the uint32 [B] of `example_seeds`, or None to change nothing (evaluation).
  Each layer draws masks of its own.
  """

  rate: float

  @nn.compact
  def __call__(self, x: Array, seeds_B: Array | None) -> Array:
    return drop(x, layer_seeds(self, seeds_B), self.rate)


def layer_seeds(layer: nn.Module, seeds_B: Array | None) -> Array | None:
  """Other seeds for each layer, by its place in the model; None (evaluation) stays None."""
  return fold_in(seeds_B, zlib.crc32("/".join(layer.path).encode()))


def drop(x: Array, seeds_B: Array | None, rate: float) -> Array:
  """What `Dropout` does, with the `layer_seeds` given: x is [B, ...], of any float dtype."""
  return x if seeds_B is None or rate == 0 else _drop(x, seeds_B, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _drop(x: Array, seeds_B: Array, rate: float) -> Array:
  index = jnp.uint32(0)
  for axis in range(1, x.ndim):
    place = jax.lax.broadcasted_iota(jnp.uint32, (1, *x.shape[1:]), axis)
    index = index + place * jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
  # xor, not a sum: the sequences of two seeds then meet here and there, and never run in parallel.
  bits = mix(index * jnp.uint32(0x9E3779B9) ^ seeds_B.reshape(-1, *[1] * (x.ndim - 1)))
  kept = (x.astype(jnp.float32) / (1 - rate)).astype(x.dtype)  # bfloat16 has no 0.9
  return jnp.where(bits >= jnp.uint32(round(rate * 2**32)), kept, 0)


# Dropout is linear and its own transpose, so all the backward pass needs is the seeds: the mask is
# computed again, for less than it would cost to keep it.
_drop.defvjp(
  lambda x, seeds_B, rate: (_drop(x, seeds_B, rate), seeds_B),
  lambda rate, seeds_B, gradient: (_drop(gradient, seeds_B, rate), None),
)
