"""A workdir's description of its run: config.json, and dataset.json, which prediction reads.

A workdir is a folder, or any other path that etils.epath supports: gs://BUCKET/..., s3://...
"""

import argparse
import dataclasses
import json
from typing import Any

import fsspec
import jax
from etils import epath
from ml_collections import ConfigDict

import mlp_models
from configs import default
from train.data.splits import DatasetInfo
from train.errors import WorkdirError, first_line

# Knobs that change only where and how fast a run computes: another machine may resume it.
_FREE_TO_DIFFER = (
  "checkpoint_seconds",
  "compilation_cache",
  "cpu_microbatch",
  "data.archive",
  "data.data_dir",
  "data.fallback",
  "data.in_memory_bytes",
  "data.workers",
  "mesh.data",
  "mesh.fsdp",
  "microbatch",
  "remat",
  "steps_per_call",
)


def from_flag(text: str) -> epath.Path:
  """Parses a workdir from the command line.

  Raises:
    ArgumentTypeError: no installed package can open its bucket.
  """
  scheme, separator, _ = text.partition("://")
  try:
    if separator:
      fsspec.get_filesystem_class(scheme)
    return epath.Path(text)
  except ImportError as error:
    raise argparse.ArgumentTypeError(
      f'{text}: {first_line(error)} For gs://: pip install -c constraints.txt -e ".[gcs]"'
    ) from None
  except (KeyError, ValueError):
    raise argparse.ArgumentTypeError(f"{text}: {scheme}:// is unknown") from None


def claim(workdir: epath.Path, config: ConfigDict, info: DatasetInfo) -> None:
  """Claims `workdir` for this run: writes both files, or checks that they hold the same content.

  An earlier run without a checkpoint is replaced.

  Raises:
    WorkdirError: the folder belongs to a run with another config or dataset (the differences are
      listed), or holds files but no config.json, or can't be written.
  """
  run = {  # through JSON, which turns tuples into lists
    "config.json": json.loads(config.to_json()),
    "dataset.json": json.loads(json.dumps(dataclasses.asdict(info))),
  }
  try:
    if any((workdir / "checkpoints" / "last").glob("[0-9]*")):
      differences = []
      there = {"config.json": json.loads(read_config(workdir).to_json())}
      there["dataset.json"] = _read(workdir / "dataset.json")
      for name, content in run.items():
        differences += _differences(_flat(there[name]), _flat(content))
      if differences:
        raise WorkdirError(
          f"{workdir} holds a run with another config: choose another --workdir, or undo\n"
          + "\n".join(f"  {line}" for line in differences)
        )
      return
    if jax.process_index():  # only the first process writes
      return
    workdir.mkdir(parents=True, exist_ok=True)
    # Buckets have no empty folders: even after mkdir the folder may not exist.
    is_used = workdir.exists() and any(workdir.iterdir())
    if is_used and not (workdir / "config.json").exists():
      raise WorkdirError(f"{workdir} holds files but no config.json: choose an empty --workdir")
    for name, content in run.items():
      write_atomically(workdir / name, json.dumps(content, indent=2) + "\n")
  except OSError as error:
    raise WorkdirError(f"--workdir {workdir} can't be used: {error.strerror or error}") from None


def read_config(workdir: epath.Path) -> ConfigDict:
  """The config of the run in `workdir`; knobs that are newer than the run have their defaults.

  Raises:
    WorkdirError: the folder holds no run, or a damaged one.
  """
  config = ConfigDict(default.get_config(), type_safe=False)
  path = workdir / "config.json"
  content = _read(path)
  try:
    config.update(content)
    mlp_models.create(**config.model, dtype=config.dtype, remat=config.remat)
  except (AttributeError, TypeError, ValueError) as error:  # no object, or of other types
    raise WorkdirError(f"{path} is damaged: {first_line(error)}") from error
  return config


def read_dataset(workdir: epath.Path) -> DatasetInfo:
  """The description of the dataset that the run in `workdir` was trained on.

  Raises:
    WorkdirError: the folder holds no run, or a damaged one.
  """
  path = workdir / "dataset.json"
  fields = _read(path)
  try:
    for name in ("class_names", "image_shape"):
      fields[name] = tuple(fields[name])
    return DatasetInfo(**fields)
  except (KeyError, TypeError) as error:
    raise WorkdirError(f"{path} is damaged: {first_line(error)}") from error


def _differences(old: dict, new: dict) -> list[str]:
  return [
    f"{key}: {json.dumps(old.get(key))} there, {json.dumps(new.get(key))} here"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and key not in _FREE_TO_DIFFER
  ]


def _flat(tree: dict, prefix: str = "") -> dict:
  """Nested dicts -> one dict with dotted keys."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return flat


def _read(path: epath.Path):
  try:
    return json.loads(path.read_text())
  except OSError:
    raise WorkdirError(f"{path} is missing: {path.parent} holds no run") from None
  except ValueError as error:
    raise WorkdirError(f"{path} is damaged: {error}") from None


def is_local(path: epath.Path) -> bool:
  """Whether a path is in the local file system, not in a bucket."""
  return "://" not in str(path)


def write_atomically(path: epath.Path, content: str | bytes) -> None:
  """Writes a file as a whole or, if the process is killed, not at all."""
  if isinstance(content, str):
    content = content.encode()
  # Buckets write objects atomically, and moving one would copy it.
  partial = path.with_name(path.name + ".partial") if is_local(path) else path
  partial.write_bytes(content)
  if partial != path:
    partial.replace(path)
