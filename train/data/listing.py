"""What lies in an image folder: its splits, classes and images, without a look at the images."""

import collections
import dataclasses
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from train.data.default_splits import KNOWN
from train.errors import DataError

SUFFIXES = ".png .jpg .jpeg .jpe .jfif .webp .bmp .gif .tif .tiff".split()  # in any case
# What systems leave in folders; also all names that begin with a dot, such as a Mac's ._photo.jpg.
_SYSTEM = {
  "thumbs.db",
  "ehthumbs.db",
  "desktop.ini",
  "icon\r",
  "__macosx",
  "@eadir",
  "#recycle",
  "$recycle.bin",
  "system volume information",
  "lost+found",
}


class Found(NamedTuple):
  """An image file."""

  path: str
  key: str  # CLASS/FILE, which orders a split
  size: int  # bytes
  changed: int  # time of the last change, in ns


@dataclasses.dataclass
class Contents:
  """What a split's folder holds."""

  classes: dict[str, list[Found]] = dataclasses.field(default_factory=dict)
  left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  stray: int = 0  # images beside the class folders, without a class

  def __len__(self) -> int:
    return sum(map(len, self.classes.values()))


def as_text(name: str) -> str:
  """A file's name as it is printed and compared: in NFC, with what is no UTF-8 escaped."""
  return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def split_folders(path: Path) -> dict[str, str] | None:
  """Splits of a folder by name: subfolders of PATH that hold class folders, not looked into.

  Returns None if the classes lie directly below PATH.

  Raises:
    DataError: there are no class folders with images.
  """
  folders = {entry.name: entry.path for entry in _entries(str(path)) if entry.is_dir()}
  bare = [name for name in folders if _has_images(folders[name], below=0)]
  split = [name for name in folders if _has_images(folders[name], below=1)]
  if not any(name.lower() in KNOWN for name in split):
    if "train" in bare and any(name in KNOWN and name != "train" for name in bare):
      raise DataError(
        f"{path}/train holds images, but no class folders: they belong in train/CLASS."
      )
    if bare:
      return None
  if not split:
    raise DataError(
      f"{path} holds no images in class folders: they belong in PATH/train/CLASS or PATH/CLASS, "
      f"with names that end in {' '.join(SUFFIXES)}."
    )
  # Train and TEST are the usual splits, too.
  return {name.lower() if name.lower() in KNOWN else name: folders[name] for name in split}


def contents(folder: str, count_beside: bool = True) -> Contents:
  """Images of each class folder, and of the folders in it.

  Args:
    folder: a split's.
    count_beside: count other files beside the class folders, too.
  Raises:
    DataError: a folder can't be read.
  """
  found = Contents()
  for entry in _entries(folder):
    if entry.is_dir():
      name = as_text(entry.name)
      images = found.classes.setdefault(name, [])
      for file in _walk(entry.path, ()):
        if not _is_image(file.name):
          found.left_out[_suffix(file.name)] += 1
          continue
        try:
          stat = file.stat()
          size, changed = stat.st_size, stat.st_mtime_ns
        except OSError:  # a link to nothing, which the look at the images reports
          size, changed = -1, -1
        inside = as_text(os.path.relpath(file.path, entry.path))
        images.append(Found(file.path, f"{name}/{inside}", size, changed))
    elif _is_image(entry.name):
      found.stray += 1
    elif count_beside:
      found.left_out[_suffix(entry.name)] += 1
  return found


def image_files(folder: str) -> Iterator[str]:
  """Paths of all images below a folder, by name; DataError if a folder can't be read."""
  return (file.path for file in _walk(folder, ()) if _is_image(file.name))


def describe_left_out(counts: collections.Counter[str]) -> str:
  """Such as "left out: 11 files (.psd 10, .txt 1)"."""
  kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in counts.most_common())
  total = counts.total()
  return f"left out: {total:,} file{'s' if total > 1 else ''} ({kinds})"


def _has_images(folder: str, below: int) -> bool:
  """Whether a folder holds images: itself, or (1) in a folder below, at any depth."""
  entries = _entries(folder)
  if not below:
    return any(_is_image(entry.name) and not entry.is_dir() for entry in entries)
  return any(
    _is_image(file.name) for entry in entries if entry.is_dir() for file in _walk(entry.path, ())
  )


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[os.DirEntry[str]]:
  """Files in a folder and in those below it; links are followed, but in no circle."""
  try:
    stat = os.stat(folder)
  except OSError as error:
    raise DataError(f"{folder} can't be read: {error.strerror}.") from error
  here = (stat.st_dev, stat.st_ino)
  if here in above:
    return
  for entry in _entries(folder):
    if entry.is_dir():
      yield from _walk(entry.path, (*above, here))
    elif entry.is_file() or entry.is_symlink():  # no pipe or socket, which would not end
      yield entry


def _entries(folder: str) -> list[os.DirEntry[str]]:
  """The visible entries of a folder, by name."""
  try:
    with os.scandir(folder) as entries:
      visible = [e for e in entries if e.name[0] != "." and e.name.lower() not in _SYSTEM]
  except OSError as error:
    raise DataError(f"{folder} can't be read: {error.strerror}.") from error
  return sorted(visible, key=lambda entry: entry.name)


def _is_image(name: str) -> bool:
  return _suffix(name) in SUFFIXES


def _suffix(name: str) -> str:
  return os.path.splitext(as_text(name))[1].lower() or "no suffix"
