"""Image folders: PATH/{train,test}/CLASS/*.png|jpg, read like TFDS's datasets."""

import concurrent.futures
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from train.devices.machine import cores
from train.errors import DataError

_SUFFIXES = (".png", ".jpg", ".jpeg")
_MOST_LISTED = 20  # broken images that a message names


class Processes(NamedTuple):
  """How the processes that open a folder together divide the work.

  share: returns this process' part of a sequence that is the same in all processes.
  gather: returns every process' argument (of JSON's types), in order; waits for all of them.
  """

  share: Callable[[Sequence], Sequence]
  gather: Callable[[Any], list]


ALONE = Processes(share=lambda items: items, gather=lambda content: [content])
_opened: dict[tuple[Path, bool], "Folder"] = {}  # the last folder, to check its images only once


class Records:
  """Encoded images and their labels, by index."""

  advice = "Move it out of the folder, or save it anew as a PNG."  # if a file can't be read

  def __init__(self, paths: Sequence[str], labels: Sequence[int]):
    self._paths, self._labels = paths, labels

  def __len__(self) -> int:
    return len(self._paths)

  def read(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
    """Encoded files and labels of some rows."""
    return [(Path(self._paths[row]).read_bytes(), self._labels[row]) for row in rows]

  def file(self, row: int) -> str:
    """The file that holds a record."""
    return self._paths[row]


class Folder:
  """A dataset of images in folders; PATH's subfolders are its splits.

  A split is ordered by a hash of CLASS/FILE. This mixes the classes, so that the last tenth of a
  split is a fair sample of it, and a new image does not reorder the others.
  """

  image_shape = (None, None, 3)

  def __init__(self, path: Path, skip_broken: bool = False, processes: Processes = ALONE):
    """
    Args:
      path: the folder.
      skip_broken: leave out images that can't be decoded, and list them on stderr.
      processes: those that open the folder together.
    Raises:
      DataError: the path is not a folder, holds no images, or holds broken ones.
    """
    if not path.is_dir():
      raise DataError(f"config.data.name = folder:{path}: that is no folder.")
    files = {
      split.name: {
        class_folder.name: sorted(
          f for f in class_folder.iterdir() if f.suffix.lower() in _SUFFIXES
        )
        for class_folder in _folders(split)
      }
      for split in _folders(path)
    }
    files = {split: classes for split, classes in files.items() if any(classes.values())}
    if "train" not in files:
      raise DataError(f"{path}/train holds no images: they belong in train/CLASS/*.png or *.jpg.")
    self.class_names = tuple(sorted(files["train"]))
    for split, classes in files.items():
      if unknown := sorted(classes.keys() - files["train"].keys()):
        raise DataError(f"{path / split / unknown[0]} is a class that {path}/train lacks.")
    every_file = [f for classes in files.values() for fs in classes.values() for f in fs]
    broken = _broken(every_file, processes)
    if broken:
      _report(path, broken, skip_broken)
    self._splits = {
      split: sorted(
        (_hash(f), str(f), self.class_names.index(name))
        for name, fs in classes.items()
        for f in fs
        if f not in broken
      )
      for split, classes in files.items()
    }
    self.sizes = {split: len(rows) for split, rows in self._splits.items()}

  def records(self, instruction: str) -> Records:
    """The records of a split, or of a part of it.

    Args:
      instruction: in TFDS's notation, such as "train[:90%]".
    Raises:
      KeyError, ValueError, AssertionError: there is no such split.
    """
    import tensorflow_datasets as tfds  # late: slow to import

    infos = {
      name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
      for name, size in self.sizes.items()
    }
    rows = []
    for part in tfds.core.ReadInstruction.from_spec(instruction).to_absolute(infos):
      rows += self._splits[part.splitname][part.from_ : part.to]
    return Records([path for _, path, _ in rows], [label for _, _, label in rows])


def open_folder(path: Path, skip_broken: bool, processes: Processes = ALONE) -> Folder:
  """The dataset of a folder; its images are checked once. All processes must call this."""
  key = (path, skip_broken)  # not `processes`: what one call has checked serves all
  if key not in _opened:
    folder = Folder(path, skip_broken, processes)
    _opened.clear()
    _opened[key] = folder
  return _opened[key]


def _folders(path: Path) -> list[Path]:
  return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _hash(file: Path) -> str:
  return hashlib.sha256(f"{file.parent.name}/{file.name}".encode()).hexdigest()


def _broken(files: Sequence[Path], processes: Processes) -> dict[Path, str]:
  """Broken files, and why. Pillow refuses truncated images, which OpenCV fills with grey."""

  def look(file: Path) -> str:
    try:
      with Image.open(file) as image:
        image.load()
      return ""
    except Exception as error:  # Pillow's decoders raise errors of any type
      return str(error).splitlines()[0] if str(error) else type(error).__name__

  mine = processes.share(files)
  with concurrent.futures.ThreadPoolExecutor(cores()) as threads:  # decoders release Python's lock
    reasons = zip(mine, threads.map(look, mine), strict=True)
    found = [(str(file), reason) for file, reason in reasons if reason]
  return {Path(file): reason for part in processes.gather(found) for file, reason in part}


def _report(path: Path, broken: dict[Path, str], skipped: bool) -> None:
  lines = [f"  {file}: {reason}" for file, reason in sorted(broken.items())[:_MOST_LISTED]]
  if len(broken) > _MOST_LISTED:
    lines.append(f"  and {len(broken) - _MOST_LISTED:,} more")
  if not skipped:
    raise DataError(
      f"{path} holds broken images ({len(broken):,}); --config.data.skip_broken=True leaves them "
      "out:\n" + "\n".join(lines)
    )
  print(f"Broken images are left out ({len(broken):,}):", *lines, sep="\n", file=sys.stderr)
