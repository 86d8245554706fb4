"""Faults, injected for real: full disks, writes that fail, processes killed at any moment."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from runs import COMMAND, REPOSITORY, numbers, run, signals_are_heard, start

from train.errors import StorageError
from train.loop import train_and_evaluate
from train.run import metrics, storage


def state(folder) -> int:
  """The checksum of the last state's arrays."""
  last = max((folder / "checkpoints" / "last").iterdir(), key=lambda path: int(path.name))
  return json.loads((last / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["checksum"]


# A disk that is full ------------------------------------------------------------------------------

# In a mount namespace of its own, so that no mount outlives the test.
_ON_A_SMALL_DISK = """
set -u
mount -t tmpfs -o size=$1 tmpfs "$2"
shift 2
"$@"; echo "first: $?" >&2
mount -o remount,size=100m tmpfs "$DISK"
"$@"; echo "second: $?" >&2
cp -r "$DISK/run/metrics.jsonl" "$DISK/run/summary.json" "$KEPT"
"""


@pytest.mark.slow
@pytest.mark.needs(what="namespaces")
@pytest.mark.parametrize("size", ["200k", "600k", "900k", "1200k"])
def test_with_space_again_the_same_command_goes_on(size, uninterrupted, tmp_path):
  disk, kept = tmp_path / "disk", tmp_path / "kept"
  disk.mkdir()
  kept.mkdir()
  command = [*COMMAND, "--workdir", str(disk / "run")]
  process = subprocess.run(
    ["unshare", "-rm", "bash", "-c", _ON_A_SMALL_DISK, "bash", size, str(disk), *command],
    cwd=REPOSITORY,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "2", "DISK": str(disk), "KEPT": str(kept)},
    capture_output=True,
    text=True,
    timeout=280,
  )
  error = process.stderr
  assert "first: 75" in error, error
  assert "second: 0" in error, error
  assert "Traceback" not in error
  (line,) = re.findall("^error: .*", error, re.MULTILINE)
  assert str(disk / "run") in line and "No space left on device" in line
  assert numbers(kept) == numbers(uninterrupted)


# A write that fails once --------------------------------------------------------------------------


def fail_at(monkeypatch, calls: set[int], code: int) -> list[int]:
  """Lets some calls of os.fsync, by number from 0, fail as a disk does."""
  made: list[int] = []
  fsync = os.fsync

  def sometimes(descriptor):
    made.append(descriptor)
    if len(made) - 1 in calls:
      raise OSError(code, os.strerror(code))
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", sometimes)
  monkeypatch.setattr("train.run.storage._PAUSES", (0.0, 0.0, 0.0))
  return made


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_write_that_fails_once_is_tried_again(code, tmp_path, monkeypatch, capsys):
  path = tmp_path / "file"
  path.write_text("before")
  fail_at(monkeypatch, {0, 1}, code)
  storage.write_atomically(path, "after")
  assert path.read_text() == "after"
  line = f"{path} can't be written: {os.strerror(code)}; trying again\n"
  assert capsys.readouterr().err == 2 * line


def test_a_write_that_keeps_failing_leaves_what_was_there(tmp_path, monkeypatch):
  path = tmp_path / "file"
  path.write_text("before")
  fail_at(monkeypatch, set(range(9)), errno.ENOSPC)
  with pytest.raises(StorageError, match=f"{path} can't be written: No space left on device. With"):
    storage.write_atomically(path, "after")
  assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "before"}


def test_a_run_outlives_writes_that_fail_once(finished_run, smoke_config, tmp_path, monkeypatch):
  made = fail_at(monkeypatch, {0, 3, 7, 8, 15}, errno.EIO)
  train_and_evaluate(smoke_config(epochs=3), tmp_path)
  assert len(made) > 15
  assert numbers(tmp_path) == numbers(finished_run)


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_checkpoint_that_fails_once_is_saved_again(
  name, finished_run, smoke_config, tmp_path, monkeypatch
):
  import orbax.checkpoint as ocp

  monkeypatch.setattr("train.run.storage._PAUSES", (0.0, 0.0, 0.0))
  wait, failures = ocp.CheckpointManager.wait_until_finished, []

  def fail_once(manager):
    wait(manager)
    if manager.directory.name == name and 9 in manager.all_steps() or len(failures) > 1:
      if not failures:
        failures.append(1)
        raise ValueError("RESOURCE_EXHAUSTED: [os_error_code='28']")

  monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", fail_once)
  train_and_evaluate(smoke_config(epochs=3), tmp_path)
  assert numbers(tmp_path) == numbers(finished_run)


def test_an_error_while_leaving_does_not_hide_why_the_run_ends(tmp_path, monkeypatch, capsys):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "curves.png"))

  monkeypatch.setattr(metrics, "draw_curves", full)
  row = dict.fromkeys(metrics.EPOCH_KEYS, 1)
  with pytest.raises(KeyboardInterrupt):
    with metrics.Writer(tmp_path) as writer:
      writer._drawn_at = time.monotonic()  # the curves are due at the end
      writer.epoch(row)
      raise KeyboardInterrupt
  assert "also: [Errno 28] No space left on device" in capsys.readouterr().err


# Killed at any moment -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_at_any_moment_ends_like_one_that_was_not(uninterrupted, tmp_path):
  folder = tmp_path / "run"
  rng = random.Random(0)
  began = time.monotonic()
  process = start(folder)
  process.communicate(timeout=200)
  whole = time.monotonic() - began  # seconds of a run
  for path in sorted(folder.rglob("*"), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  kills = 0
  while kills < 20:
    process = start(folder)
    try:
      # Each goes on from a checkpoint, so most kills fall into the beginning, epochs and saves.
      _, error = process.communicate(timeout=whole * rng.uniform(0.1, 0.6))
      assert process.returncode == 0, error
      break
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      kills += 1
  process = start(folder)
  _, error = process.communicate(timeout=200)
  assert process.returncode == 0, error
  assert kills > 3
  assert numbers(folder) == numbers(uninterrupted)
  assert state(folder) == state(uninterrupted)


_KILLED_WHEN = """
import os, signal, sys
import orbax.checkpoint as ocp
from train import main

name, when, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
del sys.argv[1:4]
save, wait = ocp.CheckpointManager.save, ocp.CheckpointManager.wait_until_finished
begun = []

def spy(manager, number, *arguments, **named):
  due = manager.directory.name == name and number >= step
  if due and when == "before":
    os.kill(os.getpid(), signal.SIGKILL)
  result = save(manager, number, *arguments, **named)
  if due and when == "during":
    os.kill(os.getpid(), signal.SIGKILL)
  begun.append((manager, due))
  return result

def spied_wait(manager):
  wait(manager)
  if when == "after" and any(m is manager and due for m, due in begun):
    os.kill(os.getpid(), signal.SIGKILL)

ocp.CheckpointManager.save, ocp.CheckpointManager.wait_until_finished = spy, spied_wait
main.main()
"""

MOMENTS = [
  (name, when, step)
  for name, step in (("last", 0), ("last", 20), ("best", 1), ("best", 2))
  for when in ("before", "during", "after")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "when", "step"), MOMENTS)
def test_a_run_killed_while_it_saves_ends_like_one_that_was_not(
  name, when, step, uninterrupted, tmp_path
):
  folder = tmp_path / "run"
  command = [sys.executable, "-c", _KILLED_WHEN, name, when, str(step), *COMMAND[3:]]
  process = start(folder, command=command)
  process.communicate(timeout=200)
  assert process.returncode == -signal.SIGKILL
  process = start(folder)
  _, error = process.communicate(timeout=200)
  assert process.returncode == 0, error
  assert numbers(folder) == numbers(uninterrupted)
  assert state(folder) == state(uninterrupted)
  result = metrics.read_summary(folder) | {"seconds": 0}
  assert result == metrics.read_summary(uninterrupted) | {"seconds": 0}


# Signals ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_while_testing_is_obeyed(signum, uninterrupted, tmp_path):
  folder = tmp_path / "run"
  process = start(folder, "--config.data.test_split=train+train+train+train")  # long enough
  for line in process.stdout:
    if line.startswith("Testing"):
      break
  process.send_signal(signum)
  _, error = process.communicate(timeout=200)
  assert process.returncode == 128 + signum
  assert "Traceback" not in error
  assert error.splitlines()[-1].startswith(f"error: stopped by {signal.Signals(signum).name}; the")


COMMANDS = {
  "evaluate": ["--workdir", "RUN"],
  "predict": ["--workdir", "RUN", *["docs/curves.png"] * 3000],
  "data": ["prepare", "--name=shapes100", "--data_dir=NEW"],
}


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", COMMANDS)
def test_other_commands_end_with_a_signals_status(command, signum, uninterrupted, tmp_path):
  places = {"RUN": str(uninterrupted), "--data_dir=NEW": f"--data_dir={tmp_path}"}
  arguments = [places.get(argument, argument) for argument in COMMANDS[command]]
  code = f"import sys; from train.{command} import main; print(flush=True); main()"
  if command == "data":
    code = code.replace("train.data", "train.data.__main__")
  statuses = []
  for seconds in (0.01, 0.3, 1.0):
    process = run(sys.executable, "-c", code, *arguments)
    assert process.stdout.readline() == "\n"  # the libraries are imported
    time.sleep(seconds)
    process.send_signal(signum)
    output, error = process.communicate(timeout=200)
    assert "Traceback" not in error
    statuses.append(process.returncode)
    # A library may drop the signal: then the command finishes, or ends a few seconds later.
    assert statuses[-1] == 128 + signum or (statuses[-1] == 0 and output.endswith("}\n"))
  assert 128 + signum in statuses
  # No half-written dataset; where a signal was dropped, TFDS's folder beside it may stay.
  assert not (tmp_path / "shapes100" / "1.0.0").exists()


@pytest.mark.slow
def test_a_hangup_is_ignored_under_nohup(tmp_path):
  with signals_are_heard():
    process = run("nohup", *COMMAND, "--workdir", str(tmp_path / "run"), "--config.epochs=1")
  while not (tmp_path / "run" / "config.json").exists():
    time.sleep(0.05)
  process.send_signal(signal.SIGHUP)
  _, error = process.communicate(timeout=200)
  assert process.returncode == 0, error


# For long -----------------------------------------------------------------------------------------

_SOAK = """
import json, os, signal, sys, threading
import psutil
from configs import mixer
from train.devices.compile import start_jax
from train.errors import SavedAndStopped
from train.loop import Watch, train_and_evaluate

config = mixer.get_config("smoke")
config.data.name, config.data.data_dir = "shapes100", sys.argv[2]
config.data.validation_split, config.epochs, config.early_stop_patience = "train[3500:3564]", 250, 0
start_jax(config)
check = Watch.__call__

def stop_every_100_steps(watch, state, *look):
  if int(state.step) % 100 == 99 and int(state.step) not in stopped:
    stopped.add(int(state.step))
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(0.2)  # until it is heard
  check(watch, state, *look)

Watch.__call__ = stop_every_100_steps
stopped = set()
while True:
  try:
    train_and_evaluate(config.copy_and_resolve_references(), sys.argv[1])
    done = True
  except SavedAndStopped:
    done = False
  process = psutil.Process()
  used = {
    "files": process.num_fds(), "threads": process.num_threads(), "bytes": process.memory_info().rss
  }
  print("used", json.dumps(used | {"stops": len(stopped)}), flush=True)
  if done:
    break
"""


@pytest.mark.slow
def test_2000_steps_with_20_restarts_leave_nothing_open(shapes100, tmp_path):
  process = run(sys.executable, "-c", _SOAK, str(tmp_path / "run"), str(shapes100))
  output, error = process.communicate(timeout=280)
  assert process.returncode == 0, error
  used = [json.loads(line[5:]) for line in output.splitlines() if line.startswith("used ")]
  first, last = used[1], used[-1]  # the first restart restores for the first time
  assert last["stops"] == 20
  assert metrics.read(tmp_path / "run")[-1]["step"] == 2000
  assert last["files"] <= first["files"] + 2
  assert last["threads"] <= first["threads"] + 2
  assert last["bytes"] < first["bytes"] + 200e6
