"""Pixels by coordinates, table entries by value, and counts of values, laid out for a platform.

CPUs and GPUs gather and scatter. TPUs are slow at both, so there the same numbers are products with
zeros and ones. docs/performance.md has the times of both forms on a CPU. The products are untimed
on a TPU.

Letters: B batch, H W image, Y X result, C colour channels, N values.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

Array = jax.Array
# In float32, products of TPUs round pixels to bfloat16 unless told otherwise.
_exact_product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def nearest(images: Array, y: Array, x: Array) -> Array:
  """The pixels at whole coordinates; 0 outside the image.

  Args:
    images: [B, H, W, C].
    y, x: float32 [B, Y, X], whole numbers.
  Returns:
    [B, Y, X, C], in the dtype of `images`.
  """
  return jax.lax.platform_dependent(images, y, x, tpu=_hats, default=_pixels)


def bilinear(images: Array, y: Array, x: Array) -> Array:
  """Interpolates between the four pixels around each place.

  Args:
    images: float32 [B, H, W, C].
    y, x: float32 [B, Y, X], from 0 to H - 1 and W - 1.
  Returns:
    float32 [B, Y, X, C].
  """
  return jax.lax.platform_dependent(images, y, x, tpu=_hats, default=_corners)


def look_up(tables: Array, values: Array) -> Array:
  """tables[b, values[b, n, c], c].

  Args:
    tables: float32 [B, 256, C], whole numbers from 0 to 255.
    values: whole numbers from 0 to 255 [B, N, C].
  Returns:
    float32 [B, N, C].
  """
  return jax.lax.platform_dependent(tables, values, tpu=_entries_by_digit, default=_entries)


def count(values: Array, weights: Array) -> Array:
  """How often each value occurs in an image's channel, every time counting for its weight.

  Args:
    values: whole numbers from 0 to 255 [B, N, C].
    weights: float32 [B, N, C].
  Returns:
    float32 [B, 256, C].
  """
  return jax.lax.platform_dependent(values, weights, tpu=_counts_by_digit, default=_counts)


def _pixels(images: Array, y: Array, x: Array) -> Array:
  B, H, W, C = images.shape
  is_inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
  place = jnp.where(is_inside, y * W + x, 0).astype(jnp.int32).reshape(B, -1, 1)
  pixels = jnp.take_along_axis(images.reshape(B, H * W, C), place, 1, mode="promise_in_bounds")
  return jnp.where(is_inside[..., None], pixels.reshape(*y.shape, C), 0)


def _corners(images: Array, y: Array, x: Array) -> Array:
  def sample(image, y, x):
    of_channel = partial(map_coordinates, coordinates=(y, x), order=1, mode="nearest")
    return jax.vmap(of_channel, in_axes=-1, out_axes=-1)(image)

  return jax.vmap(sample)(images, y, x)


def _hats(images: Array, y: Array, x: Array) -> Array:
  # Both kinds of sampling: at whole places a hat is one at its pixel and zero at all others. One
  # row of the result at a time, because all columns are computed for all rows of the image.
  B, H, W, C = images.shape
  # bfloat16 holds whole numbers up to 256, so a single pass of the product is exact.
  dtype = jnp.bfloat16 if images.dtype == jnp.uint8 else images.dtype
  pixels = images.astype(dtype)

  def row(places: tuple[Array, Array]) -> Array:
    y_BxX, x_BxX = places
    rows = jnp.maximum(0, 1 - jnp.abs(y_BxX[..., None] - jnp.arange(H))).astype(dtype)
    columns = jnp.maximum(0, 1 - jnp.abs(x_BxX[..., None] - jnp.arange(W))).astype(dtype)
    sampled = _exact_product("bxw,bhwc->bxhc", columns, pixels)
    return (rows[..., None] * sampled).sum(2)

  result = jax.lax.map(row, (jnp.moveaxis(y, 1, 0), jnp.moveaxis(x, 1, 0)))
  return jnp.moveaxis(result, 0, 1).astype(images.dtype)


def _entries(tables: Array, values: Array) -> Array:
  return jnp.take_along_axis(tables, values.astype(jnp.int32), 1, mode="promise_in_bounds")


def _entries_by_digit(tables: Array, values: Array) -> Array:
  B, _, C = tables.shape
  high, low = _digits(values)
  rows = _exact_product("bnch,bhlc->bncl", high, tables.reshape(B, 16, 16, C))
  return (rows * low).sum(-1)


def _counts(values: Array, weights: Array) -> Array:
  _, N, C = values.shape
  channels = jnp.broadcast_to(jnp.arange(C), (N, C))

  def count(values, weights):
    zeros = jnp.zeros((256, C), jnp.float32)
    return zeros.at[values.astype(jnp.int32), channels].add(weights, mode="promise_in_bounds")

  return jax.vmap(count)(values, weights)


def _counts_by_digit(values: Array, weights: Array) -> Array:
  B, _, C = values.shape
  high, low = _digits(values)
  return _exact_product("bnch,bncl->bhlc", high * weights[..., None], low).reshape(B, 256, C)


def _digits(values: Array) -> tuple[Array, Array]:
  """The two hexadecimal digits of each value, as 16 zeros and ones (float32)."""
  whole = values.astype(jnp.int32)
  return jax.nn.one_hot(whole // 16, 16), jax.nn.one_hot(whole % 16, 16)
