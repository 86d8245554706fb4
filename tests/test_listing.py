"""Image folders as people have them: leftovers of systems, names of all kinds, odd layouts."""

import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import default
from train import data
from train.data import folder, listing
from train.errors import DataError


def fill(path: Path, count: int = 12, shade: int = 100, name: str = "{}.png") -> None:
  path.mkdir(parents=True, exist_ok=True)
  for i in range(count):
    Image.new("RGB", (6, 6), (shade, i, 0)).save(path / name.format(i))


def make(path: Path, splits=("train", "test"), classes=("cat", "dog"), count: int = 12) -> Path:
  for split in splits:
    for label, name in enumerate(classes):
      fill(path / split / name, count, 50 + 100 * label)
  return path


def config_of(path, **overrides):
  folder.forget()
  config = default.get_config().data
  config.name = f"folder:{path}"
  config.update(overrides)
  return config


def described(path, **overrides) -> data.DatasetInfo:
  return data.describe(data.resolve(config_of(path, **overrides)))


# What is an image ---------------------------------------------------------------------------------


def test_leftovers_of_systems_are_no_images_classes_or_splits(tmp_path, capsys):
  make(tmp_path)
  train = tmp_path / "train"
  for place in (tmp_path, train, train / "cat"):
    for name in ("._photo.png", "Thumbs.db", "THUMBS.DB", ".DS_Store", "desktop.ini", "Icon\r"):
      (place / name).write_bytes(b"no image")
    for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir", ".git", "$RECYCLE.BIN"):
      fill(place / name / "cat", 1)
  info = described(tmp_path)
  assert info.class_names == ("cat", "dog")
  assert info.sizes == {"train": 22, "validation": 2, "test": 24}
  assert capsys.readouterr().err == ""


def test_every_suffix_in_any_case_is_an_image(tmp_path):
  make(tmp_path)
  formats = {".jpe": "JPEG", ".jfif": "JPEG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}
  for i, suffix in enumerate(listing.SUFFIXES):
    ending = suffix.upper() if i % 2 else suffix
    format = formats.get(suffix, suffix[1:])
    Image.new("RGB", (5, 5)).save(tmp_path / "train" / "cat" / f"x{ending}", format)
  assert described(tmp_path, train_split="train").sizes["train"] == 24 + 10


def test_other_files_are_counted_and_said_once(tmp_path, capsys):
  make(tmp_path)
  for i in range(10):
    (tmp_path / "train" / "dog" / f"{i}.PSD").write_bytes(b"")
  (tmp_path / "test" / "cat" / "notes.txt").write_text("")
  shutil.copy(tmp_path / "train" / "cat" / "1.png", tmp_path / "train" / "lost.png")
  config = data.resolve(config_of(tmp_path))
  data.describe(config)
  data.load(config, 8)
  lines = capsys.readouterr().err.splitlines()
  assert lines == [
    f"{tmp_path}: left out: 11 files (.psd 10, .txt 1)",
    f"{tmp_path}: left out: 1 image in no class folder",
  ]


def test_a_class_without_images_to_train_is_said_or_refused(tmp_path, capsys):
  make(tmp_path)
  (tmp_path / "train" / "empty").mkdir()
  assert described(tmp_path).class_names == ("cat", "dog")
  assert "no class, since without images: empty" in capsys.readouterr().err
  fill(tmp_path / "test" / "empty", 1)
  with pytest.raises(DataError, match="empty is a class that 'train.* lacks and 'test' has"):
    described(tmp_path)


def test_a_class_whose_images_are_all_broken_is_none(tmp_path, capsys):
  make(tmp_path)
  (tmp_path / "train" / "elk").mkdir()
  (tmp_path / "train" / "elk" / "1.png").write_bytes(b"broken")
  assert described(tmp_path, skip_broken=True).class_names == ("cat", "dog")
  assert "no class, since without images: elk" in capsys.readouterr().err


def test_folders_beside_the_splits_are_not_read(tmp_path, capsys):
  make(tmp_path)
  make(tmp_path, ("extra",), ("elk",))
  fill(tmp_path / "unlabelled")
  (tmp_path / "unlabelled" / "torn.png").write_bytes(b"torn")
  assert described(tmp_path).class_names == ("cat", "dog")
  assert capsys.readouterr().err == ""
  # Named in the config, they are.
  assert described(tmp_path, train_split="train+extra").class_names == ("cat", "dog", "elk")


@pytest.mark.parametrize("splits", [("train", "test"), ("train",), ("Train", "TEST")])
@pytest.mark.parametrize("stray", [1, 2])
def test_an_image_beside_the_class_folders_makes_a_split_no_class(tmp_path, splits, stray, capsys):
  make(tmp_path, splits)
  for split in splits[:stray]:
    fill(tmp_path / split, 1)
  info = described(tmp_path)
  assert info.class_names == ("cat", "dog")
  assert sum(info.sizes.values()) == 24 * len(splits)


def test_images_below_a_class_folder_are_of_the_class(tmp_path):
  make(tmp_path)
  fill(tmp_path / "train" / "cat" / "2024" / "may", 5)
  (tmp_path / "train" / "cat" / "2024" / "round").symlink_to(tmp_path / "train" / "cat")
  info = described(tmp_path, train_split="train")
  assert info.sizes["train"] == 24 + 5 and info.class_names == ("cat", "dog")


def test_links_to_files_and_folders_are_followed(tmp_path):
  make(tmp_path / "elsewhere")
  (tmp_path / "set" / "train" / "owl").mkdir(parents=True)
  (tmp_path / "set" / "train" / "cat").symlink_to(tmp_path / "elsewhere" / "train" / "cat")
  (tmp_path / "set" / "test").symlink_to(tmp_path / "elsewhere" / "train")
  link = tmp_path / "set" / "train" / "owl" / "a.png"
  link.symlink_to(tmp_path / "elsewhere" / "train" / "dog" / "1.png")
  shutil.rmtree(tmp_path / "elsewhere" / "train" / "dog", ignore_errors=True)
  with pytest.raises(DataError, match=r"owl/a.png: No such file"):
    described(tmp_path / "set")
  fill(tmp_path / "elsewhere" / "train" / "dog")
  (tmp_path / "set" / "train" / "owl").rename(tmp_path / "set" / "train" / "dog")
  assert described(tmp_path / "set", train_split="train").sizes == {
    "train": 13,
    "validation": 1,
    "test": 24,
  }


# Names --------------------------------------------------------------------------------------------


def test_names_that_are_no_utf8_train(tmp_path):
  make(tmp_path)
  cat = os.fsencode(tmp_path / "train" / "cat")
  os.rename(cat + b"/1.png", cat + b"/\xe9\xff.png")
  os.rename(os.fsencode(tmp_path / "test" / "dog"), os.fsencode(tmp_path / "test") + b"/d\xf6g")
  os.rename(os.fsencode(tmp_path / "train" / "dog"), os.fsencode(tmp_path / "train") + b"/d\xf6g")
  info = described(tmp_path)
  assert info.class_names == ("cat", "d\\xf6g")  # can be printed and written
  config = config_of(tmp_path, in_memory_bytes=0)
  streamed = data.load(config, 8).train
  images, _ = streamed[np.arange(len(streamed))]
  assert images.shape == (22, 8, 8, 3)


def test_spellings_of_a_class_are_one_class(tmp_path):
  make(tmp_path)
  fill(tmp_path / "train" / unicodedata.normalize("NFC", "élan"), 4)
  fill(tmp_path / "train" / unicodedata.normalize("NFD", "élan"), 3, name="b{}.png")
  fill(tmp_path / "test" / unicodedata.normalize("NFD", "élan"), 2)
  info = described(tmp_path, train_split="train")
  assert info.class_names == ("cat", "dog", unicodedata.normalize("NFC", "élan"))
  assert info.sizes["train"] == 24 + 7
  test = data.load(config_of(tmp_path), 8, splits=("test",), class_names=info.class_names).test
  assert sorted(test.labels) == [0] * 12 + [1] * 12 + [2] * 2


@pytest.mark.parametrize("name", ["a[b]*?", "with space", "größe", "x=y"])
def test_paths_of_any_kind_are_stored_whole(tmp_path, name, monkeypatch):
  make(tmp_path / name)
  monkeypatch.chdir(tmp_path)
  config = data.resolve(config_of(name))
  monkeypatch.chdir("/")
  assert config.name == f"folder:{tmp_path / name}"
  assert data.describe(config).sizes["test"] == 24
  monkeypatch.setenv("HOME", str(tmp_path))
  assert data.resolve(config_of(f"~/{name}")).name == config.name


# Layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev"])
def test_a_validation_folder_validates_by_itself(tmp_path, name, capsys):
  make(tmp_path, ("train", name, "test"))
  config = data.resolve(config_of(tmp_path))
  assert [config[f"{s}_split"] for s in data.SPLITS] == ["train", name, "test"]
  (line,) = capsys.readouterr().err.splitlines()
  assert f"train on 'train', validation on '{name}', test on 'test'" in line
  assert data.describe(config).sizes == {"train": 24, "validation": 24, "test": 24}
  # What the config says wins.
  given = data.resolve(config_of(tmp_path, validation_split="train[50%:]"))
  assert given.validation_split == "train[50%:]"


def test_without_test_the_validation_split_gives_the_last_figure(tmp_path, capsys):
  make(tmp_path, ("train", "val"))
  fill(tmp_path / "test")  # images without a class, as in competitions
  config = data.resolve(config_of(tmp_path))
  assert config.test_split == config.validation_split == "val"
  assert "there is no test split" in capsys.readouterr().err


def test_train_alone_is_split_in_three(tmp_path, capsys):
  info = described(make(tmp_path, ("train",), count=20))
  assert info.sizes == {"train": 32, "validation": 4, "test": 4}
  assert "neither a validation nor a test split with labels" in capsys.readouterr().err


def test_classes_directly_below_are_split_by_hash(tmp_path, capsys):
  make(tmp_path, ("",), ("cat", "dog", "train"), count=100)  # "train" is a class here
  (tmp_path / "cat" / "notes.txt").write_text("")
  (tmp_path / "labels.csv").write_text("")  # beside the classes: no matter
  config = data.resolve(config_of(tmp_path))
  info = data.describe(config)
  split, left_out = capsys.readouterr().err.splitlines()
  assert "a hash of CLASS/FILE splits them 80/10/10" in split
  assert left_out == f"{tmp_path}: left out: 1 file (.txt 1)"
  assert info.class_names == ("cat", "dog", "train")
  assert sum(info.sizes.values()) == 300
  assert 210 <= info.sizes["train"] <= 270 and min(info.sizes.values()) >= 15

  def members() -> dict[str, str]:
    opened = folder.open_folder(tmp_path)
    found = {s: opened.records(s, info.class_names) for s in data.SPLITS}
    return {r.file(i): split for split, r in found.items() for i in range(len(r))}

  before = members()
  fill(tmp_path / "cat", 50, name="new{}.png")
  folder.forget()
  after = members()
  assert len(after) == 350 and after | before == after  # no image has changed sides


@pytest.mark.parametrize("count", [5, 6, 10])
def test_a_small_set_split_by_hash_has_all_parts_and_all_classes(tmp_path, count):
  classes = tuple("abcdefg")
  info = described(make(tmp_path, ("",), classes, count))
  assert info.class_names == classes and min(info.sizes.values()) >= 1


def test_what_is_no_dataset_says_what_belongs_where(tmp_path):
  fill(tmp_path / "loose" / "train")
  fill(tmp_path / "loose" / "test")
  (tmp_path / "empty").mkdir()
  fill(tmp_path / "deep" / "Images" / "cat")  # a split of another name, and no classes below PATH
  for name, message in (
    ("loose", "train holds images, but no class folders"),
    ("empty", "holds no images in class folders"),
    ("deep", "has no split for config.data.train_split, only Images"),
    ("", "the path is missing"),
  ):
    path = tmp_path / name if name else ""
    with pytest.raises(DataError, match=message) as error:
      described(path)
    assert "\n" not in str(error.value)
