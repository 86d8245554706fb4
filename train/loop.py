"""A whole run, top to bottom."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train import data, optimizer
from train.data.batches import num_batches, train_calls
from train.data.statistics import channel_statistics
from train.devices import hosts
from train.devices.mesh import FSDP, make_mesh, microbatch_size, replicated
from train.errors import Interrupted, TrainingFailed
from train.interrupt import StopRequest
from train.run import metrics, workdir
from train.run.checkpoint import Checkpoints
from train.run.progress import Progress
from train.state import Sums, TrainState, abstract_state, make_init, make_model
from train.step import compile_in_background, evaluate, make_eval_step, make_train_step

_SAVE = 1  # what a process votes for, or the number of a signal: 2 and more


def train_and_evaluate(config: ConfigDict, folder: epath.Path) -> dict:
  """Trains `config.model`, or goes on where an earlier run in the same folder stopped.

  Args:
    config: one that `check.check_config` has passed.
    folder: the workdir.
  Returns:
    What summary.json holds: the test metrics of the best epoch's weights, and figures of the run.
  Raises:
    ConfigError: the batch does not fit the devices.
    DataError: the dataset is out of reach or broken.
    WorkdirError: the folder can't be used, or holds a run with another config.
    Disagreement: the processes of the run differ in config, dataset or workdir.
    Interrupted: a signal asked the run to stop; its state is saved.
    TrainingFailed: the loss is no longer a number.
  """
  mesh = make_mesh(**config.mesh)
  microbatch = microbatch_size(config, mesh)
  with hosts.first_goes_first():
    config.data = data.resolve(config.data)
  info = data.describe(config.data, data.Processes(hosts.share, hosts.gather))
  with hosts.first_goes_first():
    workdir.claim(folder, config, info)
  summary = metrics.read_summary(folder)
  run = [config.to_json(), info.sizes, info.class_names, (folder / "config.json").exists(), summary]
  hosts.require_same("config, dataset or --workdir", run)
  if summary:
    print(f"{folder} holds a finished run; another --workdir starts a new one.")
    return summary
  print(f"Reading {info.name} and compiling {config.model.name} takes a moment.", flush=True)
  model = make_model(config, info.num_classes)
  init = make_init(config, info, mesh)
  abstract = abstract_state(init, info)
  finish_epoch = _make_finish_epoch(config, mesh)
  steps_per_epoch = num_batches(info.sizes["train"], config.batch_size)
  agree = hosts.Agreement(mesh)

  with contextlib.ExitStack() as stack:
    stop, checkpoints = stack.enter_context(StopRequest()), stack.enter_context(Checkpoints(folder))
    step = make_train_step(config, info.num_classes, microbatch, mesh)
    compiling = compile_in_background(step, init, config, info, mesh)
    dataset = data.load(config.data, config.model.image_size, sharers=hosts.processes_here())
    compiled, _ = compiling.result()
    if stop.signum and jax.process_count() == 1:  # several agree after the first call
      raise Interrupted(stop.signum)

    hosts.require_same("the checkpoint that they see", checkpoints.last_step)
    state = checkpoints.restore_last(abstract)
    if state is None:
      state = init(*channel_statistics(dataset.train))
    else:
      print(f"Going on in {folder}, epoch {int(state.epoch) + 1}, step {int(state.step)}.")
    steps = range(int(state.step), config.epochs * steps_per_epoch)
    calls = stack.enter_context(
      contextlib.closing(train_calls(dataset.train, config, mesh, steps))  # ends its workers
    )
    eval_step = make_eval_step(model, microbatch, mesh)
    _print_header(config, info, dataset, state, mesh, microbatch, compiled)

    def between_calls(state: TrainState) -> None:
      late = checkpoints.seconds_since_last > config.checkpoint_seconds
      if decision := agree(stop.signum or (_SAVE if late else 0)):
        checkpoints.save_last(state)
        agree.forget()
      if decision > _SAVE:
        raise Interrupted(decision)

    progress = Progress(config.epochs * steps_per_epoch, int(state.step), config.batch_size)
    writer = metrics.Writer(folder, int(state.epoch), f"{config.model.name} on {info.name}")
    with writer, progress:
      while not _finished(state, config):
        epoch = int(state.epoch) + 1
        progress.description = f"epoch {epoch}/{config.epochs}"
        began = time.perf_counter()
        left = epoch * steps_per_epoch - int(state.step)
        epoch_calls = itertools.islice(calls, -(-left // config.steps_per_call))
        state = _train_epoch(state, step, epoch_calls, progress, between_calls)
        train = state.sums.means()
        train_seconds = time.perf_counter() - began
        before = (steps_per_epoch - left) * config.batch_size  # images that a run before this saw
        seen = max(0, len(dataset.train) - before)

        val = evaluate(
          eval_step,
          state.weights(),
          dataset.validation,
          config.batch_size,
          mesh,
          after_batch=functools.partial(between_calls, state),
        )
        progress.skip_pause()
        row = {
          "epoch": epoch,
          "step": int(state.step),
          **{f"train_{name}": value for name, value in train.items()},
          **{f"val_{name}": value for name, value in val.items()},
          "learning_rate": config.optimizer.learning_rate * float(state.plateau.scale),
          "images_per_second": seen / train_seconds,
          "seconds": time.perf_counter() - began,
        }
        writer.epoch(row)
        progress.write(metrics.format_epoch(row, config.epochs))

        state = finish_epoch(state, val["loss"], row[config.best_metric])
        if int(state.best.epoch) == epoch:
          checkpoints.save_best(state)
        checkpoints.save_last(state)
        agree.forget()

      best_epoch = int(state.best.epoch)
      progress.write(f"Testing the weights of epoch {best_epoch}.")
      best = checkpoints.restore_best(abstract.weights(), best_epoch)
      test = evaluate(
        eval_step,
        best,
        dataset.test,
        config.batch_size,
        mesh,
        after_batch=functools.partial(between_calls, state),
      )
      summary = {
        **{f"test_{name}": value for name, value in test.items()},
        "best_epoch": best_epoch,
        "epochs": int(state.epoch),
        "parameters": _count(state.params),
        "stopped_early": int(state.epoch) < config.epochs,
        "seconds": sum(row["seconds"] for row in metrics.read(folder)),
      }
      writer.summary(summary)
  return summary


def _make_finish_epoch(config: ConfigDict, mesh: Mesh) -> Callable:
  """(state, validation loss, the metric to choose by) -> the state that begins the next epoch."""
  plateau = optimizer.make_plateau(config.plateau)
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


def _train_epoch(
  state: TrainState,
  step: Callable,
  calls: Iterable[dict],
  progress: Progress,
  after_call: Callable[[TrainState], None],
) -> TrainState:
  before = None
  for batches in calls:
    state, sums = step(state, batches)
    if before is not None:  # one call runs and one waits, so that a signal is soon obeyed
      _require_finite(before)
    before = sums.loss
    progress.update(len(batches["label"]))
    after_call(state)
  if before is not None:
    _require_finite(before)
  return state


def _require_finite(losses: jax.Array) -> None:
  if not np.isfinite(losses).all():
    raise TrainingFailed(
      "the loss is no number any more: training diverged. Try a smaller "
      "--config.optimizer.learning_rate, in another --workdir."
    )


def _finished(state: TrainState, config: ConfigDict) -> bool:
  epoch = int(state.epoch)
  return epoch == config.epochs or optimizer.should_stop(
    state.best, epoch, config.early_stop_patience
  )


def _print_header(
  config: ConfigDict,
  info: data.DatasetInfo,
  dataset: data.Dataset,
  state: TrainState,
  mesh: Mesh,
  microbatch: int,
  compiled: jax.stages.Compiled,
) -> None:
  device = mesh.devices.flat[0]
  memory = compiled.memory_analysis()
  needed = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes  # the new state lies where the old one was
  )
  local_batch = config.batch_size // mesh.size
  sizes = ", ".join(f"{size:,} {split}" for split, size in info.sizes.items())
  train = dataset.train
  streamed = isinstance(train, data.StreamedSplit)
  place = f"streamed (worker processes: {train.workers})" if streamed else "in memory"
  processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
  cut = f", parameters cut over {mesh.shape[FSDP]}" if mesh.shape[FSDP] > 1 else ""
  print(
    f"model    {config.model.name}, {_count(state.params):,} parameters, {config.dtype}\n"
    f"data     {info.name}, {info.num_classes} classes, {place}\n"
    f"images   {sizes}\n"
    f"devices  {mesh.size} x {device.device_kind}{processes}{cut}\n"
    f"batch    {config.batch_size} images, {local_batch} on each device, {microbatch} at a time\n"
    f"memory   {needed / 2**20:,.0f} MiB on each device for a training step",
    flush=True,
  )


def _count(params: dict) -> int:
  return sum(x.size for x in jax.tree.leaves(params))
