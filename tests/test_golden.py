"""The models against Keras' numbers, which tests/golden/README.md describes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN
from flax.traverse_util import flatten_dict

import mlp_models
from configs import default
from mlp_models import keras_weights
from train import augment, optimizer

PARAMETERS = {
  "mixer": 242_788,
  "fnet": 621_924,
  "gmlp": 885_348,
  "perceiver": 9_697_637,
  "vit": 21_759_012,
}


def overrides(name, config):
  """The sizes in a golden file, under our names."""
  sizes = {
    "image_size": config["image_size"],
    "patch_size": config["patch"],
    "width": config["dim"],
    "num_blocks": config["blocks"],
    "num_classes": config["classes"],
  }
  if name == "perceiver":
    sizes |= {
      "num_heads": config["heads"],
      "num_latents": config["latents"],
      "num_iterations": config["iters"],
      "ffn_units": config["mlp"],
    }
  if name == "vit":
    sizes |= {
      "num_heads": config["heads"],
      "head_dim": config["dim"],
      "mlp_units": config["mlp"],
      "head_units": config["head"],
    }
  return sizes


@pytest.mark.parametrize("name", mlp_models.MODELS)
def test_parameter_count_is_that_of_the_keras_example(name):
  model = mlp_models.create(name)
  images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", mlp_models.MODELS)
def test_logits_gradients_and_three_adamw_steps_equal_keras(name):
  with np.load(GOLDEN / f"{name}.npz") as arrays:
    golden = dict(arrays)
  config = json.loads(str(golden["config"]))
  images = augment.preprocess(
    golden["input/image"],
    mean=golden["input/mean"].astype(np.float32),
    variance=golden["input/variance"].astype(np.float32),
    image_size=config["image_size"],
  )
  np.testing.assert_allclose(images, golden["output/preprocessed"], rtol=0, atol=1e-5)
  model = mlp_models.create(name, **overrides(name, config))
  recipe = default.get_config().optimizer
  recipe.learning_rate, recipe.weight_decay = config["lr"], config["wd"]
  adamw = optimizer.make_optimizer(recipe)

  def loss_and_logits(params):
    logits = model.apply({"params": params}, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, golden["input/label"])
    return losses.mean(), logits

  @jax.jit
  def step(params, state):
    (loss, logits), grads = jax.value_and_grad(loss_and_logits, has_aux=True)(params)
    updates, state = adamw.update(grads, state, params, learning_rate_scale=1.0)
    return optax.apply_updates(params, updates), state, loss, logits, grads

  params = keras_weights.to_params(name, arrays_of(golden, "param"))
  params, state, loss, logits, grads = step(params, adamw.init(params))

  np.testing.assert_allclose(
    logits, golden["output/logits"], rtol=0, atol=5e-6 * np.abs(golden["output/logits"]).max()
  )
  expected = arrays_of(golden, "grad")
  grads = flatten_dict(grads, sep="/")
  assert grads.keys() == expected.keys()
  for key, grad in grads.items():
    error = np.linalg.norm(grad - expected[key])
    assert error <= 3e-4 * np.linalg.norm(expected[key]) + 1e-6, f"{key}: {error}"

  losses = [loss]
  for _ in range(2):
    params, state, loss, _, _ = step(params, state)
    losses.append(loss)
  np.testing.assert_allclose(losses, golden["output/losses"], rtol=0, atol=3e-5)
  expected = arrays_of(golden, "after")
  after = flatten_dict(params, sep="/")
  assert after.keys() == expected.keys()
  for key, weights in after.items():
    np.testing.assert_allclose(weights, expected[key], rtol=0, atol=1e-4, err_msg=key)


def arrays_of(golden, kind):
  """The arrays of one kind ("param", "grad" or "after") by canonical name."""
  return {
    key.removeprefix(f"{kind}/"): array
    for key, array in golden.items()
    if key.startswith(f"{kind}/")
  }
