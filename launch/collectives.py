"""Counts what the devices of a compiled program send each other, from the program's text.

for row in collectives.count(compiled.as_text()):
  print(row.kind, row.group_size, row.count, row.operand_bytes, row.wire_bytes)
"""

import collections
import dataclasses
import math
import re

from launch import hlo


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind and group size; bytes are those of one device."""

  kind: str  # XLA's name: "all-reduce", "all-gather", "reduce-scatter", ...
  group_size: int  # devices in one operation
  count: int  # operations; one may send several arrays
  operand_bytes: int  # size of the operands
  wire_bytes: float  # sent by the device, if the group is a ring


# Bytes that a device sends per byte of its operand, in a group of n. The first three are those of a
# ring, which sends the least possible (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms
# for clusters of workstations", 2009).
_SENT = {
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-gather": lambda n: n - 1,  # the operand is 1/n of the result
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
  "collective-broadcast": lambda n: 1,
}


def count(text: str) -> list[Collective]:
  """Counts the collectives of a compiled program, by kind and group size.

  Sizes are logical, without a TPU's padding. A collective in a loop counts once: a train step sums
  its gradients after the loop over microbatches. Groups of one device send nothing, and are left
  out.

  Args:
    text: `as_text()` of a `jax.stages.Compiled`.
  Returns:
    One row per kind and group size, sorted by both.
  Raises:
    ValueError: `replica_groups` has an unknown form.
  """
  program = hlo.parse(text)
  totals: dict[tuple[str, int], list[int]] = collections.defaultdict(lambda: [0, 0])
  seen = set()
  for instructions in program.computations.values():
    by_name = {x.name: x for x in instructions}
    for instruction in instructions:
      kind = instruction.opcode.removesuffix("-start")
      if kind not in _SENT:
        continue
      # A TPU may overlap a collective with several fusions; each of them lists it.
      if chain := re.search(r'chain_id="(\d+)"', instruction.attributes):
        if (kind, chain[1]) in seen:
          continue
        seen.add((kind, chain[1]))
      # A TPU may write a reduce-scatter as an all-reduce and a slice of it, in one fusion.
      root = instructions[-1]
      if root.opcode == "dynamic-slice" and instruction.name in root.operands:
        kind = kind.replace("all-reduce", "reduce-scatter")
      group_size = _group_size(instruction.attributes, program.devices)
      if group_size > 1:
        total = totals[kind, group_size]
        total[0] += 1
        total[1] += sum(_bytes(operand, by_name) for operand in instruction.operands)
  return [
    Collective(kind, size, number, operand_bytes, _SENT[kind](size) * operand_bytes)
    for (kind, size), (number, operand_bytes) in sorted(totals.items())
  ]


def _bytes(name: str, by_name: dict[str, hlo.Instruction]) -> int:
  """Size of an instruction's result before padding."""
  while by_name[name].opcode == "pad":
    name = by_name[name].operands[0]
  return sum(array.bytes for array in by_name[name].arrays)


def _group_size(attributes: str, devices: int) -> int:
  """Devices in a group, from `replica_groups`, which XLA writes in four forms."""
  if "source_target_pairs=" in attributes:  # collective-permute
    return 2
  if found := re.search(r"replica_groups=\{(?:\{([\d,]*)\}|\})", attributes):  # {{0,1},{2,3}}; {}
    return len(found[1].split(",")) if found[1] else devices
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):  # [2,4]<=[8]
    return int(found[1])
  # mesh['a'=4,'b'=2] {'a'}, where {'a':(1)2} is a part of axis 'a', of size 2
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", attributes):
    axes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part or axes[axis]) for axis, part in parts)
  raise ValueError(f"unknown groups of a collective: {attributes[:200]}")
