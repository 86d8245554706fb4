"""What the whole suite shares: eight CPU devices, a small dataset, finished runs, and its skips."""

import collections
import fcntl
import importlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before JAX is imported; processes that tests start inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from ml_collections import ConfigDict
from needs import NEEDS

from train.devices.compile import set_xla_flags

# Before anything starts JAX's backend.
jax.config.update("jax_num_cpu_devices", 8)  # simulated
# Accelerators multiply float32 in fewer bits by default, which no reference number allows for.
if os.environ["JAX_PLATFORMS"] != "cpu":
  jax.config.update("jax_default_matmul_precision", "highest")
set_xla_flags()

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"

# One folder for all processes of a test run: the first one makes it and removes it.
if "MLP_MODELS_TESTS" not in os.environ:
  _folder = tempfile.TemporaryDirectory(prefix="mlp_models-tests-")
  os.environ["MLP_MODELS_TESTS"] = _folder.name
FOLDER = Path(os.environ["MLP_MODELS_TESTS"])
SHAPES100_DIR = FOLDER / "tensorflow_datasets"
# Many tests compile the same step, also in processes of their own.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(FOLDER / "compiled")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
os.environ["XDG_CACHE_HOME"] = str(FOLDER / "cache")  # what is remembered of image folders


# What is skipped ----------------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Skips what needs something that is not here; refuses a lack of what is required."""
  required = os.environ.get("MLP_MODELS_REQUIRE", "").split()
  for item in items:
    for mark in item.iter_markers("needs"):
      what = mark.kwargs["what"]
      is_here, reason = NEEDS[what]
      if not is_here and what in required:
        raise pytest.UsageError(f"MLP_MODELS_REQUIRE={what}: {reason}")
      if not is_here:
        item.add_marker(pytest.mark.skip(reason=reason))


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
  """Turns a skip into a failure, unless `needs.NEEDS` lists its reason."""
  if report.skipped and not hasattr(report, "wasxfail"):
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if reason.removeprefix("Skipped: ") not in {need.reason for need in NEEDS.values()}:
      report.outcome, report.longrepr = "failed", f"skipped, but not by tests/needs.py: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
  report = yield
  _fail_if_skipped(report)
  return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
  report = yield
  _fail_if_skipped(report)
  return report


def pytest_terminal_summary(terminalreporter) -> None:
  """Prints each reason with the number of tests skipped for it."""
  skipped = terminalreporter.stats.get("skipped", [])
  for reason, count in collections.Counter(report.longrepr[2] for report in skipped).most_common():
    terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


# Compilation --------------------------------------------------------------------------------------


@pytest.fixture
def fast_compilation():
  """Compiles faster, to slower code with the same results."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


# Data and runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shapes100() -> Path:
  """SHAPES100_DIR, with 4,000 + 1,000 images of shapes100, drawn once per test run."""
  import tensorflow_datasets as tfds  # late: takes seconds, and most tests do not need it

  from train.data.shapes100 import Shapes100

  SHAPES100_DIR.mkdir(exist_ok=True)
  with open(SHAPES100_DIR / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    builder = Shapes100(data_dir=SHAPES100_DIR)
    builder.chunks = {"train": 4, "test": 1}
    tfds.disable_progress_bar()
    builder.download_and_prepare(file_format="array_record")  # nothing to do the second time
  return SHAPES100_DIR


@pytest.fixture(scope="session")
def smoke_config(shapes100) -> Callable[..., ConfigDict]:
  """The smoke variant of configs/NAME.py on shapes100; overrides have `__` instead of dots."""

  def make(name: str = "mixer", **overrides) -> ConfigDict:
    config = importlib.import_module(f"configs.{name}").get_config("smoke")
    config.data.name, config.data.data_dir = "shapes100", str(shapes100)
    config.data.validation_split, config.data.test_split = "train[3500:]", "test[:500]"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config

  return make


@pytest.fixture(scope="session")
def finished_run(smoke_config, tmp_path_factory) -> Path:
  """The workdir of a finished smoke run of MLP-Mixer."""
  from train.loop import train_and_evaluate

  folder = tmp_path_factory.mktemp("runs") / "mixer"
  train_and_evaluate(smoke_config(epochs=3), folder)
  return folder


@pytest.fixture(scope="session")
def uninterrupted(shapes100, tmp_path_factory) -> Path:
  """The workdir of an uninterrupted run of runs.COMMAND."""
  from runs import start

  folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
  process = start(folder)
  output = process.communicate(timeout=200)
  assert process.returncode == 0, output
  return folder
