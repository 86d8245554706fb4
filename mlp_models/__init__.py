"""Attention-free and attention-light image classifiers in Flax.

model = mlp_models.create("mixer", num_classes=10)
params = model.init(jax.random.key(0), images)["params"]
logits = model.apply({"params": params}, images)
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mlp_models import keras_weights as keras_weights
from mlp_models.fnet import FNet
from mlp_models.gmlp import GMLP
from mlp_models.layers import POOLS
from mlp_models.mixer import Mixer
from mlp_models.perceiver import Perceiver
from mlp_models.vit import ViT

__version__ = "0.3.0"

_CLASSES: dict[str, type[nn.Module]] = {
  "mixer": Mixer,
  "fnet": FNet,
  "gmlp": GMLP,
  "perceiver": Perceiver,
  "vit": ViT,
}
MODELS = tuple(_CLASSES)


def create(name: str, **overrides: Any) -> nn.Module:
  """Makes a model with the sizes of its Keras example, for 100 classes.

  Args:
    name: one of MODELS.
    **overrides: fields of the model's class, e.g. `num_classes=10`; `dtype` ("float32" or
      "bfloat16", also as a dtype) is what it computes in, `remat=True` saves memory in training: a
      block's inputs are kept, and the rest is computed again for the gradients.
  Returns:
    A Flax module. `model.apply({"params": params}, images, train=False, positions=None)` takes
    float images [B, image_size, image_size, C], normalised, and returns float32 logits
    [B, num_classes]. With `train=True` it needs `rngs={"dropout": key}`; `positions` (int32 [B],
    default 0, 1, ..., B-1) is each image's place in the global batch, on which its dropout depends.
  Raises:
    ValueError: an unknown name or field, a value out of range, or sizes that do not fit together.
  """
  if name not in MODELS:
    raise ValueError(f"unknown model {name!r}; {_suggest(name, MODELS)}")
  defaults = {
    field.name: field.default
    for field in dataclasses.fields(_CLASSES[name])
    if field.name not in ("parent", "name")
  }
  for field, value in overrides.items():
    if field not in defaults:
      raise ValueError(f"{name} has no field {field!r}; {_suggest(field, defaults)}")
    overrides[field] = _checked(field, value, defaults[field])
  model = _CLASSES[name](**overrides)
  _check_that_sizes_fit(model)
  return model


def _suggest(word: str, known: Iterable[str]) -> str:
  nearest = difflib.get_close_matches(word, known, n=1)
  return f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"


def _checked(field: str, value: Any, default: Any) -> Any:
  """The value in the form that the module takes."""
  if field == "dtype":
    for dtype in (jnp.float32, jnp.bfloat16):
      if value in (dtype, jnp.dtype(dtype), dtype.__name__):
        return dtype
    raise ValueError(f"dtype is {value!r}, it must be float32 or bfloat16")
  if field == "remat":
    if not isinstance(value, bool):
      raise ValueError(f"remat is {value!r}, it must be True or False")
  elif field.endswith("_rate"):
    if not isinstance(value, int | float) or not 0 <= value < 1:
      raise ValueError(f"{field} is {value!r}, it must be at least 0 and less than 1")
  elif isinstance(default, tuple):
    value = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(_is_size(units) for units in value):
      raise ValueError(f"{field} is {value!r}, it must hold positive integers")
  elif isinstance(default, int) and not _is_size(value):
    raise ValueError(f"{field} is {value!r}, it must be a positive integer")
  return value


def _check_that_sizes_fit(model: nn.Module) -> None:
  """Raises ValueError unless patches tile the image and residuals can be added."""
  size = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
  if size["image_size"] % size["patch_size"]:
    raise ValueError(
      f"image_size {size['image_size']} is not a multiple of patch_size {size['patch_size']}"
    )
  for field in ("mlp_units", "ffn_units"):  # of MLPs whose output is added to their input
    units = size.get(field)
    if units is not None and units[-1:] != (size["width"],):
      raise ValueError(
        f"{field} {units} must end in width {size['width']}: its output joins a residual"
      )
  if size.get("pool", POOLS[0]) not in POOLS:
    raise ValueError(f"unknown pool {size['pool']!r}, known are {', '.join(POOLS)}")


def _is_size(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0
