"""Floating-point operations of a function, counted in its jaxpr without running it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
  """Operations of products, convolutions and Fourier transforms; elementwise ones are left out.

  A product of [M, K] and [K, N] has 2 M K N. A transform of N values counts 5 N log2 N.

  Args:
    *arguments: of the function; arrays, or `jax.ShapeDtypeStruct`s in place of them.
  """
  return flops_of(jax.make_jaxpr(function)(*arguments))


def flops_of(jaxpr: ClosedJaxpr, repeated: bool = True) -> int:
  """`count_flops` of a function that is traced already.

  Args:
    repeated: count a loop's body as often as it runs; False: once, as XLA does before it optimizes.
  """
  return _of_jaxpr(jaxpr.jaxpr, repeated)


def _of_jaxpr(jaxpr: Jaxpr, repeated: bool) -> int:
  return sum(_of_equation(equation, repeated) for equation in jaxpr.eqns)


def _of_equation(equation: Any, repeated: bool) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    depth: int = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * depth * _size(equation.outvars[0])
  if name == "conv_general_dilated":
    kernel: tuple[int, ...] = equation.invars[1].aval.shape
    out_channels = kernel[params["dimension_numbers"].rhs_spec[0]]
    of_one_output: int = 2 * math.prod(kernel) // out_channels
    return of_one_output * _size(equation.outvars[0])
  if name == "fft":
    shape, lengths = equation.invars[0].aval.shape, params["fft_lengths"]
    return int(5 * math.prod(shape) * math.log2(math.prod(lengths)))
  inner = [_of_jaxpr(jaxpr, repeated) for jaxpr in _inner(params)]
  if name == "cond":  # one branch runs, such as that of a platform
    return max(inner)
  times: int = params["length"] if name == "scan" and repeated else 1
  return times * sum(inner)


def _size(variable: Any) -> int:
  size: int = math.prod(variable.aval.shape)
  return size


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, Jaxpr):
        yield item
