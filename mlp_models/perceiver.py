"""Perceiver (arXiv:2103.03206, section 3).

As in the Keras example, and other than in the paper: learned position embeddings instead of Fourier
features, the scores of the cross-attention scaled by one learned scalar, a skip from the
*normalised* latents and a second one from the normalised attention output, every cross-attention
sharing its weights (the paper's first has its own), and a head that ends in dropout.
perceiver_io.py has the paper's model.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mlp_models import dropout, kernels, layers
from mlp_models.attention import SelfAttention


class FFN(nn.Module):
  """Dense layers over the last axis with gelu between them and dropout at the end."""

  units: Sequence[int]
  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array) -> Array:
    for i, units in enumerate(self.units):
      if i > 0:
        x = layers.gelu(x)
      x = layers.Dense(units, dtype=self.dtype, name=f"dense{i}")(x)
    return dropout.Dropout(self.dropout_rate)(x)


class Scale(nn.Module):
  """A learned scalar factor that starts at one."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return x * self.param("scale", nn.initializers.ones, ()).astype(x.dtype)


class CrossAttention(nn.Module):
  """Lets the latents look at the data, with one head as wide as the model.

  Records "weights" [B, 1, L, T], before dropout; "token_mixing", what they give, and "output".
  """

  ffn_units: Sequence[int]
  dropout_rate: float
  attention_dropout_rate: float
  dtype: DTypeLike

  def setup(self) -> None:
    width = self.ffn_units[-1]
    self.norm_latents = layers.LayerNorm(dtype=self.dtype)
    self.norm_data = layers.LayerNorm(dtype=self.dtype)
    self.query = layers.Dense(width, dtype=self.dtype)
    self.key = layers.Dense(width, dtype=self.dtype)
    self.value = layers.Dense(width, dtype=self.dtype)
    self.score = Scale()
    self.norm_out = layers.LayerNorm(dtype=self.dtype)
    self.ffn = FFN(self.ffn_units, self.dropout_rate, self.dtype)

  def keys_and_values(self, data_BxTxD: Array) -> tuple[Array, Array]:
    """Apart from `__call__`, because the data stay the same over all iterations."""
    data_BxTxD = self.norm_data(data_BxTxD)
    return self.key(data_BxTxD), self.value(data_BxTxD)

  def __call__(self, latents_BxLxD: Array, key_BxTxD: Array, value_BxTxD: Array) -> Array:
    """The latents may have B = 1: in the first iteration they do not depend on the image."""
    latents_BxLxD = self.norm_latents(latents_BxLxD)
    query_BxLxD = self.score(self.query(latents_BxLxD))
    query_BxLxD = jnp.broadcast_to(query_BxLxD, (key_BxTxD.shape[0], *query_BxLxD.shape[1:]))
    if self.is_mutable_collection("intermediates"):
      scores_BxLxT = jnp.einsum("bld,btd->blt", query_BxLxD, key_BxTxD).astype(jnp.float32)
      layers.record(self, "weights", jax.nn.softmax(scores_BxLxT)[:, None])
    attended_Bx1xLxD = kernels.attend(
      query_BxLxD[:, None],
      key_BxTxD[:, None],
      value_BxTxD[:, None],
      dropout.layer_seeds(self),
      self.attention_dropout_rate,
    )
    attended_BxLxD = layers.record(self, "token_mixing", attended_Bx1xLxD[:, 0])
    x_BxLxD = self.norm_out(attended_BxLxD + latents_BxLxD)
    return layers.record(self, "output", x_BxLxD + self.ffn(x_BxLxD))


class LatentBlock(nn.Module):
  """Self-attention of the latents, then an FFN, each on normalised input and around a residual.

  Records "token_mixing", the attention's result, and "output".
  """

  num_heads: int
  ffn_units: Sequence[int]
  dropout_rate: float
  attention_dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxLxD: Array) -> Array:
    width = x_BxLxD.shape[-1]
    attention = SelfAttention(
      self.num_heads, width, self.attention_dropout_rate, self.dtype, name="attention"
    )
    ffn = FFN(self.ffn_units, self.dropout_rate, self.dtype, name="ffn")

    y_BxLxD = layers.LayerNorm(dtype=self.dtype, name="norm1")(x_BxLxD)
    x_BxLxD = x_BxLxD + layers.record(self, "token_mixing", attention(y_BxLxD))
    y_BxLxD = layers.LayerNorm(dtype=self.dtype, name="norm2")(x_BxLxD)
    return layers.record(self, "output", x_BxLxD + ffn(y_BxLxD))


class LatentTransformer(nn.Module):
  """A stack of `LatentBlock`s; the fields are theirs."""

  num_blocks: int
  num_heads: int
  ffn_units: Sequence[int]
  dropout_rate: float
  attention_dropout_rate: float
  dtype: DTypeLike
  remat: bool

  @nn.compact
  def __call__(self, x_BxLxD: Array) -> Array:
    block = layers.remat(LatentBlock, self.remat)
    rates = (self.dropout_rate, self.attention_dropout_rate)
    for i in range(self.num_blocks):
      x_BxLxD = block(self.num_heads, self.ffn_units, *rates, self.dtype, name=f"block{i}")(x_BxLxD)
    return x_BxLxD


class Perceiver(nn.Module):
  """Perceiver: images [B, H, W, C] -> float32 logits [B, num_classes].

  Each iteration is a cross-attention and `num_blocks` latent blocks; all share their weights. A
  latent head is as wide as the model. The head is an FFN with the hidden units of `ffn_units`.
  """

  image_size: layers.ImageSize = 64
  patch_size: int = 2
  width: int = 256
  num_latents: int = 256
  num_iterations: int = 2
  num_blocks: int = 4
  num_heads: int = 8
  ffn_units: Sequence[int] = (256, 256)
  num_classes: int = 100
  dropout_rate: float = 0.2
  attention_dropout_rate: float = 0.1
  dtype: DTypeLike = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self, images_BxHxWxC: Array, train: bool = False, positions: Array | None = None
  ) -> Array:
    dropout.start(self, images_BxHxWxC.shape[0], positions, train)
    data_BxTxD = layers.embed_patches(
      images_BxHxWxC, self.image_size, self.patch_size, self.width, self.dtype
    )
    data_BxTxD = layers.PositionEmbedding(layers.uniform_symmetric, name="position")(data_BxTxD)

    cross_attention = layers.remat(CrossAttention, self.remat)
    cross = cross_attention(
      ffn_units=self.ffn_units,
      dropout_rate=self.dropout_rate,
      attention_dropout_rate=self.attention_dropout_rate,
      dtype=self.dtype,
      name="cross",
    )
    transformer = LatentTransformer(
      num_blocks=self.num_blocks,
      num_heads=self.num_heads,
      ffn_units=self.ffn_units,
      dropout_rate=self.dropout_rate,
      attention_dropout_rate=self.attention_dropout_rate,
      dtype=self.dtype,
      remat=self.remat,
      name="latent",
    )
    keys_BxTxD, values_BxTxD = cross.keys_and_values(data_BxTxD)
    latents_LxD = self.param(
      "latents", nn.initializers.normal(0.05), (self.num_latents, self.width)
    )
    latents_BxLxD = latents_LxD[None].astype(self.dtype)
    for _ in range(self.num_iterations):
      latents_BxLxD = cross(latents_BxLxD, keys_BxTxD, values_BxTxD)
      latents_BxLxD = transformer(latents_BxLxD)

    latents_BxD = latents_BxLxD.mean(axis=1, dtype=jnp.float32)
    if not self.num_classes:
      return latents_BxD
    head_units = (*self.ffn_units[:-1], self.num_classes)
    return FFN(head_units, self.dropout_rate, jnp.float32, name="head")(latents_BxD)


# By name: the fields that differ from the defaults.
VARIANTS: dict[str, dict[str, Any]] = {"keras": {}}
