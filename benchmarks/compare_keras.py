"""Trains our models and Keras' by turns, and prints how much faster ours are.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/compare_keras.py --models mixer vit --backend tensorflow

Both train at the default config on the same images of CIFAR-100, each in its own process, which
waits while the other one works. Before anything is timed, our model with Keras' weights must give
Keras' logits.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from multiprocessing.connection import Connection

import numpy as np

import mlp_models


def main() -> None:
  """Exit status: 0 measured, 1 a worker failed or the logits differ."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument("--models", nargs="+", default=mlp_models.MODELS, choices=mlp_models.MODELS)
  parser.add_argument("--backend", default="tensorflow", choices=("tensorflow", "torch", "jax"))
  parser.add_argument("--rounds", type=int, default=5, help="turns of each model")
  parser.add_argument("--seconds", type=float, default=10.0, help="approximate time of Keras' turn")
  parser.add_argument("--json", action="store_true", help="also print a line of JSON per model")
  arguments = parser.parse_args()
  os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # before any worker loads TensorFlow
  print(f"{'model':10} {'ours':>15} {'Keras':>15} {'ratio':>22} {'GiB':>12}  steps a turn")
  for name in arguments.models:
    row = compare(name, arguments.backend, arguments.rounds, arguments.seconds)
    print(
      f"{name:10} {row['ours']:>6.4g} images/s {row['keras']:>6.4g} images/s "
      f"{row['ratio']:>6.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f}) "
      f"{row['ours_bytes'] / 2**30:>5.1f} / {row['keras_bytes'] / 2**30:.1f}  {row['steps']}",
      flush=True,
    )
    if arguments.json:
      print(json.dumps({"model": name, "backend": arguments.backend} | row), flush=True)


def compare(name: str, backend: str, rounds: int, seconds: float) -> dict:
  """Images per second of both, their ratio (median, least and most over rounds), peak bytes."""
  config = _config(name)
  context = multiprocessing.get_context("spawn")
  pipes, processes = [], []
  for target, args in ((_keras, (name, backend)), (_ours, (name,))):
    here, there = context.Pipe()
    process = context.Process(target=_worker, args=(target, there, *args), daemon=True)
    process.start()
    there.close()  # so that a worker that dies is noticed
    pipes.append(here)
    processes.append(process)
  keras, ours = pipes

  def ask(pipe: Connection, question):
    try:
      pipe.send(question)
      answer = pipe.recv()
    except (EOFError, BrokenPipeError):
      sys.exit(f"{name}: a worker died; was there enough memory?")
    if isinstance(answer, str):
      sys.exit(f"{name}: {answer}")
    return answer

  images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
  weights, expected, steps_per_epoch = ask(keras, images)
  logits = ask(ours, (images, weights))
  if np.abs(logits - expected).max() > 1e-4 * np.abs(expected).max():
    sys.exit(f"{name}: not the same model, logits differ by {np.abs(logits - expected).max():.2g}")

  ask(keras, 1), ask(ours, 1)  # compiles
  steps = max(2, round(seconds / (ask(keras, 2)["seconds"] / 2)))
  steps = min(steps, steps_per_epoch)
  steps = max(1, steps // config.steps_per_call) * config.steps_per_call  # ours does whole calls
  ask(ours, 2)
  turns = [(ask(ours, steps), ask(keras, steps)) for _ in range(rounds)]
  for pipe in pipes:
    pipe.send(None)
  for process in processes:
    process.join()
  ratios = [k["seconds"] / o["seconds"] for o, k in turns]
  batch = config.batch_size
  return {
    "ours": statistics.median(batch * steps / o["seconds"] for o, _ in turns),
    "keras": statistics.median(batch * steps / k["seconds"] for _, k in turns),
    "ratio": statistics.median(ratios),
    "ratio_min": min(ratios),
    "ratio_max": max(ratios),
    "steps": steps,
    "ours_bytes": turns[-1][0]["bytes"],
    "keras_bytes": turns[-1][1]["bytes"],
  }


def _config(name: str):
  return importlib.import_module(f"configs.{name}").get_config()


def _worker(target, pipe: Connection, *args) -> None:
  from train.errors import DataError

  try:
    target(pipe, *args)
  except DataError as error:
    pipe.send(str(error))
  except Exception:
    pipe.send(traceback.format_exc())


def _answer(pipe: Connection, train) -> None:
  """Receives numbers of steps until None comes; answers each with the seconds that it took."""
  from train.devices.machine import process_memory

  while (steps := pipe.recv()) is not None:
    began = time.perf_counter()
    train(steps)
    seconds = time.perf_counter() - began
    pipe.send({"seconds": seconds, "bytes": process_memory()})


def _ours(pipe: Connection, name: str) -> None:
  from train import augment, flags, timing
  from train.devices.compile import start_jax

  flags.quiet_libraries()
  config = _config(name)
  start_jax(config)
  images, weights = pipe.recv()
  training = timing.prepare(config)
  state = training.state
  model = mlp_models.create(**config.model)
  preprocessed = augment.preprocess(
    images, mean=state.mean, variance=state.variance, image_size=model.image_size
  )
  params = mlp_models.keras_weights.to_params(name, weights)
  pipe.send(np.asarray(model.apply({"params": params}, preprocessed)))

  def train(steps):
    nonlocal training
    training, _ = timing.run(training, steps)

  _answer(pipe, train)


def _keras(pipe: Connection, name: str, backend: str) -> None:
  os.environ["KERAS_BACKEND"] = backend
  import keras
  import keras_models

  from train import data, flags
  from train.data.statistics import channel_statistics
  from train.devices.compile import skip_missing_tpu

  flags.quiet_libraries()
  if backend == "jax":
    skip_missing_tpu()
  config = _config(name)
  split = data.load(config.data, config.model.image_size, splits=("train",)).train
  mean, variance = channel_statistics(split)
  ours = mlp_models.create(**config.model)
  model = keras_models.make(name, ours, config.augment.to_dict(), mean, variance)
  images = pipe.recv()
  logits = keras.ops.convert_to_numpy(model(images.astype("float32"), training=False))
  weights = {
    name: keras.ops.convert_to_numpy(variable)
    for name, variable in keras_models.variables(model).items()
  }
  pipe.send((weights, logits, len(split) // config.batch_size))
  model.compile(
    optimizer=keras.optimizers.AdamW(
      learning_rate=config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay
    ),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=[
      keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
      keras.metrics.SparseTopKCategoricalAccuracy(5, name="top5"),
    ],
  )

  def train(steps):
    rows = slice(0, steps * config.batch_size)
    model.fit(
      split.images[rows], split.labels[rows], batch_size=config.batch_size, epochs=1, verbose=0
    )

  _answer(pipe, train)


if __name__ == "__main__":
  main()
