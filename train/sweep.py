"""Times a training step at many sizes: by microbatch, by batch, by number of tokens."""

import json
import statistics
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from train import timing
from train.augment import mixing
from train.cost import flops_per_image
from train.devices.mesh import make_mesh
from train.errors import ConfigError

_TOKENS = (64, 256, 1024, 4096)
_BATCHES = (16, 32, 64, 128, 256, 512)


def tune(config: ConfigDict, repeats: int, seconds: float) -> dict[int, float]:
  """Images per second by microbatch, for powers of two that divide a device's part of the batch.

  Microbatches that do not fit the memory are left out, with a line on stdout.
  """
  rates = {}
  local_batch = config.batch_size // make_mesh(**config.mesh).size
  dataset = timing.load(config)
  for microbatch in (2**i for i in range(local_batch.bit_length())):
    if local_batch % microbatch == 0 and not (microbatch == 1 and mixing.options(config)):
      config.microbatch = microbatch
      try:
        training = timing.prepare(config, dataset)
      except MemoryError as error:
        print(f"microbatch {microbatch:4}  left out: {error}", flush=True)
        continue
      _, times = timing.time_steps(training, repeats, seconds)
      rates[microbatch] = config.batch_size / statistics.median(times)
      print(f"microbatch {microbatch:4}  {rates[microbatch]:8.1f} images/s", flush=True)
  return rates


def sweep(config: ConfigDict, over: str, repeats: int, seconds: float) -> list[dict[str, Any]]:
  """Measures the cost at several numbers of tokens (through the patch size) or batch sizes.

  With tokens, each device computes one image at a time. Sizes that do not fit the memory are left
  out, with a line on stdout.

  Args:
    over: "tokens" or "batch".
    repeats, seconds: measurements of each size, and the seconds of each.
  Raises:
    ConfigError: over "tokens", a model without patches.
  Returns:
    A row per size: the size under the name `over`, ms_per_image, images_per_second,
    flops_per_image and temporary_bytes (per device).
  """
  if over == "tokens" and "patch_size" not in config.model:
    raise ConfigError(f"--sweep tokens: this {config.model.name} has no patch_size to change")
  rows = []
  dataset = timing.load(config)
  for value in _TOKENS if over == "tokens" else _BATCHES:
    config = config.copy_and_resolve_references()
    if over == "tokens":
      side = round(value**0.5)
      config.model.patch_size, rest = divmod(config.model.image_size, side)
      if rest:
        print(f"{value} tokens: {config.model.image_size} pixels do not divide by {side}")
        continue
      config.microbatch = 2 if mixing.options(config) else 1  # images are mixed in pairs
      config.batch_size = config.microbatch * make_mesh(**config.mesh).size
    else:
      config.batch_size = value
    try:
      training = timing.prepare(config, dataset)
    except (ConfigError, MemoryError) as error:
      print(f"{over} {value:5}  left out: {error}", flush=True)
      continue
    training, times = timing.time_steps(training, repeats, seconds)
    row = {
      over: value,
      "ms_per_image": 1e3 * statistics.median(times) / config.batch_size,
      "images_per_second": config.batch_size / statistics.median(times),
      "flops_per_image": flops_per_image(config, training.info),
      "temporary_bytes": training.memory,
    }
    rows.append(row)
    print(
      f"{over} {value:5}  {row['ms_per_image']:9.2f} ms an image  "
      f"{row['flops_per_image'] / 1e9:8.2f} GFLOP  {row['temporary_bytes'] / 2**20:8.0f} MiB",
      flush=True,
    )
  return rows


def sweep_and_draw(
  config: ConfigDict, over: str, repeats: int, seconds: float, folder: Path
) -> list[dict[str, Any]]:
  """Sweeps, and writes sweep.json and sweep.png to `folder` if any size could be measured."""
  rows = sweep(config, over, repeats, seconds)
  if rows:
    name = config.model.name
    (folder / "sweep.json").write_text(json.dumps({"model": name, "rows": rows}, indent=2))
    draw_sweep(rows, over, f"{name}: cost by {over}", folder / "sweep.png")
  return rows


def draw_sweep(rows: list[dict[str, Any]], over: str, title: str, path: Path) -> None:
  """Draws milliseconds and GFLOP an image against the swept size, on logarithmic axes."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
  axes = figure.subplots()
  sizes = [row[over] for row in rows]
  axes.plot(sizes, [row["ms_per_image"] for row in rows], marker="o", label="ms an image")
  axes.plot(
    sizes, [row["flops_per_image"] / 1e9 for row in rows], marker="s", label="GFLOP an image"
  )
  if over == "tokens":
    first = rows[0]["ms_per_image"]
    for power, style in ((1, ":"), (2, "--")):
      line = [first * (size / sizes[0]) ** power for size in sizes]
      axes.plot(sizes, line, style, color="gray", linewidth=1, label=f"tokens$^{power}$")
  axes.set(xscale="log", yscale="log", xlabel=over, title=title)
  axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
  axes.minorticks_off()
  axes.grid(alpha=0.3)
  axes.legend(frameon=False)
  figure.savefig(path)
