"""What a workdir says of its run: config.json, and dataset.json, which prediction reads.

A workdir is a folder, or anything else that etils.epath knows: gs://BUCKET/..., s3://...
"""

import argparse
import dataclasses
import json
from typing import Any

import fsspec
import jax
from etils import epath
from ml_collections import ConfigDict

from configs import default
from train.data.splits import DatasetInfo
from train.errors import WorkdirError, first_line

# What changes nothing but where and how fast a run is computed: it may go on on another machine.
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
  """A workdir as a command line names it.

  Raises:
    ArgumentTypeError: it is in a bucket that nothing installed here can open.
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
  """Makes `workdir` this run's: writes both files, or finds the same content there.

  A run that has saved no checkpoint yet has nothing to lose, and is replaced.

  Raises:
    WorkdirError: the folder belongs to a run with another config or dataset (the differences are
      listed), or holds files but no config.json, or can't be written.
  """
  run = {  # through JSON, where a tuple is a list
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
    if jax.process_index():  # the first one writes
      return
    workdir.mkdir(parents=True, exist_ok=True)
    # A bucket knows no empty folders: after mkdir there may still be none.
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
    WorkdirError: no run is there.
  """
  config = ConfigDict(default.get_config(), type_safe=False)
  config.update(_read(workdir / "config.json"))
  return config


def read_dataset(workdir: epath.Path) -> DatasetInfo:
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
  """Whether a path is of this machine's file system, and not of a bucket."""
  return "://" not in str(path)


def write_atomically(path: epath.Path, content: str | bytes) -> None:
  """Writes a file as a whole or, if the process is killed, not at all."""
  if isinstance(content, str):
    content = content.encode()
  # A bucket takes objects as a whole; there, moving one is a copy.
  partial = path.with_name(path.name + ".partial") if is_local(path) else path
  partial.write_bytes(content)
  if partial != path:
    partial.replace(path)
