"""The cost of more devices, estimated on one machine.

    python benchmarks/scaling.py sent                          # bytes on the wire, from the HLO
    python benchmarks/scaling.py time --models mixer           # steps on 1, 2, 4 and 8 devices
    python benchmarks/scaling.py predict PLAN.json ...         # plans of launch.plan --json

`sent` compiles the train step of the default configs for eight simulated devices, and counts the
bytes that each sends in a step. `time` measures steps on simulated devices: with fewer cores than
devices it shows overhead, not speed-up. `predict` extrapolates a plan to more chips. All print
Markdown.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys

import mlp_models

DEVICES = (1, 2, 4, 8)
MESHES = ((8, 1), (4, 2), (1, 8))

# Assumed in `predict`.
_CHIPS = (8, 16, 64, 256, 512)
_CHIPS_PER_POD = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256}  # Google Cloud's page of each
_SECONDS_PER_HOP = 1e-6  # between neighbours
_BETWEEN_PODS = 3.1e9  # bytes/s per chip: 200 Gbit/s of a host with eight
_SECONDS_BETWEEN_PODS = 20e-6


def sent(models: list[str]) -> None:
  """Prints the megabytes that each of eight devices sends in a step, by collective."""
  import jax

  from launch import collectives
  from train import data
  from train.devices import mesh
  from train.devices.compile import skip_missing_tpu
  from train.state import abstract_state, make_init
  from train.step import make_train_step, trace_train_step

  skip_missing_tpu()
  jax.config.update("jax_num_cpu_devices", 8)
  jax.config.update("jax_disable_most_optimizations", True)  # those of arithmetic: compiles faster
  kinds = ("all-gather", "reduce-scatter", "all-reduce")
  print(f"| | data x fsdp | {' | '.join(kinds)} | MB in all |\n|---|---|---|---|---|---|")
  for name in models:
    config = importlib.import_module(f"configs.{name}").get_config()
    config.steps_per_call = 1
    info = data.foresee(config.data)
    for sizes in MESHES:
      devices = mesh.make_mesh(*sizes)
      microbatch = mesh.microbatch_size(config, devices)
      step = make_train_step(config, info, microbatch, devices)
      state = abstract_state(make_init(config, info, devices), info)
      text = trace_train_step(step, state, config, info, devices).lower().compile().as_text()
      total = dict.fromkeys(kinds, 0.0)
      for row in collectives.count(text):
        total[row.kind] += row.wire_bytes / 1e6
      cells = " | ".join(f"{total[kind]:.2f}" for kind in kinds)
      print(
        f"| {name} | {sizes[0]} x {sizes[1]} | {cells} | {sum(total.values()):.2f} |", flush=True
      )


def time(models: list[str], seconds: float) -> None:
  """Prints milliseconds a step on simulated devices, for a fixed batch and for one that grows."""
  print("| | devices | same batch: images, ms a step | same local batch: images, ms a step |")
  print("|---|---|---|---|")
  for name in models:
    config = importlib.import_module(f"configs.{name}").get_config()
    for devices in DEVICES:
      cells = []
      for batch in (config.batch_size, config.batch_size // max(DEVICES) * devices):
        command = [sys.executable, "-m", "train.bench", "--config", f"configs/{name}.py", "--json"]
        command += [f"--config.batch_size={batch}", "--repeats=5", f"--seconds={seconds}"]
        process = subprocess.run(
          command,
          env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
          stdout=subprocess.PIPE,
          text=True,
          check=True,
        )
        figures = json.loads(process.stdout.splitlines()[-1])
        per_call = [
          1e3 * batch / figures[f"images_per_second{end}"] for end in ("", "_max", "_min")
        ]
        cells.append("{}, {:.0f} ({:.0f}-{:.0f})".format(batch, *per_call))
      print(f"| {name} | {devices} | {cells[0]} | {cells[1]} |", flush=True)


def predict(paths: list[str], times: int) -> None:
  """Prints the efficiency of more chips, each with `times` the images that the plan gives it.

  A chip is assumed to compute (or to wait for its memory) and then to send, without overlap, at the
  plan's peak rates, with _SECONDS_PER_HOP more for each hop on the torus.
  """
  from launch.plan import CHIPS

  print(f"| | images a chip | {' | '.join(map(str, _CHIPS))} |\n|---|---|{'---|' * len(_CHIPS)}")
  for path in paths:
    with open(path) as file:
      figures = json.load(file)
    if figures["mesh"]["fsdp"] > 1:
      sys.exit(f"{path}: a plan with fsdp=1 is needed: only all-reduces are extrapolated")
    chip, _, shape = figures["topology"].partition(":")
    axes = len(shape.split("x"))
    step = times * max(figures["seconds"]["compute"], figures["seconds"]["memory"])
    size = sum(r["operand_bytes"] for r in figures["collectives"] if r["kind"] == "all-reduce")
    cells = []
    for chips in _CHIPS:
      inside = min(chips, _CHIPS_PER_POD[chip])
      sending = 2 * (inside - 1) / inside * size / CHIPS[chip].ici_bandwidth
      sending += 2 * axes * (inside ** (1 / axes) - 1) * _SECONDS_PER_HOP
      if pods := chips // inside - 1:
        # Between pods each chip exchanges the part that it has reduced.
        sending += 2 * pods / (pods + 1) * size / inside / _BETWEEN_PODS + _SECONDS_BETWEEN_PODS
      cells.append(f"{100 * step / (step + sending):.0f} %")
    local_batch = times * figures["batch_size"] // figures["devices"]
    name = f"{figures['model']}, {figures['topology']}"
    print(f"| {name} | {local_batch} | {' | '.join(cells)} |")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument("what", choices=("sent", "time", "predict"))
  parser.add_argument("plans", nargs="*", metavar="PLAN.json", help="for `predict`")
  parser.add_argument("--times", type=int, default=1, help="factor on the plan's images per chip")
  parser.add_argument(
    "--models", nargs="+", choices=mlp_models.MODELS, default=list(mlp_models.MODELS)
  )
  parser.add_argument(
    "--seconds", type=float, default=4.0, help="time of each of the five repeats of `time`"
  )
  arguments = parser.parse_args()
  if arguments.what == "sent":
    sent(arguments.models)
  elif arguments.what == "predict":
    predict(arguments.plans, arguments.times)
  else:
    time(arguments.models, arguments.seconds)


if __name__ == "__main__":
  main()
