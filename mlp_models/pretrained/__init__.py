"""Weights from files, into our models and back: others' published ones, and our own.

A family's module beside this one has the tables of names for each project; `rules.py` has their
parts, `sources.py` reads files, and this one joins them.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from mlp_models import layers, registry
from mlp_models.pretrained import preprocessing as _preprocessing
from mlp_models.pretrained.errors import WeightsError as WeightsError
from mlp_models.pretrained.fit import Fit
from mlp_models.pretrained.layouts import find_layout, require_all_used
from mlp_models.pretrained.preprocessing import Preprocessing as Preprocessing
from mlp_models.pretrained.rules import Fields, Rule, apply
from mlp_models.pretrained.saving import save as save
from mlp_models.pretrained.sources import Source, open_source

Params = dict[str, Any]

_OTHERS = {"gelu": "tanh", "pool": "mean"}  # examples of other values, where they are words


class Found(NamedTuple):
  """What weights are, by their names, shapes and config; no array is read.

  name: the family, one of `mlp_models.MODELS`.
  fields: keyword arguments with which `create` makes their model.
  class_names: () if they are unknown.
  project: whose names the arrays have: "mlp_models", "timm", "transformers" or "npz".
  lacks: prefixes of parameters that such weights lack, besides the head's.
  assumed: names of fields that neither the arrays nor a config tell.
  notes: lines on what the config says.
  """

  name: str
  fields: dict[str, Any]
  class_names: tuple[str, ...]
  preprocessing: Preprocessing
  project: str
  lacks: tuple[str, ...] = ()
  assumed: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()

  def __str__(self) -> str:
    model = registry.create(self.name, **self.fields)
    variant = registry.variant_of(model) or f"of width {self.fields.get('width')}"
    height, width = layers.grid(self.fields["image_size"])
    return f"{self.name} {variant} for {height} x {width} pixels"


def describe(source: str | os.PathLike[str]) -> Found:
  """Finds out what weights are.

  Args:
    source: as for `load`.
  Raises:
    WeightsError: as for `load`.
  """
  return _describe(open_source(source), {})[0]


def load(
  source: str | os.PathLike[str],
  num_classes: int | None = None,
  *,
  class_names: Sequence[str] | None = None,
  say: Callable[[str], object] = print,
  seed: int = 0,
  **overrides: Any,
) -> tuple[nn.Module, Params, Preprocessing]:
  """Loads weights, and makes the model that they belong to.

  The family and its sizes are found from names, shapes and the config beside the weights. Position
  embeddings are resampled to another image size. The head is kept if it is for the same classes
  (by name where both sides have names, else by their number), and starts anew otherwise.

  Args:
    source: a .safetensors file with the names of timm, of transformers or our own; a folder with
      config.json and model.safetensors; an .npz file of vision_transformer or big_vision; a workdir
      of `train.main`; or "hf://ORG/NAME" or "hf://ORG/NAME@REVISION", which need the package
      huggingface_hub.
    num_classes: of the head; 0: no head, `apply` returns features; None: that of the weights.
    class_names: of the head's classes, in order; None: unknown.
    say: called with each line that says what was found, kept, resampled and reset.
    seed: of the parameters that the weights lack, such as a new head's.
    **overrides: other fields of the model than the weights say, such as `image_size=384`
      or `image_size=(384, 512)`, `drop_path_rate=0.1` or `dtype="bfloat16"`.
  Returns:
    model; params, nested dicts of float32 arrays; preprocessing: `model.apply({"params": params},
    images)` takes images that are normalised as it says.
  Raises:
    WeightsError: the source can't be read, is not known, or does not fit the overrides.
    ValueError: an override is no field of the model, or out of range.
  """
  opened = open_source(source)
  found, rules = _describe(opened, overrides)
  say(f"{opened.said}: {found}, in the names of {found.project}")
  for note in (*found.notes, *_assumptions(found, overrides)):
    say(note)
  if isinstance(class_names, str):
    raise WeightsError(f"class_names is {class_names!r}, it must be a list of names")
  names = tuple(class_names or ())
  if len(set(names)) < len(names):
    raise WeightsError("class_names holds a name twice")
  if names and num_classes not in (None, len(names)):
    raise WeightsError(f"num_classes is {num_classes}, and there are {len(names)} class_names")
  if num_classes is None:
    num_classes = len(names) or found.fields["num_classes"]
  model = registry.create(found.name, **found.fields | overrides | {"num_classes": num_classes})
  fit = Fit(_read(opened, rules), model, found.fields, opened.said, say)
  fit.head(found.class_names, names, found.fields["num_classes"])
  fit.positions()
  params = unflatten_dict(fit.params(found.lacks, seed), sep="/")
  size: layers.ImageSize = model.image_size
  return model, params, dataclasses.replace(found.preprocessing, image_size=size)


def _describe(opened: Source, overrides: Mapping[str, Any]) -> tuple[Found, dict[str, Rule] | None]:
  """What the arrays are, and the rule for each of them by its full name; None if they are ours."""
  if opened.own is not None:
    return _describe_own(opened.own, opened.said), None
  layout, full = find_layout(opened)
  shapes = {name: opened.shapes[full[name]] for name in full}
  try:
    fields = layout.fields(shapes, opened.config)
    _take_heads(fields, overrides)
    rules = layout.rules(fields, shapes)
    by_full_name = {
      full[rule.theirs]: rule._replace(beside=tuple(full[name] for name in rule.beside))
      for rule in rules
      if rule.theirs in full
    }
    found = Found(
      name=layout.family,
      fields={key: value for key, value in fields.items() if key not in ("assumed", "notes")},
      class_names=_class_names(opened.config, fields["num_classes"]),
      preprocessing=_preprocessing.of(layout.project, opened.config, fields["image_size"]),
      project=layout.project,
      lacks=layout.lacks,
      assumed=tuple(fields.get("assumed", ())),
      notes=tuple(fields.get("notes", ())),
    )
    registry.create(found.name, **found.fields)
  except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
    reason = "its arrays do not have the shapes of such a model"
    if isinstance(error, KeyError):
      reason = f"{error.args[0]} is missing"
    elif isinstance(error, ValueError) and "unpack" not in str(error):
      reason = str(error)
    raise WeightsError(f"{opened.said}, in the names of {layout.project}: {reason}") from None
  require_all_used(layout, rules, full, opened.said)
  return found, by_full_name


def _take_heads(fields: Fields, overrides: Mapping[str, Any]) -> None:
  """Cuts queries, keys and values into as many heads as are asked for, if nothing tells it."""
  heads, assumed = overrides.get("num_heads"), fields.get("assumed", ())
  if not heads or "num_heads" not in assumed or heads == fields["num_heads"]:
    return
  if fields["width"] % heads:
    raise ValueError(f"{heads} heads do not divide the width {fields['width']}")
  fields |= {"num_heads": heads, "assumed": [name for name in assumed if name != "num_heads"]}
  if "head_dim" in fields:
    fields["head_dim"] = fields["width"] // heads


def _assumptions(found: Found, overrides: Mapping[str, Any]) -> list[str]:
  """What to say of fields that nothing tells; not of those that the caller has decided."""
  fields = {name: found.fields[name] for name in found.assumed}
  fields = {name: x for name, x in fields.items() if overrides.get(name, x) == x}
  if not fields:
    return []
  values = ", ".join(f"{name} {value}" for name, value in fields.items())
  name = list(fields)[-1]
  other = _OTHERS.get(name, "N")
  shown = repr(other) if name in _OTHERS else other
  return [
    f"assumed, as nothing beside the weights tells: {values}. Fields say otherwise, such as "
    f"load(..., {name}={shown}) or --config.model.{name}={other}"
  ]


def _describe_own(own: Mapping[str, Any], said: str) -> Found:
  try:
    fields = dict(own["fields"])
    name, given = fields.pop("name"), own.get("preprocessing")
    preprocessing = Preprocessing.from_dict(given or {"image_size": fields["image_size"]})
    registry.create(name, **fields)
    return Found(name, fields, tuple(own["class_names"]), preprocessing, "mlp_models")
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    is_clear = isinstance(error, ValueError) and not isinstance(error, UnicodeError)
    reason = str(error) if is_clear else "its description lacks something"
    raise WeightsError(f"{said} is damaged, or of a later version: {reason}") from None


def _read(opened: Source, rules: Mapping[str, Rule] | None) -> dict[str, np.ndarray]:
  """The arrays by our paths, float32."""

  def read(name: str) -> np.ndarray:
    x = np.asarray(opened.read(name))
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise WeightsError(f"{opened.said}: {name} holds {x.dtype}, and weights are floats")
    return x.astype(np.float32)

  if rules is None:
    return {name: read(name) for name in opened.shapes}
  try:
    return apply(rules, read)
  except WeightsError:
    raise
  except ValueError as error:
    raise WeightsError(f"{opened.said}: {error}") from None


def _class_names(config: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
  """Names of a head's classes as config.json has them; () if it has none, or placeholders."""
  names = config.get("id2label") or config.get("label_names") or ()
  if isinstance(names, dict):  # by number
    names = [name for _, name in sorted((int(n), name) for n, name in names.items())]
  placeholders = [f"LABEL_{n}" for n in range(len(names))]
  return tuple(names) if len(names) == num_classes and list(names) != placeholders else ()
