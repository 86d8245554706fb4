"""FNet (arXiv:2105.03824, section 3).

As in the Keras example, and other than in the paper: the hidden layer is no wider than the model,
dropout follows the hidden layer, and the head reads the mean of the tokens.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mlp_models import layers


@jax.custom_vjp
def fourier_mix(x_BxTxD: Array) -> Array:
  """The real part of the discrete Fourier transform over tokens and channels, unnormalised.

  Computed in float32: there is no transform in bfloat16.
  """
  # Forward and backward of 8 images (64 x 256) take 0.9 ms this way, 1.7 ms by the FFT of complex
  # numbers and its derivative, and 1.0 ms as products with cosines and sines where all symmetries
  # are used (one CPU core).
  width = x_BxTxD.shape[-1]
  half = jnp.fft.rfft2(x_BxTxD.astype(jnp.float32)).real
  # Of real numbers, frequency (-k, -l) has the same real part as (k, l). Reversing takes row k to
  # T-1-k, and rolling from there to -k modulo T.
  mirrored = jnp.roll(half[:, ::-1, (width - 1) // 2 : 0 : -1], 1, axis=1)
  return jnp.concatenate([half, mirrored], axis=-1).astype(x_BxTxD.dtype)


# The transform is a symmetric matrix, and so its own transpose.
fourier_mix.defvjp(lambda x: (fourier_mix(x), None), lambda _, gradient: (fourier_mix(gradient),))


class FNetBlock(nn.Module):
  """Mixes tokens by a Fourier transform, then channels by two dense layers; post-norm."""

  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array, seeds_B: Array | None) -> Array:
    x_BxTxD = layers.LayerNorm(dtype=self.dtype, name="norm1")(x_BxTxD + fourier_mix(x_BxTxD))
    ffn_BxTxD = FFN(self.dropout_rate, self.dtype, name="ffn")(x_BxTxD, seeds_B)
    return layers.LayerNorm(dtype=self.dtype, name="norm2")(x_BxTxD + ffn_BxTxD)


class FFN(nn.Module):
  """Two dense layers of the model's width, with dropout between them."""

  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array, seeds_B: Array | None) -> Array:
    width = x_BxTxD.shape[-1]
    h_BxTxD = layers.gelu(layers.Dense(width, dtype=self.dtype, name="in")(x_BxTxD))
    h_BxTxD = layers.Dropout(self.dropout_rate)(h_BxTxD, seeds_B)
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
    x_BxTxD = layers.PositionEmbedding(nn.initializers.glorot_uniform(), name="position")(x_BxTxD)
    block = layers.remat(FNetBlock, self.remat)
    for i in range(self.num_blocks):
      x_BxTxD = block(self.dropout_rate, self.dtype, name=f"block{i}")(x_BxTxD, seeds_B)
    x_BxD = x_BxTxD.mean(axis=1, dtype=jnp.float32)
    x_BxD = layers.Dropout(self.dropout_rate)(x_BxD, seeds_B)
    return layers.Dense(self.num_classes, dtype=jnp.float32, name="head")(x_BxD)
