"""How a run is asked to stop: by a signal."""

import os
import signal

# Ctrl-C; what ends a job on a cluster or a preempted machine; SLURM's warning before it.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
  """Within this context the signals only leave their number; a second Ctrl-C ends the process.

  A number, and not a question asked between training steps: a signal that arrives while the program
  compiles, evaluates or saves is not missed. Clusters repeat theirs while the process saves.
  """

  def __init__(self):
    self.signum = 0  # of the signal that has arrived
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
