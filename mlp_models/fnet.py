"""FNet (arXiv:2105.03824, section 3), on patches of images.

By default as in the Keras example. The variants "base" and "large" have the paper's blocks, equal
to those of transformers. Around the blocks, all differ from the paper, which reads text: tokens are
patches with learned positions, and the head reads their mean. Dropout follows the hidden layer, as
in the Keras example; in the paper it follows the output layer.
"""

import functools
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

  hidden_units: int | None
  gelu: str
  norm_epsilon: float
  dropout_rate: float
  drop_path_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    width = x_BxTxD.shape[-1]
    norm = functools.partial(layers.LayerNorm, dtype=self.dtype, epsilon=self.norm_epsilon)
    ffn = FFN(
      (self.hidden_units or width, width), self.gelu, self.dropout_rate, self.dtype, name="ffn"
    )

    y_BxTxD = layers.record(self, "token_mixing", fourier_mix(x_BxTxD))
    x_BxTxD = x_BxTxD + dropout.DropPath(self.drop_path_rate)(y_BxTxD)
    x_BxTxD = norm(name="norm1")(x_BxTxD)
    x_BxTxD = x_BxTxD + dropout.DropPath(self.drop_path_rate)(ffn(x_BxTxD))
    return layers.record(self, "output", norm(name="norm2")(x_BxTxD))


class FFN(nn.Module):
  """Two dense layers, with dropout between them."""

  units: tuple[int, int]  # of the hidden layer, and of the output
  gelu: str
  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    hidden, out = self.units
    h_BxTxF = layers.gelu(layers.Dense(hidden, dtype=self.dtype, name="in")(x_BxTxD), self.gelu)
    h_BxTxF = dropout.Dropout(self.dropout_rate)(h_BxTxF)
    return layers.Dense(out, dtype=self.dtype, name="out")(h_BxTxF)


class FNet(nn.Module):
  """FNet: images [B, H, W, C] -> float32 logits [B, num_classes].

  hidden_units: width of the hidden layer of a block; None: that of the model.
  """

  image_size: layers.ImageSize = 64
  patch_size: int = 8
  width: int = 256
  num_blocks: int = 4
  hidden_units: int | None = None
  gelu: str = "exact"
  norm_epsilon: float = 1e-6
  num_classes: int = 100
  head_init: str = "glorot"
  dropout_rate: float = 0.2
  drop_path_rate: float = 0.0
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
    block = functools.partial(
      layers.remat(FNetBlock, self.remat),
      hidden_units=self.hidden_units,
      gelu=self.gelu,
      norm_epsilon=self.norm_epsilon,
      dropout_rate=self.dropout_rate,
      dtype=self.dtype,
    )
    for i, rate in enumerate(dropout.path_rates(self.drop_path_rate, self.num_blocks)):
      x_BxTxD = block(drop_path_rate=rate, name=f"block{i}")(x_BxTxD)
    return layers.mean_head(x_BxTxD, self.num_classes, self.dropout_rate, self.head_init)


def _paper(width: int, num_blocks: int) -> dict[str, Any]:
  """Fields of a model of arXiv:2105.03824, section 4; gelu and epsilon as in the authors' code."""
  return {
    "image_size": 224,
    "patch_size": 16,
    "width": width,
    "num_blocks": num_blocks,
    "hidden_units": 4 * width,
    "gelu": "tanh",
    "norm_epsilon": 1e-12,
    "num_classes": 1000,
    "dropout_rate": 0.0,
  }


# By name: the fields that differ from the defaults.
VARIANTS: dict[str, dict[str, Any]] = {
  "keras": {},
  "base": _paper(768, 12),
  "large": _paper(1024, 24),
}
