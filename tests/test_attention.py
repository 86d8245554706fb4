"""Attention and its gradients against the papers' formulas, in the form of every platform."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_models import attention, dropout, kernels
from mlp_models.attention import SelfAttention


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_attention_and_its_gradients_are_those_of_the_written_out_softmax(rate):
  query, gradient = jax.random.normal(jax.random.key(0), (2, 2, 3, 5, 4))
  key, value = jax.random.normal(jax.random.key(1), (2, 2, 3, 6, 4))
  seeds = jnp.array([12345, 67890], jnp.uint32)

  def written_out(query, key, value):
    weights = jax.nn.softmax(jnp.einsum("bntk,bnsk->bnts", query, key))
    return jnp.einsum("bnts,bnsk->bntk", dropout.drop(weights, seeds, rate), value)

  def ours(query, key, value):
    return kernels.attend(query, key, value, seeds, rate)

  with jax.default_matmul_precision("highest"):
    expected, expected_gradients = jax.vjp(written_out, query, key, value)
    actual, actual_gradients = jax.vjp(ours, query, key, value)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    for a, b in zip(actual_gradients(gradient), expected_gradients(gradient), strict=True):
      assert np.abs(b).max() > 0.1
      np.testing.assert_allclose(a, b, atol=1e-5)
  kept = [x for x in jax.tree.leaves(actual_gradients) if x.shape == (2, 3, 5, 6)]
  assert len(kept) == 1
  larger = kernels.attend(1e4 * query, key, value, None, rate)
  assert np.isfinite(larger).all()
  evaluated = kernels.attend(query, key, value, None, rate)
  assert (rate == 0) == np.array_equal(evaluated, actual)


def outputs_and_gradients(attend, dtype, num_tokens, num_keys):
  query, gradient = jax.random.normal(jax.random.key(0), (2, 2, num_tokens, 3, 64), dtype)
  key, value = jax.random.normal(jax.random.key(1), (2, 2, num_keys, 3, 64), dtype)

  @jax.jit
  def run(gradient, *operands):
    out, pull_back = jax.vjp(attend, *operands)
    return out, *pull_back(gradient)

  compiled = run.lower(gradient, query, key, value).compile()
  arrays = [x.astype(jnp.float32) for x in compiled(gradient, query, key, value)]
  return arrays, compiled.as_text()


def plain(query, key, value):
  return kernels._attend_heads(query, key, value, seeds_B=None, rate=0.0)


@pytest.mark.parametrize(
  ("implementation", "dtype", "tolerance"),
  [
    ("xla", jnp.float32, 1e-5),
    pytest.param("cudnn", jnp.bfloat16, 2e-2, marks=pytest.mark.needs(what="cuda")),
  ],
)
def test_plain_and_fused_attention_agree_within_rounding(implementation, dtype, tolerance):
  with jax.default_matmul_precision("highest"):
    fused = functools.partial(kernels._attend_fused, implementation=implementation)
    # JAX's kernel takes no odd numbers in training; the last are those of attention pooling.
    for sizes in ((16, 18), (17, 17), (1, 17)):
      ours, _ = outputs_and_gradients(plain, dtype, *sizes)
      theirs, _ = outputs_and_gradients(fused, dtype, *sizes)
      for a, b in zip(ours, theirs, strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
  if implementation == "cudnn":
    chosen = functools.partial(kernels.attention, seeds_B=None, rate=0.1)
    actual, text = outputs_and_gradients(chosen, dtype, *sizes)
    assert "cudnn" in text
    for a, b in zip(actual, theirs, strict=True):
      np.testing.assert_array_equal(a, b)


def test_attention_takes_the_fused_kernel_where_there_is_one_and_nothing_is_dropped(monkeypatch):
  layer, weights, x, gradient = self_attention(4)
  rngs = dropout.stream(jnp.array([12345, 67890], jnp.uint32))
  half = x.astype(jnp.bfloat16)[..., None, :]
  assert not kernels._fits_cudnn(half)  # nor may it be traced: JAX would look for a GPU
  expected, pullback = jax.vjp(lambda *args: layer.apply(*args), weights, x)

  calls, fused = [], kernels._attend_fused

  def count(query, key, value):
    calls.append(query.shape)
    return fused(query, key, value, implementation="xla")

  def choose(*operands, default, cuda=None, cpu=None):
    return (cuda or cpu or default)(*operands)

  monkeypatch.setattr(kernels, "_fits_cudnn", lambda query: True)
  monkeypatch.setattr(kernels, "_attend_fused", count)
  monkeypatch.setattr(jax.lax, "platform_dependent", choose)
  actual, our_pullback = jax.vjp(lambda *args: layer.apply(*args), weights, x)
  assert calls == [(2, 5, 3, 4)]
  np.testing.assert_allclose(actual, expected, atol=1e-4)
  for a, b in zip(*map(jax.tree.leaves, (our_pullback(gradient), pullback(gradient))), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)
  layer.apply(weights, x, rngs=rngs)
  assert len(calls) == 1


def self_attention(head_dim):
  """A layer of three heads with rate 0.3, its weights, tokens of 8 channels and a gradient."""
  layer = SelfAttention(3, head_dim, 0.3, jnp.float32)
  x, gradient = jax.random.normal(jax.random.key(0), (2, 2, 5, 8))
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
  rng = np.random.default_rng(0)
  return layer, jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape), shapes), x, gradient


def head_by_head(layer, weights, x, seeds):
  """Self-attention as the papers write it, with the dropout masks of `layer`."""
  params = weights["params"]
  heads = {
    name: jnp.einsum("btd,dnk->bntk", x, params[name]["kernel"]) + params[name]["bias"][:, None]
    for name in ("query", "key", "value")
  }
  scores = jnp.einsum("bntk,bnsk->bnts", heads["query"], heads["key"])
  softmax = jax.nn.softmax(scores * layer.head_dim**-0.5)
  seeds = None if seeds is None else dropout.hash32(seeds ^ jnp.uint32(zlib.crc32(b"")))
  softmax = dropout.drop(softmax.swapaxes(1, 2), seeds, layer.dropout_rate).swapaxes(1, 2)
  attended = jnp.einsum("bnts,bnsk->bntk", softmax, heads["value"])
  return jnp.einsum("bntk,nkd->btd", attended, params["out"]["kernel"]) + params["out"]["bias"]


@pytest.mark.parametrize("platform", ["cpu", "others"])
@pytest.mark.parametrize("seeds", [None, [12345, 67890]], ids=["evaluation", "training"])
@pytest.mark.parametrize("head_dim", [4, 8, 12])
def test_self_attention_is_that_of_the_papers_whatever_the_width_of_heads(
  head_dim, seeds, platform, monkeypatch
):
  if platform == "others":  # use the form for accelerators on this CPU
    monkeypatch.setattr(
      jax.lax, "platform_dependent", lambda *operands, cpu, default: default(*operands)
    )
  layer, weights, x, gradient = self_attention(head_dim)
  seeds = None if seeds is None else jnp.array(seeds, jnp.uint32)
  rngs = None if seeds is None else dropout.stream(seeds)
  expected, pullback = jax.vjp(lambda *args: head_by_head(layer, *args, seeds), weights, x)
  actual, our_pullback = jax.vjp(lambda *args: layer.apply(*args, rngs=rngs), weights, x)
  np.testing.assert_allclose(actual, expected, atol=1e-4)
  for a, b in zip(*map(jax.tree.leaves, (our_pullback(gradient), pullback(gradient))), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("head_dim", [4, 12])
def test_attention_weights_are_returned_only_where_they_are_asked_for(head_dim, monkeypatch):
  layer, weights, x, _ = self_attention(head_dim)
  rngs = dropout.stream(jnp.array([12345, 67890], jnp.uint32))
  out, state = layer.apply(weights, x, rngs=rngs, mutable=["intermediates"])
  (softmax_BxNxTxS,) = state["intermediates"]["weights"]
  assert softmax_BxNxTxS.shape == (2, 3, 5, 5) and softmax_BxNxTxS.dtype == jnp.float32
  np.testing.assert_allclose(softmax_BxNxTxS.sum(-1), 1, atol=1e-5)  # before dropout
  monkeypatch.delattr(attention, "softmax")
  np.testing.assert_array_equal(out, layer.apply(weights, x, rngs=rngs))
  # Weights times values, and out of the heads, are what the layer returns in evaluation.
  value, out = (weights["params"][name] for name in ("value", "out"))
  value_BxSxNxK = jnp.einsum("btd,dnk->btnk", x, value["kernel"]) + value["bias"]
  heads_BxTxNxK = jnp.einsum("bnts,bsnk->btnk", softmax_BxNxTxS, value_BxSxNxK)
  expected = jnp.einsum("btnk,nkd->btd", heads_BxTxNxK, out["kernel"]) + out["bias"]
  np.testing.assert_allclose(layer.apply(weights, x), expected, atol=1e-4)


def test_attention_to_other_tokens_takes_keys_and_values_from_them():
  layer = SelfAttention(2, 8, 0.0, jnp.float32)  # with heads as wide as the queries
  x, data = jax.random.normal(jax.random.key(0), (2, 3, 8)), jnp.ones((2, 5, 6))
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x, data)
  rng = np.random.default_rng(0)
  weights = jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape).astype(np.float32), shapes)
  assert weights["params"]["key"]["kernel"].shape == (6, 2, 8)
  # All keys are alike, and so the attention returns the value of any.
  value, out = (weights["params"][name] for name in ("value", "out"))
  value_NxK = value["kernel"].sum(0) + value["bias"]
  expected = np.einsum("nk,nkd->d", value_NxK, out["kernel"]) + out["bias"]
  actual = layer.apply(weights, x, data)
  assert actual.shape == (2, 3, 8)
  np.testing.assert_allclose(actual, np.broadcast_to(expected, actual.shape), atol=1e-4)


def test_wide_heads_take_half_of_the_dense_layers_operations():
  def flops(head_dim, width):  # on a CPU: elsewhere there is no such form, and no count
    layer = SelfAttention(4, head_dim, 0.0, jnp.float32)
    x = jnp.zeros((64, 2, width))  # few tokens, so that the attention itself costs little
    weights = jax.eval_shape(layer.init, jax.random.key(0), x)
    with jax.default_device(jax.devices("cpu")[0]):
      return jax.jit(layer.apply).lower(weights, x).cost_analysis()["flops"]

  dense = 2 * 64 * 2 * 4 * 4 * 64 * 64  # tokens, heads and layers, 64 to 64 channels
  assert flops(64, 65) > dense
  merging = 2 * 2 * 4 * 64 * 64 * 64
  assert flops(64, 64) - merging < 0.6 * dense


@pytest.mark.parametrize(
  ("init", "fans"),
  [
    # Keras counts all axes but the last two as a receptive field: of [64, 4, 32] and [4, 32, 64].
    ("keras", {"query": (4 * 64, 32 * 64), "out": (4 * 32, 4 * 64)}),
    ("papers", {"query": (64, 4 * 32), "out": (4 * 32, 64)}),
  ],
)
def test_attention_kernels_start_as_in_keras_or_as_in_the_papers_code(init, fans):
  model = SelfAttention(4, 32, 0.1, jnp.float32, init)
  params = model.init(jax.random.key(0), jnp.zeros((1, 2, 64)))["params"]
  for name, (inputs, outputs) in fans.items():
    limit = (6 / (inputs + outputs)) ** 0.5
    assert 0.99 * limit < np.abs(params[name]["kernel"]).max() <= limit
  assert not np.any(params["query"]["bias"])
