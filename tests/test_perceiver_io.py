"""DeepMind's Perceivers: sizes, numbers, and the loop over iterations.

tests/test_peers.py compares Perceiver IO with transformers'; the paper's Perceiver has no peer
there, so that it is compared with a plain form of itself in this file.
"""

import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

import mlp_models
from mlp_models.flops import count_flops
from mlp_models.perceiver_tokens import fourier_features
from mlp_models.pretrained import perceiver as layouts
from mlp_models.pretrained import rules

SMALL = {
  "image_size": 8,
  "num_bands": 2,
  "num_latents": 3,
  "width": 12,
  "num_iterations": 3,
  "num_cross_attends": 2,
  "num_blocks": 1,
  "num_heads": 2,
  "num_classes": 5,
}
RATES = {"dropout_rate": 0.2, "attention_dropout_rate": 0.3, "drop_path_rate": 0.4}


def small(**overrides):
  return mlp_models.create("perceiver", "paper", **SMALL | overrides)


@functools.cache
def images(size=8):
  return np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)


def shapes(model, size=8):
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]


@functools.cache
def params():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), shapes(small())
  )


@pytest.mark.parametrize(
  ("variant", "parameters"),
  [  # published: 44.9 M in arXiv:2103.03206; the others are those of transformers' models
    ("paper", 44_912_254),
    ("io-learned", 62_255_848),
    ("io-fourier", 48_440_627),
    ("io-conv", 48_646_522),
  ],
)
def test_variants_have_the_published_number_of_parameters(variant, parameters):
  made = shapes(mlp_models.create("perceiver", variant), 224)
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made)) == parameters
  if variant == "io-conv":
    assert made["cross0"]["attention"]["key"]["kernel"].shape == (64 + 258, 64 + 258)


def test_fourier_features_are_sines_and_cosines_of_rows_and_columns():
  features = np.asarray(fourier_features((3, 4), bands=5, max_resolution=224))
  assert features.shape == (12, 2 + 4 * 5) and features.dtype == np.float32
  frequencies = np.linspace(1, 112, 5)
  row, column = 1.0, -1 / 3  # the last row's second place
  angles = np.pi * np.concatenate([row * frequencies, column * frequencies])
  expected = np.concatenate([[row, column], np.sin(angles), np.cos(angles)])
  np.testing.assert_allclose(features[2 * 4 + 1], expected, atol=1e-4)


def plain_perceiver(params, x_BxHxWxC):
  """The paper's model at the sizes of SMALL, written out in NumPy."""

  def dense(p, x):
    return x @ p["kernel"] + p["bias"]

  def norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

  def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  def block(p, x, data, heads):
    y = norm(p["norm1"], x)
    data = y if data is None else norm(p["norm_data"], data)
    query, key, value = (
      dense(p["attention"][name], tokens)
      for name, tokens in (("query", y), ("key", data), ("value", data))
    )
    out = []
    for q, k, v in zip(*(np.split(z, heads, axis=-1) for z in (query, key, value)), strict=True):
      exps = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
      out.append(exps / exps.sum(-1, keepdims=True) @ v)
    x = x + dense(p["attention"]["out"], np.concatenate(out, axis=-1))
    return x + dense(p["mlp"]["dense1"], gelu(dense(p["mlp"]["dense0"], norm(p["norm2"], x))))

  params, images = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x_BxHxWxC))
  positions = np.asarray(fourier_features((8, 8), 2, 224), np.float64)
  pixels = images.reshape(len(images), 64, 3)
  data = np.concatenate([pixels, np.broadcast_to(positions, (len(images), 64, 10))], axis=-1)
  x = np.broadcast_to(params["latents"], (len(images), 3, 12))
  x = block(params["cross0"], x, data, heads=1)
  x = block(params["latent"]["block0"], x, None, heads=2)
  x = block(params["cross1"], x, data, heads=1)
  x = block(params["latent"]["block0"], x, None, heads=2)
  x = block(params["latent"]["block0"], x, None, heads=2)
  return dense(params["head"], x.mean(axis=1))


@functools.cache
def evaluation():
  return jax.jit(small().apply)({"params": params()}, images())


def test_the_papers_perceiver_is_its_plain_form():
  logits = evaluation()
  expected = plain_perceiver(params(), images())
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def training(unrolled):
  """Logits and gradients in training; `unrolled`: intermediates are recorded, so without a loop."""
  # Each block is computed again for the gradients, inside the loop.
  model = small(**RATES, remat=not unrolled)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(params):
    rngs, mutable = {"dropout": jax.random.key(3)}, ["intermediates"] if unrolled else []
    logits, _ = model.apply({"params": params}, images(), train=True, rngs=rngs, mutable=mutable)
    return (logits**2).sum(), logits

  (_, logits), grads = jax.jit(loss)(params())
  return logits, grads


@pytest.mark.slow
def test_loop_with_remat_is_the_unrolled_iterations_with_their_dropout():
  (logits, grads), (expected, expected_grads) = training(unrolled=False), training(unrolled=True)
  assert np.abs(logits - evaluation()).max() > 0.1 * np.abs(evaluation()).max()  # dropout is on
  np.testing.assert_allclose(logits, expected, rtol=1e-4)
  for grad, expected in zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True):
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max() + 1e-5)


def count_equations(jaxpr):
  inner = [getattr(value, "jaxpr", None) for e in jaxpr.eqns for value in e.params.values()]
  return len(jaxpr.eqns) + sum(count_equations(each) for each in inner if each is not None)


def test_program_does_not_grow_with_the_iterations():
  def size(iterations):
    model = small(num_iterations=iterations, num_cross_attends=iterations)
    return count_equations(jax.make_jaxpr(model.apply)({"params": params()}, images()).jaxpr)

  assert size(40) == size(3)


def test_keys_and_values_of_the_data_are_computed_outside_of_the_loop():
  calls = []

  def spy(next_function, args, kwargs, context):
    if context.module.name in ("key", "value"):
      calls.append("/".join(context.module.path))
    return next_function(*args, **kwargs)

  variables = {"params": params()}
  with nn.intercept_methods(spy):
    jax.eval_shape(functools.partial(small().apply, mutable=["intermediates"]), variables, images())
  for cross in ("cross0", "cross1"):
    assert [calls.count(f"{cross}/attention/{name}") for name in ("key", "value")] == [1, 1]
  assert calls.count("latent/block0/attention/key") == 3


def test_intermediates_are_those_of_each_iteration():
  apply = jax.jit(functools.partial(small().apply, mutable=["intermediates"]))
  logits, variables = apply({"params": params()}, images())
  found = variables["intermediates"]
  assert [x.shape for x in found["cross0"]["attention"]["weights"]] == [(2, 1, 3, 64)]
  assert [x.shape for x in found["cross1"]["attention"]["weights"]] == [(2, 1, 3, 64)]
  weights = found["latent"]["block0"]["attention"]["weights"]
  assert [x.shape for x in weights] == [(2, 2, 3, 3)] * 3
  np.testing.assert_allclose(np.sum(weights, axis=-1), 1, rtol=1e-5)
  outputs = found["latent"]["block0"]["output"]
  assert len(outputs) == len(found["latent"]["block0"]["token_mixing"]) == 3
  head = params()["head"]
  last = outputs[-1].mean(axis=1)
  np.testing.assert_allclose(last @ head["kernel"] + head["bias"], logits, rtol=1e-4)


def test_no_classes_give_the_features_of_the_head():
  features = jax.jit(small(num_classes=0).apply)({"params": params()}, images())
  head = params()["head"]
  np.testing.assert_allclose(features @ head["kernel"] + head["bias"], evaluation(), rtol=1e-4)


def test_keras_perceiver_has_features_and_intermediates_too():
  model = mlp_models.create(
    "perceiver",
    image_size=8,
    patch_size=4,
    width=16,
    num_latents=3,
    num_blocks=1,
    num_heads=2,
    ffn_units=(12, 16),
    num_classes=0,
  )

  @jax.jit
  def features_and_intermediates(images):
    params = model.init(jax.random.key(0), images)["params"]
    return model.apply({"params": params}, images, mutable=["intermediates"])

  features, variables = features_and_intermediates(images())
  found = variables["intermediates"]
  outputs = found["latent"]["block0"]["output"]
  assert len(outputs) == len(found["cross"]["output"]) == model.num_iterations
  np.testing.assert_allclose(features, outputs[-1].mean(axis=1), rtol=1e-5)
  (weights, _) = found["cross"]["weights"]
  assert weights.shape == (2, 1, 3, 4) and found["cross"]["token_mixing"][0].shape == (2, 3, 16)
  np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)


def test_bfloat16_is_float32_nearly():
  half = jax.jit(small(dtype="bfloat16").apply)({"params": params()}, images())
  assert half.dtype == jnp.float32
  assert 0 < np.abs(half - evaluation()).max() < 0.1 * np.abs(evaluation()).max()


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"width": 13}, "width 13 is not a multiple of num_heads 2"),
    ({"num_cross_heads": 3, "cross_qk_channels": 16}, "cross_qk_channels 16 .* num_cross_heads 3"),
    ({"num_cross_attends": 5}, "num_cross_attends 5 is more than num_iterations 3"),
    ({"preprocessing": "patches"}, "'patches'.*learned, fourier, conv"),
    ({"readout": "cls"}, "'cls'.*mean, decoder"),
  ],
)
def test_sizes_that_do_not_fit_are_one_line(overrides, message):
  with pytest.raises(ValueError, match=message):
    small(**overrides)


def test_only_learned_positions_need_the_image_size():
  logits = jax.eval_shape(small().apply, {"params": params()}, images(12))
  assert logits.shape == (2, 5)
  learned = small(preprocessing="learned")
  with pytest.raises(ValueError, match=r"\(2, 12, 12, 3\).*8, 8, C"):
    jax.eval_shape(learned.init, jax.random.key(0), images(12))
  with pytest.raises(ValueError, match="uint8.*float"):
    jax.eval_shape(small().apply, {"params": params()}, images().astype(np.uint8))


def golden_config():
  folder = GOLDEN / "peers" / "transformers_perceiver_fourier"
  return folder, json.loads((folder / "config.json").read_text())


def test_published_configs_of_fourier_models_mean_224_pixels(tmp_path):
  folder, config = golden_config()
  (tmp_path / "config.json").write_text(json.dumps(config | {"image_size": 56}))
  (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
  processor = {"image_mean": [0.5] * 3, "do_center_crop": True, "crop_size": 256, "size": 224}
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
  found = mlp_models.pretrained.describe(tmp_path)
  assert found.fields["image_size"] == 224
  assert found.preprocessing.crop == 224 / 256
  assert (found.fields["num_iterations"], found.fields["num_heads"]) == (3, 4)


def test_without_a_config_the_heads_are_those_of_the_published_models_and_it_is_said(tmp_path):
  (tmp_path / "bare.safetensors").symlink_to(golden_config()[0] / "model.safetensors")
  found = mlp_models.pretrained.describe(tmp_path / "bare.safetensors")
  assert found.assumed == ("num_iterations", "num_heads", "num_cross_heads")
  assert (found.fields["num_iterations"], found.fields["num_heads"]) == (8, 8)
  assert found.fields["num_cross_heads"] == 1


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [("use_query_residual", False, "residual"), ("hidden_act", "relu", "'relu', known are gelu")],
)
def test_what_is_not_supported_is_said(key, value, message, tmp_path):
  folder, config = golden_config()
  (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
  (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
  with pytest.raises(ValueError, match=message):
    mlp_models.load(tmp_path)


def test_batch_norm_is_folded_into_a_scale_and_a_bias():
  rng = np.random.default_rng(0)
  weight, bias, mean = rng.normal(size=(3, 8)).astype(np.float32)
  variance = rng.uniform(0.5, 2, 8).astype(np.float32)
  name = "perceiver.input_preprocessor.convnet.batchnorm."
  arrays = {
    f"{name}{key}": array
    for key, array in {
      "weight": weight,
      "bias": bias,
      "running_mean": mean,
      "running_var": variance,
    }.items()
  }
  table = {rule.theirs: rule for rule in layouts._conv() if rule.theirs in arrays}
  folded = rules.apply(table, arrays.__getitem__)
  x = rng.normal(size=(5, 8))
  np.testing.assert_allclose(
    x * folded["conv_embed/scale"] + folded["conv_embed/bias"],
    (x - mean) / np.sqrt(variance + 1e-5) * weight + bias,
    atol=1e-6,
  )


def test_a_loop_counts_as_often_as_it_runs():
  def flops(**fields):
    model = small(**fields)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return count_flops(model.apply, variables, images)

  two, three, six = (flops(num_iterations=n) for n in (2, 3, 6))
  assert six - two == 4 * (three - two) > 0
