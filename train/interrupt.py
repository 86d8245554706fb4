"""Signals that ask a run to stop."""

import os
import signal

# Ctrl-C; the end of a cluster job or of a preempted machine; SLURM's warning ahead of that.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
  """Inside this context signals are only recorded; a second Ctrl-C ends the process.

  A signal that arrives while the program compiles, evaluates or saves is not missed. Only the first
  one counts: clusters repeat theirs while the process saves.
  """

  def __init__(self):
    self.signum = 0  # of the first signal; 0: none yet
    self._previous = {}

  def __enter__(self) -> "StopRequest":
    for signum in SIGNALS:
      self._previous[signum] = signal.signal(signum, self._request)
    return self

  def __exit__(self, *exception) -> None:
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)

  def _request(self, signum: int, frame) -> None:
    del frame
    if signum == signal.SIGINT:
      signal.signal(signum, self._previous[signum])
    if self.signum:
      return
    self.signum = int(signum)
    os.write(2, b"\nstopping at the next step\n")  # print is not safe in a signal handler
