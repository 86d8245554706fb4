"""Datasets: builders of our own, which prepare without TensorFlow, and what can go wrong."""


class DataError(Exception):
  """A dataset can't be used. The message is the complete text for the user."""


class UnreachableError(DataError):
  """The dataset is not on disk and can't be downloaded now."""


def first_line(error: Exception) -> str:
  """The first line of an error's message, as a sentence."""
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0].rstrip(".") + "."
