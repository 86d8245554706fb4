"""What several tests need: the prepared CIFAR-100, and runs on it."""

import importlib
import os
import pathlib
import tempfile

import jax
import pytest

from train.devices.compile import set_xla_flags

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
