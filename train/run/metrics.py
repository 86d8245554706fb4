"""The metrics that a run writes while it trains.

In the workdir: `metrics.jsonl` (a line per epoch), `summary.json` (once, at the end), `curves.png`
and TensorBoard events in `tensorboard/`. On the terminal: two lines per epoch.
Only the first of several processes writes; the same calls do nothing in the others.
Epochs count from 1.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from train.run.curves import draw_curves
from train.run.workdir import write_atomically

EPOCH_KEYS = (
  "epoch",
  "step",
  "train_loss",
  "train_accuracy",
  "train_top5",
  "val_loss",
  "val_accuracy",
  "val_top5",
  "learning_rate",
  "images_per_second",
  "seconds",
)
SUMMARY_KEYS = (
  "test_loss",
  "test_accuracy",
  "test_top5",
  "best_epoch",
  "epochs",
  "parameters",
  "stopped_early",
  "seconds",
)
_SECONDS_BETWEEN_CURVES = 30.0  # drawing is too slow for every short epoch


class Writer:
  """Writes a run's numbers to its workdir. Use it as a context manager.

  Rows that an interrupted run wrote after its last checkpoint are removed: these epochs run again.
  """

  def __init__(self, workdir: str | os.PathLike, resume_epoch: int = 0, title: str = ""):
    """
    Args:
      workdir: where to write; created if missing.
      resume_epoch: epochs that the restored checkpoint has completed; 0 for a new run.
      title: title of the curves, such as "mixer on cifar100".
    """
    self._workdir = epath.Path(workdir)
    self._title = title
    self._active = jax.process_index() == 0
    if not self._active:
      return
    self._workdir.mkdir(parents=True, exist_ok=True)
    self._metrics = self._workdir / "metrics.jsonl"
    self._rows = [row for row in read(self._workdir) if row["epoch"] <= resume_epoch]
    self._write_rows()
    last_step = self._rows[-1]["step"] if self._rows else -1
    # TensorBoard's writer appends, which buckets do not support: its files are copied there whole.
    self._scratch = tempfile.TemporaryDirectory()
    self._tensorboard = SummaryWriter(
      self._scratch.name,
      purge_step=last_step + 1,  # TensorBoard hides an interrupted run's events from there on
      filename_suffix=f".from_epoch_{resume_epoch}",
    )
    self._drawn_at = -math.inf
    self._drawn_rows = 0

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *exception) -> None:
    if self._active:
      self._draw()
      self._tensorboard.close()
      self._copy_tensorboard()
      self._scratch.cleanup()

  def epoch(self, row: Mapping[str, Any]) -> None:
    """Appends one epoch.

    Args:
      row: EPOCH_KEYS -> number; accuracies are fractions, `step` counts steps since the beginning
        of the run. `seconds` and `images_per_second` leave out the part of the epoch before a
        resume. A number that is not finite is written as null.
    Raises:
      ValueError: a key is missing or unknown.
    """
    row = _to_json(row, EPOCH_KEYS)
    if not self._active:
      return
    self._rows.append(row)
    self._write_rows()
    for key in EPOCH_KEYS[2:]:
      self._add_scalar(key, row[key], row["step"])
    self._tensorboard.flush()
    self._copy_tensorboard()
    if time.monotonic() - self._drawn_at > _SECONDS_BETWEEN_CURVES:
      self._draw()

  def summary(self, summary: Mapping[str, Any]) -> None:
    """Writes the run's result.

    Args:
      summary: SUMMARY_KEYS -> number or bool.
    Raises:
      ValueError: a key is missing or unknown.
    """
    summary = _to_json(summary, SUMMARY_KEYS)
    if not self._active:
      return
    write_atomically(self._workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    step = self._rows[-1]["step"] if self._rows else 0
    for key in ("test_loss", "test_accuracy", "test_top5"):
      self._add_scalar(key, summary[key], step)

  def _write_rows(self) -> None:
    write_atomically(self._metrics, "".join(json.dumps(row) + "\n" for row in self._rows))

  def _copy_tensorboard(self) -> None:
    folder = self._workdir / "tensorboard"
    folder.mkdir(exist_ok=True)
    for path in epath.Path(self._scratch.name).iterdir():
      write_atomically(folder / path.name, path.read_bytes())

  def _add_scalar(self, key: str, value: float | None, step: int) -> None:
    split, _, name = key.partition("_")
    tag = f"{split}/{name}" if split in ("train", "val", "test") else key
    if value is not None:
      self._tensorboard.add_scalar(tag, value, step)

  def _draw(self) -> None:
    if len(self._rows) > self._drawn_rows:
      draw_curves(self._rows, self._workdir / "curves.png", self._title)
      self._drawn_at, self._drawn_rows = time.monotonic(), len(self._rows)


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The epochs in a workdir's metrics.jsonl, in order; [] without the file.

  A last line that a kill has cut off is left out.
  """
  path = epath.Path(workdir) / "metrics.jsonl"
  if not path.exists():
    return []
  # Only a line that ends in a newline is complete.
  return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def read_summary(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """The content of a finished run's summary.json; None if the run is not finished."""
  path = epath.Path(workdir) / "summary.json"
  return json.loads(path.read_text()) if path.exists() else None


def format_epoch(row: Mapping[str, Any], epochs: int) -> str:
  """Two lines of at most 80 columns for the terminal; `row` as in `Writer.epoch`."""
  head = f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}"

  def numbers(split: str) -> str:
    top1, top5 = 100 * row[f"{split}_accuracy"], 100 * row[f"{split}_top5"]
    return f"{split:5} loss {row[f'{split}_loss']:.3f}  top-1 {top1:4.1f} %  top-5 {top5:4.1f} %"

  speed = f"{row['images_per_second']:.0f} images/s"
  return (
    f"{head}  {numbers('train')}  lr {row['learning_rate']:.1e}\n"
    f"{' ' * len(head)}  {numbers('val')}  {speed}"
  )


def format_summary(summary: Mapping[str, Any], workdir: str | os.PathLike) -> str:
  """Three lines for the terminal: the test metrics, and the paths of the rest."""
  top1, top5 = 100 * summary["test_accuracy"], 100 * summary["test_top5"]
  return (
    f"test     loss {summary['test_loss']:.3f}  top-1 {top1:.2f} %  top-5 {top5:.2f} %"
    f"  (best epoch: {summary['best_epoch']})\n"
    f"curves   {os.path.join(workdir, 'curves.png')}\n"
    f"numbers  {os.path.join(workdir, 'metrics.jsonl')}, summary.json, tensorboard/"
  )


def _to_json(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
  if set(values) != set(keys):
    missing, unknown = sorted(set(keys) - set(values)), sorted(set(values) - set(keys))
    raise ValueError(f"metrics: missing keys {missing}, unknown keys {unknown}")
  items = {key: np.asarray(values[key]).item() for key in keys}
  # JSON has no NaN and no infinity.
  return {
    key: None if isinstance(value, float) and not math.isfinite(value) else value
    for key, value in items.items()
  }
