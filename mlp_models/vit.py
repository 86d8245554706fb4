"""Vision Transformer (arXiv:2010.11929, section 3.1).

As in the Keras example, and other than in the paper: no class token (the head reads all tokens,
flattened), gelu and dropout after every dense layer of an MLP, the last included, and heads whose
width is free of the model's.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mlp_models import dropout, layers
from mlp_models.attention import SelfAttention

POOLS = ("flatten", "mean")


class MLP(nn.Module):
  """Dense layers over the last axis, each followed by gelu and dropout."""

  units: Sequence[int]
  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array) -> Array:
    for i, units in enumerate(self.units):
      x = layers.gelu(layers.Dense(units, dtype=self.dtype, name=f"dense{i}")(x))
      x = dropout.Dropout(self.dropout_rate)(x)
    return x


class ViTBlock(nn.Module):
  """Self-attention, then an MLP, each on normalised input and around a residual."""

  num_heads: int
  head_dim: int
  mlp_units: Sequence[int]
  dropout_rate: float
  attention_dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    attention = SelfAttention(
      self.num_heads, self.head_dim, self.attention_dropout_rate, self.dtype, name="attention"
    )
    mlp = MLP(self.mlp_units, self.dropout_rate, self.dtype, name="mlp")

    y_BxTxD = layers.LayerNorm(dtype=self.dtype, name="norm1")(x_BxTxD)
    x_BxTxD = x_BxTxD + attention(y_BxTxD)
    y_BxTxD = layers.LayerNorm(dtype=self.dtype, name="norm2")(x_BxTxD)
    return x_BxTxD + mlp(y_BxTxD)


class ViT(nn.Module):
  """Vision Transformer: images [B, H, W, C] -> float32 logits [B, num_classes].

  `pool` says what the head reads: "flatten", all tokens, or "mean", their mean.
  """

  image_size: int = 72
  patch_size: int = 6
  width: int = 64
  num_blocks: int = 8
  num_heads: int = 4
  head_dim: int = 64
  mlp_units: Sequence[int] = (128, 64)
  head_units: Sequence[int] = (2048, 1024)
  pool: str = "flatten"
  num_classes: int = 100
  dropout_rate: float = 0.1
  attention_dropout_rate: float = 0.1
  head_dropout_rate: float = 0.5
  dtype: DTypeLike = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self, images_BxHxWxC: Array, train: bool = False, positions: Array | None = None
  ) -> Array:
    dropout.start(self, images_BxHxWxC.shape[0], positions, train)
    x_BxTxD = layers.embed_patches(
      images_BxHxWxC, self.image_size, self.patch_size, self.width, self.dtype
    )
    x_BxTxD = layers.PositionEmbedding(layers.uniform_symmetric, name="position")(x_BxTxD)
    block = layers.remat(ViTBlock, self.remat)
    sizes = (self.num_heads, self.head_dim, self.mlp_units)
    rates = (self.dropout_rate, self.attention_dropout_rate)
    for i in range(self.num_blocks):
      x_BxTxD = block(*sizes, *rates, self.dtype, name=f"block{i}")(x_BxTxD)
    x_BxTxD = layers.LayerNorm(dtype=self.dtype, name="norm")(x_BxTxD)

    x_BxF = _pool(x_BxTxD, self.pool).astype(self.dtype)
    x_BxF = dropout.Dropout(self.head_dropout_rate)(x_BxF)
    x_BxF = MLP(self.head_units, self.head_dropout_rate, self.dtype, name="head_mlp")(x_BxF)
    return layers.Dense(self.num_classes, dtype=jnp.float32, name="head")(x_BxF)


def _pool(x_BxTxD: Array, how: str) -> Array:
  """Tokens to one vector an image: "flatten" to [B, T*D], or their float32 "mean" [B, D]."""
  if how == "flatten":
    return x_BxTxD.reshape(x_BxTxD.shape[0], -1)
  return x_BxTxD.mean(axis=1, dtype=jnp.float32)


# By name: the fields that differ from the defaults.
VARIANTS: dict[str, dict[str, Any]] = {"keras": {}}
