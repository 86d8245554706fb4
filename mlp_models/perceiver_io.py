"""DeepMind's Perceivers: the paper's (arXiv:2103.03206) and Perceiver IO (arXiv:2107.14795).

Latents look at the image by cross-attention, and at each other in blocks of self-attention that are
repeated with the same weights. The Keras example in perceiver.py differs in more than its sizes.

Shapes: B batch, H W image, C channels, T S tokens, L latents, D width, N heads, K V head widths.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mlp_models import dropout, kernels, layers
from mlp_models.attention import softmax
from mlp_models.perceiver_tokens import make_tokens, small_normal

READOUTS = ("mean", "decoder")

KeysAndValues = tuple[Array, Array]  # [B, S, N, K] and [B, S, N, V]


class MLP(nn.Module):
  """Two dense layers over the last axis with gelu between them and dropout at the end."""

  widening: int
  gelu: str
  dropout_rate: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = x.shape[-1]
    x = layers.Dense(self.widening * width, dtype=self.dtype, name="dense0")(x)
    x = layers.Dense(width, dtype=self.dtype, name="dense1")(layers.gelu(x, self.gelu))
    return dropout.Dropout(self.dropout_rate)(x)


class Attention(nn.Module):
  """Attention with several heads (arXiv:1706.03762, section 3.2), [B, T, D] -> [B, T, width].

  Queries and keys may have another number of channels than values. Records "weights" [B, N, T, S].
  """

  num_heads: int
  qk_channels: int
  v_channels: int
  width: int
  dropout_rate: float
  dtype: DTypeLike

  def setup(self) -> None:
    self.query = layers.Dense(self.qk_channels, dtype=self.dtype)
    self.key = layers.Dense(self.qk_channels, dtype=self.dtype)
    self.value = layers.Dense(self.v_channels, dtype=self.dtype)
    self.out = layers.Dense(self.width, dtype=self.dtype)

  def keys_and_values(self, x_BxSxD: Array) -> KeysAndValues:
    return self._in_heads(self.key(x_BxSxD)), self._in_heads(self.value(x_BxSxD))

  def __call__(self, x_BxTxD: Array, keys_and_values: KeysAndValues) -> Array:
    """The queries may have B = 1 where keys and values have more."""
    key_BxSxNxK, value_BxSxNxV = keys_and_values
    query_BxTxNxK = self._in_heads(self.query(x_BxTxD))
    batch_size = key_BxSxNxK.shape[0]
    query_BxTxNxK = jnp.broadcast_to(query_BxTxNxK, (batch_size, *query_BxTxNxK.shape[1:]))
    if self.is_mutable_collection("intermediates"):
      layers.record(self, "weights", softmax(query_BxTxNxK, key_BxSxNxK))
    seeds_B = dropout.layer_seeds(self)
    x_BxTxNxV = kernels.attention(
      query_BxTxNxK, key_BxSxNxK, value_BxSxNxV, seeds_B, self.dropout_rate
    )
    return self.out(x_BxTxNxV.reshape(*x_BxTxNxV.shape[:2], -1))

  def _in_heads(self, x_BxTxD: Array) -> Array:
    return x_BxTxD.reshape(*x_BxTxD.shape[:2], self.num_heads, -1)


class Block(nn.Module):
  """Attention, then an MLP, each on normalised input and around a residual: [B, T, D] -> [B, T, D].

  Self-attention, or cross-attention if it is given the keys and values of other tokens. Records
  "token_mixing", the attention's result, and "output".
  """

  num_heads: int
  qk_channels: int
  v_channels: int
  width: int
  widening: int = 1
  gelu: str = "exact"
  norm_epsilon: float = 1e-5
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  drop_path_rate: float = 0.0
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    self.norm1 = layers.LayerNorm(self.dtype, self.norm_epsilon)
    self.norm_data = layers.LayerNorm(self.dtype, self.norm_epsilon)
    self.attention = Attention(
      self.num_heads,
      self.qk_channels,
      self.v_channels,
      self.width,
      self.attention_dropout_rate,
      self.dtype,
    )
    self.attention_dropout = dropout.Dropout(self.dropout_rate)
    self.norm2 = layers.LayerNorm(self.dtype, self.norm_epsilon)
    self.mlp = MLP(self.widening, self.gelu, self.dropout_rate, self.dtype)
    self.drop_path1 = dropout.DropPath(self.drop_path_rate)
    self.drop_path2 = dropout.DropPath(self.drop_path_rate)

  def keys_and_values(self, data_BxSxD: Array) -> KeysAndValues:
    """Of the tokens to look at; apart from `__call__`, because they stay the same."""
    return self.attention.keys_and_values(self.norm_data(data_BxSxD))

  def __call__(self, x_BxTxD: Array, keys_and_values: KeysAndValues | None = None) -> Array:
    y_BxTxD = self.norm1(x_BxTxD)
    if keys_and_values is None:
      keys_and_values = self.attention.keys_and_values(y_BxTxD)
    y_BxTxD = self.attention_dropout(self.attention(y_BxTxD, keys_and_values))
    x_BxTxD = x_BxTxD + self.drop_path1(layers.record(self, "token_mixing", y_BxTxD))
    x_BxTxD = x_BxTxD + self.drop_path2(self.mlp(self.norm2(x_BxTxD)))
    return layers.record(self, "output", x_BxTxD)


class LatentBlocks(nn.Module):
  """A stack of self-attention blocks of the latents."""

  num_blocks: int
  drop_path_rate: float
  block: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x_BxLxD: Array) -> Array:
    for i, rate in enumerate(dropout.path_rates(self.drop_path_rate, self.num_blocks)):
      x_BxLxD = self.block(drop_path_rate=rate, name=f"block{i}")(x_BxLxD)
    return x_BxLxD


class Iteration(nn.Module):
  """The latent blocks and, where there is one, the cross-attention that follows them."""

  latent: LatentBlocks
  cross: nn.Module | None

  def __call__(
    self, x_BxLxD: Array, iteration: Array, keys_and_values: KeysAndValues | None
  ) -> tuple[Array, None]:
    """iteration: int32 [], how often they were called before."""
    dropout.continue_at(self.latent, iteration)
    x_BxLxD = self.latent(x_BxLxD)
    if self.cross is not None:
      dropout.continue_at(self.cross, iteration)
      x_BxLxD = self.cross(x_BxLxD, keys_and_values)
    return x_BxLxD, None


def repeat(
  iterations: range,
  latent: LatentBlocks,
  cross: nn.Module | None,
  x_BxLxD: Array,
  keys_and_values: KeysAndValues | None,
) -> Array:
  """`Iteration`s one after the other, as a loop that is compiled once.

  Where intermediates are recorded it is no loop, so that each iteration adds its own.
  """
  if latent.is_initializing():
    iterations = iterations[:1]
  if latent.is_initializing() or latent.is_mutable_collection("intermediates"):
    for _ in iterations:
      x_BxLxD = latent(x_BxLxD)
      if cross is not None:
        x_BxLxD = cross(x_BxLxD, keys_and_values)
    return x_BxLxD
  if not iterations:
    return x_BxLxD
  loop = nn.scan(
    Iteration,
    variable_broadcast="params",
    split_rngs={True: False},
    in_axes=(0, nn.broadcast),
    check_constancy_invariants=False,
  )
  x_BxLxD, _ = loop(latent, cross)(x_BxLxD, jnp.asarray(iterations), keys_and_values)
  return x_BxLxD


class PerceiverIO(nn.Module):
  """DeepMind's Perceivers: images [B, H, W, C] -> float32 logits [B, num_classes].

  `preprocessing` says what makes tokens of an image: see `make_tokens`. With "fourier" and "conv"
  images may have any size.

  `readout` says what the head reads: "mean", the mean of the latents, or "decoder", what a learned
  query finds in them by cross-attention with one head.

  An iteration is a cross-attention, in the first `num_cross_attends` of them, and `num_blocks`
  latent blocks. The latent blocks share their weights, and so do all cross-attentions but the
  first. Channels that are None: queries and keys of the latents have `width`, those of
  cross-attention have a token's, and its values have as many as its keys.
  """

  image_size: layers.ImageSize = 224
  preprocessing: str = "fourier"
  embed_channels: int = 64  # of the dense layer, the projected positions and the convolution
  num_bands: int = 64
  max_resolution: int = 224
  num_latents: int = 512
  width: int = 1024
  num_iterations: int = 8
  num_cross_attends: int = 1
  num_blocks: int = 6
  num_heads: int = 8
  qk_channels: int | None = None
  widening: int = 1
  num_cross_heads: int = 1
  cross_qk_channels: int | None = None
  cross_v_channels: int | None = None
  cross_widening: int = 1
  readout: str = "decoder"
  num_classes: int = 1000
  gelu: str = "exact"
  norm_epsilon: float = 1e-5
  head_init: str = "glorot"
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  drop_path_rate: float = 0.0
  dtype: DTypeLike = jnp.float32
  remat: bool = False

  def __post_init__(self) -> None:
    for heads, channels in (
      ("num_heads", "width"),
      ("num_heads", "qk_channels"),
      ("num_cross_heads", "cross_qk_channels"),
      ("num_cross_heads", "cross_v_channels"),
    ):
      size, parts = getattr(self, channels), getattr(self, heads)
      if size is not None and size % parts:
        raise ValueError(f"{channels} {size} is not a multiple of {heads} {parts}")
    if self.num_cross_attends > self.num_iterations:
      raise ValueError(
        f"num_cross_attends {self.num_cross_attends} is more than num_iterations "
        f"{self.num_iterations}"
      )
    super().__post_init__()

  @nn.compact
  def __call__(
    self, images_BxHxWxC: Array, train: bool = False, positions: Array | None = None
  ) -> Array:
    dropout.start(self, images_BxHxWxC.shape[0], positions, train)
    data_BxTxC = make_tokens(
      images_BxHxWxC,
      self.preprocessing,
      self.image_size,
      self.embed_channels,
      self.num_bands,
      self.max_resolution,
      self.dtype,
    )
    block = functools.partial(
      layers.remat(Block, self.remat),
      width=self.width,
      gelu=self.gelu,
      norm_epsilon=self.norm_epsilon,
      dropout_rate=self.dropout_rate,
      attention_dropout_rate=self.attention_dropout_rate,
      dtype=self.dtype,
    )
    qk_channels = self.cross_qk_channels or data_BxTxC.shape[-1]
    cross = functools.partial(
      block,
      num_heads=self.num_cross_heads,
      qk_channels=qk_channels,
      v_channels=self.cross_v_channels or qk_channels,
      widening=self.cross_widening,
    )
    latent = LatentBlocks(
      self.num_blocks,
      self.drop_path_rate,
      functools.partial(
        block,
        num_heads=self.num_heads,
        qk_channels=self.qk_channels or self.width,
        v_channels=self.width,
        widening=self.widening,
      ),
      name="latent",
    )
    latents_LxD = self.param("latents", small_normal, (self.num_latents, self.width))
    x_BxLxD = latents_LxD[None].astype(self.dtype)

    cross0 = cross(name="cross0")
    x_BxLxD = cross0(x_BxLxD, cross0.keys_and_values(data_BxTxC))
    again = self.num_cross_attends - 1
    if again:
      cross1 = cross(name="cross1")
      keys_and_values = cross1.keys_and_values(data_BxTxC)
      x_BxLxD = repeat(range(again), latent, cross1, x_BxLxD, keys_and_values)
    x_BxLxD = repeat(range(again, self.num_iterations), latent, None, x_BxLxD, None)

    if self.readout == "mean":
      return layers.mean_head(x_BxLxD, self.num_classes, self.dropout_rate, self.head_init)
    decoder = block(num_heads=1, qk_channels=self.width, v_channels=self.width, name="decoder")
    query_1xD = nn.Embed(1, self.width, embedding_init=small_normal, name="query").embedding
    x_Bx1xD = decoder(query_1xD[None].astype(self.dtype), decoder.keys_and_values(x_BxLxD))
    return layers.head(x_Bx1xD[:, 0], self.num_classes, self.head_init)


# By name: the fields that differ from the defaults.
VARIANTS: dict[str, dict[str, Any]] = {
  # The paper's model for ImageNet; gelu and epsilon are those of DeepMind's code
  # (github.com/google-deepmind/deepmind-research, perceiver/).
  "paper": {"num_cross_attends": 8, "readout": "mean", "gelu": "tanh"},
  # The sizes of transformers' PerceiverForImageClassificationLearned, ...Fourier and
  # ...ConvProcessing, whose weights are published.
  "io-learned": {"preprocessing": "learned", "embed_channels": 256},
  "io-fourier": {},
  "io-conv": {"preprocessing": "conv", "max_resolution": 56},
}
