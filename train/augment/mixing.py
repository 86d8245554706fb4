"""MixUp and CutMix, as pure functions on the device: images and targets mixed in pairs.

The image at place p of the global batch is mixed with that at place p ^ 1: 0 with 1, 2 with 3. What
is drawn for a pair depends only on the key and p // 2, so neither devices nor microbatches change a
mixture.
Letters: B batch, P = B / 2 pairs, S image_size, C classes or colour channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

Array = jax.Array


class Mixing(NamedTuple):
  """How images are mixed: the knobs of `config.augment` with these names."""

  mixup: float  # alpha of MixUp; 0: no MixUp
  cutmix: float  # alpha of CutMix; 0: no CutMix
  mix_probability: float  # of a pair to be mixed


def options(config: ConfigDict) -> Mixing | None:
  """What a run's config asks for; None: nothing is mixed."""
  mixing = Mixing(**{name: config.augment[name] for name in Mixing._fields})
  return mixing if mixing.mixup or mixing.cutmix else None


def mix(
  images: Array, targets: Array, key: Array, positions: Array, mask: Array, mixing: Mixing
) -> tuple[Array, Array]:
  """Mixes each image with its neighbour, and their targets in the same proportion.

  Both of a pair are mixed with the same numbers: where one keeps lambda of itself and takes
  1 - lambda of the other, so does the other. If both kinds are on, half of the mixed pairs are
  CutMix. A pair with a masked example stays as it is.

  Args:
    images: float32 [B, S, S, C], as augmented.
    targets: float32 [B, C].
    key: PRNG key of the step.
    positions: int [B], consecutive positions in the global batch, the first one even; B is even.
    mask: bool [B]; False for padding.
  Returns:
    Images and targets.
  MixUp follows Zhang et al. (arXiv:1710.09412), CutMix Yun et al. (arXiv:1905.04899).
  """
  own_PxSxS = draw_shares(key, positions[::2] // 2, images.shape[1], mixing)
  both_P = mask.reshape(-1, 2).all(1)
  own_PxSxS = jnp.where(both_P[:, None, None], own_PxSxS, 1.0)
  return (
    _blend(images, own_PxSxS[:, None, :, :, None]),
    _blend(targets, own_PxSxS.mean((1, 2))[:, None, None]),
  )


def draw_shares(key: Array, pairs: Array, size: int, mixing: Mixing) -> Array:
  """The share that an image of a pair keeps of each of its pixels; its partner gives the rest.

  MixUp keeps lambda ~ Beta(alpha, alpha) everywhere. CutMix keeps all but a box of sides
  S sqrt(1 - lambda), whose centre is uniform over the pixels and which is cut at the border; the
  mean of the shares is what is really kept.

  Args:
    pairs: int [P], p // 2 of each pair.
    size: S.
  Returns:
    float32 [P, S, S], or [P, 1, 1] without CutMix.
  """
  cutmix_probability = 0.5 if mixing.mixup and mixing.cutmix else float(mixing.cutmix > 0)

  def draw(pair: Array) -> Array:
    return jax.random.uniform(jax.random.fold_in(key, pair), (6,))

  mixed_P, kind_P, top_P, left_P, u_P, v_P = jax.vmap(draw)(pairs).T
  is_mixed_P, is_cutmix_P = mixed_P < mixing.mix_probability, kind_P < cutmix_probability
  kept_P = symmetric_beta(u_P, v_P, jnp.where(is_cutmix_P, mixing.cutmix, mixing.mixup))
  shares = kept_P[:, None, None]
  if mixing.cutmix:
    # As in the paper's code, a box has sides of an even number of pixels.
    half_P = jnp.floor(size * jnp.sqrt(1 - kept_P) / 2)
    rows_PxS, columns_PxS = _inside(top_P, half_P, size), _inside(left_P, half_P, size)
    outside_PxSxS = 1.0 - rows_PxS[:, :, None] * columns_PxS[:, None, :]
    shares = jnp.where(is_cutmix_P[:, None, None], outside_PxSxS, shares)
  return jnp.where(is_mixed_P[:, None, None], shares, 1.0)


def symmetric_beta(u: Array, v: Array, alpha: Array) -> Array:
  """Draws from Beta(alpha, alpha), made of two uniform numbers; nothing is rejected.

  t = sqrt(2 alpha (u^(-1 / alpha) - 1)) cos(2 pi v) has Student's distribution with 2 alpha degrees
  of freedom (Bailey, Mathematics of Computation 62, 1994), and 1/2 + t / (2 sqrt(2 alpha + t^2))
  is the draw (Devroye, "Random variate generation in one line of code", 1996). Both are written
  with w = u^(1 / alpha), which does not overflow.

  Args:
    u, v: float32 in [0, 1).
    alpha: above 0.
  """
  w, c = u ** (1 / alpha), jnp.cos(2 * jnp.pi * v)
  return 0.5 + 0.5 * c * jnp.sqrt((1 - w) / (w + c**2 * (1 - w)))


def _inside(centre: Array, half: Array, size: int) -> Array:
  """1 at the pixels of an axis within `half` of the centre (a fraction of the axis), else 0."""
  offset = jnp.arange(size) - jnp.floor(centre * size)[:, None]
  return ((-half[:, None] <= offset) & (offset < half[:, None])).astype(jnp.float32)


def _blend(values: Array, own: Array) -> Array:
  """own * values + (1 - own) * their partners'; values [B, ...], own [P, 1, ...]."""
  pairs = values.reshape(-1, 2, *values.shape[1:])
  return (own * pairs + (1 - own) * pairs[:, ::-1]).reshape(values.shape)
