"""The metrics that a run writes while it trains.

In the workdir: `metrics.jsonl` (a line per epoch), `summary.json` (once, at the end), `curves.png`
and TensorBoard events in `tensorboard/`. On the terminal: two lines per epoch.
Only the first of several processes writes; the same calls do nothing in the others.
Epochs count from 1.
"""

import contextlib
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
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from train.errors import WorkdirError
from train.run.curves import draw_curves
from train.run.storage import is_local, last_writes, retry, write_atomically

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
    self._events = _Events(self._workdir / "tensorboard", resume_epoch, last_step + 1)
    self._drawn_at = -math.inf
    self._drawn_rows = 0

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if self._active:
      with last_writes(error), contextlib.closing(self._events):
        self._draw()

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
    self._events.add({key: row[key] for key in EPOCH_KEYS[2:]}, row["step"])
    if time.monotonic() - self._drawn_at > _SECONDS_BETWEEN_CURVES:
      self._draw()

  def summary(self, summary: Mapping[str, Any]) -> None:
    """Writes the run's result.

    Args:
      summary: SUMMARY_KEYS -> number or bool. Also `test_split`, if there are no test images: the
        split that the `test_` numbers are of.
    Raises:
      ValueError: a key is missing or unknown.
    """
    keys = (*SUMMARY_KEYS, *({"test_split"} & set(summary)))
    summary = _to_json(summary, keys)
    if not self._active:
      return
    write_atomically(self._workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    step = self._rows[-1]["step"] if self._rows else 0
    tests = ("test_loss", "test_accuracy", "test_top5")
    self._events.add({key: summary[key] for key in tests}, step)

  def _write_rows(self) -> None:
    write_atomically(self._metrics, "".join(json.dumps(row) + "\n" for row in self._rows))

  def _draw(self) -> None:
    if len(self._rows) > self._drawn_rows:
      draw_curves(self._rows, self._workdir / "curves.png", self._title)
      self._drawn_at, self._drawn_rows = time.monotonic(), len(self._rows)


class _Events:
  """TensorBoard's events in a folder, written at once; their errors are the caller's.

  tensorboardX's SummaryWriter writes in a thread, which a full disk ends with a traceback.
  """

  def __init__(self, folder: epath.Path, resume_epoch: int, first_step: int):
    """first_step: TensorBoard hides an interrupted run's events from there on."""
    folder.mkdir(parents=True, exist_ok=True)
    self._folder = folder
    # A bucket's objects can't be appended to: the file is copied there whole.
    self._scratch = None if is_local(folder) else tempfile.TemporaryDirectory()
    place = self._scratch.name if self._scratch else os.fspath(folder)
    # With the process, since two of the same second would have one name.
    suffix = f".from_epoch_{resume_epoch}.{os.getpid()}"
    self._writer = EventsWriter(os.path.join(place, "events"), suffix)
    start = SessionLog(status=SessionLog.START)
    self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))
    self._flush()

  def add(self, numbers: Mapping[str, float | None], step: int) -> None:
    """Appends numbers of a step by EPOCH_KEYS or SUMMARY_KEYS; None is left out."""
    for key, value in numbers.items():
      split, _, name = key.partition("_")
      tag = f"{split}/{name}" if split in ("train", "val", "test") else key
      if value is not None:
        summary = scalar(tag, value)
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
    self._flush()

  def close(self) -> None:
    self._writer.close()
    if self._scratch:
      self._scratch.cleanup()

  def _flush(self) -> None:
    retry(self._writer.flush, self._folder)
    if self._scratch:
      for path in epath.Path(self._scratch.name).iterdir():
        write_atomically(self._folder / path.name, path.read_bytes())


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The epochs in a workdir's metrics.jsonl, in order; [] without the file.

  A last line that a kill has cut off is left out.

  Raises:
    WorkdirError: another line is damaged.
  """
  path = epath.Path(workdir) / "metrics.jsonl"
  if not path.exists():
    return []
  rows = []
  # Only a line that ends in a newline is complete.
  for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
    try:
      row = json.loads(line)
      numbers = [row[key] for key in EPOCH_KEYS]
      if not all(x is None or isinstance(x, int | float) for x in numbers):
        raise ValueError("no number")
      rows.append({**row, "epoch": int(row["epoch"]), "step": int(row["step"])})
    except (ValueError, TypeError, KeyError):
      raise WorkdirError(
        f"line {number} of {path} is damaged: move the file away to go on without the epochs in it"
      ) from None
  return rows


def read_summary(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """The content of a finished run's summary.json; None if the run is not finished.

  A damaged file is as good as none: the run tests its best weights again, and writes it anew.
  """
  path = epath.Path(workdir) / "summary.json"
  if not path.exists():
    return None
  try:
    summary = json.loads(path.read_bytes())
    numbers = [summary[key] for key in SUMMARY_KEYS]
    is_whole = isinstance(summary["best_epoch"], int) and isinstance(summary["epochs"], int)
    is_whole &= all(x is None or isinstance(x, int | float) for x in numbers)
    return summary if is_whole else None
  except (ValueError, TypeError, KeyError):
    return None


def format_epoch(row: Mapping[str, Any], epochs: int) -> str:
  """Two lines of at most 80 columns for the terminal; `row` as in `Writer.epoch`."""
  head = f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}"

  def numbers(split: str) -> str:
    top1, top5 = 100 * row[f"{split}_accuracy"], 100 * row[f"{split}_top5"]
    return (
      f"{split:5} loss {_number(row[f'{split}_loss'])}  top-1 {top1:4.1f} %  top-5 {top5:4.1f} %"
    )

  speed = f"{row['images_per_second']:.0f} images/s"
  return (
    f"{head}  {numbers('train')}  lr {row['learning_rate']:.1e}\n"
    f"{' ' * len(head)}  {numbers('val')}  {speed}"
  )


def is_finished(summary: Mapping[str, Any] | None, epochs: int) -> bool:
  """Whether a run with this summary, or without one, has nothing to do for so many epochs."""
  return summary is not None and (summary["stopped_early"] or summary["epochs"] >= epochs)


def format_summary(summary: Mapping[str, Any], workdir: str | os.PathLike) -> str:
  """Three lines for the terminal: the test metrics, and the paths of the rest."""
  top1, top5 = 100 * summary["test_accuracy"], 100 * summary["test_top5"]
  instead = summary.get("test_split")
  return (
    f"test     loss {_number(summary['test_loss'])}  top-1 {top1:.2f} %  top-5 {top5:.2f} %"
    f"  (best epoch: {summary['best_epoch']})\n"
    + (f"         on {instead}, the validation images: there is no test split\n" if instead else "")
    + f"curves   {os.path.join(workdir, 'curves.png')}\n"
    f"numbers  {os.path.join(workdir, 'metrics.jsonl')}, summary.json, tensorboard/"
  )


def _number(value: float | None) -> str:
  return "nan" if value is None else f"{value:.3f}"  # JSON has no NaN: it was written as null


def number_for_json(value: float) -> float | None:
  """The number as a float; None, null in JSON, for NaN and infinities, which JSON has not."""
  return float(value) if math.isfinite(value) else None


def _to_json(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
  if set(values) != set(keys):
    missing, unknown = sorted(set(keys) - set(values)), sorted(set(values) - set(keys))
    raise ValueError(f"metrics: missing keys {missing}, unknown keys {unknown}")
  items = {key: np.asarray(values[key]).item() for key in keys}
  return {
    key: number_for_json(value) if isinstance(value, float) else value
    for key, value in items.items()
  }
