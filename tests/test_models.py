"""The models' behaviour, at toy sizes; tests/test_golden.py compares their numbers with Keras."""

import functools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlp_models
from mlp_models import dropout, kernels, layers
from mlp_models.attention import SelfAttention
from mlp_models.fnet import fourier_mix
from mlp_models.perceiver import CrossAttention

SMALL = {"image_size": 8, "patch_size": 4, "width": 16, "num_blocks": 2, "num_classes": 5}
OVERRIDES = {name: dict(SMALL) for name in mlp_models.MODELS}
OVERRIDES["perceiver"] |= {"num_latents": 3, "num_heads": 2, "ffn_units": (12, 16)}
OVERRIDES["vit"] |= {
  "num_heads": 2,
  "head_dim": 4,
  "mlp_units": (12, 16),
  "head_units": (24, 8),
}
every_model = pytest.mark.parametrize("name", mlp_models.MODELS)


def small(name, **overrides):
  return mlp_models.create(name, **OVERRIDES[name] | overrides)


@functools.cache
def images():
  with jax.ensure_compile_time_eval():  # else the cache keeps a tracer, if `jit` calls first
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


@functools.cache
def params(name, **overrides):
  """Random parameters, biases and scales included; compiling `init` would take seconds."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(small(name, **overrides).init, jax.random.key(0), images())["params"]
  return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


@functools.cache
def training_logits(name):
  """A jitted function of (images, key, positions)."""
  variables = {"params": params(name)}
  return jax.jit(
    lambda images, key, positions: small(name).apply(
      variables, images, train=True, positions=positions, rngs={"dropout": key}
    )
  )


@functools.cache
def evaluation_logits(name):
  return jax.jit(small(name).apply)({"params": params(name)}, images())


@every_model
def test_dropout_is_active_in_training_and_follows_the_key(name):
  evaluation = evaluation_logits(name)
  logits = functools.partial(training_logits(name), images(), positions=jnp.arange(4))
  first, again, other = (logits(key=jax.random.key(k)) for k in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert not np.any(np.isclose(first, other).all(axis=1))
  assert not np.any(np.isclose(first, evaluation).all(axis=1))


@every_model
def test_evaluation_is_the_default_and_needs_no_key(name):
  model, variables = small(name), {"params": params(name)}
  logits = evaluation_logits(name)
  assert logits.shape == (4, 5) and logits.dtype == jnp.float32
  with pytest.raises(flax.errors.InvalidRngError):
    jax.eval_shape(functools.partial(model.apply, train=True), variables, images())


@every_model
def test_training_does_not_depend_on_how_the_batch_is_cut(name):
  logits, key = training_logits(name), jax.random.key(0)
  whole = logits(images(), key, jnp.arange(4))
  for positions in (jnp.array([0, 1]), jnp.array([2, 3])):
    part = logits(images()[positions], key, positions)
    np.testing.assert_allclose(part, whole[positions], atol=1e-5)


def dropout_calls(name):
  """(rate, shape without the batch) of each dropout, in order of use."""
  calls = []

  def spy(next_function, args, kwargs, context):
    module = context.module
    if isinstance(module, dropout.Dropout):
      calls.append((module.rate, args[0].shape[1:]))
    elif isinstance(module, SelfAttention):
      tokens = args[0].shape[1]
      calls.append((module.dropout_rate, (module.num_heads, tokens, tokens)))
    elif isinstance(module, CrossAttention) and context.method_name == "__call__":
      latents, keys = args[0].shape[1], args[1].shape[1]
      calls.append((module.attention_dropout_rate, (1, latents, keys)))
    return next_function(*args, **kwargs)

  with flax.linen.intercept_methods(spy):
    jax.eval_shape(
      lambda key: small(name).init({"params": key, "dropout": key}, images(), train=True),
      jax.random.key(0),
    )
  return calls


def test_dropout_shapes_and_rates_are_those_of_the_keras_examples():
  T, D, L = 4, 16, 3
  # Mixer: after each MLP's last layer. FNet, gMLP: after the hidden layer. All: before the head.
  assert dropout_calls("mixer") == [(0.2, (T, D))] * 4 + [(0.2, (D,))]
  assert dropout_calls("fnet") == [(0.2, (T, D))] * 2 + [(0.2, (D,))]
  assert dropout_calls("gmlp") == [(0.2, (T, 2 * D))] * 2 + [(0.2, (D,))]
  # Perceiver: on the attention's weights, after each FFN's last layer, and on the logits.
  cross, latent = [(0.1, (1, L, T)), (0.2, (L, D))], [(0.1, (2, L, L)), (0.2, (L, D))]
  iteration = cross + 2 * latent
  assert dropout_calls("perceiver") == 2 * iteration + [(0.2, (5,))]
  # ViT: on the attention's weights, after every layer of an MLP, and before the head's MLP.
  block = [(0.1, (2, T, T)), (0.1, (T, 12)), (0.1, (T, D))]
  head = [(0.5, (T * D,)), (0.5, (24,)), (0.5, (8,))]
  assert dropout_calls("vit") == 2 * block + head


@pytest.mark.parametrize(("num_tokens", "width"), [(4, 6), (5, 7), (1, 1)])
def test_fourier_mix_and_its_gradient_are_those_of_the_transform(num_tokens, width):
  x, gradient = jax.random.normal(jax.random.key(0), (2, 3, num_tokens, width))
  expected, expected_gradient = jax.vjp(lambda x: jnp.fft.fft2(x).real, x)
  actual, actual_gradient = jax.vjp(fourier_mix, x)
  np.testing.assert_allclose(actual, expected, atol=1e-5)
  np.testing.assert_allclose(*actual_gradient(gradient), *expected_gradient(gradient), atol=1e-5)


def test_perceiver_iterations_have_masks_of_their_own(monkeypatch):
  def seeds_of_cross_attention(key):
    seeds, layer_seeds = [], dropout.layer_seeds

    def spy(layer):
      seeds_B = layer_seeds(layer)
      seeds.extend([seeds_B] if layer.path == ("cross",) else [])
      return seeds_B

    monkeypatch.setattr(dropout, "layer_seeds", spy)
    variables = {"params": params("perceiver")}
    small("perceiver").apply(variables, images(), train=True, rngs={"dropout": key})
    return seeds

  first, second = jax.jit(seeds_of_cross_attention)(jax.random.key(0))
  assert not np.any(first == second)


def test_perceiver_computes_keys_and_values_of_the_data_once():
  calls = []

  def spy(next_function, args, kwargs, context):
    calls.append("/".join(context.module.path))
    return next_function(*args, **kwargs)

  model = small("perceiver", num_iterations=3)
  with flax.linen.intercept_methods(spy):
    jax.eval_shape(model.apply, {"params": params("perceiver")}, images())
  assert [calls.count(f"cross/{layer}") for layer in ("query", "key", "value")] == [3, 1, 1]


def test_perceiver_shares_weights_between_iterations():
  model = small("perceiver", num_iterations=1)
  once = jax.eval_shape(model.init, jax.random.key(0), images())["params"]
  assert jax.tree.map(jnp.shape, once) == jax.tree.map(jnp.shape, params("perceiver"))


def test_vit_with_mean_pooling_does_not_depend_on_the_number_of_tokens():
  mean, flat = params("vit", pool="mean"), params("vit")
  assert mean["head_mlp"]["dense0"]["kernel"].shape == (16, 24)
  assert flat["head_mlp"]["dense0"]["kernel"].shape == (4 * 16, 24)
  logits = jax.eval_shape(small("vit", pool="mean").apply, {"params": mean}, images())
  assert logits.shape == (4, 5)


@every_model
def test_bfloat16_computes_in_half_and_keeps_params_and_logits_in_full(name):
  model = small(name, dtype="bfloat16")
  assert model.dtype == mlp_models.create(name, dtype=jnp.bfloat16).dtype == jnp.bfloat16
  variables = {"params": params(name)}
  shapes = jax.eval_shape(model.init, jax.random.key(0), images())
  assert {p.dtype for p in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  half = jax.jit(model.apply)(variables, images())
  full = evaluation_logits(name)
  assert half.dtype == jnp.float32
  assert 0 < np.abs(half - full).max() < 0.1 * np.abs(full).max()


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(n, marks=[pytest.mark.slow] * (n in ("perceiver", "vit")))
    for n in mlp_models.MODELS
  ],
)
def test_bfloat16_gradients_are_those_of_float32_nearly(name):
  def gradients(dtype):
    def loss(params, key):
      rngs = {"dropout": key}
      logits = small(name, dtype=dtype).apply({"params": params}, images(), True, rngs=rngs)
      return (logits**2).sum()

    return jax.jit(jax.grad(loss))(params(name), jax.random.key(3))

  full, half = (jax.tree.leaves(gradients(dtype)) for dtype in ("float32", "bfloat16"))
  assert {x.dtype for x in half} == {jnp.dtype("float32")}
  size = sum(np.sum(np.square(x)) for x in full) ** 0.5
  error = sum(np.sum(np.square(x - y)) for x, y in zip(full, half, strict=True)) ** 0.5
  assert 1e-4 < error / size < 0.05


def test_tokens_are_mixed_alike_on_every_platform():
  kernel, x = jnp.arange(6.0).reshape(3, 2), jax.random.normal(jax.random.key(0), (4, 3, 5))
  np.testing.assert_allclose(kernels._mix_each(kernel, x), kernels._mix_all(kernel, x), atol=1e-5)


def test_standardize_and_its_gradient_are_those_of_the_formula():
  x, gradient = jax.random.normal(jax.random.key(0), (2, 3, 4, 16))
  x = (5 * x + 20).at[0, 0].set(7.0)  # deviations that are small beside the mean, and zero

  def formula(x):
    deviation = x - x.mean(axis=-1, keepdims=True)
    return deviation / jnp.sqrt((deviation**2).mean(axis=-1, keepdims=True) + 1e-6)

  expected, expected_gradient = jax.vjp(formula, x)
  actual, actual_gradient = jax.vjp(kernels.standardize, x)
  np.testing.assert_allclose(actual, expected, atol=1e-3)
  # Equal elements are multiplied by 1,000: 1 / sqrt(1e-6).
  for place, tolerance in ((np.s_[0, 0], 1.0), (np.s_[1:], 1e-4)):
    a, b = actual_gradient(gradient)[0][place], expected_gradient(gradient)[0][place]
    np.testing.assert_allclose(a, b, atol=tolerance)


def test_parameters_start_as_in_keras():
  @jax.jit  # drops computations whose result is not returned
  def start(key):
    params = {
      name: small(name).init(key, images())["params"] for name in ("perceiver", "gmlp", "mixer")
    }
    return (
      params["perceiver"]["latents"],
      params["perceiver"]["position"]["embedding"],
      params["perceiver"]["cross"]["score"]["scale"],
      params["gmlp"]["block0"]["spatial"]["bias"],
      params["mixer"]["patch_embed"]["kernel"],
    )

  latents, position, scale, spatial_bias, kernel = start(jax.random.key(0))
  np.testing.assert_allclose(np.std(latents), 0.05, rtol=0.4)
  assert 0.04 < np.abs(position).max() <= 0.05
  assert scale == 1
  np.testing.assert_array_equal(spatial_bias, 1)
  limit = (6 / sum(kernel.shape)) ** 0.5
  assert 0.98 * limit < np.abs(kernel).max() <= limit


def test_patches_run_by_row_then_column_then_channel():
  image = jnp.arange(4 * 4 * 3, dtype=jnp.float32).reshape(1, 4, 4, 3)
  tokens = layers.patches(image, image_size=4, patch_size=2)
  assert tokens.shape == (1, 4, 12)
  np.testing.assert_array_equal(tokens[0, 1], image[0, :2, 2:].ravel())
  np.testing.assert_array_equal(tokens[0, 2], image[0, 2:, :2].ravel())


@pytest.mark.parametrize(
  "name, overrides, message",
  [
    ("mixr", {}, "unknown model 'mixr'.*'mixer'"),
    ("lstm", {}, "unknown model 'lstm'.*mixer, fnet, gmlp, perceiver, vit"),
    ("mixer", {"num_blcks": 2}, "'num_blcks'.*'num_blocks'"),
    ("mixer", {"num_heads": 2}, "mixer has no field 'num_heads'"),
    ("mixer", {"patch_size": 7}, "image_size 64 .*patch_size 7"),
    ("fnet", {"image_size": 60}, "image_size 60 .*patch_size 8"),
    ("vit", {"mlp_units": (128, 32)}, "128, 32.*width 64"),
    ("vit", {"width": 128}, "128, 64.*width 128"),
    ("perceiver", {"width": 64}, "256, 256.*width 64"),
    ("perceiver", {"ffn_units": ()}, r"ffn_units \(\).*width 256"),
    ("vit", {"pool": "max"}, "'max'.*flatten, mean"),
    ("mixer", {"dropout_rate": 1.0}, "dropout_rate is 1.0"),
    ("mixer", {"num_blocks": 0}, "num_blocks is 0"),
    ("vit", {"head_units": (0,)}, "head_units"),
    ("mixer", {"dtype": "float16"}, "float16.*bfloat16"),
    ("mixer", {"dtype": "flaot32"}, "flaot32"),
  ],
)
def test_what_does_not_fit_is_one_line_that_names_it(name, overrides, message):
  with pytest.raises(ValueError, match=message) as error:
    mlp_models.create(name, **overrides)
  assert "\n" not in str(error.value)


@every_model
def test_images_of_another_size_are_an_error_that_names_both(name):
  model = small(name)
  for shape in ((4, 12, 12, 3), (4, 8, 12, 3), (8, 8, 3)):
    with pytest.raises(ValueError, match=rf"\({', '.join(map(str, shape))}\).*8, 8, C"):
      jax.eval_shape(model.apply, {"params": params(name)}, jnp.zeros(shape))
  with pytest.raises(ValueError, match="uint8.*float"):
    jax.eval_shape(model.apply, {"params": params(name)}, jnp.zeros((4, 8, 8, 3), jnp.uint8))


@pytest.mark.parametrize(("rows", "product"), [(3, "f32[8,3]"), (40, "f32[40,8]")])
def test_gradient_of_few_rows_leaves_the_kernel_as_it_lies(rows, product):
  rng = np.random.default_rng(0)
  x, kernel, gradient = (
    rng.normal(size=shape).astype(np.float32) for shape in ((rows, 8), (8, 24), (rows, 24))
  )
  gradients = jax.jit(lambda *args: jax.vjp(kernels.dense, *args)[1](gradient))

  for_x, for_kernel = gradients(x, kernel)

  np.testing.assert_allclose(for_x, gradient @ kernel.T, atol=1e-5)
  np.testing.assert_allclose(for_kernel, x.T @ gradient, atol=1e-5)
  hlo = gradients.lower(x, kernel).compile().as_text()
  assert re.search(rf"{re.escape(product)}\S* dot\(", hlo)
