"""Compiles the train step for a TPU slice, without a TPU, and estimates its memory and time:

python -m launch.plan --config configs/MODEL.py --topology v5e:2x2 [--config.KEY=VALUE ...]

Needs the TPU compiler (extra [plan]). docs/planning.md explains the figures.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from launch import collectives, traffic
from train import check, data, flags, pretrained
from train.cost import flops_per_image
from train.data import DatasetInfo
from train.data.batches import num_batches
from train.devices.mesh import make_mesh, microbatch_size
from train.errors import ConfigError, DataError, fail
from train.state import abstract_state, make_init
from train.step import make_train_step, trace_train_step

_INSTALL = (
  'planning needs the TPU compiler: pip install -c constraints.txt -e ".[plan]" '
  "(libtpu, for Linux on x86, 130 MB)"
)
_GIB = 2**30


class Chip(NamedTuple):
  """Peak figures of a chip."""

  flops: float  # FLOP/s in bfloat16, the default precision of float32 products as well
  hbm: float  # GiB available to a program, from XLA's messages (libtpu 0.0.42)
  hbm_bandwidth: float  # bytes/s
  ici_bandwidth: float  # bytes/s sent to the neighbours, over all links together
  options: dict[str, str] = {}  # of its topology, so that each chip is one device


# From docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, read in 2026. These pages give the bandwidth
# of both directions of the interconnect: a chip sends half of it. For v4 they give the all-reduce
# bandwidth of 4,096 chips, 1.1 PB/s; for v5e and v6e, it is 256 times what a chip sends.
CHIPS = {
  "v4": Chip(275e12, 30.75, 1200e9, 1.1e15 / 4096, {"chip_config_name": "megacore"}),
  "v5e": Chip(197e12, 15.75, 819e9, 400e9 / 2),
  "v5p": Chip(459e12, 95.74, 2765e9, 1200e9 / 2),
  "v6e": Chip(918e12, 31.25, 1638e9, 800e9 / 2),
}


def chip_of(topology: str) -> Chip:
  """The chip of a topology such as "v5e:2x2" or "v4:2x2x4".

  Raises:
    ConfigError: the chip is unknown, or the shape malformed.
  """
  name, _, shape = topology.partition(":")
  if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
    raise ConfigError(
      f"--topology={topology}: a chip ({', '.join(CHIPS)}) and how many lie along each axis, "
      "as in v5e:2x2 or v4:2x2x4"
    )
  return CHIPS[name]


def topology_devices(topology: str) -> list[jax.Device]:
  """The devices of a slice, one per chip, to compile for.

  Raises:
    ConfigError: there is no such slice.
  """
  from jax.experimental import topologies  # loads libtpu

  chip = chip_of(topology)
  shape = [int(n) for n in topology.partition(":")[2].split("x")]
  hosts = (*(1 if n % 2 else 2 for n in shape[:2]), 1)  # chips of a host along each axis
  try:
    slice_ = topologies.get_topology_desc(
      topology, "tpu", chips_per_host_bounds=hosts, **chip.options
    )
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(f"--topology={topology}: {str(error).splitlines()[0]}") from error
  return slice_.devices


def memory(config: ConfigDict, info: DatasetInfo, mesh: Mesh, chip: Chip) -> dict[str, Any]:
  """Compiles the train step: GiB of HBM it needs on each device and, if it compiles, its text."""
  step = make_train_step(config, info, microbatch_size(config, mesh), mesh)
  state = abstract_state(make_init(config, info, mesh), info)
  leaves = jax.tree.leaves(state)
  figures = {
    "params": sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
    "state_gib": sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize / _GIB for x in leaves
    ),
    "available_gib": chip.hbm,
  }
  lowered = trace_train_step(step, state, config, info, mesh).lower()
  began = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if not (found := needed(str(error))):
      raise
    temporaries, available = found
    used = figures["state_gib"] + temporaries
    return figures | {"fits": False, "used_gib": used, "available_gib": available}
  sizes = compiled.memory_analysis()
  assert sizes is not None  # the TPU compiler always has it
  buffers = (
    sizes.argument_size_in_bytes
    + sizes.output_size_in_bytes
    - sizes.alias_size_in_bytes
    + sizes.temp_size_in_bytes
  )
  used = (buffers + sizes.generated_code_size_in_bytes) / _GIB
  return figures | {
    "fits": used <= chip.hbm,
    "used_gib": used,
    "compile_seconds": time.perf_counter() - began,
    "text": compiled.as_text(),
  }


def needed(message: str) -> tuple[float, float] | None:
  """GiB needed and available, from XLA's out-of-memory message; None: it is another error."""
  units = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}
  found = re.search(r"temporaries \(([\d.]+)([KMGT])\) exceeds.*?\(([\d.]+)([KMGT])\)", message)
  found = found or re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message)
  if not found:
    return None
  return float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]


def plan(config: ConfigDict, info: DatasetInfo, topology: str) -> dict[str, Any]:
  """The memory that a step needs on each device, and bounds on its speed.

  Raises:
    ConfigError: the topology, the mesh or the batch does not fit.
  """
  chip = chip_of(topology)
  mesh = make_mesh(**config.mesh, devices=topology_devices(topology))
  local_batch = config.batch_size // mesh.size
  figures = {
    "model": config.model.name,
    "topology": topology,
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
    "dtype": config.dtype,
    "batch_size": config.batch_size,
    "microbatch": microbatch_size(config, mesh),
    "remat": config.remat,
  }
  figures |= memory(config, info, mesh, chip)
  figures["flops"] = local_batch * flops_per_image(config, info, recomputed=True, platform="tpu")
  if not (text := figures.pop("text", None)):
    return figures
  rows = collectives.count(text)
  steps_per_epoch = num_batches(info.sizes["train"], config.batch_size)
  figures["hbm_bytes"] = traffic.hbm_bytes(text) / min(config.steps_per_call, steps_per_epoch)
  figures["collectives"] = [dataclasses.asdict(row) for row in rows]
  seconds = {
    "compute": figures["flops"] / chip.flops,
    "memory": figures["hbm_bytes"] / chip.hbm_bandwidth,
    "interconnect": sum(row.wire_bytes for row in rows) / chip.ici_bandwidth,
  }
  step = max(seconds.values())
  return figures | {
    "seconds": seconds,
    "bound_by": max(seconds, key=lambda name: seconds[name]),
    "images_per_second": config.batch_size / step,
    "epochs": config.epochs,
    "train_images": info.sizes["train"],
    "hours": step * steps_per_epoch * config.epochs / 3600,
  }


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
  """The largest number from 1 to `most` that fits, up to 1/32 too small; 0: none fits.

  Doubles from `start` until a number does not fit, and then bisects.
  """
  low, high, number = 0, most + 1, min(start, most)
  while number:
    if fits(number):
      low = number
    else:
      high = number
    if high - low <= 1 + low // 32:
      return low
    number = min(2 * low, most) if high > most else (low + high) // 2
  return low


def max_batch(config: ConfigDict, info: DatasetInfo, topology: str) -> int:
  """The largest batch that fits, among multiples of devices times microbatch."""
  chip = chip_of(topology)
  mesh = make_mesh(**config.mesh, devices=topology_devices(topology))
  unit = mesh.size * (config.microbatch or 1)
  config = config.copy_and_resolve_references()

  def fits(units: int) -> bool:
    config.batch_size = units * unit
    found = memory(config, info, mesh, chip)
    verdict = "fits" if found["fits"] else "does not fit"
    print(f"batch {config.batch_size:,} {verdict}: {_of(found)}", file=sys.stderr, flush=True)
    return found["fits"]

  whole = -(-info.sizes["train"] // unit)  # all images in one batch
  return unit * largest(fits, max(1, config.batch_size // unit), whole)


def _of(figures: dict[str, Any]) -> str:
  return f"{_digits(figures['used_gib'])} of {figures['available_gib']:.2f} GiB"


def format_plan(figures: dict[str, Any]) -> str:
  """The figures as text for the terminal, at most 80 columns wide."""
  mesh, batch, devices = figures["mesh"], figures["batch_size"], figures["devices"]
  heading = [
    f"{figures['model']} ({figures['params']:,} parameters, {figures['dtype']}"
    f"{', remat' if figures['remat'] else ''}) on {figures['topology']}",
    f"{devices} devices: data {mesh['data']} x fsdp {mesh['fsdp']}; batch {batch:,}: "
    f"{batch // devices:,} a device, {figures['microbatch']:,} at a time",
    "",
    "a step, on each device:",
  ]
  rows = [
    ("HBM taken", f"{_of(figures)}, {_digits(figures['state_gib'])} of it for the state"),
    ("FLOPs", _short(figures["flops"])),
  ]
  if "seconds" not in figures:
    return "\n".join([*heading, *_aligned(rows), "", f"does not fit: needs {_of(figures)}"])
  rows.append(("HBM traffic", f"{_short(figures['hbm_bytes'])}B"))
  for row in figures["collectives"]:
    sent = f"{_short(row['operand_bytes'])}B, {_short(row['wire_bytes'])}B sent"
    rows.append((row["kind"], f"{row['count']} among {row['group_size']} devices: {sent}"))
  chip = chip_of(figures["topology"])
  peaks = {
    "compute": f"{_short(chip.flops)}FLOP/s",
    "memory": f"{_short(chip.hbm_bandwidth)}B/s",
    "interconnect": f"{_short(chip.ici_bandwidth)}B/s",
  }
  times = []
  for name, seconds in figures["seconds"].items():
    mark = "  <- the largest" if name == figures["bound_by"] else ""
    times.append((name, f"{_digits(1e3 * seconds)} ms at {peaks[name]}{mark}"))
  lines = [
    *heading,
    *_aligned(rows),
    "",
    "a step takes at least:",
    *_aligned(times),
    "",
    f"at most {figures['images_per_second']:,.0f} images/s: {figures['epochs']} epochs of "
    f"{figures['train_images']:,} images in {_duration(figures['hours'])}",
    "fits" if figures["fits"] else f"does not fit: needs {_of(figures)}",
  ]
  return "\n".join(lines)


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
  width = max(13, *(len(name) for name, _ in rows))
  return [f"  {name:{width}} {text}" for name, text in rows]


def _short(number: float) -> str:
  """Three digits and the prefix of a unit, as in "1.23 G"."""
  power = max(0, min(5, int(math.log10(max(number, 1)) / 3)))
  return f"{_digits(number / 1000**power)} {' kMGTP'[power].strip()}"


def _digits(number: float) -> str:
  """Three significant digits, or the integer part if it has more."""
  return f"{number:,.0f}" if number >= 100 else f"{number:#.3g}"


def _duration(hours: float) -> str:
  for unit, parts in (("hours", 1), ("minutes", 60)):
    if hours * parts >= 1:
      return f"{_digits(hours * parts)} {unit}"
  return f"{_digits(3600 * hours)} seconds"


def _start() -> None:
  """Sets JAX and libtpu up to compile for a TPU without looking for one."""
  quiet = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask the cloud's metadata server,
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # but give its answers: libtpu logs if they are missing
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without a lock: two plans can run at once
  }
  os.environ.update(quiet | os.environ)
  jax.config.update("jax_platforms", "cpu")  # nothing runs
  # Without a TPU, a program compiled for one can be neither loaded nor cached.
  jax.config.update("jax_enable_compilation_cache", False)


def main() -> None:
  """Exit status: 0 fits, 1 does not fit or can't be planned, 2 wrong flags."""
  parser = flags.Parser(prog="python -m launch.plan")
  parser.add_argument("--config", required=True, help=flags.CONFIG_HELP)
  parser.add_argument(
    "--topology", required=True, help=f"slice of {', '.join(CHIPS)}: v5e:2x2, v4:2x2x4"
  )
  parser.add_argument("--max-batch", action="store_true", help="find the largest batch that fits")
  parser.add_argument("--images", type=int, help="number of training images, if unknown")
  parser.add_argument("--json", action="store_true", help="figures as one JSON object")
  arguments, config = flags.parse(parser)
  flags.quiet_libraries()
  try:
    check.check_config(config)
    chip_of(arguments.topology)
    if importlib.util.find_spec("libtpu") is None:
      fail(_INSTALL, 1)
    _start()
    config = pretrained.resolve(config)
    info = data.foresee(config.data, arguments.images)
    if arguments.max_batch:
      config.batch_size = max_batch(config, info, arguments.topology)
      if not config.batch_size:
        fail("not even the smallest batch fits", 1)
    figures = plan(config, info, arguments.topology)
  except (ConfigError, DataError) as error:
    fail(error, 2 if isinstance(error, ConfigError) else 1)
  print(json.dumps(figures) if arguments.json else format_plan(figures))
  sys.exit(0 if figures["fits"] else 1)


if __name__ == "__main__":
  main()
