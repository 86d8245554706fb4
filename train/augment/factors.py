"""What is drawn for each image's geometry: flip, zoom, rotation, shift and crop.

Each draw is a pure function of (key, position in the global batch); what came later has a stream of
its own, so that the older draws stay as they are.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
# Streams of random numbers of an image, beside the first one.
CROP, SHIFT, POLICY, ERASE = 1, 2, 3, 4


class Factors(NamedTuple):
  """Random factors of each image.

  flip: bool [B], mirror left to right.
  height, width: float32 [B], zoom of each axis: +0.2 shows 20 % more (out), -0.2 less (in).
  angle: float32 [B], counter-clockwise rotation as a fraction of a full turn; None for no rotation.
  shift: float32 [B, 2], downwards and to the right, as a fraction of each side; None for no shift.
  """

  flip: Array
  height: Array
  width: Array
  angle: Array | None = None
  shift: Array | None = None


class Box(NamedTuple):
  """The part of an image that is cut out, in pixels: one for all images, or float32 [B] each."""

  top: float | Array
  left: float | Array
  height: float | Array
  width: float | Array


def draw_factors(
  key: Array,
  positions: Array,
  *,
  flip: bool = False,
  zoom: float = 0.0,
  rotation: float = 0.0,
  shift: float = 0.0,
) -> Factors:
  """Draws the factors of each image from (key, its position in the global batch).

  Args:
    key: PRNG key.
    positions: int [B].
    flip: whether to mirror half of the images, left to right.
    zoom: height and width factors are drawn independently, uniform in [-zoom, zoom).
    rotation: angles are uniform in [-rotation, rotation), as a fraction of a full turn.
    shift: down and right are drawn independently, uniform in [-shift, shift), as a fraction of each
      side.
  Returns:
    Factors; `angle` is None where rotation is 0, and `shift` where shift is.
  """
  uniform_Bx4 = uniform(key, positions, 4)
  signed_Bx4 = 2 * uniform_Bx4 - 1
  return Factors(
    flip=(uniform_Bx4[:, 0] < 0.5) & flip,
    height=zoom * signed_Bx4[:, 1],
    width=zoom * signed_Bx4[:, 2],
    angle=rotation * signed_Bx4[:, 3] if rotation else None,
    shift=shift * (2 * uniform(key, positions, 2, SHIFT) - 1) if shift else None,
  )


def draw_boxes(
  key: Array,
  positions: Array,
  least_area: float,
  height: int,
  width: int,
  aspect: float = 4 / 3,
  is_square: bool = False,
) -> Box:
  """Draws a crop of each image from (key, its position in the global batch).

  Its area is a fraction a of the image, uniform in [least_area, 1), and its aspect ratio r is
  log-uniform in [1 / aspect, aspect). Sides that are longer than the image's are cut to them, where
  others draw again: min(height, sqrt(a * height * width / r)) by
  min(width, sqrt(a * height * width * r)). Its place is uniform among those inside the image.

  Args:
    key: PRNG key, the same as for `draw_factors`, which draws other numbers.
    positions: int [B].
    height, width: of the images, in pixels.
    aspect: at least 1; 4/3 in Inception.
    is_square: measure aspect ratios as if the images were squares.
  """
  area, log_aspect, down, right = uniform(key, positions, 4, CROP).T
  area = least_area + (1 - least_area) * area
  ratio = jnp.exp(math.log(aspect) * (2 * log_aspect - 1)) * (1.0 if is_square else height / width)
  box_height = height * jnp.minimum(1.0, jnp.sqrt(area / ratio))
  box_width = width * jnp.minimum(1.0, jnp.sqrt(area * ratio))
  return Box(down * (height - box_height), right * (width - box_width), box_height, box_width)


def uniform(key: Array, positions: Array, count: int, stream: int | None = None) -> Array:
  """float32 [B, count] in [0, 1): of each image, from its position and one of its streams."""

  def draw(position):
    own = jax.random.fold_in(key, position)
    return jax.random.uniform(own if stream is None else jax.random.fold_in(own, stream), (count,))

  return jax.vmap(draw)(positions)
