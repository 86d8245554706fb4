"""gMLP (arXiv:2105.08050, section 2; no tiny attention).

By default as in the Keras example, and other than in the paper: the hidden layer is twice (not six
times) as wide as the model, the spatial kernel starts Glorot-uniform (not near zero), dropout
follows the hidden layer, and no norm precedes the mean over the tokens. The other VARIANTS are the
paper's models, with what the paper leaves open (the epsilons and that norm) as in timm.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mlp_models import dropout, layers

SPATIAL_INITS = ("glorot", "near_zero")


class GMLPBlock(nn.Module):
  """A dense layer, the spatial gating unit (section 2.1) and a dense layer, around a residual."""

  hidden_units: int | None
  spatial_init: str
  gelu: str
  norm_epsilon: float
  gate_norm_epsilon: float
  dropout_rate: float
  drop_path_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    _, num_tokens, width = x_BxTxD.shape
    h_BxTxD = layers.LayerNorm(self.dtype, self.norm_epsilon, name="norm1")(x_BxTxD)
    proj_in = layers.Dense(self.hidden_units or 2 * width, dtype=self.dtype, name="proj_in")
    h_BxTxF = layers.gelu(proj_in(h_BxTxD), self.gelu)
    h_BxTxF = dropout.Dropout(self.dropout_rate)(h_BxTxF)

    u_BxTxE, v_BxTxE = jnp.split(h_BxTxF, 2, axis=-1)  # E = F / 2
    v_BxTxE = layers.LayerNorm(self.dtype, self.gate_norm_epsilon, name="norm2")(v_BxTxE)
    # A bias of one, so that the gate starts open.
    v_BxTxE = layers.TokenDense(
      num_tokens,
      self.dtype,
      kernel_init=_spatial_kernel_init(self.spatial_init),
      bias_init=nn.initializers.ones,
      name="spatial",
    )(v_BxTxE)
    h_BxTxE = layers.record(self, "token_mixing", u_BxTxE * v_BxTxE)

    y_BxTxD = layers.Dense(width, dtype=self.dtype, name="proj_out")(h_BxTxE)
    x_BxTxD = x_BxTxD + dropout.DropPath(self.drop_path_rate)(y_BxTxD)
    return layers.record(self, "output", x_BxTxD)


def _spatial_kernel_init(how: str) -> nn.initializers.Initializer:
  """With "near_zero" and a bias of one, blocks start as an MLP of each token alone."""
  if how == "near_zero":
    return nn.initializers.normal(1e-6)
  return nn.initializers.glorot_uniform()


class GMLP(nn.Module):
  """gMLP: images [B, H, W, C] -> float32 logits [B, num_classes].

  hidden_units: an even number, half of which gate the other half; None: 2 * width.
  spatial_init: what the kernel over the tokens starts as: "glorot", or "near_zero".
  head_norm: whether a LayerNorm precedes the mean over the tokens.
  """

  image_size: layers.ImageSize = 64
  patch_size: int = 8
  width: int = 256
  num_blocks: int = 4
  hidden_units: int | None = None
  spatial_init: str = "glorot"
  head_norm: bool = False
  gelu: str = "exact"
  norm_epsilon: float = 1e-6
  gate_norm_epsilon: float = 1e-6
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
      layers.remat(GMLPBlock, self.remat),
      hidden_units=self.hidden_units,
      spatial_init=self.spatial_init,
      gelu=self.gelu,
      norm_epsilon=self.norm_epsilon,
      gate_norm_epsilon=self.gate_norm_epsilon,
      dropout_rate=self.dropout_rate,
      dtype=self.dtype,
    )
    for i, rate in enumerate(dropout.path_rates(self.drop_path_rate, self.num_blocks)):
      x_BxTxD = block(drop_path_rate=rate, name=f"block{i}")(x_BxTxD)
    if self.head_norm:
      x_BxTxD = layers.LayerNorm(self.dtype, self.norm_epsilon, name="norm")(x_BxTxD)
    return layers.mean_head(x_BxTxD, self.num_classes, self.dropout_rate, self.head_init)


def _paper(width: int, drop_path_rate: float) -> dict[str, Any]:
  """Fields of a model of arXiv:2105.08050, table 1 (30 blocks; survival is 1 - drop_path_rate)."""
  return {
    "image_size": 224,
    "patch_size": 16,
    "width": width,
    "num_blocks": 30,
    "hidden_units": 6 * width,
    "spatial_init": "near_zero",
    "head_norm": True,
    "gate_norm_epsilon": 1e-5,
    "num_classes": 1000,
    "head_init": "zeros",
    "dropout_rate": 0.0,
    "drop_path_rate": drop_path_rate,
  }


# By name: the fields that differ from the defaults.
VARIANTS: dict[str, dict[str, Any]] = {
  "keras": {},
  "Ti/16": _paper(128, drop_path_rate=0.0),
  "S/16": _paper(256, drop_path_rate=0.05),
  "B/16": _paper(512, drop_path_rate=0.2),
}
