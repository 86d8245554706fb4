"""Normalise, resize, flip, rotate and zoom a batch of images, as pure functions on the device.

Resizing, flipping and zooming are linear and act on rows and columns separately, so an image is
warped by two small matrices: `rows @ image @ columns.T`. Rotation is not separable and is sampled
pixel by pixel, between the flip and the zoom; without rotation there is no such code in the graph.

The steps follow the Keras layers Normalization, Resizing, RandomFlip, RandomRotation and
RandomZoom, with bilinear interpolation and 'reflect' fill: (d c b a | a b c d | d c b a).
Letters: B batch, H W raw image, S image_size, C colour channels.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

Array = jax.Array


class Factors(NamedTuple):
  """Random factors of each image.

  flip: bool [B], mirror left to right.
  height, width: float32 [B], zoom of each axis: +0.2 shows 20 % more (out), -0.2 less (in).
  angle: float32 [B], counter-clockwise rotation as a fraction of a full turn; None for no rotation.
  """

  flip: Array
  height: Array
  width: Array
  angle: Array | None = None


def preprocess(images: Array, *, mean: Array, variance: Array, image_size: int) -> Array:
  """Normalises and resizes: all that evaluation does to an image.

  Args:
    images: uint8 [B, H, W, C].
    mean, variance: [C], of the training images, in pixel units (0 to 255).
    image_size: S, the side of the square result in pixels.
  Returns:
    float32 [B, S, S, C].
  """
  _, H, W, _ = images.shape
  images = _normalize(images, mean, variance)
  return _resample(images, _resize_matrix(H, image_size), _resize_matrix(W, image_size))


def augment(
  images: Array,
  key: Array,
  positions: Array,
  *,
  mean: Array,
  variance: Array,
  image_size: int,
  flip: bool = True,
  zoom: float = 0.2,
  rotation: float = 0.0,
) -> Array:
  """Normalises, resizes and randomly flips, rotates and zooms: what training does to an image.

  Args:
    images: uint8 [B, H, W, C].
    key: PRNG key of the step.
    positions: int [B], each image's position in the global batch. Its factors depend only on key
      and position, not on its device or microbatch.
    mean, variance: [C], of the training images, in pixel units (0 to 255).
    image_size: S, the side of the square result in pixels.
    flip, zoom, rotation: see `draw_factors`.
  Returns:
    float32 [B, S, S, C].
  """
  factors = draw_factors(key, positions, flip=flip, zoom=zoom, rotation=rotation)
  return warp(_normalize(images, mean, variance), factors, image_size)


def draw_factors(
  key: Array, positions: Array, *, flip: bool, zoom: float, rotation: float
) -> Factors:
  """Draws the factors of each image from (key, its position in the global batch).

  Args:
    key: PRNG key.
    positions: int [B].
    flip: whether to mirror half of the images, left to right.
    zoom: height and width factors are drawn independently, uniform in [-zoom, zoom).
    rotation: angles are uniform in [-rotation, rotation), as a fraction of a full turn.
  Returns:
    Factors; `angle` is None where rotation is 0.
  """

  def draw(position):
    return jax.random.uniform(jax.random.fold_in(key, position), (4,))

  uniform_Bx4 = jax.vmap(draw)(positions)
  signed_Bx4 = 2 * uniform_Bx4 - 1
  return Factors(
    flip=(uniform_Bx4[:, 0] < 0.5) & flip,
    height=zoom * signed_Bx4[:, 1],
    width=zoom * signed_Bx4[:, 2],
    angle=rotation * signed_Bx4[:, 3] if rotation else None,
  )


def warp(images: Array, factors: Factors, image_size: int) -> Array:
  """Resizes, flips, rotates and zooms by the given factors, in this order.

  Args:
    images: float [B, H, W, C].
    factors: of each image.
    image_size: S, the side of the square result in pixels.
  Returns:
    float32 [B, S, S, C].
  """
  _, H, W, _ = images.shape
  rows_SxH, columns_SxW = _resize_matrix(H, image_size), _resize_matrix(W, image_size)
  columns_BxSxW = jnp.where(factors.flip[:, None, None], columns_SxW[::-1], columns_SxW)
  zoom_rows_BxSxS = _zoom_matrix(factors.height, image_size)
  zoom_columns_BxSxS = _zoom_matrix(factors.width, image_size)
  if factors.angle is None:
    rows_BxSxH = _einsum("...yh,...hw->...yw", zoom_rows_BxSxS, rows_SxH)
    columns_BxSxW = _einsum("...yh,...hw->...yw", zoom_columns_BxSxS, columns_BxSxW)
    return _resample(images, rows_BxSxH, columns_BxSxW)
  images = _rotate(_resample(images, rows_SxH, columns_BxSxW), factors.angle)
  return _resample(images, zoom_rows_BxSxS, zoom_columns_BxSxS)


def _normalize(images: Array, mean: Array, variance: Array) -> Array:
  # Keras' Normalization has the same floor, 1e-7, for a channel without variance.
  deviation = jnp.maximum(jnp.sqrt(jnp.asarray(variance, jnp.float32)), 1e-7)
  return (images.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)) / deviation


def _resize_matrix(old: int, new: int) -> Array:
  """float32 [new, old], bilinear with half-pixel centres and no antialiasing."""
  return _interpolation_matrix((jnp.arange(new) + 0.5) * (old / new) - 0.5, old)


def _zoom_matrix(factor: Array, size: int) -> Array:
  """float32 [B, size, size]; the image's centre stays where it is."""
  centre = (size - 1) / 2
  return _interpolation_matrix(centre + (1 + factor[:, None]) * (jnp.arange(size) - centre), size)


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


def _resample(images: Array, rows: Array, columns: Array) -> Array:
  """[B, H, W, C] by rows ([B,] Y, H) and columns ([B,] X, W) -> [B, Y, X, C]."""
  return _einsum("...yh,...hwc,...xw->...yxc", rows, images, columns)


def _rotate(images: Array, angle: Array) -> Array:
  """Rotates [B, S, S, C] counter-clockwise around the centre by a fraction of a full turn [B]."""
  S = images.shape[1]
  offset = jnp.arange(S) - (S - 1) / 2
  y, x = jnp.meshgrid(offset, offset, indexing="ij")

  def rotate(image, angle):
    cos, sin = jnp.cos(2 * math.pi * angle), jnp.sin(2 * math.pi * angle)
    source = jnp.stack([sin * x + cos * y, cos * x - sin * y]) + (S - 1) / 2
    # map_coordinates' own "reflect" divides integers for every pixel, channel and corner, which is
    # slower on a CPU.
    source = _reflect(source, S)
    sample = partial(map_coordinates, coordinates=tuple(source), order=1, mode="nearest")
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)

  return jax.vmap(rotate)(images, angle)
