"""RandAugment and TrivialAugment (Wide): drawn operations, on pixels from 0 to 255.

Cubuk et al., arXiv:1909.13719, and Müller and Hutter, arXiv:2103.10158, with the operations and
magnitudes of torchvision; each operation equals Pillow's but for rounding. Those in sequence act on
each other's result and end in one table of an image's values, one change of its colour, one of its
sharpness and one affine map, applied in this order, so that a pixel is looked up once and moved
once. This differs from applying them one after the other where their kinds differ:
- statistics (Contrast, AutoContrast, Equalize) are those of the whole image before it is moved, and
  what moves in from outside is black;
- a table comes before a change of colour, and that before a change of sharpness; factors of two
  changes of one kind are multiplied;
- a pixel that leaves the image and comes back is kept, and its place is rounded once.
A single operation, and so all of TrivialAugment, has no such difference.

Letters: B batch, H W image, C colour channels, K operations of an image.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from train.augment import gathers
from train.augment.factors import POLICY, uniform

Array = jax.Array

OPERATIONS = (
  "Identity",
  "ShearX",
  "ShearY",
  "TranslateX",
  "TranslateY",
  "Rotate",
  "Brightness",
  "Color",
  "Contrast",
  "Sharpness",
  "Posterize",
  "Solarize",
  "AutoContrast",
  "Equalize",
)
_SIGNED = 10  # the first ones, in both directions; Identity is nothing in both
_BINS = 31
# At the greatest strength, from Identity to Posterize.
TRIVIAL_AUGMENT_MAGNITUDES = (0, 0.99, 0.99, 32, 32, 135, 0.99, 0.99, 0.99, 0.99, 6)
# Pillow's grey: ITU-R 601-2, in parts of 2**16.
_GREY = (19595, 38470, 7471)


class Operations(NamedTuple):
  """Of each image, in the order in which they act.

  kind: int32 [B, K], an index into OPERATIONS.
  magnitude: float32 [B, K]: Shear's slope, Translate's pixels, Rotate's degrees, one less than the
    factor of Brightness, Color, Contrast and Sharpness, Posterize's bits that are lost, Solarize's
    threshold; without meaning for the others.
  """

  kind: Array
  magnitude: Array


def rand_augment(
  images: Array, key: Array, positions: Array, num_operations: int, magnitude: int
) -> Array:
  """Applies operations to each image, drawn with replacement, all at the same magnitude.

  Args:
    images: uint8 [B, H, W, C].
    key: PRNG key of the step.
    positions: int [B], in the global batch.
    num_operations: K.
    magnitude: from 0 to 30.
  Returns:
    uint8 [B, H, W, C].
  """
  _, H, W, _ = images.shape
  choice, sign, _ = draw(key, positions, num_operations)
  strength = jnp.full(choice.shape, magnitude / (_BINS - 1))
  return apply(images, operations(choice, sign, strength, rand_augment_magnitudes(H, W)))


def trivial_augment(images: Array, key: Array, positions: Array) -> Array:
  """Applies one operation to each image at a drawn magnitude; arguments as of `rand_augment`."""
  choice, sign, strength = draw(key, positions, 1)
  strength = jnp.floor(_BINS * strength) / (_BINS - 1)
  return apply(images, operations(choice, sign, strength, TRIVIAL_AUGMENT_MAGNITUDES))


def rand_augment_magnitudes(height: int, width: int) -> tuple[float, ...]:
  """At the greatest strength, for images of this size, from Identity to Posterize."""
  return (0, 0.3, 0.3, 150 / 331 * width, 150 / 331 * height, 30, 0.9, 0.9, 0.9, 0.9, 4)


def draw(key: Array, positions: Array, num_operations: int) -> Array:
  """float32 [3, B, K], uniform in [0, 1)."""
  drawn = uniform(key, positions, 3 * num_operations, POLICY)
  return jnp.moveaxis(drawn.reshape(-1, num_operations, 3), -1, 0)


def operations(choice: Array, sign: Array, strength: Array, most: tuple[float, ...]) -> Operations:
  """Operations of drawn numbers [B, K] and a strength in [0, 1].

  Args:
    most: the magnitude at strength 1 of the operations from Identity to Posterize.
  """
  kind = jnp.floor(len(OPERATIONS) * choice).astype(jnp.int32)
  limits = jnp.array([*most, 255, 0, 0])
  magnitude = strength * jnp.where(kind[..., None] == jnp.arange(len(limits)), limits, 0).sum(-1)
  magnitude = jnp.where((kind < _SIGNED) & (sign < 0.5), -magnitude, magnitude)
  is_posterize, is_solarize = (kind == OPERATIONS.index(x) for x in ("Posterize", "Solarize"))
  magnitude = jnp.where(is_posterize, jnp.round(magnitude), magnitude)
  return Operations(kind, jnp.where(is_solarize, 255 - magnitude, magnitude))


def apply(images: Array, operations: Operations) -> Array:
  """Applies an image's operations to it: uint8 [B, H, W, C] in and out."""
  B, H, W, C = images.shape
  values = images.reshape(B, H * W, C)
  pixels = gathers.look_up(_tables(values, operations), values).reshape(images.shape)
  pixels = _blend(_grey(pixels), pixels, _factor(operations, "Color"))
  pixels = _blend(_smooth(pixels), pixels, _factor(operations, "Sharpness"))
  return gathers.nearest(pixels.astype(jnp.uint8), *_sources(operations, H, W))


# Values.


def _tables(values: Array, operations: Operations) -> Array:
  """float32 [B, 256, C]: what becomes of each value of images [B, N, C] by all tables in turn."""
  counts = gathers.count(values, jnp.ones(values.shape, jnp.float32))
  kind, magnitude = (jnp.moveaxis(field, 1, 0)[..., None, None] for field in operations)
  tables = table = _table(counts, kind[0], magnitude[0])
  for k in range(1, len(kind)):
    counts = gathers.count(table, counts)  # of the image that the tables before have left
    table = _table(counts, kind[k], magnitude[k])
    tables = gathers.look_up(table, tables)
  return tables


def _table(counts: Array, kind: Array, magnitude: Array) -> Array:
  """float32 [B, 256, C]: one operation's table for images whose values occur `counts` times.

  Args:
    counts: float32 [B, 256, C].
    kind, magnitude: [B, 1, 1].
  """
  is_ = {name: kind == OPERATIONS.index(name) for name in OPERATIONS}
  entries = jnp.arange(256, dtype=jnp.float32)[:, None]
  number = counts.sum(1, keepdims=True)

  factor = jnp.where(is_["Brightness"] | is_["Contrast"], 1 + magnitude, 1)
  mean = (counts * entries).sum(1, keepdims=True) / number
  grey = jnp.floor(_weighted(mean) / 2**16 + 0.5)
  table = _blend(jnp.where(is_["Contrast"], grey, 0), entries, factor)

  is_flipped = is_["Solarize"] & (table >= magnitude)
  table = jnp.where(is_flipped, 255 - table, table)
  quantum = 1 << jnp.where(is_["Posterize"], magnitude, 0).astype(jnp.int32)
  table = jnp.floor(table / quantum) * quantum

  occurs = counts > 0
  low = jnp.where(occurs, entries, 255).min(1, keepdims=True)
  high = jnp.where(occurs, entries, 0).max(1, keepdims=True)
  stretched = jnp.clip(jnp.floor((entries - low) * 255 / jnp.maximum(high - low, 1)), 0, 255)
  table = jnp.where(is_["AutoContrast"] & (high > low), stretched, table)

  last = jnp.where(entries == high, counts, 0).sum(1, keepdims=True)
  step = jnp.floor((number - last) / 255)
  below = jnp.cumsum(counts, axis=1) - counts + jnp.floor(step / 2)
  equalized = jnp.minimum(jnp.floor(below / jnp.maximum(step, 1)), 255)
  return jnp.where(is_["Equalize"] & (step > 0), equalized, table)


def _factor(operations: Operations, name: str) -> Array:
  """float32 [B, 1, 1, 1]: the product of an image's factors of an operation."""
  is_chosen = operations.kind == OPERATIONS.index(name)
  factors = jnp.where(is_chosen, 1 + operations.magnitude, 1)
  return factors.prod(1)[:, None, None, None]


def _blend(other: Array, pixels: Array, factor: Array) -> Array:
  """other + factor * (pixels - other), cut off to whole numbers from 0 to 255, as in Pillow."""
  return jnp.floor(jnp.clip(other + factor * (pixels - other), 0, 255))


# Colours and neighbours.


def _weighted(channels: Array) -> Array:
  """[..., C] -> grey [..., 1] times 2**16; channels count alike unless they are three."""
  C = channels.shape[-1]
  weights = _GREY if C == len(_GREY) else (2**16 / C,) * C
  # A term for each channel: CPUs are slow at sums of few numbers.
  return jnp.asarray(sum(weight * channels[..., c : c + 1] for c, weight in enumerate(weights)))


def _grey(pixels: Array) -> Array:
  """float32 [B, H, W, 1]."""
  return jnp.floor((_weighted(pixels) + 2**15) / 2**16)  # exact: all sums are below 2**24


def _smooth(pixels: Array) -> Array:
  """Pillow's SMOOTH: the mean of 3 x 3 pixels, the middle counting five times; edges stay."""
  _, H, W, _ = pixels.shape
  padded = jnp.pad(pixels, [(0, 0), (1, 1), (1, 1), (0, 0)])
  rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
  total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * pixels
  y, x = jnp.arange(H)[:, None, None], jnp.arange(W)[:, None]
  is_edge = (y == 0) | (y == H - 1) | (x == 0) | (x == W - 1)
  return jnp.where(is_edge, pixels, jnp.floor(total / 13 + 0.5))


# Places.


def _sources(operations: Operations, height: int, width: int) -> tuple[Array, Array]:
  """Row and column from which each pixel comes (whole float32 [B, H, W]), maybe outside."""
  maps = _maps(operations, height, width)
  map_Bx3x3 = maps[:, 0]
  for k in range(1, maps.shape[1]):  # where a pixel comes from is asked last to first
    map_Bx3x3 = jnp.einsum(
      "bij,bjk->bik", map_Bx3x3, maps[:, k], precision=jax.lax.Precision.HIGHEST
    )
  y, x = jnp.arange(height)[:, None] + 0.5, jnp.arange(width) + 0.5
  x_source, y_source = (
    jnp.floor(row[:, 0, None, None] * x + row[:, 1, None, None] * y + row[:, 2, None, None])
    for row in (map_Bx3x3[:, 0], map_Bx3x3[:, 1])
  )
  return y_source, x_source


def _maps(operations: Operations, height: int, width: int) -> Array:
  """float32 [B, K, 3, 3]: from (x, y, 1) in a result to those in its source.

  In pixels from the upper left corner, which shears leave in place; rotations leave the centre.
  """

  def chosen(name: str) -> Array:
    return jnp.where(operations.kind == OPERATIONS.index(name), operations.magnitude, 0)

  angle = jnp.deg2rad(chosen("Rotate"))
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  x, y = width / 2, height / 2
  zero, one = jnp.zeros_like(angle), jnp.ones_like(angle)
  rows = (
    (cos, chosen("ShearX") - sin, (1 - cos) * x + sin * y - jnp.trunc(chosen("TranslateX"))),
    (chosen("ShearY") + sin, cos, (1 - cos) * y - sin * x - jnp.trunc(chosen("TranslateY"))),
    (zero, zero, one),
  )
  return jnp.stack([jnp.stack(row, -1) for row in rows], -2)
