"""Counts what a compiled program reads from and writes to HBM, from the program's text.

XLA's own count, `cost_analysis()["bytes accessed"]`, assumes that every result goes through HBM. A
TPU keeps as much as it can on the chip, for example all of MLP-Mixer's activations.
"""

import re
import sys

from launch.hlo import Instruction, Program, parse

_WHOLE = sys.maxsize  # bytes; larger than any array

# Opcodes that move no data.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
  *("partition-id", "replica-id"),
}
# Opcodes that read only as much of their operand as they return.
_PARTS = {"slice", "dynamic-slice", "gather"}
_BODIES = re.compile(r"\b(?:body|condition|to_apply|\w+_computation)=%([\w.-]+)")


def hbm_bytes(text: str) -> int:
  """Bytes that the device reads from and writes to HBM when the program runs once.

  Sizes are logical, without a TPU's padding. A loop's body counts as often as it runs, or once if
  the text does not show how often.

  Args:
    text: `as_text()` of a `jax.stages.Compiled`.
  """
  program = parse(text)
  return _computation_bytes(program, program.entry)


def _computation_bytes(program: Program, name: str) -> int:
  instructions = {x.name: x for x in program.computations[name]}
  total = 0
  for x in instructions.values():
    # "-done" and "-update": the "-start" before them counts.
    if x.opcode in _FREE or x.opcode.endswith(("-done", "-update")):
      continue
    if x.opcode in ("while", "call", "conditional"):
      bodies = sum(_computation_bytes(program, body) for body in _BODIES.findall(x.attributes))
      total += bodies * _trips(program, x)
      continue
    operands = [_hbm(instructions[operand]) for operand in x.operands]
    if x.opcode == "fusion":
      total += _fusion_bytes(program, x, operands)
    elif x.opcode == "copy-start":  # gives (destination, source, context)
      total += operands[0] + x.arrays[0].bytes * x.arrays[0].in_hbm
    elif x.opcode in _PARTS | {"slice-start", "dynamic-slice-start"}:  # ((operand), result, ...)
      result = x.arrays[len(operands) if x.opcode.endswith("-start") else 0]
      total += result.bytes * (result.in_hbm + bool(operands[0]))
    elif x.opcode == "dynamic-update-slice":  # in place
      total += 2 * operands[1]
    else:
      total += sum(operands) + _hbm(x)
  return total


def _hbm(x: Instruction) -> int:
  return sum(array.bytes for array in x.arrays if array.in_hbm)


def _fusion_bytes(program: Program, fusion: Instruction, operands: list[int]) -> int:
  """Bytes that a fusion reads and writes: of an operand that it only slices, just the slices."""
  (called,) = re.findall(r"\bcalls=%([\w.-]+)", fusion.attributes)
  instructions = {x.name: x for x in program.computations[called]}

  def read(name: str) -> int:
    """Bytes read of an array in the fusion; an upper bound, because slices may be sliced again."""
    total = 0
    for x in instructions.values():
      if name not in x.operands:
        continue
      if x.opcode == "bitcast":
        total += read(x.name)
      elif x.opcode in _PARTS and x.operands[0] == name:
        total += sum(array.bytes for array in x.arrays)
      elif x.opcode == "dynamic-update-slice" and x.operands[0] == name:
        pass  # in place
      elif x.opcode == "tuple" or "chain_id=" in x.attributes:
        pass  # returned as it is, or sent by a collective that overlaps with the fusion
      else:
        return _WHOLE
    return total

  def written(name: str) -> int:
    x = instructions[name]
    if x.opcode == "bitcast":
      return written(x.operands[0])
    if x.opcode == "dynamic-update-slice":
      return sum(array.bytes for array in instructions[x.operands[1]].arrays)
    return 0 if x.opcode == "parameter" else _WHOLE

  total = 0
  for x in instructions.values():
    if x.opcode == "parameter":
      size = operands[int(x.attributes.partition(")")[0])]
      total += min(size, read(x.name)) if size else 0
  (root,) = (x for x in instructions.values() if x.root)
  results = root.operands if root.opcode == "tuple" else (root.name,)
  if len(results) != len(fusion.arrays):  # the fusion does not build the tuple itself
    return total + _hbm(fusion)
  for name, array in zip(results, fusion.arrays, strict=True):
    total += min(array.bytes, written(name)) if array.in_hbm else 0
  return total


def _trips(program: Program, loop: Instruction) -> int:
  """How often a loop runs if it counts from 0 to a constant; 1 if it does not."""
  for condition in re.findall(r"\bcondition=%([\w.-]+)", loop.attributes):
    instructions = {x.name: x for x in program.computations[condition]}
    (root,) = (x for x in instructions.values() if x.root)
    if root.opcode == "compare" and "direction=LT" in root.attributes:
      for operand in root.operands:
        if value := re.match(r"(\d+)\)", instructions[operand].attributes):
          return int(value[1]) if instructions[operand].opcode == "constant" else 1
  return 1
