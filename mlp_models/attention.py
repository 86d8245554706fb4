"""Attention with several heads (arXiv:1706.03762, section 3.2).

Shapes: B batch, N heads, T S tokens, K head width, D E widths.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mlp_models import dropout, kernels, layers
from mlp_models.kernels import AttentionWeights

INITS = ("keras", "papers")


class HeadWeights(nn.Module):
  """Kernel and bias of a dense layer into heads, [D, N, K], or out of them, [N, K, D]; float32."""

  kernel_shape: tuple[int, ...]
  bias_shape: tuple[int, ...]
  kernel_init: str
  has_bias: bool = True  # else it is zeros, and no parameter

  @nn.compact
  def __call__(self) -> tuple[Array, Array]:
    # Keras counts all axes but the last two as a receptive field, and so starts with less.
    init = nn.initializers.glorot_uniform()
    if self.kernel_init == "papers":
      is_into = self.kernel_shape[1:] == self.bias_shape
      axes = (0, (1, 2)) if is_into else ((0, 1), 2)
      init = nn.initializers.glorot_uniform(*axes)
    kernel = self.param("kernel", init, self.kernel_shape)
    zeros, shape = nn.initializers.zeros, self.bias_shape
    return kernel, self.param("bias", zeros, shape) if self.has_bias else jnp.zeros(shape)


class SelfAttention(nn.Module):
  """Multi-head self-attention, [B, T, D] -> [B, T, D], with heads of any width.

  With `data` [B, S, E], their tokens are the keys and values. Dropout is on the softmax, which is
  float32; all else is computed in `dtype`. `kernel_init` is one of INITS: Glorot's as Keras counts
  inputs and outputs, or as the papers' code does. `qkv_bias`: queries, keys and values have biases.
  Intermediates: "weights", the softmax before dropout, float32 [B, N, T, S].
  """

  num_heads: int
  head_dim: int
  dropout_rate: float
  dtype: DTypeLike
  kernel_init: str = "keras"
  qkv_bias: bool = True

  @nn.compact
  def __call__(self, x_BxTxD: Array, data_BxSxE: Array | None = None) -> Array:
    is_wide = data_BxSxE is None and self.head_dim >= x_BxTxD.shape[-1]
    x_BxTxD = x_BxTxD.astype(self.dtype)
    data_BxSxE = x_BxTxD if data_BxSxE is None else data_BxSxE.astype(self.dtype)
    heads, init = (self.num_heads, self.head_dim), self.kernel_init
    into, data_into = ((tokens.shape[-1], *heads) for tokens in (x_BxTxD, data_BxSxE))
    weights = AttentionWeights(
      query=HeadWeights(into, heads, init, self.qkv_bias, name="query")(),
      key=HeadWeights(data_into, heads, init, self.qkv_bias, name="key")(),
      value=HeadWeights(data_into, heads, init, self.qkv_bias, name="value")(),
      out=HeadWeights((*heads, into[0]), into[:1], init, name="out")(),
    )
    if self.is_mutable_collection("intermediates"):
      into_heads = _into_heads(x_BxTxD, *weights.query), _into_heads(data_BxSxE, *weights.key)
      layers.record(self, "weights", softmax(*into_heads))
    seeds_B = dropout.layer_seeds(self)
    if is_wide:
      attend = kernels.with_wide_heads(lambda x, *rest: _over_heads(x, x, *rest))
      return attend(x_BxTxD, weights, seeds_B, self.dropout_rate)
    return _over_heads(x_BxTxD, data_BxSxE, weights, seeds_B, self.dropout_rate)


def _over_heads(
  x_BxTxD: Array,
  data_BxSxE: Array,
  weights: AttentionWeights,
  seeds_B: Array | None,
  rate: float,
) -> Array:
  query_BxTxNxK = _into_heads(x_BxTxD, *weights.query)
  key_BxSxNxK = _into_heads(data_BxSxE, *weights.key)
  value_BxSxNxK = _into_heads(data_BxSxE, *weights.value)
  # drop(softmax(query @ key^T / sqrt(K))) @ value
  x_BxTxNxK = kernels.attention(query_BxTxNxK, key_BxSxNxK, value_BxSxNxK, seeds_B, rate)
  kernel_NxKxD, bias_D = (array.astype(x_BxTxD.dtype) for array in weights.out)
  x_BxTxNK = x_BxTxNxK.reshape(*x_BxTxD.shape[:2], -1)
  return kernels.dense(x_BxTxNK, kernel_NxKxD.reshape(-1, x_BxTxD.shape[-1])) + bias_D


def _into_heads(x_BxTxD: Array, kernel_DxNxK: Array, bias_NxK: Array) -> Array:
  dtype = x_BxTxD.dtype
  return kernels.dense(x_BxTxD, kernel_DxNxK.astype(dtype)) + bias_NxK.astype(dtype)


def softmax(query_BxTxNxK: Array, key_BxSxNxK: Array) -> Array:
  """softmax(query @ key^T / sqrt(K)) in each head, float32 [B, N, T, S]."""
  query_BxTxNxK = query_BxTxNxK.astype(jnp.float32) * query_BxTxNxK.shape[-1] ** -0.5
  scores_BxNxTxS = jnp.einsum("btnk,bsnk->bnts", query_BxTxNxK, key_BxSxNxK.astype(jnp.float32))
  return jax.nn.softmax(scores_BxNxTxS)
