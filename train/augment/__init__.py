"""Images as training and evaluation see them: pure functions on the device.

The steps follow the Keras layers Normalization, Resizing, RandomFlip, RandomRotation,
RandomTranslation and RandomZoom, with bilinear interpolation and 'reflect' fill:
(d c b a | a b c d | d c b a). Random crops follow Inception (Szegedy et al., arXiv:1409.4842,
section 6).
Letters: B batch, H W raw image, S image_size, C colour channels.
"""

from typing import Any

import jax
from ml_collections import ConfigDict

from train.augment import erasing, policies
from train.augment.factors import Box, draw_boxes, draw_factors
from train.augment.geometry import crop_matrices, normalize, resample, warp
from train.augment.mixing import Mixing
from train.data.framing import CENTER, Framing

Array = jax.Array


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
  rows, columns = crop_matrices(Box(*framing.seen(H, W)), H, W, image_size, framing.interpolation)
  return resample(normalize(images, mean, variance), rows, columns)


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
  shift: float = 0.0,
  crop: float = 0.0,
  crop_aspect: float = 4 / 3,
  randaugment_ops: int = 0,
  randaugment_magnitude: int = 9,
  trivial_augment: bool = False,
  erase: float = 0.0,
  framing: Framing = CENTER,
) -> Array:
  """RandAugment or TrivialAugment, crop, resize, flip, rotation, shift, zoom and erasing.

  All that training does to images in memory, in this order.

  Args:
    images: uint8 [B, H, W, C].
    key: PRNG key of the step.
    positions: int [B], each image's position in the global batch. Its factors depend only on key
      and position, not on its device or microbatch.
    mean, variance: [C], of the training images, in pixel units (0 to 255).
    image_size: S, the side of the square result in pixels.
    flip, zoom, rotation, shift: see `draw_factors`.
    crop: least area of a random crop, as a fraction of the image; 0: what evaluation sees.
    crop_aspect: most width / height and height / width of a random crop.
    randaugment_ops, randaugment_magnitude: see `policies.rand_augment`; 0 operations: none.
    trivial_augment: see `policies.trivial_augment`.
    erase: see `erasing.erase`; 0: none.
    framing: which part of an image evaluation sees.
  Returns:
    float32 [B, S, S, C].
  """
  _, H, W, _ = images.shape
  if randaugment_ops:
    images = policies.rand_augment(images, key, positions, randaugment_ops, randaugment_magnitude)
  if trivial_augment:
    images = policies.trivial_augment(images, key, positions)
  factors = draw_factors(key, positions, flip=flip, zoom=zoom, rotation=rotation, shift=shift)
  box = Box(*framing.seen(H, W))
  if crop:
    box = draw_boxes(key, positions, crop, H, W, crop_aspect, framing.mode == "squash")
  images = warp(normalize(images, mean, variance), factors, image_size, box, framing.interpolation)
  return erasing.erase(images, key, positions, erase) if erase else images
