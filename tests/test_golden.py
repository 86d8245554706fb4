"""The models against Keras' numbers: tests/golden/README.md says what they are."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN
from flax.traverse_util import flatten_dict

import mlp_models
from mlp_models import keras_weights
from train import augment

PARAMETERS = {
  "mixer": 242_788,
  "fnet": 621_924,
  "gmlp": 885_348,
  "perceiver": 9_697_637,
  "vit": 21_759_012,
}


def overrides(name, config):
  """What a golden file calls its sizes, in our words."""
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
def test_logits_gradients_and_three_adamw_steps_equal_keras(name, golden_images):
  with np.load(GOLDEN / f"{name}.npz") as arrays:
    golden = dict(arrays)
  config = json.loads(str(golden["config"]))
  weights = {key.removeprefix("param/"): golden[key] for key in golden if key.startswith("param/")}
  images = augment.preprocess(
    np.stack([golden_images[digest] for digest in golden["input/sha256"].tolist()]),
    mean=golden["input/mean"].astype(np.float32),
    variance=golden["input/variance"].astype(np.float32),
    image_size=config["image_size"],
  )
  model = mlp_models.create(name, **overrides(name, config))
  optimizer = optax.adamw(config["lr"], b1=0.9, b2=0.999, eps=1e-7, weight_decay=config["wd"])

  def loss_and_logits(params):
    logits = model.apply({"params": params}, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, golden["input/label"])
    return losses.mean(), logits

  @jax.jit
  def step(params, state):
    (loss, logits), grads = jax.value_and_grad(loss_and_logits, has_aux=True)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss, logits, grads

  params = keras_weights.to_params(name, weights)
  params, state, loss, logits, grads = step(params, optimizer.init(params))

  np.testing.assert_allclose(
    logits, golden["output/logits"], rtol=0, atol=1e-4 * np.abs(golden["output/logits"]).max()
  )
  grads = flatten_dict(grads, sep="/")
  assert {f"grad/{key}" for key in grads} == {key for key in golden if key.startswith("grad/")}
  for key, grad in grads.items():
    expected = golden[f"grad/{key}"]
    error = np.linalg.norm(grad - expected)
    assert error <= 1e-3 * np.linalg.norm(expected) + 1e-6, f"{key}: {error}"

  losses = [loss]
  for _ in range(2):
    params, state, loss, _, _ = step(params, state)
    losses.append(loss)
  np.testing.assert_allclose(losses, golden["output/losses"], rtol=0, atol=5e-4)
