"""Image folders, PATH/{train,test}/CLASS/FILE or PATH/CLASS/FILE, read like TFDS's datasets."""

import bisect
import contextlib
import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from train.data import listing, verdicts
from train.data.complaints import complaints
from train.data.decode import decode_file
from train.data.default_splits import FEW, KNOWN, names_in
from train.data.framing import CENTER, Framing
from train.data.listing import Contents
from train.data.verdicts import ALONE, Processes
from train.errors import DataError

_MOST_LISTED = 20  # broken images that a message names
_PARTS = {"train": 0.8, "validation": 0.9, "test": 1.0}  # without splits: where each part ends
_opened: dict[tuple[Path, str, bool], "Folder"] = {}  # the last one, to look at its images once


class Records:
  """Images and their labels, by index."""

  are_silent = True
  advice = "Move it out of the folder, or save it anew as a PNG."  # if a file can't be read

  def __init__(
    self,
    paths: Sequence[str],
    labels: Sequence[int],
    background: str = "white",
    kept: dict[tuple[str, Framing], np.ndarray] | None = None,
  ):
    """
    Args:
      paths, labels: of the images.
      background: on which transparent pixels are composed.
      kept: images that are decoded already, by path and framing; each is taken out when it is read.
    """
    self._paths, self._labels, self._background = paths, labels, background
    self._kept = {} if kept is None else kept

  def __len__(self) -> int:
    return len(self._paths)

  def __getstate__(self) -> dict:  # for worker processes, which decode
    return vars(self) | {"_kept": {}}

  def read(
    self, rows: Sequence[int] | np.ndarray, shape: tuple[int, int, int], framing: Framing
  ) -> Iterator[tuple[np.ndarray, int]]:
    """Yields image (uint8 of `shape`, H, W and C) and label of some rows."""
    for row in rows:
      path = self._paths[row]
      image = self._kept.pop((path, framing), None)
      if image is None or image.shape != shape:
        image = _decode(path, shape, self._background, framing)
      yield image, self._labels[row]

  def labels(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Labels of some rows, without a look at the images."""
    return np.asarray(self._labels, np.int64)[np.asarray(rows)]

  def file(self, row: int) -> str:
    """The file that holds a record."""
    return self._paths[row]


class Folder:
  """A dataset of images in folders.

  PATH's subfolders are its splits; if they are its classes, images are split by a hash of
  CLASS/FILE. A split is ordered by the same hash. This mixes the classes, so that the last tenth of
  a split is a fair sample of it, and a new image does not reorder the others.
  """

  image_shape = (None, None, 3)

  def __init__(self, path: Path, background: str = "white", skip_broken: bool = False):
    """
    Args:
      path: the folder.
      background: on which transparent pixels are composed.
      skip_broken: leave out images that can't be decoded, and list them on stderr.
    Raises:
      DataError: the path is not a folder, or holds no images in class folders.
    """
    if not path.is_dir():
      raise DataError(f"config.data.name = folder:{path}: that is no folder.")
    self._path, self._background, self._skip_broken = path, background, skip_broken
    self._busy = 0.0  # seconds
    with self._aloud():
      folders = listing.split_folders(path)
      self.is_flat = folders is None
      self._folders = folders if folders is not None else {}
      self._read: dict[str, Contents] = _hash_splits(path) if self.is_flat else {}
    self._ordered: dict[str, list[tuple[str, str, str]]] = {}  # hash, path and class of each image
    self._seen: set[str] = set()  # splits whose images were looked at
    self.kept: dict[tuple[str, Framing], np.ndarray] = {}  # images decoded by `look`

  @property
  def names(self) -> list[str]:
    """Splits, those with images."""
    return [name for name in self._read if self.size(name)] if self.is_flat else [*self._folders]

  @property
  def sizes(self) -> dict[str, int]:
    """Images in each split."""
    return {name: self.size(name) for name in self.names}

  @property
  def usual_names(self) -> list[str]:
    """Splits that may be used without being named in the config."""
    return [name for name in self.names if name in KNOWN]

  def size(self, name: str) -> int:
    """Images in a split; 0 if there is none of this name."""
    return len(self._contents(name))

  def has_labels(self, name: str) -> bool:
    """Whether a split has labels: a folder's always has."""
    del name
    return True

  def _contents(self, name: str) -> Contents:
    if name not in self._read:
      with self._aloud():
        found = name in self._folders
        self._read[name] = listing.contents(self._folders[name]) if found else Contents()
    return self._read[name]

  @contextlib.contextmanager
  def _aloud(self) -> Iterator[None]:
    """Says that names are read, if that takes long in all."""
    began, silent = time.monotonic(), verdicts.SILENT_SECONDS - self._busy
    text = f"Reading the names of the files in {self._path}."
    with verdicts.aloud(text, silent) if silent > 0 else contextlib.nullcontext():
      yield
    self._busy += time.monotonic() - began

  def _in_order(self, name: str) -> list[tuple[str, str, str]]:
    if name not in self._ordered:
      classes = self._contents(name).classes
      self._ordered[name] = sorted(
        (_hash(file.key), file.path, key) for key, found in classes.items() for file in found
      )
    return self._ordered[name]

  def look(
    self,
    instructions: Sequence[str],
    processes: Processes = ALONE,
    shape: tuple[int, int, int] | None = None,
    framing: Framing = CENTER,
  ) -> None:
    """Looks at every image of the splits in use, those seen before excepted.

    Args:
      instructions: in TFDS's notation.
      processes: those that open the folder together; each looks at its part of the images.
      shape, framing: of the images to keep for `Records.read`; None: keep none.
    Raises:
      DataError: there are broken images, which should not be skipped.
    """
    names = sorted({name for i in instructions for name in names_in(i)} - self._seen)
    files = [f for name in names for found in self._contents(name).classes.values() for f in found]

    def decode(path: str) -> None:
      image = _decode(path, shape or (1, 1, 3), self._background, framing)
      if shape:
        self.kept[path, framing] = image

    silent = verdicts.SILENT_SECONDS - self._busy
    broken = verdicts.look(self._path, files, decode, processes, silent)
    complaints.say()
    speaks = bool(processes.share((0,)))  # the first of them
    if broken and (speaks or not self._skip_broken):
      _report(self._path, broken, self._skip_broken)
    self._seen.update(names)
    for name in names:
      classes = self._contents(name).classes
      for key, found in classes.items():
        classes[key] = [file for file in found if file.path not in broken]
      self._ordered.pop(name, None)
    if speaks:
      for line in self._remarks(names):
        print(line, file=sys.stderr, flush=True)

  def _remarks(self, names: Sequence[str]) -> Iterator[str]:
    """What is to be said about some splits, besides broken images."""
    every = [self._contents(name) for name in names]
    if left_out := sum((contents.left_out for contents in every), start=Contents().left_out):
      yield f"{self._path}: {listing.describe_left_out(left_out)}"
    if stray := sum(contents.stray for contents in every):
      images = "images" if stray > 1 else "image"
      yield f"{self._path}: left out: {stray:,} {images} in no class folder"
    empty = {key for c in every for key, found in c.classes.items() if not found}
    empty -= {key for c in every for key, found in c.classes.items() if found}
    if empty:
      yield f"{self._path}: no class, since without images: {', '.join(sorted(empty))}"

  def classes_of(self, instruction: str) -> tuple[str, ...]:
    """Names of the classes with images in the splits of an instruction, in order."""
    every = [self._contents(name).classes for name in names_in(instruction)]
    return tuple(sorted({key for classes in every for key, found in classes.items() if found}))

  def records(
    self, instruction: str, class_names: Sequence[str], limit: int | None = None
  ) -> Records:
    """The records of a split, or of a part of it.

    Args:
      instruction: in TFDS's notation, such as "train[:90%]".
      class_names: a class' label is its place in them; -1: it has none.
      limit: the most records.
    Raises:
      KeyError, ValueError, AssertionError: there is no such split.
    """
    import tensorflow_datasets as tfds  # late: slow to import

    infos = {
      name: tfds.core.SplitInfo(name=name, shard_lengths=[self.size(name)], num_bytes=0)
      for name in names_in(instruction)
      if self.size(name)
    }
    labels = {name: label for label, name in enumerate(class_names)}
    rows = []
    for part in tfds.core.ReadInstruction.from_spec(instruction).to_absolute(infos):
      rows += self._in_order(part.splitname)[part.from_ : part.to]
    rows = rows[:limit]
    paths = [path for _, path, _ in rows]
    return Records(paths, [labels.get(key, -1) for _, _, key in rows], self._background, self.kept)


def open_folder(path: Path, background: str = "white", skip_broken: bool = False) -> Folder:
  """The dataset of a folder, the last one from memory."""
  key = (path, background, skip_broken)
  if key not in _opened:
    folder = Folder(path, background, skip_broken)
    _opened.clear()
    _opened[key] = folder
  return _opened[key]


def forget() -> None:
  """Forgets the last folder, so that it is listed anew."""
  _opened.clear()


def _hash_splits(path: Path) -> dict[str, Contents]:
  """Splits of a folder whose subfolders are the classes: 80/10/10, by a hash of CLASS/FILE.

  Every class trains, and no split is empty if another has images to spare.
  """
  whole = listing.contents(str(path), count_beside=False)
  splits = {name: Contents() for name in _PARTS}
  train = splits["train"] = whole
  if len(whole) < FEW:
    return splits
  for name, found in whole.classes.items():
    found.sort(key=lambda file: _hash(file.key))
    places = [int(_hash(file.key)[:8], 16) / 2**32 for file in found]
    start = max(1, bisect.bisect_left(places, _PARTS["train"]))
    middle = max(start, bisect.bisect_left(places, _PARTS["validation"]))
    splits["validation"].classes[name] = found[start:middle]
    splits["test"].classes[name] = found[middle:]
    train.classes[name] = found[:start]
  for part in (splits["test"], splits["validation"]):
    largest = max(train.classes, key=lambda name: len(train.classes[name]))
    if not len(part) and len(train.classes[largest]) > 1:
      part.classes[largest] = [train.classes[largest].pop()]
  return splits


def _hash(key: str) -> str:
  return hashlib.sha256(key.encode()).hexdigest()


def _decode(
  path: str, shape: tuple[int, int, int], background: str, framing: Framing
) -> np.ndarray:
  encoded = Path(path).read_bytes()
  return decode_file(
    encoded, shape, background=background, upright=True, framing=framing, name=path
  )


def _report(path: Path, broken: dict[str, str], skipped: bool) -> None:
  lines = [f"  {file}: {reason}" for file, reason in sorted(broken.items())[:_MOST_LISTED]]
  if len(broken) > _MOST_LISTED:
    lines.append(f"  and {len(broken) - _MOST_LISTED:,} more")
  if not skipped:
    raise DataError(
      f"{path} holds broken images ({len(broken):,}); --config.data.skip_broken=True leaves them "
      "out:\n" + "\n".join(lines)
    )
  print(f"Broken images are left out ({len(broken):,}):", *lines, sep="\n", file=sys.stderr)
