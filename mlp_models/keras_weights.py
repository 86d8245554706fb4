"""Weights by canonical name, to and from Flax parameters.

A canonical name is a parameter's path ("block0/norm/scale"). Arrays are as in Keras: kernels
[in, out], attention kernels [D, N, K] and, for the last, [N, K, D].

Names and shapes are checked against `jax.eval_shape(model.init)` of a model with as many layers and
with sizes that are all different: where it has the same number, the weights must have one size.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike

from mlp_models.fnet import FNet
from mlp_models.gmlp import GMLP
from mlp_models.mixer import Mixer
from mlp_models.perceiver import Perceiver
from mlp_models.vit import ViT

Shapes = dict[str, tuple[int, ...]]  # by canonical name

# Sizes of the models to compare with. With 49 tokens of 75 values, all axes that differ in meaning
# differ in length, too.
_IMAGE_SIZE, _WIDTH, _LATENTS, _HEADS, _HEAD_DIM = 35, 101, 11, 3, 13
_SIZES: dict[str, Any] = {
  "image_size": _IMAGE_SIZE,
  "patch_size": 5,
  "width": _WIDTH,
  "num_classes": 103,
}


def _hidden(first: int, depth: int) -> tuple[int, ...]:
  """Units of the hidden layers of an MLP with `depth` layers."""
  return tuple(range(first, first + depth - 1))


# Each makes a model from a function that counts the layers whose names begin with a stem.
_MODELS: dict[str, Callable[[Callable[[str], int]], nn.Module]] = {
  "mixer": lambda count: Mixer(**_SIZES, num_blocks=count("block")),
  "fnet": lambda count: FNet(**_SIZES, num_blocks=count("block")),
  "gmlp": lambda count: GMLP(**_SIZES, num_blocks=count("block")),
  "perceiver": lambda count: Perceiver(
    **_SIZES,
    num_blocks=count("latent/block"),
    num_latents=_LATENTS,
    num_heads=_HEADS,
    ffn_units=(*_hidden(301, count("cross/ffn/dense")), _WIDTH),
  ),
  "vit": lambda count: ViT(
    **_SIZES,
    num_blocks=count("block"),
    num_heads=_HEADS,
    head_dim=_HEAD_DIM,
    mlp_units=(*_hidden(301, count("block0/mlp/dense")), _WIDTH),
    head_units=_hidden(401, count("head_mlp/dense") + 1),
  ),
}


def to_params(name: str, weights: Mapping[str, ArrayLike]) -> dict[str, Any]:
  """Turns weights by canonical name into Flax parameters, at any size.

  Args:
    name: one of `mlp_models.MODELS`.
    weights: arrays by canonical name, of any float dtype.
  Returns:
    Nested dictionaries of float32 arrays, the "params" of `mlp_models.create(name, ...)`.
  Raises:
    ValueError: an array is missing, is one too many, holds no real numbers, or has a shape that
      does not fit the others.
  """
  arrays = {key: _array(name, key, w) for key, w in weights.items()}
  _check(name, {key: w.shape for key, w in arrays.items()})
  arrays = {key: jnp.asarray(w, jnp.float32) for key, w in arrays.items()}
  params: dict[str, Any] = unflatten_dict(arrays, sep="/")
  return params


def from_params(name: str, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Turns Flax parameters into weights by canonical name: the inverse of `to_params`.

  Raises:
    ValueError: as `to_params`.
  """
  weights = {key: np.asarray(w) for key, w in flatten_dict(params, sep="/").items()}
  _check(name, {key: w.shape for key, w in weights.items()})
  return weights


def _array(name: str, key: str, weights: ArrayLike) -> Any:
  try:
    array = weights if isinstance(weights, jax.Array) else np.asarray(weights)
  except ValueError as error:  # nested lists of different lengths
    raise ValueError(f"{name} weights {key!r}: {error}") from None
  if not jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.kind not in "iub":
    raise ValueError(f"{name} weights {key!r} have the type {array.dtype}, expected numbers")
  return array


def _check(name: str, shapes: Shapes) -> None:
  if name not in _MODELS:
    raise ValueError(f"unknown model {name!r}, known are {', '.join(_MODELS)}")
  template = _template(_MODELS[name](lambda stem: _count(stem, shapes)))
  for key in template:
    if key not in shapes:
      raise ValueError(f"{name} weights lack {key}")
  for key in shapes:
    if key not in template:
      raise ValueError(f"{name} has no weights {key}")

  # The size that most axes have is taken for the right one, so that the odd one out is named.
  votes: dict[int, Counter[int]] = {}
  for key, shape in template.items():
    for number, size in zip(shape, shapes[key], strict=False):
      votes.setdefault(number, Counter())[size] += 1
  sizes = {number: counts.most_common(1)[0][0] for number, counts in votes.items()}
  if 2 * _WIDTH in sizes:  # gMLP's hidden layer
    sizes[2 * _WIDTH] = 2 * sizes[_WIDTH]
  for key, shape in template.items():
    expected = tuple(sizes.get(number, number) for number in shape)
    if shapes[key] != expected:
      raise ValueError(f"{name} weights {key} have shape {shapes[key]}, expected {expected}")


@functools.cache
def _template(model: nn.Module) -> Shapes:
  images = jax.ShapeDtypeStruct((1, _IMAGE_SIZE, _IMAGE_SIZE, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  shapes = {key: leaf.shape for key, leaf in flatten_dict(params, sep="/").items()}
  # Kernels first: of two sizes with as many votes the first is taken, and biases have fewer axes.
  return dict(sorted(shapes.items(), key=lambda item: -len(item[1])))


def _count(stem: str, names: Mapping[str, Any]) -> int:
  """How many layers or blocks are numbered from `stem`0 on, without a gap; at least one."""
  number = 1
  while any(name.startswith(f"{stem}{number}/") for name in names):
    number += 1
  return number
