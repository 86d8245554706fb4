"""A dataset's description and its images, in memory or streamed."""

import contextlib
import dataclasses
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from train.data.complaints import complaints
from train.data.framing import CENTER, Framing
from train.errors import DataError, first_line


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """What is known about a dataset before any image is read."""

  name: str
  class_names: tuple[str, ...]
  image_shape: tuple[int | None, int | None, int]  # H, W, C; None where images differ in size
  sizes: dict[str, int]  # images in "train", "validation" and "test"

  @property
  def num_classes(self) -> int:
    return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class Split:
  """Images in memory, uint8 [N, H, W, C], and their labels, int32 [N]."""

  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of some rows."""
    return self.images[rows], self.labels[rows]


class Records(Protocol):
  """Images and their labels, by index, from TFDS's files or from an image folder."""

  advice: str  # if a record can't be read
  are_silent: bool  # no library prints while they are read

  def __len__(self) -> int: ...

  def read(
    self, rows: Sequence[int] | np.ndarray, shape: tuple[int, int, int], framing: Framing
  ) -> Iterable[tuple[np.ndarray, int]]:
    """Image (uint8 of `shape`, H, W and C) and label of some rows."""

  def labels(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Labels of some rows, int64, without a look at the images."""

  def file(self, row: int) -> str:
    """The file that holds a record."""


@dataclasses.dataclass(frozen=True)
class Classes:
  """Turns the labels of a split into a run's.

  split: names the split in messages.
  names: of the labels on disk.
  labels: the run's label for each of them, int32; -1: the run has no such class.
  """

  split: str
  names: tuple[str, ...]
  labels: np.ndarray

  def convert(self, found: np.ndarray) -> np.ndarray:
    """Labels on disk -> the run's, int32. Raises DataError for a label that is no class."""
    outside = found[(found < 0) | (found >= len(self.names))]
    if len(outside):
      raise DataError(
        f"{self.split} has the label {outside[0]}, which is outside 0..{len(self.names) - 1}: "
        "a split without labels can't be used. Choose another with --config.data.*_split."
      )
    labels = self.labels[found]
    if (labels < 0).any():
      unknown = self.names[found[labels < 0][0]]
      raise DataError(f"{self.split} has images of {unknown!r}, a class that the run lacks.")
    return labels


def join_classes(split: str, names: Sequence[str], run: Sequence[str]) -> Classes:
  """Joins the classes of a split to a run's by their names, in Unicode's NFC.

  Args:
    split: names the split in messages.
    names: of the labels on disk.
    run: names of the run's classes, in the order of its labels.
  """
  place = {unicodedata.normalize("NFC", name): label for label, name in enumerate(run)}
  labels = [place.get(unicodedata.normalize("NFC", name), -1) for name in names]
  return Classes(split, tuple(names), np.array(labels, np.int32))


_CHECKED = 1000  # labels of a streamed split that are looked at before training


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
  """Images on disk, read and decoded on demand; otherwise like a `Split`."""

  records: Records
  shape: tuple[int, int, int]  # H, W and C; images of other sizes are cut and resized
  workers: int  # processes that read ahead
  classes: Classes | None = None  # None: labels stay as they are
  framing: Framing = CENTER

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of some rows. Raises DataError if one can't be read."""
    images = np.empty((len(rows), *self.shape), np.uint8)
    labels = np.empty(len(rows), np.int32)
    self.read(rows, images, labels)
    complaints.say()
    return images, labels

  def check_labels(self) -> None:
    """Looks at the labels of evenly spaced records, the first included.

    Raises:
      DataError: a label is no class.
    """
    rows = np.linspace(0, len(self), min(len(self), _CHECKED), endpoint=False, dtype=int)
    try:
      found = self.records.labels(rows)
    except Exception:  # a damaged record, which `read` names
      return
    if self.classes:
      self.classes.convert(found)

  def read(self, rows: Sequence[int] | np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
    """Reads some rows into arrays (uint8 [N, H, W, C], int32 [N]).

    Raises:
      DataError: an image can't be read, or its label is no class.
    """
    found = np.empty(len(rows), np.int64)
    silent = self.records.are_silent
    counted = contextlib.nullcontext() if silent else complaints.counted(self.records.file(rows[0]))
    try:
      with counted:
        for i, (image, label) in enumerate(self.records.read(rows, self.shape, self.framing)):
          images[i], found[i] = image, label
    except Exception as error:
      if len(rows) > 1:  # find the damaged one, to name it
        for i, row in enumerate(rows):
          self.read([row], images[i : i + 1], labels[i : i + 1])
        return  # all could be read after all
      raise DataError(
        f"{self.records.file(rows[0])} can't be read: {first_line(error)} {self.records.advice}"
      ) from error
    labels[:] = self.classes.convert(found) if self.classes else found


AnySplit = Split | StreamedSplit


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A dataset, in memory or streamed; a split that was not opened is None."""

  name: str
  class_names: tuple[str, ...]
  train: AnySplit | None = None
  validation: AnySplit | None = None
  test: AnySplit | None = None

  def __getitem__(self, split: str) -> AnySplit:
    """A split by name. Raises KeyError if it was not opened."""
    splits = {"train": self.train, "validation": self.validation, "test": self.test}
    if (found := splits[split]) is None:
      raise KeyError(f"the split {split!r} of {self.name} was not opened")
    return found
