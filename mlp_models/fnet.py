"""FNet (arXiv:2105.03824, section 3).

As in the Keras example, and other than in the paper: the hidden layer is no wider than the model,
dropout follows the hidden layer, and the head reads the mean of the tokens.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mlp_models import dropout, kernels, layers


def fourier_mix(x_BxTxD: Array) -> Array:
  """The real part of the discrete Fourier transform over tokens and channels, unnormalised."""
  return kernels.real_fft2(x_BxTxD)


class FNetBlock(nn.Module):
  """Mixes tokens by a Fourier transform, then channels by two dense layers; post-norm."""

  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    x_BxTxD = layers.LayerNorm(dtype=self.dtype, name="norm1")(x_BxTxD + fourier_mix(x_BxTxD))
    ffn_BxTxD = FFN(self.dropout_rate, self.dtype, name="ffn")(x_BxTxD)
    return layers.LayerNorm(dtype=self.dtype, name="norm2")(x_BxTxD + ffn_BxTxD)


class FFN(nn.Module):
  """Two dense layers of the model's width, with dropout between them."""

  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    width = x_BxTxD.shape[-1]
    h_BxTxD = layers.gelu(layers.Dense(width, dtype=self.dtype, name="in")(x_BxTxD))
    h_BxTxD = dropout.Dropout(self.dropout_rate)(h_BxTxD)
    return layers.Dense(width, dtype=self.dtype, name="out")(h_BxTxD)


class FNet(nn.Module):
  """FNet: images [B, H, W, C] -> float32 logits [B, num_classes]."""

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
    x_BxTxD = layers.PositionEmbedding(nn.initializers.glorot_uniform(), name="position")(x_BxTxD)
    block = layers.remat(FNetBlock, self.remat)
    for i in range(self.num_blocks):
      x_BxTxD = block(self.dropout_rate, self.dtype, name=f"block{i}")(x_BxTxD)
    return layers.mean_head(x_BxTxD, self.num_classes, self.dropout_rate)


# By name: the fields that differ from the defaults.
VARIANTS: dict[str, dict[str, Any]] = {"keras": {}}
