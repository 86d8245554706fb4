"""Image folders: their contents, broken images, and no image lost when a run is killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import REPOSITORY, numbers, saved_step

from configs import default
from train import data
from train.data import folder
from train.errors import DataError

CLASSES = ("cat", "dog", "owl")


def make_folder(path: Path, train: int = 8, test: int = 3) -> Path:
  """Noise of all sizes and modes: `train` and `test` images in each class."""
  rng = np.random.default_rng(0)
  for split, count in (("train", train), ("test", test)):
    for label, name in enumerate(CLASSES):
      folder = path / split / name
      folder.mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 256, (20 + i, 40 - i, 3), dtype=np.uint8)
        pixels[:] = 80 * label  # a shade per class
        image = Image.fromarray(pixels).convert("L" if i % 3 == 0 else "RGB")
        image.save(folder / f"{i}.{('png', 'jpg', 'JPEG')[i % 3]}")
  (path / "train" / "cat" / "notes.txt").write_text("no image")
  (path / ".cache").mkdir()
  return path


def folder_config(path: Path, **overrides):
  folder.forget()
  config = default.get_config().data
  config.name = f"folder:{path}"
  config.train_split, config.validation_split = "train[:75%]", "train[75%:]"
  config.test_split = "test"
  config.update(overrides)
  return config


def test_folder_is_read_like_any_dataset(tmp_path):
  config = folder_config(make_folder(tmp_path))
  info = data.describe(config)
  assert info.class_names == CLASSES
  assert info.sizes == {"train": 18, "validation": 6, "test": 9}
  assert info.image_shape == (None, None, 3)
  in_memory = data.load(config, image_size=16)
  config.in_memory_bytes = 0
  streamed = data.load(config, image_size=16)
  assert isinstance(in_memory.train, data.Split)
  assert isinstance(streamed.train, data.StreamedSplit)
  for name in data.SPLITS:
    images, labels = getattr(in_memory, name)[np.arange(info.sizes[name])]
    assert images.shape[1:] == (16, 16, 3)
    np.testing.assert_allclose(images[:, 8, 8, 0], 80 * labels, atol=2)
    assert len(set(labels)) > 1  # also in a part of a split
    parts = getattr(streamed, name)[np.arange(len(labels))]
    for part, like in zip(parts, (images, labels), strict=True):
      np.testing.assert_array_equal(part, like)


def test_an_image_that_is_added_moves_no_other(tmp_path):
  make_folder(tmp_path)

  def order(count: int) -> list[str]:
    folder.forget()
    records = folder.open_folder(tmp_path).records("train", CLASSES)
    return [records.file(i) for i in range(count)]

  before = order(24)
  Image.new("RGB", (9, 9)).save(tmp_path / "train" / "owl" / "new.png")
  after = order(25)
  after.remove(str(tmp_path / "train" / "owl" / "new.png"))
  assert after == before


def test_broken_images_are_listed_or_skipped(tmp_path, capsys):
  make_folder(tmp_path)
  torn, empty = tmp_path / "train" / "dog" / "1.jpg", tmp_path / "test" / "owl" / "0.png"
  torn.write_bytes(torn.read_bytes()[:-60])  # OpenCV would fill the rest with grey
  empty.write_bytes(b"")
  config = folder_config(tmp_path)
  for _ in range(2):  # also when asked again
    with pytest.raises(DataError) as error:
      data.describe(config)
  lines = str(error.value).splitlines()
  assert f"{tmp_path} holds broken images (2);" in lines[0] and "skip_broken=True" in lines[0]
  assert [line.split(":")[0].strip() for line in lines[1:]] == [str(empty), str(torn)]
  info = data.describe(folder_config(tmp_path, skip_broken=True, train_split="train"))
  assert info.sizes["train"] == 23 and info.sizes["test"] == 8
  assert str(torn) in capsys.readouterr().err


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (
      lambda path: os.rename(path / "train", path / "trains"),
      r"'train\[:75%\]' is no split .*trains \(24\)",
    ),
    (lambda path: os.rename(path / "test" / "owl", path / "test" / "elk"), "elk is a class that"),
    (
      lambda path: os.rename(path / "test", path / "val"),
      r"test_split = 'test'.*train \(24\), val",
    ),
    (lambda path: os.rename(path, f"{path}s"), "is no folder"),
  ],
)
def test_what_is_no_image_folder_is_one_line(tmp_path, spoil, message):
  path = make_folder(tmp_path / "images")
  spoil(path)
  with pytest.raises(DataError, match=message) as error:
    data.describe(folder_config(path))
  assert "\n" not in str(error.value)


LISTING = """
import json, runpy, sys
from train import loop
train_epoch, path = loop._train_epoch, sys.argv.pop(1)

def listing(run, state, calls):
  number = int(state.step)
  def listed():
    nonlocal number
    for call in calls:
      for labels, masks in zip(call["label"].tolist(), call["mask"].tolist()):
        number += 1
        with open(path, "a") as file:
          ids = [label for label, mask in zip(labels, masks) if mask]
          print(json.dumps([number, ids]), file=file)
      yield call
  return train_epoch(run, state, listed())

loop._train_epoch = listing
if __name__ == "__main__":
  runpy.run_module("train.main", run_name="__main__")
"""


@pytest.mark.slow
def test_no_image_is_skipped_or_repeated_around_a_kill(tmp_path):
  # 150 classes of one image each, so that a label names an image. 10 steps per epoch.
  for i in range(150):
    folder = tmp_path / "images" / "train" / f"{i:03}"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((9, 9, 3), i, np.uint8)).save(folder / "only.png")
  script, workdir = tmp_path / "listing.py", tmp_path / "run"
  script.write_text(LISTING)

  def train(listed: Path) -> subprocess.Popen:
    flags = {"data.name": f"folder:{tmp_path / 'images'}", "data.in_memory_bytes": 0}
    flags |= {f"data.{split}_split": "train" for split in data.SPLITS}
    flags |= {"batch_size": 16, "epochs": 3, "data.workers": 2, "checkpoint_seconds": 0.05}
    command = [sys.executable, script, listed, "--config", "configs/mixer.py:smoke"]
    command += ["--workdir", workdir, *(f"--config.{key}={value}" for key, value in flags.items())]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE)

  process = train(tmp_path / "first")
  while saved_step(workdir, per_epoch=10) < 13:
    assert process.poll() is None, process.communicate()
  process.kill()
  process.communicate()
  saved = saved_step(workdir, per_epoch=10)
  process = train(tmp_path / "second")
  _, error = process.communicate(timeout=120)
  assert process.returncode == 0, error

  def listed(name: str) -> dict[int, list[int]]:
    return dict(map(json.loads, (tmp_path / name).read_text().splitlines()))

  first, second = listed("first"), listed("second")
  assert min(second) == saved + 1 and max(second) == 30
  steps = {number: ids for number, ids in first.items() if number <= saved} | second
  assert sorted(steps) == list(range(1, 31))
  epochs = [sum((steps[10 * e + i] for i in range(1, 11)), []) for e in range(3)]
  assert all(sorted(epoch) == list(range(150)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 3
  for number in first.keys() & second.keys():
    assert first[number] == second[number]
  assert [row["epoch"] for row in numbers(workdir)] == [1, 2, 3]
