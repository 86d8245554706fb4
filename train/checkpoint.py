"""Checkpoints with orbax: the last state, to continue from, and the best weights, to use.

They are in workdir/checkpoints/last/STEP (the whole TrainState) and workdir/checkpoints/best/STEP
(Weights). Each folder holds one; it is deleted once its successor is complete.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import linen as nn
from jax.sharding import Mesh, Sharding
from ml_collections import ConfigDict

from train import workdir
from train.data import DatasetInfo
from train.mesh import replicated
from train.state import TrainState, Weights, init_state, make_model


class Checkpoints:
  """Saves in the background; leaving the context waits until all is on disk, or raises.

  Args:
    folder: the workdir.
    read_only: nothing is made or deleted in it.
  """

  def __init__(self, folder: Path, read_only: bool = False):
    folder = folder.absolute() / "checkpoints"  # orbax takes absolute paths only
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else 1, create=not read_only, read_only=read_only
    )
    self._last = ocp.CheckpointManager(folder / "last", options=options)
    self._best = ocp.CheckpointManager(folder / "best", options=options)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception) -> None:
    for manager in (self._best, self._last):
      manager.wait_until_finished()
      manager.close()

  def save_last(self, state: TrainState) -> None:
    """Saves the state to continue from."""
    # A last state that speaks of a best epoch must never be without its weights.
    self._best.wait_until_finished()
    _save(self._last, state, int(state.step))

  def save_best(self, state: TrainState) -> None:
    """Saves the weights of the best epoch so far."""
    _save(self._best, state.weights(), int(state.step))

  def restore_last(self, abstract: TrainState, sharding: Sharding) -> TrainState | None:
    """The saved state, laid out by `sharding`; None if there is none.

    Args:
      abstract: shapes and dtypes, as `jax.eval_shape` gives them.
    """
    return _restore(self._last, abstract, sharding)

  def restore_best(self, abstract: Weights, sharding: Sharding) -> Weights | None:
    """The weights of the best epoch; None if no epoch has ended yet."""
    return _restore(self._best, abstract, sharding)


class TrainedModel(NamedTuple):
  """What a run leaves to those who use its model."""

  config: ConfigDict
  info: DatasetInfo
  model: nn.Module
  weights: Weights


def load_trained_model(folder: Path, mesh: Mesh) -> TrainedModel:
  """The model of the run in `folder` with its best weights, on every device of the mesh.

  Raises:
    WorkdirError: no run is there, or none that has ended an epoch.
  """
  config, info = workdir.read_config(folder), workdir.read_dataset(folder)
  statistics = jax.ShapeDtypeStruct(info.image_shape[-1:], "float32")
  abstract = jax.eval_shape(lambda m, v: init_state(config, info, m, v), statistics, statistics)
  weights = None
  if (folder / "checkpoints").exists():
    with Checkpoints(folder, read_only=True) as checkpoints:
      weights = checkpoints.restore_best(abstract.weights(), replicated(mesh))
  if weights is None:
    raise workdir.WorkdirError(f"{folder} holds no weights yet: no epoch of its run has ended")
  return TrainedModel(config, info, make_model(config, info.num_classes), weights)


def _save(manager: ocp.CheckpointManager, tree, step: int) -> None:
  # A run that was killed after this save comes here again with the same values; orbax refuses to
  # overwrite a step.
  if manager.latest_step() != step:
    manager.save(step, args=ocp.args.StandardSave(tree))


def _restore(manager: ocp.CheckpointManager, abstract, sharding: Sharding):
  step = manager.latest_step()
  if step is None:
    return None
  # Told today's sharding, as the devices may not be those that saved.
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract
  )
  return manager.restore(step, args=ocp.args.StandardRestore(abstract))
