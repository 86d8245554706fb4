"""Vision Transformer (arXiv:2010.11929, section 3.1).

As in the Keras example, and other than in the paper: no class token (the head reads all tokens,
flattened), gelu and dropout after every dense layer of an MLP, the last included, and heads whose
width is free of the model's.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mlp_models import layers
from mlp_models.attention import SelfAttention

POOLS = ("flatten", "mean")


class MLP(nn.Module):
  """Dense layers over the last axis, each followed by gelu and dropout."""

  units: Sequence[int]
  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array, seeds_B: Array | None) -> Array:
    for i, units in enumerate(self.units):
      x = layers.gelu(layers.Dense(units, dtype=self.dtype, name=f"dense{i}")(x))
      x = layers.Dropout(self.dropout_rate)(x, seeds_B)
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
  def __call__(self, x_BxTxD: Array, seeds_B: Array | None) -> Array:
    attention = SelfAttention(
      self.num_heads, self.head_dim, self.attention_dropout_rate, self.dtype, name="attention"
    )
    mlp = MLP(self.mlp_units, self.dropout_rate, self.dtype, name="mlp")

    y_BxTxD = layers.LayerNorm(dtype=self.dtype, name="norm1")(x_BxTxD)
    x_BxTxD = x_BxTxD + attention(y_BxTxD, seeds_B)
    y_BxTxD = layers.LayerNorm(dtype=self.dtype, name="norm2")(x_BxTxD)
    return x_BxTxD + mlp(y_BxTxD, seeds_B)


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

  def __post_init__(self):
    layers.check_patches(self.image_size, self.patch_size)
    layers.check_residual("mlp_units", self.mlp_units, self.width)
    if self.pool not in POOLS:
      raise ValueError(f"unknown pool {self.pool!r}, known are {', '.join(POOLS)}")
    super().__post_init__()

  @nn.compact
  def __call__(
    self, images_BxHxWxC: Array, train: bool = False, positions: Array | None = None
  ) -> Array:
    seeds_B = layers.example_seeds(self, len(images_BxHxWxC), positions) if train else None
    x_BxTxP = layers.patches(images_BxHxWxC, self.image_size, self.patch_size)
    x_BxTxD = layers.Dense(self.width, dtype=self.dtype, name="patch_embed")(x_BxTxP)
    x_BxTxD = layers.PositionEmbedding(layers.uniform_symmetric, name="position")(x_BxTxD)
    for i in range(self.num_blocks):
      block = layers.remat(ViTBlock, self.remat)(
        num_heads=self.num_heads,
        head_dim=self.head_dim,
        mlp_units=self.mlp_units,
        dropout_rate=self.dropout_rate,
        attention_dropout_rate=self.attention_dropout_rate,
        dtype=self.dtype,
        name=f"block{i}",
      )
      x_BxTxD = block(x_BxTxD, seeds_B)
    x_BxTxD = layers.LayerNorm(dtype=self.dtype, name="norm")(x_BxTxD)

    if self.pool == "mean":
      x_BxF = x_BxTxD.mean(axis=1, dtype=jnp.float32).astype(self.dtype)
    else:
      x_BxF = x_BxTxD.reshape(len(x_BxTxD), -1)
    x_BxF = layers.Dropout(self.head_dropout_rate)(x_BxF, seeds_B)
    x_BxF = MLP(self.head_units, self.head_dropout_rate, self.dtype, name="head_mlp")(
      x_BxF, seeds_B
    )
    return layers.Dense(self.num_classes, dtype=jnp.float32, name="head")(x_BxF)
