"""Checkpoints with orbax: the last states, to continue from, and the best weights, to use.

workdir/checkpoints/last holds the last two TrainStates, workdir/checkpoints/best the last two best
Weights by epoch. Each is complete or absent, and saved with a checksum of its arrays. What proves
damaged when it is read is moved to workdir/checkpoints/damaged-..., and the one before is used.
"""

import contextlib
import sys
import time
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

import mlp_models
from train.data.splits import DatasetInfo
from train.devices import hosts
from train.errors import StorageError, WorkdirError
from train.run import metrics, workdir
from train.run.checksum import checksum
from train.run.storage import is_local, last_writes, plain_name, reason, retry
from train.state import TrainState, Weights, abstract_state, make_init, make_model, saved_fields

# Saved with each checkpoint; mlp_models 0.1 saved neither.
_VERSION = {
  "state_version": TrainState.VERSION,
  "saved_by": f"mlp_models {mlp_models.__version__}",
}
_PAUSES = (0.0, 0.5, 1.0)  # seconds after each attempt to read
_BEFORE_VERSIONS = {"state_version": 0, "saved_by": "mlp_models 0.1"}


class Checkpoints:
  """Saves and restores a run's states and weights. Use it as a context manager.

  Args:
    folder: the workdir.
    read_only: create, move and delete nothing in it.
  """

  def __init__(self, folder: epath.Path, read_only: bool = False):
    if is_local(folder):
      folder = folder.absolute()  # orbax requires it
    self._folder = folder / "checkpoints"
    if not read_only:
      self._folder.mkdir(parents=True, exist_ok=True)
    self._stack = contextlib.ExitStack()
    directory = self._stack.enter_context(plain_name(self._folder))
    self._read_only = read_only
    self._saved_at = time.monotonic()
    self._under_way: int | None = None  # the last state that is being saved in the background

    def manager(name: str) -> ocp.CheckpointManager:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else 2,
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,  # what a killed process left half-written
      )
      try:
        return ocp.CheckpointManager(directory / name, options=options)
      except ValueError:  # of metadata with a damaged name in it
        self._set_unlistable_aside(name)
        return ocp.CheckpointManager(directory / name, options=options)

    # Two of the best also because a run killed after saving new best weights, but before saving the
    # state, resumes from a state that still names the best epoch before.
    self._last, self._best = manager("last"), manager("best")

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    with self._stack, last_writes(error), contextlib.ExitStack() as stack:
      stack.callback(self._last.close)
      stack.callback(self._best.close)
      if failed := self._failure():
        raise StorageError(failed)

  @property
  def seconds_since_last(self) -> float:
    """Seconds since the last `save_last`, or since the run began."""
    return time.monotonic() - self._saved_at

  def save_last(self, state: TrainState, wait: bool = False) -> None:
    """Saves the state to continue from, in the background unless `wait`.

    If a save in the background fails, a line says so, and the next one waits and tries again.

    Raises:
      StorageError: the state could not be written, with `wait` or for the second time.
    """
    failed = self._failure()
    # Add the epoch: after an epoch's evaluation the state has changed, but not the step.
    step = int(state.step) + int(state.epoch)
    if step not in self._last.all_steps():  # right after a resume it is saved already
      if not wait and not failed:
        try:
          _begin(self._last, state, step)
          self._under_way = step
        except Exception as error:  # of any type, from orbax
          failed = f"{self._path(self._last, step)} can't be written: {reason(error)}"
      if failed:
        print(f"{failed}; trying again", file=sys.stderr, flush=True)
      if failed or wait:
        self._save(self._last, state, step)
    self._saved_at = time.monotonic()

  def save_best(self, state: TrainState) -> None:
    """Saves the weights of the best epoch so far, and waits until they are on disk.

    Raises:
      StorageError: they could not be written.
    """
    # One save at a time: among several processes the barriers of both managers have the same names.
    if failed := self._failure():
      print(failed, file=sys.stderr, flush=True)
    self._save(self._best, state.weights(), int(state.epoch))

  def restore_last(self, template: TrainState) -> TrainState | None:
    """The last saved state that is whole, whatever devices saved it; None if there is none.

    Best weights of later epochs are removed, since these epochs run again; they are set aside if a
    later state was damaged.

    Args:
      template: shapes, dtypes and shardings to restore to, from `state.abstract_state`.
    Raises:
      WorkdirError: there are checkpoints, but none can be read, or another version saved it.
    """
    steps = _newest_first(self._last)
    restored = self._restore(self._last, template, steps)
    if restored is None:
      return None
    state, step = restored
    for epoch in self._best.all_steps():
      if epoch > int(state.epoch) and step == steps[0]:
        self._best.delete(epoch)
      elif epoch > int(state.epoch):
        self._set_aside(self._best, epoch)
    return state

  def last_version(self) -> dict | None:
    """The last state's checkpoint, its state's version and who saved it; None if there is none."""
    for step in _newest_first(self._last):
      with contextlib.suppress(Exception):  # a damaged one is reported when it is restored
        metadata = _metadata(self._last, step)
        return {"checkpoint": step} | {key: metadata[key] for key in _VERSION}
    return None

  def require_version(self) -> None:
    """Raises WorkdirError if the last state was saved by another version."""
    found = self.last_version()
    if found and found["state_version"] != TrainState.VERSION:
      raise _other_version(self._path(self._last, found["checkpoint"]), found)

  def restore_best(self, template: Weights, epoch: int | None = None) -> tuple[Weights, int] | None:
    """The weights saved as the best at `epoch` or, if these are missing or damaged, before it.

    Args:
      epoch: None: the latest.
    Returns:
      The weights and their epoch; None if there are none.
    Raises:
      WorkdirError: they can't be read, or were saved by a later version. Weights of earlier
        versions have the same form.
    """
    steps = [step for step in _newest_first(self._best) if epoch is None or step <= epoch]
    if steps and epoch not in (None, steps[0]) and not jax.process_index():
      missing = f"The best weights, {self._path(self._best, epoch)}, are missing"
      print(f"{missing}: those of epoch {steps[0]} are used", file=sys.stderr, flush=True)
    return self._restore(self._best, template, steps)

  def _save(self, manager: ocp.CheckpointManager, tree, step: int) -> None:
    def write() -> None:
      _begin(manager, tree, step)
      manager.wait_until_finished()

    retry(write, self._path(manager, step))

  def _failure(self) -> str:
    """Waits for the save in the background; why it failed, or ""."""
    step, self._under_way = self._under_way, None
    if step is None:
      return ""
    try:
      self._last.wait_until_finished()
    except Exception as error:  # of any type, from orbax's threads
      return f"{self._path(self._last, step)} can't be written: {reason(error)}"
    return ""

  def _restore(self, manager: ocp.CheckpointManager, template, steps: list[int]):
    """The first of `steps` that is whole, and which it is; None if there are none."""
    for step in steps:
      path, tree, problem = self._path(manager, step), None, ""
      try:
        found = _metadata(manager, step)
      except Exception as error:  # orbax raises many types over damaged files
        problem = reason(error)
      problem = next(filter(None, hosts.gather(problem)), "")
      if not problem:
        version = found["state_version"]
        # Weights of earlier versions have the same form.
        if version > TrainState.VERSION or version < TrainState.VERSION and manager is self._last:
          raise _other_version(path, found)
        tree, problem = _read(manager, template, path, found.get("checksum"))
      if not problem:
        return tree, step
      message = f"the checkpoint {path} can't be read: {problem}"
      if step == steps[-1]:
        raise WorkdirError(message)
      if not jax.process_index():
        print(f"{message}; the one before it is used", file=sys.stderr, flush=True)
      if not self._read_only:
        self._set_aside(manager, step)
    return None

  def _path(self, manager: ocp.CheckpointManager, step: int) -> epath.Path:
    """Where a checkpoint is, as the user knows it."""
    return self._folder / manager.directory.name / str(step)

  def _set_aside(self, manager: ocp.CheckpointManager, step: int) -> None:
    """Moves a damaged checkpoint away, so that its step can be saved again."""
    self._move(self._path(manager, step))
    manager.reload()

  def _set_unlistable_aside(self, name: str) -> None:
    """Moves away the checkpoints whose metadata orbax can't read.

    Raises:
      WorkdirError: that is all of them, or nothing may be moved.
    """
    steps = [path for path in (self._folder / name).iterdir() if path.name.isdigit()]
    reasons = {}
    for path in steps:
      try:
        ocp.metadata.get_step_metadata(path)
      except Exception as error:  # orbax raises many types over damaged files
        reasons[path] = f"the checkpoint {path} can't be read: {reason(error)}"
    if self._read_only or len(reasons) == len(steps):
      raise WorkdirError("; ".join(reasons.values()))
    for path, text in reasons.items():
      if not jax.process_index():
        print(f"{text}; another is used", file=sys.stderr, flush=True)
      self._move(path)

  def _move(self, path: epath.Path) -> None:
    with hosts.first_goes_first():
      if path.exists():
        # A bucket has no empty folders to move it into.
        name = f"damaged-{path.parent.name}-{path.name}-{time.time_ns()}"
        path.rename(self._folder / name)


def _newest_first(manager: ocp.CheckpointManager) -> list[int]:
  return sorted(manager.all_steps(), reverse=True)


def _begin(manager: ocp.CheckpointManager, tree, step: int) -> None:
  """Begins a save in the background."""
  metadata = _VERSION | {"checksum": checksum(tree)}
  arguments = ocp.args.StandardSave(saved_fields(tree))
  if not manager.save(step, args=arguments, custom_metadata=metadata, force=True):
    raise StorageError("orbax declines to save it")


def _read(
  manager: ocp.CheckpointManager, template, path: epath.Path, expected: int | None
) -> tuple[Any, str]:
  """A checkpoint on the devices of `template`, and what is wrong with it, or "".

  Args:
    path: of the checkpoint, as the user knows it.
    expected: its checksum; None: it was saved without one.
  Raises:
    WorkdirError: this is one of several processes, and it alone may have failed: the others wait
      for it inside orbax.
  """
  for pause in _PAUSES:
    try:
      arguments = ocp.args.StandardRestore(saved_fields(template))
      tree = template.replace(**manager.restore(int(path.name), args=arguments))
    except MemoryError:
      raise
    except Exception as error:  # orbax and tensorstore raise many types over damaged files
      if "RESOURCE_EXHAUSTED" in str(error):
        raise
      problem = reason(error)
      if jax.process_count() > 1:
        raise WorkdirError(
          f"the checkpoint {path} can't be read: {problem}; move it away to go on from the one "
          "before it"
        ) from error
      time.sleep(pause)  # a network drive may have failed for a moment
      continue
    wrong = expected is not None and checksum(tree) != expected
    return tree, "its checksum is another: the disk has changed it" if wrong else ""
  return None, problem


def _metadata(manager: ocp.CheckpointManager, step: int) -> dict:
  """What is saved with a checkpoint: the state's version, who saved it, and its checksum."""
  metadata = manager.metadata(step)
  if metadata.init_timestamp_nsecs is None:  # orbax passes over a file that it can't read
    raise ValueError("its metadata is missing or damaged")
  return _BEFORE_VERSIONS | (metadata.custom_metadata or {})


def _other_version(path: epath.Path, found: dict) -> WorkdirError:
  return WorkdirError(
    f"the checkpoint {path} was saved by {found['saved_by']} (state "
    f"version {found['state_version']}), which reads it; this is {_VERSION['saved_by']} (version "
    f"{TrainState.VERSION}): use that version, or choose another --workdir"
  )


class TrainedModel(NamedTuple):
  """A run's model with its best weights, its config and its dataset's description."""

  config: ConfigDict
  info: DatasetInfo
  model: nn.Module
  weights: Weights


def load_trained_model(folder: epath.Path, mesh: Mesh) -> TrainedModel:
  """The model of the run in `folder` with its best weights, on every device of the mesh.

  Raises:
    WorkdirError: the folder holds no run, or no epoch of it has ended.
  """
  config, info = workdir.read_config(folder), workdir.read_dataset(folder)
  best = None
  if (folder / "checkpoints").exists():
    summary, best_epoch = metrics.read_summary(folder), None
    if summary and metrics.is_finished(summary, config.epochs):
      best_epoch = summary["best_epoch"]
    with Checkpoints(folder, read_only=True) as checkpoints:
      template = abstract_state(make_init(config, info, mesh), info).weights()
      best = checkpoints.restore_best(template, best_epoch)
  if best is None and metrics.read(folder):
    raise WorkdirError(f"{folder / 'checkpoints' / 'best'} holds no weights: they were removed")
  if best is None:
    raise WorkdirError(f"{folder} holds no weights yet: no epoch of its run has ended")
  return TrainedModel(config, info, make_model(config, info.num_classes), best[0])
