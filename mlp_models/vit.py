"""Vision Transformer (arXiv:2010.11929, section 3.1), and the plain one (arXiv:2205.01580).

The defaults are the Keras example's, and other than in the paper: no class token (the head reads
all tokens, flattened), gelu after the last layer of an MLP as well, and heads whose width is free
of the model's. Other than in the paper's code, positions and attention's output have no dropout.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from mlp_models import dropout, layers
from mlp_models.attention import SelfAttention

POOLS = ("flatten", "mean", "mean_norm", "cls", "cls_norm", "map")
POSITIONS = ("learned", "sincos2d")
HEAD_ACTIVATIONS = ("gelu", "tanh")
Part = Callable[..., nn.Module]  # makes a layer of the given name


class MLP(nn.Module):
  """Dense layers over the last axis, each followed by dropout; see `ViT` for `gelu_last`."""

  units: Sequence[int]
  dropout_rate: float
  dtype: DTypeLike
  activation: Callable[[Array], Array] = layers.gelu
  gelu_last: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:
    for i, units in enumerate(self.units):
      x = layers.Dense(units, dtype=self.dtype, name=f"dense{i}")(x)
      if self.gelu_last or i < len(self.units) - 1:
        x = self.activation(x)
      x = dropout.Dropout(self.dropout_rate)(x)
    return x


class ViTBlock(nn.Module):
  """Self-attention, then an MLP, each on normalised input and around a residual."""

  attention: Part
  mlp: Part
  norm: Part
  drop_path_rate: float

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    y_BxTxD = self.attention(name="attention")(self.norm(name="norm1")(x_BxTxD))
    layers.record(self, "token_mixing", y_BxTxD)
    x_BxTxD = x_BxTxD + dropout.DropPath(self.drop_path_rate)(y_BxTxD)
    y_BxTxD = self.mlp(name="mlp")(self.norm(name="norm2")(x_BxTxD))
    x_BxTxD = x_BxTxD + dropout.DropPath(self.drop_path_rate)(y_BxTxD)
    return layers.record(self, "output", x_BxTxD)


class AttentionPool(nn.Module):
  """One learned query reads all tokens, then an MLP around a residual: [B, T, D] -> [B, D].

  Follows arXiv:1810.00825, section 3.2, without the first norm, as big_vision and timm do.
  """

  attention: Part
  mlp: Part
  norm: Part

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    B, _, D = x_BxTxD.shape
    probe_1xD = self.param("probe", nn.initializers.glorot_uniform(), (1, D))
    probe_Bx1xD = jnp.broadcast_to(probe_1xD, (B, 1, D))
    x_BxD: Array = self.attention(name="attention")(probe_Bx1xD, x_BxTxD)[:, 0]
    y_BxD: Array = self.mlp(name="mlp")(self.norm(name="norm")(x_BxD))
    return x_BxD + y_BxD


class ViT(nn.Module):
  """Vision Transformer: images [B, H, W, C] -> float32 logits [B, num_classes].

  pool: what the head reads: "flatten", all tokens; "cls", the class token; "mean", the patches'
    mean; "map", `AttentionPool`; "cls_norm" and "mean_norm" normalise after pooling, not before it.
  class_token: there is a class token also where the head does not read it.
  position: "learned", or "sincos2d", fixed (see `sincos2d`).
  gelu_last: gelu follows the last layer of an MLP, too.
  attention_init, qkv_bias: of the blocks, see `SelfAttention`; the pool always has biases.
  head_units, head_activation: hidden layers of the head; "gelu" or "tanh" after each.

  Intermediates: of a block "token_mixing" and "output", of its attention "weights".
  """

  image_size: layers.ImageSize = 72
  patch_size: int = 6
  width: int = 64
  num_blocks: int = 8
  num_heads: int = 4
  head_dim: int = 64
  mlp_units: Sequence[int] = (128, 64)
  head_units: Sequence[int] = (2048, 1024)
  head_activation: str = "gelu"
  pool: str = "flatten"
  class_token: bool = False
  position: str = "learned"
  gelu: str = "exact"
  gelu_last: bool = True
  attention_init: str = "keras"
  qkv_bias: bool = True
  norm_epsilon: float = 1e-6
  num_classes: int = 100
  head_init: str = "glorot"
  dropout_rate: float = 0.1
  attention_dropout_rate: float = 0.1
  head_dropout_rate: float = 0.5
  drop_path_rate: float = 0.0
  dtype: DTypeLike = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self, images_BxHxWxC: Array, train: bool = False, positions: Array | None = None
  ) -> Array:
    dropout.start(self, images_BxHxWxC.shape[0], positions, train)
    gelu = functools.partial(layers.gelu, kind=self.gelu)
    heads, rate, dtype = (self.num_heads, self.head_dim), self.attention_dropout_rate, self.dtype
    attention = functools.partial(SelfAttention, *heads, rate, dtype, self.attention_init)
    mlp = functools.partial(MLP, self.mlp_units, self.dropout_rate, dtype, gelu, self.gelu_last)
    norm = functools.partial(layers.LayerNorm, dtype, self.norm_epsilon)
    block = layers.remat(ViTBlock, self.remat)
    parts = functools.partial(attention, qkv_bias=self.qkv_bias), mlp, norm

    x_BxTxD = self._embed(images_BxHxWxC)
    for i, rate in enumerate(dropout.path_rates(self.drop_path_rate, self.num_blocks)):
      x_BxTxD = block(*parts, rate, name=f"block{i}")(x_BxTxD)
    x_BxF = self._pool(x_BxTxD, (attention, mlp, norm)).astype(self.dtype)
    x_BxF = dropout.Dropout(self.head_dropout_rate)(x_BxF)
    activation = jnp.tanh if self.head_activation == "tanh" else gelu
    head = MLP(self.head_units, self.head_dropout_rate, self.dtype, activation, name="head_mlp")
    return layers.head(head(x_BxF), self.num_classes, self.head_init)

  @property
  def num_class_tokens(self) -> int:
    return int(self.class_token or self.pool in ("cls", "cls_norm"))

  def _embed(self, images_BxHxWxC: Array) -> Array:
    """Tokens of the patches, after the class token if there is one, with their positions."""
    sizes = self.image_size, self.patch_size, self.width
    x_BxTxD = layers.embed_patches(images_BxHxWxC, *sizes, self.dtype)
    if self.num_class_tokens:
      token_D = self.param("class_token", nn.initializers.zeros, (self.width,))
      token_Bx1xD = jnp.broadcast_to(token_D.astype(self.dtype), (x_BxTxD.shape[0], 1, self.width))
      x_BxTxD = jnp.concatenate([token_Bx1xD, x_BxTxD], axis=1)
    if self.position == "learned":
      return layers.PositionEmbedding(layers.uniform_symmetric, name="position")(x_BxTxD)
    position_TxD = sincos2d(layers.grid(self.image_size, self.patch_size), self.width)
    position_TxD = np.pad(position_TxD, ((self.num_class_tokens, 0), (0, 0)))
    return x_BxTxD + jnp.asarray(position_TxD, self.dtype)

  def _pool(self, x_BxTxD: Array, parts: tuple[Part, Part, Part]) -> Array:
    """What the head reads: [B, T * D] for "flatten", else [B, D]."""
    norm: Callable[[Array], Array] = parts[-1](name="norm")
    norm_is_last = self.pool.endswith("_norm")
    x_BxTxD = x_BxTxD if norm_is_last else norm(x_BxTxD)
    patches_BxTxD = x_BxTxD[:, self.num_class_tokens :]
    match self.pool:
      case "cls" | "cls_norm":
        x_BxD = x_BxTxD[:, 0]
      case "mean" | "mean_norm":
        x_BxD = patches_BxTxD.mean(axis=1, dtype=jnp.float32)
      case "map":
        return AttentionPool(*parts, name="pool")(patches_BxTxD)
      case _:
        return x_BxTxD.reshape(x_BxTxD.shape[0], -1)
    return norm(x_BxD) if norm_is_last else x_BxD


def sincos2d(grid: tuple[int, int], width: int) -> np.ndarray:
  """Fixed positions of rows and columns, float32 [T, width] (arXiv:2205.01580, section 2).

  A quarter of the channels each: sines and cosines of the column, then of the row, at frequencies
  that fall geometrically from 1 to 1/10,000.

  Raises:
    ValueError: the width is not a multiple of 4, or below 8.
  """
  if width % 4 or width < 8:
    raise ValueError(f"sincos2d needs a width of 8, 12, 16, ..., not {width}")
  frequencies = 10_000.0 ** -np.linspace(0, 1, width // 4)
  rows, columns = np.indices(grid).reshape(2, -1)
  angles = np.outer(columns, frequencies), np.outer(rows, frequencies)
  waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
  return np.concatenate(waves, axis=1).astype(np.float32)


# By name: width, blocks and heads of 64 channels (table 1; Ti and S: arXiv:2106.10270, table 2).
_SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}


def _variant(size: str, patch_size: int) -> dict[str, Any]:
  width, num_blocks, num_heads = _SIZES[size]
  sizes = {"image_size": 224, "patch_size": patch_size, "num_classes": 1000}
  sizes |= {"width": width, "num_blocks": num_blocks, "num_heads": num_heads}
  units = {"mlp_units": (4 * width, width), "head_units": ()}
  words = {"pool": "cls", "gelu": "tanh", "gelu_last": False}
  words |= {"attention_init": "papers", "head_init": "zeros"}
  rates = dict.fromkeys(("dropout_rate", "attention_dropout_rate", "head_dropout_rate"), 0.0)
  return sizes | units | words | rates


# By name: the fields that differ from the defaults.
VARIANTS: dict[str, dict[str, Any]] = {"keras": {}}
for _size in _SIZES:
  for _patch in (8, 14, 16, 32) if _size == "L" else (8, 16, 32):
    VARIANTS[f"{_size}/{_patch}"] = _variant(_size, _patch)
# big_vision's config, as in the first row of the paper's table 1: the head has a hidden layer.
VARIANTS["S/16 plain"] = VARIANTS["S/16"] | {
  "position": "sincos2d",
  "pool": "mean",
  "head_units": (384,),
  "head_activation": "tanh",
}
