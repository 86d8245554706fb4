"""What a run writes to its workdir and shows on the terminal."""

import contextlib
import json
import math
import os
import pathlib
import pty
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from train.run import curves, metrics
from train.run.progress import Progress

ROOT = pathlib.Path(__file__).parents[1]


def _row(epoch, **overrides):
  row = dict(
    epoch=epoch,
    step=100 * epoch,
    train_loss=4.0 - 0.1 * epoch,
    train_accuracy=0.1 + 0.01 * epoch,
    train_top5=0.3 + 0.01 * epoch,
    val_loss=3.9 - 0.1 * epoch,
    val_accuracy=0.11 + 0.01 * epoch,
    val_top5=0.31 + 0.01 * epoch,
    learning_rate=5e-3 if epoch < 3 else 2.5e-3,
    images_per_second=912.3,
    seconds=51.2,
  )
  return row | overrides


SUMMARY = dict(
  test_loss=2.0,
  test_accuracy=0.5,
  test_top5=0.8,
  best_epoch=3,
  epochs=5,
  parameters=242_788,
  stopped_early=False,
  seconds=300.0,
)


def _write(workdir, epochs, resume_epoch=0):
  with metrics.Writer(workdir, resume_epoch, "mixer on cifar100") as writer:
    for epoch in epochs:
      writer.epoch(_row(epoch))


def _lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _events(workdir):
  for path in sorted((workdir / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      yield Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]


def _scalars(workdir):
  return [
    (value.tag, event.step, value.simple_value)
    for event in _events(workdir)
    for value in event.summary.value
  ]


def test_metrics_jsonl_has_a_line_an_epoch_with_exactly_the_agreed_keys(tmp_path):
  _write(tmp_path, [1, 2])
  lines = _lines(tmp_path)
  assert lines == [_row(1), _row(2)]
  agreed = "epoch step train_loss train_accuracy train_top5 val_loss val_accuracy val_top5"
  agreed += " learning_rate images_per_second seconds"
  assert list(lines[0]) == agreed.split()


def test_a_line_is_on_disk_before_the_next_epoch(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    writer.epoch(_row(1))
    assert metrics.read(tmp_path) == [_row(1)]
    assert (tmp_path / "curves.png").exists()


def test_arrays_become_numbers_and_what_is_not_finite_null(tmp_path):
  row = _row(
    1,
    step=jnp.int32(100),
    train_loss=jnp.float32(math.nan),
    val_loss=math.inf,
    val_top5=np.float32(0.5),
  )
  with metrics.Writer(tmp_path) as writer:
    writer.epoch(row)
  (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
  read = json.loads(line, parse_constant=pytest.fail)
  assert read["train_loss"] is None and read["val_loss"] is None
  assert read["step"] == 100 and isinstance(read["step"], int)
  assert read["val_top5"] == 0.5


def test_missing_and_unknown_keys_are_named(tmp_path):
  row = _row(1, val_los=1.0)
  del row["val_loss"]
  with metrics.Writer(tmp_path) as writer:
    with pytest.raises(
      ValueError, match=r"missing keys \['val_loss'\], unknown keys \['val_los'\]"
    ):
      writer.epoch(row)
    with pytest.raises(ValueError, match="best_epoch"):
      writer.summary({key: SUMMARY[key] for key in SUMMARY if key != "best_epoch"})


def test_resume_drops_epochs_that_the_checkpoint_does_not_hold(tmp_path):
  _write(tmp_path, [1, 2, 3])
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"epoch": 4, "step": 4')  # killed while it wrote
  _write(tmp_path, [3, 4], resume_epoch=2)
  assert _lines(tmp_path) == [_row(epoch) for epoch in (1, 2, 3, 4)]
  purged_from = [event.session_log for event in _events(tmp_path) if event.HasField("session_log")]
  assert len(purged_from) == 2
  steps = [event.step for event in _events(tmp_path) if event.HasField("session_log")]
  assert steps == [0, 201]


def test_a_new_run_in_an_old_workdir_starts_an_empty_file(tmp_path):
  _write(tmp_path, [1, 2])
  with metrics.Writer(tmp_path):
    assert _lines(tmp_path) == []


def test_summary_is_whole_or_absent(tmp_path, monkeypatch):
  with metrics.Writer(tmp_path) as writer:
    with monkeypatch.context() as patch:
      patch.setattr(os, "replace", lambda *_: pytest.fail())
      with pytest.raises(pytest.fail.Exception):
        writer.summary(SUMMARY)
    assert not (tmp_path / "summary.json").exists()
    writer.summary(SUMMARY | {"test_loss": math.nan})
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary == SUMMARY | {"test_loss": None}


def test_tensorboard_holds_every_number_of_every_epoch(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    writer.epoch(_row(1))
    writer.epoch(_row(2, val_loss=math.nan))
    writer.summary(SUMMARY)
  scalars = {(tag, step): value for tag, step, value in _scalars(tmp_path)}
  names = ["loss", "accuracy", "top5"]
  tags = {f"{split}/{name}" for split in ("train", "val", "test") for name in names}
  assert {tag for tag, _ in scalars} == tags | {"learning_rate", "images_per_second", "seconds"}
  assert scalars["val/top5", 100] == pytest.approx(_row(1)["val_top5"])
  assert scalars["train/loss", 200] == pytest.approx(_row(2)["train_loss"])
  assert scalars["test/accuracy", 200] == pytest.approx(0.5)
  assert ("val/loss", 200) not in scalars


@pytest.mark.parametrize("epochs", [1, 100])
def test_curves_are_drawn(tmp_path, epochs):
  rows = [_row(epoch) for epoch in range(1, epochs + 1)]
  rows[-1]["train_loss"] = None  # as read from a diverged run
  curves.draw_curves(rows, tmp_path / "curves.png", "mixer on cifar100")
  with Image.open(tmp_path / "curves.png") as image:
    assert image.size == (1440, 456)
    assert len(image.getcolors(1 << 20)) > 50
  assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_curves_of_a_run_that_breaks_off_show_its_last_epoch(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(metrics, "draw_curves", lambda rows, *_: drawn.append(len(rows)))
  with pytest.raises(KeyboardInterrupt):
    with metrics.Writer(tmp_path) as writer:
      for epoch in (1, 2, 3):
        writer.epoch(_row(epoch))
      raise KeyboardInterrupt
  assert drawn == [1, 3]  # the first at once, the others at the end


def test_only_the_first_process_writes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with metrics.Writer(tmp_path / "run") as writer:
    writer.epoch(_row(1))
    writer.summary(SUMMARY)
  monkeypatch.setattr("train.run.progress._SECONDS_BETWEEN_LINES", 0.0)
  with Progress(10, 0, 128) as progress:
    progress.update()
    progress.write("hello")
  assert not (tmp_path / "run").exists()
  assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("epoch, epochs", [(3, 50), (100, 100)])
def test_epoch_lines_show_percent_and_fit_80_columns(epoch, epochs):
  numbers = dict(train_loss=10.1234, val_top5=1.0, val_accuracy=0.241, images_per_second=123456.7)
  train, val = metrics.format_epoch(_row(epoch, **numbers), epochs).split("\n")
  assert train.startswith(f"epoch {epoch:>{len(str(epochs))}}/{epochs}  train loss 10.123")
  assert train.endswith("lr 2.5e-03")
  assert "val   loss" in val and "top-1 24.1 %" in val and "top-5 100.0 %" in val
  assert val.endswith("123457 images/s")
  assert max(len(train), len(val)) <= 80


_RUN = """
import time
from train.run import progress
progress._SECONDS_BETWEEN_LINES = 0.2
with progress.Progress(20, 10, 128, "epoch 2/2") as progress:
  for _ in range(10):
    time.sleep(0.1)
    progress.update()
  progress.write("the epoch's numbers")
"""


def test_without_a_terminal_progress_is_plain_lines():
  run = subprocess.run(
    [sys.executable, "-c", _RUN], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert run.stdout == "the epoch's numbers\n"
  lines = run.stderr.splitlines()
  assert 2 <= len(lines) <= 5
  assert "\r" not in run.stderr and "\x1b" not in run.stderr
  for line in lines:
    assert line.startswith("epoch 2/2  step ")
    assert 500 < float(line.split()[4]) < 1300  # images/s; 1,280 on an idle machine
    assert line.endswith("left")
    assert len(line) <= 80


def test_on_a_terminal_progress_is_a_bar_of_at_most_80_columns():
  ours, theirs = pty.openpty()
  run = subprocess.Popen(
    [sys.executable, "-c", _RUN], cwd=ROOT, stdout=theirs, stderr=theirs, close_fds=True
  )
  os.close(theirs)
  shown = b""
  with contextlib.suppress(OSError):  # Linux raises it once the other side has closed
    while chunk := os.read(ours, 4096):
      shown += chunk
  os.close(ours)
  assert run.wait() == 0
  shown = shown.decode()
  frames = shown.replace("\n", "\r").split("\r")
  bars = [frame for frame in frames if "epoch 2/2" in frame]
  assert any("images/s" in bar and bar.rstrip().endswith("left") for bar in bars)
  assert " 50 % |" in bars[0]  # the steps of an earlier run count
  assert max(map(len, frames)) <= 80
  assert "\rthe epoch's numbers\r\n" in shown
