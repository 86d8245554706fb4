"""MixUp and CutMix against the papers' definitions, and what must not change a mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from configs import mixer
from train.augment.mixing import Mixing, draw_shares, mix, symmetric_beta
from train.check import check_config
from train.devices.mesh import make_mesh, microbatch_size
from train.errors import ConfigError

KEY = jax.random.key(3)
SIZE, CLASSES = 12, 5


def a_batch(count: int, first: int = 0):
  """Images, targets, positions and mask."""
  rng = np.random.default_rng(first)
  images = rng.normal(size=(count, SIZE, SIZE, 3)).astype(np.float32)
  targets = np.eye(CLASSES, dtype=np.float32)[rng.integers(0, CLASSES, count)]
  return images, targets, np.arange(first, first + count), np.ones(count, bool)


def mixed(images, targets, positions, mask, mixing: Mixing):
  return jax.jit(mix, static_argnums=5)(images, targets, KEY, positions, mask, mixing)


def by_hand(images, targets, positions, mixing: Mixing):
  """One image after the other, as the papers write it."""
  new_images, new_targets = np.copy(images), np.copy(targets)
  for i, position in enumerate(positions):
    other = i ^ 1
    numbers = np.asarray(jax.random.uniform(jax.random.fold_in(KEY, position // 2), (6,)))
    is_mixed, kind, down, right, u, v = numbers
    if is_mixed >= mixing.mix_probability:
      continue
    if mixing.cutmix and (kind < 0.5 or not mixing.mixup):
      half = int(SIZE * np.sqrt(1 - symmetric_beta(u, v, mixing.cutmix))) // 2
      y, x = int(down * SIZE), int(right * SIZE)
      box = np.s_[max(0, y - half) : min(SIZE, y + half), max(0, x - half) : min(SIZE, x + half)]
      new_images[i][box] = images[other][box]
      kept = 1 - new_images[i][box][..., 0].size / SIZE**2
    else:
      kept = symmetric_beta(u, v, mixing.mixup)
      new_images[i] = kept * images[i] + (1 - kept) * images[other]
    new_targets[i] = kept * targets[i] + (1 - kept) * targets[other]
  return new_images, new_targets


@pytest.mark.parametrize(
  "mixing", [Mixing(0.3, 0.0, 1.0), Mixing(0.0, 1.0, 1.0), Mixing(0.8, 1.0, 0.7)]
)
def test_mixtures_are_those_of_the_papers(mixing):
  images, targets, positions, mask = a_batch(24, first=6)
  got_images, got_targets = mixed(images, targets, positions, mask, mixing)
  want_images, want_targets = by_hand(images, targets, positions, mixing)
  assert_allclose(got_images, want_images, atol=2e-6)
  assert_allclose(got_targets, want_targets, atol=3e-6)
  assert_allclose(got_targets.sum(1), 1, atol=1e-6)
  changed = (np.abs(got_images - images) > 1e-4).any((1, 2, 3)).reshape(-1, 2)
  assert_array_equal(changed[:, 0], changed[:, 1])
  assert 4 <= changed[:, 0].sum() <= 12


def test_a_mixture_depends_on_its_pair_alone():
  mixing = Mixing(1.0, 1.0, 1.0)
  images, targets, positions, mask = a_batch(16)
  whole = mixed(images, targets, positions, mask, mixing)
  part = np.s_[4:8]
  alone = mixed(images[part], targets[part], positions[part], mask[part], mixing)
  for got, want in zip(alone, whole, strict=True):
    assert_array_equal(got, want[part])


def test_a_masked_example_mixes_with_nobody():
  images, targets, positions, mask = a_batch(8)
  mask[5:] = False
  got_images, got_targets = mixed(images, targets, positions, mask, Mixing(1.0, 0.0, 1.0))
  assert_array_equal(got_images[4:], images[4:])
  assert_array_equal(got_targets[4:], targets[4:])
  assert (np.abs(got_images[:4] - images[:4]).max((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0])
def test_draws_of_beta_are_distributed_so(alpha):
  u, v = np.random.default_rng(1).uniform(size=(2, 100000)).astype(np.float32)
  drawn = np.asarray(symmetric_beta(u, v, alpha))
  expected = np.random.default_rng(0).beta(alpha, alpha, 100000)
  for value in (0.01, 0.1, 0.3, 0.5, 0.7, 0.99):
    assert abs((drawn < value).mean() - (expected < value).mean()) < 0.01, value
  assert abs(drawn.var() - 1 / (4 * (2 * alpha + 1))) < 0.003
  ends = symmetric_beta(np.float32([0, 0, 1 - 2**-24]), np.float32([0, 0.25, 0.25]), alpha)
  assert np.isfinite(ends).all()


def test_boxes_of_cutmix_cover_what_the_papers_code_covers():
  shares = np.asarray(draw_shares(KEY, jnp.arange(8000), 32, Mixing(0.0, 1.0, 1.0)))
  assert set(np.unique(shares)) == {0.0, 1.0}
  rng = np.random.default_rng(0)
  side = 32 * np.sqrt(1 - rng.uniform(size=100000))
  half = side.astype(int) // 2
  sides = []
  for _ in range(2):
    centre = rng.integers(0, 32, 100000)
    sides.append(np.clip(centre + half, 0, 32) - np.clip(centre - half, 0, 32))
  covered = sides[0] * sides[1] / 32**2
  got = 1 - shares.mean((1, 2))
  assert abs(got.mean() - covered.mean()) < 0.01
  for part in (0.25, 0.5, 0.9):
    assert abs(np.quantile(got, part) - np.quantile(covered, part)) < 0.03
  # Every pixel is as likely in a box as its mirror image.
  likely = 1 - shares.mean(0)
  assert_allclose(likely[:16].mean(), likely[16:].mean(), atol=0.02)
  assert_allclose(likely[:, :16].mean(), likely[:, 16:].mean(), atol=0.02)


def test_half_of_the_mixed_pairs_are_cutmix():
  shares = np.asarray(draw_shares(KEY, jnp.arange(4000), SIZE, Mixing(1.0, 1.0, 0.6)))
  is_mixup = (shares[:, 0, 0] == shares[:, 5, 5]) & (shares[:, 0, 0] % 1 > 0)
  assert abs(is_mixup.mean() - 0.3) < 0.03
  assert abs(((shares == 0) | (shares == 1)).all((1, 2)).mean() - 0.7) < 0.03


def mixing_config(**knobs):
  config = mixer.get_config()
  config.update_from_flattened_dict({"augment.mixup": 1.0} | knobs)
  return config


def test_an_odd_microbatch_is_refused_where_pairs_are_mixed():
  mesh = make_mesh(devices=jax.devices()[:2])
  with pytest.raises(ConfigError, match="microbatch=1: it must be even, because config.augment"):
    microbatch_size(mixing_config(microbatch=1), mesh)
  with pytest.raises(ConfigError, match="batch_size=30 over 2 devices is 15 each: it must be even"):
    microbatch_size(mixing_config(batch_size=30), mesh)
  assert microbatch_size(mixing_config(batch_size=20), mesh) == 2  # of 10; without mixing it is 5
  assert microbatch_size(mixing_config(batch_size=20, cpu_microbatch=1), mesh) == 2
  assert microbatch_size(mixing_config(cpu_microbatch=8), mesh) == 8


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("augment.mixup", -0.1, "config.augment.mixup = -0.1: from 0"),
    ("augment.cutmix", float("nan"), "config.augment.cutmix = nan"),
    ("augment.mix_probability", 0.0, "config.augment.mix_probability = 0.0: above 0, at most 1"),
    ("label_smoothing", 1.0, "config.label_smoothing = 1.0: from 0"),
  ],
)
def test_wrong_knobs_are_refused(key, value, message):
  with pytest.raises(ConfigError, match=message):
    check_config(mixing_config(**{key: value}))
