"""A workdir has one owner, and nothing of value in it is lost or taken for another run's."""

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from runs import COMMAND, REPOSITORY, numbers, run, signals_are_heard, start

from configs import default
from train import data, interrupt
from train.devices.mesh import make_mesh
from train.errors import SavedAndStopped, WorkdirError
from train.loop import Watch, train_and_evaluate
from train.run import lock, metrics, workdir
from train.run.checkpoint import Checkpoints, load_trained_model
from train.state import abstract_state, make_init


def contents(folder: Path) -> dict[Path, bytes]:
  return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# One owner ----------------------------------------------------------------------------------------

_HOLD = """
import sys, time
from etils import epath
from train.run import lock
with lock.owned(epath.Path(sys.argv[1])):
  print("owned", flush=True)
  time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
  """A process that owns tmp_path / "run"."""
  command = [sys.executable, "-c", _HOLD, str(tmp_path / "run")]
  process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "owned\n"
  yield process
  process.kill()
  process.communicate()


def test_a_second_start_is_refused_at_once_and_names_the_first(owner, tmp_path):
  process = start(tmp_path / "run")
  _, error = process.communicate(timeout=120)
  assert process.returncode == 1
  assert error.count("\n") == 1
  assert f"is in use by process {owner.pid} on {os.uname().nodename} (since 20" in error
  assert owner.poll() is None


def test_the_lock_of_a_dead_process_does_not_block(owner, tmp_path):
  owner.kill()
  owner.wait()
  assert (tmp_path / "run" / lock.NAME).exists()
  with lock.owned(epath.Path(tmp_path / "run")):
    assert json.loads((tmp_path / "run" / lock.NAME).read_text())["process"] == os.getpid()
  assert list((tmp_path / "run").iterdir()) == []
  with lock.owned(epath.Path(tmp_path / "new" / "run")):
    pass
  assert not (tmp_path / "new" / "run").exists()  # it was left empty


def test_a_file_left_by_another_host_does_not_block(tmp_path):
  (tmp_path / lock.NAME).write_text('{"host": "elsewhere", "process": 1, "since": "yesterday"}')
  (tmp_path / "kept").touch()
  with lock.owned(epath.Path(tmp_path)):
    pass
  assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_runs_started_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  began = int(time.mktime((2026, 11, 25, 21, 30, 0, 0, 0, -1)))
  with ThreadPoolExecutor(8) as threads:
    folders = list(threads.map(lambda _: workdir.new("mixer", began), range(8)))
  names = {os.fspath(folder) for folder in folders}
  assert names == {"runs/mixer-20261125-213000"} | {
    f"runs/mixer-20261125-213000-{number}" for number in range(2, 9)
  }


# Nothing of value is overwritten ------------------------------------------------------------------


def only(*names: str):
  """Keeps these of a finished run's results, beside config.json and dataset.json."""

  def strip(folder: Path) -> None:
    results = ("summary.json", "metrics.jsonl", "checkpoints/last", "checkpoints/best")
    for name in set(results) - set(names):
      path = folder / name
      shutil.rmtree(path) if path.is_dir() else path.unlink()

  return strip


LEFT = [
  ("summary.json", "metrics.jsonl", "checkpoints/best"),
  ("metrics.jsonl", "checkpoints/best"),
  ("metrics.jsonl",),
  ("checkpoints/best",),
  ("checkpoints/last",),
  ("summary.json",),
]


@pytest.mark.parametrize("left", LEFT, ids="+".join)
def test_results_are_not_overwritten_by_another_config(left, finished_run, smoke_config, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(finished_run, folder)
  only(*left)(folder)
  before = contents(folder)
  with pytest.raises(WorkdirError, match="holds a run with another config") as error:
    train_and_evaluate(smoke_config(epochs=3, seed=1), folder)
  assert "seed: 0 there, 1 here" in str(error.value)
  assert contents(folder) == before


@pytest.mark.parametrize("left", LEFT[1:4], ids="+".join)
def test_results_whose_state_was_removed_are_not_overwritten(
  left, finished_run, smoke_config, tmp_path
):
  folder = tmp_path / "run"
  shutil.copytree(finished_run, folder)
  only(*left)(folder)
  before = contents(folder)
  with pytest.raises(WorkdirError, match="but no checkpoints/last to go on from"):
    train_and_evaluate(smoke_config(epochs=3), folder)
  assert contents(folder) == before


def test_a_finished_run_needs_no_state(finished_run, smoke_config, tmp_path, capsys):
  folder = tmp_path / "run"
  shutil.copytree(finished_run, folder)
  shutil.rmtree(folder / "checkpoints" / "last")
  summary = train_and_evaluate(smoke_config(epochs=3), folder)
  assert summary == metrics.read_summary(finished_run)
  assert "holds a finished run" in capsys.readouterr().out


def test_a_workdir_whose_config_is_damaged_is_refused(finished_run, smoke_config, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(finished_run, folder)
  for content in ("", "{", "[]"):
    (folder / "config.json").write_text(content)
    with pytest.raises(WorkdirError, match="config.json is damaged"):
      train_and_evaluate(smoke_config(epochs=3), folder)


@pytest.mark.slow
def test_a_damaged_summary_is_made_anew(finished_run, smoke_config, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(finished_run, folder)
  expected = metrics.read_summary(finished_run)
  nulled = json.dumps(expected | {"epochs": None})
  for content in ("", "[]", nulled):
    (folder / "summary.json").write_text(content)
    assert load_trained_model(folder, make_mesh()).weights.mean.shape == (3,)
    assert train_and_evaluate(smoke_config(epochs=3), folder) == expected
    assert metrics.read_summary(folder) == expected


@pytest.mark.slow
def test_a_run_killed_at_the_end_of_its_first_epoch_begins_again(
  finished_run, smoke_config, tmp_path
):
  config = smoke_config(epochs=3)
  train_and_evaluate(smoke_config(epochs=1), tmp_path)
  (tmp_path / "summary.json").unlink()
  shutil.rmtree(tmp_path / "checkpoints" / "last" / "9")  # as if killed while it was saved
  assert (tmp_path / "checkpoints" / "best" / "1").exists()
  train_and_evaluate(config, tmp_path)
  assert numbers(tmp_path) == numbers(finished_run)


def test_a_refused_command_changes_nothing(finished_run, smoke_config, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(finished_run, folder)
  shutil.rmtree(folder / "checkpoints" / "last")
  before = contents(folder)
  with pytest.raises(WorkdirError, match="no checkpoints/last to go on from"):
    train_and_evaluate(smoke_config(epochs=9), folder)
  assert contents(folder) == before


@pytest.mark.parametrize(
  "line", ["{", "\x00\x00", "7", '{"epoch": null}', '{"epoch": 2, "step": 16}']
)
def test_damaged_metrics_are_one_line(line, finished_run, smoke_config, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(finished_run, folder)
  (folder / "summary.json").unlink()
  rows = (folder / "metrics.jsonl").read_text().splitlines()
  (folder / "metrics.jsonl").write_text("\n".join([rows[0], line, *rows[2:], ""]))
  before = contents(folder)
  with pytest.raises(WorkdirError, match="line 2 of .*metrics.jsonl is damaged: move") as error:
    train_and_evaluate(smoke_config(epochs=3), folder)
  assert "\n" not in str(error.value)
  assert contents(folder) == before


# More epochs, odd paths ---------------------------------------------------------------------------


def final_state(folder: Path, config) -> dict[str, np.ndarray]:
  """The arrays of the last checkpoint, by path."""
  mesh, info = make_mesh(), data.describe(config.data)
  template = abstract_state(make_init(config, info, mesh), info)
  with Checkpoints(folder, read_only=True) as checkpoints:
    state = checkpoints.restore_last(template)
  leaves, _ = jax.tree.flatten_with_path(state)
  return {jax.tree_util.keystr(path): np.asarray(array) for path, array in leaves}


def test_more_epochs_go_on_and_equal_as_many_at_once(finished_run, smoke_config, tmp_path):
  for epochs in (1, 2, 3):
    summary = train_and_evaluate(smoke_config(epochs=epochs), tmp_path)
    assert summary["epochs"] == epochs
  assert numbers(tmp_path) == numbers(finished_run)
  expected = metrics.read_summary(finished_run) | {"seconds": summary["seconds"]}
  assert summary == metrics.read_summary(tmp_path) == expected
  config = smoke_config(epochs=3)
  state, at_once = final_state(tmp_path, config), final_state(finished_run, config)
  assert state.keys() == at_once.keys()
  assert all(np.array_equal(state[key], at_once[key]) for key in state)
  with pytest.raises(WorkdirError, match="has trained 3 epochs: config.epochs = 2 is less"):
    train_and_evaluate(smoke_config(epochs=2), tmp_path)


NAMES = ["a[b]*?{c} d", "é ü 汉字", "back\\slash~%#", os.fsdecode(b"\xff")]


@pytest.mark.parametrize(
  "name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]
)
def test_a_workdir_may_have_any_name(name, smoke_config, tmp_path):
  folder = tmp_path / name / "run [1]"
  train_and_evaluate(smoke_config(epochs=1), folder)
  train_and_evaluate(smoke_config(epochs=2), folder)
  assert [row["epoch"] for row in metrics.read(folder)] == [1, 2]
  assert load_trained_model(epath.Path(folder), make_mesh()).weights.mean.shape == (3,)
  with pytest.raises(WorkdirError, match="another config"):
    train_and_evaluate(smoke_config(epochs=2, seed=3), folder)


def test_a_tilde_that_the_shell_has_left_is_the_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert workdir.from_flag("~/run [1]") == epath.Path(tmp_path / "run [1]")
  assert workdir.from_flag("runs/~x") == epath.Path("runs/~x")


# Signals ------------------------------------------------------------------------------------------

_COMPILE = """
import os, signal, sys, threading, time
import jax, jax.numpy as jnp
from train import interrupt

def chain(x):  # takes XLA a minute
  for _ in range(int(sys.argv[1])):
    x = jnp.sort(x @ x + jnp.sin(x))
  return x

context = interrupt.StopRequest() if sys.argv[2] == "recorded" else interrupt.interruptible()
with context:
  lowered = jax.jit(chain).lower(jnp.ones((8, 8)))
  print("compiling", flush=True)
  lowered.compile()
  print("compiled", flush=True)
"""


@pytest.mark.parametrize("how", ["recorded", "raised"])
def test_a_second_ctrl_c_ends_at_once_while_xla_compiles(how):
  command = [sys.executable, "-c", _COMPILE, "3000", how]
  process = subprocess.Popen(
    command,
    cwd=REPOSITORY,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_COMPILATION_CACHE_DIR": ""},
  )
  assert process.stdout.readline() == "compiling\n"
  time.sleep(1)
  process.send_signal(signal.SIGINT)
  time.sleep(0.5)
  if how == "recorded":
    assert process.poll() is None
  sent = time.monotonic()
  process.send_signal(signal.SIGINT)
  output, error = process.communicate(timeout=200)
  assert time.monotonic() - sent < 30  # compiling takes longer
  assert process.returncode == 130
  assert "compiled" not in output
  assert "Traceback" not in error
  last = error.splitlines()[-1]
  if how == "recorded" or last != "error: stopped by SIGINT":  # heard where Python had its turn
    assert last == "error: stopped at once by a second Ctrl-C; nothing more is saved"


@pytest.mark.parametrize("command", ["main", "evaluate", "predict", "data", "bench"])
def test_ctrl_c_while_libraries_are_imported_is_silent(command):
  process = run(sys.executable, "-X", "importtime", "-m", f"train.{command}", "--help")
  for line in process.stderr:  # a line for each import
    if "| train" in line or "numpy" in line:
      break
  process.send_signal(signal.SIGINT)
  _, error = process.communicate(timeout=200)
  assert process.returncode == -signal.SIGINT
  assert "Traceback" not in error and "KeyboardInterrupt" not in error


@pytest.mark.parametrize("signum", interrupt.SIGNALS)
def test_each_signal_saves_the_state_and_stops(signum, monkeypatch):
  class Spy:
    seconds_since_last, saved = 0.0, []

    def save_last(self, state, wait):
      self.saved.append((state, wait))

  config = default.get_config()
  stop = interrupt.StopRequest()
  watch = Watch(stop, Spy(), config, make_mesh())
  with signals_are_heard(), stop:
    watch("state 0")
    os.kill(os.getpid(), signum)
    deadline = time.monotonic() + 10
    while not stop.signum:
      assert time.monotonic() < deadline
    with pytest.raises(SavedAndStopped) as stopped:
      watch("state 1")
  assert stopped.value.exit_status == 128 + signum
  assert Spy.saved[-1] == ("state 1", True)


@pytest.mark.slow
def test_a_run_whose_terminal_closes_is_saved(shapes100, tmp_path):
  ours, theirs = pty.openpty()
  with signals_are_heard():
    process = subprocess.Popen(
      [*COMMAND, "--config.epochs=200", "--workdir", str(tmp_path / "run")],
      cwd=REPOSITORY,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
      stdin=theirs,
      stdout=theirs,
      stderr=theirs,
      start_new_session=True,
      preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
  os.close(theirs)
  shown = b""
  while b"epoch 1/200" not in shown:
    shown += os.read(ours, 4096)
  os.close(ours)
  assert process.wait(timeout=200) == 128 + signal.SIGHUP
  assert max(int(p.name) for p in (tmp_path / "run" / "checkpoints" / "last").iterdir()) > 0
