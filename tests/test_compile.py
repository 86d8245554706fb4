"""How JAX starts: devices, options, caches and memory, and what it says on stderr."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from train.devices.machine import physical_cores


def start_process(
  expression: str, statements: str = "", before: str = "", **environment: str
) -> subprocess.CompletedProcess:
  """A finished process that prints `expression`, with JAX set up for the default config."""
  code = (
    "from configs import mixer; from train.devices import compile, machine; import jax, os; "
    f"from pathlib import Path\n{before}\n"
    f"compile.start_jax(mixer.get_config())\n{statements}\nprint({expression})"
  )
  process = subprocess.run(
    [sys.executable, "-c", code],
    cwd=Path(__file__).parents[1],
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  return process


def start_jax(expression: str, statements: str = "", **environment: str) -> str:
  """The value of `expression`, printed by such a process."""
  return start_process(expression, statements, **environment).stdout.strip()


def test_every_core_is_a_device_unless_the_user_says_otherwise():
  cores = max(n for n in range(1, min(physical_cores(), 8) + 1) if 128 % n == 0)
  for environment, expected in (
    ({}, cores),
    ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
    ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
  ):
    assert start_jax("jax.device_count()", **environment) == str(expected)


@pytest.mark.parametrize(
  ("host", "quota", "expected"),
  [(64, "200000 100000", 2), (64, "max 100000", 8), (6, "max 100000", 4), (1, "50000 100000", 1)],
)
def test_devices_are_cores_that_may_be_used_and_eight_at_most(host, quota, expected, tmp_path):
  (tmp_path / "proc" / "self").mkdir(parents=True)
  (tmp_path / "proc" / "self" / "cgroup").write_text("0::/\n")
  (tmp_path / "sys" / "fs" / "cgroup").mkdir(parents=True)
  (tmp_path / "sys" / "fs" / "cgroup" / "cpu.max").write_text(f"{quota}\n")
  before = f"""
os.sched_getaffinity = lambda process: set(range({host}))
physical = machine.physical_cores
compile.physical_cores = lambda: physical(Path({str(tmp_path)!r}))
"""
  process = start_process("jax.device_count()", before=before)
  assert process.stdout == f"{expected}\n"  # divides the batch of 128


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


COMPILE = "jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))).sum()"


def compile_something(folder: Path, before: str = "") -> list[str]:
  """What a process prints on stderr that compiles a program, kept in `folder`."""
  environment = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  environment |= {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(folder)}
  process = start_process(COMPILE, before=before, **environment)
  assert process.stdout.strip() == "576.0"
  return process.stderr.splitlines()


def test_damaged_programs_in_the_cache_are_one_line_and_are_replaced(tmp_path):
  assert compile_something(tmp_path) == []
  whole = {file: file.read_bytes() for file in (tmp_path / "mlp_models").glob("*-cache")}
  assert len(whole) > 2  # several programs, each with a warning of JAX
  for damage in (lambda b: b[:100], lambda b: b"", lambda b: zlib.compress(b"no program" * 99)):
    for file, content in whole.items():
      file.write_bytes(damage(content))
    (line,) = compile_something(tmp_path)
    assert line.startswith(f"note: reading compiled programs in {tmp_path}/mlp_models failed (")
    assert compile_something(tmp_path) == []
    assert {file.name for file in whole} == {f.name for f in (tmp_path / "mlp_models").iterdir()}


def test_a_file_where_the_cache_should_be_is_one_line(tmp_path):
  (tmp_path / "mlp_models").write_text("a file")
  (line,) = compile_something(tmp_path)
  assert line.startswith(f"note: reading compiled programs in {tmp_path}/mlp_models failed (")
  assert (tmp_path / "mlp_models").read_text() == "a file"


def test_programs_compiled_on_another_cpu_are_not_loaded(tmp_path):
  for cpu, programs in (("one", 1), ("one", 1), ("another", 2)):
    assert compile_something(tmp_path, f"compile.cpu_features = lambda: {cpu!r}") == []
    assert len(list((tmp_path / "mlp_models").glob("jit__lambda*-cache"))) == programs


def test_flags_of_xla_in_a_file_are_used(tmp_path):
  file = tmp_path / "flags"
  file.write_text("\n--xla_force_host_platform_device_count=5\n--xla_cpu_enable_fast_math=false\n")
  process = start_process("jax.device_count()", XLA_FLAGS=str(file))
  assert (process.stdout, process.stderr) == ("5\n", "")
  file.write_text("no flags")
  for name in (file, tmp_path / "missing", tmp_path):
    process = start_process("jax.device_count()", XLA_FLAGS=str(name))
    (line,) = process.stderr.splitlines()
    assert line == f"note: XLA_FLAGS={name} is neither flags nor a file of flags: it is not used"


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
