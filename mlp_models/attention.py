"""Dot-product attention, and self-attention with several heads.

Shapes: B batch, N heads, T S tokens, K head width, D width, E = D + 1.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mlp_models import layers

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
# Accelerators round what they multiply to bfloat16 or TF32, unless told otherwise.
_exact_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class DotProductAttention(nn.Module):
  """softmax(scale Q K^T) V with dropout on the softmax.

  Queries are [B, N, T, K], keys [B, N, S, K]; values [B, N, S, any] give the result its width. All
  are of one dtype, the result too; the softmax is float32. `seeds_B` are those of
  `layers.example_seeds`, or None in evaluation.
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
  # As a product with ones, because XLA on a CPU is slow at a sum: ViT's blocks take 8 % longer.
  ones_Kx1 = jnp.ones((grad_BxNxTxK.shape[-1], 1), jnp.float32)
  means_BxNxTx1 = _exact_product("bntk,kl->bntl", grad_BxNxTxK * out_BxNxTxK, ones_Kx1)
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


class HeadWeights(nn.Module):
  """Kernel and bias of a dense layer into heads, [D, N, K], or out of them, [N, K, D]; float32."""

  kernel_shape: tuple[int, int, int]
  bias_shape: tuple[int, ...]

  @nn.compact
  def __call__(self) -> tuple[Array, Array]:
    # Not DenseGeneral, which shows its initializer a flattened kernel: Glorot's limits are then not
    # those of Keras, which counts all axes but the last two as a receptive field.
    kernel = self.param("kernel", nn.initializers.glorot_uniform(), self.kernel_shape)
    return kernel, self.param("bias", nn.initializers.zeros, self.bias_shape)


class SelfAttention(nn.Module):
  """Multi-head self-attention, [B, T, D] -> [B, T, D], with heads of any width.

  Where a head is at least as wide as the model, what is the same in fewer operations: the kernels
  are multiplied with each other before they meet the tokens, (x Q)(x K)^T = (x QK^T) x^T. The keys
  and values of every head are then the tokens.
  """

  num_heads: int
  head_dim: int
  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array, seeds_B: Array | None) -> Array:
    width, heads = x_BxTxD.shape[-1], (self.num_heads, self.head_dim)
    query, key, value = (
      HeadWeights((width, *heads), heads, name=name)() for name in ("query", "key", "value")
    )
    out = HeadWeights((*heads, width), (width,), name="out")()
    attend = DotProductAttention(self.dropout_rate, scale=self.head_dim**-0.5, name="attend")
    attend = functools.partial(attend, seeds_B=seeds_B)
    # Worth a second way: on a CPU, ViT's step takes 15 % less time, Perceiver's 17 %.
    attention = _over_tokens if self.head_dim >= width else _over_heads
    return attention(x_BxTxD.astype(self.dtype), query, key, value, out, attend)


def _over_heads(x_BxTxD, query, key, value, out, attend):
  """Each head has keys and values of its own, as the papers have it."""
  query, key, value, out = jax.tree.map(
    lambda weights: weights.astype(x_BxTxD.dtype), (query, key, value, out)
  )

  def into_heads(kernel_DxNxK, bias_NxK):
    x_BxTxNK = layers.rows_times(x_BxTxD, kernel_DxNxK.reshape(len(kernel_DxNxK), -1))
    x_BxTxNxK = x_BxTxNK.reshape(*x_BxTxNK.shape[:2], *bias_NxK.shape) + bias_NxK
    return x_BxTxNxK.swapaxes(1, 2)

  x_BxNxTxK = attend(into_heads(*query), into_heads(*key), into_heads(*value))
  x_BxTxNK = x_BxNxTxK.swapaxes(1, 2).reshape(*x_BxTxD.shape[:2], -1)
  kernel_NxKxD, bias_D = out
  return layers.rows_times(x_BxTxNK, kernel_NxKxD.reshape(x_BxTxNK.shape[-1], -1)) + bias_D


def _over_tokens(x_BxTxD, query, key, value, out, attend):
  """All heads have the tokens as keys and values: their queries are rows of one attention."""
  B, T, D = x_BxTxD.shape
  # With a one after a token's channels, a bias is a kernel's last row. The keys' is left out: it
  # adds the same to all scores of a query, which softmax does not notice.
  x_BxTxE = jnp.pad(x_BxTxD, ((0, 0), (0, 0), (0, 1)), constant_values=1)
  query_ExNxK, value_ExNxK = (
    jnp.concatenate([kernel, bias[None]]) for kernel, bias in (query, value)
  )
  key_DxNxK, (out_NxKxD, bias_D) = key[0], out
  into_ExNxD = _exact_product("enk,dnk->end", query_ExNxK, key_DxNxK).astype(x_BxTxD.dtype)
  from_NxExD = _exact_product("enk,nkd->ned", value_ExNxK, out_NxKxD).astype(x_BxTxD.dtype)

  query_BxTxND = layers.rows_times(x_BxTxE, into_ExNxD.reshape(D + 1, -1))
  x_Bx1xTNxE = attend(query_BxTxND.reshape(B, 1, -1, D), x_BxTxD[:, None], x_BxTxE[:, None])
  x_BxTxNE = x_Bx1xTNxE.reshape(B, T, -1)
  return layers.rows_times(x_BxTxNE, from_NxExD.reshape(-1, D)) + bias_D.astype(x_BxTxD.dtype)
