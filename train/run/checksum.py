"""A checksum of a state, to find a checkpoint that the disk has damaged."""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes


def checksum(tree: Any) -> int:
  """A number from 0 to 2**32 - 1 that a damaged array changes; the same on any mesh.

  Unlike a file's checksum it covers the whole way to the disk and back. All processes must call
  this.
  """
  leaves, _ = jax.tree.flatten_with_path(tree)
  sums = jax.device_get([_sum_of_bits(array) for _, array in leaves])
  names = (jax.tree_util.keystr(path) for path, _ in leaves)
  return zlib.crc32(json.dumps(dict(zip(names, map(int, sums), strict=True))).encode())


@jax.jit
def _sum_of_bits(array: Array) -> Array:
  """Sum of an array's bit patterns, each times its own odd number, modulo 2**32: uint32 []."""
  if array.dtype == jnp.bool:
    array = array.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize]).astype(jnp.uint32)
  place = jnp.zeros(array.shape, jnp.uint32)  # in C order; no reshape, so that shards stay in place
  for axis, size in enumerate(array.shape):
    place = place * size + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
  # An odd factor has an inverse modulo 2**32, so that no change of a single element is lost.
  return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
