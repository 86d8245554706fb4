"""Checkpoints with orbax: the last state, to continue from, and the best weights, to use.

workdir/checkpoints/last holds one whole TrainState, workdir/checkpoints/best the last two Weights
by epoch. A checkpoint is deleted once its successor is complete.
"""

import contextlib
import time
from typing import NamedTuple

import orbax.checkpoint as ocp
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

import mlp_models
from train.data.splits import DatasetInfo
from train.errors import WorkdirError
from train.run import metrics, workdir
from train.state import TrainState, Weights, abstract_state, make_init, make_model

# Saved with each checkpoint; mlp_models 0.1 saved neither.
_VERSION = {
  "state_version": TrainState.VERSION,
  "saved_by": f"mlp_models {mlp_models.__version__}",
}
_BEFORE_VERSIONS = {"state_version": 0, "saved_by": "mlp_models 0.1"}


class Checkpoints:
  """Saves in the background; leaving the context waits until all is on disk, or raises.

  Args:
    folder: the workdir.
    read_only: create and delete nothing in it.
  """

  def __init__(self, folder: epath.Path, read_only: bool = False):
    if workdir.is_local(folder):
      folder = folder.absolute()  # orbax requires it
    folder = folder / "checkpoints"
    self._saved_at = time.monotonic()

    def manager(name: str, keep: int) -> ocp.CheckpointManager:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep,
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,  # what a killed process left half-written
      )
      return ocp.CheckpointManager(folder / name, options=options)

    # Keep two of the best: a run killed after saving new best weights, but before saving the state,
    # resumes from a state that still names the best epoch before.
    self._last, self._best = manager("last", keep=1), manager("best", keep=2)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception) -> None:
    with contextlib.ExitStack() as stack:
      stack.callback(self._last.close)  # waits, and raises if a save has failed
      stack.callback(self._best.close)

  @property
  def seconds_since_last(self) -> float:
    """Seconds since the last `save_last`, or since the run began."""
    return time.monotonic() - self._saved_at

  def save_last(self, state: TrainState) -> None:
    """Saves the state to continue from."""
    # Add the epoch: after an epoch's evaluation the state has changed, but not the step.
    self._save(self._last, state, int(state.step) + int(state.epoch))
    self._saved_at = time.monotonic()

  def save_best(self, state: TrainState) -> None:
    """Saves the weights of the best epoch so far."""
    self._save(self._best, state.weights(), int(state.epoch))

  def restore_last(self, template: TrainState) -> TrainState | None:
    """The saved state, whatever devices saved it; None if there is none.

    Args:
      template: shapes, dtypes and shardings to restore to, from `state.abstract_state`.
    Raises:
      WorkdirError: the checkpoint can't be read.
    """
    return _restore(self._last, template)

  def last_version(self) -> dict | None:
    """The last state's checkpoint, its state's version and who saved it; None if there is none.

    Raises:
      WorkdirError: the checkpoint can't be read.
    """
    step = self._last.latest_step()
    return None if step is None else {"checkpoint": step} | _version(self._last, step)

  def require_version(self) -> None:
    """Raises WorkdirError if the last state was saved by another version."""
    if (step := self._last.latest_step()) is not None:
      found = _version(self._last, step)
      if found["state_version"] != TrainState.VERSION:
        raise _other_version(self._last, step, found)

  def restore_best(self, template: Weights, epoch: int | None = None) -> Weights | None:
    """The weights saved as the best at `epoch`, or the latest best; None if there are none.

    Raises:
      WorkdirError: they can't be read, or were saved by a later version. Weights of earlier
        versions have the same form.
    """
    step = self._best.latest_step() if epoch is None else epoch
    if step is not None and step in self._best.all_steps():
      found = _version(self._best, step)
      if found["state_version"] > TrainState.VERSION:
        raise _other_version(self._best, step, found)
    return _restore(self._best, template, step)

  def _save(self, manager: ocp.CheckpointManager, tree, step: int) -> None:
    # One save at a time: a last state must not name a best epoch whose weights are not complete,
    # and among several processes the barriers of both managers have the same names.
    self._last.wait_until_finished()
    self._best.wait_until_finished()
    # A run killed after this save repeats it with the same values up to rounding; orbax refuses to
    # overwrite.
    if step not in manager.all_steps():
      manager.save(step, args=ocp.args.StandardSave(tree), custom_metadata=_VERSION)


def _version(manager: ocp.CheckpointManager, step: int) -> dict:
  """What is saved with a checkpoint: the state's version, and who saved it."""
  try:
    metadata = manager.metadata(step)
  except (OSError, ValueError, KeyError) as error:
    raise _unreadable(manager, step, error) from error
  if metadata.init_timestamp_nsecs is None:  # orbax passes over a file that it can't read
    raise _unreadable(manager, step, ValueError("its metadata is missing or damaged"))
  return _BEFORE_VERSIONS | (metadata.custom_metadata or {})


def _other_version(manager: ocp.CheckpointManager, step: int, found: dict) -> WorkdirError:
  return WorkdirError(
    f"the checkpoint {manager.directory / str(step)} was saved by {found['saved_by']} (state "
    f"version {found['state_version']}), which reads it; this is {_VERSION['saved_by']} (version "
    f"{TrainState.VERSION}): use that version, or choose another --workdir"
  )


def _unreadable(manager: ocp.CheckpointManager, step: int, error: Exception) -> WorkdirError:
  reason = (str(error) or repr(error)).splitlines()[0]
  return WorkdirError(f"the checkpoint {manager.directory / str(step)} can't be read: {reason}")


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
  weights = None
  if (folder / "checkpoints").exists():
    best_epoch = (metrics.read_summary(folder) or {}).get("best_epoch")
    with Checkpoints(folder, read_only=True) as checkpoints:
      template = abstract_state(make_init(config, info, mesh), info).weights()
      weights = checkpoints.restore_best(template, best_epoch)
  if weights is None:
    raise WorkdirError(f"{folder} holds no weights yet: no epoch of its run has ended")
  return TrainedModel(config, info, make_model(config, info.num_classes), weights)


def _restore(manager: ocp.CheckpointManager, template, step=None):
  step = manager.latest_step() if step is None else step
  if step is None:
    return None
  try:
    # With shardings, because the devices may not be those that saved.
    return manager.restore(step, args=ocp.args.StandardRestore(template))
  except (OSError, ValueError, KeyError) as error:
    raise _unreadable(manager, step, error) from error
