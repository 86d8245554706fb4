"""Datasets: found or prepared on disk, and read.

    python -m train.data prepare --name cifar100 [--data_dir DIR] [--archive FILE]
    python -m train.data show --config configs/mixer.py [--config.KEY=VALUE] [--output FILE.png]

Any TFDS image-classification set (features `image` and `label`), prepared as ArrayRecord and read
without TensorFlow, or an image folder. What fits is kept in memory, the rest is streamed.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import os
import sys
import textwrap
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import psutil
from ml_collections import ConfigDict
from PIL import Image

from train import flags

SPLITS = ("train", "validation", "test")
_EMBEDDED = "shapes100"  # the embedded dataset: drawn on the spot, needs no network
_NOTHING_DELETED = (
  "Nothing was deleted. Move the folder away to have the dataset prepared anew, or choose another "
  "with --config.data.data_dir."
)
CHUNK = 1024  # images that a thread reads at a time
_FOLDER = "folder:"  # in front of the path of an image folder
_MAX_WORKERS = 16
# Images of sets that are often planned for before they are there, from TFDS's catalog: TFDS itself
# knows sizes of prepared sets only.
_SIZES = {
  "cifar10": {"train": 50_000, "test": 10_000},
  "cifar100": {"train": 50_000, "test": 10_000},
  "shapes100": {"train": 50_000, "test": 10_000},
  "imagenet2012": {"train": 1_281_167, "validation": 50_000, "test": 100_000},
}
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
_FLAGS = {  # of cv2.imdecode, by number of channels; photos are not turned, as in TFDS
  1: cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION,
  3: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
  4: cv2.IMREAD_UNCHANGED,
}
_TO_RGBA = {1: cv2.COLOR_GRAY2RGBA, 3: cv2.COLOR_BGR2RGBA, 4: cv2.COLOR_BGRA2RGBA}


class DataError(Exception):
  """A dataset can't be used. The message is the complete text for the user."""


class UnreachableError(DataError):
  """The dataset is not on disk and can't be downloaded now."""


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

  records: "_Records"  # or an image folder's
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
        f"{self.records.file(rows[0])} can't be read: {_first_line(error)} {_NOTHING_DELETED}"
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
  """Makes sure that a dataset is there: finds it prepared, or prepares it.

  Args:
    data_config: `config.data`; `fallback` names the dataset to use if `name` is out of reach.
  Returns:
    `data_config`, or a copy whose `name` is the fallback's; a notice on stderr says so.
  Raises:
    DataError: the dataset is broken, or out of reach with no fallback.
  """
  try:
    _open(data_config)
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
  _prepared_builder(data_config)
  return data_config


def describe(data_config: ConfigDict) -> DatasetInfo:
  """Classes, image shape and split sizes; prepares the dataset if need be, but reads no image.

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
  builder = _image_builder(data_config)
  if train_images:
    source = _TfdsSet(builder, {})
    sizes = {"train": train_images}
    return DatasetInfo(data_config.name, source.class_names, source.image_shape, sizes)
  if Path(builder.data_path).exists():
    return describe(data_config)
  if builder.name not in _SIZES:
    raise DataError(
      f"{builder.name} is not prepared in {_data_dir(data_config)}, and how many images it has is "
      "known only then: --images=N says how many train."
    )
  return _describe(_TfdsSet(builder, _splits_to_come(builder)), data_config)


def _splits_to_come(builder):
  """The splits that a dataset of _SIZES will have once it is prepared, as TFDS describes them."""
  import tensorflow_datasets as tfds

  splits = []
  for name, size in _SIZES[builder.name].items():
    template = tfds.core.ShardedFileTemplate(  # of no file: TFDS cuts no split without
      data_dir=builder.data_path,
      dataset_name=builder.name,
      split=name,
      filetype_suffix="array_record",
    )
    splits.append(
      tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0, filename_template=template)
    )
  return tfds.core.splits.SplitDict(splits)


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
    from train.datasets.folder import open_folder

    path = Path(data_config.name.removeprefix(_FOLDER)).expanduser().absolute()
    return open_folder(path, data_config.skip_broken)
  builder = _prepared_builder(data_config)
  return _TfdsSet(builder, builder.info.splits)


class _TfdsSet:
  """A dataset of TFDS, prepared or to come."""

  def __init__(self, builder, splits):
    self._splits = splits
    self.class_names = _class_names(builder)
    height, width, channels = builder.info.features["image"].shape
    self.image_shape = (height, width, channels or 3)
    self.sizes = {name: split.num_examples for name, split in self._splits.items()}

  def records(self, instruction):
    return _Records(self._splits[instruction].file_instructions)


class _Records:
  """Encoded images and their labels, by index: those of a split in ArrayRecord files."""

  def __init__(self, files):
    self._files = files
    lengths = [f.examples_in_shard - f.skip if f.take == -1 else f.take for f in files]
    self._ends = np.cumsum(lengths)

  def __len__(self):
    return int(self._ends[-1]) if len(self._ends) else 0

  @functools.cached_property
  def _source(self):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource(self._files)

  def __getstate__(self):  # for worker processes, which open the files themselves
    return {key: value for key, value in vars(self).items() if key != "_source"}

  def read(self, rows):
    from tensorflow_datasets.proto import tf_example_pb2

    records = []
    for record in self._source.__getitems__(rows):
      # TFDS's own features.deserialize_example_np takes three times as long.
      feature = tf_example_pb2.Example.FromString(record).features.feature
      label = feature["label"].int64_list.value[0]
      records.append((feature["image"].bytes_list.value[0], label))
    return records

  def file(self, row):
    return self._files[np.searchsorted(self._ends, row, side="right")].filename


def _class_names(builder):
  """Names from disk; numbers where the dataset has none. TFDS reads over a damaged file."""
  label = builder.info.features["label"]
  path = Path(label.get_names_filepath(builder.data_path, "label"))
  if not path.exists():
    return tuple(label.names)
  names = path.read_text(errors="replace").split("\n")
  names = tuple(name.strip() for name in names if name.strip())
  if len(set(names)) != label.num_classes:
    raise DataError(
      f"{path} is damaged: {len(set(names))} names for {label.num_classes} classes. "
      f"{_NOTHING_DELETED}"
    )
  return names


def _image_builder(data_config):
  """The TFDS builder of an image-classification set; nothing is prepared yet."""
  builder = _builder(data_config.name, _data_dir(data_config))
  features = builder.info.features
  if not {"image", "label"} <= set(features) or not hasattr(features["label"], "num_classes"):
    raise DataError(
      f"{builder.name} is no image-classification dataset: it needs the features image and label, "
      f"and has {', '.join(features)}."
    )
  if features["image"].np_dtype != np.uint8:
    raise DataError(f"{builder.name} has {features['image'].np_dtype} images: only uint8 is read.")
  return builder


def _prepared_builder(data_config):
  """A TFDS builder whose data is on disk as ArrayRecord; downloads or draws the data if need be."""
  builder = _image_builder(data_config)
  folder = Path(builder.data_path)
  if not folder.exists():
    _prepare(builder, data_config)
  elif not builder.is_prepared():
    raise DataError(f"{folder} is half-written: it has no dataset_info.json. {_NOTHING_DELETED}")
  if builder.info.file_format.value != "array_record":
    raise DataError(
      f"{folder} is prepared as {builder.info.file_format.value}, which can't be read by index. "
      f"Prepare it as ArrayRecord in another folder: "
      f"python -m train.data prepare --name {data_config.name} --data_dir DIR"
    )
  return builder


def _data_dir(data_config) -> Path:
  """Where TFDS keeps its datasets."""
  default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return Path(data_config.data_dir or default).expanduser().absolute()


def _builder(name, data_dir):
  """The TFDS builder of a dataset, ours where we have one; nothing is prepared yet."""
  import tensorflow_datasets as tfds  # imported late: half a second

  from train.datasets import cifar, shapes100

  ours = {
    "cifar10": cifar.Cifar10,
    "cifar100": cifar.Cifar100,
    "shapes100": shapes100.Shapes100,
  }
  try:
    if name in ours:
      return ours[name](data_dir=data_dir)
    with contextlib.redirect_stdout(io.StringIO()):  # where TFDS asks for TensorFlow
      return tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    raise DataError(f"--config.data.name={name} is no dataset that TFDS knows.") from None
  except ModuleNotFoundError as error:
    raise DataError(f"TFDS's code for {name} needs a package: {_first_line(error)}") from error
  except Exception as error:
    path = _damaged_json(data_dir / name.split(":")[0])
    raise DataError(f"{path} can't be read: {_first_line(error)} {_NOTHING_DELETED}") from error


def _damaged_json(folder):
  """The file that is no JSON, below a dataset's folder; the folder if there is none."""
  for path in sorted(folder.rglob("*.json")):
    try:
      json.loads(path.read_bytes())
    except ValueError:
      return path
  return folder


def _prepare(builder, data_config):
  """Has TFDS write the dataset to disk, from its archive or URL. TFDS does so atomically."""
  import requests
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

  if data_config.archive:
    _use_archive(builder, data_config)
  else:
    _require_reachable(builder, data_config)
  print(f"Preparing {builder.name} in {builder.data_path}", file=sys.stderr, flush=True)
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces each stage
      builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      )
  except ModuleNotFoundError as error:
    raise DataError(
      f"TFDS prepares {builder.name} with a package that is not installed here: "
      f"{_first_line(error)} Prepare it where there is one, with "
      f'builder.download_and_prepare(file_format="array_record"), and copy the result to '
      f"{builder.data_path}."
    ) from error
  except (requests.RequestException, NonMatchingChecksumError) as error:
    # A download that broke off, or a proxy's page instead of the archive.
    raise _unreachable(builder, data_config, _first_line(error)) from error
  except Exception as error:
    raise DataError(f"{builder.name} could not be prepared: {_first_line(error)}") from error


def _use_archive(builder, data_config):
  """Has the builder read the archive on disk, after a look at its checksum."""
  from tensorflow_datasets.core.download import checksums

  archive = Path(data_config.archive).expanduser()
  if not hasattr(builder, "archive"):
    raise DataError(f"Only cifar10 and cifar100 are prepared from an archive, not {builder.name}.")
  if not archive.is_file():
    raise DataError(f"--config.data.archive={archive} is no file.")
  (expected,) = builder.url_infos.values()
  found = checksums.compute_url_info(archive)
  if (found.size, found.checksum) != (expected.size, expected.checksum):
    raise DataError(
      f"{archive} is not {expected.filename} as published, or damaged.\n"
      f"  expected {expected.size:,} bytes, sha256 {expected.checksum}\n"
      f"  found    {found.size:,} bytes, sha256 {found.checksum}"
    )
  builder.archive = str(archive)


def _require_reachable(builder, data_config, timeout=8):
  """Raises if the dataset's host does not answer: TFDS would try again for over three minutes."""
  url = next(iter(builder.url_infos or ()), None)
  if url is None:  # drawn on the spot, or not known beforehand
    return
  answer = [f"no answer within {timeout} seconds"]

  def ask():
    try:
      with urllib.request.urlopen(url, timeout=timeout):  # through the proxies of the environment
        answer[0] = ""
    except Exception as error:
      answer[0] = str(getattr(error, "reason", error))

  thread = threading.Thread(target=ask, daemon=True)  # looking up a name knows no timeout
  thread.start()
  thread.join(timeout)
  if answer[0]:
    raise _unreachable(builder, data_config, f"{url} can't be reached ({answer[0]}).")


def _unreachable(builder, data_config, reason) -> UnreachableError:
  ways_out = (
    "a folder with it, from TFDS:  --config.data.data_dir=DIR (or TFDS_DATA_DIR=DIR)",
    "its archive, if on disk:      --config.data.archive=FILE (cifar10, cifar100)",
    f"the embedded dataset:         --config.data.name={_EMBEDDED}",
  )
  return UnreachableError(
    f"{builder.name} is not prepared in {_data_dir(data_config)}, and {reason}\n"
    "Three ways out:\n  " + "\n  ".join(ways_out)
  )


def _first_line(error):
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0].rstrip(".") + "."


def _boxed(text):
  """The text in a frame of asterisks, 80 columns wide."""
  lines = [f"*  {line:<74}  *" for line in ("", *textwrap.wrap(text, 74), "")]
  return "\n".join(["*" * 80, *lines, "*" * 80])


# Reading ------------------------------------------------------------------------------------------


def load(data_config: ConfigDict, image_size: int, splits: tuple[str, ...] = SPLITS) -> Dataset:
  """Opens a dataset, prepared first if need be, and reads it into memory if it fits.

  Args:
    data_config: `config.data`.
    image_size: height and width in pixels to which images are resized where the dataset's differ
      in size; where all have one size, they are kept as they are.
    splits: which of "train", "validation" and "test" to open.
  Raises:
    DataError: the dataset is out of reach or broken.
  """
  info = describe(data_config)
  source = _open(data_config)
  shape = info.shape_in_memory(image_size)
  cores = os.cpu_count() or 1
  workers = data_config.workers or max(1, min(cores // 2, _MAX_WORKERS))
  opened = {
    split: StreamedSplit(source.records(data_config[f"{split}_split"]), shape, workers)
    for split in splits
  }
  needed = sum(map(len, opened.values())) * int(np.prod(shape))
  memory = psutil.virtual_memory()
  limit = data_config.in_memory_bytes
  limit = memory.total // 4 if limit is None else limit
  if needed <= min(limit, memory.available):
    opened = {name: _read(split) for name, split in opened.items()}
  return Dataset(info.name, info.class_names, **opened)


def _read(streamed: StreamedSplit) -> Split:
  """Decodes a split in threads: ArrayRecord and OpenCV release Python's lock while they work."""
  images = np.empty((len(streamed), *streamed.shape), np.uint8)
  labels = np.empty(len(streamed), np.int32)
  with concurrent.futures.ThreadPoolExecutor() as threads:
    chunks = []
    for start in range(0, len(streamed), CHUNK):
      part = slice(start, start + CHUNK)
      rows = range(start, min(start + CHUNK, len(streamed)))
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
      folder = _prepared_builder(ConfigDict(vars(arguments))).data_path
      print(f"{arguments.name} is prepared in {folder}")
  except DataError as error:
    # `prepare` has the same flags, without the prefix.
    prefix = "--" if arguments.command == "prepare" else "--config.data."
    flags.fail(str(error).replace("--config.data.", prefix), 1)
  except (OSError, ValueError) as error:  # an output that can't be written, a wrong patch size
    flags.fail(error, 2)


if __name__ == "__main__":
  main()
