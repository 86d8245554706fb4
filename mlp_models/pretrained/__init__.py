"""Weights from files, into our models and back: others' published ones, and our own.

A family's module beside this one has the tables of names for each project; `rules.py` has their
parts, `sources.py` reads files, and this one joins them.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from mlp_models import layers, registry
from mlp_models.pretrained import preprocessing as _preprocessing
from mlp_models.pretrained.fit import Fit
from mlp_models.pretrained.layouts import LAYOUTS, find_layout, listed, require_all_used
from mlp_models.pretrained.preprocessing import Preprocessing as Preprocessing
from mlp_models.pretrained.rules import Rule, apply, invert
from mlp_models.pretrained.sources import Source, open_source
from mlp_models.pretrained.sources import WeightsError as WeightsError

Params = dict[str, Any]

_ARGUMENTS = {"gelu": "act_layer", "norm_epsilon": "norm_layer"}  # timm's, by our fields


class Found(NamedTuple):
  """What weights are, by their names, shapes and config; no array is read.

  name: the family, one of `mlp_models.MODELS`.
  fields: keyword arguments with which `create` makes their model.
  class_names: () if they are unknown.
  project: whose names the arrays have: "mlp_models", "timm", "transformers" or "npz".
  lacks: prefixes of parameters that such weights lack, besides the head's.
  notes: lines that say what was assumed.
  """

  name: str
  fields: dict[str, Any]
  class_names: tuple[str, ...]
  preprocessing: Preprocessing
  project: str
  lacks: tuple[str, ...] = ()
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
  return _describe(open_source(source))[0]


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
  found, rules = _describe(opened)
  say(f"{opened.said}: {found}, in the names of {found.project}")
  for note in found.notes:
    say(note)
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


def save(
  file: str | os.PathLike[str],
  model: nn.Module,
  params: Mapping[str, Any],
  class_names: Sequence[str] = (),
  preprocessing: Preprocessing | None = None,
  layout: str = "ours",
  say: Callable[[str], object] = print,
) -> None:
  """Writes weights as safetensors; an existing file is replaced once the new one is whole.

  Args:
    file: its name ends in .safetensors.
    params: of the model, nested dicts of arrays.
    class_names: in order; () if they are unknown.
    layout: "ours", from which `load` knows all that is given here, or "timm": the names of timm's
      model of the same family and sizes.
    say: called with a line on what timm's model must be told, if its defaults differ.
  Raises:
    WeightsError: there is no such layout, or timm has no such model.
  """
  path = Path(file)
  if path.suffix != ".safetensors":
    raise WeightsError(f"{path}: the name of a file of weights ends in .safetensors")
  flat = {key: np.asarray(x) for key, x in flatten_dict(params, sep="/").items()}
  name, fields = registry.describe(model)
  metadata = {"format": "pt"}
  if layout == "timm":
    flat = _in_timms_names(name, fields, flat, say)
  elif layout == "ours":
    own = {
      "fields": {"name": name} | fields,
      "class_names": list(class_names),
      "preprocessing": dataclasses.asdict(preprocessing) if preprocessing else None,
    }
    metadata = {"mlp_models": json.dumps(own)}
  else:
    raise WeightsError(f"unknown layout {layout!r}, known are 'ours' and 'timm'")
  content = safetensors.numpy.save(
    {key: np.ascontiguousarray(x, np.float32) for key, x in flat.items()}, metadata
  )
  with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as new:
    try:
      new.write(content)
      new.close()
      os.chmod(new.name, 0o666 & ~_umask())
      os.replace(new.name, path)
    except BaseException:
      with contextlib.suppress(OSError):
        os.unlink(new.name)
      raise


def _describe(opened: Source) -> tuple[Found, dict[str, Rule] | None]:
  """What the arrays are, and the rule for each of them by its full name; None if they are ours."""
  if opened.own is not None:
    return _describe_own(opened.own, opened.said), None
  layout, full = find_layout(opened)
  shapes = {name: opened.shapes[full[name]] for name in full}
  try:
    fields = layout.fields(shapes, opened.config)
    rules = layout.rules(fields, shapes)
    by_full_name = {
      full[rule.theirs]: rule._replace(beside=tuple(full[name] for name in rule.beside))
      for rule in rules
      if rule.theirs in full
    }
    found = Found(
      name=layout.family,
      fields={key: value for key, value in fields.items() if key != "notes"},
      class_names=_class_names(opened.config, fields["num_classes"]),
      preprocessing=_preprocessing.of(layout.project, opened.config, fields["image_size"]),
      project=layout.project,
      lacks=layout.lacks,
      notes=tuple(fields.get("notes", ())),
    )
    registry.create(found.name, **found.fields)
  except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # also of configs
    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    raise WeightsError(f"{opened.said}, in the names of {layout.project}: {reason}") from None
  require_all_used(layout, rules, full, opened.said)
  return found, by_full_name


def _describe_own(own: Mapping[str, Any], said: str) -> Found:
  try:
    fields = dict(own["fields"])
    name, given = fields.pop("name"), own.get("preprocessing")
    preprocessing = Preprocessing.from_dict(given or {"image_size": fields["image_size"]})
    registry.create(name, **fields)
    return Found(name, fields, tuple(own["class_names"]), preprocessing, "mlp_models")
  except (KeyError, TypeError, ValueError) as error:
    raise WeightsError(f"{said} is damaged, or of a later version: {error}") from None


def _read(opened: Source, rules: Mapping[str, Rule] | None) -> dict[str, np.ndarray]:
  """The arrays by our paths, float32."""

  def read(name: str) -> np.ndarray:
    return np.asarray(opened.read(name)).astype(np.float32)

  if rules is None:
    return {name: read(name) for name in opened.shapes}
  try:
    return apply(rules, read)
  except ValueError as error:
    raise WeightsError(f"{opened.said}: {error}") from None


def _class_names(config: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
  """Names of a head's classes as config.json has them; () if it has none, or placeholders."""
  names = config.get("label_names") or ()
  if by_number := config.get("id2label"):
    names = [name for _, name in sorted((int(n), str(name)) for n, name in by_number.items())]
  placeholders = [f"LABEL_{n}" for n in range(len(names))]
  return tuple(names) if len(names) == num_classes and list(names) != placeholders else ()


def _in_timms_names(
  name: str, fields: Mapping[str, Any], flat: dict[str, np.ndarray], say: Callable[[str], object]
) -> dict[str, np.ndarray]:
  """Our arrays in timm's names. Raises WeightsError if timm has no such model."""
  layout = next((x for x in LAYOUTS if (x.project, x.family) == ("timm", name)), None)
  if layout is None:
    raise WeightsError(f"timm has no {name}: only layout 'ours' is written")
  rules = layout.rules(dict(fields), {})
  if odd := sorted(flat.keys() ^ {path for rule in rules for path in rule.ours}):
    raise WeightsError(f"timm has no such {name}: {listed(odd)} differ")
  arrays = invert(rules, flat)
  # Read back, with what no shape tells, to see whether timm's model is this one.
  image_size = {"model_args": {"img_size": layers.grid(fields["image_size"])}}
  theirs = layout.fields({key: x.shape for key, x in arrays.items()}, image_size)
  told = []
  for field in sorted(theirs.keys() & fields.keys() - {"num_heads", "head_dim", "variant"}):
    if field.endswith(("_rate", "_init")) or theirs[field] == fields[field]:
      continue
    if field not in _ARGUMENTS:
      raise WeightsError(
        f"timm's {name} has {field} {theirs[field]!r}, and this model {fields[field]!r}"
      )
    told.append(f"{_ARGUMENTS[field]} for {field} {fields[field]!r}")
  if told:
    say(f"timm's {name} is this model if it is made with {' and '.join(told)}")
  return arrays


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask
