"""config.json and preprocessor_config.json beside weights, and whether their values can be used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlp_models.pretrained.errors import WeightsError, first_line

OURS = "mlp_models"  # a key in the config.json that `save` writes beside weights for timm


def read(folder: Path) -> dict[str, Any]:
  """What both files of a folder say; {} without them. Raises WeightsError if they are damaged."""
  config: dict[str, Any] = {}
  for name in ("config.json", "preprocessor_config.json"):
    if (folder / name).is_file():
      config |= _without_nulls(read_json(folder / name))
      _check(config, folder / name)
  return config


def is_of(path: Path, file: Path) -> bool:
  """Whether `save` wrote this config.json beside these weights."""
  try:
    own = read_json(path).get(OURS)
  except WeightsError:
    return False
  return isinstance(own, dict) and own.get("weights") == file.name


def read_json(path: Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise WeightsError(f"{path} can't be read: {first_line(error)}") from None
  if not isinstance(content, dict):
    raise WeightsError(f"{path} holds no JSON object")
  return content


def _without_nulls(content: dict[str, Any]) -> dict[str, Any]:
  """What a config says: null says nothing."""
  return {
    key: _without_nulls(value) if isinstance(value, dict) else value
    for key, value in content.items()
    if value is not None
  }


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are(is_one: Callable[[Any], bool], *lengths: int) -> Callable[[Any], bool]:
  """Whether a value is a list of so many such items; any number of them without `lengths`."""
  return lambda value: (
    isinstance(value, list) and (not lengths or len(value) in lengths) and all(map(is_one, value))
  )


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _is_positive(value: Any) -> bool:
  return _is_number(value) and value > 0


def _is_size_or(*others: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda value: _is_size(value) or any(is_one(value) for is_one in others)


def _is_object(value: Any) -> bool:
  return isinstance(value, dict)


def _are_names(value: Any) -> bool:
  if isinstance(value, dict):
    return all(name.isdecimal() for name in value) and all(map(_is_text, value.values()))
  return _are(_is_text)(value)


# By what a value must be: how to tell, and the keys.
_KINDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
  "text": (
    _is_text,
    ("architecture", "hidden_act", "interpolation", "global_pool", "act_layer", "norm_layer"),
  ),
  "an object": (_is_object, ("model_args", "pretrained_cfg", OURS)),
  "1, 3 or 4 numbers": (_are(_is_number, 1, 3, 4), ("mean", "image_mean")),
  "1, 3 or 4 positive numbers": (_are(_is_positive, 1, 3, 4), ("std", "image_std")),
  "a positive whole number": (
    _is_size,
    (
      *("num_heads", "num_attention_heads", "num_blocks"),
      *("num_self_attention_heads", "num_cross_attention_heads"),
    ),
  ),
  "a positive number": (_is_positive, ("layer_norm_eps", "crop_pct", "norm_epsilon")),
  "one or two positive whole numbers": (
    _is_size_or(_are(_is_size, 2)),
    ("image_size", "img_size"),
  ),
  "three positive whole numbers": (_are(_is_size, 3), ("input_size",)),
  "a positive whole number, or an object": (_is_size_or(_is_object), ("size", "crop_size")),
  "texts, or texts by number": (_are_names, ("label_names", "id2label")),
}


def _check(config: dict[str, Any], path: Path) -> None:
  """Raises WeightsError for a value that is none of what its key must be."""
  for words, (is_fine, keys) in _KINDS.items():
    for key in keys:
      if key in config and not is_fine(config[key]):
        shown = json.dumps(config[key])
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        raise WeightsError(f"{path}: {key} is {shown}, it must be {words}")
  for key in ("model_args", "pretrained_cfg", OURS, "size", "crop_size"):
    if isinstance(config.get(key), dict):
      _check(config[key], path)
