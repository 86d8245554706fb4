"""How DeepMind's Perceivers make tokens of an image: its pixels beside their positions.

Shapes: B batch, H W image, C channels, T tokens, F frequencies.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from mlp_models import layers

PREPROCESSINGS = ("learned", "fourier", "conv")

small_normal = nn.initializers.truncated_normal(0.02)


def make_tokens(
  images_BxHxWxC: Array,
  preprocessing: str,
  image_size: layers.ImageSize,
  channels: int,
  num_bands: int,
  max_resolution: int,
  dtype: DTypeLike,
) -> Array:
  """Tokens of images, for the model that calls it: [B, T, C], row by row.

  Args:
    images_BxHxWxC: preprocessed images, any float dtype.
    preprocessing: what a token is. "learned": a dense layer of the pixel, beside a projection of
      the pixel's learned position, images of image_size. "fourier": the pixel beside
      `fourier_features`. "conv": a place of `QuarterSize` beside `fourier_features`.
    channels: of the dense layer, the projection and the convolution.
    num_bands, max_resolution: of `fourier_features`.
  Raises:
    ValueError: images of another rank, size or of an integer dtype.
  """
  layers.require_images(images_BxHxWxC, image_size if preprocessing == "learned" else None)
  shape = images_BxHxWxC.shape
  x_BxHxWxC = images_BxHxWxC.astype(dtype)
  if preprocessing == "learned":
    x_BxHxWxC = layers.Dense(channels, dtype=dtype, name="pixel_embed")(x_BxHxWxC)
    position = nn.Embed(shape[1] * shape[2], channels, embedding_init=small_normal, name="position")
    project = layers.Dense(channels, dtype=dtype, name="position_projection")
    positions_TxC = project(position.embedding)
  else:
    if preprocessing == "conv":
      x_BxHxWxC = QuarterSize(channels, dtype, name="conv_embed")(x_BxHxWxC)
    _, height, width, _ = x_BxHxWxC.shape
    positions_TxC = fourier_features((height, width), num_bands, max_resolution).astype(dtype)
  x_BxTxC = x_BxHxWxC.reshape(shape[0], -1, x_BxHxWxC.shape[-1])
  positions_BxTxC = jnp.broadcast_to(positions_TxC, (shape[0], *positions_TxC.shape))
  return jnp.concatenate([x_BxTxC, positions_BxTxC], axis=-1)


def fourier_features(shape: tuple[int, int], bands: int, max_resolution: int) -> Array:
  """Positions in a grid, their sines and their cosines (arXiv:2103.03206, section 3.2).

  Args:
    shape: rows and columns of the grid.
    bands: the number of frequencies, from 1 to max_resolution / 2 at equal distances.
    max_resolution: places along an axis that the highest frequency tells apart.
  Returns:
    float32 [rows * columns, 2 * (2 * bands + 1)]: the row and the column, from -1 to 1; sin(pi f
    row) for all frequencies f, then sin(pi f column); the cosines likewise.
  """
  positions = [_evenly(-1, 1, size) for size in shape]
  frequencies_F = _evenly(1, max_resolution / 2, bands)
  angles = [np.float32(np.pi) * (places[:, None] * frequencies_F) for places in positions]
  features = []
  for function, (rows_HxF, columns_WxF) in (
    (np.asarray, [places[:, None] for places in positions]),
    (np.sin, angles),
    (np.cos, angles),
  ):
    grid = (*shape, rows_HxF.shape[-1])
    # Broadcast in the program, which would otherwise hold 50 MB of constants for 224 x 224 places.
    features.append(jnp.broadcast_to(function(rows_HxF)[:, None], grid))
    features.append(jnp.broadcast_to(function(columns_WxF), grid))
  return jnp.concatenate(features, axis=-1).reshape(shape[0] * shape[1], -1)


def _evenly(first: float, last: float, size: int) -> np.ndarray:
  """Numbers at equal distances, float32 [size], rounded as torch.linspace rounds them.

  The sine of an angle of a hundred turns shows a difference in the last bit. Of one, `first`.
  """
  step = np.float64(np.float32(last - first) / np.float32(max(size - 1, 1)))
  i = np.arange(size)
  from_the_end = last - step * (size - 1 - i)
  return np.where(i < max(size // 2, 1), first + step * i, from_the_end).astype(np.float32)


class QuarterSize(nn.Module):
  """A convolution of 7 x 7 places and the maximum of 3 x 3, each with stride 2.

  Between them batch norm with fixed statistics: a scale and a bias per channel, in float32.
  """

  channels: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxHxWxC: Array) -> Array:
    conv = nn.Conv(
      self.channels, (7, 7), 2, padding=3, use_bias=False, dtype=self.dtype, name="conv"
    )
    scale_C = self.param("scale", nn.initializers.ones, (self.channels,))
    bias_C = self.param("bias", nn.initializers.zeros, (self.channels,))
    x_BxHxWxC = nn.relu(conv(x_BxHxWxC) * scale_C + bias_C).astype(self.dtype)
    pooled: Array = nn.max_pool(x_BxHxWxC, (3, 3), strides=(2, 2))
    return pooled
