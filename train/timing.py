"""Times whole training steps: input, augmentation, dropout, gradients and optimizer."""

import time
from collections.abc import Generator
from typing import NamedTuple

import jax
import psutil
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train import data
from train.check import check_memory
from train.data import statistics
from train.data.batches import train_calls
from train.devices.mesh import make_mesh, microbatch_size
from train.state import TrainState, make_init
from train.step import compile_in_background, make_train_step


class Training(NamedTuple):
  """A run that has done its first step."""

  config: ConfigDict
  info: data.DatasetInfo
  mesh: Mesh
  microbatch: int
  step: jax.stages.Wrapped
  state: TrainState
  split: data.AnySplit  # the training images
  calls: Generator[dict]  # endless batches for `step`, on the mesh
  compile_seconds: float
  memory: int  # bytes of temporaries per device, as planned by the compiler


def prepare(config: ConfigDict, dataset: data.Dataset | None = None) -> Training:
  """Reads the data (unless given), compiles the step and runs it once.

  Raises:
    ConfigError: the batch does not fit the devices.
    DataError: the dataset is unavailable or broken.
    MemoryError: a step does not fit the memory.
  """
  devices = make_mesh(**config.mesh)
  check_memory(config, devices)
  microbatch = microbatch_size(config, devices)
  info = data.describe(config.data)
  step = make_train_step(config, info, microbatch, devices)
  init = make_init(config, info, devices)
  compiling = compile_in_background(step, init, config, info, devices)
  dataset = dataset or load(config)
  compiled, compile_seconds = compiling.result()
  analysis = compiled.memory_analysis()  # None if the compiler does not report it
  memory = analysis.temp_size_in_bytes if analysis else 0
  available = psutil.virtual_memory().available
  if devices.devices.flat[0].platform == "cpu" and memory * devices.size > available:
    raise MemoryError(
      f"a step needs {memory * devices.size / 2**30:.1f} GiB, {available / 2**30:.1f} are available"
    )

  calls = train_calls(dataset["train"], config, devices, range(2**40))  # endless
  try:
    state = init(*statistics.of_config(config.data, dataset["train"]))
    first = next(calls)
    state, _ = jax.block_until_ready(step(state, first))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise MemoryError(str(error).splitlines()[0]) from error
  # Skip an epoch's shorter last call: it takes longer for each step.
  calls = (call for call in calls if len(call["label"]) == len(first["label"]))
  split = dataset["train"]
  return Training(
    config, info, devices, microbatch, step, state, split, calls, compile_seconds, memory
  )


def run(training: Training, steps: int) -> tuple[Training, float]:
  """Trains for `steps` or more, in whole calls: the new run, and the seconds per step."""
  state, sums, done = training.state, None, 0
  began = time.perf_counter()
  while done < steps:
    batches, before = next(training.calls), sums
    state, sums = training.step(state, batches)
    jax.block_until_ready(before)  # at most one call waits, as in training
    done += len(batches["label"])
  jax.block_until_ready(state)
  return training._replace(state=state), (time.perf_counter() - began) / done


def time_steps(training: Training, repeats: int, seconds: float) -> tuple[Training, list[float]]:
  """Trains `repeats` times for about `seconds`: the new run, and the seconds per step of each."""
  training, once = run(training, 1)
  steps = max(1, round(seconds / once))
  times = []
  for _ in range(repeats):
    training, once = run(training, steps)
    times.append(once)
  return training, times


def load(config: ConfigDict) -> data.Dataset:
  """The training images of a config's dataset, in memory or streamed."""
  return data.load(config.data, config.model.image_size, splits=("train",))
