"""What the five models share: patches, dense layers, norms, positions, pooling and the head.

Shapes: B batch, H W image, C channels, P patch size, T S tokens, D F widths.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mlp_models import dropout, kernels

GELUS = ("exact", "tanh")
HEAD_INITS = ("glorot", "zeros")
ImageSize = int | tuple[int, int]  # in pixels: both sides, or (height, width)

# Initial values and constants are those of Keras, where the reference numbers come from.
Dense = functools.partial(
  nn.Dense, kernel_init=nn.initializers.glorot_uniform(), dot_general=kernels.dense
)
uniform_symmetric = functools.partial(jax.random.uniform, minval=-0.05, maxval=0.05)


def gelu(x: Array, kind: str = "exact") -> Array:
  """x times the normal distribution function of x (arXiv:1606.08415, section 2).

  kind: "exact", or "tanh" for the approximation with the hyperbolic tangent.
  """
  # In float32, because 1 + erf(x) has few digits left where x is far below zero.
  y = x.astype(jnp.float32)
  if kind == "tanh":
    return jax.nn.gelu(y, approximate=True).astype(x.dtype)
  # jax.nn.gelu uses erfc, which is slower on a CPU.
  return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


class LayerNorm(nn.Module):
  """Layer normalization (arXiv:1607.06450) of the last axis, computed in float32."""

  dtype: DTypeLike
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale_D = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias_D = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    y: Array = kernels.standardize(x.astype(jnp.float32), self.epsilon) * scale_D + bias_D
    return y.astype(self.dtype)


class TokenDense(nn.Module):
  """A dense layer over the tokens: [B, T, D] -> [B, features, D]."""

  features: int
  dtype: DTypeLike
  kernel_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    shape = (x_BxTxD.shape[1], self.features)
    kernel_TxS = self.param("kernel", self.kernel_init, shape)
    bias_S = self.param("bias", self.bias_init, (self.features,))
    y_BxSxD: Array = kernels.token_dense(kernel_TxS.astype(self.dtype), x_BxTxD.astype(self.dtype))
    return y_BxSxD + bias_S.astype(self.dtype)[:, None]


class PositionEmbedding(nn.Module):
  """Adds a learned row to each token: [B, T, D] -> [B, T, D]."""

  embedding_init: nn.initializers.Initializer

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    embedding_TxD = self.param("embedding", self.embedding_init, x_BxTxD.shape[1:])
    return x_BxTxD + embedding_TxD.astype(x_BxTxD.dtype)


def grid(image_size: ImageSize, patch_size: int = 1) -> tuple[int, int]:
  """Rows and columns of an image's patches; without a patch_size, of its pixels."""
  height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
  return height // patch_size, width // patch_size


def embed_patches(
  images_BxHxWxC: Array, image_size: ImageSize, patch_size: int, width: int, dtype: DTypeLike
) -> Array:
  """Cuts images into `patches` and makes a token of each by a dense layer: [B, T, width]."""
  x_BxTxP = patches(images_BxHxWxC, image_size, patch_size)
  return Dense(width, dtype=dtype, name="patch_embed")(x_BxTxP)


def patches(images_BxHxWxC: Array, image_size: ImageSize, patch_size: int) -> Array:
  """Cuts images into patches, row by row; a patch is flattened as (height, width, channel).

  Args:
    images_BxHxWxC: preprocessed images of image_size, any float dtype.
  Returns:
    [B, T, P*P*C] with T = H / P * W / P, same dtype.
  Raises:
    ValueError: images of another rank, size or of an integer dtype.
  """
  require_images(images_BxHxWxC, image_size)
  batch, _, _, channels = images_BxHxWxC.shape
  rows, columns = grid(image_size, patch_size)
  x = images_BxHxWxC.reshape(batch, rows, patch_size, columns, patch_size, channels)
  return x.swapaxes(2, 3).reshape(batch, rows * columns, patch_size * patch_size * channels)


def require_images(images_BxHxWxC: Array, image_size: ImageSize | None) -> None:
  """Raises ValueError for another rank or size, or an integer dtype; None: any size will do."""
  shape, size = images_BxHxWxC.shape, grid(image_size) if image_size else ("H", "W")
  if len(shape) != 4 or (image_size and shape[1:3] != size):
    raise ValueError(f"images have shape {shape}, the model takes [B, {size[0]}, {size[1]}, C]")
  if not jnp.issubdtype(images_BxHxWxC.dtype, jnp.floating):
    raise ValueError(f"images are {images_BxHxWxC.dtype}, the model takes preprocessed floats")


def mean_head(
  x_BxTxD: Array, num_classes: int, dropout_rate: float, head_init: str = "glorot"
) -> Array:
  """Mean over the tokens, dropout and `head`: float32 logits [B, num_classes]."""
  x_BxD = dropout.Dropout(dropout_rate)(x_BxTxD.mean(axis=1, dtype=jnp.float32))
  return head(x_BxD, num_classes, head_init)


def head(x_BxD: Array, num_classes: int, head_init: str = "glorot") -> Array:
  """A dense layer "head" in float32, [B, D] -> [B, num_classes]; no classes: the features, float32.

  head_init: "glorot", or "zeros" for a head that starts without an opinion.
  """
  if not num_classes:
    return x_BxD.astype(jnp.float32)
  init = {"glorot": nn.initializers.glorot_uniform(), "zeros": nn.initializers.zeros}[head_init]
  return Dense(num_classes, dtype=jnp.float32, kernel_init=init, name="head")(x_BxD)


def record(module: nn.Module, name: str, value: Array) -> Array:
  """The value; kept as the module's intermediate `name` if "intermediates" is mutable."""
  module.sow("intermediates", name, value)
  return value


def remat(block: type[nn.Module], on: bool) -> type[nn.Module]:
  """The block; `on`: keep only its inputs for the gradients (arXiv:1604.06174)."""
  return nn.remat(block) if on else block
