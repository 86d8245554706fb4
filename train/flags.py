"""Parses `--config configs/MODEL.py[:VARIANT] [--config.KEY=VALUE ...]`."""

import argparse
import difflib
import os
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import logging
from ml_collections import ConfigDict, config_dict

from configs import default
from train import errors
from train.errors import ConfigError, fail, first_line

CONFIG_HELP = "config file, as in configs/mixer.py or configs/mixer.py:smoke"

_BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_REQUIRED = object()  # the value of a knob that the command line must give
_MOST_SHOWN = 200  # characters of a value that a message repeats


class Parser(argparse.ArgumentParser):
  """Knows `--debug`, and ends with status 2 and one line if a flag is wrong."""

  def __init__(self, **options: Any):
    super().__init__(**options, allow_abbrev=False)
    self.add_argument(
      "--debug",
      action="store_true",
      default=argparse.SUPPRESS,
      help="print the traceback behind an error",
    )

  def parse_known_args(self, args=None, namespace=None):
    namespace, rest = super().parse_known_args(args, namespace)
    errors.debug = getattr(namespace, "debug", False)
    return namespace, rest

  def error(self, message: str) -> NoReturn:
    fail(printable(message), 2)


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, ConfigDict]:
  """Parses sys.argv, or exits with status 2 and one line that says what is wrong.

  Args:
    parser: declares `--config` and other flags, but not `--config.KEY=VALUE`.
  Returns:
    The parsed flags, and the config with the overrides applied.
  """
  arguments, overrides = parser.parse_known_args()
  try:
    config = _read_config(arguments.config)
    _override(
      config, overrides
    )  # before references are resolved, so that what refers to it follows
    return arguments, config.copy_and_resolve_references().lock()
  except config_dict.RequiredValueError:
    required = [key for key, value in _knobs(config).items() if value is _REQUIRED]
    fail(f"--config {printable(arguments.config)}: --config.{required[0]}=VALUE is required", 2)
  except ValueError as error:
    fail(error, 2)


def path(text: str) -> Path:
  """A path from the command line. A shell expands `~` only at the beginning of a word."""
  return Path(os.path.expanduser(text))


def quiet_libraries() -> None:
  """Silences the log lines of orbax and TFDS; their errors still show."""
  logging.set_verbosity(logging.ERROR)


def printable(text: str) -> str:
  """The text on one line: line breaks and what no terminal shows are escaped, long text is cut."""
  line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
  return line if len(line) <= _MOST_SHOWN else f"{line[:_MOST_SHOWN]}..."


def shown(value: Any) -> str:
  """A value as a message shows it."""
  try:
    return printable(repr(value))
  except Exception:  # of a whole number with more than 4,300 digits, or of an object
    return f"a value of type {type(value).__name__}"


def _read_config(flag: str) -> ConfigDict:
  """The config of a file, FILE or FILE:VARIANT.

  Raises:
    ValueError: the file is missing, fails, or gives no config.
  """
  file, separator, variant = flag, "", ""
  if not path(file).is_file():
    file, separator, variant = flag.rpartition(":")
  start = f"--config {printable(flag)}"
  if not path(file).is_file():
    why = "a folder" if path(flag).is_dir() and flag else "no such file"
    raise ValueError(f"{start}: {why}")
  module = types.ModuleType("config_file")
  module.__file__ = str(path(file))
  sys.modules[module.__name__] = module  # dataclasses look their module up
  try:
    # Not imported: Python would write its bytecode beside the file, and take that for the file's if
    # this is edited within a second.
    exec(compile(path(file).read_bytes(), module.__file__, "exec"), module.__dict__)
    if not callable(getattr(module, "get_config", None)):
      raise ValueError("it has no function get_config, which returns the config")
    config = module.get_config(*[variant] if separator else [])
    if isinstance(config, ConfigDict):
      return config
  except (Exception, SystemExit) as error:
    raise ValueError(f"{start}: {_reason(error, module.__file__)}") from error
  raise ValueError(
    f"{start}: get_config() returns {type(config).__name__}, it must return a ConfigDict, as "
    "configs/default.py does"
  )


def _reason(error: BaseException, file: str) -> str:
  """What went wrong in a config file, and on which line of it, unless it says so in words."""
  message = printable(first_line(error)).removesuffix(".")
  if type(error) is ValueError:
    return message
  lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
  if isinstance(error, SyntaxError):
    lines, message = [error.lineno] if error.lineno else [], error.msg
  place = f"line {lines[-1]}: " if lines else ""
  return f"{place}{type(error).__name__}: {message}"


def _override(config: ConfigDict, overrides: Sequence[str]) -> None:
  """Applies flags --config.KEY=VALUE, also with a space instead of "="; of two, the last counts.

  Raises:
    ValueError: a flag or a key is unknown, or a value has the wrong type.
  """
  keys, defaults = _knobs(config), _knobs(default.get_config())
  rest = list(overrides)
  while rest:
    flag, separator, text = rest.pop(0).partition("=")
    key = flag.removeprefix("--config.")
    if not flag.startswith("-"):
      raise ValueError(f"unknown argument {printable(flag)!r}")
    if not flag.startswith("--config."):
      whole = printable(f"{flag}{separator}{text}")
      raise ValueError(f"unknown flag {whole}: a config's knobs are --config.KEY=VALUE")
    if key not in keys:
      raise ValueError(_unknown_key(key, list(keys)))
    if not separator:
      if isinstance(keys[key], bool):
        text = "True"
      elif not rest or rest[0].startswith("--"):
        raise ValueError(f"{flag} lacks a value: {flag}=VALUE")
      else:
        text = rest.pop(0)
    *groups, name = key.split(".")
    holder = config
    for group in groups:
      holder = holder[group]
    old = keys[key]
    nullable = old is None or (key in defaults and defaults[key] is None)
    if old in (None, _REQUIRED):
      old = holder.get_type(name)()  # any value of the type
    try:
      value = _value(text, old, nullable)
    except ValueError as error:
      raise ValueError(f"{flag}={printable(text)}: {error}") from None
    with holder.ignore_type():  # `_value` has checked it
      holder[name] = value


def check_knobs(config: ConfigDict) -> None:
  """Raises ConfigError unless a config has the knobs of configs/default.py, and values of their
  types, and a model; `check.check_config` looks at the values."""
  if not isinstance(config.get("model"), ConfigDict):
    raise ConfigError("the config has no `model`: choose a file such as configs/mixer.py")
  knobs, defaults = _knobs(config), _knobs(default.get_config()) | {"model.name": ""}
  for key, old in defaults.items():
    if key not in knobs:
      raise ConfigError(f"the config has no {key!r}: start from configs/default.py's get_config()")
    value = knobs[key]
    wide = {type(None): (int, type(None)), float: (int, float)}
    if type(value) not in wide.get(type(old), (type(old),)):
      raise ConfigError(f"config.{key} = {shown(value)}: it must be {_need(old)}")
    if isinstance(value, str) and any(c < " " for c in value):
      raise ConfigError(f"config.{key} = {shown(value)}: it must be one line of text")
  for key in knobs:
    if key.split(".")[-1] == "num_classes":
      raise ConfigError(f"config.{key}: leave it out, the dataset says how many classes there are")
    if key in ("model.dtype", "model.remat"):
      raise ConfigError(f"config.{key}: it belongs one level up, as config.{key[6:]}")
    if key not in defaults and not key.startswith("model."):
      raise ConfigError(_unknown_key(key, list(defaults)))


def _need(old: Any) -> str:
  """What a knob with the default `old` must be, in words."""
  if old is None:
    return "a whole number or None"
  if isinstance(old, tuple | list):
    return "whole numbers, such as 64,32"
  return {bool: "True or False", int: "a whole number", float: "a number", str: "text"}.get(
    type(old), "left as it is"
  )


def _unknown_key(key: str, keys: Sequence[str]) -> str:
  if inside := [other for other in keys if other.startswith(f"{key}.")]:
    return f"config.{key} is a group of knobs: {', '.join(inside)}"
  nearest = difflib.get_close_matches(key, keys, n=1)
  hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(keys)}"
  return f"config has no key {printable(key)!r}: {hint}"


def _knobs(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
  """All values of a config by dotted key."""
  knobs: dict[str, Any] = {}
  for key in config:
    try:
      value = config[key]
    except config_dict.RequiredValueError:
      value = _REQUIRED
    key = f"{prefix}{key}"
    knobs |= _knobs(value, f"{key}.") if isinstance(value, ConfigDict) else {key: value}
  return knobs


def _value(text: str, old: Any, nullable: bool) -> Any:
  """Parses text as a value of the type of `old`.

  Raises:
    ValueError: it is none; the message says what it must be.
  """
  if text.lower() == "none":
    if nullable:
      return None
    raise ValueError("this knob can't be None")
  try:
    if isinstance(old, str):
      return text
    if isinstance(old, bool):
      return _BOOLS[text.lower()]
    if isinstance(old, int):
      return int(text, 16) if text[:2].lower() == "0x" else int(text)
    if isinstance(old, float):
      return float(text)
    if isinstance(old, tuple | list):
      items = text.strip().strip("()[]").rstrip(", ")
      if items or text.strip() in ("()", "[]"):
        return tuple(int(item) for item in items.split(",") if items)
  except (KeyError, ValueError):
    pass
  raise ValueError(f"it must be {_need(old)}")
