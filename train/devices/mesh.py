"""The mesh of devices, and how arrays are sharded over it."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from train.errors import ConfigError, first_line

DATA, FSDP = "data", "fsdp"  # the mesh's axes
BATCH = (DATA, FSDP)  # the batch is sharded over both

# In elements. Smaller arrays stay replicated: a collective for each would cost more than the memory
# saved.
_SHARDED_FROM = 2**14

_PAIRS = "it must be even, because config.augment.mixup and cutmix mix images in pairs"


def find_devices() -> list[jax.Device]:
  """JAX's devices in all processes of the run; starts JAX's backend.

  Raises:
    ConfigError: JAX can't start it, most often because JAX_PLATFORMS names what is not here.
  """
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:  # the latter for "cuda" without a GPU
    reason = f" ({first_line(error)})" if str(error) else ""
    if platforms := os.environ.get("JAX_PLATFORMS"):
      raise ConfigError(
        f"JAX_PLATFORMS={platforms}: JAX finds no such device here; unset it to use what there is, "
        f"or set JAX_PLATFORMS=cpu{reason}"
      ) from error
    raise ConfigError(f"JAX can't use the devices of this machine{reason}") from error


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with the axes "data" and "fsdp"; a single device is a 1 x 1 mesh.

  The batch is sharded over both axes. Parameters and optimizer state are replicated over "data" and
  sharded over "fsdp" (Rajbhandari et al., ZeRO, 2020, stage 3). Unlike in ZeRO, a step gathers all
  parameters at once, before its microbatches: this saves memory between steps only.

  Args:
    data, fsdp: devices along each axis, as in `config.mesh`; -1: all that the other axis leaves.
    devices: devices to use; None: all.
  Raises:
    ConfigError: the sizes do not fit the devices, or JAX finds none.
  """
  devices = find_devices() if devices is None else devices
  count = len(devices)
  sizes = [data, fsdp]
  if -1 in sizes:
    other = sizes[1 - sizes.index(-1)]
    if count % other:
      raise ConfigError(f"config.mesh = {data} x {fsdp}: {count} devices do not divide by {other}")
    sizes[sizes.index(-1)] = count // other
  if sizes[0] * sizes[1] != count:
    raise ConfigError(
      f"config.mesh = {data} x {fsdp} needs {sizes[0] * sizes[1]} devices, and there are {count}: "
      "-1 for one of its axes takes what is left"
    )
  return jax.make_mesh(sizes, BATCH, axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays that each device holds in full."""
  return NamedSharding(mesh, PartitionSpec())


def sharded_axis(shape: Sequence[int], mesh: Mesh) -> int | None:
  """The axis of a parameter to shard over "fsdp": the largest that "fsdp" divides.

  None if "fsdp" is 1 or divides no axis, or if the array has fewer than 2**14 elements.
  """
  parts = mesh.shape[FSDP]
  fitting = [axis for axis, size in enumerate(shape) if size % parts == 0]
  if parts == 1 or math.prod(shape) < _SHARDED_FROM or not fitting:
    return None
  return max(fitting, key=lambda axis: shape[axis])


def state_specs(tree: Any, mesh: Mesh) -> Any:
  """PartitionSpecs for a train state, or a part of one, from the shapes of its arrays."""

  def spec(x) -> PartitionSpec:
    axis = sharded_axis(x.shape, mesh)
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, FSDP)

  return jax.tree.map(spec, tree)


def state_shardings(tree: Any, mesh: Mesh) -> Any:
  """The shardings that follow from `state_specs`."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(tree, mesh))


def by_example(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """The sharding of arrays whose axis `axis` is the batch: each device holds its examples."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


def abstract(tree: Any, sharding: NamedSharding) -> Any:
  """Shapes and dtypes of a tree of arrays, without values, with this sharding."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def microbatch_size(config: ConfigDict, mesh: Mesh) -> int:
  """Images that each device computes at a time: `config.microbatch`, or the platform's default.

  It is even where images are mixed in pairs.

  Raises:
    ConfigError: the devices do not divide the batch, or the microbatch a device's part of it; or
      one of them can't be cut into pairs that are to be mixed.
  """
  local_batch, rest = divmod(config.batch_size, mesh.size)
  if rest:
    raise ConfigError(
      f"batch_size={config.batch_size} does not divide by {mesh.size} devices: choose a multiple"
    )
  pair = 2 if config.augment.mixup or config.augment.cutmix else 1
  if local_batch % pair:
    raise ConfigError(
      f"batch_size={config.batch_size} over {mesh.size} devices is {local_batch} each: {_PAIRS}"
    )
  if config.microbatch:
    if local_batch % config.microbatch:
      raise ConfigError(
        f"microbatch={config.microbatch} does not divide a device's {local_batch} images "
        f"(batch_size={config.batch_size} over {mesh.size} devices): choose a divisor of "
        f"{local_batch}"
      )
    if config.microbatch % pair:
      raise ConfigError(f"microbatch={config.microbatch}: {_PAIRS}")
    return config.microbatch
  if mesh.devices.flat[0].platform != "cpu":
    return local_batch
  return pair * _largest_divisor(local_batch // pair, config.cpu_microbatch // pair)


def fitting_sizes(config: ConfigDict, mesh: Mesh) -> tuple[int, int]:
  """Batch and microbatch to use a trained model with, on any number of devices.

  Returns:
    `config.batch_size`, rounded up to a multiple of the devices, and the largest divisor of a
    device's part of it that is no larger than the microbatch of `microbatch_size`.
  """
  local_batch = -(-config.batch_size // mesh.size)
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  most = config.microbatch or (config.cpu_microbatch if on_cpu else local_batch)
  return local_batch * mesh.size, _largest_divisor(local_batch, most)


def _largest_divisor(number: int, most: int) -> int:
  return next(n for n in range(max(1, min(number, most)), 0, -1) if number % n == 0)
