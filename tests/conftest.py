"""What several tests need: the prepared CIFAR-100 and the images of the golden files."""

import hashlib
import importlib
import io
import os
import pathlib
import tempfile

import jax
import numpy as np
import pytest
from PIL import Image

from train.mesh import set_xla_flags

# Before anything starts JAX's backend.
jax.config.update("jax_num_cpu_devices", 8)  # simulated
set_xla_flags()

# Many tests compile the same step, also in processes of their own.
_CACHE = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
jax.config.update("jax_compilation_cache_dir", _CACHE.name)

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
  missing = pytest.fail if "REQUIRE_CIFAR100" in os.environ else pytest.skip
  missing("CIFAR-100 is not prepared: set TFDS_DATA_DIR to where it is")


@pytest.fixture(scope="session")
def golden_images() -> dict[str, np.ndarray]:
  """The CIFAR-100 images of the golden files, uint8 [32, 32, 3], by SHA-256 of their bytes."""
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


def smoke_config(name: str = "mixer", **overrides):
  """The smoke variant of configs/NAME.py on real CIFAR-100; overrides have dots as `__`."""
  config = importlib.import_module(f"configs.{name}").get_config("smoke")
  config.data.data_dir = str(cifar100_dir())
  config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
  return config


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> pathlib.Path:
  """The workdir of a finished smoke run of MLP-Mixer on real CIFAR-100."""
  from train.loop import train_and_evaluate

  folder = tmp_path_factory.mktemp("runs") / "mixer"
  train_and_evaluate(smoke_config(epochs=3), folder)
  return folder


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> pathlib.Path:
  """The workdir of runs.COMMAND, which nothing has disturbed."""
  from runs import start

  folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
  process = start(folder)
  output = process.communicate(timeout=200)
  assert process.returncode == 0, output
  return folder
