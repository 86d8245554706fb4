"""Sums over a batch: on each device over its microbatches, then once over the devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from train.devices.mesh import BATCH, DATA, FSDP, sharded_axis, state_specs

Batch = dict[str, jax.Array]  # arrays whose first axis is the batch


def sum_over_batch(
  function: Callable,
  template: Any,
  params: dict,
  batch: Batch,
  microbatch: int,
  mesh: Mesh,
  on_device: Callable = lambda total: total,
) -> Any:
  """Sums `function(params, examples, positions)` over microbatches, then once over the devices.

  Args:
    function: returns a tree of arrays; `examples` are rows of the batch, `positions` int32 [B]
      their indices in it.
    template: a tree of arrays with the shapes and dtypes of `function`'s result.
    params: sharded by `mesh.state_shardings`; each device gathers all of them.
    microbatch: examples per call of `function`; divides each device's part of the batch.
    on_device: applied to each device's sums, before they are summed over the devices; keeps
      shapes and dtypes.
  Returns:
    The sums, sharded by `mesh.state_shardings`: each device keeps the part that it will update.
  """

  def on_each_device(params, batch):
    # Otherwise JAX sums the gradient of replicated params over the devices in every microbatch;
    # params that vary by device leave that to `_sum_over_devices`.
    params = jax.lax.pcast(params, BATCH, to="varying")
    local_batch = len(batch["label"])
    positions = jax.lax.axis_index(BATCH) * local_batch + jnp.arange(local_batch)
    parts = jax.tree.map(
      lambda x: x.reshape(local_batch // microbatch, microbatch, *x.shape[1:]), (batch, positions)
    )

    def add(total, part):
      return jax.tree.map(jnp.add, total, function(params, *part)), None

    zeros = jax.tree.map(
      lambda x: jax.lax.pcast(jnp.zeros(x.shape, x.dtype), BATCH, to="varying"), template
    )
    total, _ = jax.lax.scan(add, zeros, parts)
    return _sum_over_devices(on_device(total), mesh)

  return jax.shard_map(
    on_each_device,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec(BATCH)),
    out_specs=state_specs(template, mesh),
  )(params, batch)


def _sum_over_devices(tree: Any, mesh: Mesh) -> Any:
  """Sums over the devices; of an array sharded over "fsdp" each device gets its own part."""
  leaves, structure = jax.tree.flatten(tree)
  axes = [sharded_axis(x.shape, mesh) for x in leaves]
  whole = jax.lax.psum([x for x, axis in zip(leaves, axes, strict=True) if axis is None], BATCH)
  parts = [
    jax.lax.psum_scatter(x, FSDP, scatter_dimension=axis, tiled=True)
    for x, axis in zip(leaves, axes, strict=True)
    if axis is not None
  ]
  parts = jax.lax.psum(parts, DATA)
  whole, parts = iter(whole), iter(parts)
  return jax.tree.unflatten(structure, [next(whole if axis is None else parts) for axis in axes])
