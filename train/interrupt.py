"""Signals that end a command: when it hears them, and what they do."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from train.errors import Interrupted

# Ctrl-C; the end of a cluster job or of a preempted machine; SLURM's warning ahead of that; the end
# of a terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_GRACE = 5.0  # seconds in which a command cleans up after a signal


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Inside this context a signal raises Interrupted, which ends the program with its exit status.

  So does any error after it: libraries turn Interrupted into errors of their own. Where they drop
  it, or compile for longer, the program ends after a few seconds; at a second Ctrl-C at once.
  """
  heard: list[Interrupted] = []

  def handler(signum: int, frame: object) -> None:
    del frame
    if not heard:  # clusters repeat theirs
      heard.append(Interrupted(signum))
      raise heard[0]

  def end(interruption: Interrupted) -> None:
    with contextlib.suppress(OSError):  # the terminal may have gone
      print(f"error: stopped by {interruption}", file=sys.stderr, flush=True)
    os._exit(interruption.exit_status)  # Python's own end takes long enough for another Ctrl-C

  def hear(signum: int) -> None:
    timer = threading.Timer(_GRACE, end, [Interrupted(signum)])
    timer.daemon = True
    timer.start()

  report = sys.unraisablehook
  sys.unraisablehook = lambda raised: None if raised.exc_value in heard else report(raised)
  try:
    with _handled(handler, hear):
      try:
        yield
      except Interrupted as interruption:
        end(interruption)
      except BaseException:
        if heard:
          end(heard[0])
        raise
  finally:
    sys.unraisablehook = report


class StopRequest:
  """Inside this context signals are only recorded; a second Ctrl-C ends the process at once.

  A signal that arrives while the program compiles, evaluates or saves is not missed. Only the first
  one counts: clusters repeat theirs while the process saves.
  """

  def __init__(self):
    self.signum = 0  # of the first signal; 0: none yet
    self._say: Callable[[str], None] = print
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> "StopRequest":
    # Python itself only needs a handler; the signal is recorded as it arrives.
    handled = _handled(lambda signum, frame: None, self._record)
    self._say = self._stack.enter_context(handled)
    return self

  def __exit__(self, *exception) -> None:
    self._stack.close()

  def _record(self, signum: int) -> None:
    if not self.signum:
      self.signum = signum
      self._say("stopping at the next step")


@contextlib.contextmanager
def _handled(handler: Callable, hear: Callable[[int], None]) -> Iterator[Callable[[str], None]]:
  """Handles SIGNALS; a second Ctrl-C ends the process at once.

  Python runs a handler between two of its instructions, so after XLA has compiled. A thread reads
  the numbers of signals as they arrive.

  Args:
    handler: Python's handler, (signum, frame) -> None.
    hear: called with each signum in the thread, as soon as it arrives.
  Yields:
    A function that prints a line on stderr at once; if the terminal has gone, what the process
    prints from then on is dropped.
  """
  terminal = os.dup(2)  # descriptor 2 may lead to a file while images are decoded
  reading, writing = os.pipe()
  os.set_blocking(writing, False)

  def say(line: str) -> None:
    try:
      os.write(terminal, f"\n{line}\n".encode())
    except OSError:
      nowhere = os.open(os.devnull, os.O_WRONLY)
      for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
      os.close(nowhere)

  def watch() -> None:
    interrupts = 0
    while signum := os.read(reading, 1)[0]:
      interrupts += signum == signal.SIGINT
      if interrupts == 2:
        say("error: stopped at once by a second Ctrl-C; nothing more is saved")
        os._exit(128 + signal.SIGINT)
      if signum in previous:
        hear(signum)

  previous = {}
  watcher = threading.Thread(target=watch, name="signals", daemon=True)
  watcher.start()
  wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  try:
    for signum in SIGNALS:
      # nohup has it ignored: the run is to outlive its terminal.
      if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
        previous[signum] = signal.signal(signum, handler)
    yield say
  finally:
    for signum, before in previous.items():
      signal.signal(signum, before)
    signal.set_wakeup_fd(wakeup)
    os.write(writing, bytes([0]))  # ends the thread
    watcher.join()
    for descriptor in (reading, writing, terminal):
      os.close(descriptor)
