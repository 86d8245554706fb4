"""What the devices of a compiled program send each other, read from XLA's text of it.

for row in collectives.count(compiled.as_text()):
  print(row.kind, row.group_size, row.count, row.operand_bytes, row.wire_bytes)
"""

import collections
import math
import re
from typing import NamedTuple

from launch import hlo


class Collective(NamedTuple):
  """All operations of one kind among groups of one size; bytes are of one device."""

  kind: str  # as XLA has it: "all-reduce", "all-gather", "reduce-scatter", ...
  group_size: int  # devices that take part in one operation
  count: int  # operations; one may send many arrays
  operand_bytes: int  # of the arrays that the device puts in
  wire_bytes: float  # that the device sends, on a ring


# Bytes that a device of a group of n sends for each byte it puts in. The first three are a ring's:
# none sends less (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
# workstations", 2009).
_SENT = {
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-gather": lambda n: n - 1,  # a device puts in the n-th part of what it gets
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
  "collective-broadcast": lambda n: 1,
}


def count(text: str) -> list[Collective]:
  """The collectives of a compiled program, by kind and size of group.

  Counted are logical sizes, without a TPU's padding. What lies in a loop counts once: in a train
  step that is once a step, as gradients are summed after the loop over microbatches. Groups of one
  device send nothing, and are left out.

  Args:
    text: of a `jax.stages.Compiled`, as `as_text()` gives it.
  Returns:
    Rows, sorted by kind and size of group.
  Raises:
    ValueError: groups are written in a way that is not known here.
  """
  program = hlo.parse(text)
  totals = collections.defaultdict(lambda: [0, 0])
  seen = set()
  for instructions in program.computations.values():
    by_name = {x.name: x for x in instructions}
    for instruction in instructions:
      kind = instruction.opcode.removesuffix("-start")
      if kind not in _SENT:
        continue
      # A TPU splits a collective over several fusions that run meanwhile, and writes it in each.
      if chain := re.search(r'chain_id="(\d+)"', instruction.attributes):
        if (kind, chain[1]) in seen:
          continue
        seen.add((kind, chain[1]))
      # A TPU writes a reduce-scatter also as a fusion that cuts its part out of an all-reduce.
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
  """Of the result of an instruction, before it is padded."""
  while by_name[name].opcode == "pad":
    name = by_name[name].operands[0]
  return sum(array.bytes for array in by_name[name].arrays)


def _group_size(attributes: str, devices: int) -> int:
  """Devices in a group, from `replica_groups`, which XLA writes in four ways."""
  if "source_target_pairs=" in attributes:  # of collective-permute
    return 2
  if found := re.search(r"replica_groups=\{(?:\{([\d,]*)\}|\})", attributes):  # {{0,1},{2,3}}; {}
    return len(found[1].split(",")) if found[1] else devices
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):  # [2,4]<=[8]
    return int(found[1])
  # mesh['a'=4,'b'=2] {'a'}, where {'a':(1)2} is a part of an axis, of size 2
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", attributes):
    axes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part or axes[axis]) for axis, part in parts)
  raise ValueError(f"unknown groups of a collective: {attributes[:200]}")
