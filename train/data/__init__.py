"""Finds or prepares datasets on disk, and reads them.

Any TFDS image-classification set (features `image` and `label`), prepared as ArrayRecord and read
without TensorFlow, or an image folder. Sets that fit are kept in memory, others are streamed.
"""

import concurrent.futures
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from ml_collections import ConfigDict

from train.data import folder, prepared
from train.data.complaints import complaints
from train.data.default_splits import USUAL, choose, explain, names_in
from train.data.framing import Framing
from train.data.names import FOLDER
from train.data.splits import (
  AnySplit,
  Dataset,
  DatasetInfo,
  Split,
  StreamedSplit,
  join_classes,
)
from train.data.verdicts import ALONE, Processes
from train.devices.machine import cores, memory_limit
from train.errors import DataError, UnreachableError

__all__ = [
  "SPLITS",
  "AnySplit",
  "Dataset",
  "DatasetInfo",
  "Processes",
  "Split",
  "StreamedSplit",
  "describe",
  "foresee",
  "load",
  "move",
  "resolve",
]

SPLITS = ("train", "validation", "test")
_CHUNK = 1024  # images that a thread reads at a time
_MAX_WORKERS = 16


def resolve(data_config: ConfigDict) -> ConfigDict:
  """Finds a dataset on disk, or prepares it, and chooses the splits that are None.

  Args:
    data_config: `config.data`; `fallback` names the dataset to use if `name` is unavailable.
  Returns:
    A copy with the absolute path of an image folder, with all splits, and with the fallback's name
    after a notice on stderr. Another line on stderr explains unusual splits.
  Raises:
    DataError: the dataset is broken, or unavailable without a fallback.
  """
  data_config = data_config.copy_and_resolve_references()
  folder.forget()  # look at what is there now
  if _is_folder(data_config):
    data_config.name = f"{FOLDER}{_path(data_config)}"
  try:
    source = _open(data_config)
  except UnreachableError as error:
    if not data_config.fallback:
      raise
    reason = str(error).splitlines()[0]
    notice = (
      f"NOT TRAINING ON {data_config.name.upper()}. {reason} "
      f'Instead, this run uses the embedded dataset "{data_config.fallback}": drawn shapes. '
      f"Its accuracies say nothing about {data_config.name}."
    )
    print(_boxed(notice), file=sys.stderr, flush=True)
    data_config.name = data_config.fallback
    source = _open(data_config)
  splits = _splits(source, data_config)
  by_itself = [key for key in splits if data_config[f"{key}_split"] is None]
  if any(splits[key] != USUAL[key] for key in by_itself):
    chosen = ", ".join(f"{key} on {value!r}" for key, value in splits.items())
    is_flat = isinstance(source, folder.Folder) and source.is_flat
    reason = explain(splits, is_flat) if len(by_itself) == len(splits) else ""
    print(f"{data_config.name}: {chosen}{reason}.", file=sys.stderr, flush=True)
  data_config.update({f"{key}_split": value for key, value in splits.items()})
  return data_config


def describe(
  data_config: ConfigDict, processes: Processes = ALONE, image_size: int | None = None
) -> DatasetInfo:
  """Classes, image shape and split sizes; prepares the dataset if needed.

  Args:
    data_config: `config.data`.
    processes: those that make this call together; each looks at its part of a folder's images.
    image_size: as for `load`, if it follows: what the look at a folder has decoded is kept for it,
      within the limits of memory. None: no image is kept.
  Raises:
    DataError: the dataset is unavailable, broken, or not an image-classification set.
  """
  source = _open(data_config)
  splits = _splits(source, data_config)
  alone = len(processes.share((0, 1))) == 2
  _look(source, data_config, splits, processes, image_size if alone else None)
  return _describe(source, data_config, splits)


def foresee(data_config: ConfigDict, train_images: int | None = None) -> DatasetInfo:
  """Like `describe`, for a dataset that may not be on disk; nothing is downloaded or written.

  Args:
    train_images: number of training images; None: as on disk, or as known without the dataset.
  Raises:
    DataError: TFDS does not know the dataset, or its size is not known.
  """
  if _is_folder(data_config):
    return describe(data_config)
  source = prepared.foresee(data_config)
  if train_images:
    sizes = {"train": train_images}
    return DatasetInfo(data_config.name, source.class_names, source.image_shape, sizes)
  if not source.sizes:
    raise DataError(
      f"{data_config.name} is not prepared in {prepared.data_dir(data_config)}, so its number of "
      "images is unknown: --images=N says how many train."
    )
  return _describe(source, data_config, _splits(source, data_config))


def move(data_config: ConfigDict, path: str) -> None:
  """Points to a dataset that has moved to `path`: TFDS's data_dir, or the image folder itself.

  Splits that a folder lacks are chosen anew, as for a folder that holds nothing but `test`.
  """
  if not _is_folder(data_config):
    data_config.data_dir = path
    return
  data_config.name = FOLDER + path
  names = _open(data_config).names
  for split in SPLITS:
    if not set(names_in(data_config[f"{split}_split"] or "")) <= set(names):
      data_config[f"{split}_split"] = None


def _is_folder(data_config) -> bool:
  return data_config.name.startswith(FOLDER)


def _path(data_config) -> Path:
  path = data_config.name.removeprefix(FOLDER)
  if not path:
    raise DataError(f"--config.data.name={data_config.name}: the path is missing: {FOLDER}PATH.")
  return Path(os.path.abspath(os.path.expanduser(path)))


def _open(data_config) -> "folder.Folder | prepared.TfdsSet":
  """The dataset on disk, prepared if needed: class names, image shape, sizes and records."""
  if _is_folder(data_config):
    background = data_config.get("background", "white")  # older runs' configs name none
    return folder.open_folder(_path(data_config), background, data_config.skip_broken)
  return prepared.open_prepared(data_config)


def _splits(source, data_config, wanted: Sequence[str] = SPLITS) -> dict[str, str]:
  """The wanted splits in TFDS's notation: as in the config, or chosen if that says None."""
  given = {split: data_config[f"{split}_split"] for split in wanted}
  if None not in given.values():
    return given
  dataset = "" if _is_folder(data_config) else data_config.name.split("/")[0].split(":")[0]
  names, labelled = source.usual_names, source.has_labels("test")
  chosen = choose(dataset, names, source.size("train"), labelled)
  for split in wanted:
    if given[split] is None and split not in chosen:
      has = ", ".join(source.names)
      raise DataError(f"{data_config.name} has no split for config.data.{split}_split, only {has}.")
    given[split] = given[split] or chosen[split]
  return given


def _look(source, data_config, splits, processes, image_size, sharers=1) -> None:
  """Looks at the images of a folder that are in use, and keeps them if they will be in memory."""
  if not isinstance(source, folder.Folder):
    return
  shape, framing = None, Framing.of(data_config)
  if image_size is not None:
    shape = framing.shape_in_memory(source.image_shape, image_size)
    names = {name for instruction in splits.values() for name in names_in(instruction)}
    if not _fits(sum(map(source.size, names)), shape, data_config, sharers):
      shape = None
  source.look(list(splits.values()), processes, shape, framing)


def _describe(source, data_config, splits) -> DatasetInfo:
  class_names = _class_names(source, data_config, splits)
  records = _records(source, data_config, splits, class_names)
  sizes = {split: len(found) for split, found in records.items()}
  return DatasetInfo(data_config.name, class_names, source.image_shape, sizes)


def _class_names(source, data_config, splits) -> tuple[str, ...]:
  """Names of the labels; a folder's classes are those that train, or that a lone split holds."""
  if not isinstance(source, folder.Folder):
    return source.class_names
  instruction = splits.get("train") or data_config.train_split or "train"
  names = source.classes_of(instruction)
  if not names and "train" not in splits:
    names = tuple(sorted({n for i in splits.values() for n in source.classes_of(i)}))
  for other in splits.values():
    if names and (unknown := sorted(set(source.classes_of(other)) - set(names))):
      raise DataError(
        f"{data_config.name}: {unknown[0]} is a class that {instruction!r} lacks and {other!r} has."
      )
  return names


def _records(source, data_config, splits, class_names) -> dict:
  """The records of each split. Raises DataError if a split is not there, or holds no image."""
  found = {}
  for split, instruction in splits.items():
    limit = data_config.get("max_images")
    named = f"config.data.{split}_split = {instruction!r}"
    try:
      if isinstance(source, folder.Folder):
        found[split] = source.records(instruction, class_names, limit)
      else:
        found[split] = source.records(instruction, limit)
    except (KeyError, ValueError, AssertionError):
      known = ", ".join(f"{name} ({size:,})" for name, size in source.sizes.items())
      raise DataError(f"{named} is no split of {data_config.name}, which has {known}.") from None
    if not len(found[split]):
      raise DataError(f"{named} holds no image.")
  return found


def _fits(images: int, shape: tuple[int, ...], data_config, sharers: int, kept: int = 0) -> bool:
  """Whether so many images may be in memory, which holds `kept` bytes of them already."""
  limit = data_config.in_memory_bytes
  limit = memory_limit() // 4 if limit is None else limit
  needed = images * int(np.prod(shape)) * sharers
  return needed <= min(limit, psutil.virtual_memory().available + kept)


def _boxed(text):
  """The text in a frame of asterisks, 80 columns wide."""
  lines = [f"*  {line:<74}  *" for line in ("", *textwrap.wrap(text, 74), "")]
  return "\n".join(["*" * 80, *lines, "*" * 80])


def load(
  data_config: ConfigDict,
  image_size: int,
  splits: tuple[str, ...] = SPLITS,
  sharers: int = 1,
  class_names: Sequence[str] | None = None,
) -> Dataset:
  """Opens a dataset, prepared first if needed, and reads it into memory if it fits.

  Args:
    data_config: `config.data`.
    image_size: side of the model's input in pixels; `Framing.shape_in_memory` says what follows.
    splits: which of "train", "validation" and "test" to open; nothing else is looked at.
    sharers: processes that open it on this host at the same time, and share memory and cores.
    class_names: a run's classes, to which the dataset's are joined by name; labels are their
      places. None: the dataset's own.
  Raises:
    DataError: the dataset is unavailable or broken, has labels that are no class, or has images of
      a class that is not in `class_names`.
  """
  source = _open(data_config)
  used = _splits(source, data_config, splits)
  _look(source, data_config, used, ALONE, image_size, sharers)
  if class_names is None:
    names = own = _class_names(source, data_config, used)
  else:
    names, own = tuple(class_names), _own_names(source, used)
  info = DatasetInfo(data_config.name, names, source.image_shape, {})
  framing = Framing.of(data_config)
  shape = framing.shape_in_memory(info.image_shape, image_size)
  workers = data_config.workers or max(1, min(cores() // 2, _MAX_WORKERS // sharers))
  streamed = {}
  for split, records in _records(source, data_config, used, own).items():
    said = f"{data_config.name}: {split}_split = {used[split]!r}"
    classes = join_classes(said, own, names)
    streamed[split] = StreamedSplit(records, shape, workers, classes, framing)
  kept = source.kept if isinstance(source, folder.Folder) else {}
  kept_bytes = sum(image.nbytes for image in kept.values())
  if _fits(sum(map(len, streamed.values())), shape, data_config, sharers, kept_bytes):
    in_memory = {name: _read(split) for name, split in streamed.items()}
    kept.clear()
    complaints.say()
    return Dataset(info.name, info.class_names, **in_memory)
  kept.clear()
  for part in streamed.values():
    part.check_labels()
  return Dataset(info.name, info.class_names, **streamed)


def _own_names(source, splits) -> tuple[str, ...]:
  """The names of a dataset's labels, whatever a run calls them."""
  if not isinstance(source, folder.Folder):
    return source.class_names
  return tuple(sorted({name for i in splits.values() for name in source.classes_of(i)}))


def _read(streamed: StreamedSplit) -> Split:
  """Decodes a split in threads: ArrayRecord and OpenCV release Python's lock while they work."""
  images = np.empty((len(streamed), *streamed.shape), np.uint8)
  labels = np.empty(len(streamed), np.int32)
  with concurrent.futures.ThreadPoolExecutor() as threads:
    chunks = []
    for start in range(0, len(streamed), _CHUNK):
      part = slice(start, start + _CHUNK)
      rows = range(start, min(start + _CHUNK, len(streamed)))
      chunks.append(threads.submit(streamed.read, rows, images[part], labels[part]))
    try:
      for chunk in chunks:
        chunk.result()
    finally:
      threads.shutdown(wait=False, cancel_futures=True)  # after an error, cancels the other chunks
  return Split(images, labels)
