"""Dot-product attention, and self-attention with several heads.

Shapes: B batch, N heads, T S tokens, K head width, D width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mlp_models import layers

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class DotProductAttention(nn.Module):
  """softmax(scale Q K^T) V with dropout on the softmax, of [B, N, T, K] and twice [B, N, S, K].

  All three are of one dtype, and so is the result, [B, N, T, K]; the softmax is float32. `seeds_B`
  are those of `layers.example_seeds`, or None in evaluation.
  """

  dropout_rate: float
  scale: float

  @nn.compact
  def __call__(
    self, query_BxNxTxK: Array, key_BxNxSxK: Array, value_BxNxSxK: Array, seeds_B: Array | None
  ) -> Array:
    seeds_B = layers.layer_seeds(self, seeds_B)
    query_BxNxTxK = query_BxNxTxK * self.scale
    return _attend(query_BxNxTxK, key_BxNxSxK, value_BxNxSxK, seeds_B, self.dropout_rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
  query_BxNxTxK: Array,
  key_BxNxSxK: Array,
  value_BxNxSxK: Array,
  seeds_B: Array | None,
  rate: float,
) -> Array:
  return _attend_forward(query_BxNxTxK, key_BxNxSxK, value_BxNxSxK, seeds_B, rate)[0]


# With a derivative of its own, which keeps one array of the size [B, N, T, S] and not three. The
# softmax's division is done on [B, N, T, K], after the product with the values; and the mean that
# its derivative takes off is the product of output and gradient (as in FlashAttention,
# arXiv:2205.14135, appendix B.2; dropout changes nothing in it). The gradients of ViT take 6 % less
# than with the softmax written out, Perceiver's 10 %. What goes into sums and exponents is float32.
def _attend_forward(query_BxNxTxK, key_BxNxSxK, value_BxNxSxK, seeds_B, rate):
  dtype = query_BxNxTxK.dtype
  scores_BxNxTxS = _product("bntk,bnsk->bnts", query_BxNxTxK, key_BxNxSxK)
  exps_BxNxTxS = jnp.exp(scores_BxNxTxS - scores_BxNxTxS.max(axis=-1, keepdims=True))
  sums_BxNxTx1 = exps_BxNxTxS.sum(axis=-1, keepdims=True)
  exps_BxNxTxS = exps_BxNxTxS.astype(dtype)
  kept_BxNxTxS = layers.drop(exps_BxNxTxS, seeds_B, rate)
  out_BxNxTxK = _product("bnts,bnsk->bntk", kept_BxNxTxS, value_BxNxSxK) / sums_BxNxTx1
  out_BxNxTxK = out_BxNxTxK.astype(dtype)
  inputs = query_BxNxTxK, key_BxNxSxK, value_BxNxSxK, seeds_B
  return out_BxNxTxK, (inputs, exps_BxNxTxS, sums_BxNxTx1, out_BxNxTxK)


def _attend_backward(rate, kept, grad_BxNxTxK):
  inputs, exps_BxNxTxS, sums_BxNxTx1, out_BxNxTxK = kept
  query_BxNxTxK, key_BxNxSxK, value_BxNxSxK, seeds_B = inputs
  dtype = query_BxNxTxK.dtype
  grad_BxNxTxK = grad_BxNxTxK / sums_BxNxTx1
  means_BxNxTx1 = (grad_BxNxTxK * out_BxNxTxK).sum(axis=-1, keepdims=True)
  grad_BxNxTxK = grad_BxNxTxK.astype(dtype)
  weights_BxNxTxS = _product("bntk,bnsk->bnts", grad_BxNxTxK, value_BxNxSxK)
  weights_BxNxTxS = layers.drop(weights_BxNxTxS, seeds_B, rate)
  scores_BxNxTxS = (exps_BxNxTxS * (weights_BxNxTxS - means_BxNxTx1)).astype(dtype)
  return (
    jnp.einsum("bnts,bnsk->bntk", scores_BxNxTxS, key_BxNxSxK),
    jnp.einsum("bnts,bntk->bnsk", scores_BxNxTxS, query_BxNxTxK),
    jnp.einsum("bnts,bntk->bnsk", layers.drop(exps_BxNxTxS, seeds_B, rate), grad_BxNxTxK),
    None,
  )


_attend.defvjp(_attend_forward, _attend_backward)


class IntoHeads(nn.Module):
  """A dense layer [B, T, D] -> [B, N, T, K]."""

  num_heads: int
  head_dim: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    # Not nn.Einsum, whose gradients take longer on a CPU (see `layers.rows_times`), and not
    # DenseGeneral, which shows its initializer a flattened kernel: Glorot's limits are then not
    # those of Keras, which counts all axes but the last two as a receptive field.
    shape = (x_BxTxD.shape[-1], self.num_heads, self.head_dim)
    kernel_DxNxK = self.param("kernel", nn.initializers.glorot_uniform(), shape)
    bias_NxK = self.param("bias", nn.initializers.zeros, shape[1:])
    x_BxTxD, kernel_DxNxK, bias_NxK = nn.dtypes.promote_dtype(
      x_BxTxD, kernel_DxNxK, bias_NxK, dtype=self.dtype
    )
    x_BxTxNK = layers.rows_times(x_BxTxD, kernel_DxNxK.reshape(shape[0], -1))
    x_BxTxNxK = x_BxTxNK.reshape(*x_BxTxNK.shape[:2], *shape[1:]) + bias_NxK
    return x_BxTxNxK.swapaxes(1, 2)


class FromHeads(nn.Module):
  """A dense layer [B, N, T, K] -> [B, T, D]."""

  width: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxNxTxK: Array) -> Array:
    shape = (x_BxNxTxK.shape[1], x_BxNxTxK.shape[3], self.width)
    kernel_NxKxD = self.param("kernel", nn.initializers.glorot_uniform(), shape)
    bias_D = self.param("bias", nn.initializers.zeros, shape[2:])
    x_BxNxTxK, kernel_NxKxD, bias_D = nn.dtypes.promote_dtype(
      x_BxNxTxK, kernel_NxKxD, bias_D, dtype=self.dtype
    )
    x_BxTxNxK = x_BxNxTxK.swapaxes(1, 2)
    x_BxTxNK = x_BxTxNxK.reshape(*x_BxTxNxK.shape[:2], -1)
    return layers.rows_times(x_BxTxNK, kernel_NxKxD.reshape(-1, self.width)) + bias_D


class SelfAttention(nn.Module):
  """Multi-head self-attention, [B, T, D] -> [B, T, D], with heads of any width."""

  num_heads: int
  head_dim: int
  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array, seeds_B: Array | None) -> Array:
    into_heads = functools.partial(IntoHeads, self.num_heads, self.head_dim, self.dtype)
    attend = DotProductAttention(self.dropout_rate, scale=self.head_dim**-0.5, name="attend")
    x_BxNxTxK = attend(
      into_heads(name="query")(x_BxTxD),
      into_heads(name="key")(x_BxTxD),
      into_heads(name="value")(x_BxTxD),
      seeds_B,
    )
    return FromHeads(x_BxTxD.shape[-1], self.dtype, name="out")(x_BxNxTxK)
