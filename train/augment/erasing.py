"""Random erasing of a rectangle in some images (Zhong et al., arXiv:1708.04896)."""

import math

import jax
import jax.numpy as jnp

from train.augment.factors import ERASE, uniform

Array = jax.Array
# Timm's values. The authors' code erases up to 0.4, and draws the aspect uniformly.
_AREA = (0.02, 1 / 3)
_ASPECT = 0.3


def erase(images: Array, key: Array, positions: Array, probability: float) -> Array:
  """Sets a rectangle to zero, which is the mean of normalised images, with a probability.

  Its area is a fraction of the image, uniform in [0.02, 1/3), its aspect ratio r is log-uniform in
  [0.3, 1/0.3), and its place uniform. Sides are rounded to whole pixels, at least one, and cut to
  the image's, where the paper draws again.

  Args:
    images: float32 [B, S, S, C], normalised.
    key: PRNG key of the step.
    positions: int [B], in the global batch.
    probability: of each image.
  Returns:
    float32 [B, S, S, C].
  """
  size = images.shape[1]
  chance, area, aspect, down, right = uniform(key, positions, 5, ERASE).T
  area = _AREA[0] + (_AREA[1] - _AREA[0]) * area
  ratio = jnp.exp(math.log(_ASPECT) * (2 * aspect - 1))
  rows = _range(jnp.sqrt(area * ratio), down, size)
  columns = _range(jnp.sqrt(area / ratio), right, size)
  is_erased = rows[:, :, None] & columns[:, None, :] & (chance < probability)[:, None, None]
  return jnp.where(is_erased[..., None], 0, images)


def _range(side: Array, place: Array, size: int) -> Array:
  """bool [B, size]: a range with a `side` relative to the axis, at a `place` from 0 to 1."""
  length = jnp.clip(jnp.round(size * side), 1, size)[:, None]
  start = jnp.floor(place[:, None] * (size - length + 1))
  index = jnp.arange(size)
  return (start <= index) & (index < start + length)
