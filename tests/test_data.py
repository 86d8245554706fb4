"""Reading datasets, and the messages about datasets that can't be used."""

import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from needs import CIFAR100_DIR
from PIL import Image

from configs import default
from train import data
from train.data import decode, prepared, show
from train.errors import DataError, UnreachableError

REPOSITORY = Path(__file__).parents[1]
TEST_FILE = "shapes100-test.array_record-00000-of-00001"


def data_config(**overrides) -> ConfigDict:
  config = default.get_config().data
  config.update(overrides)
  return config


def run_cli(*arguments, **environment):
  return subprocess.run(
    [sys.executable, "-m", "train.data", *map(str, arguments)],
    cwd=REPOSITORY,
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    capture_output=True,
    text=True,
    timeout=250,
  )


def snapshot(folder):
  """Every file below a folder, with its content."""
  return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def cifar100():
  return data.load(data_config(data_dir=str(CIFAR100_DIR)), image_size=64)


@pytest.fixture
def to_damage(shapes100, tmp_path):
  """The folder of a copy of shapes100 that a test may damage."""
  folder = tmp_path / "shapes100" / "1.0.0"
  shutil.copytree(shapes100 / "shapes100" / "1.0.0", folder)
  return folder


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
  """Twelve grey and colour images of different sizes; label = index % 3."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(0, 8), "test": self._generate_examples(8, 12)}

  def _generate_examples(self, first, last):
    for index in range(first, last):
      grey = Image.fromarray(np.full((8 + index, 40 - index), 20 * index, np.uint8))
      yield index, {"image": grey if index % 2 else grey.convert("RGB"), "label": index % 3}


# Splits -------------------------------------------------------------------------------------------


@pytest.mark.needs(what="cifar100")
def test_cifar100_has_its_published_sizes_and_channel_means(cifar100):
  assert cifar100.train.images.shape == (45_000, 32, 32, 3)
  assert cifar100.validation.images.shape == (5_000, 32, 32, 3)
  assert cifar100.test.images.shape == (10_000, 32, 32, 3)
  assert cifar100.train.images.dtype == np.uint8 and cifar100.train.labels.dtype == np.int32
  both = np.concatenate([cifar100.train.images, cifar100.validation.images])
  means = both.mean(axis=(0, 1, 2)) / 255
  np.testing.assert_allclose(means, [0.50708, 0.48655, 0.44092], atol=1e-5)
  counts = np.bincount(np.concatenate([cifar100.train.labels, cifar100.validation.labels]))
  np.testing.assert_array_equal(counts, [500] * 100)
  np.testing.assert_array_equal(np.bincount(cifar100.test.labels), [100] * 100)
  assert cifar100.class_names[:3] == ("apple", "aquarium_fish", "baby")


@pytest.mark.needs(what="cifar100")
def test_train_and_validation_are_the_first_and_last_rows_on_disk(cifar100):
  builder = tfds.builder("cifar100", data_dir=CIFAR100_DIR)
  source = builder.as_data_source("train")
  for split, row, index in (("train", 0, 0), ("train", -1, 44_999), ("validation", 0, 45_000)):
    np.testing.assert_array_equal(getattr(cifar100, split).images[row], source[index]["image"])
    assert getattr(cifar100, split).labels[row] == source[index]["label"]


def test_only_the_asked_splits_are_read(shapes100):
  config = data_config(name="shapes100", data_dir=str(shapes100), test_split="test[:7]")
  dataset = data.load(config, image_size=64, splits=("test",))
  assert dataset.train is None and dataset.validation is None
  assert len(dataset.test) == 7


def test_describe_knows_sizes_and_classes_without_reading_images(shapes100, monkeypatch):
  monkeypatch.setattr(prepared, "decode", None)
  info = data.describe(data_config(name="shapes100", data_dir=str(shapes100)))
  assert info.sizes == {"train": 3_600, "validation": 400, "test": 1_000}
  assert info.image_shape == (32, 32, 3) and info.num_classes == 100


@pytest.fixture
def photos_config(tmp_path):
  TinyPhotos(data_dir=tmp_path).download_and_prepare(file_format="array_record")
  return data_config(
    name="tiny_photos",
    data_dir=str(tmp_path),
    train_split="train[:6]",
    validation_split="train[6:]",
  )


def test_images_of_all_sizes_and_modes_are_resized_to_one(photos_config):
  assert data.describe(photos_config).image_shape == (None, None, 3)
  dataset = data.load(photos_config, image_size=24)
  assert dataset.train.images.shape == (6, 24, 24, 3)
  assert dataset.class_names == ("a", "b", "c")
  together = [dataset.train, dataset.validation, dataset.test]
  shades = np.concatenate([split.images[:, 12, 12, 0] for split in together]) // 20
  labels = np.concatenate([split.labels for split in together])
  assert sorted(shades) == list(range(12))
  np.testing.assert_array_equal(labels, shades % 3)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4), ("P", 3)])
def test_png_is_decoded_to_its_very_pixels(mode, channels):
  noise = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
  image = Image.fromarray(noise).convert("RGB" if mode == "P" else "RGBA").convert(mode)
  file = io.BytesIO()
  image.save(file, "png")
  expected = np.asarray(image.convert(decode.PIL_MODES[channels])).reshape(9, 7, channels)
  decoded = decode.decode(file.getvalue(), (9, 7, channels))
  np.testing.assert_array_equal(decoded, expected)


def test_photo_is_not_turned_by_its_exif_tag():
  image = Image.fromarray(np.full((8, 16, 3), 200, np.uint8))
  exif = Image.Exif()
  exif[0x0112] = 6  # orientation: a quarter turn
  file = io.BytesIO()
  image.save(file, "jpeg", exif=exif)
  assert (decode.decode(file.getvalue(), (8, 16, 3)) == 200).all()


def test_a_split_that_is_not_there_is_named_with_those_that_are(photos_config):
  photos_config.test_split = "validation"
  with pytest.raises(DataError, match=r"test_split = 'validation'.*train \(8\), test \(4\)"):
    data.describe(photos_config)


def test_a_dataset_that_does_not_fit_is_streamed(photos_config, monkeypatch):
  assert isinstance(data.load(photos_config, image_size=24).train, data.Split)
  in_memory = data.load(photos_config, image_size=24)
  photos_config.in_memory_bytes = 12 * 24 * 24 * 3 - 1
  streamed = data.load(photos_config, image_size=24)
  for name in data.SPLITS:
    split = getattr(streamed, name)
    assert isinstance(split, data.StreamedSplit) and split.workers >= 1
    rows = np.arange(len(split))
    for streamed_part, part in zip(split[rows], getattr(in_memory, name)[rows], strict=True):
      np.testing.assert_array_equal(streamed_part, part)
  memory = type(psutil.virtual_memory())
  little = memory(**(psutil.virtual_memory()._asdict() | {"available": 2**20}))
  monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
  photos_config.in_memory_bytes = 2**40
  assert isinstance(data.load(photos_config, image_size=2000).train, data.StreamedSplit)


def test_tfrecord_says_how_to_prepare_anew(to_damage):
  info = to_damage / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(DataError, match="as tfrecord.*prepare --name shapes100 --data_dir DIR"):
    data.describe(data_config(name="shapes100", data_dir=str(to_damage.parents[1])))


def test_a_dataset_without_images_is_refused():
  with pytest.raises(DataError, match="imdb_reviews is no image-classification dataset"):
    data.describe(data_config(name="imdb_reviews"))


def test_an_unknown_dataset_is_one_line():
  with pytest.raises(DataError) as error:
    data.describe(data_config(name="cifar_1000"))
  assert str(error.value) == (
    "--config.data.name=cifar_1000 is no dataset that TFDS knows. Near names: cifar100, "
    "cifar100_n, cifar10, cifar10_n."
  )


# No network, damaged files ------------------------------------------------------------------------


def test_without_network_one_message_within_15_seconds(tmp_path):
  start = time.monotonic()
  # A proxy that does not exist gives the same error with and without a network.
  result = run_cli(
    "show", "--config", "configs/mixer.py", TFDS_DATA_DIR=str(tmp_path), https_proxy="127.0.0.1:9"
  )
  assert time.monotonic() - start < 15
  assert result.returncode == 1 and result.stdout == ""
  lines = result.stderr.splitlines()
  assert len(lines) == 5
  assert str(tmp_path) in lines[0] and "https://www.cs.toronto.edu/~kriz" in lines[0]
  for line, flag in zip(lines[2:], ("data_dir=", "archive=", "name=shapes100"), strict=True):
    assert f"--config.data.{flag}" in line


def test_a_silent_host_is_given_up(tmp_path, monkeypatch):
  monkeypatch.setattr(requests, "get", lambda *_, **__: time.sleep(5))
  builder = prepared._builder("cifar100", tmp_path)
  with pytest.raises(UnreachableError, match="no answer within 0.2 seconds"):
    prepared._require_reachable(builder, data_config(data_dir=str(tmp_path)), timeout=0.2)


def test_fallback_replaces_what_is_out_of_reach_and_says_so(photos_config, monkeypatch, capsys):
  monkeypatch.setenv("https_proxy", "127.0.0.1:9")
  photos_config.name, photos_config.fallback = "cifar100", "tiny_photos"
  assert data.resolve(photos_config).name == "tiny_photos"
  notice = capsys.readouterr().err.splitlines()
  assert {len(line) for line in notice} == {80}
  assert "NOT TRAINING ON CIFAR100" in notice[2]
  assert photos_config.name == "cifar100"


def test_no_fallback_for_what_is_damaged(photos_config):
  photos_config.fallback = "shapes100"
  (Path(photos_config.data_dir) / "tiny_photos" / "1.0.0" / "dataset_info.json").unlink()
  with pytest.raises(DataError, match="half-written"):
    data.resolve(photos_config)


def flip_a_byte(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0xFF
  path.write_bytes(content)


DAMAGES = {
  "truncated": (TEST_FILE, lambda path: os.truncate(path, path.stat().st_size // 2)),
  "flipped byte": (TEST_FILE, flip_a_byte),
  "empty": (TEST_FILE, lambda path: os.truncate(path, 0)),
  "missing shard": (TEST_FILE, Path.unlink),
  "unreadable info": ("dataset_info.json", lambda path: path.write_text('{"name": "cif')),
  "missing info": ("dataset_info.json", Path.unlink),
  "damaged names": ("label.labels.txt", lambda path: path.write_bytes(b"\xff\xfe\n" * 100)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_data_is_named_and_nothing_deleted(to_damage, damage):
  name, spoil = DAMAGES[damage]
  spoil(to_damage / name)
  before = snapshot(to_damage)
  with pytest.raises(DataError) as error:
    config = data_config(name="shapes100", data_dir=str(to_damage.parents[1]))
    data.load(config, image_size=64, splits=("test",))
  assert name in str(error.value) and str(to_damage) in str(error.value)
  assert "Nothing was deleted" in str(error.value)
  assert snapshot(to_damage) == before


def test_a_bad_png_names_its_file(tmp_path, monkeypatch):
  good = TinyPhotos._generate_examples

  def with_a_bad_one(self, first, last):
    for index, example in good(self, first, last):
      yield index, example | ({"image": b"\x89PNG\r\n\x1a\nnonsense"} if index == 9 else {})

  monkeypatch.setattr(TinyPhotos, "_generate_examples", with_a_bad_one)
  TinyPhotos(data_dir=tmp_path).download_and_prepare(file_format="array_record")
  config = data_config(name="tiny_photos", data_dir=str(tmp_path))
  with pytest.raises(DataError, match="tiny_photos-test.array_record-00000-of-00001 can't be"):
    data.load(config, image_size=24, splits=("test",))


def test_leftovers_of_a_killed_preparation_stay_and_do_not_disturb(tmp_path, monkeypatch):
  leftover = tmp_path / "tiny_photos" / "incomplete.ABCDEF_1.0.0" / "half.array_record"
  leftover.parent.mkdir(parents=True)
  leftover.write_bytes(b"half")
  config = data_config(name="tiny_photos", data_dir=str(tmp_path), train_split="train")
  assert len(data.load(config, image_size=8, splits=("train",)).train) == 8
  assert leftover.read_bytes() == b"half"


# The command line ---------------------------------------------------------------------------------


def test_show_draws_samples_and_patches(shapes100, tmp_path):
  output = tmp_path / "samples.png"
  flags = ("--config.data.name=shapes100", f"--config.data.data_dir={shapes100}")
  flags += ("--config.model.patch_size=16",)
  result = run_cli("show", "--config", "configs/mixer.py", *flags, "--output", output)
  assert (result.returncode, result.stderr) == (0, "")
  assert result.stdout == f"Wrote {output}\n"
  with Image.open(output) as image:
    assert image.format == "PNG" and image.size == (1800, 672)
    assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 5_000  # noisy images, not blank


def test_show_draws_a_streamed_set(shapes100, tmp_path):
  flags = ("--config.data.name=shapes100", f"--config.data.data_dir={shapes100}")
  flags += ("--config.data.in_memory_bytes=0",)
  result = run_cli("show", "--config", "configs/mixer.py", *flags, "--output", tmp_path / "a.png")
  assert (result.returncode, result.stderr) == (0, "")


def test_patches_are_moved_apart_and_kept_whole():
  image = np.arange(16, dtype=np.uint8).reshape(4, 4)
  cut = show._cut_in_patches(image, patch=2)
  assert cut.shape == (26, 26)
  assert (cut[12:14] == 255).all() and (cut[:, 12:14] == 255).all()
  np.testing.assert_array_equal(
    np.delete(np.delete(cut, [12, 13], 0), [12, 13], 1)[::6, ::6], image
  )


@pytest.mark.parametrize(
  "arguments, complaint",
  [
    (("prepare",), "--name"),
    (("prepare", "--name", "cifar100", "--datadir", "x"), "--datadir"),
    (("show", "--config", "configs/nix.py"), "configs/nix.py"),
    (("show", "--config", "configs/mixer.py", "--config.data.nam=x"), "data.name"),
    (("show", "--config", "configs/mixer.py", "--config.model.patch_size=7"), "not a multiple"),
  ],
)
def test_wrong_flags_are_one_line_and_status_2(arguments, complaint):
  result = run_cli(*arguments)
  assert result.returncode == 2
  assert complaint in result.stderr.splitlines()[-1]
  assert "Traceback" not in result.stderr
