"""The datasets with our own builders: CIFAR from its archive, and the embedded one."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from needs import CIFAR100_DIR
from tensorflow_datasets.core.download import checksums, extractor
from test_data import data_config, run_cli, snapshot

from train import data
from train.data import prepared, shapes100
from train.errors import DataError

URL = "https://www.cs.toronto.edu/~kriz/cifar-{}-binary.tar.gz"


def write_archive(path, files):
  with tarfile.open(path, "w:gz", compresslevel=1) as tar:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))


def to_binary(labels, images):
  """Images in CIFAR's binary layout: 1 or 2 label bytes, then the planes, of each image."""
  planes = np.asarray(images).transpose(0, 3, 1, 2).reshape(len(images), -1)
  return np.concatenate([np.asarray(labels, np.uint8), planes], axis=1).tobytes()


def random_images(n, seed):
  return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), np.uint8)


def names(kind, n):
  return "".join(f"{kind}_{index}\n" for index in range(n)).encode() + b"\n"


def take_for_published(path, classes, monkeypatch):
  """Replaces the published checksum in TFDS's records by that of the archive at `path`."""
  recorded = checksums.get_all_url_infos()  # cached: all callers get this dictionary
  monkeypatch.setitem(recorded, URL.format(classes), checksums.compute_url_info(path))


@pytest.fixture
def archive(tmp_path, monkeypatch):
  """A small archive in CIFAR-100's layout, accepted as the published one, and its images."""
  images = {"train": random_images(40, 0), "test": random_images(20, 1)}
  files = {
    f"cifar-100-binary/{split}.bin": to_binary(
      [(index % 20, index % 100) for index in range(len(images[split]))], images[split]
    )
    for split in images
  }
  files["cifar-100-binary/coarse_label_names.txt"] = names("coarse", 20)
  files["cifar-100-binary/fine_label_names.txt"] = names("fine", 100)
  path = tmp_path / "my-download.tar.gz"
  write_archive(path, files)
  take_for_published(path, 100, monkeypatch)
  return path, images


def test_cifar100_from_an_archive_on_disk(archive, tmp_path):
  path, images = archive
  config = data_config(data_dir=str(tmp_path / "tfds"), archive=str(path), train_split="train")
  config.validation_split = "test"
  dataset = data.load(config, image_size=64)
  for split in ("train", "test"):
    read = getattr(dataset, split)
    order = read.labels  # each label comes once
    np.testing.assert_array_equal(read.images, images[split][order])
  assert dataset.class_names == tuple(f"fine_{index}" for index in range(100))


def test_what_is_prepared_is_read_by_tfds_as_its_own(archive, tmp_path):
  path, images = archive
  data.describe(data_config(data_dir=str(tmp_path), archive=str(path)))
  builder = tfds.builder("cifar100:3.0.2", data_dir=tmp_path)
  assert builder.info.file_format.value == "array_record"
  example = builder.as_data_source("train")[7]
  number = int(example["id"].decode().removeprefix("train_"))
  assert (example["label"], example["coarse_label"]) == (number, number % 20)
  np.testing.assert_array_equal(example["image"], images["train"][number])


def test_an_archive_with_another_checksum_is_refused(archive, tmp_path):
  path, _ = archive
  expected = checksums.compute_url_info(path).checksum
  path.write_bytes(path.read_bytes() + b"x")
  before = snapshot(tmp_path)
  with pytest.raises(DataError) as error:
    data.describe(data_config(data_dir=str(tmp_path / "tfds"), archive=str(path)))
  found = hashlib.sha256(path.read_bytes()).hexdigest()
  assert all(word in str(error.value) for word in (str(path), expected, found))
  assert snapshot(tmp_path) == before


def test_an_archive_cannot_write_beside_its_folder(archive, tmp_path, monkeypatch):
  """Ours is not extracted, but read by name; TFDS's extractor leaves out such members."""
  path, images = archive
  with tarfile.open(path) as tar:
    files = {member.name: tar.extractfile(member).read() for member in tar}
  outside = {"../../evil": b"x", str(tmp_path / "evil"): b"x", "a/../../evil": b"x"}
  write_archive(path, files | outside)
  take_for_published(path, 100, monkeypatch)
  (tmp_path / "deep" / "er").mkdir(parents=True)
  config = data_config(data_dir=str(tmp_path / "deep" / "er"), archive=str(path))
  assert data.describe(config).sizes["test"] == 20
  assert not list(tmp_path.rglob("evil*"))
  with open(path, "rb") as file:
    assert {name for name, _ in extractor.iter_tar(file)} == files.keys()


def test_a_broken_archive_leaves_no_half_dataset(archive, tmp_path, monkeypatch):
  path, _ = archive
  path.write_bytes(path.read_bytes()[:9000])
  take_for_published(path, 100, monkeypatch)
  with pytest.raises(DataError, match="cifar100 could not be prepared"):
    data.describe(data_config(data_dir=str(tmp_path / "tfds"), archive=str(path)))
  assert not list((tmp_path / "tfds" / "cifar100").glob("*"))


def test_checksums_are_those_tfds_has_on_record(tmp_path):
  for name, size in (("cifar100", 168_513_733), ("cifar10", 170_052_171)):
    ((url, recorded),) = prepared._builder(name, tmp_path).url_infos.items()
    assert (url, recorded.size) == (URL.format(name.removeprefix("cifar")), size)


def test_only_cifar_is_prepared_from_an_archive(archive, tmp_path):
  config = data_config(name="shapes100", data_dir=str(tmp_path / "x"), archive=str(archive[0]))
  with pytest.raises(DataError, match="Only cifar10 and cifar100"):
    data.describe(config)


def test_cifar10_from_an_archive_on_disk(tmp_path, monkeypatch):
  images = random_images(60, 2)
  parts = {f"data_batch_{part}.bin": slice(10 * part - 10, 10 * part) for part in range(1, 6)}
  parts["test_batch.bin"] = slice(50, 60)
  labels = np.arange(60)[:, None] % 10
  files = {
    f"cifar-10-batches-bin/{name}": to_binary(labels[part], images[part])
    for name, part in parts.items()
  }
  files["cifar-10-batches-bin/batches.meta.txt"] = names("class", 10)
  path = tmp_path / "cifar-10-binary.tar.gz"
  write_archive(path, files)
  take_for_published(path, 10, monkeypatch)
  config = data_config(name="cifar10", data_dir=str(tmp_path), archive=str(path))
  dataset = data.load(config, image_size=64)
  assert dataset.class_names == tuple(f"class_{index}" for index in range(10))
  np.testing.assert_array_equal(dataset.test.images, images[50:][dataset.test.labels])
  assert len(dataset.train) + len(dataset.validation) == 50


@pytest.mark.needs(what="cifar100")
def test_real_cifar100_survives_the_way_through_an_archive(tmp_path, monkeypatch):
  """Packs the real test split as published and prepares it: each class keeps its images."""
  source = tfds.builder("cifar100", data_dir=CIFAR100_DIR).as_data_source("test")
  examples = [source[index] for index in range(1000)]
  binary = to_binary(
    [(example["coarse_label"], example["label"]) for example in examples],
    [example["image"] for example in examples],
  )
  folder = CIFAR100_DIR / "cifar100" / "3.0.2"
  path = tmp_path / "cifar-100-binary.tar.gz"
  files = {
    "train.bin": binary[: 3074 * 10],
    "test.bin": binary,
    "coarse_label_names.txt": (folder / "coarse_label.labels.txt").read_bytes(),
    "fine_label_names.txt": (folder / "label.labels.txt").read_bytes(),
  }
  write_archive(path, {f"cifar-100-binary/{name}": content for name, content in files.items()})
  take_for_published(path, 100, monkeypatch)
  config = data_config(data_dir=str(tmp_path), archive=str(path))
  read = data.load(config, image_size=64, splits=("test",))
  assert read.class_names[:2] == ("apple", "aquarium_fish")

  def by_class(images, labels):
    return sorted(
      (int(label), image.tobytes()) for image, label in zip(images, labels, strict=True)
    )

  assert by_class(read.test.images, read.test.labels) == by_class(
    [example["image"] for example in examples], [example["label"] for example in examples]
  )


# The embedded dataset -----------------------------------------------------------------------------


def test_shapes100_is_the_same_on_every_machine():
  digests = []
  for split in ("train", "test"):
    images, labels = shapes100.draw(split, 3)
    assert images.shape == (1000, 32, 32, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(labels), [10] * 100)
    digests.append(hashlib.sha256(images.tobytes()).hexdigest()[:16])
  assert digests == ["e315504d3f9d2738", "1e21e0a89ce5d624"]


def test_shapes100_classes_differ_in_shape_and_texture():
  images, labels = shapes100.draw("train", 0)
  assert len(shapes100.CLASS_NAMES) == len(set(shapes100.CLASS_NAMES)) == 100
  assert shapes100.CLASS_NAMES[:2] == ("circle, plain", "circle, striped")
  # A plain object has one colour and its background another; a halved one has two.
  # Bars are small, circles large: the distance from the corner's colour tells them apart.
  difference = abs(images.astype(int) - np.median(images, axis=(1, 2), keepdims=True)).max(axis=-1)
  area = np.mean(difference > 50, axis=(1, 2))
  bars, circles = labels // 10 == 9, labels // 10 == 0
  assert area[circles].mean() > 1.5 * area[bars].mean()


def test_shapes100_is_prepared_when_asked_for(tmp_path, monkeypatch):
  monkeypatch.setattr(shapes100.Shapes100, "chunks", {"train": 2, "test": 1})
  config = data_config(name="shapes100", data_dir=str(tmp_path))
  dataset = data.load(config, image_size=64)
  assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (1800, 200, 1000)
  assert dataset.class_names == shapes100.CLASS_NAMES
  drawn, labels = shapes100.draw("test", 0)
  found = sorted(zip(dataset.test.labels.tolist(), map(bytes, dataset.test.images), strict=True))
  assert found == sorted(zip(labels.tolist(), map(bytes, drawn), strict=True))


@pytest.mark.slow
def test_shapes100_is_drawn_whole(tmp_path):
  result = run_cli("prepare", "--name", "shapes100", "--data_dir", tmp_path)
  assert result.returncode == 0
  folder = tmp_path / "shapes100" / "1.0.0"
  assert result.stdout == f"shapes100 is prepared in {folder}\n"
  info = data.describe(data_config(name="shapes100", data_dir=str(tmp_path)))
  assert info.sizes == {"train": 45_000, "validation": 5_000, "test": 10_000}
  assert info.image_shape == (32, 32, 3)
