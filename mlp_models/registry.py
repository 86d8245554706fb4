"""The models and their variants by name."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mlp_models import (
  attention,
  fnet,
  gmlp,
  layers,
  mixer,
  perceiver,
  perceiver_io,
  perceiver_tokens,
  vit,
)

_Variants = dict[str, tuple[type[nn.Module], Mapping[str, Any]]]


def _variants_of(model: type[nn.Module], variants: Mapping[str, Mapping[str, Any]]) -> _Variants:
  return {variant: (model, fields) for variant, fields in variants.items()}


_MODELS: dict[str, _Variants] = {
  "mixer": _variants_of(mixer.Mixer, mixer.VARIANTS),
  "fnet": _variants_of(fnet.FNet, fnet.VARIANTS),
  "gmlp": _variants_of(gmlp.GMLP, gmlp.VARIANTS),
  "perceiver": _variants_of(perceiver.Perceiver, perceiver.VARIANTS)
  | _variants_of(perceiver_io.PerceiverIO, perceiver_io.VARIANTS),
  "vit": _variants_of(vit.ViT, vit.VARIANTS),
}
MODELS = tuple(_MODELS)
# The fields of each variant that differ from its class's defaults, by model and variant.
VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
  {
    name: MappingProxyType({variant: MappingProxyType(dict(f)) for variant, (_, f) in of.items()})
    for name, of in _MODELS.items()
  }
)

_CHOICES = {  # of fields that are words
  "pool": vit.POOLS,
  "position": vit.POSITIONS,
  "head_activation": vit.HEAD_ACTIVATIONS,
  "attention_init": attention.INITS,
  "gelu": layers.GELUS,
  "head_init": layers.HEAD_INITS,
  "spatial_init": gmlp.SPATIAL_INITS,
  "preprocessing": perceiver_tokens.PREPROCESSINGS,
  "readout": perceiver_io.READOUTS,
}


def create(name: str, variant: str = "keras", **overrides: Any) -> nn.Module:
  """Makes a model.

  Args:
    name: one of MODELS.
    variant: one of VARIANTS[name]: "keras", the sizes of the Keras example, for 100 classes; or
      sizes of the papers, such as "B/16", for the 1,000 classes of ImageNet.
    **overrides: fields of the model's class, e.g. `num_classes=10` (0: `apply` returns the features
      that the head would read, float32 [B, D]); `image_size` is both sides in pixels, or (height,
      width); `dtype` ("float32" or "bfloat16", also as a dtype) is what it computes in,
      `remat=True` saves memory in training: a block's inputs are kept, and the rest is computed
      again for the gradients.
  Returns:
    A Flax module. `model.apply({"params": params}, images, train=False, positions=None)` takes
    float images [B, H, W, C] of `image_size`, normalised, and returns float32 logits
    [B, num_classes]. With `train=True` it needs `rngs={"dropout": key}`; `positions` (int32 [B],
    default 0, 1, ..., B-1) is each image's place in the global batch, on which its dropout depends.
    With `mutable=["intermediates"]` it also returns each block's output and what it mixed: see the
    classes.
  Raises:
    ValueError: an unknown name, variant or field, a value out of range, or sizes that do not fit
      together.
  """
  if name not in MODELS:
    raise ValueError(f"unknown model {name!r}; {_suggest(name, MODELS)}")
  if variant not in VARIANTS[name]:
    raise ValueError(f"{name} has no variant {variant!r}; {_suggest(variant, VARIANTS[name])}")
  model, fields = _MODELS[name][variant]
  defaults = {
    field.name: field.default
    for field in dataclasses.fields(model)
    if field.name not in ("parent", "name")
  }
  checked = dict(fields)
  for field, value in overrides.items():
    if field not in defaults:
      raise ValueError(f"{name} has no field {field!r}; {_suggest(field, defaults)}")
    checked[field] = _checked(field, value, defaults[field])
  made = model(**checked)
  _check_that_sizes_fit(made)
  return made


def describe(model: nn.Module) -> tuple[str, dict[str, Any]]:
  """The name and the keyword arguments with which `create` makes this model again.

  dtype and remat, which say how it is computed, are left out.
  """
  for name, variants in _MODELS.items():
    for variant, (kind, _) in variants.items():
      if type(model) is kind:
        fields = {
          field.name: getattr(model, field.name)
          for field in dataclasses.fields(model)
          if field.name not in ("parent", "name", "dtype", "remat")
        }
        return name, {"variant": variant} | fields
  raise ValueError(f"{type(model).__name__} is no model of mlp_models")


def variant_of(model: nn.Module) -> str | None:
  """The variant whose sizes a model has, whatever its classes and rates; None if there is none."""
  name, _ = describe(model)
  return next((x for x in VARIANTS[name] if have_same_sizes(model, create(name, x))), None)


def have_same_sizes(model: nn.Module, other: nn.Module) -> bool:
  """Whether two models differ in nothing but what a variant leaves free, such as classes."""
  if type(model) is not type(other):
    return False
  (_, fields), (_, others) = describe(model), describe(other)
  return all(fields[key] == others[key] for key in fields if not _is_free(key))


def _is_free(field: str) -> bool:
  """Whether models of one variant may differ in a field."""
  # Projects differ in gelu and epsilons, and pool in several ways.
  free = ("num_classes", "image_size", "gelu", "pool", "class_token")
  return field.endswith(("_rate", "_init", "_epsilon")) or field in free


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
  if isinstance(default, bool):
    if not isinstance(value, bool):
      raise ValueError(f"{field} is {value!r}, it must be True or False")
  elif field in _CHOICES:
    if value not in _CHOICES[field]:
      raise ValueError(f"unknown {field} {value!r}, known are {', '.join(_CHOICES[field])}")
  elif field.endswith(("_rate", "_epsilon")):
    if not isinstance(value, int | float) or not 0 <= value < 1:
      raise ValueError(f"{field} is {value!r}, it must be at least 0 and less than 1")
  elif field == "image_size" and isinstance(value, tuple | list):
    if len(value) != 2 or not all(_is_size(side) for side in value):
      raise ValueError(f"image_size is {value!r}, it must be one or two positive integers")
    height, width = value
    value = height if height == width else (height, width)
  elif isinstance(default, tuple):
    value = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(_is_size(units) for units in value):
      raise ValueError(f"{field} is {value!r}, it must hold positive integers")
  elif isinstance(default, int | None):
    features = field == "num_classes" and value == 0 and not isinstance(value, bool)
    by_itself = default is None and value is None
    if not (features or by_itself or _is_size(value)):
      raise ValueError(f"{field} is {value!r}, it must be a positive integer")
  return value


def _check_that_sizes_fit(model: nn.Module) -> None:
  """Raises ValueError unless patches tile the image and residuals can be added."""
  size = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
  image_size, patch_size = size["image_size"], size.get("patch_size", 1)
  if any(side % patch_size for side in layers.grid(image_size)):
    raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
  if isinstance(model, gmlp.GMLP) and model.hidden_units and model.hidden_units % 2:
    raise ValueError(f"hidden_units is {model.hidden_units}: half of them gate the other half")
  for field in ("mlp_units", "ffn_units"):  # of MLPs whose output is added to their input
    units = size.get(field)
    if units is not None and units[-1:] != (size["width"],):
      raise ValueError(
        f"{field} {units} must end in width {size['width']}: its output joins a residual"
      )


def _is_size(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0
