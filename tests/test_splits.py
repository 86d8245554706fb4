"""Splits chosen by what a dataset has, labels that are classes, and classes joined by name."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from configs import default, mixer
from train import data
from train.data import folder
from train.data.batches import batches
from train.data.default_splits import choose
from train.data.splits import join_classes
from train.data.statistics import channel_statistics
from train.errors import DataError, UnreachableError


@pytest.mark.parametrize(
  ("dataset", "names", "expected"),
  [
    ("cifar100", {"train", "test"}, ("train[:90%]", "train[90%:]", "test")),
    ("stl10", {"train", "test", "unlabelled"}, ("train[:90%]", "train[90%:]", "test")),
    ("food101", {"train", "validation"}, ("train", "validation", "validation")),
    ("dmlab", {"train", "validation", "test"}, ("train", "validation", "test")),
    ("eurosat", {"train"}, ("train[:80%]", "train[80%:90%]", "train[90%:]")),
    *(
      (name, {"train", "validation", "test"}, ("train[:99%]", "train[99%:]", "validation"))
      for name in ("imagenet2012", "places365_small", "i_naturalist2018")
    ),
  ],
)
def test_default_splits_of_known_sets(dataset, names, expected):
  assert tuple(choose(dataset, names, 1000).values()) == expected


def test_splits_of_a_set_that_is_not_on_disk(tmp_path):
  config = default.get_config().data
  config.data_dir = str(tmp_path)
  config.name = "cifar100"
  assert data.foresee(config).sizes == {"train": 45_000, "validation": 5_000, "test": 10_000}
  config.name = "imagenet2012"
  sizes = {"train": 1_268_355, "validation": 12_812, "test": 50_000}
  assert data.foresee(config).sizes == sizes
  config.max_images = 512
  assert data.foresee(config).sizes == dict.fromkeys(data.SPLITS, 512)


def test_resolved_splits_are_in_the_config_and_usual_ones_are_not_mentioned(shapes100, capsys):
  config = default.get_config().data
  config.name, config.data_dir = "shapes100", str(shapes100)
  resolved = data.resolve(config)
  splits = [resolved[f"{split}_split"] for split in data.SPLITS]
  assert splits == ["train[:90%]", "train[90%:]", "test"]
  assert config.train_split is None and capsys.readouterr().err == ""
  assert data.resolve(resolved).to_json() == resolved.to_json()


def test_an_older_runs_config_still_opens_its_dataset(shapes100):
  config = default.get_config().data
  config.update(name="shapes100", data_dir=str(shapes100), test_split="test[:7]")
  content = config.to_dict()
  for key in ("background", "max_images"):  # it has neither
    del content[key]
  assert len(data.load(ConfigDict(content), 32, splits=("test",)).test) == 7


@pytest.mark.parametrize("count", [1, 3, 40])
def test_smoke_takes_what_there_is(tmp_path, count):
  for split in ("train", "test"):
    (tmp_path / split / "cat").mkdir(parents=True)
    for i in range(count):
      Image.new("RGB", (4, 4)).save(tmp_path / split / "cat" / f"{i}.png")
  config = mixer.get_config("smoke").data
  config.name = f"folder:{tmp_path}"
  sizes = data.describe(data.resolve(config)).sizes
  assert sizes["test"] == count and sizes["train"] >= min(count, 36)
  assert mixer.get_config("smoke").data.max_images == 512
  config.max_images = 2
  assert max(data.describe(config).sizes.values()) == min(count, 2)


# Labels -------------------------------------------------------------------------------------------


class Unlabelled(tfds.core.GeneratorBasedBuilder):
  """Its test split has no labels: -1, as in ImageNet's."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {
      "image": tfds.features.Image(shape=(4, 4, 3)),
      "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

  def _generate_examples(self, hidden):
    for i in range(40):
      image = Image.fromarray(np.full((4, 4, 3), 6 * i, np.uint8))
      yield i, {"image": image, "label": -1 if hidden and i != 7 else i % 3}


@pytest.fixture
def unlabelled(tmp_path):
  Unlabelled(data_dir=tmp_path).download_and_prepare(file_format="array_record")
  config = default.get_config().data
  config.update(name="unlabelled", data_dir=str(tmp_path))
  return config


@pytest.mark.parametrize("limit", [None, 0])
def test_labels_that_are_no_class_are_refused_by_the_splits_name(unlabelled, limit):
  unlabelled.in_memory_bytes = limit
  assert len(data.load(unlabelled, 4, splits=("train",)).train) == 36
  with pytest.raises(DataError, match=r"test_split = 'test' has the label -1, .* 0\.\.2") as error:
    data.load(unlabelled, 4)
  assert "\n" not in str(error.value)


def test_labels_of_every_streamed_batch_are_looked_at(unlabelled, monkeypatch):
  unlabelled.in_memory_bytes = 0
  monkeypatch.setattr(data.StreamedSplit, "check_labels", lambda self: None)
  test = data.load(unlabelled, 4, splits=("test",)).test
  with pytest.raises(DataError, match="has the label -1"):
    list(batches(test, 8))


def test_classes_of_a_tfds_set_are_joined_to_a_runs_by_name(unlabelled):
  own = data.load(unlabelled, 4, splits=("train",)).train
  joined = data.load(unlabelled, 4, splits=("train",), class_names=("x", "c", "b", "a"))
  assert joined.class_names == ("x", "c", "b", "a")
  np.testing.assert_array_equal(joined.train.images, own.images)
  np.testing.assert_array_equal(joined.train.labels, np.array([3, 2, 1])[own.labels])
  with pytest.raises(DataError, match="has images of 'b', a class that the run lacks"):
    data.load(unlabelled, 4, splits=("train",), class_names=("a", "c"))


def test_joined_names_may_be_spelled_in_either_form():
  classes = join_classes("x", ["e\u0301", "a"], ["a", "\u00e9"])
  np.testing.assert_array_equal(classes.convert(np.array([0, 1, 0])), [1, 0, 1])


def make_test(path, classes):
  for label, name in enumerate(classes):
    (path / "test" / name).mkdir(parents=True)
    for i in range(label + 1):
      Image.new("RGB", (4, 4), (40 * ord(name[0]) % 256, 0, 0)).save(
        path / "test" / name / f"{i}.png"
      )


@pytest.mark.parametrize("limit", [None, 0])
def test_a_folder_with_test_alone_is_joined_by_name(tmp_path, limit):
  config = default.get_config().data
  config.update(name="folder:/was/elsewhere", in_memory_bytes=limit)
  config.update(train_split="train[:80%]", validation_split="val", test_split="train[90%:]")
  make_test(tmp_path / "fewer", ("dog", "cat"))  # on disk: 1 dog, 2 cats
  data.move(config, str(tmp_path / "fewer"))
  run = ("ape", "cat", "dog")
  test = data.load(config, 4, splits=("test",), class_names=run).test
  images, labels = test[np.arange(3)]
  assert sorted(labels) == [1, 1, 2]
  assert {(int(i[0, 0, 0]), int(n)) for i, n in zip(images, labels, strict=True)} == {
    (40 * ord("c") % 256, 1),
    (40 * ord("d") % 256, 2),
  }
  make_test(tmp_path / "more", ("dog", "cat", "elk"))
  data.move(config, str(tmp_path / "more"))
  with pytest.raises(DataError, match="test_split = 'test' has images of 'elk', a class that the"):
    data.load(config, 4, splits=("test",), class_names=run)
  shutil.rmtree(tmp_path / "more" / "test" / "elk")
  (tmp_path / "more" / "test" / "elk").mkdir()  # a class without images is no matter
  folder.forget()
  assert len(data.load(config, 4, splits=("test",), class_names=run).test) == 3


# Names of datasets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("fashion-mnist", "Near names: fashion_mnist"),
    ("Fashion_MNIST!", "fashion_mnist"),
    ("cifar-100", "Near names: cifar100"),
    ("shape100", "shapes100"),
    ("imagenet", "imagenet2012"),
    ("/data/pics", "an image folder is folder:/data/pics"),
    ("~/pics", "folder:~/pics"),
    ("./pics", "folder:./pics"),
    ("tests", "folder:tests"),
    ("data/pics", "An image folder is folder:PATH"),
    ("cifar10_corrupted/brighness_1", "brightness_1"),
    ("mnist/nix", "no config 'nix'"),
    ("cifar10:9.9.9", "3.0.2"),
    ("imagenet_v2/matched-frequency:8.0.0", "no version 8.0.0"),
  ],
)
def test_a_name_that_is_nearly_right_is_set_right(name, says, tmp_path, monkeypatch):
  monkeypatch.chdir(Path(__file__).parents[1])
  config = default.get_config().data
  config.update(name=name, data_dir=str(tmp_path), fallback="shapes100")
  for ask in (data.resolve, data.describe, data.foresee):
    with pytest.raises(DataError) as error:
      ask(config)
    assert says in str(error.value) and f"--config.data.name={name}" in str(error.value)
    assert "\n" not in str(error.value)
    assert "move the folder away" not in str(error.value).lower()
  assert not list(tmp_path.iterdir())


def test_the_download_check_goes_through_the_same_library_as_the_download(tmp_path, monkeypatch):
  asked = []

  def get(url, **options):
    asked.append((url, options["stream"]))
    raise refusal

  refusal = requests.exceptions.SSLError("certificate verify failed")
  monkeypatch.setattr(requests, "get", get)
  config = default.get_config().data
  config.update(name="cifar100", data_dir=str(tmp_path))
  with pytest.raises(UnreachableError, match="certificate verify failed"):
    data.describe(config)
  assert asked == [("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", True)]


# Statistics ---------------------------------------------------------------------------------------


def test_a_channel_that_never_changes_has_a_variance():
  images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
  images[..., 1] = 173
  mean, variance = channel_statistics(data.Split(images, np.zeros(50, np.int32)))
  assert variance[1] == 1 and mean[1] == 173
  np.testing.assert_allclose(variance[[0, 2]], images.var(axis=(0, 1, 2))[[0, 2]], rtol=1e-4)
