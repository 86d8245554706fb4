"""Crops, resizes, flips, rotates, shifts and zooms images by given factors.

All but the rotation are linear and act on rows and columns separately, so an image is warped by two
small matrices: `rows @ image @ columns.T`. Rotation is not separable and is sampled pixel by pixel,
between the flip and the zoom; without rotation there is no such code in the graph.
Letters: B batch, H W raw image, S image_size, C colour channels.
"""

import math

import jax
import jax.numpy as jnp

from train.augment import gathers
from train.augment.factors import Box, Factors

Array = jax.Array


def warp(
  images: Array,
  factors: Factors,
  image_size: int,
  box: Box | None = None,
  interpolation: str = "bilinear",
) -> Array:
  """Cuts out the box, resizes, flips, rotates, shifts and zooms by the factors, in this order.

  A shift and a zoom are one map of the coordinates, which is sampled once.

  Args:
    images: float [B, H, W, C].
    factors: of each image.
    image_size: S, the side of the square result in pixels.
    box: None: all of the image.
    interpolation: of the resizing.
  Returns:
    float32 [B, S, S, C].
  """
  _, H, W, _ = images.shape
  rows_SxH, columns_SxW = crop_matrices(
    box or Box(0, 0, H, W), H, W, image_size, interpolation
  )  # with a box for each image, [B, S, H] and [B, S, W]
  flipped = columns_SxW[..., ::-1, :]
  columns_BxSxW = jnp.where(factors.flip[:, None, None], flipped, columns_SxW)
  down, right = (None, None) if factors.shift is None else factors.shift.T
  zoom_rows_BxSxS = _zoom_matrix(factors.height, image_size, down)
  zoom_columns_BxSxS = _zoom_matrix(factors.width, image_size, right)
  if factors.angle is None:
    rows_BxSxH = _einsum("...yh,...hw->...yw", zoom_rows_BxSxS, rows_SxH)
    columns_BxSxW = _einsum("...yh,...hw->...yw", zoom_columns_BxSxS, columns_BxSxW)
    return resample(images, rows_BxSxH, columns_BxSxW)
  images = _rotate(resample(images, rows_SxH, columns_BxSxW), factors.angle)
  return resample(images, zoom_rows_BxSxS, zoom_columns_BxSxS)


def normalize(images: Array, mean: Array, variance: Array) -> Array:
  """uint8 [B, H, W, C] in units of the training images' deviation from their mean (float32)."""
  # Keras' Normalization has the same floor, 1e-7, for a channel without variance.
  deviation = jnp.maximum(jnp.sqrt(jnp.asarray(variance, jnp.float32)), 1e-7)
  return (images.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)) / deviation


def crop_matrices(
  box: Box, height: int, width: int, image_size: int, interpolation: str
) -> tuple[Array, Array]:
  """float32 [(B,) S, H] and [(B,) S, W]: cut out a box and resize it, by rows and by columns."""
  rows = _crop_matrix(box.top, box.height, height, image_size, interpolation)
  return rows, _crop_matrix(box.left, box.width, width, image_size, interpolation)


def _crop_matrix(
  start: float | Array, length: float | Array, old: int, new: int, interpolation: str
) -> Array:
  """float32 [(B,) new, old]: `new` pixels from `length` of an axis' `old`, half-pixel centres.

  "bilinear" does not antialias, as in Keras. "bicubic" does when it shrinks, as in Pillow, because
  the weights that want it were trained so.
  """
  start, length = jnp.asarray(start)[..., None], jnp.asarray(length)[..., None]
  scale = length / new
  coordinates = (jnp.arange(new) + 0.5) * scale + (start - 0.5)
  if interpolation == "bilinear":
    return _interpolation_matrix(coordinates, old)
  distance = jnp.abs(coordinates[..., None] - jnp.arange(old)) / jnp.maximum(scale, 1)[..., None]
  weights = _cubic(distance)
  return weights / weights.sum(-1, keepdims=True)


def _cubic(distance: Array) -> Array:
  """Keys' cubic kernel with a = -0.5, as in Pillow (IEEE ASSP 29, 1981)."""
  near = (1.5 * distance - 2.5) * distance**2 + 1
  far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
  return jnp.where(distance < 1, near, jnp.where(distance < 2, far, 0.0))


def _zoom_matrix(factor: Array, size: int, shift: Array | None = None) -> Array:
  """float32 [B, size, size]: shifts by a fraction of the size, then zooms around the centre."""
  centre = (size - 1) / 2
  coordinates = centre + (1 + factor[:, None]) * (jnp.arange(size) - centre)
  if shift is not None:
    coordinates -= size * shift[:, None]
  return _interpolation_matrix(coordinates, size)


def _interpolation_matrix(coordinates: Array, size: int) -> Array:
  """[..., N] places on an axis of `size` pixels -> weights [..., N, size], rows summing to 1."""
  inside = _reflect(coordinates, size)
  return jnp.maximum(0.0, 1.0 - jnp.abs(inside[..., None] - jnp.arange(size)))


def _reflect(coordinates: Array, size: int) -> Array:
  """Maps coordinates outside an axis of `size` pixels to their mirror image inside ('reflect')."""
  # The mirrors are the image's outer edges, -0.5 and size - 0.5; the outer half pixels are flat.
  # Not jnp.mod: XLA on a CPU does not vectorize it.
  shifted = coordinates + 0.5
  folded = shifted - 2 * size * jnp.floor(shifted / (2 * size))
  return jnp.clip(jnp.minimum(folded, 2 * size - folded) - 0.5, 0, size - 1)


def _einsum(subscripts: str, *operands: Array) -> Array:
  # By default TPUs and GPUs would round float32 pixels to bfloat16 or TF32.
  return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def resample(images: Array, rows: Array, columns: Array) -> Array:
  """[B, H, W, C] by rows ([B,] Y, H) and columns ([B,] X, W) -> [B, Y, X, C]."""
  return _einsum("...yh,...hwc,...xw->...yxc", rows, images, columns)


def _rotate(images: Array, angle: Array) -> Array:
  """Rotates [B, S, S, C] counter-clockwise around the centre by a fraction of a full turn [B]."""
  S = images.shape[1]
  offset = jnp.arange(S) - (S - 1) / 2
  y, x = jnp.meshgrid(offset, offset, indexing="ij")

  def source(angle):
    cos, sin = jnp.cos(2 * math.pi * angle), jnp.sin(2 * math.pi * angle)
    # map_coordinates' own "reflect" divides integers for every pixel, channel and corner, which is
    # slower on a CPU.
    return _reflect(jnp.stack([sin * x + cos * y, cos * x - sin * y]) + (S - 1) / 2, S)

  places = jax.vmap(source)(angle)
  return gathers.bilinear(images, places[:, 0], places[:, 1])
