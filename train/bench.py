"""Measures the training step as training runs it, with input, augmentation, dropout and optimizer.

    python -m train.bench --config configs/MODEL.py [--config.KEY=VALUE ...] [--json]
    python -m train.bench --config configs/MODEL.py --phases
    python -m train.bench --config configs/MODEL.py --tune
    python -m train.bench --config configs/MODEL.py --sweep tokens --output DIR
    python -m train.bench --all --output DIR

Rates are medians over repeats; their spread shows other load on the machine.
"""

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import mlp_models
from train import check, data, flags, pretrained
from train.cost import flops_per_image, matmul_peak
from train.devices.compile import compiler_options, start_jax
from train.devices.machine import peak_memory, process_age
from train.devices.reduction import sum_over_batch
from train.errors import ConfigError, DataError, fail
from train.interrupt import interruptible
from train.optimizer import split_frozen
from train.state import count_parameters, make_model
from train.step import evaluate, loss, make_eval_step, make_gradients
from train.sweep import sweep_and_draw, tune
from train.targets import make_prepare
from train.timing import Training, prepare, time_steps


def evaluation_rate(training: Training, repeats: int, seconds: float) -> float:
  """Median of the images per second of an evaluation as in training.

  Each repeat takes about `seconds`, or one pass over the training images if that is shorter.
  """
  config, devices = training.config, training.mesh
  step = make_eval_step(config, training.info.num_classes, training.microbatch, devices)
  weights = training.state.weights()

  def evaluate_images(count: int) -> float:
    split = data.Split(*training.split[np.arange(count)])
    began = time.perf_counter()
    evaluate(step, weights, split, config.batch_size, devices)
    return time.perf_counter() - began

  evaluate_images(config.batch_size)  # compiles
  batches = max(1, round(seconds / evaluate_images(config.batch_size)))
  count = min(batches * config.batch_size, len(training.split))
  return count / statistics.median(evaluate_images(count) for _ in range(repeats))


def measure(training: Training, repeats: int, seconds: float) -> dict[str, Any]:
  """The figures of a run that trains `repeats` times for about `seconds`."""
  training, times = time_steps(training, repeats, seconds)
  config, devices = training.config, training.mesh
  batch = config.batch_size
  rate = batch / statistics.median(times)
  memory = peak_memory(devices)  # before the evaluation adds to it
  evaluation = evaluation_rate(training, repeats, seconds)
  flops = flops_per_image(config, training.info)
  peak = matmul_peak(devices, config.dtype)
  return {
    "model": config.model.name,
    "params": count_parameters(training.state.params),
    "batch_size": batch,
    "microbatch": training.microbatch,
    "devices": devices.size,
    "platform": devices.devices.flat[0].platform,
    "dtype": config.dtype,
    "images_per_second": rate,
    "images_per_second_min": batch / max(times),
    "images_per_second_max": batch / min(times),
    "step_ms": 1e3 * statistics.median(times),
    "evaluation_images_per_second": evaluation,
    "compile_seconds": training.compile_seconds,
    "compilation_cache": config.compilation_cache,
    "flops_per_image": flops,
    "matmul_peak_gflops": peak,
    "fraction_of_peak": rate * flops / (peak * 1e9),
    "peak_memory_bytes": memory,
  }


def phases(training: Training, repeats: int) -> dict[str, float]:
  """Milliseconds per step of each phase, as differences between growing parts of the step.

  `input` is the host's time for a batch, which in training overlaps with a running step; `waited`
  is an upper bound on the part that does not overlap.
  """
  state = training.state
  batches = next(training.calls)
  functions = _parts_of_a_step(training)
  whole = (*functions, "optimizer")
  times: dict[str, list[float]] = {name: [] for name in (*whole, "input")}
  for _ in range(repeats + 1):  # the first one compiles
    for name, function in functions.items():
      began = time.perf_counter()
      jax.block_until_ready(function(state.params, batches))
      times[name].append(time.perf_counter() - began)
    # A copy, because the step donates its input state.
    copy = jax.block_until_ready(jax.tree.map(jnp.copy, state))
    began = time.perf_counter()
    jax.block_until_ready(training.step(copy, batches))
    times["optimizer"].append((time.perf_counter() - began) / len(batches["label"]))
    began = time.perf_counter()
    next(training.calls)
    times["input"].append((time.perf_counter() - began) / len(batches["label"]))
  medians = {name: 1e3 * statistics.median(seconds[1:]) for name, seconds in times.items()}
  each = np.diff([medians[name] for name in whole], prepend=0.0).tolist()
  waited = 1e3 * statistics.median(waits_for_input(training._replace(state=state), repeats))
  return dict(zip(whole, each, strict=True)) | {"input": medians["input"], "waited": waited}


def _parts_of_a_step(training: Training) -> dict[str, Callable]:
  """Functions of (params, batches), each a step up to the end of one phase."""
  config, devices, state = training.config, training.mesh, training.state
  model = make_model(config, training.info.num_classes)
  prepare = make_prepare(config, training.info.num_classes)

  def only_augment(params, examples, positions):
    images, labels = prepare(examples, jax.random.key(0), positions, state)
    return images.sum() + labels.sum()

  whole_loss = functools.partial(loss, state=state, model=model, prepare=prepare)
  parts: dict[str, tuple[Callable, Any]] = {  # each with a template of its result
    "augment": (only_augment, jnp.float32(0)),
    "forward": (whole_loss, (jnp.float32(0), state.sums)),
    "backward": (
      make_gradients(state, model, prepare, config.freeze),
      (split_frozen(state.params, config.freeze)[0], state.sums),
    ),
  }

  def on_the_batch(part: Callable, template: Any) -> Callable:
    def sum_parts(params, batches):
      batch = jax.tree.map(lambda x: x[0], batches)
      return sum_over_batch(part, template, params, batch, training.microbatch, devices)

    return jax.jit(sum_parts, compiler_options=compiler_options(config, devices))

  return {name: on_the_batch(*part) for name, part in parts.items()}


def waits_for_input(training: Training, calls: int) -> list[float]:
  """Upper bound on the seconds per step spent waiting for input, one value per call."""
  state, waits = training.state, []
  sums: Any = None
  for _ in range(calls + 2):  # the first two use up batches that were read ahead
    began, running = time.perf_counter(), sums
    batches = next(training.calls)
    idle = running is None or running.loss.is_ready()
    waits.append((time.perf_counter() - began) * idle / len(batches["label"]))
    state, sums = training.step(state, batches)
    jax.block_until_ready(running)  # at most one call waits, as in training
  jax.block_until_ready(state)
  return waits[2:]


def format_figures(figures: dict[str, Any]) -> str:
  """One line per figure, for the terminal."""

  def text(value: Any) -> str:
    if not isinstance(value, float):
      return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"

  width = max(map(len, figures)) + 2
  return "\n".join(f"{key:{width}}{text(value)}" for key, value in figures.items())


def format_table(rows: list[dict[str, Any]]) -> str:
  """The figures of several models as a Markdown table."""
  lines = [
    "| model | images/s (min-max) | ms a step | batch / microbatch | GFLOP an image |"
    " of the peak | evaluation, images/s | memory, GiB | compiled in, s | first step done, s |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    lines.append(
      f"| {row['model']} | {row['images_per_second']:.4g} ({row['images_per_second_min']:.4g}-"
      f"{row['images_per_second_max']:.4g}) | {row['step_ms']:.0f} | {row['batch_size']} / "
      f"{row['microbatch']} | {row['flops_per_image'] / 1e9:.2f} | "
      f"{100 * row['fraction_of_peak']:.0f} % | "
      f"{row['evaluation_images_per_second']:.4g} | {row['peak_memory_bytes'] / 2**30:.1f} | "
      f"{row['compile_seconds']:.1f} | {row['start_seconds']:.1f} |"
    )
  row = rows[0]
  lines.append(
    f"\n{row['devices']} x {row['platform']}, {row['dtype']}; a matrix product reaches "
    f"{statistics.median(row['matmul_peak_gflops'] for row in rows):.0f} GFLOP/s.\n"
  )
  return "\n".join(lines)


def _measure_all(output: Path, repeats: int, seconds: float) -> None:
  """Measures each default config in its own process, with its own start and memory."""
  rows = []
  for name in mlp_models.MODELS:
    command = [sys.executable, "-m", "train.bench", "--config", f"configs/{name}.py", "--json"]
    command += ["--repeats", str(repeats), "--seconds", str(seconds)]
    command += ["--config.compilation_cache=False"]  # time a real compilation
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
      fail(f"{' '.join(command[1:])} failed", process.returncode)
    rows.append(json.loads(process.stdout.splitlines()[-1]))
    print(f"{name:10} {rows[-1]['images_per_second']:8.1f} images/s", flush=True)
  (output / "bench.json").write_text(json.dumps(rows, indent=2) + "\n")
  (output / "bench.md").write_text(format_table(rows))
  print(f"\n{format_table(rows)}\nWrote {output / 'bench.json'} and {output / 'bench.md'}.")


@interruptible()
def main() -> None:
  """Exit status: 0 measured, 1 no usable dataset or too little memory, 2 wrong flags."""
  parser = flags.Parser(prog="python -m train.bench")
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--config", help=flags.CONFIG_HELP)
  what.add_argument("--all", action="store_true", help="the default config of every model")
  mode = parser.add_mutually_exclusive_group()
  mode.add_argument("--json", action="store_true", help="figures as JSON on the last line")
  mode.add_argument("--phases", action="store_true", help="time each phase of a step")
  mode.add_argument("--tune", action="store_true", help="time powers of two as microbatch")
  mode.add_argument("--sweep", choices=("tokens", "batch"), help="time a range of sizes")
  parser.add_argument(
    "--output", type=flags.path, default=Path("."), help="folder for written files"
  )
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--seconds", type=float, default=5.0, help="time per repeat")
  if "--all" in sys.argv:
    arguments, config = parser.parse_args(), ConfigDict()
    if arguments.json or arguments.phases or arguments.tune or arguments.sweep:
      parser.error("--all measures the defaults, and takes --output, --repeats and --seconds only")
  else:
    arguments, config = flags.parse(parser)
  repeats, seconds = arguments.repeats, arguments.seconds
  if repeats < 1 or seconds <= 0:
    fail("--repeats must be at least 1, and --seconds more than 0", 2)
  flags.quiet_libraries()
  try:
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.all:
      return _measure_all(arguments.output, repeats, seconds)
    check.check_config(config)
    start_jax(config)
    config = pretrained.resolve(config)
    config.data = data.resolve(config.data)
    if arguments.tune:
      if not (rates := tune(config, repeats, seconds)):
        raise MemoryError("no microbatch fits the memory")
      print(f"fastest: --config.microbatch={max(rates, key=lambda size: rates[size])}")
    elif arguments.sweep:
      if not sweep_and_draw(config, arguments.sweep, repeats, seconds, arguments.output):
        fail(f"--sweep {arguments.sweep}: no size could be measured", 1)
      print(f"Wrote {arguments.output / 'sweep.json'} and {arguments.output / 'sweep.png'}.")
    else:
      training = prepare(config)
      start = process_age()
      with contextlib.closing(training.calls):  # stops the workers of a streamed set
        _print_figures(training, arguments, start)
  except (ConfigError, DataError, MemoryError, OSError) as error:
    fail(error, 2 if isinstance(error, ConfigError) else 1)


def _print_figures(training: Training, arguments: argparse.Namespace, start: float) -> None:
  if arguments.phases:
    for name, milliseconds in phases(training, arguments.repeats).items():
      print(f"{name:12}{milliseconds:10.1f} ms")
    return
  figures = measure(training, arguments.repeats, arguments.seconds) | {"start_seconds": start}
  print(json.dumps(figures) if arguments.json else format_figures(figures))


if __name__ == "__main__":
  main()
