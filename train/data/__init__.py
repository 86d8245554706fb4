"""Finds or prepares datasets on disk, and reads them.

Any TFDS image-classification set (features `image` and `label`), prepared as ArrayRecord and read
without TensorFlow, or an image folder. Sets that fit are kept in memory, others are streamed.
"""

import concurrent.futures
import sys
import textwrap
from pathlib import Path

import numpy as np
import psutil
from ml_collections import ConfigDict

from train.data import prepared
from train.data.folder import ALONE, Processes, open_folder
from train.data.splits import AnySplit, Dataset, DatasetInfo, Split, StreamedSplit
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
_FOLDER = "folder:"  # before the path of an image folder
_MAX_WORKERS = 16


def resolve(data_config: ConfigDict) -> ConfigDict:
  """Finds a TFDS dataset prepared on disk, or prepares it.

  Args:
    data_config: `config.data`; `fallback` names the dataset to use if `name` is unavailable.
  Returns:
    `data_config`, or a copy with the fallback's name after a notice on stderr.
  Raises:
    DataError: the dataset is broken, or unavailable without a fallback.
  """
  try:
    _prepare(data_config)
    return data_config
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
  data_config = data_config.copy_and_resolve_references()
  data_config.name = data_config.fallback
  _prepare(data_config)
  return data_config


def _prepare(data_config):
  """Prepares a TFDS dataset. An image folder needs no preparation; `describe` checks it."""
  if not data_config.name.startswith(_FOLDER):
    prepared.open_prepared(data_config)


def describe(data_config: ConfigDict, processes: Processes = ALONE) -> DatasetInfo:
  """Classes, image shape and split sizes; prepares the dataset if needed, but keeps no images.

  Args:
    data_config: `config.data`.
    processes: those that make this call together; each checks its part of a folder's images.
  Raises:
    DataError: the dataset is unavailable, broken, or not an image-classification set.
  """
  return _describe(_open(data_config, processes), data_config)


def foresee(data_config: ConfigDict, train_images: int | None = None) -> DatasetInfo:
  """Like `describe`, for a dataset that may not be on disk; nothing is downloaded or written.

  Args:
    train_images: number of training images; None: as on disk, or as known without the dataset.
  Raises:
    DataError: TFDS does not know the dataset, or its size is not known.
  """
  if data_config.name.startswith(_FOLDER):
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
  return _describe(source, data_config)


def move(data_config: ConfigDict, folder: str) -> None:
  """Points to a dataset that has moved to `folder`: TFDS's data_dir, or the image folder itself."""
  if data_config.name.startswith(_FOLDER):
    data_config.name = _FOLDER + folder
  else:
    data_config.data_dir = folder


def _describe(source, data_config) -> DatasetInfo:
  sizes = {}
  for split in SPLITS:
    instruction = data_config[f"{split}_split"]
    try:
      sizes[split] = len(source.records(instruction))
    except (KeyError, ValueError, AssertionError):
      known = ", ".join(f"{name} ({size:,})" for name, size in source.sizes.items())
      raise DataError(
        f"config.data.{split}_split = {instruction!r} is no split of {data_config.name}, "
        f"which has {known}."
      ) from None
    if not sizes[split]:
      raise DataError(f"config.data.{split}_split = {instruction!r} holds no image.")
  return DatasetInfo(data_config.name, source.class_names, source.image_shape, sizes)


def _open(data_config, processes=ALONE):
  """The dataset on disk, prepared if needed: class names, image shape, sizes and records."""
  if data_config.name.startswith(_FOLDER):
    path = Path(data_config.name.removeprefix(_FOLDER)).expanduser().absolute()
    return open_folder(path, data_config.skip_broken, processes)
  return prepared.open_prepared(data_config)


def _boxed(text):
  """The text in a frame of asterisks, 80 columns wide."""
  lines = [f"*  {line:<74}  *" for line in ("", *textwrap.wrap(text, 74), "")]
  return "\n".join(["*" * 80, *lines, "*" * 80])


def load(
  data_config: ConfigDict, image_size: int, splits: tuple[str, ...] = SPLITS, sharers: int = 1
) -> Dataset:
  """Opens a dataset, prepared first if needed, and reads it into memory if it fits.

  Args:
    data_config: `config.data`.
    image_size: height and width in pixels to which images of differing sizes are resized; if all
      have one size, they keep it.
    splits: which of "train", "validation" and "test" to open.
    sharers: processes that open it on this host at the same time, and share memory and cores.
  Raises:
    DataError: the dataset is unavailable or broken.
  """
  info = describe(data_config)
  source = _open(data_config)
  shape = info.shape_in_memory(image_size)
  workers = data_config.workers or max(1, min(cores() // 2, _MAX_WORKERS // sharers))
  streamed = {
    split: StreamedSplit(source.records(data_config[f"{split}_split"]), shape, workers)
    for split in splits
  }
  needed = sum(map(len, streamed.values())) * int(np.prod(shape))
  limit = data_config.in_memory_bytes
  limit = memory_limit() // 4 if limit is None else limit
  if needed * sharers <= min(limit, psutil.virtual_memory().available):
    in_memory = {name: _read(split) for name, split in streamed.items()}
    return Dataset(info.name, info.class_names, **in_memory)
  return Dataset(info.name, info.class_names, **streamed)


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
