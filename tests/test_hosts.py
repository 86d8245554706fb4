"""Several real processes train like one, stop together, and resume on other devices."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from runs import COMMAND, REPOSITORY, free_port, numbers, saved_step, start
from test_folder import make_folder

from launch import local
from train.run import metrics

STEPS = 40  # per epoch


def on_processes(processes: int, devices: int) -> list[str]:
  """runs.COMMAND on several processes, with fewer checkpoints, which take them longer."""
  launcher = [sys.executable, "-m", "launch.local", "--processes", str(processes)]
  launcher += ["--devices-per-process", str(devices), "--"]
  return [*launcher, *COMMAND[3:], "--config.checkpoint_seconds=0.3"]


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
  """Waits for a checkpoint after `step`."""
  deadline = time.monotonic() + 120
  while saved_step(folder) <= step:
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.005)


def process_of(launcher: subprocess.Popen, index: int) -> int:
  """The process id of the launcher's child with this index."""
  children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
  for child in children:
    command = Path(f"/proc/{child}/cmdline").read_text().split("\0")
    if str(index) == command[command.index("--process_id") + 1]:
      return int(child)
  raise LookupError(index)


def assert_same_curves(folder: Path, expected: Path) -> None:
  assert [row["step"] for row in numbers(folder)] == [row["step"] for row in numbers(expected)]
  for row, like in zip(numbers(folder), numbers(expected), strict=True):
    for key in ("train_loss", "val_loss"):
      np.testing.assert_allclose(row[key], like[key], rtol=1e-4)
    for key in ("train_top5", "val_top5"):
      np.testing.assert_allclose(row[key], like[key], atol=2e-3)


@pytest.fixture(scope="module")
def on_one_process(shapes100, tmp_path_factory) -> Path:
  """The workdir of an uninterrupted run in one process with four devices."""
  folder = tmp_path_factory.mktemp("runs") / "one"
  process = start(folder, devices=4)
  output = process.communicate(timeout=200)
  assert process.returncode == 0, output
  return folder


@pytest.mark.slow
def test_two_processes_are_killed_restarted_and_equal_one(on_one_process, tmp_path):
  folder = tmp_path / "run"
  launcher = start(folder, command=on_processes(2, 2))
  wait_for_step(launcher, folder, STEPS + 3)
  os.kill(process_of(launcher, 1), signal.SIGKILL)
  killed_at = time.monotonic()
  output, error = launcher.communicate(timeout=200)
  assert time.monotonic() - killed_at < 30
  assert launcher.returncode == 128 + signal.SIGKILL
  assert "process 1 failed with exit status -9" in error
  assert metrics.read_summary(folder) is None

  stopped_at = saved_step(folder)
  launcher = start(folder, command=on_processes(2, 2))
  output, error = launcher.communicate(timeout=200)
  assert launcher.returncode == 0, error
  assert f"step {stopped_at}." in output
  assert "4 x cpu, 2 processes" in output
  assert output.count("parameters, float32") == 1  # only the first one prints
  assert_same_curves(folder, on_one_process)
  (test, expected) = metrics.read_summary(folder), metrics.read_summary(on_one_process)
  np.testing.assert_allclose(test["test_loss"], expected["test_loss"], rtol=1e-4)


@pytest.mark.parametrize(
  ("statuses", "blamed"),
  [([-6, -9], 1), ([75, 1], 1), ([-6, 75], 0), ([None, -9], 1), ([0, None], None), ([2, -6], 0)],
)
def test_the_process_that_failed_first_is_blamed_and_not_those_that_lost_it(statuses, blamed):
  def ended(status):
    return SimpleNamespace(child=SimpleNamespace(poll=lambda: status, returncode=status))

  processes = [ended(status) for status in statuses]
  expected = None if blamed is None else processes[blamed]
  assert local._first_failed(processes) is expected


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "flags"),
  [
    ("mixer", ["--config.model.width=128"]),  # wide enough to shard weights
    ("vit", ["--config.optimizer.learning_rate=3e-4"]),
  ],
)
def test_run_moves_between_meshes_and_processes(shapes100, name, flags, tmp_path):
  def begin(folder: Path, mesh: str, processes: int, devices: int) -> subprocess.Popen:
    command = on_processes(processes, devices) if processes > 1 else COMMAND
    command = [part.replace("configs/mixer.py", f"configs/{name}.py") for part in command]
    data, fsdp = mesh.split("x")
    axes = [f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}"]
    return start(folder, *flags, *axes, devices=devices, command=command)

  expected, folder = tmp_path / "uninterrupted", tmp_path / "moved"
  process = begin(expected, "8x1", 1, 8)
  _, error = process.communicate(timeout=200)
  assert process.returncode == 0, error
  for stop_after, place in (
    (5, ("8x1", 1, 8)),
    (25, ("2x2", 1, 4)),
    (STEPS + 10, ("1x1", 1, 1)),
    (2 * STEPS + 5, ("2x4", 2, 4)),
    (None, ("1x8", 1, 8)),
  ):
    process = begin(folder, *place)
    if stop_after is not None:
      wait_for_step(process, folder, stop_after)
      process.terminate()
    _, error = process.communicate(timeout=200)
    assert process.returncode == (0 if stop_after is None else 143), error
  assert_same_curves(folder, expected)


def errors_of_two(folder: Path, flags_of: Callable[[int], list[str]]) -> list[str]:
  """The stderr of two processes that fail, each with its own flags."""
  coordinator = f"localhost:{free_port()}"
  processes = [
    start(
      folder,
      *("--coordinator", coordinator, "--processes=2", f"--process_id={index}"),
      *flags_of(index),
      devices=1,
    )
    for index in range(2)
  ]
  errors = [process.communicate(timeout=100)[1] for process in processes]
  assert [process.returncode for process in processes] == [1, 1]
  return errors


def test_processes_that_differ_in_their_config_do_not_train(shapes100, tmp_path):
  for error in errors_of_two(tmp_path / "run", lambda index: [f"--config.seed={index}"]):
    assert "error: the processes of this run differ in config, dataset or --workdir" in error


def test_processes_tell_each_other_which_images_are_broken(shapes100, tmp_path):
  path = make_folder(tmp_path / "images")
  broken = sorted((path / "train" / "dog").iterdir())[:4]  # two for each process to find
  for file in broken:
    file.write_bytes(file.read_bytes()[:50])
  for error in errors_of_two(tmp_path / "run", lambda _: [f"--config.data.name=folder:{path}"]):
    assert "holds broken images (4);" in error
    assert all(f"{file}: " in error for file in broken)


@pytest.mark.parametrize(
  ("name", "launcher"),
  [("JOB_COMPLETION_INDEX", "Kubernetes"), ("OMPI_COMM_WORLD_SIZE", "Open MPI")],
)
def test_a_process_that_does_not_find_the_others_does_not_train(
  shapes100, name, launcher, tmp_path, monkeypatch
):
  monkeypatch.setenv(name, "3")
  process = start(tmp_path / "run", devices=1)
  _, error = process.communicate(timeout=100)
  assert process.returncode == 2
  assert f"error: {launcher} has started this process ({name}=3), and JAX does not find" in error
  assert not (tmp_path / "run").exists()


# Launchers ----------------------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}
STEP = {"SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
  "variables",
  [
    SLURM | {"SLURM_NODELIST": "localhost"},  # salloc
    SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a script of sbatch
    SLURM | STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # a shell that salloc starts as a step
    SLURM | STEP,
  ],
)
def test_a_job_of_slurm_without_srun_is_one_line(variables, tmp_path, monkeypatch):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  began = time.monotonic()
  process = start(tmp_path / "run", devices=1)
  _, error = process.communicate(timeout=100)
  assert time.monotonic() - began < 60  # JAX would wait for 300 s
  assert process.returncode == 2
  assert error.startswith("error: SLURM_NTASKS=4, but srun has not started this process")
  assert "--processes=1" in error and error.count("\n") == 1
  assert not (tmp_path / "run").exists()
  assert "Reading" in first_lines(start(tmp_path / "run", "--processes=1", devices=1))


def first_lines(process: subprocess.Popen) -> str:
  """What a run prints before it trains; then it is killed."""
  line = process.stdout.readline()
  process.kill()
  return line + process.communicate(timeout=100)[1]


@pytest.mark.parametrize(
  "variables",
  [
    SLURM | STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:9"},
  ],
)
def test_a_process_that_is_alone_needs_no_port(variables):
  """Of two such runs in one job, the second could not open the port of the first."""
  code = (
    "import argparse, jax; from train.devices import hosts; parser = argparse.ArgumentParser()\n"
    "hosts.add_flags(parser)\n"
    "with hosts.joined(parser.parse_args()): print(jax.distributed.is_initialized())"
  )
  process = subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | variables,
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
  )
  assert (process.stdout, process.stderr, process.returncode) == ("False\n", "", 0)


@pytest.mark.parametrize("platforms", ["cuda", "cudaa"])
@pytest.mark.parametrize(
  "command", ["main", *(pytest.param(x, marks=pytest.mark.slow) for x in ("bench", "evaluate"))]
)
def test_devices_that_are_not_here_are_one_line(command, platforms, finished_run):
  flags = {"evaluate": ["--workdir", str(finished_run)]}.get(command, COMMAND[3:])
  process = subprocess.run(
    [sys.executable, "-m", f"train.{command}", *flags],
    env=os.environ | {"JAX_PLATFORMS": platforms, "CUDA_VISIBLE_DEVICES": ""},
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
  )
  (line,) = process.stderr.splitlines()
  assert line.startswith(f"error: JAX_PLATFORMS={platforms}: JAX finds no such device here; unset")
  assert process.returncode == (1 if command == "evaluate" else 2)


def test_a_run_that_waits_for_others_hears_ctrl_c(tmp_path):
  with socket.create_server(("localhost", 0)) as coordinator:  # which never answers
    address = f"localhost:{coordinator.getsockname()[1]}"
    flags = ["--coordinator", address, "--processes=2", "--process_id=1"]
    process = start(tmp_path / "run", *flags, devices=1)
    coordinator.settimeout(100)
    coordinator.accept()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=200)  # JAX would wait for 300 s
  assert (error, process.returncode) == ("error: stopped by SIGINT\n", 130)


@pytest.mark.parametrize("address", ["localhost", "localhost:", "localhost:abc", "localhost:99999"])
def test_an_address_without_a_port_is_one_line(address, tmp_path):
  flags = ["--coordinator", address, "--processes=2", "--process_id=0"]
  process = start(tmp_path / "run", *flags, devices=1)
  _, error = process.communicate(timeout=100)
  assert (
    error.startswith(f"error: --coordinator {address} --process_id 0") and process.returncode == 2
  )
  assert error.count("\n") == 1


TURNS = """
import argparse, os, socket, sys, time
from train.devices import hosts
socket.gethostname = lambda: sys.argv[1]
parser = argparse.ArgumentParser()
hosts.add_flags(parser)
with hosts.joined(parser.parse_args(sys.argv[2:])):
  for block, on_each_host in (("data", True), ("workdir", False)):
    with hosts.first_goes_first(on_each_host):
      print(block, "began", time.monotonic(), file=sys.stderr)
      time.sleep(0.2)
      print(block, "ended", time.monotonic(), file=sys.stderr)
"""


def test_the_first_process_of_each_host_goes_before_the_rest():
  names = ["a", "a", "b", "b", "c"]
  coordinator = f"localhost:{free_port()}"
  flags = ["--coordinator", coordinator, "--processes=5"]
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", TURNS, name, *flags, f"--process_id={index}"],
      cwd=REPOSITORY,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
      stderr=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      text=True,
    )
    for index, name in enumerate(names)
  ]
  turns = {}
  for index, process in enumerate(processes):
    error = process.communicate(timeout=200)[1]
    assert process.returncode == 0, error
    for line in error.splitlines():
      if (words := line.split())[0] in ("data", "workdir"):
        turns[words[0], index, words[1]] = float(words[2])

  def is_before(block: str, first: list[int], second: list[int]) -> bool:
    ended = max(turns[block, index, "ended"] for index in first)
    return ended < min(turns[block, index, "began"] for index in second)

  assert is_before("data", [0], [1, 2, 3, 4])
  assert is_before("data", [2, 4], [1, 3])
  assert is_before("workdir", [0], [1, 2, 3, 4])
  assert not is_before("workdir", [2, 4], [1, 3])
