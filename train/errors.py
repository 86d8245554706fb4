"""The errors of a run, and how a command reports them."""

import signal
import sys
from typing import NoReturn


class ConfigError(ValueError):
  """A config can't be trained. The message names the value and the way out."""


class DataError(Exception):
  """A dataset can't be used. The message is the complete text for the user."""


class UnreachableError(DataError):
  """The dataset is not on disk and can't be downloaded now."""


class WorkdirError(ValueError):
  """A workdir can't be used. The message is the complete text for the user."""


class Disagreement(ValueError):
  """The processes of a run differ. The message is the complete text for the user."""


class TrainingFailed(Exception):
  """Training can't continue. The message says why, and what to change."""

  exit_status = 70  # its own, so that a script can tell a run that diverged (sysexits: EX_SOFTWARE)


class Interrupted(Exception):
  """A signal has asked the run to stop."""

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.exit_status = 128 + signum  # as a shell reports a process killed by a signal


def first_line(error: Exception) -> str:
  """The first line of an error's message, as a sentence."""
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0].rstrip(".") + "."


def fail(error: object, status: int) -> NoReturn:
  """Ends the program with a message on stderr and this exit status."""
  print(f"error: {error}", file=sys.stderr, flush=True)
  sys.exit(status)
