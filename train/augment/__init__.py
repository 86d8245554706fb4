"""Normalise, crop, resize, flip, rotate and zoom images, as pure functions on the device.

All but the rotation are linear and act on rows and columns separately, so an image is warped by two
small matrices: `rows @ image @ columns.T`. Rotation is not separable and is sampled pixel by pixel,
between the flip and the zoom; without rotation there is no such code in the graph.

The steps follow the Keras layers Normalization, Resizing, RandomFlip, RandomRotation and
RandomZoom, with bilinear interpolation and 'reflect' fill: (d c b a | a b c d | d c b a). Random
crops follow Inception (Szegedy et al., arXiv:1409.4842, section 6).
Letters: B batch, H W raw image, S image_size, C colour channels.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from ml_collections import ConfigDict

from train.augment.mixing import Mixing
from train.data.framing import CENTER, Framing

Array = jax.Array
# Of a random crop: width / height is log-uniform between 3/4 and 4/3.
_LOG_ASPECT = math.log(4 / 3)


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


class Box(NamedTuple):
  """The part of an image that is cut out, in pixels: one for all images, or float32 [B] each."""

  top: float | Array
  left: float | Array
  height: float | Array
  width: float | Array


def options(config: ConfigDict) -> dict[str, Any]:
  """The keyword arguments of `augment` that a run's config gives."""
  knobs = {k: v for k, v in config.augment.items() if k not in Mixing._fields}
  return knobs | {"framing": Framing.of(config.data)}


def preprocess(
  images: Array, *, mean: Array, variance: Array, image_size: int, framing: Framing = CENTER
) -> Array:
  """Normalises, crops and resizes: all that evaluation does to an image.

  Args:
    images: uint8 [B, H, W, C].
    mean, variance: [C], of the training images, in pixel units (0 to 255).
    image_size: S, the side of the square result in pixels.
    framing: which part of an image is seen.
  Returns:
    float32 [B, S, S, C].
  """
  _, H, W, _ = images.shape
  rows, columns = _crop_matrices(Box(*framing.seen(H, W)), H, W, image_size, framing.interpolation)
  return _resample(_normalize(images, mean, variance), rows, columns)


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
  crop: float = 0.0,
  framing: Framing = CENTER,
) -> Array:
  """Normalises, resizes and randomly crops, flips, rotates and zooms: what training does.

  Args:
    images: uint8 [B, H, W, C].
    key: PRNG key of the step.
    positions: int [B], each image's position in the global batch. Its factors depend only on key
      and position, not on its device or microbatch.
    mean, variance: [C], of the training images, in pixel units (0 to 255).
    image_size: S, the side of the square result in pixels.
    flip, zoom, rotation: see `draw_factors`.
    crop: least area of a random crop, as a fraction of the image; 0: what evaluation sees.
    framing: which part of an image evaluation sees.
  Returns:
    float32 [B, S, S, C].
  """
  _, H, W, _ = images.shape
  factors = draw_factors(key, positions, flip=flip, zoom=zoom, rotation=rotation)
  if crop:
    box = draw_boxes(key, positions, crop, H, W, is_square=framing.mode == "squash")
  else:
    box = Box(*framing.seen(H, W))
  return warp(_normalize(images, mean, variance), factors, image_size, box, framing.interpolation)


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


def draw_boxes(
  key: Array, positions: Array, least_area: float, height: int, width: int, is_square: bool = False
) -> Box:
  """Draws a crop of each image from (key, its position in the global batch).

  Its area is a fraction a of the image, uniform in [least_area, 1), and its aspect ratio r is
  log-uniform in [3/4, 4/3). Sides that are longer than the image's are cut to them, where others
  draw again: min(height, sqrt(a * height * width / r)) by min(width, sqrt(a * height * width * r)).
  Its place is uniform among those inside the image.

  Args:
    key: PRNG key, the same as for `draw_factors`, which draws other numbers.
    positions: int [B].
    height, width: of the images, in pixels.
    is_square: measure aspect ratios as if the images were squares.
  """

  def draw(position):
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, position), 1), (4,))

  area, log_aspect, down, right = jax.vmap(draw)(positions).T
  area = least_area + (1 - least_area) * area
  aspect = jnp.exp(_LOG_ASPECT * (2 * log_aspect - 1)) * (1.0 if is_square else height / width)
  box_height = height * jnp.minimum(1.0, jnp.sqrt(area / aspect))
  box_width = width * jnp.minimum(1.0, jnp.sqrt(area * aspect))
  return Box(down * (height - box_height), right * (width - box_width), box_height, box_width)


def warp(
  images: Array,
  factors: Factors,
  image_size: int,
  box: Box | None = None,
  interpolation: str = "bilinear",
) -> Array:
  """Cuts out the box, resizes, flips, rotates and zooms by the given factors, in this order.

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
  rows_SxH, columns_SxW = _crop_matrices(
    box or Box(0, 0, H, W), H, W, image_size, interpolation
  )  # with a box for each image, [B, S, H] and [B, S, W]
  flipped = columns_SxW[..., ::-1, :]
  columns_BxSxW = jnp.where(factors.flip[:, None, None], flipped, columns_SxW)
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


def _crop_matrices(
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
