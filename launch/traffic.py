"""What a compiled program reads from and writes to a device's memory, read from XLA's text of it.

XLA's own count, `cost_analysis()["bytes accessed"]`, takes every result for one that goes through
that memory. A TPU keeps what it can on the chip: all of MLP-Mixer's activations, for one.
"""

import re

from launch.hlo import Instruction, Program, parse

# No work, or the end of work that its start counts.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
  *("partition-id", "replica-id"),
}
_PARTS = {"slice", "dynamic-slice", "gather"}  # read no more of their operand than they give
_BODIES = re.compile(r"\b(?:body|condition|to_apply|\w+_computation)=%([\w.-]+)")


def hbm_bytes(text: str) -> int:
  """Bytes that the device reads from and writes to HBM when the program runs once.

  Logical sizes, without a TPU's padding. A loop counts as often as it runs, or once where the text
  does not tell.

  Args:
    text: of a `jax.stages.Compiled`, as `as_text()` gives it.
  """
  program = parse(text)
  return _of_computation(program, program.entry)


def _of_computation(program: Program, name: str) -> int:
  instructions = {x.name: x for x in program.computations[name]}
  total = 0
  for x in instructions.values():
    if x.opcode in _FREE or x.opcode.endswith(("-done", "-update")):
      continue
    if x.opcode in ("while", "call", "conditional"):
      bodies = sum(_of_computation(program, body) for body in _BODIES.findall(x.attributes))
      total += bodies * _trips(program, x)
      continue
    operands = [_hbm(instructions[operand]) for operand in x.operands]
    if x.opcode == "fusion":
      total += _of_fusion(program, x, operands)
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


def _of_fusion(program: Program, fusion: Instruction, operands: list[int]) -> int:
  """Operands and results of a fusion, or what it reads of an operand of which it takes slices."""
  (called,) = re.findall(r"\bcalls=%([\w.-]+)", fusion.attributes)
  instructions = {x.name: x for x in program.computations[called]}

  def read(name: str) -> float:
    """Bytes of an array in the fusion that are looked at; a bound, as a slice may be of a slice."""
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
        pass  # handed on; a collective that goes on meanwhile
      else:
        return float("inf")
    return total

  def written(name: str) -> float:
    x = instructions[name]
    if x.opcode == "bitcast":
      return written(x.operands[0])
    if x.opcode == "dynamic-update-slice":
      return sum(array.bytes for array in instructions[x.operands[1]].arrays)
    return 0 if x.opcode == "parameter" else float("inf")

  total = 0
  for x in instructions.values():
    if x.opcode == "parameter":
      size = operands[int(re.match(r"\d+", x.attributes)[0])]
      total += min(size, read(x.name)) if size else 0
  (root,) = (x for x in instructions.values() if x.root)
  results = root.operands if root.opcode == "tuple" else (root.name,)
  if len(results) != len(fusion.arrays):  # a tuple that is not put together in the fusion
    return total + _hbm(fusion)
  for name, array in zip(results, fusion.arrays, strict=True):
    total += min(array.bytes, written(name)) if array.in_hbm else 0
  return total


def _trips(program: Program, loop: Instruction) -> int:
  """How often a loop runs that counts from zero up to a constant."""
  for condition in re.findall(r"\bcondition=%([\w.-]+)", loop.attributes):
    instructions = {x.name: x for x in program.computations[condition]}
    (root,) = (x for x in instructions.values() if x.root)
    if root.opcode == "compare" and "direction=LT" in root.attributes:
      for operand in root.operands:
        if value := re.match(r"(\d+)\)", instructions[operand].attributes):
          return int(value[1]) if instructions[operand].opcode == "constant" else 1
  return 1
