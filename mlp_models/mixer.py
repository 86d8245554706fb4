"""MLP-Mixer (arXiv:2105.01601, section 2).

As in the Keras example, and other than in the paper: one LayerNorm a block serves both MLPs, both
have as many hidden units as there are tokens, and no norm precedes the mean over the tokens.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mlp_models import layers


class MLP(nn.Module):
  """Two dense layers over tokens or channels, with dropout at the end: [B, T, D] -> [B, T, D]."""

  dense: Callable[..., nn.Module]  # layers.TokenDense or layers.Dense
  units: tuple[int, int]  # of the hidden layer, and of the output
  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array, seeds_B: Array | None) -> Array:
    hidden, out = self.units
    h = layers.gelu(self.dense(hidden, dtype=self.dtype, name="in")(x_BxTxD))
    y_BxTxD = self.dense(out, dtype=self.dtype, name="out")(h)
    return layers.Dropout(self.dropout_rate)(y_BxTxD, seeds_B)


class MixerBlock(nn.Module):
  """Mixes tokens, then channels."""

  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array, seeds_B: Array | None) -> Array:
    num_tokens, width = x_BxTxD.shape[1:]
    norm = layers.LayerNorm(dtype=self.dtype, name="norm")
    mlp = functools.partial(MLP, dropout_rate=self.dropout_rate, dtype=self.dtype)
    token_mlp = mlp(layers.TokenDense, (num_tokens, num_tokens), name="token_mlp")
    channel_mlp = mlp(layers.Dense, (num_tokens, width), name="channel_mlp")

    x_BxTxD += token_mlp(norm(x_BxTxD), seeds_B)
    return x_BxTxD + channel_mlp(norm(x_BxTxD), seeds_B)


class Mixer(nn.Module):
  """MLP-Mixer: images [B, H, W, C] -> float32 logits [B, num_classes]."""

  image_size: int = 64
  patch_size: int = 8
  width: int = 256
  num_blocks: int = 4
  num_classes: int = 100
  dropout_rate: float = 0.2
  dtype: DTypeLike = jnp.float32
  remat: bool = False

  def __post_init__(self):
    layers.check_patches(self.image_size, self.patch_size)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, images_BxHxWxC: Array, train: bool = False, positions: Array | None = None
  ) -> Array:
    seeds_B = layers.example_seeds(self, len(images_BxHxWxC), positions) if train else None
    x_BxTxP = layers.patches(images_BxHxWxC, self.image_size, self.patch_size)
    x_BxTxD = layers.Dense(self.width, dtype=self.dtype, name="patch_embed")(x_BxTxP)
    block = layers.remat(MixerBlock, self.remat)
    for i in range(self.num_blocks):
      x_BxTxD = block(self.dropout_rate, self.dtype, name=f"block{i}")(x_BxTxD, seeds_B)
    x_BxD = x_BxTxD.mean(axis=1, dtype=jnp.float32)
    x_BxD = layers.Dropout(self.dropout_rate)(x_BxD, seeds_B)
    return layers.Dense(self.num_classes, dtype=jnp.float32, name="head")(x_BxD)
