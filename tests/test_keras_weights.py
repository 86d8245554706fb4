"""Weights by canonical name: a round trip at any size, and errors that name the wrong weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

import mlp_models
from mlp_models import keras_weights


def golden_weights(name):
  with np.load(GOLDEN / f"{name}.npz") as golden:
    return {key.removeprefix("param/"): golden[key] for key in golden if key.startswith("param/")}


@pytest.mark.parametrize("name", mlp_models.MODELS)
def test_weights_survive_the_way_there_and_back(name):
  weights = golden_weights(name)
  again = keras_weights.from_params(name, keras_weights.to_params(name, weights))
  assert again.keys() == weights.keys()
  for key in weights:
    np.testing.assert_array_equal(again[key], weights[key])


@pytest.mark.parametrize(
  "name, overrides",
  [
    *((name, {}) for name in mlp_models.MODELS),
    ("mixer", {"image_size": 12, "patch_size": 4, "width": 12, "num_blocks": 1, "num_classes": 7}),
    ("gmlp", {"num_blocks": 11, "width": 6}),
    ("perceiver", {"ffn_units": (24, 40, 256), "num_heads": 3, "num_blocks": 1}),
    ("vit", {"pool": "mean", "mlp_units": (32, 16, 64), "head_units": (48,)}),
  ],
)
def test_names_are_the_paths_of_the_parameters_at_any_size(name, overrides):
  model = mlp_models.create(name, **overrides)
  images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  # One number broadcast to any shape: this test checks only names and shapes.
  params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
  weights = keras_weights.from_params(name, params)
  again = jax.eval_shape(lambda: keras_weights.to_params(name, weights))
  assert jax.tree.map(np.shape, again) == jax.tree.map(np.shape, shapes)


@pytest.mark.parametrize("name", mlp_models.MODELS)
def test_each_missing_or_misshapen_array_is_named(name):
  weights = golden_weights(name)
  for key, weight in weights.items():
    others = {other: weights[other] for other in weights if other != key}
    with pytest.raises(ValueError, match=f"lack {key}$"):
      keras_weights.to_params(name, others)
    with pytest.raises(ValueError, match=f"{key} have shape"):
      keras_weights.to_params(name, others | {key: weight[None]})
    if weight.ndim:
      larger = np.zeros([size + 1 for size in weight.shape])
      with pytest.raises(ValueError, match=f"{key} have shape"):
        keras_weights.to_params(name, others | {key: larger})


def test_both_shapes_of_a_misshapen_array_are_told():
  weights = golden_weights("mixer")
  weights["block1/token_mlp/in/kernel"] = np.zeros((36, 35))
  with pytest.raises(ValueError, match=r"block1/token_mlp/in/kernel .*\(36, 35\).*\(36, 36\)"):
    keras_weights.to_params("mixer", weights)


@pytest.mark.parametrize("surplus", ["block0/norm/gain", "block7/norm/scale", "class_token"])
def test_a_surplus_array_is_named(surplus):
  weights = golden_weights("mixer") | {surplus: np.zeros(20)}
  with pytest.raises(ValueError, match=f"no weights {surplus}$"):
    keras_weights.to_params("mixer", weights)


def test_from_params_checks_too():
  params = keras_weights.to_params("fnet", golden_weights("fnet"))
  del params["position"]
  with pytest.raises(ValueError, match="position/embedding"):
    keras_weights.from_params("fnet", params)
