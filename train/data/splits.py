"""A dataset's description and its images, in memory or streamed."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from train.data.decode import decode
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

  def shape_in_memory(self, image_size: int) -> tuple[int, int, int]:
    """H, W and C of the images once read: resized to `image_size` if their sizes differ."""
    height, width, channels = self.image_shape
    return height or image_size, width or image_size, channels


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
  """Encoded images and their labels, by index, from TFDS's files or from an image folder."""

  advice: str  # if a record can't be read

  def __len__(self) -> int: ...

  def read(self, rows: Sequence[int] | np.ndarray) -> list[tuple[bytes, int]]:
    """Encoded images (PNG or JPEG) and labels of some rows."""

  def file(self, row: int) -> str:
    """The file that holds a record."""


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
  """Images on disk, read and decoded on demand; otherwise like a `Split`."""

  records: Records
  shape: tuple[int, int, int]  # H, W and C; images of other sizes are resized
  workers: int  # processes that read ahead

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of some rows. Raises DataError if one can't be read."""
    images = np.empty((len(rows), *self.shape), np.uint8)
    labels = np.empty(len(rows), np.int32)
    self.read(rows, images, labels)
    return images, labels

  def read(self, rows: Sequence[int] | np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
    """Reads some rows into arrays (uint8 [N, H, W, C], int32 [N]).

    Raises:
      DataError: an image can't be read.
    """
    try:
      for i, (encoded, label) in enumerate(self.records.read(rows)):
        images[i], labels[i] = decode(encoded, self.shape), label
    except Exception as error:
      if len(rows) > 1:  # find the damaged one, to name it
        for i, row in enumerate(rows):
          self.read([row], images[i : i + 1], labels[i : i + 1])
        return  # all could be read after all
      raise DataError(
        f"{self.records.file(rows[0])} can't be read: {first_line(error)} {self.records.advice}"
      ) from error


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
