"""gMLP (arXiv:2105.08050, section 2; no tiny attention).

As in the Keras example, and other than in the paper: the hidden layer is twice (not six times) as
wide as the model, the spatial kernel starts Glorot-uniform (not near zero), and dropout follows the
hidden layer.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mlp_models import dropout, layers


class GMLPBlock(nn.Module):
  """A dense layer, the spatial gating unit (section 2.1) and a dense layer, around a residual."""

  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x_BxTxD: Array) -> Array:
    _, num_tokens, width = x_BxTxD.shape
    h_BxTxD = layers.LayerNorm(dtype=self.dtype, name="norm1")(x_BxTxD)
    h_BxTx2D = layers.gelu(layers.Dense(2 * width, dtype=self.dtype, name="proj_in")(h_BxTxD))
    h_BxTx2D = dropout.Dropout(self.dropout_rate)(h_BxTx2D)

    u_BxTxD, v_BxTxD = jnp.split(h_BxTx2D, 2, axis=-1)
    v_BxTxD = layers.LayerNorm(dtype=self.dtype, name="norm2")(v_BxTxD)
    # A bias of one, so that the gate starts open.
    v_BxTxD = layers.TokenDense(
      num_tokens, dtype=self.dtype, bias_init=nn.initializers.ones, name="spatial"
    )(v_BxTxD)

    return x_BxTxD + layers.Dense(width, dtype=self.dtype, name="proj_out")(u_BxTxD * v_BxTxD)


class GMLP(nn.Module):
  """gMLP: images [B, H, W, C] -> float32 logits [B, num_classes]."""

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
    block = layers.remat(GMLPBlock, self.remat)
    for i in range(self.num_blocks):
      x_BxTxD = block(self.dropout_rate, self.dtype, name=f"block{i}")(x_BxTxD)
    return layers.mean_head(x_BxTxD, self.num_classes, self.dropout_rate)


# By name: the fields that differ from the defaults.
VARIANTS: dict[str, dict[str, Any]] = {"keras": {}}
