"""What several tests need: the prepared CIFAR-100 and the images of the golden files."""

import hashlib
import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

TESTS = pathlib.Path(__file__).parent
GOLDEN = TESTS / "golden"


def cifar100_dir() -> pathlib.Path:
  """The TFDS directory that holds CIFAR-100; skips the test where there is none."""
  candidates = [TESTS.parents[1] / "shared" / "tensorflow_datasets"]
  if "TFDS_DATA_DIR" in os.environ:
    candidates.insert(0, pathlib.Path(os.environ["TFDS_DATA_DIR"]))
  for directory in candidates:
    if (directory / "cifar100" / "3.0.2").is_dir():
      return directory
  pytest.skip("CIFAR-100 is not prepared: set TFDS_DATA_DIR to where it is")


@pytest.fixture(scope="session")
def golden_images() -> dict[str, np.ndarray]:
  """The CIFAR-100 images that the golden files were computed on, uint8, by SHA-256 of their bytes."""
  import tensorflow_datasets as tfds  # seconds, and most tests need it not

  expected = {}  # SHA-256 -> row
  for path in GOLDEN.glob("*.npz"):
    with np.load(path) as golden:
      expected |= zip(golden["input/sha256"].tolist(), golden["input/index"].tolist(), strict=True)

  builder = tfds.builder("cifar100", data_dir=cifar100_dir())
  rows = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
  images = {}
  # Where to look first, then everywhere: a set prepared anew may have another order.
  for row in [*expected.values(), *range(len(rows))]:
    if len(images) == len(expected):
      return images
    image = np.asarray(Image.open(io.BytesIO(rows[row]["image"])))
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    if digest in expected:
      images[digest] = image
  pytest.fail(f"CIFAR-100 lacks the golden images {sorted(expected.keys() - images.keys())}")
