"""A whole run, top to bottom: open it, train it epoch by epoch, test its best weights."""

import contextlib
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train import data, optimizer, pretrained, schedule
from train.check import check_memory
from train.data import statistics
from train.data.batches import num_batches, train_calls
from train.devices import hosts
from train.devices.mesh import make_mesh, microbatch_size, replicated
from train.errors import Interrupted, SavedAndStopped, TrainingFailed, WorkdirError
from train.interrupt import StopRequest
from train.nonfinite import Guard
from train.run import lock, metrics, workdir
from train.run.checkpoint import Checkpoints
from train.run.header import format_header
from train.run.progress import Progress
from train.state import (
  Sums,
  TrainState,
  Weights,
  abstract_state,
  count_parameters,
  make_init,
  make_model,
)
from train.step import (
  compile_in_background,
  evaluate,
  make_eval_step,
  make_train_step,
  total_steps,
)

_SAVE = 1  # vote 1: save; a larger vote is 1 + the number of a signal: save and stop


def train_and_evaluate(config: ConfigDict, folder: str | os.PathLike) -> dict[str, Any]:
  """Trains `config.model`, from `config.init` if given, or resumes a run in the same folder.

  Args:
    config: accepted by `check.check_config`.
    folder: the workdir.
  Returns:
    The content of summary.json: test metrics of the best epoch's weights, and figures of the run.
  Raises:
    ConfigError: the batch does not fit the devices, the warm-up the run, or `config.init` the rest.
    DataError: the dataset is unavailable or broken.
    WorkdirError: the folder can't be used, is in use by another process, or holds a run of another
      config or version.
    Disagreement: the processes of the run differ in config, dataset or workdir.
    SavedAndStopped: a signal asked the run to stop; its state is saved.
    StorageError: results can't be written.
    TrainingFailed: a loss, gradient or parameter is NaN or infinite; nonfinite.json says where.
  """
  folder = epath.Path(folder)
  mesh = make_mesh(**config.mesh)
  with hosts.first_goes_first(on_each_host=True):  # it may download the weights
    config = pretrained.resolve(config, folder)
  check_memory(config, mesh)
  microbatch = microbatch_size(config, mesh)  # raises, before anything costly starts
  with contextlib.ExitStack() as stack:
    stack.enter_context(lock.owned(folder))
    info = claim(config, folder)
    schedule.check_warmup(config, total_steps(config, info.sizes["train"]))
    summary = metrics.read_summary(folder)
    if summary and metrics.is_finished(summary, config.epochs):
      print(f"{folder} holds a finished run; another --workdir starts a new one.")
      return summary
    run, state = open_run(config, info, folder, mesh, microbatch, stack)
    state = train(run, state)
    return test(run, state)


class Run(NamedTuple):
  """Everything that the parts of a run share."""

  config: ConfigDict
  folder: epath.Path
  mesh: Mesh
  dataset: data.Dataset
  step: jax.stages.Wrapped  # (state, batches) -> (next state, Sums of each step)
  eval_step: jax.stages.Wrapped  # (weights, batch) -> Sums
  template: TrainState  # shapes, dtypes and shardings of the state
  checkpoints: Checkpoints
  watch: "Watch"
  guard: Guard
  writer: metrics.Writer
  progress: Progress


class Watch:
  """Checks the clock and the signals between two calls of the step; all processes agree."""

  def __init__(self, stop: StopRequest, checkpoints: Checkpoints, config: ConfigDict, mesh: Mesh):
    self._stop, self._checkpoints = stop, checkpoints
    self._seconds = config.checkpoint_seconds
    self._agree = hosts.Agreement(mesh)

  def __call__(self, state: TrainState, look: Callable[[], None] = lambda: None) -> None:
    """Saves the state if it is due; after a signal, saves it and raises SavedAndStopped.

    Args:
      look: called before the state is saved; raises if it must not be.
    """
    late = self._checkpoints.seconds_since_last > self._seconds
    if decision := self._agree(_SAVE + self._stop.signum if self._stop.signum else _SAVE * late):
      look()
      self.save(state, wait=decision > _SAVE)
    if decision > _SAVE:
      raise SavedAndStopped(decision - _SAVE)

  def save(self, state: TrainState, wait: bool = False) -> None:
    """Saves the state now, in the background unless `wait`."""
    self._checkpoints.save_last(state, wait)
    self._agree.forget()


def claim(config: ConfigDict, folder: epath.Path) -> data.DatasetInfo:
  """Finds or prepares the dataset and makes the workdir this run's; all processes agree on both."""
  with hosts.first_goes_first(on_each_host=True):
    config.data = data.resolve(config.data)
  processes = data.Processes(hosts.share, hosts.gather)
  info = data.describe(config.data, processes, config.model.image_size)
  rows, summary = metrics.read(folder), metrics.read_summary(folder)
  trained = rows[-1]["epoch"] if rows else 0
  with hosts.first_goes_first():
    workdir.claim(folder, config, info, trained, metrics.is_finished(summary, config.epochs))
  is_there = (folder / "config.json").exists()
  same = [config.to_json(), info.sizes, info.class_names, is_there, summary]
  hosts.require_same("config, dataset or --workdir", same)
  return info


def open_run(
  config: ConfigDict,
  info: data.DatasetInfo,
  folder: epath.Path,
  mesh: Mesh,
  microbatch: int,
  stack: contextlib.ExitStack,
) -> tuple[Run, TrainState]:
  """Reads the images while the step compiles, and makes the first state or restores the last one.

  Args:
    microbatch: images that a device computes at a time.
    stack: closes what the run opens.
  Raises:
    ConfigError, DataError, WorkdirError, Disagreement, Interrupted: see `train_and_evaluate`.
  """
  print(f"Reading {info.name} and compiling {config.model.name} takes a moment.", flush=True)
  init = make_init(config, info, mesh)
  template = abstract_state(init, info)
  stop = stack.enter_context(StopRequest())
  checkpoints = stack.enter_context(Checkpoints(folder))
  hosts.require_same("the checkpoint that they see", checkpoints.last_version())
  checkpoints.require_version()
  weights = pretrained.load(config, info) if checkpoints.last_version() is None else None

  step = make_train_step(config, info, microbatch, mesh)
  compiling = compile_in_background(step, init, config, info, mesh)
  dataset = data.load(config.data, config.model.image_size, sharers=hosts.processes_here())
  compiled, _ = compiling.result()
  if stop.signum and jax.process_count() == 1:  # several processes agree after the first call
    raise Interrupted(stop.signum)

  state = checkpoints.restore_last(template)
  if state is None:
    state = pretrained.begin(init(*statistics.of_config(config.data, dataset["train"])), weights)
    # A disk without space ends the run here, not after hours. Since there is a state before any
    # result, results without a state mean that somebody has removed it.
    checkpoints.save_last(state, wait=True)
  else:
    workdir.set_epochs(folder, config.epochs)
    print(f"Going on in {folder}, epoch {int(state.epoch) + 1}, step {int(state.step)}.")
  print(format_header(config, info, dataset, state, mesh, microbatch, compiled), flush=True)

  steps = total_steps(config, info.sizes["train"])
  title = f"{config.model.name} on {info.name}"
  run = Run(
    config=config,
    folder=folder,
    mesh=mesh,
    dataset=dataset,
    step=step,
    eval_step=make_eval_step(config, info.num_classes, microbatch, mesh),
    template=template,
    checkpoints=checkpoints,
    watch=Watch(stop, checkpoints, config, mesh),
    guard=Guard(config, make_model(config, info.num_classes), dataset, microbatch, mesh, folder),
    writer=stack.enter_context(metrics.Writer(folder, int(state.epoch), title)),
    progress=stack.enter_context(Progress(steps, int(state.step), config.batch_size)),
  )
  return run, state


def train(run: Run, state: TrainState) -> TrainState:
  """Trains epoch by epoch from `state` to the last epoch or until early stopping.

  Raises:
    DataError, Interrupted, TrainingFailed: see `train_and_evaluate`.
  """
  config, images = run.config, run.dataset["train"]
  steps_per_epoch = num_batches(len(images), config.batch_size)
  steps = range(int(state.step), total_steps(config, len(images)))
  finish_epoch = _make_finish_epoch(config, run.mesh)
  with contextlib.closing(train_calls(images, config, run.mesh, steps)) as calls:
    while not _is_finished(state, config):
      epoch = int(state.epoch) + 1
      run.progress.description = f"epoch {epoch}/{config.epochs}"
      began = time.perf_counter()
      steps_left = epoch * steps_per_epoch - int(state.step)
      epoch_calls = itertools.islice(calls, -(-steps_left // config.steps_per_call))
      state = _train_epoch(run, state, epoch_calls)
      metrics_of = {"train": state.sums.means()}
      train_seconds = time.perf_counter() - began
      # A resumed epoch trains on fewer images, and an epoch's last batch is not full.
      seen = len(images) - (steps_per_epoch - steps_left) * config.batch_size

      metrics_of["val"] = _evaluate(run, state, state.weights(), "validation")
      run.guard.look_at_validation(state, metrics_of["val"]["loss"])
      run.progress.skip_pause()
      row = {
        "epoch": epoch,
        "step": int(state.step),
        **{f"{split}_{k}": v for split, values in metrics_of.items() for k, v in values.items()},
        "learning_rate": schedule.learning_rate(
          config, steps.stop, int(state.step) - 1, state.plateau.scale
        ),
        "images_per_second": max(0, seen) / train_seconds,
        "seconds": time.perf_counter() - began,
      }
      run.writer.epoch(row)
      run.progress.write(metrics.format_epoch(row, config.epochs))
      if skipped := int(state.skipped):
        run.progress.write(f"updates skipped so far, because they were not finite: {skipped}")

      # Where some images' loss is no number, the accuracy of the others makes no best epoch.
      value = row[config.best_metric] if math.isfinite(row["val_loss"]) else math.nan
      state = finish_epoch(state, row["val_loss"], value)
      if int(state.best.epoch) == epoch:
        run.checkpoints.save_best(state)
      run.watch.save(state)
  return state


def test(run: Run, state: TrainState) -> dict[str, Any]:
  """Evaluates the weights of the best epoch on the test images, and writes summary.json."""
  best_epoch = int(state.best.epoch)
  if not best_epoch:
    raise TrainingFailed(
      "no epoch has a finite validation loss: no weights to test. Try a smaller "
      "--config.optimizer.learning_rate, in another --workdir"
    )
  run.progress.write(f"Testing the weights of epoch {best_epoch}.")
  restored = run.checkpoints.restore_best(run.template.weights(), best_epoch)
  if restored is None:  # saved before the state that names its epoch, so it was removed
    raise WorkdirError(f"{run.folder / 'checkpoints' / 'best'} holds no weights of this run")
  best, best_epoch = restored
  summary = {
    **{f"test_{name}": value for name, value in _evaluate(run, state, best, "test").items()},
    "best_epoch": best_epoch,
    "epochs": int(state.epoch),
    "parameters": count_parameters(state.params),
    "stopped_early": int(state.epoch) < run.config.epochs,
    "seconds": sum(row["seconds"] for row in metrics.read(run.folder)),
  }
  if run.config.data.test_split == run.config.data.validation_split:
    summary["test_split"] = run.config.data.test_split
  run.writer.summary(summary)
  return summary


def _train_epoch(run: Run, state: TrainState, calls: Iterable[dict]) -> TrainState:
  before = None
  for batches in calls:
    state, sums = run.step(state, batches)
    if before is not None:  # at most one call waits, so that a signal takes effect soon
      run.guard.look_at_losses(state, *before)
    before = batches, sums.loss
    run.progress.update(len(batches["label"]))
    run.watch(state, functools.partial(run.guard.look_at_state, state, *before))
  if before is not None:
    run.guard.look_at_state(state, *before)
  return state


def _evaluate(run: Run, state: TrainState, weights: Weights, split: str) -> dict[str, float]:
  """Metrics of the weights on a split; after each batch `run.watch` may save the state and stop."""
  return evaluate(
    run.eval_step,
    weights,
    run.dataset[split],
    run.config.batch_size,
    run.mesh,
    after_batch=lambda: run.watch(state),
  )


def _make_finish_epoch(config: ConfigDict, mesh: Mesh) -> Callable:
  """Makes (state, val_loss, value of `best_metric`) -> the state that begins the next epoch."""
  plateau = optimizer.make_plateau(schedule.plateau(config))
  mode = optimizer.BEST[config.best_metric]

  @functools.partial(jax.jit, out_shardings=replicated(mesh))
  def fields(epoch, plateau_state, best, val_loss, value):
    return {
      "epoch": epoch + 1,
      "sums": Sums.zero(),
      "plateau": optimizer.end_of_epoch(plateau, plateau_state, val_loss),
      "best": optimizer.update_best(best, value, epoch + 1, mode),
    }

  def finish_epoch(state: TrainState, val_loss: float, value: float) -> TrainState:
    return state.replace(**fields(state.epoch, state.plateau, state.best, val_loss, value))

  return finish_epoch


def _is_finished(state: TrainState, config: ConfigDict) -> bool:
  epoch = int(state.epoch)
  return epoch >= config.epochs or optimizer.should_stop(
    state.best, epoch, config.early_stop_patience
  )
