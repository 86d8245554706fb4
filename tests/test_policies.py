"""RandAugment, TrivialAugment and random erasing against Pillow and their definitions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from train import augment
from train.augment import erasing, gathers, policies
from train.augment.policies import OPERATIONS, Operations

H, W, N = 20, 16, 20_000
MEAN, VARIANCE = np.array([120.0, 110.0, 100.0]), np.array([4000.0, 5000.0, 6000.0])
MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
STEPS = np.arange(31)
# Magnitudes of torchvision 0.29.1, autoaugment.py, for images of H x W.
RAND_AUGMENT = {
  **dict.fromkeys(("ShearX", "ShearY"), np.linspace(0, 0.3, 31)),
  "TranslateX": np.linspace(0, 150 / 331 * W, 31),
  "TranslateY": np.linspace(0, 150 / 331 * H, 31),
  "Rotate": np.linspace(0, 30, 31),
  **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), np.linspace(0, 0.9, 31)),
  "Posterize": np.round(STEPS / 7.5),  # bits that are lost
  "Solarize": np.linspace(255, 0, 31),
}
TRIVIAL_AUGMENT = {
  **dict.fromkeys(("ShearX", "ShearY"), np.linspace(0, 0.99, 31)),
  **dict.fromkeys(("TranslateX", "TranslateY"), np.linspace(0, 32, 31)),
  "Rotate": np.linspace(0, 135, 31),
  **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), np.linspace(0, 0.99, 31)),
  "Posterize": np.round(STEPS / 5),
  "Solarize": np.linspace(255, 0, 31),
}
_apply = jax.jit(policies.apply)


def photos(count: int, channels: int = 3) -> np.ndarray:
  """Smooth colours and noise, some pale and some dark, some with few values."""
  rng = np.random.default_rng(0)
  waves = np.sin(np.arange(W) / 3) + np.cos(np.arange(H) / 4)[:, None]
  shape = (count, 1, 1, channels)
  level, contrast = rng.uniform(40, 210, shape), rng.uniform(5, 60, shape)
  noise = rng.normal(size=(count, H, W, channels))
  return np.uint8(np.clip(level + contrast * (waves[..., None] + noise) / 2, 0, 255))


def pillow(image: np.ndarray, name: str, magnitude: float) -> np.ndarray:
  """What torchvision asks of Pillow."""
  picture = Image.fromarray(image)
  maps = {
    "ShearX": (1, magnitude, 0, 0, 1, 0),
    "ShearY": (1, 0, 0, magnitude, 1, 0),
    "TranslateX": (1, 0, -int(magnitude), 0, 1, 0),
    "TranslateY": (1, 0, 0, 0, 1, -int(magnitude)),
  }
  if name in maps:
    picture = picture.transform(picture.size, Image.Transform.AFFINE, maps[name])
  elif name == "Rotate":
    picture = picture.rotate(magnitude)
  elif name in ("Brightness", "Color", "Contrast", "Sharpness"):
    picture = getattr(ImageEnhance, name)(picture).enhance(1 + magnitude)
  elif name == "Posterize":
    picture = ImageOps.posterize(picture, 8 - int(magnitude))
  elif name == "Solarize":
    picture = ImageOps.solarize(picture, magnitude)
  elif name != "Identity":
    picture = getattr(ImageOps, name.lower())(picture)
  return np.asarray(picture)


def operations(*sequence: tuple[str, float], count: int = 1) -> Operations:
  """The same sequence for each of `count` images."""
  kinds, magnitudes = zip(*sequence, strict=True)
  kind = jnp.array([[OPERATIONS.index(name) for name in kinds]] * count)
  return Operations(kind, jnp.array([magnitudes] * count, jnp.float32))


@pytest.fixture(scope="module")
def both():
  """(name, magnitude, ours, Pillow's) of all operations at all magnitudes of both policies."""
  cases = [
    (name, sign * magnitude)
    for space in (RAND_AUGMENT, TRIVIAL_AUGMENT)
    for name in OPERATIONS
    for magnitude in space.get(name, np.zeros(4))
    for sign in ((1, -1) if name in OPERATIONS[1:10] else (1,))
  ]
  images = photos(len(cases))
  kind, magnitude = np.array([(OPERATIONS.index(name), value) for name, value in cases]).T
  drawn = Operations(jnp.int32(kind)[:, None], jnp.float32(magnitude)[:, None])
  theirs = [pillow(image, *case) for image, case in zip(images, cases, strict=True)]
  return np.array([name for name, _ in cases]), np.asarray(_apply(images, drawn)), np.array(theirs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_equals_pillows_at_all_magnitudes(both, name):
  names, ours, theirs = both
  difference = np.abs(np.int32(ours) - theirs)[names == name]
  if name in MOVES:  # exactly between two pixels, rounding decides
    assert np.mean(difference.max(-1) > 0) <= (0 if "Translate" in name else 0.01)
  elif name in ("Identity", "Posterize", "Solarize", "Equalize"):
    np.testing.assert_array_equal(difference, 0)
  else:  # results that are whole numbers may be cut off to the one below, here or in Pillow
    assert difference.max() <= 1 and np.mean(difference > 0) < 0.02


@pytest.mark.parametrize("space", [RAND_AUGMENT, TRIVIAL_AUGMENT])
def test_magnitudes_are_torchvisions(space):
  choice = (jnp.arange(14) + 0.5)[:, None] / 14
  if space is RAND_AUGMENT:
    most = policies.rand_augment_magnitudes(H, W)
  else:
    most = policies.TRIVIAL_AUGMENT_MAGNITUDES
  for sign, strength in ((0.75, 9), (0.25, 21)):
    ours = policies.operations(
      choice, jnp.full((14, 1), sign), jnp.full((14, 1), strength / 30), most
    )
    np.testing.assert_array_equal(ours.kind[:, 0], np.arange(14))
    for name, magnitude in space.items():
      k = OPERATIONS.index(name)
      expected = magnitude[strength] * (-1 if sign < 0.5 and k < 10 else 1)
      np.testing.assert_allclose(ours.magnitude[k, 0], expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("first", [("Brightness", 0.7), ("Solarize", 100.0), ("Posterize", 5.0)])
@pytest.mark.parametrize("name", ["Equalize", "AutoContrast", "Contrast"])
def test_two_tables_are_one_as_if_the_second_saw_the_first_ones_result(first, name):
  images = photos(8)
  ours = _apply(images, operations(first, (name, 0.5), count=8))
  theirs = [pillow(pillow(image, *first), name, 0.5) for image in images]
  difference = np.abs(np.int32(ours) - np.array(theirs))
  assert difference.max() <= (0 if name == "Equalize" and first[0] != "Brightness" else 1)
  assert np.mean(difference > 0) < 0.1 and np.std(theirs) > 10


def test_two_moves_are_one_whose_place_is_rounded_once():
  images = photos(8)
  ours = _apply(images, operations(("Rotate", 30.0), ("TranslateX", 3.0), count=8))
  moved = [pillow(pillow(image, "Rotate", 30.0), "TranslateX", 3.0) for image in images]
  # A shift of whole pixels rounds nothing; what it moves in from the left was outside before.
  assert np.mean(np.any(ours[:, :, 3:] != np.array(moved)[:, :, 3:], -1)) < 0.01
  back = _apply(images, operations(("TranslateY", 9.0), ("TranslateY", -9.0), count=8))
  np.testing.assert_array_equal(back, images)  # what has left comes back


@pytest.mark.parametrize("table", [("Brightness", 0.7), ("Equalize", 0.0)])
@pytest.mark.parametrize("move", [("ShearX", 0.21), ("Rotate", -20.0)])
def test_values_change_before_places(table, move):
  images = photos(8)
  expected = [pillow(pillow(image, *table), *move) for image in images]
  for sequence in ((table, move), (move, table)):
    ours = _apply(images, operations(*sequence, count=8))
    assert np.mean(ours != np.array(expected)) < 0.01


def test_images_of_one_channel_are_grey_already():
  images = photos(2, channels=1)
  for name in ("Color", "Contrast", "Sharpness", "Equalize", "Rotate"):
    ours = _apply(images, operations((name, 0.5), count=2))
    theirs = [
      pillow(image[..., 0], name, 0.5) if name != "Color" else image[..., 0] for image in images
    ]
    assert np.mean(ours[..., 0] != np.array(theirs)) < 0.02, name


# What is drawn ------------------------------------------------------------------------------------


def test_operations_signs_and_magnitudes_are_uniform_and_independent():
  choice, sign, strength = policies.draw(jax.random.key(0), jnp.arange(N), 2)
  drawn = np.float64(jnp.concatenate([choice, sign, strength], axis=1)).T
  for values in drawn:
    assert np.abs(np.sort(values) - np.arange(0.5, N) / N).max() < 1.95 / np.sqrt(N)
  together = np.concatenate([drawn, np.roll(drawn, 1, axis=1)])
  assert np.abs(np.corrcoef(together) - np.eye(12)).max() < 5 / np.sqrt(N)


ON = {
  "RandAugment": dict(randaugment_ops=2, randaugment_magnitude=15),
  "TrivialAugment": dict(trivial_augment=True),
  "erasing": dict(erase=0.5),
}
PLAIN = dict(mean=MEAN, variance=VARIANCE, image_size=16, flip=False, zoom=0.0)


@pytest.mark.parametrize("options", ON.values(), ids=ON)
def test_an_image_is_augmented_by_its_position_whatever_is_beside_it(options):
  images, key, positions = photos(8), jax.random.key(3), jnp.arange(100, 108)
  jitted = jax.jit(partial(augment.augment, **PLAIN, **options))
  ours = np.asarray(jitted(images, key, positions))
  others = np.roll(images, 3, axis=0)
  others[0] = images[4]
  moved = jitted(others, key, jnp.roll(positions, 3).at[0].set(104))
  np.testing.assert_allclose(moved[0], ours[4], rtol=0, atol=1e-5)
  np.testing.assert_allclose(moved[3:], ours[:-3], rtol=0, atol=1e-5)
  plain = augment.preprocess(images, mean=MEAN, variance=VARIANCE, image_size=16)
  assert np.std(ours - plain) > 0.1
  assert np.std(ours - jitted(images, jax.random.key(4), positions)) > 0.1


# Erasing ------------------------------------------------------------------------------------------


def test_erased_is_a_rectangle_of_timms_sizes_in_its_part_of_the_images():
  size, count = 40, 4000
  erase = jax.jit(partial(erasing.erase, probability=0.25))
  ours = np.asarray(erase(jnp.ones((count, size, size, 1)), jax.random.key(0), jnp.arange(count)))
  hole = ours[..., 0] == 0
  has_hole = hole.any((1, 2))
  assert abs(has_hole.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / count)
  hole = hole[has_hole]
  rows, columns = hole.any(2), hole.any(1)
  height, width = rows.sum(1), columns.sum(1)
  assert (hole.sum((1, 2)) == height * width).all()  # a rectangle
  for axis in (rows, columns):
    assert (np.abs(np.diff(np.pad(axis, [(0, 0), (1, 1)]).astype(int))).sum(1) == 2).all()
  area, aspect = height * width / size**2, np.log(height / width) / np.log(1 / 0.3)
  # Rounded to pixels; the widest are cut to the image.
  assert 0.012 < area.min() < 0.03 and 0.3 < area.max() < 0.35
  assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.02
  assert abs(aspect).max() < 1.2 and abs(aspect.mean()) < 0.06 and abs(aspect.std() - 0.577) < 0.04
  # Its middle, relative to where it may lie, is uniform.
  start = rows.argmax(1)[height < 30] / (size - height[height < 30])
  assert abs(start.mean() - 0.5) < 0.05 and start.min() == 0 and start.max() == 1


# Platforms ----------------------------------------------------------------------------------------


def test_products_for_tpus_equal_gathers():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 7, 9, 3), dtype=np.uint8)
  y, x = np.float32(rng.integers(-3, 12, (2, 2, 5, 6)))
  np.testing.assert_array_equal(gathers._hats(images, y, x), gathers._pixels(images, y, x))
  outside = (y < 0) | (y > 6) | (x < 0) | (x > 8)
  assert 0.3 < outside.mean() < 0.9 and (gathers.nearest(images, y, x)[outside] == 0).all()
  y, x = np.float32(rng.uniform(0, [[[[6]]], [[[8]]]], (2, 2, 5, 6)))
  floats = np.float32(images)
  np.testing.assert_allclose(
    gathers._hats(floats, y, x), gathers.bilinear(floats, y, x), rtol=0, atol=1e-3
  )
  values, weights = images.reshape(2, 63, 3), np.float32(rng.integers(1, 3000, (2, 63, 3)))
  counts = gathers.count(values, weights)
  np.testing.assert_array_equal(gathers._counts_by_digit(values, weights), counts)
  expected = np.bincount(values[1, :, 2], weights[1, :, 2], minlength=256)
  np.testing.assert_array_equal(counts[1, :, 2], expected)
  tables = np.float32(rng.integers(0, 256, (2, 256, 3)))
  looked_up = gathers.look_up(tables, values)
  np.testing.assert_array_equal(gathers._entries_by_digit(tables, values), looked_up)
  np.testing.assert_array_equal(looked_up[1, :, 2], tables[1, values[1, :, 2], 2])


@pytest.mark.parametrize("options", [dict(rotation=0.02), *ON.values()])
def test_no_gather_is_in_the_program_of_a_tpu(options):
  function = jax.jit(partial(augment.augment, **PLAIN, **options))
  traced = function.trace(photos(4), jax.random.key(0), jnp.arange(4))
  program = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert "stablehlo.multiply" in program
  assert "gather" not in program and "scatter" not in program
