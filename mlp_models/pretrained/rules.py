"""How arrays of other projects become our parameters, and back: the parts of the tables.

A family's module beside this file has a `Layout` for each project: how its files are recognised,
which fields their shapes and config give, and a `Rule` for each array.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlp_models.layers import ImageSize, grid
from mlp_models.pretrained.errors import shape_words

Shapes = Mapping[str, tuple[int, ...]]  # of a file's arrays, by their names
Fields = dict[str, Any]  # of a model's class
Config = Mapping[str, Any]  # the content of the config.json beside the weights; {} if there is none


_TRANSFORMERS_GELUS = {
  "gelu": "exact",
  "gelu_new": "tanh",
  "gelu_fast": "tanh",
  "gelu_pytorch_tanh": "tanh",
}


class Rule(NamedTuple):
  """One of their arrays, and the parameters that it holds.

  ours: paths such as "block0/norm1/scale"; several where query, key and value are one array.
  to_ours: from theirs, and from those beside it.
  beside: names of others of their arrays that `to_ours` needs.
  """

  theirs: str
  ours: tuple[str, ...]
  to_ours: Callable[..., Sequence[np.ndarray]]
  to_theirs: Callable[[Sequence[np.ndarray]], np.ndarray]
  beside: tuple[str, ...] = ()


class Layout(NamedTuple):
  """The names and shapes in which a project keeps the weights of a family.

  fields: (shapes, config) -> the fields of the model's class, image_size, patch_size and
    num_classes (0 without a head) among them; also "assumed", names of fields that neither shapes
    nor config tell, and "notes", lines on what the config says. A ValueError says what can't be
    told.
  rules: (fields, shapes) -> all arrays of such a file. For `save`, shapes are {}, the usual file,
    or of what `unusual` says.
  """

  project: str  # "timm", "transformers" or "npz"
  family: str
  marks: tuple[str, ...]  # names of arrays that all files of this layout have, and no others
  fields: Callable[[Shapes, Config], Fields]
  rules: Callable[[Fields, Shapes], list[Rule]]
  prefixes: tuple[str, ...] = ()  # that names may begin with, all or those outside of the head
  ignored: tuple[str, ...] = ()  # regular expressions of arrays that a classifier does not use
  lacks: tuple[str, ...] = ()  # prefixes of our parameters that such files lack, besides the head's
  unusual: Callable[[Mapping[str, np.ndarray]], Shapes] = lambda params: {}  # of our parameters
  model: Callable[[Fields, Shapes], Any] | None = None  # -> `timm.Model`, of timm's layouts


def same(theirs: str, ours: str) -> Rule:
  """An array that both keep alike."""
  return Rule(theirs, (ours,), lambda x: [x], lambda x: x[0])


def reshaped(theirs: str, ours: str, their_shape: Sequence[int], our_shape: Sequence[int]) -> Rule:
  """An array with the same elements in the same order, such as one with axes of length 1."""
  return Rule(
    theirs, (ours,), lambda x: [x.reshape(our_shape)], lambda x: x[0].reshape(their_shape)
  )


def linear(theirs: str, ours: str) -> list[Rule]:
  """Weight [out, in] and bias of PyTorch's Linear, to a dense layer, also one over tokens."""
  return [
    Rule(f"{theirs}.weight", (f"{ours}/kernel",), lambda x: [x.T], lambda x: x[0].T),
    same(f"{theirs}.bias", f"{ours}/bias"),
  ]


def norm(theirs: str, ours: str) -> list[Rule]:
  """Weight and bias of PyTorch's LayerNorm."""
  return [
    same(f"{theirs}.weight", f"{ours}/scale"),
    same(f"{theirs}.bias", f"{ours}/bias"),
  ]


def conv_patches(theirs: str, ours: str, patch_size: int) -> list[Rule]:
  """PyTorch's convolution over patches, [D, C, P, P], to a dense layer over (P, P, C)."""

  def to_ours(x: np.ndarray) -> list[np.ndarray]:
    return [x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])]

  def to_theirs(x: Sequence[np.ndarray]) -> np.ndarray:
    kernel = x[0].reshape(patch_size, patch_size, -1, x[0].shape[-1])
    return kernel.transpose(3, 2, 0, 1)

  return [
    Rule(f"{theirs}.weight", (f"{ours}/kernel",), to_ours, to_theirs),
    same(f"{theirs}.bias", f"{ours}/bias"),
  ]


def into_heads(theirs: str, ours: Sequence[str], num_heads: int, bias: bool = True) -> list[Rule]:
  """PyTorch's Linear into one or several of query, key and value, to [D, N, K] and [N, K] each."""

  def weight_to_ours(x: np.ndarray) -> list[np.ndarray]:
    return [part.T.reshape(x.shape[1], num_heads, -1) for part in np.split(x, len(ours))]

  def weight_to_theirs(x: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([part.reshape(part.shape[0], -1).T for part in x])

  def bias_to_ours(x: np.ndarray) -> list[np.ndarray]:
    return [part.reshape(num_heads, -1) for part in np.split(x, len(ours))]

  def bias_to_theirs(x: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([part.ravel() for part in x])

  kernels, biases = (tuple(f"{name}/{leaf}" for name in ours) for leaf in ("kernel", "bias"))
  rules = [Rule(f"{theirs}.weight", kernels, weight_to_ours, weight_to_theirs)]
  if bias:
    rules.append(Rule(f"{theirs}.bias", biases, bias_to_ours, bias_to_theirs))
  return rules


def out_of_heads(theirs: str, ours: str, num_heads: int) -> list[Rule]:
  """PyTorch's Linear out of heads, [D, N * K], to [N, K, D]."""

  def to_ours(x: np.ndarray) -> list[np.ndarray]:
    return [x.T.reshape(num_heads, -1, x.shape[0])]

  def to_theirs(x: Sequence[np.ndarray]) -> np.ndarray:
    return x[0].reshape(-1, x[0].shape[-1]).T

  return [
    Rule(f"{theirs}.weight", (f"{ours}/kernel",), to_ours, to_theirs),
    same(f"{theirs}.bias", f"{ours}/bias"),
  ]


def transformers_gelu(config: Config, default: str) -> str:
  """The field `gelu` from transformers' hidden_act. Raises ValueError if it is none of gelu."""
  activation = config.get("hidden_act", default)
  if activation not in _TRANSFORMERS_GELUS:
    known = ", ".join(_TRANSFORMERS_GELUS)
    raise ValueError(f"hidden_act is {activation!r}, known are {known}")
  return _TRANSFORMERS_GELUS[activation]


def count(shapes: Shapes, pattern: str) -> int:
  """How many n from 0 on, without a gap, have arrays that begin with `pattern.format(n)`."""
  number = 0
  while any(name.startswith(pattern.format(number)) for name in shapes):
    number += 1
  return number


def oblong(shape: Any) -> tuple[int, int] | None:
  """(height, width) that differ; None for anything else."""
  if isinstance(shape, list | tuple) and shape[0] != shape[1]:
    return shape[0], shape[1]
  return None


def is_grid(num_tokens: int, patch_size: int, image_shape: tuple[int, int] | None) -> bool:
  """Whether so many tokens are the patches of an image, without a class token: see `image_size`.

  A square number plus 1 is never a square, so that no file is read in two ways.
  """
  return math.prod(_grid(num_tokens, patch_size, image_shape)) == num_tokens


def image_size(
  num_tokens: int, what: str, patch_size: int = 1, image_shape: tuple[int, int] | None = None
) -> ImageSize:
  """The image_size whose patches are so many tokens.

  Args:
    what: has the tokens, for the message.
    image_shape: (H, W) if they are known to differ; None: the image is a square.
  Raises:
    ValueError: the tokens are no square grid, or not that of image_shape.
  """
  rows, columns = _grid(num_tokens, patch_size, image_shape)
  if rows * columns != num_tokens:
    expected = f"are not {rows} x {columns}" if image_shape else "make no square grid"
    raise ValueError(f"{what} has {num_tokens} tokens, which {expected}")
  return (rows * patch_size, columns * patch_size) if image_shape else rows * patch_size


def _grid(num_tokens: int, patch_size: int, image_shape: tuple[int, int] | None) -> tuple[int, int]:
  side = math.isqrt(num_tokens)
  return grid(image_shape, patch_size) if image_shape else (side, side)


def apply(rules: Mapping[str, Rule], read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
  """Our parameters by path.

  Args:
    rules: by the names of their arrays in the file.
    read: gives an array of the file by its name.
  Raises:
    ValueError: an array has a shape that its rule can't take.
  """
  params: dict[str, np.ndarray] = {}
  for name, rule in rules.items():
    x, *beside = (read(each) for each in (name, *rule.beside))
    try:
      params |= zip(rule.ours, rule.to_ours(x, *beside), strict=True)
    except ValueError:
      raise ValueError(f"{name} is {shape_words(x.shape)}, which does not fit the others") from None
  return params


def invert(rules: Sequence[Rule], params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Their arrays by name, from our parameters by path: the inverse of `apply`."""
  return {rule.theirs: rule.to_theirs([params[path] for path in rule.ours]) for rule in rules}
