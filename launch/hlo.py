"""Parses the text of a compiled program (XLA's HLO) into instructions."""

import math
import re
from typing import NamedTuple


class Array(NamedTuple):
  """Size and place of an array."""

  bytes: int
  in_hbm: bool  # False: in a memory on the chip


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  arrays: tuple[Array, ...]  # of the result; several if it is a tuple
  opcode: str
  operands: tuple[str, ...]  # names of instructions of the same computation
  attributes: str  # the rest of the line; for a parameter or constant: its number or value
  root: bool  # whether the computation returns it


class Program(NamedTuple):
  """The computations of a program, each in the order of its text."""

  computations: dict[str, list[Instruction]]
  entry: str
  devices: int


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
# f32[64,256]{1,0:T(8,128)S(1)}, f8e4m3fn[8], pred[]; S(1) and so on are memories other than HBM.
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")


def parse(text: str) -> Program:
  """Parses the result of `jax.stages.Compiled.as_text()`."""
  devices = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text))
  computations: dict[str, list[Instruction]] = {}
  entry = ""
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      instructions = computations[head[2]] = []
      entry = head[2] if head[1] else entry
    elif match := _INSTRUCTION.match(line):
      root, name, shape, opcode, rest = match.groups()
      operands, _, attributes = rest.partition("), ")
      if opcode in ("parameter", "constant"):
        operands, attributes = "", rest
      names = tuple(re.findall(r"%([\w.-]+)", operands))
      instructions.append(Instruction(name, _arrays(shape), opcode, names, attributes, bool(root)))
  return Program(computations, entry, devices)


def _arrays(shape: str) -> tuple[Array, ...]:
  arrays = []
  for dtype, bits, dimensions, layout in _ARRAY.findall(shape):
    elements = math.prod(int(n.removeprefix("<=")) for n in dimensions.split(",") if n)
    size = math.ceil(elements * (8 if dtype == "pred" else int(bits)) / 8)
    arrays.append(Array(size, "S(" not in layout))
  return tuple(arrays)
