"""What goes wrong with weights, in words of this library."""

from collections.abc import Sequence


class WeightsError(ValueError):
  """Weights that can't be read, are not known, or do not fit; one line says which and why."""


def first_line(error: Exception) -> str:
  """The first line of what an error of another library says."""
  return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def shape_words(shape: Sequence[int]) -> str:
  """A shape as messages have it: [3, 4]."""
  return str(list(shape))
