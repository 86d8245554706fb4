"""Parses `--config configs/MODEL.py[:VARIANT] [--config.KEY=VALUE ...]`."""

import argparse
import difflib
import logging as standard_logging
import os
import sys
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from train.errors import fail

CONFIG_HELP = "config file, as in configs/mixer.py or configs/mixer.py:smoke"


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, ConfigDict]:
  """Parses sys.argv, or exits with status 2 and one line that says what is wrong.

  Args:
    parser: declares `--config` and other flags, but not `--config.KEY=VALUE`.
  Returns:
    The parsed flags, and the config with the overrides applied.
  """
  arguments, overrides = parser.parse_known_args()
  try:
    return arguments, _read_config(arguments.config, overrides)
  except ValueError as error:
    fail(error, 2)


def quiet_libraries() -> None:
  """Silences the log lines of orbax, TFDS and matplotlib; their errors still show."""
  logging.set_verbosity(logging.ERROR)
  standard_logging.getLogger("matplotlib").setLevel(standard_logging.ERROR)  # it works without HOME


def _read_config(path: str, overrides: Sequence[str]) -> ConfigDict:
  if not os.path.isfile(path.split(":")[0]):
    raise ValueError(f"--config {path}: no such file")
  default = _parse_config(path, [])
  keys = _keys(default)
  for flag in overrides:
    key = flag.removeprefix("--config.").split("=")[0]
    if flag.startswith("--config.") and key not in keys:
      nearest = difflib.get_close_matches(key, keys, n=1)
      hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(keys)}"
      raise ValueError(f"config has no key {key!r}: {hint}")
    if flag.startswith("-") and not flag.startswith("--config."):
      raise ValueError(f"unknown flag {flag}: a config's knobs are --config.KEY=VALUE")
  return _parse_config(path, overrides)


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
  """All dotted keys of a config."""
  keys: list[str] = []
  for key in config:
    value = config[key]
    keys += _keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
  return keys


def _parse_config(path: str, overrides: Sequence[str]) -> ConfigDict:
  values = flags.FlagValues()
  argv = [sys.argv[0], f"--config={path}", *overrides]
  holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  try:
    rest = values(argv)[1:]
  except Exception as error:
    # An error in a config file arrives as a whole traceback; its last line is the message.
    message = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
    raise ValueError(message if overrides else f"--config {path}: {message}") from error
  if rest:
    raise ValueError(f"unknown argument {rest[0]!r}")
  return holder.value.copy_and_resolve_references()
