"""A checksum of a state, to find a checkpoint that the disk has damaged."""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.devices import hosts

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes


def checksum(tree: Any) -> int:
  """A number from 0 to 2**32 - 1 that a damaged array changes; the same on any mesh.

  Unlike a file's checksum it covers the whole way to the disk and back. It is computed on the host:
  on CPUs, many small programs beside a step that waits for other processes can block each other.
  All processes must call this.
  """
  leaves, _ = jax.tree.flatten_with_path(jax.tree.map(jnp.asarray, tree))
  # A process holds all of each array, unless parameters are sharded over several processes.
  is_whole = all(array.is_fully_addressable or array.is_fully_replicated for _, array in leaves)
  sums = {jax.tree_util.keystr(path): _sum_of_bits(array, is_whole) for path, array in leaves}
  if not is_whole:
    parts = hosts.gather(sums)
    sums = {name: sum(part[name] for part in parts) % 2**32 for name in sums}
  return zlib.crc32(json.dumps(sums).encode())


def _sum_of_bits(array: jax.Array, is_whole: bool) -> int:
  """Sum of an array's bit patterns, each times its own odd number, modulo 2**32.

  Args:
    is_whole: all of the array is here; otherwise only this process' part of it is summed.
  """
  # Of copies, one counts: the first that is here, or the first of all.
  shards = {
    str(shard.index): shard
    for shard in array.addressable_shards
    if is_whole or shard.replica_id == 0
  }
  total = 0
  for shard in shards.values():
    data = np.asarray(shard.data)
    place = np.zeros((), np.uint32)  # in the whole array, in C order
    for size, part in zip(array.shape, shard.index, strict=True):
      place = place[..., None] * np.uint32(size) + np.arange(size, dtype=np.uint32)[part]
    bits = data.view(_UNSIGNED[data.dtype.itemsize]).astype(np.uint32)
    # An odd factor has an inverse modulo 2**32, so that no change of a single element is lost.
    total += int((bits * (2 * place + 1)).sum(dtype=np.uint32))
  return total % 2**32
