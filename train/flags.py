"""Parses `--config configs/MODEL.py[:VARIANT] [--config.KEY=VALUE ...]`."""

import argparse
import logging as standard_logging
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

from absl import logging
from ml_collections import ConfigDict

from train import errors, knobs
from train.errors import fail, first_line, printable

CONFIG_HELP = "config file, as in configs/mixer.py or configs/mixer.py:smoke"


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
    The parsed flags, and the config with the overrides applied. `check.check_config` checks it.
  """
  arguments, overrides = parser.parse_known_args()
  try:
    config = _read_config(arguments.config)
    knobs.override(config, overrides)  # before references are followed: they see the new value
    knobs.require_all(config)
    return arguments, config.copy_and_resolve_references().lock()
  except ValueError as error:
    fail(error, 2)


def path(text: str) -> Path:
  """A path from the command line. A shell expands `~` only at the beginning of a word."""
  return Path(os.path.expanduser(text))


def quiet_libraries() -> None:
  """Silences the log lines of orbax, TFDS and matplotlib; their errors are raised as well."""
  logging.set_verbosity(logging.FATAL)  # orbax logs the tracebacks of its threads
  standard_logging.getLogger("matplotlib").setLevel(standard_logging.ERROR)  # it works without HOME
  # What remains of orbax's work on a damaged checkpoint; that it is damaged is an exception.
  standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
  report = sys.unraisablehook
  sys.unraisablehook = lambda raised: None if _is_from_orbax(raised) else report(raised)


def _is_from_orbax(raised: Any) -> bool:
  text = str(raised.exc_value)
  return text == "Event loop is closed" or text.startswith("Encountered error while reading array")


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
