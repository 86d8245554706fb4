"""Images keep their aspect: decoded to squares, cropped in the middle or at random."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train import augment
from train.augment.factors import Box, Factors, draw_boxes, draw_factors
from train.augment.geometry import warp
from train.data.framing import CENTER, Framing

MEAN, VARIANCE = np.zeros(3), np.ones(3)  # so that pixels stay as they are
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
N = 20_000

_warp = jax.jit(warp, static_argnums=(2, 4))


def noise(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def still(count: int) -> Factors:
  """Neither flip nor zoom."""
  return Factors(jnp.zeros(count, bool), jnp.zeros(count), jnp.zeros(count))


def each(boxes: list[tuple]) -> Box:
  return Box(*(jnp.float32(side) for side in zip(*boxes, strict=True)))


def pillow(image: np.ndarray, box: tuple, size: int, interpolation: str) -> np.ndarray:
  """A part (top, left, height, width) of [H, W, C], resized in float32, with antialiasing."""
  top, left, height, width = box
  corners = (left, top, left + width, top + height)
  channels = [
    Image.fromarray(np.float32(channel)).resize((size, size), FILTERS[interpolation], corners)
    for channel in np.moveaxis(image, -1, 0)
  ]
  return np.stack([np.asarray(channel) for channel in channels], axis=-1)


# On the device ------------------------------------------------------------------------------------

BOXES = [(0, 0, 24, 30), (3, 5, 12, 12), (2.25, 7.5, 9.5, 11.25), (12, 0, 12, 16), (0.5, 20, 7, 10)]


@pytest.mark.parametrize(
  ("interpolation", "size"), [("bilinear", 32), ("bicubic", 32), ("bicubic", 5)]
)
def test_known_boxes_are_cut_and_resized_as_by_pillow(interpolation, size):
  images = noise(len(BOXES), 24, 30, 3)
  ours = _warp(jnp.float32(images), still(len(BOXES)), size, each(BOXES), interpolation)
  theirs = [pillow(*pair, size, interpolation) for pair in zip(images, BOXES, strict=True)]
  np.testing.assert_allclose(ours, theirs, atol=2e-2)  # of 255: Pillow's coordinates are doubles


def test_bilinear_shrinks_without_antialiasing_as_keras():
  image = np.float32(noise(1, 24, 30, 3))
  ours = _warp(image, still(1), 5, each([(2, 3, 20, 25)]), "bilinear")
  y, x = 2 + (np.arange(5) + 0.5) * 4 - 0.5, 3 + (np.arange(5) + 0.5) * 5 - 0.5
  rows, columns = np.floor(y).astype(int), np.floor(x).astype(int)
  assert (y - rows == 0.5).all() and (x == columns).all()
  expected = (image[0, rows][:, columns] + image[0, rows + 1][:, columns]) / 2
  np.testing.assert_allclose(ours[0], expected, atol=1e-3)


def test_a_crop_comes_before_flip_and_zoom():
  images = jnp.float32(noise(5, 24, 30, 3))
  factors = Factors(
    flip=jnp.array([False, True, True, False, True]),
    height=jnp.linspace(-0.2, 0.2, 5),
    width=jnp.linspace(0.2, -0.1, 5),
    angle=None,
  )
  for angle in (None, jnp.linspace(-0.02, 0.02, 5)):
    factors = factors._replace(angle=angle)
    together = _warp(images, factors, 16, each(BOXES), "bilinear")
    cropped = _warp(images, still(5), 16, each(BOXES), "bilinear")
    np.testing.assert_allclose(together, _warp(cropped, factors, 16, None, "bilinear"), atol=1e-2)


@settings(max_examples=6, deadline=None)
@given(
  height=st.integers(1, 40),
  width=st.integers(1, 40),
  size=st.integers(1, 24),
  least=st.sampled_from([0.01, 0.08, 0.3, 1.0]),
  interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_every_pixel_of_a_random_crop_is_inside_its_box(height, width, size, least, interpolation):
  """Images whose pixels hold their own coordinates say where a crop took them from."""
  coordinates = np.stack(np.mgrid[:height, :width], axis=-1).astype(np.uint8)
  images, count = np.repeat(coordinates[None], 8, 0), jnp.arange(8)
  key = jax.random.key(size)
  options = dict(mean=MEAN[:2], variance=VARIANCE[:2], image_size=size, flip=False, zoom=0.0)
  options |= dict(crop=least, framing=Framing(interpolation=interpolation))

  @jax.jit
  def crop(images, key, count):
    box = draw_boxes(key, count, least, height, width)
    return box, augment.augment(images, key, count, **options)

  box, ours = crop(images, key, count)
  assert ours.shape == (8, size, size, 2)
  for axis, (start, length, side) in enumerate(
    [(box.top, box.height, height), (box.left, box.width, width)]
  ):
    start, length = np.asarray(start)[:, None], np.asarray(length)[:, None]
    assert (start >= 0).all() and (start + length <= side * (1 + 1e-6)).all()
    centres = start + (np.arange(size) + 0.5) * length / size - 0.5
    slack = 1e-3 if interpolation == "bilinear" else 0.6  # near edges a cubic overshoots
    sampled = np.asarray(ours).mean(axis=2 - axis)[..., axis]
    np.testing.assert_allclose(sampled, np.clip(centres, 0, side - 1), atol=slack)


def test_areas_and_aspects_of_crops_are_those_of_the_formula():
  box = draw_boxes(jax.random.key(0), jnp.arange(N), 0.08, 200, 200)
  height, width = (np.float64(side) / 200 for side in (box.height, box.width))
  free = height * width < 0.74  # up to 3/4 no side is longer than the image
  assert 0.71 < free.mean() < 0.73  # (0.74 - 0.08) / 0.92 = 0.717
  ranks = np.arange(0.5, free.sum()) / free.sum()
  for values, least, most in (
    (height * width, 0.08, 0.74),
    (np.log(width / height), np.log(3 / 4), np.log(4 / 3)),
    (box.top / (200 - box.height), 0, 1),
    (box.left / (200 - box.width), 0, 1),
  ):
    values = np.sort(np.float64(values)[free])
    # Kolmogorov-Smirnov: the largest gap to the uniform distribution, 0.1 % critical value.
    assert np.abs((values - least) / (most - least) - ranks).max() < 1.95 / np.sqrt(free.sum())
  # Larger ones are cut to the image.
  assert height.max() == width.max() == 1
  assert (height * width)[~free].min() >= 0.74 and 0.02 < np.mean(width == 1) < 0.1


def test_the_widest_aspect_is_a_knob():
  box = draw_boxes(jax.random.key(0), jnp.arange(N), 0.1, 200, 200, aspect=2.0)
  free = np.asarray(box.height * box.width) < 0.5 * 200**2  # up to 1/2 no side is cut
  aspect = np.sort(np.log2(np.asarray(box.width / box.height))[free])  # uniform in [-1, 1)
  uniform = np.arange(0.5, free.sum()) / free.sum()
  assert np.abs((aspect + 1) / 2 - uniform).max() < 1.95 / np.sqrt(free.sum())


def test_aspects_are_measured_in_pixels_unless_images_are_squashed():
  wide = draw_boxes(jax.random.key(0), jnp.arange(N), 0.1, 100, 200)
  aspect = np.asarray(wide.width / wide.height)[np.asarray(wide.height) < 100]
  assert 0.749 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.334
  squashed = draw_boxes(jax.random.key(0), jnp.arange(N), 0.1, 100, 200, is_square=True)
  square = draw_boxes(jax.random.key(0), jnp.arange(N), 0.1, 100, 100)
  np.testing.assert_allclose(squashed.width, 2 * square.width, rtol=1e-5)
  np.testing.assert_array_equal(squashed.height, square.height)


def test_crops_are_independent_of_the_other_factors_which_stay_what_they_were():
  key, places = jax.random.key(0), jnp.arange(N)
  factors = draw_factors(key, places, flip=True, zoom=0.2, rotation=0.02, shift=0.1)
  np.testing.assert_array_equal(factors.flip[:4], [False, True, False, True])
  np.testing.assert_allclose(
    factors.height[:4], [-0.1270485, -0.1916435, 0.1649171, 0.0935801], rtol=1e-5
  )
  box = draw_boxes(key, places, 0.08, 32, 32)
  columns = np.float64(
    [
      *factors[:4],
      *factors.shift.T,
      box.height * box.width,
      box.width / box.height,
      box.top,
      box.left,
    ]
  )
  correlation = np.corrcoef(np.concatenate([columns, np.roll(columns, 1, axis=1)]))
  # The place depends on the size, of course.
  between = [correlation[:6, 6:10], correlation[:10, 10:]]
  assert max(np.abs(part).max() for part in between) < 5 / np.sqrt(N)


def test_an_image_is_cropped_the_same_in_any_microbatch():
  images, places = noise(6, 16, 16, 3), jnp.arange(40, 46)
  jitted = jax.jit(partial(augment.augment, mean=MEAN, variance=VARIANCE, image_size=12, crop=0.1))
  together = jitted(images, jax.random.key(3), places)
  halves = [jitted(images[i : i + 3], jax.random.key(3), places[i : i + 3]) for i in (0, 3)]
  np.testing.assert_allclose(together, jnp.concatenate(halves), rtol=0, atol=1e-3)
  assert np.std(np.asarray(together) - jitted(images, jax.random.key(4), places)) > 10


def test_a_crop_needs_no_gather():
  options = dict(mean=MEAN, variance=VARIANCE, image_size=12, crop=0.1)
  for interpolation in FILTERS:
    function = partial(augment.augment, framing=Framing(interpolation=interpolation), **options)
    graph = jax.make_jaxpr(function)(noise(4, 8, 8, 3), jax.random.key(0), jnp.arange(4))
    assert "gather" not in str(graph)


# Evaluation ---------------------------------------------------------------------------------------


def see(images: np.ndarray, size: int, framing: Framing = CENTER) -> np.ndarray:
  seen = augment.preprocess(images, mean=MEAN, variance=VARIANCE, image_size=size, framing=framing)
  return np.asarray(seen)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_centre_of_the_right_size_is_cut_out_unchanged(interpolation):
  images = noise(2, 36, 41, 3)
  framing = Framing(crop=32 / 36, interpolation=interpolation)
  np.testing.assert_allclose(see(images, 32, framing), images[:, 2:34, 4:36], atol=1e-4)


@pytest.mark.parametrize(("shape", "crop"), [((40, 40), 0.7), ((30, 44), 0.875), ((44, 30), 1.0)])
def test_the_centre_is_resized_as_by_pillow(shape, crop):
  (image,) = images = noise(1, *shape, 3)
  side = math.ceil(crop * min(shape))
  box = ((shape[0] - side) // 2, (shape[1] - side) // 2, side, side)
  for interpolation, size in (("bilinear", 48), ("bicubic", 48), ("bicubic", 20)):
    ours = see(images, size, Framing(crop, interpolation=interpolation))
    np.testing.assert_allclose(ours[0], pillow(image, box, size, interpolation), atol=2e-2)


def test_squash_sees_all_of_both_sides():
  (image,) = images = noise(1, 12, 20, 3)
  ours = see(images, 24, Framing(mode="squash"))[0]
  np.testing.assert_allclose(ours, pillow(image, (0, 0, 12, 20), 24, "bilinear"), atol=2e-2)
