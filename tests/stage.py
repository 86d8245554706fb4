"""A place to run launch/'s scripts in, where launch_stand_ins.py plays the commands they call."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from runs import signals_are_heard

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
LAUNCH = REPOSITORY / "launch"


class Stage:
  """A folder for the stand-ins, which come first on the PATH, and for their notes.

  A context: at its end, what `start` has started is killed.
  """

  def __init__(self, folder: Path):
    self.folder = folder
    self.bin = folder / "bin"
    self.bin.mkdir()
    self.processes: list[subprocess.Popen] = []
    self.environment = {
      "PATH": f"{self.bin}:{os.environ['PATH']}",
      "HOME": str(folder),
      "STAND_IN": str(folder),
      "TEST_SESSION": str(os.getsid(0)),
    }

  def __enter__(self) -> "Stage":
    return self

  def __exit__(self, *error) -> None:
    for process in self.processes:  # still running if the test has failed
      process.kill()

  def play(self, *stand_ins: str, **scenario) -> None:
    """Puts the stand-ins on the PATH, with the scenario that they act by."""
    for name in stand_ins:
      path = self.bin / name
      path.write_text(
        f'#!/bin/sh\nexec {sys.executable} -IS {TESTS}/launch_stand_ins.py {name} "$@"\n'
      )
      path.chmod(0o755)
    (self.folder / "scenario.json").write_text(json.dumps(scenario))

  def start(self, *command: str) -> subprocess.Popen:
    with signals_are_heard():
      process = subprocess.Popen(
        command,
        env=self.environment,
        cwd=self.folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
      )
    self.processes.append(process)
    return process

  def run(self, *command: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    return self.finish(self.start(*command))

  def finish(self, process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits for a started command: its exit status, stdout and stderr."""
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors

  def notes(self, file: str) -> list:
    """The lines of a JSONL file of the stand-ins; none if there is no such file."""
    path = self.folder / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def calls(self) -> list[list[str]]:
    """Names and arguments of all calls of stand-ins."""
    return self.notes("calls.jsonl")

  def wait_for(self, file: str, count: int = 1) -> list:
    """The notes in a file, once it has `count` lines."""
    deadline = time.monotonic() + 60
    while len(self.notes(file)) < count:
      assert time.monotonic() < deadline, f"{file} still has fewer than {count} lines"
      time.sleep(0.01)
    return self.notes(file)
