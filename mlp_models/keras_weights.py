"""Weights by canonical name, to and from Flax parameters.

A canonical name is a parameter's path ("block0/norm/scale"). The layouts below say which arrays a
model has and how their sizes hang together, in letters: axes with the same letter are equally long.
Arrays are as in Keras: kernels [in, out], attention kernels [D, N, K] and, for the last, [N, K, D].

C classes, D width, F G H hidden units, K head width, L latents, N heads, P values in a patch,
S what ViT's head reads, T tokens.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike

Layout = dict[str, tuple[str, ...]]  # name -> a letter for each axis


def to_params(name: str, weights: Mapping[str, ArrayLike]) -> dict[str, Any]:
  """Turns weights by canonical name into Flax parameters, at any size.

  Args:
    name: one of `mlp_models.MODELS`.
    weights: arrays by canonical name, of any float dtype.
  Returns:
    Nested dictionaries of float32 arrays, the "params" of `mlp_models.create(name, ...)`.
  Raises:
    ValueError: an array is missing, is one too many, or has a shape that does not fit the others.
  """
  _check(name, weights)
  return unflatten_dict({key: jnp.asarray(w, jnp.float32) for key, w in weights.items()}, sep="/")


def from_params(name: str, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Turns Flax parameters into weights by canonical name: the inverse of `to_params`.

  Raises:
    ValueError: as `to_params`.
  """
  weights = {key: np.asarray(w) for key, w in flatten_dict(params, sep="/").items()}
  _check(name, weights)
  return weights


def _check(name: str, weights: Mapping[str, ArrayLike]) -> None:
  if name not in _LAYOUTS:
    raise ValueError(f"unknown model {name!r}, known are {', '.join(_LAYOUTS)}")
  layout = _LAYOUTS[name](lambda stem: _count(stem, weights))
  for key in layout:
    if key not in weights:
      raise ValueError(f"{name} weights lack {key}")
  for key in weights:
    if key not in layout:
      raise ValueError(f"{name} has no weights {key}")

  # A letter's size is the one that most axes have, so that the odd one out is named.
  shapes = {key: np.shape(weights[key]) for key in layout}
  votes: dict[str, Counter[int]] = {}
  for key, letters in layout.items():
    for letter, size in zip(letters, shapes[key], strict=False):
      votes.setdefault(letter, Counter())[size] += 1
  sizes = {letter: counts.most_common(1)[0][0] for letter, counts in votes.items()}
  if "2D" in sizes:
    sizes["2D"] = 2 * sizes["D"]
  for key, letters in layout.items():
    expected = tuple(sizes.get(letter, letter) for letter in letters)
    if shapes[key] != expected:
      raise ValueError(f"{name} weights {key} have shape {shapes[key]}, expected {expected}")


def _count(stem: str, weights: Mapping[str, ArrayLike]) -> int:
  """How many layers or blocks are numbered from `stem`0 on, without a gap; at least one."""
  number = 1
  while any(key.startswith(f"{stem}{number}/") for key in weights):
    number += 1
  return number


def _dense(name: str, *shape: str, bias_axes: int = 1) -> Layout:
  """A kernel and its bias, which has the kernel's last axes."""
  return {f"{name}/kernel": shape, f"{name}/bias": shape[-bias_axes:]}


def _norm(name: str) -> Layout:
  return {f"{name}/scale": ("D",), f"{name}/bias": ("D",)}


def _mlp(name: str, inputs: str, hidden: str, outputs: str, depth: int) -> Layout:
  """Layers dense0, dense1, ...; each hidden size has a letter of its own, `hidden` and a number."""
  units = [inputs, *(f"{hidden}{i}" for i in range(depth - 1)), outputs]
  layout: Layout = {}
  for i in range(depth):
    layout |= _dense(f"{name}/dense{i}", units[i], units[i + 1])
  return layout


def _attention(name: str) -> Layout:
  return (
    _dense(f"{name}/query", "D", "N", "K", bias_axes=2)
    | _dense(f"{name}/key", "D", "N", "K", bias_axes=2)
    | _dense(f"{name}/value", "D", "N", "K", bias_axes=2)
    | _dense(f"{name}/out", "N", "K", "D")
  )


def _mixer(count: Callable[[str], int]) -> Layout:
  layout = _dense("patch_embed", "P", "D") | _dense("head", "D", "C")
  for i in range(count("block")):
    layout |= (
      _norm(f"block{i}/norm")
      | _dense(f"block{i}/token_mlp/in", "T", "T")
      | _dense(f"block{i}/token_mlp/out", "T", "T")
      | _dense(f"block{i}/channel_mlp/in", "D", "T")
      | _dense(f"block{i}/channel_mlp/out", "T", "D")
    )
  return layout


def _fnet(count: Callable[[str], int]) -> Layout:
  layout = _dense("patch_embed", "P", "D") | _dense("head", "D", "C")
  layout["position/embedding"] = ("T", "D")
  for i in range(count("block")):
    layout |= (
      _norm(f"block{i}/norm1")
      | _norm(f"block{i}/norm2")
      | _dense(f"block{i}/ffn/in", "D", "D")
      | _dense(f"block{i}/ffn/out", "D", "D")
    )
  return layout


def _gmlp(count: Callable[[str], int]) -> Layout:
  layout = _dense("patch_embed", "P", "D") | _dense("head", "D", "C")
  for i in range(count("block")):
    layout |= (
      _norm(f"block{i}/norm1")
      | _norm(f"block{i}/norm2")
      | _dense(f"block{i}/proj_in", "D", "2D")
      | _dense(f"block{i}/proj_out", "D", "D")
      | _dense(f"block{i}/spatial", "T", "T")
    )
  return layout


def _perceiver(count: Callable[[str], int]) -> Layout:
  depth = count("cross/ffn/dense")
  layout = (
    _dense("patch_embed", "P", "D")
    | {"position/embedding": ("T", "D"), "latents": ("L", "D")}
    | _norm("cross/norm_latents")
    | _norm("cross/norm_data")
    | _dense("cross/query", "D", "D")
    | _dense("cross/key", "D", "D")
    | _dense("cross/value", "D", "D")
    | {"cross/score/scale": ()}
    | _norm("cross/norm_out")
    | _mlp("cross/ffn", "D", "F", "D", depth)
    | _mlp("head", "D", "F", "C", depth)
  )
  for i in range(count("latent/block")):
    layout |= (
      _norm(f"latent/block{i}/norm1")
      | _attention(f"latent/block{i}/attention")
      | _norm(f"latent/block{i}/norm2")
      | _mlp(f"latent/block{i}/ffn", "D", "F", "D", depth)
    )
  return layout


def _vit(count: Callable[[str], int]) -> Layout:
  layout = (
    _dense("patch_embed", "P", "D")
    | {"position/embedding": ("T", "D")}
    | _norm("norm")
    | _mlp("head_mlp", "S", "G", "H", count("head_mlp/dense"))
    | _dense("head", "H", "C")
  )
  for i in range(count("block")):
    layout |= (
      _norm(f"block{i}/norm1")
      | _attention(f"block{i}/attention")
      | _norm(f"block{i}/norm2")
      | _mlp(f"block{i}/mlp", "D", "F", "D", count("block0/mlp/dense"))
    )
  return layout


_LAYOUTS: dict[str, Callable[[Callable[[str], int]], Layout]] = {
  "mixer": _mixer,
  "fnet": _fnet,
  "gmlp": _gmlp,
  "perceiver": _perceiver,
  "vit": _vit,
}
