"""Datasets: found or prepared on disk, and read.

    python -m train.data prepare --name cifar100 [--data_dir DIR] [--archive FILE]
    python -m train.data show --config configs/mixer.py [--config.KEY=VALUE] [--output FILE.png]

Any TFDS image-classification set (features `image` and `label`), prepared as ArrayRecord and read
without TensorFlow, or an image folder. What fits is kept in memory, the rest is streamed.
"""

import argparse
import concurrent.futures
import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import psutil
from ml_collections import ConfigDict
from PIL import Image

from train import flags
from train.data import prepared
from train.devices.machine import cores, memory_limit
from train.errors import DataError, UnreachableError, first_line

SPLITS = ("train", "validation", "test")
_CHUNK = 1024  # images that a thread reads at a time
_FOLDER = "folder:"  # in front of the path of an image folder
_MAX_WORKERS = 16
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
_FLAGS = {  # of cv2.imdecode, by number of channels; photos are not turned, as in TFDS
  1: cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION,
  3: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
  4: cv2.IMREAD_UNCHANGED,
}
_TO_RGBA = {1: cv2.COLOR_GRAY2RGBA, 3: cv2.COLOR_BGR2RGBA, 4: cv2.COLOR_BGRA2RGBA}


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """What is known of a dataset before any image is read."""

  name: str
  class_names: tuple[str, ...]
  image_shape: tuple[int | None, int | None, int]  # H, W, C; None where images differ in size
  sizes: dict[str, int]  # images in "train", "validation" and "test"

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  def shape_in_memory(self, image_size: int) -> tuple[int, int, int]:
    """H, W and C of the images once they are read: of `image_size` where they differ in size."""
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


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
  """Images on disk, read and decoded when they are asked for; otherwise like a `Split`."""

  records: prepared.Records  # or an image folder's
  shape: tuple[int, int, int]  # H, W and C, to which all are resized
  workers: int  # processes that read ahead

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of some rows. Raises DataError if one can't be read."""
    images = np.empty((len(rows), *self.shape), np.uint8)
    labels = np.empty(len(rows), np.int32)
    self.read(rows, images, labels)
    return images, labels

  def read(self, rows: Sequence[int], images: np.ndarray, labels: np.ndarray) -> None:
    """Puts some rows in arrays that are there. Raises DataError if one can't be read."""
    try:
      for i, (encoded, label) in enumerate(self.records.read(rows)):
        images[i], labels[i] = _decode(encoded, self.shape), label
    except Exception as error:
      if len(rows) > 1:  # the one that is damaged is to be named
        for i, row in enumerate(rows):
          self.read([row], images[i : i + 1], labels[i : i + 1])
        return  # it could be read after all
      raise DataError(
        f"{self.records.file(rows[0])} can't be read: {first_line(error)} {self.records.advice}"
      ) from error


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A dataset, in memory or streamed; a split that was not asked for is None."""

  name: str
  class_names: tuple[str, ...]
  train: Split | StreamedSplit | None = None
  validation: Split | StreamedSplit | None = None
  test: Split | StreamedSplit | None = None


# Finding and preparing ----------------------------------------------------------------------------


def resolve(data_config: ConfigDict) -> ConfigDict:
  """Makes sure that a set of TFDS is there: finds it prepared, or prepares it.

  Args:
    data_config: `config.data`; `fallback` names the dataset to use if `name` is out of reach.
  Returns:
    `data_config`, or a copy whose `name` is the fallback's; a notice on stderr says so.
  Raises:
    DataError: the dataset is broken, or out of reach with no fallback.
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
  """Prepares a set of TFDS; a folder is as it is, and `describe` says what is wrong with it."""
  if not data_config.name.startswith(_FOLDER):
    prepared.open_prepared(data_config)


def describe(data_config: ConfigDict) -> DatasetInfo:
  """Classes, image shape and split sizes; prepares the dataset if need be, but keeps no image.

  A call for all processes: of a folder, each looks at a share of the images.

  Raises:
    DataError: the dataset is out of reach, broken, or no image-classification set.
  """
  return _describe(_open(data_config), data_config)


def foresee(data_config: ConfigDict, train_images: int | None = None) -> DatasetInfo:
  """What `describe` gives, of a dataset that need not be there; nothing is downloaded or written.

  Args:
    train_images: how many train; None: as many as are on disk, or are known to be in the dataset.
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
      f"{data_config.name} is not prepared in {prepared.data_dir(data_config)}, and how many "
      "images it has is known only then: --images=N says how many train."
    )
  return _describe(source, data_config)


def move(data_config: ConfigDict, folder: str) -> None:
  """Has a dataset that has moved be looked for in `folder`: of TFDS's sets, or the images' own."""
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


def _open(data_config):
  """The dataset on disk, prepared if need be: its class names, image shape, sizes and records."""
  if data_config.name.startswith(_FOLDER):
    from train.data.folder import open_folder

    path = Path(data_config.name.removeprefix(_FOLDER)).expanduser().absolute()
    return open_folder(path, data_config.skip_broken)
  return prepared.open_prepared(data_config)


def _boxed(text):
  """The text in a frame of asterisks, 80 columns wide."""
  lines = [f"*  {line:<74}  *" for line in ("", *textwrap.wrap(text, 74), "")]
  return "\n".join(["*" * 80, *lines, "*" * 80])


# Reading ------------------------------------------------------------------------------------------


def load(
  data_config: ConfigDict, image_size: int, splits: tuple[str, ...] = SPLITS, sharers: int = 1
) -> Dataset:
  """Opens a dataset, prepared first if need be, and reads it into memory if it fits.

  Args:
    data_config: `config.data`.
    image_size: height and width in pixels to which images are resized where the dataset's differ
      in size; where all have one size, they are kept as they are.
    splits: which of "train", "validation" and "test" to open.
    sharers: processes that open it on this host at the same time, and share memory and cores.
  Raises:
    DataError: the dataset is out of reach or broken.
  """
  info = describe(data_config)
  source = _open(data_config)
  shape = info.shape_in_memory(image_size)
  workers = data_config.workers or max(1, min(cores() // 2, _MAX_WORKERS // sharers))
  opened = {
    split: StreamedSplit(source.records(data_config[f"{split}_split"]), shape, workers)
    for split in splits
  }
  needed = sum(map(len, opened.values())) * int(np.prod(shape))
  limit = data_config.in_memory_bytes
  limit = memory_limit() // 4 if limit is None else limit
  if needed * sharers <= min(limit, psutil.virtual_memory().available):
    opened = {name: _read(split) for name, split in opened.items()}
  return Dataset(info.name, info.class_names, **opened)


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
      threads.shutdown(wait=False, cancel_futures=True)  # after an error, of the others
  return Split(images, labels)


def _decode(encoded, shape) -> np.ndarray:
  """A PNG or JPEG as uint8 [H, W, C]; OpenCV takes half of Pillow's time for a small one."""
  height, width, channels = shape
  image = cv2.imdecode(np.frombuffer(encoded, np.uint8), _FLAGS[channels])
  if image is None:
    raise ValueError("an image is damaged")
  if channels == 4:  # unchanged by OpenCV, so still grey, colour or colour with alpha
    image = cv2.cvtColor(image, _TO_RGBA[image.shape[2] if image.ndim == 3 else 1])
  if image.shape[:2] != (height, width):
    image = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
  return np.asarray(image).reshape(shape)


# The command line ---------------------------------------------------------------------------------


def show(config: ConfigDict, output: str) -> None:
  """Draws validation images with their labels, and one resized and cut in patches for the model.

  Args:
    config: a whole configuration, with `model.image_size` and `model.patch_size` in pixels.
    output: the PNG file to write.
  Raises:
    DataError: the dataset is out of reach or broken.
    ValueError: the image size is no multiple of the patch size.
  """
  import matplotlib

  matplotlib.use("Agg")  # no screen needed
  from matplotlib import pyplot as plt

  size, patch = config.model.image_size, config.model.patch_size
  if size % patch:
    raise ValueError(f"--config.model.image_size={size} is no multiple of patch_size={patch}")
  data_config = resolve(config.data)
  dataset = load(data_config, size, splits=("validation",))
  images, labels = dataset.validation[np.arange(min(32, len(dataset.validation)))]
  resized = Image.fromarray(images[0].squeeze()).resize((size, size), Image.Resampling.BILINEAR)
  names = [dataset.class_names[label].replace("_", " ") for label in labels]

  figure = plt.figure(figsize=(15, 5.6), layout="constrained")
  left, right = figure.subfigures(1, 2, width_ratios=(9, 6))
  height, width, _ = images.shape[1:]
  left.suptitle(f"{dataset.name}: validation images, {height}x{width} pixels")
  for axes, image, name in zip(left.subplots(4, 8).flat, images, names, strict=False):
    axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
    axes.set_title(name, fontsize=8)
  count = (size // patch) ** 2
  right.suptitle(f"{names[0]}: resized to {size}x{size}, {count} patches of {patch}x{patch}")
  axes = right.subplots()
  axes.imshow(_cut_in_patches(np.asarray(resized), patch), cmap="gray", vmin=0, vmax=255)
  for axes in figure.axes:
    axes.axis("off")
  figure.savefig(output, dpi=120)
  plt.close(figure)


def _cut_in_patches(image, patch):
  """Moves the patches of an image [S, S, ...] apart by white gaps, a sixth of a patch wide."""
  for axis in (0, 1):
    image = np.repeat(image, 6, axis)  # so that a sixth of a patch is a whole number
    cuts = range(6 * patch, image.shape[axis], 6 * patch)
    image = np.insert(image, np.repeat(cuts, patch), 255, axis=axis)
  return image


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="python -m train.data", allow_abbrev=False)
  commands = parser.add_subparsers(dest="command", required=True)
  prepare = commands.add_parser("prepare", help="write a dataset to disk", allow_abbrev=False)
  prepare.add_argument("--name", required=True, help='dataset of TFDS, or "shapes100"')
  prepare.add_argument("--data_dir", default="", help="where to; default: $TFDS_DATA_DIR")
  prepare.add_argument("--archive", default="", help="archive on disk, instead of a download")
  samples = commands.add_parser("show", help="draw sample images and patches", allow_abbrev=False)
  samples.add_argument("--config", required=True, help=flags.CONFIG_HELP)
  samples.add_argument("--output", default="samples.png", help="PNG file to write")
  return parser


def main() -> None:
  """Runs the command line; exit status 1: no usable dataset, 2: wrong flags."""
  parser = _parser()
  arguments, unknown = parser.parse_known_args()
  try:
    if arguments.command == "show":
      arguments, config = flags.parse(parser)
      show(config, arguments.output)
      print(f"Wrote {arguments.output}")
    elif unknown:
      parser.error(f"unknown argument {unknown[0]!r}")
    else:
      dataset = prepared.open_prepared(ConfigDict(vars(arguments)))
      print(f"{arguments.name} is prepared in {dataset.folder}")
  except DataError as error:
    # `prepare` has the same flags, without the prefix.
    prefix = "--" if arguments.command == "prepare" else "--config.data."
    flags.fail(str(error).replace("--config.data.", prefix), 1)
  except (OSError, ValueError) as error:  # an output that can't be written, a wrong patch size
    flags.fail(error, 2)
