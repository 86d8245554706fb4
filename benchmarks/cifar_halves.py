"""Writes CIFAR-100 as folders of disjoint classes: train on one half, fine-tune on the other.

    python -m benchmarks.cifar_halves --output DIR

DIR/first has the first 50 classes (in the order of CIFAR's labels) with all images; DIR/second-500
and DIR/second-5000 have the other 50 with the first 10 and 100 training images of each class, and
all test images.
"""

import argparse
import collections
import os
from pathlib import Path

from PIL import Image

from configs import default
from train import data

_HALF = 50  # classes
_FOLDERS = {  # name: (classes, training images of each; None: all)
  "first": (range(_HALF), None),
  "second-500": (range(_HALF, 2 * _HALF), 10),
  "second-5000": (range(_HALF, 2 * _HALF), 100),
}


def main() -> None:
  """Exit status: 0 written; 1 a folder is there already, or CIFAR-100 is not."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument("--output", type=Path, required=True)
  output = parser.parse_args().output
  if output.exists():
    parser.exit(1, f"{output} exists already: choose another --output\n")
  config = default.get_config().data
  config.train_split, config.validation_split, config.test_split = "train", "train[:1]", "test"
  write(data.load(data.resolve(config), image_size=32), output)


def write(dataset: data.Dataset, output: Path) -> None:
  """Writes the folders: output/NAME/{train,test}/CLASS/NUMBER.png."""
  for name, (classes, most) in _FOLDERS.items():
    for split in ("train", "test"):
      images, labels = dataset[split][range(len(dataset[split]))]
      written: collections.Counter[int] = collections.Counter()
      for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        if label not in classes or (split == "train" and written[label] == most):
          continue
        written[label] += 1
        folder = output / name / split / dataset.class_names[label]
        os.makedirs(folder, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:05}.png")


if __name__ == "__main__":
  main()
