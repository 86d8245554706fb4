"""How JAX starts: devices, options, caches and memory, and an empty stderr without a TPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def start_jax(expression: str, statements: str = "", **environment: str) -> str:
  """The value of `expression`, printed by a new process with JAX set up for the default config."""
  code = (
    "from configs import mixer; from train.devices.compile import start_jax; import jax, os; "
    f"start_jax(mixer.get_config())\n{statements}\nprint({expression})"
  )
  process = subprocess.run(
    [sys.executable, "-c", code],
    cwd=Path(__file__).parents[1],
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  return process.stdout.strip()


def test_every_core_is_a_device_unless_the_user_says_otherwise():
  cores = max(n for n in range(1, len(os.sched_getaffinity(0)) + 1) if 128 % n == 0)
  for environment, expected in (
    ({}, cores),
    ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
    ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
  ):
    assert start_jax("jax.device_count()", **environment) == str(expected)


def test_our_options_of_xla_are_added_to_the_users():
  timeout = "--xla_cpu_collective_call_terminate_timeout_seconds"
  ours = f"{timeout}=3600 --xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true"
  assert start_jax("os.environ['XLA_FLAGS']", XLA_FLAGS="") == ours
  theirs = f"{timeout}=60 --xla_backend_extra_options=xla_cpu_ftz=true"
  assert start_jax("os.environ['XLA_FLAGS']", XLA_FLAGS=theirs) == theirs


def test_compiled_programs_are_kept_in_the_users_cache_unless_told_where(tmp_path):
  folder = "jax.config.jax_compilation_cache_dir"
  environment = {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path)}
  assert start_jax(folder, **environment) == str(tmp_path / "mlp_models")
  environment["JAX_COMPILATION_CACHE_DIR"] = "/elsewhere"
  assert start_jax(folder, **environment) == "/elsewhere"


@pytest.mark.needs(what="glibc")
def test_freed_memory_is_kept():
  statements = """
import resource

def page_faults():
  for _ in range(10):
    blocks = [bytearray(15 * 2**20) for _ in range(3)]
    del blocks
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = page_faults()
"""
  # By default glibc returns two thirds of the 11,520 pages to the system each time.
  assert int(start_jax("page_faults() - before", statements)) < 1000


# JAX registers libtpu like this where it is installed.
TPU = """
from jax.extend.backend import register_backend_factory
register_backend_factory("tpu", lambda: print("tried"), priority=300)
"""


# JAX chooses, among no GPUs.
_ANY_PLATFORM = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
_ANY_PLATFORM |= {"CUDA_VISIBLE_DEVICES": ""}


def devices(root: Path, **environment: str) -> list[str]:
  """The platform that a new process prints, as if libtpu were installed, with `root` as /."""
  code = (
    f"{TPU}\n"
    "from pathlib import Path; from train.devices.compile import skip_missing_tpu; import jax\n"
    f"skip_missing_tpu(Path({str(root)!r})); print(jax.devices()[0].platform)"
  )
  process = subprocess.run(
    [sys.executable, "-c", code],
    cwd=Path(__file__).parents[1],
    env=_ANY_PLATFORM | environment,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  return process.stdout.split()


def test_libtpu_is_tried_only_where_a_tpu_may_be(tmp_path):
  (tmp_path / "dev" / "vfio").mkdir(parents=True)
  (tmp_path / "dev" / "vfio" / "vfio").touch()  # on any machine with vfio
  assert devices(tmp_path) == devices(tmp_path, JAX_PLATFORMS="") == ["cpu"]
  (tmp_path / "dev" / "accel0").touch()
  assert devices(tmp_path) == ["tried", "cpu"]
  assert devices(tmp_path, JAX_PLATFORMS="cpu") == ["cpu"]


@pytest.mark.needs(what="libtpu")
def test_commands_are_silent_with_libtpu_and_no_tpu(tmp_path):
  process = subprocess.run(
    [sys.executable, "-m", "train.predict", "--workdir", tmp_path, "x.png"],
    cwd=Path(__file__).parents[1],
    env=_ANY_PLATFORM,
    capture_output=True,
    text=True,
  )
  *others, last = process.stderr.splitlines()
  assert last == f"error: {tmp_path}/config.json is missing: {tmp_path} holds no run"
  for words in ("host bounds", "worker hostname", "Source Location Trace"):  # of libtpu
    assert not any(words in line for line in others)
