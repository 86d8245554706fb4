"""Whole runs: what they write, how they stop, and that they resume unharmed."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from needs import CIFAR100_DIR
from PIL import Image
from runs import CLOCK, COMMAND, REPOSITORY, numbers, saved_step, start

from train import data
from train.errors import TrainingFailed, WorkdirError
from train.loop import train_and_evaluate
from train.run import metrics


def summary(folder: Path) -> dict:
  return {k: v for k, v in metrics.read_summary(folder).items() if k not in CLOCK}


def test_run_leaves_what_the_readme_promises(finished_run):
  rows = metrics.read(finished_run)
  assert [row["epoch"] for row in rows] == [1, 2, 3]
  assert [row["step"] for row in rows] == [8, 16, 24]
  assert all(tuple(row) == metrics.EPOCH_KEYS for row in rows)
  assert all(0 <= row["val_accuracy"] <= row["val_top5"] <= 1 for row in rows)
  result = metrics.read_summary(finished_run)
  assert tuple(result) == metrics.SUMMARY_KEYS
  assert (result["epochs"], result["stopped_early"], result["parameters"]) == (3, False, 12836)
  best = min(rows, key=lambda row: row["val_loss"])
  assert result["best_epoch"] == best["epoch"]
  assert json.loads((finished_run / "config.json").read_text())["optimizer"]["epsilon"] == 1e-7
  assert list((finished_run / "tensorboard").glob("events.*"))
  assert Image.open(finished_run / "curves.png").width > 1000
  assert {path.name for path in (finished_run / "checkpoints" / "last").iterdir()} == {"18", "27"}
  assert str(best["epoch"]) in {p.name for p in (finished_run / "checkpoints" / "best").iterdir()}


def test_finished_run_is_not_run_again(smoke_config, finished_run, capsys):
  before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
  again = train_and_evaluate(smoke_config(epochs=3), finished_run)
  assert again == metrics.read_summary(finished_run)
  assert "holds a finished run" in capsys.readouterr().out
  assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_workdir_of_another_config_is_refused_with_the_differences(smoke_config, finished_run):
  with pytest.raises(WorkdirError) as error:
    train_and_evaluate(smoke_config(epochs=4, optimizer__learning_rate=0.1), finished_run)
  assert "epochs: 3 there, 4 here" in str(error.value)
  assert "optimizer.learning_rate: 0.005 there, 0.1 here" in str(error.value)
  assert str(error.value).count("\n") == 2


@pytest.mark.slow
def test_workdir_that_has_saved_nothing_takes_another_config(smoke_config, tmp_path):
  with pytest.raises(TrainingFailed):
    train_and_evaluate(smoke_config(optimizer__learning_rate=1e30), tmp_path)
  result = train_and_evaluate(smoke_config(epochs=1), tmp_path)
  assert result["epochs"] == 1
  assert [row["epoch"] for row in metrics.read(tmp_path)] == [1]


def test_folder_that_holds_something_else_is_refused(smoke_config, tmp_path):
  (tmp_path / "thesis.tex").write_text("draft")
  with pytest.raises(WorkdirError, match="holds files but no config.json"):
    train_and_evaluate(smoke_config(), tmp_path)
  assert (tmp_path / "thesis.tex").read_text() == "draft"


@pytest.mark.needs(what="cifar100")
def test_loss_falls_on_real_images(smoke_config, tmp_path):
  config = smoke_config(epochs=8, optimizer__learning_rate=3e-3)
  config.data.name, config.data.data_dir = "cifar100", str(CIFAR100_DIR)
  train_and_evaluate(config, tmp_path)
  rows = metrics.read(tmp_path)
  assert rows[0]["train_loss"] > 4.5
  assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 0.5
  assert rows[-1]["train_top5"] > 0.2


def test_early_stop_restores_the_best_epoch(smoke_config, tmp_path):
  # At this rate no weight changes, so every epoch after the first ties with it.
  config = smoke_config(
    epochs=9, optimizer__learning_rate=1e-20, early_stop_patience=2, plateau__patience=1
  )
  result = train_and_evaluate(config, tmp_path)
  assert (result["stopped_early"], result["epochs"], result["best_epoch"]) == (True, 3, 1)
  rates = [row["learning_rate"] for row in metrics.read(tmp_path)]
  np.testing.assert_allclose(rates, [1e-20, 1e-20, 0.5e-20])


@pytest.mark.parametrize("steps_per_call", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_divergence_ends_the_run_with_advice(smoke_config, tmp_path, steps_per_call):
  config = smoke_config(
    optimizer__learning_rate=1e30, best_metric="val_accuracy", steps_per_call=steps_per_call
  )
  with pytest.raises(TrainingFailed, match="smaller --config.optimizer.learning_rate"):
    train_and_evaluate(config, tmp_path)
  assert metrics.read_summary(tmp_path) is None


# Real processes and signals from here on. 40 steps per epoch, a checkpoint every few steps.


def wait_until_in_mid_epoch(process: subprocess.Popen, folder: Path, first_step: int) -> None:
  deadline = time.monotonic() + 120
  while not first_step < saved_step(folder) % 40 < 30:
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.005)


@pytest.mark.parametrize(
  "signum",
  [
    signal.SIGTERM,
    pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
  ],
)
def test_resumed_run_equals_uninterrupted_run(uninterrupted, tmp_path, signum):
  folder = tmp_path / "run"
  process = start(folder)
  wait_until_in_mid_epoch(process, folder, first_step=2)
  process.send_signal(signum)
  _, error = process.communicate(timeout=200)
  if signum == signal.SIGKILL:
    assert process.returncode == -signum
  else:
    assert process.returncode == 128 + signum
    assert "stopping at the next step" in error
    assert "the same command with --workdir" in error.splitlines()[-1]
    assert error.count("\n") == 3
  assert metrics.read_summary(folder) is None
  stopped_at = saved_step(folder)
  assert stopped_at % 40 != 0

  process = start(folder)
  output, error = process.communicate(timeout=200)
  assert process.returncode == 0, error
  assert f"step {stopped_at}." in output
  assert numbers(folder) == numbers(uninterrupted)
  assert summary(folder) == summary(uninterrupted)


@pytest.mark.slow
def test_run_goes_on_on_other_devices(uninterrupted, tmp_path, monkeypatch):
  folder = tmp_path / "run"
  process = start(folder)
  wait_until_in_mid_epoch(process, folder, first_step=2)
  process.terminate()
  process.communicate(timeout=200)
  process = start(folder, "--config.microbatch=4", devices=4)
  _, error = process.communicate(timeout=200)
  assert process.returncode == 0, error
  for row, expected in zip(numbers(folder), numbers(uninterrupted), strict=True):
    assert row["step"] == expected["step"]
    np.testing.assert_allclose(row["train_loss"], expected["train_loss"], rtol=2e-3)
    np.testing.assert_allclose(row["val_loss"], expected["val_loss"], rtol=2e-3)


@pytest.mark.slow
def test_several_steps_a_call_change_nothing_but_rounding(uninterrupted, tmp_path):
  folder = tmp_path / "run"
  process = start(folder, "--config.steps_per_call=3")  # 40 = 13 * 3 + 1
  wait_until_in_mid_epoch(process, folder, first_step=2)
  process.terminate()
  process.communicate(timeout=200)
  assert saved_step(folder) % 40 % 3 == 0
  process = start(folder, "--config.steps_per_call=3")
  _, error = process.communicate(timeout=200)
  assert process.returncode == 0, error
  for row, expected in zip(numbers(folder), numbers(uninterrupted), strict=True):
    assert row["step"] == expected["step"]
    np.testing.assert_allclose(row["train_loss"], expected["train_loss"], rtol=2e-3)


@pytest.mark.slow
def test_signal_during_compilation_or_validation_is_obeyed_at_once(uninterrupted, tmp_path):
  # Validation of 5,000 images takes longer than the 40 steps before it.
  folder = tmp_path / "run"
  process = start(folder)
  while not list(folder.glob("checkpoints/last")):  # created right before reading and compiling
    assert process.poll() is None, process.communicate()
    time.sleep(0.005)
  process.terminate()
  process.communicate(timeout=200)
  assert process.returncode == 128 + signal.SIGTERM
  assert saved_step(folder) == 0

  process = start(folder)
  while saved_step(folder) != 40:
    assert process.poll() is None, process.communicate()
    time.sleep(0.001)
  process.terminate()
  process.communicate(timeout=200)
  process = start(folder)
  _, error = process.communicate(timeout=200)
  assert process.returncode == 0, error
  assert numbers(folder) == numbers(uninterrupted)
  assert all(row["images_per_second"] >= 0 for row in metrics.read(folder))


@pytest.mark.slow
def test_unfinished_epoch_beyond_the_checkpoint_is_run_again(uninterrupted, tmp_path):
  # As if killed after writing the epoch's row, but before completing its checkpoint.
  folder = tmp_path / "run"
  process = start(folder)
  wait_until_in_mid_epoch(process, folder, first_step=2)
  process.kill()
  process.communicate()
  shutil.copy(uninterrupted / "metrics.jsonl", folder)
  process = start(folder)
  _, error = process.communicate(timeout=200)
  assert process.returncode == 0, error
  assert numbers(folder) == numbers(uninterrupted)


def test_out_of_memory_names_three_knobs(shapes100, tmp_path):
  sizes = ("--config.model.image_size=512", "--config.model.patch_size=64")
  batch = ("--config.batch_size=4096", "--config.microbatch=2048")
  limit = ("bash", "-c", 'ulimit -v 8388608; exec "$@"', "bash")  # 8 GiB
  process = start(tmp_path / "run", *sizes, *batch, command=(*limit, *COMMAND))
  output, error = process.communicate(timeout=200)
  assert process.returncode == 1
  assert "MiB on each device" in output
  assert error.startswith("error: out of memory")
  assert all(f"--config.{knob}" in error for knob in ("microbatch", "batch_size", "model.KEY"))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["mixer.py", "vit.py:small"])
def test_bfloat16_learns_what_float32_learns(config, tmp_path):
  # The run memorises its images: half-way there, seeds would differ more than dtypes do.
  flags = {"batch_size": 50, "epochs": 15, "optimizer.learning_rate": 5e-4}
  flags |= {"augment.flip": False, "augment.zoom": 0.0, "augment.rotation": 0.0}
  flags |= {"data.name": "shapes100", "data.data_dir": tmp_path / "data"}
  flags |= {f"data.{split}_split": "train[:500]" for split in data.SPLITS}
  flags |= {"model.dropout_rate": 0.0}
  if config.startswith("vit"):
    flags |= {"model.attention_dropout_rate": 0.0, "model.head_dropout_rate": 0.0}
  accuracies = []
  for flags["dtype"] in ("float32", "bfloat16"):
    folder = tmp_path / flags["dtype"]
    command = [sys.executable, "-m", "train.main", "--config", f"configs/{config}"]
    command += ["--workdir", folder, *(f"--config.{key}={value}" for key, value in flags.items())]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    accuracies.append(metrics.read_summary(folder)["test_accuracy"])
  assert min(accuracies) > 0.95
  assert abs(accuracies[0] - accuracies[1]) < 0.015
