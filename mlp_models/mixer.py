"""MLP-Mixer (arXiv:2105.01601, section 2).

By default as in the Keras example, and other than in the paper: one LayerNorm a block serves both
MLPs, both have as many hidden units as there are tokens, and no norm precedes the mean over the
tokens. The other VARIANTS are the paper's models.
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
  gelu: str
  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    hidden, out = self.units
    h = layers.gelu(self.dense(hidden, dtype=self.dtype, name="in")(x_BxTxD), self.gelu)
    y_BxTxD = self.dense(out, dtype=self.dtype, name="out")(h)
    return dropout.Dropout(self.dropout_rate)(y_BxTxD)


class MixerBlock(nn.Module):
  """Mixes tokens, then channels."""

  token_units: int | None
  channel_units: int | None
  shared_norm: bool
  gelu: str
  norm_epsilon: float
  dropout_rate: float
  drop_path_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    num_tokens, width = x_BxTxD.shape[1:]
    norm = functools.partial(layers.LayerNorm, dtype=self.dtype, epsilon=self.norm_epsilon)
    if self.shared_norm:
      norm1 = norm2 = norm(name="norm")
    else:
      norm1, norm2 = norm(name="norm1"), norm(name="norm2")
    mlp = functools.partial(MLP, gelu=self.gelu, dropout_rate=self.dropout_rate, dtype=self.dtype)
    token_units, channel_units = self.token_units or num_tokens, self.channel_units or num_tokens
    token_mlp = mlp(layers.TokenDense, (token_units, num_tokens), name="token_mlp")
    channel_mlp = mlp(layers.Dense, (channel_units, width), name="channel_mlp")

    y_BxTxD = layers.record(self, "token_mixing", token_mlp(norm1(x_BxTxD)))
    x_BxTxD = x_BxTxD + dropout.DropPath(self.drop_path_rate)(y_BxTxD)
    y_BxTxD = channel_mlp(norm2(x_BxTxD))
    x_BxTxD = x_BxTxD + dropout.DropPath(self.drop_path_rate)(y_BxTxD)
    return layers.record(self, "output", x_BxTxD)


class Mixer(nn.Module):
  """MLP-Mixer: images [B, H, W, C] -> float32 logits [B, num_classes].

  token_units, channel_units: width of the hidden layer of each MLP; None: the number of tokens.
  shared_norm: whether both MLPs of a block read the same LayerNorm.
  head_norm: whether a LayerNorm precedes the mean over the tokens.
  """

  image_size: layers.ImageSize = 64
  patch_size: int = 8
  width: int = 256
  num_blocks: int = 4
  token_units: int | None = None
  channel_units: int | None = None
  shared_norm: bool = True
  head_norm: bool = False
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
    block = functools.partial(
      layers.remat(MixerBlock, self.remat),
      token_units=self.token_units,
      channel_units=self.channel_units,
      shared_norm=self.shared_norm,
      gelu=self.gelu,
      norm_epsilon=self.norm_epsilon,
      dropout_rate=self.dropout_rate,
      dtype=self.dtype,
    )
    for i, rate in enumerate(dropout.path_rates(self.drop_path_rate, self.num_blocks)):
      x_BxTxD = block(drop_path_rate=rate, name=f"block{i}")(x_BxTxD)
    if self.head_norm:
      x_BxTxD = layers.LayerNorm(self.dtype, self.norm_epsilon, name="norm")(x_BxTxD)
    return layers.mean_head(x_BxTxD, self.num_classes, self.dropout_rate, self.head_init)


def _paper(patch_size: int, width: int, num_blocks: int) -> dict[str, Any]:
  """Fields of a model of arXiv:2105.01601, table 1; gelu and head as in the authors' code."""
  return {
    "image_size": 224,
    "patch_size": patch_size,
    "width": width,
    "num_blocks": num_blocks,
    "token_units": width // 2,
    "channel_units": 4 * width,
    "shared_norm": False,
    "head_norm": True,
    "gelu": "tanh",
    "num_classes": 1000,
    "head_init": "zeros",
    "dropout_rate": 0.0,
  }


# By name: the fields that differ from the defaults.
VARIANTS: dict[str, dict[str, Any]] = {
  "keras": {},
  "S/32": _paper(32, 512, 8),
  "S/16": _paper(16, 512, 8),
  "B/32": _paper(32, 768, 12),
  "B/16": _paper(16, 768, 12),
  "L/16": _paper(16, 1024, 24),
  "H/14": _paper(14, 1280, 32),
}
