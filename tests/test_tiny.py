"""Real runs on the smallest and oddest folders: no error, no NaN."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import REPOSITORY

from train.run import metrics


def one_image(path: Path) -> None:
  (path / "train" / "cat").mkdir(parents=True)
  Image.new("RGB", (30, 20), (10, 200, 30)).save(path / "train" / "cat" / "only.png")


def three_classes_of_all_modes(path: Path) -> None:
  """Grey, RGBA and not square; fewer images than a batch, and fewer classes than five."""
  for split in ("train", "val"):
    for label, name in enumerate("abc"):
      folder = path / split / name
      folder.mkdir(parents=True)
      Image.new("L", (30, 20), 90 * label).save(folder / "grey.png")
      Image.new("RGBA", (10, 50), (90 * label, 0, 0, 200)).save(folder / "transparent.webp")
      Image.new("1", (7, 7), label).save(folder / "bits.gif")


def one_class(path: Path) -> None:
  noise = np.random.default_rng(0).integers(0, 256, (12, 9, 9, 3), dtype=np.uint8)
  (path / "cat").mkdir(parents=True)
  for i, pixels in enumerate(noise):
    Image.fromarray(pixels).save(path / "cat" / f"{i}.png")


def channels_that_never_change(path: Path) -> None:
  """Blue is constant in all images, and red in those that train."""
  for split, red in (("train", 7), ("test", 250)):
    for label, name in enumerate("ab"):
      (path / split / name).mkdir(parents=True)
      for i in range(12):
        colour = (red, 100 * label + i, 31)
        Image.new("RGB", (16, 16), colour).save(path / split / name / f"{i}.png")


SETS = [three_classes_of_all_modes, one_image, one_class, channels_that_never_change]


@pytest.mark.parametrize(
  "make", [pytest.param(make, marks=[pytest.mark.slow] if make != SETS[0] else []) for make in SETS]
)
@pytest.mark.parametrize("streamed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tiny_and_odd_folders_train_and_evaluate(tmp_path, make, streamed):
  make(tmp_path / "images")
  flags = {"data.name": f"folder:{tmp_path / 'images'}", "model.image_size": 16}
  flags |= {"model.patch_size": 8, "model.num_blocks": 1} | (
    {"data.in_memory_bytes": 0} if streamed else {}
  )
  given = [f"--config.{key}={value}" for key, value in flags.items()]
  workdir = tmp_path / "run"

  def call(*arguments) -> str:
    process = subprocess.run(
      [sys.executable, "-m", *map(str, arguments)],
      cwd=REPOSITORY,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
      capture_output=True,
      text=True,
      timeout=250,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout

  call("train.main", "--config", "configs/mixer.py:smoke", "--workdir", workdir, *given)
  rows = metrics.read(workdir)
  assert len(rows) == 2
  found = [
    *(value for row in rows for value in row.values()),
    *metrics.read_summary(workdir).values(),
  ]
  assert all(math.isfinite(value) for value in found if not isinstance(value, str))
  answer = json.loads(call("train.evaluate", "--workdir", workdir))
  assert all(math.isfinite(answer[key]) for key in ("loss", "accuracy", "top5"))
  config = json.loads((workdir / "config.json").read_text())["data"]
  assert None not in (config["train_split"], config["validation_split"], config["test_split"])
