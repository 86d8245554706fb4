"""A workdir's description of its run: config.json, and dataset.json, which prediction reads.

A workdir is a folder, or any other path that etils.epath supports: gs://BUCKET/..., s3://...
"""

import argparse
import dataclasses
import itertools
import json
import time
from typing import Any

import fsspec
import jax
from etils import epath
from ml_collections import ConfigDict

import mlp_models
from configs import default
from train.data.splits import DatasetInfo
from train.errors import WorkdirError, first_line
from train.run.lock import NAME as LOCK
from train.run.storage import write_atomically
from train.schedule import depends_on_epochs

# Knobs that change no finite number of a run, only where and how fast it computes: another machine
# may resume it.
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
  "nonfinite",  # a run that stopped may go on and skip
  "remat",
  "steps_per_call",
)

NONFINITE = "nonfinite.json"  # where a run that diverged says where
_WRITTEN_FIRST = {LOCK, "dataset.json", "dataset.json.partial", "config.json.partial"}


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
    return epath.Path(text).expanduser()  # a shell leaves the ~ in --workdir=~/run
  except ImportError as error:
    raise argparse.ArgumentTypeError(
      f'{text}: {first_line(error)} For gs://: pip install -c constraints.txt -e ".[gcs]"'
    ) from None
  except (KeyError, ValueError):
    raise argparse.ArgumentTypeError(f"{text}: {scheme}:// is unknown") from None
  except RuntimeError as error:  # ~ without a home
    raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def new(model: str, began: int) -> epath.Path:
  """Creates runs/MODEL-TIME, or runs/MODEL-TIME-2 and so on if another run has just begun there.

  Args:
    began: seconds since 1970.
  Raises:
    WorkdirError: it can't be created here.
  """
  name = f"{model}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(began))}"
  try:
    for number in itertools.count(1):
      folder = epath.Path("runs") / (name if number == 1 else f"{name}-{number}")
      folder.parent.mkdir(exist_ok=True)
      try:
        folder.mkdir()
        return folder
      except FileExistsError:
        continue
  except OSError as error:
    raise WorkdirError(f"{folder} can't be created: {error.strerror or error}") from None
  raise AssertionError("unreachable")


def claim(
  workdir: epath.Path, config: ConfigDict, info: DatasetInfo, trained: int, is_finished: bool
) -> None:
  """Claims `workdir` for this run: writes both files, or checks that they hold the same content.

  Another number of epochs is no other run, unless the learning rate depends on it. An earlier run
  that has left nothing of value, such as one that failed in its first epoch, is replaced. Call it
  inside `lock.owned`.

  Args:
    trained: epochs that the run in the workdir has finished.
    is_finished: the run in the workdir has nothing left to do.
  Raises:
    WorkdirError: the folder belongs to a run with another config or dataset (the differences are
      listed), with more epochs, or without a state to go on from; or it holds files but no
      config.json, or can't be written.
  """
  run = {  # through JSON, which turns tuples into lists
    "dataset.json": json.loads(json.dumps(dataclasses.asdict(info))),
    "config.json": json.loads(config.to_json()),  # last: it makes a folder a workdir
  }
  try:
    found = set(_names(workdir))
    if "config.json" not in found and found - _WRITTEN_FIRST:
      raise WorkdirError(f"{workdir} holds files but no config.json: choose an empty --workdir")
    if valuable := _valuable(workdir):
      _require_same_run(workdir, run, trained)
      if not is_finished:
        _require_state(workdir, valuable)
    if valuable or jax.process_index():  # only the first process writes
      return
    workdir.mkdir(parents=True, exist_ok=True)
    _remove_beginning(workdir)
    for name, content in run.items():
      write_atomically(workdir / name, json.dumps(content, indent=2) + "\n")
  except OSError as error:
    raise WorkdirError(f"--workdir {workdir} can't be used: {error.strerror or error}") from None


def set_epochs(workdir: epath.Path, epochs: int) -> None:
  """Notes in config.json for how many epochs the run now goes on."""
  path = workdir / "config.json"
  content = _read(path)
  if content["epochs"] != epochs and not jax.process_index():
    write_atomically(path, json.dumps(content | {"epochs": epochs}, indent=2) + "\n")


def _require_state(workdir: epath.Path, valuable: list[str]) -> None:
  # Before any result a run saves its first state: without one, somebody has removed it.
  if not any(name.isdigit() for name in _names(workdir / "checkpoints" / "last")):
    raise WorkdirError(
      f"{workdir} holds {' and '.join(valuable)} of this run, but no checkpoints/last to go on "
      "from: choose another --workdir, or move them away"
    )


def _valuable(workdir: epath.Path) -> list[str]:
  """What a run has left in a workdir that must not be lost, the most telling first."""
  found = [
    f"checkpoints/{name}"
    for name in ("last", "best")
    if any(step.isdigit() and step != "0" for step in _names(workdir / "checkpoints" / name))
  ]
  for name in ("summary.json", "metrics.jsonl"):
    path = workdir / name
    if path.exists() and path.read_bytes():
      found.append(name)
  return found


def _remove_beginning(workdir: epath.Path) -> None:
  """Removes what a run leaves that has failed in its first epoch: its first state, and why."""
  if (first := workdir / "checkpoints" / "last" / "0").exists():
    first.rmtree()
  if (report := workdir / NONFINITE).exists():
    report.unlink()


def _require_same_run(workdir: epath.Path, run: dict[str, Any], trained: int) -> None:
  there = {"config.json": json.loads(read_config(workdir).to_json())}
  there["dataset.json"] = _read(workdir / "dataset.json")
  differences = []
  for name, content in run.items():
    differences += _differences(_flat(there[name]), _flat(content))
  if any(not line.startswith("epochs:") for line in differences):
    raise WorkdirError(
      f"{workdir} holds a run with another config: choose another --workdir, or undo\n"
      + "\n".join(f"  {line}" for line in differences)
    )
  epochs, before = run["config.json"]["epochs"], there["config.json"]["epochs"]
  if epochs != before and depends_on_epochs(ConfigDict(run["config.json"])):
    raise WorkdirError(
      f"{workdir} holds a run of {before} epochs, and config.schedule spreads its learning rate "
      f"over them: for {epochs} choose another --workdir, or go on with --config.epochs={before}"
    )
  if epochs < trained:
    raise WorkdirError(f"{workdir} has trained {trained} epochs: config.epochs = {epochs} is less")


def _names(folder: epath.Path) -> list[str]:
  """Names of what is in a folder; none if it does not exist. No glob: a path may hold brackets."""
  # Buckets have no empty folders: even after mkdir a folder may not exist.
  return [path.name for path in folder.iterdir()] if folder.exists() else []


def read_config(workdir: epath.Path) -> ConfigDict:
  """The config of the run in `workdir`; knobs that are newer than the run have their defaults.

  But runs of mlp_models 0.3 and before have squashed all images to squares.

  Raises:
    WorkdirError: the folder holds no run, or a damaged one.
  """
  config = ConfigDict(default.get_config(), type_safe=False)
  path = workdir / "config.json"
  content = _read(path)
  try:
    config.update(content)
    if "crop_mode" not in content["data"]:
      config.data.crop_mode = "squash"
    mlp_models.create(**config.model, dtype=config.dtype, remat=config.remat)
  except (AttributeError, KeyError, TypeError, ValueError) as error:  # no object, or of other types
    raise WorkdirError(f"{path} is damaged: {first_line(error)}") from error
  return config


def begun_config(workdir: epath.Path) -> ConfigDict | None:
  """The config of the run that can go on in `workdir`; None: what begins there is a new run.

  Raises:
    WorkdirError: it is damaged.
  """
  return read_config(workdir) if _valuable(workdir) else None


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


def _read(path: epath.Path) -> dict[str, Any]:
  """A JSON object of a workdir.

  Raises:
    WorkdirError: it is missing or damaged.
  """
  try:
    content = json.loads(path.read_text())
  except OSError:
    raise WorkdirError(f"{path} is missing: {path.parent} holds no run") from None
  except ValueError as error:
    raise WorkdirError(f"{path} is damaged: {first_line(error)}") from None
  if not isinstance(content, dict):
    raise WorkdirError(f"{path} is damaged: it holds no JSON object.")
  return content
