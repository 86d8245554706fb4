"""The knobs of a config: which there are, of which types, and how text becomes their values."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from configs import default
from train.errors import ConfigError, printable, shown

_BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_REQUIRED = object()  # the value of a knob that the command line must give
_NEEDS = {
  bool: "True or False",
  int: "a whole number",
  float: "a number",
  str: "text",
  tuple: "numbers or names, such as 1.5,2 or block0,block1",
}


class Knob(NamedTuple):
  value: Any
  type: type  # list counts as tuple
  may_be_none: bool

  @property
  def is_sizes(self) -> bool:
    """Whether it is a tuple of whole numbers, and must stay one."""
    is_tuple = self.type is tuple and isinstance(self.value, tuple | list) and self.value
    return bool(is_tuple) and all(type(item) is int for item in self.value)

  @property
  def need(self) -> str:
    """What it must be, in words."""
    if self.is_sizes:
      return "whole numbers, such as 64,32"
    return _NEEDS.get(self.type, "left as it is") + (", or None" if self.may_be_none else "")


def knobs(config: ConfigDict, prefix: str = "") -> dict[str, Knob]:
  """All knobs of a config by dotted key."""
  found: dict[str, Knob] = {}
  for name, field in config.items(preserve_field_references=True):
    try:
      value = config[name]
    except config_dict.RequiredValueError:
      value = _REQUIRED
    if isinstance(value, ConfigDict):
      found |= knobs(value, f"{prefix}{name}.")
    else:
      is_empty = value is None or value is _REQUIRED
      is_placeholder = is_empty and isinstance(field, config_dict.FieldReference)
      kind = field.get_type() if is_placeholder else type(value)
      found[prefix + name] = Knob(value, tuple if kind is list else kind, value is None)
  return found


def check_knobs(config: ConfigDict) -> None:
  """Compares a config with configs/default.py: its knobs, their types, and that there is a model.

  `check.check_config` looks at the values.

  Raises:
    ConfigError: a knob is missing, unknown, or of another type.
  """
  if not isinstance(config.get("model"), ConfigDict) or "name" not in config.model:
    raise ConfigError("the config has no `model`: choose a file such as configs/mixer.py")
  found = knobs(config)
  known = knobs(default.get_config()) | {"model.name": Knob("", str, False)}
  for key, knob in known.items():
    if key not in found:
      raise ConfigError(f"the config lacks {key}: start from configs/default.py's get_config()")
    value = found[key].value
    is_type = type(value) is knob.type or (knob.type is float and type(value) is int)
    if not (is_type or (knob.may_be_none and value is None)):
      raise ConfigError(f"config.{key} = {shown(value)}: it must be {knob.need}")
    if isinstance(value, str) and any(letter < " " for letter in value):
      raise ConfigError(f"config.{key} = {shown(value)}: it must be one line of text")
  for key in found:
    if key in ("num_classes", "model.num_classes"):
      raise ConfigError(f"config.{key}: leave it out, the dataset says how many classes there are")
    if key in ("model.dtype", "model.remat"):
      raise ConfigError(f"config.{key}: the knob is config.{key.removeprefix('model.')}")
    if key not in known and not key.startswith("model."):
      raise ConfigError(_unknown_key(key, known))


def override(config: ConfigDict, flags: Sequence[str]) -> None:
  """Applies flags --config.KEY=VALUE, also with a space instead of "="; of two, the last counts.

  With `--config.model.variant` the fields that the config file gives the model become None: they
  are the variant's, unless other flags give them. A file that leaves the sizes to weights gives
  none of a variant's: its rates stay.

  Raises:
    ValueError: a flag or a key is unknown, or a value has the wrong type.
  """
  found, known = knobs(config), knobs(default.get_config())
  rest = list(flags)
  is_variant = any(flag.partition("=")[0] == "--config.model.variant" for flag in flags)
  if is_variant and "model.name" in found:
    found["model.variant"] = Knob("", str, False)
    fields = config.model.to_dict()
    fields = fields if is_for_weights(config) else dict.fromkeys(fields)
    with config.ignore_type():
      config.model = ConfigDict(fields | {"name": config.model.name, "variant": ""})
  while rest:
    flag, separator, text = rest.pop(0).partition("=")
    key = flag.removeprefix("--config.")
    if not flag.startswith("-"):
      raise ValueError(f"unknown argument {printable(flag)!r}")
    if not flag.startswith("--config."):
      whole = printable(f"{flag}{separator}{text}")
      raise ValueError(f"unknown flag {whole}: a config's knobs are --config.KEY=VALUE")
    if key not in found:
      raise ValueError(_unknown_key(key, found))
    knob = known.get(key, found[key])  # the config file may have given it another value
    if not separator:
      if knob.type is bool:
        text = "True"
      elif not rest or rest[0].startswith("--"):
        raise ValueError(f"{flag} lacks a value: {flag}=VALUE")
      else:
        text = rest.pop(0)
    *groups, name = key.split(".")
    holder = config
    for group in groups:
      holder = holder[group]
    try:
      value = _value(text, knob)
    except ValueError:
      raise ValueError(f"{flag}={printable(text)}: it must be {knob.need}") from None
    with holder.ignore_type():  # `_value` has checked it
      holder[name] = value


def is_for_weights(config: ConfigDict) -> bool:
  """Whether weights must say the model's sizes: the config gives neither them nor a variant."""
  model = config.model
  return "variant" not in model and "image_size" in model and model.image_size is None


def require_all(config: ConfigDict) -> None:
  """Raises ValueError for a knob that the command line must give, and has not given."""
  for key, knob in knobs(config).items():
    if knob.value is _REQUIRED:
      raise ValueError(f"this config requires --config.{key}=VALUE")


def _value(text: str, knob: Knob) -> Any:
  """Parses text as a value of a knob's type; ValueError if it is none."""
  if text.lower() == "none" and knob.may_be_none:
    return None
  if text.lower() == "none":
    raise ValueError
  if knob.type is bool and text.lower() in _BOOLS:
    return _BOOLS[text.lower()]
  if knob.type is int:
    return int(text, 16) if text[:2].lower() == "0x" else int(text)
  if knob.type is float:
    return float(text)
  if knob.type is str:
    return text
  items = text.strip().strip("()[]").rstrip(", ")
  if knob.type is tuple and (items or text.strip() in ("()", "[]")):
    item = int if knob.is_sizes else _item
    return tuple(item(part.strip()) for part in items.split(",") if items)
  raise ValueError


def _item(text: str) -> int | float | str:
  """A whole number, a number or a name: the first of these that the text is."""
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      continue
  if not text:
    raise ValueError
  return text.strip("'\"")


def _unknown_key(key: str, known: Iterable[str]) -> str:
  if inside := [other for other in known if other.startswith(f"{key}.")]:
    return f"config.{key} is a group of knobs: {', '.join(inside)}"
  nearest = difflib.get_close_matches(key, known, n=1)
  hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(known)}"
  return f"config has no key {printable(key)!r}: {hint}"
