"""Self-attention with several heads (arXiv:1706.03762, section 3.2).

Shapes: B batch, N heads, T S tokens, K head width, D width.
"""

import flax.linen as nn
import jax
from jax import Array
from jax.typing import DTypeLike

from mlp_models import dropout, kernels
from mlp_models.kernels import AttentionWeights


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

  Dropout is on the softmax, which is float32; all else is computed in `dtype`.
  """

  num_heads: int
  head_dim: int
  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    width, heads = x_BxTxD.shape[-1], (self.num_heads, self.head_dim)
    weights = AttentionWeights(
      query=HeadWeights((width, *heads), heads, name="query")(),
      key=HeadWeights((width, *heads), heads, name="key")(),
      value=HeadWeights((width, *heads), heads, name="value")(),
      out=HeadWeights((*heads, width), (width,), name="out")(),
    )
    seeds_B = dropout.layer_seeds(self)
    attend = _over_heads if self.head_dim < width else kernels.with_wide_heads(_over_heads)
    return attend(x_BxTxD.astype(self.dtype), weights, seeds_B, self.dropout_rate)


def _over_heads(
  x_BxTxD: Array, weights: AttentionWeights, seeds_B: Array | None, rate: float
) -> Array:
  weights = jax.tree.map(lambda array: array.astype(x_BxTxD.dtype), weights)
  query_BxNxTxK, key_BxNxTxK, value_BxNxTxK = (
    (kernels.dense(x_BxTxD, kernel_DxNxK) + bias_NxK).swapaxes(1, 2)
    for kernel_DxNxK, bias_NxK in (weights.query, weights.key, weights.value)
  )
  query_BxNxTxK = query_BxNxTxK * query_BxNxTxK.shape[-1] ** -0.5
  # Masks count tokens before heads, as the form for wide heads does: no platform has its own.
  axes = (2, 1, 3)
  # drop(softmax(query @ key^T)) @ value
  x_BxNxTxK = kernels.attend(query_BxNxTxK, key_BxNxTxK, value_BxNxTxK, seeds_B, rate, axes)
  kernel_NxKxD, bias_D = weights.out
  x_BxTxNK = x_BxNxTxK.swapaxes(1, 2).reshape(*x_BxTxD.shape[:2], -1)
  return kernels.dense(x_BxTxNK, kernel_NxKxD.reshape(-1, x_BxTxD.shape[-1])) + bias_D
