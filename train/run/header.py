"""The lines that a run prints before it begins."""

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train.data.splits import Dataset, DatasetInfo, StreamedSplit
from train.devices.mesh import FSDP
from train.state import TrainState, count_parameters


def format_header(
  config: ConfigDict,
  info: DatasetInfo,
  dataset: Dataset,
  state: TrainState,
  mesh: Mesh,
  microbatch: int,
  compiled: jax.stages.Compiled,
) -> str:
  """Six lines for the terminal: model, data, images, devices, batch and memory.

  Args:
    microbatch: images that a device computes at a time.
    compiled: the train step.
  """
  device = mesh.devices.flat[0]
  needed = "unknown"
  if memory := compiled.memory_analysis():  # None if the compiler does not report it
    size = (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes
      - memory.alias_size_in_bytes  # the new state reuses the old one's memory
    )
    needed = f"{size / 2**20:,.0f} MiB"
  local_batch = config.batch_size // mesh.size
  sizes = ", ".join(f"{size:,} {split}" for split, size in info.sizes.items())
  images, place = dataset["train"], "in memory"
  if isinstance(images, StreamedSplit):
    place = f"streamed (worker processes: {images.workers})"
  processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
  cut = f", parameters sharded over {mesh.shape[FSDP]}" if mesh.shape[FSDP] > 1 else ""
  return (
    f"model    {config.model.name}, {count_parameters(state.params):,} parameters, {config.dtype}\n"
    f"data     {info.name}, {info.num_classes} classes, {place}\n"
    f"images   {sizes}\n"
    f"devices  {mesh.size} x {device.device_kind}{processes}{cut}\n"
    f"batch    {config.batch_size} images, {local_batch} on each device, {microbatch} at a time\n"
    f"memory   {needed} on each device for a training step"
  )
