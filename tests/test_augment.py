"""Augmentation against Keras' numbers and its definition, and the distribution of its factors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from configs import default
from train import augment
from train.augment.factors import Box, Factors, draw_factors
from train.augment.geometry import normalize, warp

_warp = jax.jit(warp, static_argnums=2)
MEAN, VARIANCE = np.array([120.0, 110.0, 100.0]), np.array([4000.0, 5000.0, 6000.0])


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN / "preprocess.npz") as arrays:
    return dict(arrays)


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


def _factors(B, flip=False, height=0.0, width=0.0, angle=None, shift=None):
  return Factors(
    flip=jnp.full(B, flip),
    height=jnp.full(B, height),
    width=jnp.full(B, width),
    angle=None if angle is None else jnp.full(B, angle),
    shift=None if shift is None else jnp.tile(jnp.float32(shift), (B, 1)),
  )


def _keras_preprocess(images, image_size):
  """Normalization and Resizing (bilinear, half-pixel centres) in float64, pixel by pixel."""
  images = (images - MEAN) / np.sqrt(VARIANCE)
  places = (np.arange(image_size) + 0.5) * images.shape[1] / image_size - 0.5
  return _sample(images, *np.meshgrid(places, places, indexing="ij"), np.clip)


def _keras_affine(images, angle, height, width, shift=(0, 0)):
  """RandomRotation, then RandomTranslation and RandomZoom, from output to input coordinates."""
  S = images.shape[1]
  y, x = np.meshgrid(np.arange(S), np.arange(S), indexing="ij")
  if angle:
    cos, sin = np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)
    x_offset = ((S - 1) - (cos * (S - 1) - sin * (S - 1))) / 2
    y_offset = ((S - 1) - (sin * (S - 1) + cos * (S - 1))) / 2
    images = _sample(images, sin * x + cos * y + y_offset, cos * x - sin * y + x_offset, _reflect)
  y = (1 + height) * y + (S - 1) / 2 * -height - S * shift[0]
  x = (1 + width) * x + (S - 1) / 2 * -width - S * shift[1]
  return _sample(images, y, x, _reflect)


def _sample(images, y, x, fill):
  """Bilinear, from the four pixels around each place; `fill` maps indices outside the image."""
  S = images.shape[1]
  result = 0.0
  for dy in (0, 1):
    for dx in (0, 1):
      row, column = np.floor(y).astype(int) + dy, np.floor(x).astype(int) + dx
      weight = (1 - np.abs(y - row)) * (1 - np.abs(x - column))
      result += weight[..., None] * images[:, fill(row, 0, S - 1), fill(column, 0, S - 1)]
  return result


def _reflect(index, low, high):
  """d c b a | a b c d | d c b a."""
  assert low == 0
  padding = 4 * (high + 1)
  return np.pad(np.arange(high + 1), padding, mode="symmetric")[index + padding]


@pytest.mark.parametrize("image_size", [64, 72])
def test_preprocess_equals_keras(golden, image_size):
  ours = augment.preprocess(
    golden["image"], mean=golden["mean"], variance=golden["variance"], image_size=image_size
  )
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, golden[f"resize{image_size}"], rtol=0, atol=1e-4)


def test_pinned_zoom_equals_keras(golden):
  keys = [key for key in golden if key.startswith("zoom64/")]
  assert len(keys) == 3
  for key in keys:
    height, width = (float(part[1:]) for part in key.split("/")[1:])
    normalized = (golden["image"] - golden["mean"]) / np.sqrt(golden["variance"])
    ours = _warp(normalized, _factors(2, height=height, width=width), 64)
    np.testing.assert_allclose(ours, golden[key], rtol=0, atol=1e-4, err_msg=key)


def test_pinned_rotation_equals_keras(golden):
  keys = [key for key in golden if key.startswith("rotate72/")]
  assert len(keys) == 2
  for key in keys:
    normalized = (golden["image"] - golden["mean"]) / np.sqrt(golden["variance"])
    ours = _warp(normalized, _factors(2, angle=float(key.split("/")[1])), 72)
    np.testing.assert_allclose(ours, golden[key], rtol=0, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("image_size", [8, 12, 5])
def test_preprocess_equals_its_definition(images, image_size):
  ours = augment.preprocess(images, mean=MEAN, variance=VARIANCE, image_size=image_size)
  np.testing.assert_allclose(ours, _keras_preprocess(images, image_size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("angle", [None, 0.02, -0.05, 0.3])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("height, width", [(0.2, -0.2), (-0.13, 0.07), (1.5, 0.0)])
def test_warp_equals_its_definition(images, flip, height, width, angle):
  resized = _keras_preprocess(images, 12)
  expected = _keras_affine(resized[:, :, ::-1] if flip else resized, angle, height, width)
  normalized = (images - MEAN) / np.sqrt(VARIANCE)
  ours = _warp(jnp.float32(normalized), _factors(4, flip, height, width, angle), 12)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("angle", [None, 0.02])
@pytest.mark.parametrize("height, shift", [(0.0, (0.1, -0.3)), (-0.2, (-0.25, 0.04))])
def test_a_shift_and_a_zoom_are_one_map_that_is_sampled_once(images, height, shift, angle):
  expected = _keras_affine(_keras_preprocess(images, 12), angle, height, 0.1, shift)
  normalized = (images - MEAN) / np.sqrt(VARIANCE)
  ours = _warp(jnp.float32(normalized), _factors(4, False, height, 0.1, angle, shift), 12)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_a_shift_of_whole_pixels_moves_them_and_mirrors_the_edge(images):
  ours = _warp(jnp.float32(images), _factors(4, shift=(0.25, -0.125)), 8)  # 2 down, 1 to the left
  padded = np.pad(images, [(0, 0), (2, 0), (0, 1), (0, 0)], mode="symmetric")
  np.testing.assert_allclose(ours, padded[:, :8, 1:], rtol=0, atol=1e-3)


def test_each_image_is_warped_by_its_own_factors(images):
  normalized = jnp.float32(images)
  factors = Factors(
    flip=jnp.array([False, True, False, True]),
    height=jnp.array([0.0, 0.1, -0.2, 0.2]),
    width=jnp.array([0.2, 0.0, 0.1, -0.1]),
    angle=jnp.array([0.0, 0.01, -0.02, 0.02]),
    shift=jnp.array([[0.0, 0.0], [0.1, 0.0], [0.0, -0.1], [0.05, 0.2]]),
  )
  together = _warp(normalized, factors, 12)
  for i in range(4):
    own = Factors(*(values[i : i + 1] for values in factors))
    alone = _warp(normalized[i : i + 1], own, 12)
    np.testing.assert_allclose(together[i], alone[0], rtol=0, atol=1e-4)


def test_channel_without_variance_is_finite(images):
  images = images.copy()
  images[..., 1] = 7
  ours = augment.preprocess(
    images, mean=np.array([100.0, 7.0, 100.0]), variance=np.array([900.0, 0.0, 900.0]), image_size=8
  )
  np.testing.assert_array_equal(ours[..., 1], 0)


def test_augment_without_random_factors_is_preprocess(images):
  plain = dict(mean=MEAN, variance=VARIANCE, image_size=12)
  ours = augment.augment(
    images, jax.random.key(0), jnp.arange(4), flip=False, zoom=0.0, rotation=0.0, **plain
  )
  np.testing.assert_allclose(ours, augment.preprocess(images, **plain), rtol=0, atol=1e-5)


def test_an_image_is_augmented_the_same_in_any_microbatch(images):
  arguments = dict(mean=MEAN, variance=VARIANCE, image_size=12, rotation=0.02, shift=0.1)
  key, positions = jax.random.key(3), jnp.arange(100, 104)
  jitted = jax.jit(partial(augment.augment, **arguments))
  together = jitted(images, key, positions)
  halves = [jitted(images[part], key, positions[part]) for part in (slice(0, 1), slice(1, 4))]
  np.testing.assert_allclose(together, jnp.concatenate(halves), rtol=0, atol=1e-5)


def _graph(function, images):
  return str(jax.make_jaxpr(function)(images, jax.random.key(0), jnp.arange(4)))


def test_no_rotation_leaves_no_gather_in_the_graph(images):
  arguments = dict(mean=MEAN, variance=VARIANCE, image_size=12)
  assert "gather" in _graph(partial(augment.augment, **arguments, rotation=0.02), images)
  assert "gather" not in _graph(partial(augment.augment, **arguments), images)


def test_knobs_that_are_off_leave_nothing_in_the_graph(images):
  """What a run computes without them is what it computed before there were any."""
  config = default.get_config()

  def before(images, key, positions):
    factors = draw_factors(key, positions, flip=True, zoom=0.2)
    return warp(normalize(images, MEAN, VARIANCE), factors, 12, Box(0, 0, 8, 8))

  now = partial(
    augment.augment, mean=MEAN, variance=VARIANCE, image_size=12, **augment.options(config)
  )
  assert _graph(now, images) == _graph(before, images)


N = 20_000


@pytest.fixture(scope="module")
def drawn():
  """[6, N]: height, width, angle, down and right, flip."""
  factors = draw_factors(
    jax.random.key(0), jnp.arange(N), flip=True, zoom=0.2, rotation=0.02, shift=0.1
  )
  down, right = factors.shift.T
  columns = factors.height, factors.width, factors.angle, down, right, factors.flip
  return np.stack([np.float64(values) for values in columns])


def test_half_of_the_images_are_flipped(drawn):
  assert abs(np.mean(drawn[5]) - 0.5) < 4 * 0.5 / np.sqrt(N)
  none = draw_factors(jax.random.key(0), jnp.arange(N), zoom=0.2)
  assert not np.any(none.flip)
  assert none.angle is None and none.shift is None


@pytest.mark.parametrize("row, limit", list(enumerate([0.2, 0.2, 0.02, 0.1, 0.1])))
def test_factors_are_uniform_between_plus_and_minus_the_limit(drawn, row, limit):
  values = np.sort(drawn[row])
  assert -limit <= values[0] < -0.99 * limit and 0.99 * limit < values[-1] <= limit
  assert abs(values.mean()) < 4 * limit / np.sqrt(3 * N)
  np.testing.assert_allclose(values.var(), limit**2 / 3, rtol=0.03)
  # Kolmogorov-Smirnov: the largest gap to the uniform distribution, 0.1 % critical value.
  uniform = (values + limit) / (2 * limit)
  assert np.abs(uniform - np.arange(0.5, N) / N).max() < 1.95 / np.sqrt(N)


def test_factors_of_an_image_are_independent_of_each_other_and_of_its_neighbours(drawn):
  columns = np.concatenate([drawn, np.roll(drawn, 1, axis=1)])
  correlation = np.corrcoef(columns) - np.eye(12)
  assert np.abs(correlation).max() < 5 / np.sqrt(N)


def test_keys_draw_independent_factors(drawn):
  other = draw_factors(jax.random.key(1), jnp.arange(N), flip=True, zoom=0.2, rotation=0.02)
  ours, theirs = drawn[[5, 0, 1, 2]], other[:4]
  for one, two in zip(ours, theirs, strict=True):
    assert abs(np.corrcoef(one, np.float64(two))[0, 1]) < 5 / np.sqrt(N)
