"""TFDS datasets: finds them on disk, or prepares them as ArrayRecord without TensorFlow."""

import contextlib
import functools
import io
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from train.data import names
from train.data.decode import decode
from train.data.framing import Framing
from train.errors import DataError, UnreachableError, first_line

_NOTHING_DELETED = (
  "Nothing was deleted. Move the folder away to have the dataset prepared anew, or choose another "
  "with --config.data.data_dir."
)
_EMBEDDED = "shapes100"  # the embedded dataset: drawn on the spot, needs no network
# Numbers of images from TFDS's catalog, to plan for datasets that are not on disk yet: TFDS itself
# knows them for prepared datasets only.
_SIZES = {
  "cifar10": {"train": 50_000, "test": 10_000},
  "cifar100": {"train": 50_000, "test": 10_000},
  "shapes100": {"train": 50_000, "test": 10_000},
  "imagenet2012": {"train": 1_281_167, "validation": 50_000, "test": 100_000},
}


class TfdsSet:
  """A TFDS dataset, prepared or not yet.

  folder: where it is, or will be.
  class_names: in the order of the labels.
  image_shape: H, W and C; None where images differ in size.
  sizes: images in each split; {} if they are unknown before the dataset is prepared.
  """

  def __init__(self, builder, splits):
    self._splits, self.folder = splits, Path(builder.data_path)
    self.class_names = _class_names(builder)
    *size, channels = builder.info.features["image"].shape
    self.image_shape = (*size, channels or 3)
    self.sizes = {name: split.num_examples for name, split in self._splits.items()}
    self.names = self.usual_names = list(self.sizes)

  def size(self, name: str) -> int:
    """Images in a split; 0 if there is none of this name."""
    return self.sizes.get(name, 0)

  def has_labels(self, name: str) -> bool:
    """False if a split's first label is a placeholder; True if it can't be read now."""
    try:
      return not self.folder.exists() or self.records(name).labels([0])[0] >= 0
    except Exception:  # no such split, or a damaged file, which is named when it is read
      return True

  def records(self, instruction: str, limit: int | None = None) -> "Records":
    """The records of a split, or of a part of it.

    Args:
      instruction: in TFDS's notation, such as "train[:90%]".
      limit: the most records.
    Raises:
      KeyError, ValueError, AssertionError: there is no such split.
    """
    return Records(self._splits[instruction].file_instructions, limit)


class Records:
  """Images of a split in ArrayRecord files, and their labels, by index."""

  are_silent = False
  advice = _NOTHING_DELETED  # if a record can't be read

  def __init__(self, files: Sequence, limit: int | None = None):
    """
    Args:
      files: TFDS's file instructions, each a file and a range of its records.
      limit: the most records.
    """
    self._files = files
    lengths = [f.examples_in_shard - f.skip if f.take == -1 else f.take for f in files]
    self._ends = np.cumsum(lengths)
    whole = int(self._ends[-1]) if len(self._ends) else 0
    self._length = whole if limit is None else min(whole, limit)

  def __len__(self):
    return self._length

  @functools.cached_property
  def _source(self):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource(self._files)

  def __getstate__(self):  # for worker processes, which open the files themselves
    return {key: value for key, value in vars(self).items() if key != "_source"}

  def read(
    self, rows: Sequence[int] | np.ndarray, shape: tuple[int, int, int], framing: Framing
  ) -> Iterator[tuple[np.ndarray, int]]:
    """Yields image (uint8 of `shape`, H, W and C) and label of some rows."""
    for feature in self._features(rows):
      label = feature["label"].int64_list.value[0]
      yield decode(feature["image"].bytes_list.value[0], shape, framing), label

  def labels(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Labels of some rows, int64, without a look at the images."""
    return np.array([f["label"].int64_list.value[0] for f in self._features(rows)], np.int64)

  def _features(self, rows):
    from tensorflow_datasets.proto import tf_example_pb2

    for record in self._source.__getitems__(rows):
      # Faster than TFDS's own features.deserialize_example_np.
      yield tf_example_pb2.Example.FromString(record).features.feature

  def file(self, row: int) -> str:
    """The file that holds a record."""
    return self._files[int(np.searchsorted(self._ends, row, side="right"))].filename


def open_prepared(data_config: ConfigDict) -> TfdsSet:
  """A dataset on disk as ArrayRecord, downloaded or drawn first if needed.

  Args:
    data_config: `config.data`, or its `name`, `data_dir` and `archive`.
  Raises:
    DataError: the dataset is unavailable, broken, or not an image-classification set.
  """
  builder = _prepared_builder(data_config)
  return TfdsSet(builder, builder.info.splits)


def foresee(data_config: ConfigDict) -> TfdsSet:
  """A dataset that may not be on disk; nothing is downloaded or written.

  Raises:
    DataError: TFDS does not know the dataset, or what is on disk is broken.
  """
  builder = _image_builder(data_config)
  if Path(builder.data_path).exists():
    return open_prepared(data_config)
  return TfdsSet(builder, _splits_to_come(builder))


def _splits_to_come(builder):
  """The splits that a dataset will have once it is prepared, if their sizes are known."""
  import tensorflow_datasets as tfds

  splits = []
  for name, size in _SIZES.get(builder.name, {}).items():
    template = tfds.core.ShardedFileTemplate(  # no such file, but TFDS needs it to slice a split
      data_dir=builder.data_path,
      dataset_name=builder.name,
      split=name,
      filetype_suffix="array_record",
    )
    splits.append(
      tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0, filename_template=template)
    )
  return tfds.core.splits.SplitDict(splits)


def _class_names(builder):
  """Names from disk, or numbers if there are none. TFDS does not notice a damaged file."""
  label = builder.info.features["label"]
  path = Path(label.get_names_filepath(builder.data_path, "label"))
  if not path.exists():
    return tuple(label.names)
  lines = path.read_text(errors="replace").split("\n")
  names = tuple(line.strip() for line in lines if line.strip())
  if len(set(names)) != label.num_classes:
    raise DataError(
      f"{path} is damaged: {len(set(names))} names for {label.num_classes} classes. "
      f"{_NOTHING_DELETED}"
    )
  return names


def _image_builder(data_config):
  """The TFDS builder of an image-classification set; nothing is prepared yet."""
  builder = _builder(data_config.name, data_dir(data_config))
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
  """A TFDS builder whose data is on disk as ArrayRecord; downloads or draws the data if needed."""
  builder = _image_builder(data_config)
  folder = Path(builder.data_path)
  if not folder.exists():
    _prepare(builder, data_config)
  elif not builder.is_prepared():
    raise DataError(f"{folder} is half-written: it has no dataset_info.json. {_NOTHING_DELETED}")
  if builder.info.file_format.value != "array_record":
    raise DataError(
      f"{folder} is prepared as {builder.info.file_format.value}, which can't be read by index. "
      "Prepare it as ArrayRecord in another folder: "
      f"python -m train.data prepare --name {data_config.name} --data_dir DIR"
    )
  return builder


def data_dir(data_config: ConfigDict) -> Path:
  """Where TFDS keeps its datasets."""
  chosen = data_config.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  path = Path(os.path.expanduser(chosen))
  if path.parts[0].startswith("~"):
    raise DataError(f"{chosen}: there is no home folder: give --config.data.data_dir=DIR")
  return path.absolute()


def _builder(name, data_dir):
  """The TFDS builder of a dataset, ours where we have one; nothing is prepared yet."""
  import tensorflow_datasets as tfds  # late: slow to import

  from train.data.cifar import Cifar10, Cifar100
  from train.data.shapes100 import Shapes100

  ours = {"cifar10": Cifar10, "cifar100": Cifar100, "shapes100": Shapes100}
  try:
    if name in ours:
      return ours[name](data_dir=data_dir)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints that it wants TensorFlow
      return tfds.builder(name, data_dir=data_dir)
  except ModuleNotFoundError as error:
    raise DataError(f"TFDS's code for {name} needs a package: {first_line(error)}") from error
  except Exception as error:
    path = data_dir / name.split(":")[0]
    if problem := names.problem(name, ours, path.exists()):
      raise DataError(problem) from None
    if not path.exists():
      raise DataError(f"--config.data.name={name}: {first_line(error)}") from None
    path = _damaged_json(path)
    raise DataError(f"{path} can't be read: {first_line(error)} {_NOTHING_DELETED}") from error


def _damaged_json(folder):
  """The first file below a dataset's folder that is not valid JSON; the folder if all are."""
  for path in sorted(folder.rglob("*.json")):
    try:
      json.loads(path.read_bytes())
    except ValueError:
      return path
  return folder


def _prepare(builder, data_config):
  """Lets TFDS write the dataset to disk, atomically, from its archive or URL."""
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
      f"{first_line(error)} Prepare it on a machine that has the package, with "
      f'builder.download_and_prepare(file_format="array_record"), copied to {builder.data_path}.'
    ) from error
  except (requests.RequestException, NonMatchingChecksumError) as error:
    # A download that broke off, or a proxy's page instead of the archive.
    raise _unreachable(builder, data_config, first_line(error)) from error
  except Exception as error:
    raise DataError(f"{builder.name} could not be prepared: {first_line(error)}") from error


def _use_archive(builder, data_config):
  """Makes the builder read the archive on disk, after a check of its size and sha256."""
  from tensorflow_datasets.core.download import checksums

  archive = Path(os.path.expanduser(data_config.archive))
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
  """Raises if the dataset's host does not answer: TFDS would retry for over three minutes."""
  import requests  # late, as TFDS: slow to import

  url = next(iter(builder.url_infos or ()), None)
  if url is None:  # drawn on the spot, or unknown
    return
  answer = [f"no answer within {timeout} seconds"]

  def ask():
    try:
      # As TFDS downloads: with the same certificates and proxies.
      with requests.get(url, stream=True, timeout=timeout) as response:
        response.raise_for_status()
      answer[0] = ""
    except Exception as error:
      cause = getattr(error.args[0] if error.args else error, "reason", error)
      answer[0] = first_line(cause).rstrip(".")

  thread = threading.Thread(target=ask, daemon=True)  # a DNS lookup has no timeout
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
    f"{builder.name} is not prepared in {data_dir(data_config)}, and {reason}\n"
    "Three ways out:\n  " + "\n  ".join(ways_out)
  )
