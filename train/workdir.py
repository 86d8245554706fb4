"""What a workdir says of its run: config.json, and dataset.json, which prediction reads."""

import dataclasses
import json
import os
from pathlib import Path

from ml_collections import ConfigDict

from train.data import DatasetInfo

# Where the data lies is no part of what a run is: it may be continued on another machine.
_FREE_TO_DIFFER = ("data.data_dir", "data.archive")


class WorkdirError(ValueError):
  """A workdir can't be used. The message is the complete text for the user."""


def claim(workdir: Path, config: ConfigDict, info: DatasetInfo) -> None:
  """Makes `workdir` this run's: writes both files, or finds the same config there.

  Raises:
    WorkdirError: the folder belongs to a run with another config (the differences are listed), or
      holds files but no config.json, or can't be written.
  """
  path = workdir / "config.json"
  if path.exists():
    # Through JSON, where a tuple is a list.
    differences = _differences(_flat(_read(path)), _flat(json.loads(config.to_json())))
    if differences:
      raise WorkdirError(
        f"{workdir} holds a run with another config: choose another --workdir, or undo\n"
        + "\n".join(f"  {line}" for line in differences)
      )
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if any(workdir.iterdir()):
      raise WorkdirError(f"{workdir} holds files but no config.json: choose an empty --workdir")
    _write(workdir / "dataset.json", dataclasses.asdict(info))
    _write(path, json.loads(config.to_json()))
  except OSError as error:
    raise WorkdirError(f"--workdir {workdir} can't be written: {error.strerror}") from None


def read_config(workdir: Path) -> ConfigDict:
  """The config of the run in `workdir`.

  Raises:
    WorkdirError: no run is there.
  """
  return ConfigDict(_read(workdir / "config.json"))


def read_dataset(workdir: Path) -> DatasetInfo:
  """The description of the dataset that the run in `workdir` was trained on.

  Raises:
    WorkdirError: no run is there.
  """
  fields = _read(workdir / "dataset.json")
  for name in ("class_names", "image_shape"):
    fields[name] = tuple(fields[name])
  return DatasetInfo(**fields)


def _differences(old: dict, new: dict) -> list[str]:
  return [
    f"{key}: {json.dumps(old.get(key))} there, {json.dumps(new.get(key))} here"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and key not in _FREE_TO_DIFFER
  ]


def _flat(tree: dict, prefix: str = "") -> dict:
  """Nested dicts -> one dict with dotted keys."""
  flat = {}
  for key, value in tree.items():
    flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return flat


def _read(path: Path):
  try:
    return json.loads(path.read_text())
  except OSError:
    raise WorkdirError(f"{path} is missing: {path.parent} holds no run") from None
  except ValueError as error:
    raise WorkdirError(f"{path} is damaged: {error}") from None


def _write(path: Path, content) -> None:
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(content, indent=2) + "\n")
  os.replace(partial, path)
