"""Starts a run as several processes on this machine, as a cluster would on several hosts.

    python -m launch.local --processes 4 --devices-per-process 2 -- --config configs/mixer.py:smoke

Arguments after `--` go to train.main. The processes connect on a free port, each with its own
simulated CPU devices, and communicate as hosts do (gloo). They end together: if one fails, the
others are stopped and its error is shown; signals are passed on to all.
"""

import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import IO, NamedTuple

from train.devices.hosts import LOST
from train.errors import fail
from train.interrupt import SIGNALS

# Statuses of a process that lost another one, and not the cause: its own, or an abort inside JAX.
_LOST_ANOTHER = (LOST, -signal.SIGABRT)
_GRACE_SECONDS = 20.0  # after one has failed, until the others are killed
_POLL_SECONDS = 0.1
_STDERR_LINES = 20  # shown of a failed process


class _Process(NamedTuple):
  child: subprocess.Popen
  stderr: IO[str] | None  # captured; None for the first, which writes to the terminal


def run(processes: int, devices_per_process: int, arguments: list[str]) -> int:
  """Runs train.main in several processes, until all have ended.

  Args:
    devices_per_process: simulated CPU devices of each process.
    arguments: those of train.main.
  Returns:
    The exit status of the first process that failed, or 0.
  """
  started: list[_Process] = []

  def pass_on(signum: int, frame) -> None:
    del frame
    for process in started:
      if process.child.poll() is None:
        process.child.send_signal(signum)

  for signum in SIGNALS:
    signal.signal(signum, pass_on)
  signal.signal(signal.SIGHUP, lambda *_: pass_on(signal.SIGTERM, None))  # the terminal was closed
  try:
    for index, command in enumerate(_commands(processes, arguments)):
      started.append(_start(command, devices_per_process, first=index == 0))
    failed = _wait(started)
  finally:
    for process in started:
      process.child.kill()
  if failed is None:
    return 0
  index = started.index(failed)
  status = failed.child.returncode
  if -status in SIGNALS or status - 128 not in SIGNALS:
    print(f"error: process {index} failed with exit status {status}", file=sys.stderr)
    if failed.stderr:
      failed.stderr.seek(0)
      sys.stderr.writelines(failed.stderr.readlines()[-_STDERR_LINES:])
  return status if status > 0 else 128 - status


def _commands(processes: int, arguments: list[str]) -> list[list[str]]:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    coordinator = f"localhost:{free.getsockname()[1]}"
  command = [sys.executable, "-m", "train.main", *arguments]
  command += ["--coordinator", coordinator, "--processes", str(processes)]
  return [[*command, "--process_id", str(index)] for index in range(processes)]


def _start(command: list[str], devices: int, first: bool) -> _Process:
  stderr = None if first else tempfile.TemporaryFile("w+")
  child = subprocess.Popen(
    command,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
    stdin=subprocess.DEVNULL,
    stderr=stderr,
    start_new_session=True,  # Ctrl-C reaches only us, and we pass it on once
  )
  return _Process(child, stderr)


def _wait(started: list[_Process]) -> _Process | None:
  """Waits until all have ended, and returns the first that failed.

  After a failure, the others are killed if they do not end in time.
  """
  failed, deadline = None, math.inf
  while running := [process for process in started if process.child.poll() is None]:
    if failed is None:
      failed = _first_failed(started)
      deadline = time.monotonic() + _GRACE_SECONDS
    elif time.monotonic() > deadline:
      for process in running:
        process.child.kill()
    time.sleep(_POLL_SECONDS)
  return failed or _first_failed(started)


def _first_failed(started: list[_Process]) -> _Process | None:
  failed = [process for process in started if process.child.poll()]
  causes = [process for process in failed if process.child.returncode not in _LOST_ANOTHER]
  return next(iter(causes or failed), None)


def main() -> None:
  """Exit status: that of train.main, or 128 + N if signal N ended a process."""
  parser = argparse.ArgumentParser(
    prog="python -m launch.local", usage="%(prog)s [flags] -- --config FILE [...]"
  )
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--devices-per-process", type=int, default=1, help="simulated CPU devices")
  ours = sys.argv[1:]
  theirs = []
  if "--" in ours:
    ours, theirs = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
  arguments = parser.parse_args(ours)
  if arguments.processes < 1 or arguments.devices_per_process < 1:
    fail("--processes and --devices-per-process must be at least 1", 2)
  if not theirs:
    fail("nothing follows `--`: give train.main's flags there, --config FILE first", 2)
  sys.exit(run(arguments.processes, arguments.devices_per_process, theirs))


if __name__ == "__main__":
  main()
