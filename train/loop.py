"""A whole run, top to bottom."""

import functools
import math
import time
from collections import deque
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train import data, metrics, optimizer, workdir
from train.checkpoint import Checkpoints
from train.evaluate import evaluate, make_eval_step
from train.interrupt import Interrupted, StopRequest
from train.mesh import by_example, make_mesh, microbatch_size, replicated
from train.state import Sums, TrainState, channel_statistics, init_state, make_model
from train.step import train_step


class TrainingFailed(Exception):
  """Nothing can come of this run. The message says why, and what to change."""


def train_and_evaluate(config: ConfigDict, folder: Path) -> dict:
  """Trains `config.model`, or goes on where an earlier run in the same folder stopped.

  Args:
    config: one that `check.check_config` has passed.
    folder: the workdir.
  Returns:
    What summary.json holds: the test metrics of the best epoch's weights, and figures of the run.
  Raises:
    ValueError: the batch does not fit the devices, or the folder holds a run with another config.
    DataError: the dataset is out of reach or broken.
    Interrupted: a signal asked the run to stop; its state is saved.
    TrainingFailed: the loss is no longer a number.
  """
  mesh = make_mesh()
  microbatch = microbatch_size(config, mesh)
  config.data = data.resolve(config.data)
  info = data.describe(config.data)
  workdir.claim(folder, config, info)
  if summary := metrics.read_summary(folder):
    print(f"{folder} holds a finished run; another --workdir starts a new one.")
    return summary
  dataset = data.load(config.data, config.model.image_size)
  mean, variance = channel_statistics(dataset.train.images)

  # What is trained, and by what.
  model = make_model(config, info.num_classes)
  adamw = optimizer.make_optimizer(config.optimizer)
  plateau = optimizer.make_plateau(config.plateau)
  init = functools.partial(init_state, config, info, mean, variance)
  abstract = jax.eval_shape(init)
  steps_per_epoch = data.num_batches(len(dataset.train), config.batch_size)

  def finished(state: TrainState) -> bool:
    return int(state.epoch) == config.epochs or optimizer.should_stop(
      state.best, int(state.epoch), config.early_stop_patience
    )

  with StopRequest() as stop, Checkpoints(folder) as checkpoints:
    state = checkpoints.restore_last(abstract, replicated(mesh))
    if state is None:
      state = jax.jit(init, out_shardings=replicated(mesh))()
    else:
      print(f"Going on in {folder}, epoch {int(state.epoch) + 1}, step {int(state.step)}.")
    step = _compile(
      functools.partial(
        train_step,
        model=model,
        optimizer=adamw,
        augmentation=config.augment.to_dict(),
        microbatch=microbatch,
        mesh=mesh,
      ),
      state,
      next(data.prefetch(data.batches(dataset.train, config.batch_size), by_example(mesh))),
    )
    eval_step = make_eval_step(model, microbatch, mesh)
    _print_header(config, info, state, mesh, microbatch, step)

    progress = metrics.Progress(config.epochs * steps_per_epoch, int(state.step), config.batch_size)
    writer = metrics.Writer(folder, int(state.epoch), f"{config.model.name} on {info.name}")
    with writer, progress:
      saved_at = time.monotonic()
      try:
        while not finished(state):
          epoch = int(state.epoch) + 1
          progress.description = f"epoch {epoch}/{config.epochs}"
          start = int(state.step) - (epoch - 1) * steps_per_epoch
          order = data.batches(
            dataset.train, config.batch_size, seed=config.seed, epoch=epoch, start=start
          )
          began = time.perf_counter()
          under_way = deque()
          for batch in data.prefetch(order, by_example(mesh)):
            state, sums = step(state, batch)
            under_way.append(sums)
            if len(under_way) > 1:  # one step runs and one waits, so that a signal is soon obeyed
              jax.block_until_ready(under_way.popleft())
            progress.update()
            stop.check()
            if time.monotonic() - saved_at > config.checkpoint_seconds:
              checkpoints.save_last(state)
              saved_at = time.monotonic()
          train = state.sums.means()
          train_seconds = time.perf_counter() - began
          val = evaluate(
            eval_step, state.weights(), dataset.validation, config.batch_size, mesh, stop.check
          )
          row = {
            "epoch": epoch,
            "step": int(state.step),
            **{f"train_{name}": value for name, value in train.items()},
            **{f"val_{name}": value for name, value in val.items()},
            "learning_rate": config.optimizer.learning_rate * float(state.plateau.scale),
            "images_per_second": (len(dataset.train) - start * config.batch_size) / train_seconds,
            "seconds": time.perf_counter() - began,
          }
          writer.epoch(row)
          progress.write(metrics.format_epoch(row, config.epochs))
          if not math.isfinite(train["loss"] + val["loss"]):
            raise TrainingFailed(
              f"the loss was no number in epoch {epoch}: training diverged. Try a smaller "
              f"--config.optimizer.learning_rate than {config.optimizer.learning_rate}."
            )

          state = state.replace(
            epoch=state.epoch + 1,
            sums=Sums.zero(),
            plateau=optimizer.end_of_epoch(plateau, state.plateau, val["loss"]),
            best=optimizer.update_best(
              state.best, row[config.best_metric], epoch, optimizer.BEST[config.best_metric]
            ),
          )
          state = jax.device_put(state, replicated(mesh))
          if int(state.best.epoch) == epoch:
            checkpoints.save_best(state)
          checkpoints.save_last(state)
          saved_at = time.monotonic()
      except Interrupted:
        checkpoints.save_last(state)
        raise

      best = checkpoints.restore_best(abstract.weights(), replicated(mesh))
      test = evaluate(eval_step, best, dataset.test, config.batch_size, mesh, stop.check)
      summary = {
        **{f"test_{name}": value for name, value in test.items()},
        "best_epoch": int(state.best.epoch),
        "epochs": int(state.epoch),
        "parameters": _count(state.params),
        "stopped_early": int(state.epoch) < config.epochs,
        "seconds": sum(row["seconds"] for row in metrics.read(folder)),
      }
      writer.summary(summary)
  return summary


def _compile(step, state: TrainState, batch: dict) -> jax.stages.Compiled:
  """Compiles ahead of the first step: what it needs is known, and printed, before it runs."""
  return jax.jit(step, donate_argnums=0).lower(state, batch).compile()


def _print_header(
  config: ConfigDict, info: data.DatasetInfo, state: TrainState, mesh: Mesh, microbatch: int, step
) -> None:
  device = mesh.devices.flat[0]
  memory = step.memory_analysis()
  needed = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes  # the new state lies where the old one was
  )
  share = config.batch_size // mesh.size
  sizes = ", ".join(f"{size:,} {split}" for split, size in info.sizes.items())
  print(
    f"model       {config.model.name}, {_count(state.params):,} parameters, {config.dtype}\n"
    f"data        {info.name}: {info.num_classes} classes; images: {sizes}\n"
    f"devices     {mesh.size} x {device.platform} ({device.device_kind})\n"
    f"batch       {config.batch_size} images, {share} on each device, {microbatch} at a time\n"
    f"memory      {needed / 2**20:,.0f} MiB on each device for a training step",
    flush=True,
  )


def _count(params: dict) -> int:
  return sum(x.size for x in jax.tree.leaves(params))
