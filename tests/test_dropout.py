"""Dropout: a fair coin for each element, the same however the batch is cut."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_models.dropout import Dropout, start, stream

B, T, D = 64, 32, 128


class Layers(nn.Module):
  """Two layers, and a second use of the first."""

  rate: float = 0.2

  @nn.compact
  def __call__(self, x, positions=None, train=True):
    start(self, len(x), positions, train)
    first_layer = Dropout(self.rate, name="first")
    first = first_layer(x)
    second = Dropout(self.rate, name="second")(x)
    third = first_layer(x)
    return jnp.stack([first, second, third])


def drop(x, rate):
  """Applies a single Dropout layer to four examples."""
  return Dropout(rate).apply({}, x, rngs=stream(jnp.arange(4, dtype=jnp.uint32)))


def masks(key=0, rate=0.2, positions=None, batch=B):
  ones = jnp.ones((batch, T, D))
  return Layers(rate).apply({}, ones, positions, rngs={"dropout": jax.random.key(key)})


def correlation(a, b):
  return abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5])
def test_share_of_kept_elements_and_mean(rate):
  for mask in masks(rate=rate):
    kept = np.mean(mask > 0)
    assert abs(kept - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / mask.size)
    np.testing.assert_allclose(np.unique(mask), [0, 1 / (1 - rate)], rtol=1e-6)
    np.testing.assert_allclose(mask.mean(), kept / (1 - rate), rtol=1e-5)


def test_masks_of_layers_keys_examples_and_neighbours_are_independent():
  first, second, third = masks() > 0
  other_key, *_ = masks(key=1) > 0
  pairs = {
    "layers": (first, second),
    "uses": (first, third),
    "keys": (first, other_key),
    "examples": (first[:-1], first[1:]),
    "far examples": (first[: B // 2], first[B // 2 :]),
    "channels": (first[..., :-1], first[..., 1:]),
    "even channels": (first[..., :-2], first[..., 2:]),
    "tokens": (first[:, :-1], first[:, 1:]),
  }
  for name, (a, b) in pairs.items():
    # Five standard deviations of the correlation of independent coins.
    assert correlation(a, b) < 5 / np.sqrt(a.size), name


def test_runs_of_eight_elements_pass_a_chi_squared_test():
  # At rate 1/2 each of the 256 patterns of eight neighbours is equally likely.
  bits = np.asarray(masks(rate=0.5)[0] > 0).reshape(-1, 8)
  counts = np.bincount(bits @ (1 << np.arange(8)), minlength=256)
  expected = len(bits) / 256
  chi_squared = np.sum((counts - expected) ** 2 / expected)
  # 255 degrees of freedom: mean 255, standard deviation sqrt(510) = 22.6.
  assert abs(chi_squared - 255) < 5 * np.sqrt(510)


def test_kept_elements_of_examples_vary_as_coins_do():
  kept = np.asarray(masks()[0] > 0).reshape(B, -1)
  spread = np.var(kept.sum(axis=1)) / (T * D * 0.2 * 0.8)
  assert abs(spread - 1) < 5 * np.sqrt(2 / B)


def test_mask_depends_on_the_position_and_not_on_the_cut():
  whole = masks(batch=8)
  positions = jnp.arange(8)
  np.testing.assert_array_equal(masks(batch=8, positions=positions), whole)
  for rows in (slice(0, 4), slice(4, 8), slice(5, 6)):
    part = masks(batch=len(positions[rows]), positions=positions[rows])
    np.testing.assert_array_equal(part, whole[:, rows])


def test_same_key_repeats_and_evaluation_changes_nothing():
  np.testing.assert_array_equal(masks(key=3), masks(key=3))
  x = jax.random.normal(jax.random.key(0), (2, T, D))
  for y in Layers().apply({}, x, train=False):
    np.testing.assert_array_equal(y, x)


def test_training_without_a_key_is_an_error():
  with pytest.raises(flax.errors.InvalidRngError):
    Layers().apply({}, jnp.ones((2, 3)))


def test_wrong_number_of_positions_is_an_error():
  with pytest.raises(ValueError, match=r"\(3,\).*64"):
    masks(positions=jnp.arange(3))


def test_gradient_is_the_mask():
  x = jax.random.normal(jax.random.key(0), (4, T, D))
  mask = drop(jnp.ones_like(x), 0.2)
  y, vjp = jax.vjp(lambda x: drop(x, 0.2), x)
  np.testing.assert_allclose(y, x * mask, rtol=1e-6)
  np.testing.assert_allclose(vjp(x)[0], x * mask, rtol=1e-6)


def test_backward_pass_stores_seeds_and_no_mask():
  _, vjp = jax.vjp(lambda x: drop(x, 0.2), jnp.ones((4, T, D)))
  assert max(leaf.size for leaf in jax.tree.leaves(vjp)) <= 4


def test_bfloat16_stays_bfloat16_with_the_same_mask():
  ones = jnp.ones((4, T, D))
  full, half = drop(ones, 0.1), drop(ones.astype(jnp.bfloat16), 0.1)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_array_equal(half, full.astype(jnp.bfloat16))  # 0.1 itself rounds, in bfloat16


def test_remat_drops_the_same_elements():
  class Model(nn.Module):
    layer: type[nn.Module]

    @nn.compact
    def __call__(self, x):
      start(self, len(x), None, train=True)
      layer = self.layer(0.5, name="drop")
      return layer(layer(x))

  def kept(layer):
    ones, rngs = jnp.ones((4, T, D)), {"dropout": jax.random.key(0)}
    y, vjp = jax.vjp(lambda x: Model(layer).apply({}, x, rngs=rngs), ones)
    np.testing.assert_array_equal(vjp(ones)[0], y)
    return y

  np.testing.assert_array_equal(kept(nn.remat(Dropout)), kept(Dropout))
  assert 0.2 < np.mean(kept(Dropout) > 0) < 0.3  # the two calls have different masks


def test_evaluation_after_training_drops_nothing():
  """The second call of a model in one `apply` is independent of the first."""

  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      model = Layers()
      return model(x, train=True), model(x, train=False)

  x = jnp.ones((4, T, D))
  trained, evaluated = Twice().apply({}, x, rngs={"dropout": jax.random.key(0)})
  np.testing.assert_array_equal(evaluated[0], x)
  assert 0.7 < np.mean(np.asarray(trained[0]) > 0) < 0.9
