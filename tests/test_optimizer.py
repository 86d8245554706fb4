"""The optimizer against a hand-written AdamW; plateau and early stopping against Keras."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import mlp_models
from configs import default
from train import optimizer, update_rules
from train.errors import ConfigError

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "plateau.json").read_text())


def _config(**overrides):
  recipe = default.get_config().optimizer
  return ConfigDict(recipe.to_dict() | dict(learning_rate=0.01, weight_decay=0.1) | overrides)


def _plateau_config(factor=0.5, patience=5, min_delta=1e-4):
  return ConfigDict(dict(factor=factor, patience=patience, min_delta=min_delta))


def _steps(config, params, grads, scales):
  """The params after each of our steps."""
  transformation = optimizer.make_optimizer(config)
  state = transformation.init(params)
  for grad, scale in zip(grads, scales, strict=True):
    updates, state = transformation.update(grad, state, params, learning_rate_scale=scale)
    params = optax.apply_updates(params, updates)
    yield params


def _adamw_by_hand(config, param, grads, scales):
  """Loshchilov and Hutter's algorithm 2 with Keras' epsilon, in float64."""
  m = v = 0.0
  for t, (grad, scale) in enumerate(zip(grads, scales, strict=True), start=1):
    m = config.b1 * m + (1 - config.b1) * grad
    v = config.b2 * v + (1 - config.b2) * grad**2
    correction = np.sqrt(1 - config.b2**t) / (1 - config.b1**t)
    direction = correction * m / (np.sqrt(v) + config.epsilon)
    rate = scale * config.learning_rate
    decay = config.weight_decay * (1.0 if config.independent_weight_decay else rate)
    param = param - rate * direction - decay * param
    yield param


@pytest.mark.parametrize("independent", [False, True])
def test_adamw_equals_the_algorithm_by_hand_for_every_parameter(independent):
  config = _config(independent_weight_decay=independent)
  rng = np.random.default_rng(0)
  shapes = {"kernel": (3, 4), "bias": (4,), "scale": ()}
  params = {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
  grads = [
    {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()} for _ in range(4)
  ]
  scales = [1.0, 1.0, 0.5, 0.25]
  ours = list(_steps(config, params, grads, scales))
  for name in shapes:
    expected = _adamw_by_hand(config, np.float64(params[name]), [g[name] for g in grads], scales)
    for after, value in zip(ours, expected, strict=True):
      np.testing.assert_allclose(after[name], value, rtol=2e-6, atol=1e-7)


def test_independent_weight_decay_ignores_learning_rate_and_plateau():
  zero = {"w": jnp.zeros(1)}
  one = {"w": jnp.ones(1)}
  for learning_rate, scale in [(1e-3, 1.0), (5e-3, 0.1)]:
    config = _config(learning_rate=learning_rate, independent_weight_decay=True)
    (after,) = _steps(config, one, [zero], [scale])
    np.testing.assert_allclose(after["w"], 1 - config.weight_decay, rtol=1e-6)
    (after,) = _steps(_config(learning_rate=learning_rate), one, [zero], [scale])
    np.testing.assert_allclose(after["w"], 1 - scale * learning_rate * 0.1, rtol=1e-6)


# Fine-tuning: which arrays train, and how fast.

_TWO_BLOCKS = {  # depths by the beginning of the path; the full rate is at depth 3
  "mixer": {"patch_embed": 0, "block0": 1, "block1": 2, "head": 3},
  "fnet": {"patch_embed": 0, "position": 0, "block0": 1, "block1": 2, "head": 3},
  "gmlp": {"patch_embed": 0, "block0": 1, "block1": 2, "head": 3},
  "perceiver": {
    "patch_embed": 0,
    "position": 0,
    "latents": 0,
    "cross": 0,
    "latent/block0": 1,
    "latent/block1": 2,
    "head": 3,
  },
  "perceiver io-learned": {
    "pixel_embed": 0,
    "position": 0,
    "position_projection": 0,
    "latents": 0,
    "cross0": 0,
    "latent/block0": 1,
    "latent/block1": 2,
    "query": 3,
    "decoder": 3,
    "head": 3,
  },
  "vit S/16": {
    "class_token": 0,
    "patch_embed": 0,
    "position": 0,
    "block0": 1,
    "block1": 2,
    "norm": 3,
    "head": 3,
  },
  "vit": {
    "patch_embed": 0,
    "position": 0,
    "block0": 1,
    "block1": 2,
    "norm": 3,
    "head_mlp": 3,
    "head": 3,
  },
}


@pytest.mark.parametrize("name", _TWO_BLOCKS)
def test_learning_rate_falls_with_the_depth_of_each_array(name):
  model = mlp_models.create(*name.split(), num_blocks=2)
  images = jnp.zeros((1, model.image_size, model.image_size, 3))
  params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  factors = optimizer.learning_rate_factors(params, 0.5)
  found = {}
  for path, factor in factors.items():
    parts = path.split("/")
    beginning = "/".join(parts[:2]) if parts[0] == "latent" else parts[0]
    assert found.setdefault(beginning, factor) == factor
  assert found == {k: 0.5 ** (3 - depth) for k, depth in _TWO_BLOCKS[name].items()}


@pytest.mark.parametrize("independent", [False, True])
def test_layer_decay_multiplies_the_learning_rate_alone(independent):
  rng = np.random.default_rng(1)
  params = {"patch_embed": {"bias": np.ones(3)}, "block0": {"bias": np.ones(3)}, "head": np.ones(3)}
  grads = [jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), params) for _ in range(2)]
  options = dict(independent_weight_decay=independent)
  *_, decayed = _steps(_config(layer_decay=0.1, **options), params, grads, [1.0, 0.5])
  for name, factor in (("patch_embed", 0.01), ("block0", 0.1), ("head", 1.0)):
    alone = _config(learning_rate=0.01 * factor, **options)
    *_, expected = _steps(alone, params, grads, [1.0, 0.5])
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), decayed[name], expected[name]
    )


def test_frozen_arrays_have_no_state_and_the_others_are_updated_as_before():
  params = {"block1": {"bias": np.ones(2)}, "block10": {"bias": np.ones(2)}, "head": np.ones(2)}
  trained, frozen = optimizer.split_frozen(params, ("block1",))
  assert (list(trained), list(frozen)) == (["block10", "head"], ["block1"])
  assert optimizer.join(trained, frozen) == params
  grads = jax.tree.map(lambda x: 0.1 * x, params)
  part = optimizer.make_optimizer(_config(), ("block1",))
  state = part.init(params)
  assert jax.tree.leaves(jax.tree.map(jnp.shape, state[0].mu)) == [2, 2]
  updates, _ = part.update(
    optimizer.split_frozen(grads, ("block1",))[0], state, params, learning_rate_scale=1.0
  )
  whole = optimizer.make_optimizer(_config())
  expected, _ = whole.update(grads, whole.init(params), params, learning_rate_scale=1.0)
  assert list(updates) == ["block10", "head"]
  np.testing.assert_array_equal(updates["block10"]["bias"], expected["block10"]["bias"])


def test_backbone_is_all_but_the_head():
  params = {
    "block0": {"bias": 1},
    "norm": {"scale": 2},
    "head": {"kernel": 3},
    "head_mlp": {"a": 4},
  }
  trained, _ = optimizer.split_frozen(params, ("backbone",))
  assert trained == {"head": {"kernel": 3}}
  with pytest.raises(ConfigError, match="nothing is left to train"):
    optimizer.split_frozen(params, ("backbone", "head"))


@pytest.mark.parametrize("grad", [1e-8, 1e-7, 1e-6, 1e-5])
def test_epsilon_bounds_the_step_of_a_tiny_gradient_as_in_keras(grad):
  rate = 0.01
  config = _config(weight_decay=0.0, learning_rate=rate)
  (after,) = _steps(config, {"w": jnp.zeros(1)}, [{"w": jnp.full(1, grad)}], [1.0])
  # Keras adds epsilon to the root of (1 - b2) grad^2, optax to the root of grad^2.
  expected = -rate * grad / (grad + 1e-7 / np.sqrt(1 - 0.999))
  np.testing.assert_allclose(after["w"], expected, rtol=1e-3)


def test_adam_is_optaxs_where_epsilon_is_nothing():
  grads = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
  ours, theirs = (
    update_rules.scale_by_keras_adam(0.9, 0.999, 0.0),
    optax.scale_by_adam(0.9, 0.999, 0.0),
  )
  state, their_state = ours.init(grads[0]), theirs.init(grads[0])
  for grad in grads:
    updates, state = ours.update(grad, state)
    their_updates, their_state = theirs.update(grad, their_state)
    np.testing.assert_allclose(updates, their_updates, rtol=3e-5)
  jax.tree.map(np.testing.assert_array_equal, state, their_state)


def test_scale_is_an_array_under_jit_and_keeps_float32():
  transformation = optimizer.make_optimizer(_config(weight_decay=0.0))
  params = {"w": jnp.ones(2)}

  @jax.jit
  def step(scale):
    grads = {"w": jnp.full(2, 3.0)}
    return transformation.update(
      grads, transformation.init(params), params, learning_rate_scale=scale
    )[0]["w"]

  full, tenth = step(jnp.float32(1.0)), step(jnp.float32(0.1))
  np.testing.assert_allclose(full, -0.01, rtol=1e-5)
  np.testing.assert_allclose(tenth, 0.1 * full, rtol=1e-6)
  assert full.dtype == jnp.float32


@pytest.mark.parametrize("case", range(len(GOLDEN)))
def test_plateau_and_early_stop_decide_as_keras_after_every_epoch(case):
  golden = GOLDEN[case]
  plateau = optimizer.make_plateau(_plateau_config(golden["factor"], golden["patience"]))
  state = plateau.init({"w": jnp.zeros(1)})
  best = optimizer.init_best("min")
  after_epoch = jax.jit(
    lambda state, best, loss, epoch: (
      optimizer.end_of_epoch(plateau, state, loss),
      optimizer.update_best(best, loss, epoch, "min"),
    )
  )
  learning_rates, stopped = [], None
  for epoch, loss in enumerate(golden["val_loss"], start=1):
    state, best = after_epoch(state, best, loss, epoch)
    learning_rates.append(golden["initial_lr"] * float(state.scale))
    if optimizer.should_stop(best, epoch, golden["stop_patience"]):
      stopped = epoch - 1  # the golden file counts from 0
      break
  np.testing.assert_allclose(learning_rates, golden["lr_after_epoch"], rtol=1e-6)
  assert stopped == golden["stopped_after_epoch"]
  assert int(best.epoch) - 1 == golden["best_epoch"]


def test_golden_losses_take_every_decision():
  assert any(case["stopped_after_epoch"] is not None for case in GOLDEN)
  assert any(case["stopped_after_epoch"] is None for case in GOLDEN)
  assert all(len(set(case["lr_after_epoch"])) > 1 for case in GOLDEN)


def test_plateau_without_factor_never_lowers_the_rate_and_has_the_same_state():
  params = {"w": jnp.zeros(1)}
  plateau = optimizer.make_plateau(_plateau_config(factor=1.0, patience=1))
  state = plateau.init(params)
  other = optimizer.make_plateau(_plateau_config(factor=0.5, patience=1)).init(params)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, other)
  for _ in range(5):
    state = optimizer.end_of_epoch(plateau, state, 1.0)
    assert state.scale == 1.0


def test_min_delta_is_absolute():
  plateau = optimizer.make_plateau(_plateau_config(patience=1, min_delta=0.1))
  state = optimizer.end_of_epoch(plateau, plateau.init({"w": jnp.zeros(1)}), 100.0)
  assert optimizer.end_of_epoch(plateau, state, 99.8).scale == 1.0
  assert optimizer.end_of_epoch(plateau, state, 99.95).scale == 0.5


@pytest.mark.parametrize("mode, values", [("min", [3, 2, 2, 4]), ("max", [0.1, 0.3, 0.3, 0.2])])
def test_best_keeps_the_first_of_equal_values(mode, values):
  best = optimizer.init_best(mode)
  for epoch, value in enumerate(values, start=1):
    best = optimizer.update_best(best, value, epoch, mode)
  assert int(best.epoch) == 2
  assert float(best.value) == np.float32(values[1])
  assert best.value.dtype == jnp.float32 and best.epoch.dtype == jnp.int32


def test_nan_is_no_improvement_and_stops_after_patience_epochs():
  best = optimizer.update_best(optimizer.init_best("min"), math.nan, 1, "min")
  assert int(best.epoch) == 0 and math.isinf(best.value)
  assert [optimizer.should_stop(best, epoch, 3) for epoch in (1, 2, 3)] == [False, False, True]
  plateau = optimizer.make_plateau(_plateau_config(patience=2))
  state = plateau.init({"w": jnp.zeros(1)})
  for loss in (1.0, math.nan, math.nan):
    state = optimizer.end_of_epoch(plateau, state, loss)
  assert state.scale == 0.5
  assert state.best_value == 1.0


def test_patience_zero_never_stops():
  best = optimizer.update_best(optimizer.init_best("min"), 1.0, 1, "min")
  assert optimizer.should_stop(best, 1000, 0) is False
