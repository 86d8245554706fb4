"""Real runs of train.main, in processes of their own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from conftest import SHAPES100_DIR

from train.run import metrics

REPOSITORY = Path(__file__).parents[1]
CLOCK = ("images_per_second", "seconds")  # these differ between two equal runs


def numbers(folder: Path) -> list[dict]:
  """The rows of metrics.jsonl, without CLOCK."""
  return [{k: v for k, v in row.items() if k not in CLOCK} for row in metrics.read(folder)]


# On the fixture shapes100: 40 steps per epoch, a checkpoint every few steps.
COMMAND = [
  sys.executable,
  *("-m", "train.main", "--config", "configs/mixer.py:smoke"),
  *("--config.data.name=shapes100", f"--config.data.data_dir={SHAPES100_DIR}"),
  *("--config.data.train_split=train[:2560]", "--config.data.validation_split=train[3500:]"),
  *("--config.data.test_split=test[:500]", "--config.data.max_images=2560"),
  "--config.epochs=3",
  "--config.checkpoint_seconds=0.05",
]


def start(
  folder: Path, *flags: str, devices: int = 2, command: Sequence[str] = COMMAND
) -> subprocess.Popen:
  """Starts train.main, or another `command`, in the workdir `folder`."""
  return run(*command, "--workdir", str(folder), *flags, devices=devices)


def run(*command: str, devices: int = 2) -> subprocess.Popen:
  """A command on so many CPU devices."""
  with signals_are_heard():
    return subprocess.Popen(
      command,
      cwd=REPOSITORY,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )


def run_code(code: str, **environment: str) -> subprocess.CompletedProcess:
  """Runs Python code, with further variables, to its end in a process of its own."""
  return subprocess.run(
    [sys.executable, "-c", code],
    cwd=REPOSITORY,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=200,
  )


@contextlib.contextmanager
def signals_are_heard() -> Iterator[None]:
  """What starts in this context hears Ctrl-C and the end of its terminal; the suite may not."""
  ignored = [s for s in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(s) == signal.SIG_IGN]
  for signum in ignored:
    signal.signal(signum, signal.SIG_DFL)
  try:
    yield
  finally:
    for signum in ignored:
      signal.signal(signum, signal.SIG_IGN)


def saved_step(folder: Path, per_epoch: int = 40) -> int:
  """The step of the last complete checkpoint; 0 without one."""
  names = [p.name for p in folder.glob("checkpoints/last/*") if p.name.isdigit()]
  saved = max(map(int, names), default=0)  # epochs finished + steps done
  return saved - saved // (per_epoch + 1)


def free_port() -> int:
  """A port of this machine on which nobody listens."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]
