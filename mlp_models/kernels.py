"""The models' maths laid out for a platform: derivatives by hand, products turned round.

A reader of the models may skip this file. The first line of each docstring is the function's
definition; the rest says how it is computed. docs/performance.md has what each form gains, under
the function's name. Only this file asks for the platform.

Shapes: B batch, N heads, T S tokens, K head width, D F widths, E = D + 1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mlp_models import dropout

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
# Accelerators round what they multiply to bfloat16 or TF32, unless told otherwise.
_exact_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _by_platform(*operands: Any, default: Callable[..., Array], **others: Any) -> Array:
  """One of several functions of the operands, by the platform that is compiled for."""
  result: Array = jax.lax.platform_dependent(*operands, default=default, **others)
  return result


# Dense layers.


def dense(x: Array, kernel: Array, dimension_numbers: object = None, **options: Any) -> Array:
  """tensordot(x, kernel, 1): [..., D] times [D, ...], with the arguments of `lax.dot_general`.

  Flattened to a 2-D product so that the gradients are 2-D products as well: with batch and tokens
  apart, XLA on a CPU takes a slower way to the kernel's gradient.

  Raises:
    ValueError: `dimension_numbers` other than those of nn.Dense.
  """
  if dimension_numbers not in (None, (((x.ndim - 1,), (0,)), ((), ()))):
    raise ValueError(f"only the dimension numbers of nn.Dense are known, not {dimension_numbers}")
  rows, kernel_DxF = x.reshape(-1, x.shape[-1]), kernel.reshape(kernel.shape[0], -1)
  if isinstance(rows.shape[0], int) and rows.shape[0] < kernel_DxF.shape[1]:
    rows = _gradient_in_columns(rows)
  product = jax.lax.dot_general(rows, kernel_DxF, (((1,), (0,)), ((), ())), **options)
  return product.reshape(*x.shape[:-1], *kernel.shape[1:])


@jax.custom_vjp
def _gradient_in_columns(x: Array) -> Array:
  """x itself; on a CPU its gradient [R, D] is computed as [D, R]."""
  return x


def _in_columns(gradient: Array) -> Array:
  # The kernel times columns instead of rows times the transposed kernel, of which XLA would make a
  # copy. The barrier keeps XLA from turning the product round again.
  columns: Array = jax.lax.optimization_barrier(gradient.T)
  return columns.T


_gradient_in_columns.defvjp(
  lambda x: (x, None),
  lambda _, gradient: (_by_platform(gradient, cpu=_in_columns, default=lambda g: g),),
)


def token_dense(kernel_TxS: Array, x_BxTxD: Array) -> Array:
  """einsum("ts,btd->bsd"): a dense layer's product over the tokens."""
  return _by_platform(kernel_TxS, x_BxTxD, cpu=_mix_each, default=_mix_all)


def _mix_each(kernel_TxS: Array, x_BxTxD: Array) -> Array:
  # One small product an example, forward and backward, and nothing is transposed. Each example has
  # a kernel of its own, and a gradient of it: little in a CPU's microbatch, much in an
  # accelerator's batch.
  kernel_BxTxS = jnp.broadcast_to(kernel_TxS, (x_BxTxD.shape[0], *kernel_TxS.shape))
  return jnp.einsum("bts,btd->bsd", kernel_BxTxS, x_BxTxD)


def _mix_all(kernel_TxS: Array, x_BxTxD: Array) -> Array:
  return jnp.einsum("ts,btd->bsd", kernel_TxS, x_BxTxD)


# Normalisation.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def standardize(x: Array, epsilon: float = 1e-6) -> Array:
  """(x - mean) / sqrt(variance + epsilon) over the last axis.

  The derivative is written by hand: XLA on a CPU computes the one that JAX derives anew in each
  fusion that reads it. The variance is E[x^2] - E[x]^2, as by default in Flax: x is read once.
  """
  return _standardize_forward(x, epsilon)[0]


def _standardize_forward(x: Array, epsilon: float) -> tuple[Array, tuple[Array, Array, Array]]:
  mean = x.mean(axis=-1, keepdims=True)
  variance = (x * x).mean(axis=-1, keepdims=True) - mean * mean
  factor = jax.lax.rsqrt(jnp.maximum(variance, 0) + epsilon)
  return (x - mean) * factor, (x, mean, factor)


def _standardize_backward(
  epsilon: float, kept: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array]:
  del epsilon
  x, mean, factor = kept
  y = (x - mean) * factor
  along_y = (gradient * y).mean(axis=-1, keepdims=True)
  return (factor * (gradient - gradient.mean(axis=-1, keepdims=True) - y * along_y),)


standardize.defvjp(_standardize_forward, _standardize_backward)


# The Fourier transform.


@jax.custom_vjp
def real_fft2(x_BxTxD: Array) -> Array:
  """fft2(x).real over the last two axes, in float32 inside: there is no transform in bfloat16.

  Half of a real input's frequencies are the mirror image of the other half: frequencies (k, l) and
  (-k, -l) have the same real part. Only one half is computed.
  """
  width = x_BxTxD.shape[-1]
  half = jnp.fft.rfft2(x_BxTxD.astype(jnp.float32)).real
  # Reversing takes row k to T-1-k, and rolling from there to -k modulo T.
  mirrored = jnp.roll(half[:, ::-1, (width - 1) // 2 : 0 : -1], 1, axis=1)
  return jnp.concatenate([half, mirrored], axis=-1).astype(x_BxTxD.dtype)


# The transform is a symmetric matrix, and so its own transpose.
real_fft2.defvjp(lambda x: (real_fft2(x), None), lambda _, gradient: (real_fft2(gradient),))


# Attention.


def attention(
  query_BxTxNxK: Array,
  key_BxSxNxK: Array,
  value_BxSxNxK: Array,
  seeds_B: Array | None,
  rate: float,
) -> Array:
  """drop(softmax(query @ key^T / sqrt(K))) @ value in each head, [B, T, N, K].

  Where nothing is dropped, CUDA takes cuDNN's fused kernel, which keeps no array of [B, N, T, S];
  else, and on other platforms, it is `attend`.
  """
  operands = query_BxTxNxK, key_BxSxNxK, value_BxSxNxK
  is_alike = value_BxSxNxK.shape == key_BxSxNxK.shape
  if (seeds_B is None or rate == 0) and is_alike and _fits_cudnn(query_BxTxNxK):
    plain = functools.partial(_attend_heads, seeds_B=None, rate=rate)
    return _by_platform(*operands, cuda=_attend_fused, default=plain)
  return _attend_heads(*operands, seeds_B, rate)


def _fits_cudnn(query_BxTxNxK: Array) -> bool:
  """Whether this machine's cuDNN takes such heads. JAX raises where it does not, so ask first."""
  *sizes, head_dim = query_BxTxNxK.shape
  if query_BxTxNxK.dtype != jnp.bfloat16 or head_dim % 8 or head_dim > 128:
    return False
  if not all(isinstance(size, int) for size in sizes):  # in an export the batch size is a symbol
    return False
  device = jax.devices()[0]
  is_cuda = device.platform == "gpu" and "cuda" in device.client.platform_version
  return is_cuda and float(device.compute_capability) >= 8


def _attend_fused(
  query_BxTxNxK: Array, key_BxSxNxK: Array, value_BxSxNxK: Array, implementation: Any = "cudnn"
) -> Array:
  fused = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
  B, T = query_BxTxNxK.shape[:2]
  S = key_BxSxNxK.shape[1]
  if T % 2 == 0 and S % 2 == 0:
    return fused(query_BxTxNxK, key_BxSxNxK, value_BxSxNxK)
  # JAX refuses the gradient of odd numbers of tokens, such as 196 patches and a class token. One
  # more is cut out by the lengths.
  padded = (
    jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
    for x in (query_BxTxNxK, key_BxSxNxK, value_BxSxNxK)
  )
  lengths = {"query_seq_lengths": jnp.full(B, T), "key_value_seq_lengths": jnp.full(B, S)}
  return fused(*padded, **lengths)[:, :T]


def _attend_heads(
  query_BxTxNxK: Array,
  key_BxSxNxK: Array,
  value_BxSxNxK: Array,
  seeds_B: Array | None,
  rate: float,
) -> Array:
  query_BxNxTxK, key_BxNxSxK, value_BxNxSxK = (
    heads.swapaxes(1, 2) for heads in (query_BxTxNxK, key_BxSxNxK, value_BxSxNxK)
  )
  query_BxNxTxK = query_BxNxTxK * query_BxNxTxK.shape[-1] ** -0.5
  # Masks count tokens before heads, as the form for wide heads does: no platform has its own.
  axes = (2, 1, 3)
  out_BxNxTxK = attend(query_BxNxTxK, key_BxNxSxK, value_BxNxSxK, seeds_B, rate, axes)
  return out_BxNxTxK.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(
  query_BxNxTxK: Array,
  key_BxNxSxK: Array,
  value_BxNxSxK: Array,
  seeds_B: Array | None,
  rate: float,
  axes: Sequence[int] | None = None,
) -> Array:
  """drop(softmax(query @ key^T)) @ value; `seeds_B`, `rate` and `axes` are those of `dropout.drop`.

  The derivative is written by hand: it keeps one array of [B, N, T, S], not three. The softmax is
  divided on [B, N, T, K], after the product with the values, and the mean that its derivative
  subtracts is the product of output and gradient (FlashAttention, arXiv:2205.14135, appendix B.2;
  dropout changes nothing in it). Sums and exponents are float32.
  """
  return _attend_forward(query_BxNxTxK, key_BxNxSxK, value_BxNxSxK, seeds_B, rate, axes)[0]


class _Kept(NamedTuple):
  """What `attend` keeps for its gradient."""

  inputs: tuple[Array, Array, Array, Array | None]
  exps_BxNxTxS: Array
  sums_BxNxTx1: Array
  out_BxNxTxK: Array


def _attend_forward(
  query_BxNxTxK: Array,
  key_BxNxSxK: Array,
  value_BxNxSxK: Array,
  seeds_B: Array | None,
  rate: float,
  axes: Sequence[int] | None,
) -> tuple[Array, _Kept]:
  dtype = query_BxNxTxK.dtype
  scores_BxNxTxS = _product("bntk,bnsk->bnts", query_BxNxTxK, key_BxNxSxK)
  exps_BxNxTxS = jnp.exp(scores_BxNxTxS - scores_BxNxTxS.max(axis=-1, keepdims=True))
  sums_BxNxTx1 = exps_BxNxTxS.sum(axis=-1, keepdims=True)
  exps_BxNxTxS = exps_BxNxTxS.astype(dtype)
  dropped_BxNxTxS = dropout.drop(exps_BxNxTxS, seeds_B, rate, axes)
  out_BxNxTxK = _product("bnts,bnsk->bntk", dropped_BxNxTxS, value_BxNxSxK) / sums_BxNxTx1
  out_BxNxTxK = out_BxNxTxK.astype(dtype)
  inputs = query_BxNxTxK, key_BxNxSxK, value_BxNxSxK, seeds_B
  return out_BxNxTxK, _Kept(inputs, exps_BxNxTxS, sums_BxNxTx1, out_BxNxTxK)


def _attend_backward(
  rate: float, axes: Sequence[int] | None, kept: _Kept, grad_BxNxTxK: Array
) -> tuple[Array, Array, Array, None]:
  (query_BxNxTxK, key_BxNxSxK, value_BxNxSxK, seeds_B), exps_BxNxTxS, sums_BxNxTx1, out = kept
  dtype = query_BxNxTxK.dtype
  grad_BxNxTxK = grad_BxNxTxK / sums_BxNxTx1
  means_BxNxTx1 = _sum_last(grad_BxNxTxK * out)
  grad_BxNxTxK = grad_BxNxTxK.astype(dtype)
  weights_BxNxTxS = _product("bntk,bnsk->bnts", grad_BxNxTxK, value_BxNxSxK)
  weights_BxNxTxS = dropout.drop(weights_BxNxTxS, seeds_B, rate, axes)
  scores_BxNxTxS = (exps_BxNxTxS * (weights_BxNxTxS - means_BxNxTx1)).astype(dtype)
  dropped_BxNxTxS = dropout.drop(exps_BxNxTxS, seeds_B, rate, axes)
  return (
    jnp.einsum("bnts,bnsk->bntk", scores_BxNxTxS, key_BxNxSxK),
    jnp.einsum("bnts,bntk->bnsk", scores_BxNxTxS, query_BxNxTxK),
    jnp.einsum("bnts,bntk->bnsk", dropped_BxNxTxS, grad_BxNxTxK),
    None,
  )


attend.defvjp(_attend_forward, _attend_backward)


def _sum_last(x: Array) -> Array:
  """x.sum(axis=-1, keepdims=True); on a CPU a product with ones, because XLA's sum is slow."""

  def product(x: Array) -> Array:
    return _exact_product("...k,kl->...l", x, jnp.ones((x.shape[-1], 1), x.dtype))

  return _by_platform(x, cpu=product, default=lambda x: x.sum(-1, keepdims=True))


class AttentionWeights(NamedTuple):
  """Kernels and biases of self-attention, float32: into heads, and out of them."""

  query: tuple[Array, Array]  # [D, N, K] and [N, K]
  key: tuple[Array, Array]
  value: tuple[Array, Array]
  out: tuple[Array, Array]  # [N, K, D] and [D]


SelfAttention = Callable[[Array, AttentionWeights, Array | None, float], Array]


def with_wide_heads(plain: SelfAttention) -> SelfAttention:
  """`plain`, for heads at least as wide as the model; on a CPU computed `_over_tokens`."""

  def self_attention(
    x_BxTxD: Array, weights: AttentionWeights, seeds_B: Array | None, rate: float
  ) -> Array:
    return _by_platform(
      x_BxTxD,
      weights,
      seeds_B,
      cpu=lambda x, weights, seeds: _over_tokens(x, weights, seeds, rate),
      default=lambda x, weights, seeds: plain(x, weights, seeds, rate),
    )

  return self_attention


def _over_tokens(
  x_BxTxD: Array, weights: AttentionWeights, seeds_B: Array | None, rate: float
) -> Array:
  """Self-attention whose keys and values are the tokens, so that it takes fewer operations.

  The kernels are multiplied with each other before they meet the tokens, (x Q)(x K)^T = (x QK^T)
  x^T, and likewise values and output. The queries of all heads are rows of one attention.
  """
  B, T, D = x_BxTxD.shape
  _, N, K = weights.query[0].shape
  # With a one after a token's channels, a bias is a kernel's last row. The keys' is left out: it
  # adds the same to all scores of a query, which softmax does not notice.
  x_BxTxE = jnp.pad(x_BxTxD, ((0, 0), (0, 0), (0, 1)), constant_values=1)
  query_ExNxK, value_ExNxK = (
    jnp.concatenate([kernel, bias[None]]) for kernel, bias in (weights.query, weights.value)
  )
  key_DxNxK, (out_NxKxD, bias_D) = weights.key[0] * K**-0.5, weights.out
  into_ExNxD = _exact_product("enk,dnk->end", query_ExNxK, key_DxNxK).astype(x_BxTxD.dtype)
  from_NxExD = _exact_product("enk,nkd->ned", value_ExNxK, out_NxKxD).astype(x_BxTxD.dtype)

  query_Bx1xTNxD = dense(x_BxTxE, into_ExNxD).reshape(B, 1, -1, D)
  x_Bx1xTNxE = attend(query_Bx1xTNxD, x_BxTxD[:, None], x_BxTxE[:, None], seeds_B, rate)
  x_BxTxNE = x_Bx1xTNxE.reshape(B, T, -1)
  return dense(x_BxTxNE, from_NxExD.reshape(-1, D)) + bias_D.astype(x_BxTxD.dtype)
