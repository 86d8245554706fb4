"""Attention and its gradients against the papers' formulas, in the form of every platform."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_models import dropout, kernels
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


def test_wide_heads_take_half_of_the_dense_layers_operations():
  def flops(head_dim, width):
    layer = SelfAttention(4, head_dim, 0.0, jnp.float32)
    x = jnp.zeros((64, 2, width))  # few tokens, so that the attention itself costs little
    weights = jax.eval_shape(layer.init, jax.random.key(0), x)
    return jax.jit(layer.apply).lower(weights, x).cost_analysis()["flops"]

  dense = 2 * 64 * 2 * 4 * 4 * 64 * 64  # tokens, heads and layers, 64 to 64 channels
  assert flops(64, 65) > dense
  merging = 2 * 2 * 4 * 64 * 64 * 64
  assert flops(64, 64) - merging < 0.6 * dense


def test_attention_kernels_start_as_in_keras():
  # Keras counts all axes but the last two as a receptive field: fans of [64, 4, 64] are 256, 4096.
  model = SelfAttention(4, 64, 0.1, jnp.float32)
  kernels = model.init(jax.random.key(0), jnp.zeros((1, 2, 64)))["params"]
  for name, limit in (("query", (6 / (256 + 4096)) ** 0.5), ("out", (6 / (256 + 256)) ** 0.5)):
    largest = np.abs(kernels[name]["kernel"]).max()
    assert 0.99 * limit < largest <= limit
  assert not np.any(kernels["query"]["bias"])
