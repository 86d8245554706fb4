"""MLP-Mixer (arXiv:2105.01601, section 2).

As in the Keras example, and other than in the paper: one LayerNorm a block serves both MLPs, both
have as many hidden units as there are tokens, and no norm precedes the mean over the tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mlp_models import dropout, layers


class MLP(nn.Module):
  """Two dense layers over tokens or channels, with dropout at the end: [B, T, D] -> [B, T, D]."""

  dense: Callable[..., nn.Module]  # layers.TokenDense or layers.Dense
  units: tuple[int, int]  # of the hidden layer, and of the output
  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    hidden, out = self.units
    h = layers.gelu(self.dense(hidden, dtype=self.dtype, name="in")(x_BxTxD))
    y_BxTxD = self.dense(out, dtype=self.dtype, name="out")(h)
    return dropout.Dropout(self.dropout_rate)(y_BxTxD)


class MixerBlock(nn.Module):
  """Mixes tokens, then channels."""

  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    num_tokens, width = x_BxTxD.shape[1:]
    norm = layers.LayerNorm(dtype=self.dtype, name="norm")
    mlp = functools.partial(MLP, dropout_rate=self.dropout_rate, dtype=self.dtype)
    token_mlp = mlp(layers.TokenDense, (num_tokens, num_tokens), name="token_mlp")
    channel_mlp = mlp(layers.Dense, (num_tokens, width), name="channel_mlp")

    x_BxTxD = x_BxTxD + token_mlp(norm(x_BxTxD))
    return x_BxTxD + channel_mlp(norm(x_BxTxD))


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

  @nn.compact
  def __call__(
    self, images_BxHxWxC: Array, train: bool = False, positions: Array | None = None
  ) -> Array:
    dropout.start(self, images_BxHxWxC.shape[0], positions, train)
    x_BxTxD = layers.embed_patches(
      images_BxHxWxC, self.image_size, self.patch_size, self.width, self.dtype
    )
    block = layers.remat(MixerBlock, self.remat)
    for i in range(self.num_blocks):
      x_BxTxD = block(self.dropout_rate, self.dtype, name=f"block{i}")(x_BxTxD)
    return layers.mean_head(x_BxTxD, self.num_classes, self.dropout_rate)


# By name: the fields that differ from the defaults.
VARIANTS: dict[str, dict[str, Any]] = {"keras": {}}
