"""The errors of a run, and how a command reports them."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

# Of the commands that use a trained model, which have no knobs.
_OUT_OF_MEMORY = "out of memory: other programs may hold it, or the model needs a larger device"

_MOST_SHOWN = 200  # characters of a value that a message repeats

debug = False  # print the traceback behind an error, as `--debug` asks


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

  exit_status = 70  # EX_SOFTWARE of sysexits.h; the same command would fail again


class StorageError(Exception):
  """Results can't be written now: a full disk, for example. The message names path and reason.

  The same command goes on from the last good checkpoint once there is space again.
  """

  exit_status = 75  # EX_TEMPFAIL of sysexits.h: trying again may help


class Interrupted(BaseException):
  """A signal ends the command. Like KeyboardInterrupt it is no Exception."""

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.exit_status = 128 + signum  # as a shell reports a process killed by a signal


class SavedAndStopped(Interrupted):
  """A signal has ended a run, in all its processes, and its state is saved."""


def first_line(error: BaseException) -> str:
  """The first line of an error's message, as a sentence."""
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0].rstrip(".") + "."


def printable(text: str) -> str:
  """The text on one line: line breaks and what no terminal shows are escaped, long text is cut."""
  line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
  return line if len(line) <= _MOST_SHOWN else f"{line[:_MOST_SHOWN]}..."


def shown(value: Any) -> str:
  """A value as a message shows it."""
  try:
    return printable(repr(value))
  except Exception:  # of a whole number with more than 4,300 digits, or of an object
    return f"a value of type {type(value).__name__}"


def fail(error: object, status: int) -> NoReturn:
  """Ends the program with a message on stderr and this exit status."""
  if debug and (cause := sys.exc_info()[1]):
    traceback.print_exception(_with_causes(cause))
  with contextlib.suppress(OSError):  # the terminal has gone
    print(f"error: {error}", file=sys.stderr, flush=True)
  sys.exit(status)


@contextlib.contextmanager
def until_memory_ends() -> Iterator[None]:
  """Ends the program with one line if a device of JAX lacks memory."""
  try:
    yield
  except RuntimeError as error:  # JAX's
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    fail(_OUT_OF_MEMORY, 1)


@contextlib.contextmanager
def until_nobody_reads() -> Iterator[None]:
  """Ends the program quietly once the reader of its output has left, as `| head` does."""
  try:
    yield
    sys.stdout.flush()
  except BrokenPipeError:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):  # flushed at exit once more
      os.dup2(nowhere, stream.fileno())
    sys.exit(128 + signal.SIGPIPE)


def _with_causes(error: BaseException) -> BaseException:
  """The same error, with what it hides by `raise ... from None`."""
  cause: BaseException | None = error
  while cause is not None:
    cause.__suppress_context__ = cause.__cause__ is not None
    cause = cause.__cause__ or cause.__context__
  return error
