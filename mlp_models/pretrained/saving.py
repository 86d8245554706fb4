"""Writes weights: in our names, or as a folder that timm and we both read."""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from mlp_models import layers, registry
from mlp_models.pretrained import config, timm
from mlp_models.pretrained.errors import WeightsError
from mlp_models.pretrained.layouts import LAYOUTS, listed
from mlp_models.pretrained.preprocessing import Preprocessing
from mlp_models.pretrained.rules import Layout, invert

_NAME = "model.safetensors"  # in a folder as the hub has it
Arrays = dict[str, np.ndarray]


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
    file: its name ends in .safetensors. With layout "timm" also a folder, made if it is missing,
      for model.safetensors.
    params: of the model, nested dicts of arrays.
    class_names: in order; () if they are unknown.
    layout: "ours", or "timm": the names of timm's model of the same family and sizes. What names
      can't tell is in config.json beside the file, for `timm.create_model("local-dir:FOLDER",
      pretrained=True)`. From either, `load` knows all that is given here.
    say: called with a line on what timm's model must be told besides, if anything.
  Raises:
    WeightsError: there is no such layout, timm has no such model, or the folder has the config.json
      of something else.
  """
  if layout not in ("ours", "timm"):
    raise WeightsError(f"unknown layout {layout!r}, known are 'ours' and 'timm'")
  path = Path(file)
  if layout == "timm" and (path.is_dir() or not path.suffix):
    path /= _NAME
  if path.suffix != ".safetensors":
    raise WeightsError(f"{path}: the name of a file of weights ends in .safetensors")
  flat = {key: np.asarray(x) for key, x in flatten_dict(params, sep="/").items()}
  name, fields = registry.describe(model)
  if layout == "timm":
    _save_for_timm(path, name, fields, flat, class_names, preprocessing, say)
    return
  own = {
    "fields": {"name": name} | fields,
    "class_names": list(class_names),
    "preprocessing": dataclasses.asdict(preprocessing) if preprocessing else None,
  }
  _write(path, _safetensors(flat, {"mlp_models": json.dumps(own)}))


def _save_for_timm(
  path: Path,
  name: str,
  fields: Mapping[str, Any],
  flat: Arrays,
  class_names: Sequence[str],
  preprocessing: Preprocessing | None,
  say: Callable[[str], object],
) -> None:
  beside = path.parent / "config.json"
  if beside.exists() and not config.is_of(beside, path):
    raise WeightsError(
      f"{beside} belongs to something else, and timm's layout needs its own: name another folder, "
      f"such as {path.parent / 'timm'}"
    )
  arrays, content = _for_timm(name, fields, flat, say)
  content["num_classes"] = fields["num_classes"]
  if class_names:
    content["label_names"] = list(class_names)
  if preprocessing:
    content["pretrained_cfg"] |= {
      "mean": preprocessing.mean,
      "std": preprocessing.std,
      "interpolation": preprocessing.interpolation,
      "crop_pct": preprocessing.crop,
    }
  content[config.OURS] |= {"weights": path.name}
  path.parent.mkdir(exist_ok=True)
  _write(path, _safetensors(arrays, {"format": "pt"}))
  _write(beside, (json.dumps(content, indent=2) + "\n").encode())


def _safetensors(arrays: Arrays, metadata: dict[str, str]) -> bytes:
  whole = {key: np.ascontiguousarray(x, np.float32) for key, x in arrays.items()}
  content: bytes = safetensors.numpy.save(whole, metadata)
  return content


def _for_timm(
  name: str, fields: Mapping[str, Any], flat: Arrays, say: Callable[[str], object]
) -> tuple[Arrays, dict[str, Any]]:
  """Our arrays in timm's names, and its config.json; WeightsError if it has no such model."""
  layout = next((x for x in LAYOUTS if (x.project, x.family) == ("timm", name)), None)
  if layout is None or layout.model is None:
    raise WeightsError(f"timm has no {name}: only layout 'ours' is written")
  rules = layout.rules(dict(fields), layout.unusual(flat))
  if odd := sorted(flat.keys() ^ {path for rule in rules for path in rule.ours}):
    raise WeightsError(f"timm has no such {name}: {listed(odd)} differ")
  arrays = invert(rules, flat)
  shapes = {key: x.shape for key, x in arrays.items()}
  sizes = layout.fields(shapes, {"model_args": {"img_size": fields["image_size"]}})
  fields = {key: sizes.get(key) if x is None else x for key, x in fields.items()}
  try:
    made = layout.model(fields, shapes)
  except (KeyError, ValueError) as error:
    raise WeightsError(f"timm has no such {name}: {error}") from None
  content = _config(made, fields, next(iter(shapes)), shapes)
  _require_equal(layout, fields, shapes, content)
  _say_what_is_left(made, name, fields, say)
  return arrays, content


def _config(
  made: timm.Model, fields: Mapping[str, Any], first: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
  """config.json, without classes and preprocessing.

  first: the weight of the patch embedding, [D, C, P, P].
  """
  args = made.args
  if timm.act_layer(fields["gelu"]) != "gelu" or made.gelu_is_named:
    args = args | {"act_layer": timm.act_layer(fields["gelu"])}
  content: dict[str, Any] = {"architecture": made.architecture} if made.architecture else {}
  content |= {"num_features": fields["width"], "model_args": args}
  content["pretrained_cfg"] = {
    "input_size": [shapes[first][1], *layers.grid(fields["image_size"])],
    "fixed_input_size": True,
    "num_classes": fields["num_classes"],
    "pool_size": None,
    "first_conv": first.removesuffix(".weight"),
    "classifier": "head",
  }
  epsilon = fields["norm_epsilon"]
  content[config.OURS] = {} if epsilon == timm.NORM_EPSILON else {"norm_epsilon": epsilon}
  return content


def _require_equal(
  layout: Layout,
  fields: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
  content: Mapping[str, Any],
) -> None:
  """Raises WeightsError if what is written would be read as another model."""
  theirs = layout.fields(shapes, content)
  for field in sorted(theirs.keys() & fields.keys()):
    is_free = field.endswith(("_rate", "_init"))
    if not is_free and theirs[field] != fields[field]:
      raise WeightsError(
        f"timm's {layout.family} has {field} {theirs[field]!r}, and this model {fields[field]!r}"
      )


def _say_what_is_left(
  made: timm.Model, name: str, fields: Mapping[str, Any], say: Callable[[str], object]
) -> None:
  """Says what a config.json can't tell timm."""
  told = []
  if fields["gelu"] == "tanh" and not made.gelu_is_named:
    told.append("act_layer=timm.layers.GELUTanh")
  if (epsilon := fields["norm_epsilon"]) != timm.NORM_EPSILON:
    told.append(f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={epsilon})")
  if made.otherwise:
    say(
      f"timm.create_model has no {name} of these sizes: {made.otherwise} makes it, with model_args "
      "of config.json"
    )
  if told:
    say(f"timm's {name} is this model if it is made with {' and '.join(told)}")


def _write(path: Path, content: bytes) -> None:
  """Replaces a file once the new one is whole."""
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


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask
