"""Sets JAX up before its backend starts: devices, memory, caches and XLA's options."""

import contextlib
import ctypes
import glob
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train.devices.machine import cache_folder, cpu_features, physical_cores

Result = TypeVar("Result")

_XLA_FLAGS = (
  # By default XLA aborts if a CPU device waits 40 s for another to sum gradients: Perceiver on a
  # busy machine can take that long, and so does a sleeping laptop.
  "--xla_cpu_collective_call_terminate_timeout_seconds=3600",
  # Computes results that read the same arrays in one loop: faster gradients on a CPU.
  "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true",
)

_MOST_CPU_DEVICES = 8  # by default: with more, sums over the devices cost more than they bring

# JAX's warnings about its cache: what failed, for which program, and why.
_CACHE_FAILED = re.compile(
  r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)"
)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def start_jax(config: ConfigDict) -> None:
  """Sets JAX up for a run, before anything starts its backend.

  With `config.compilation_cache` compiled programs are kept in the user's cache folder, unless
  JAX_COMPILATION_CACHE_DIR names another.
  """
  skip_missing_tpu()
  set_xla_flags()
  _use_every_core(config.batch_size)
  _keep_freed_memory()
  _keep_programs(config.compilation_cache)


def _keep_programs(by_default: bool) -> None:
  """Sets up the cache of compiled programs; a run goes on without one, after a single notice."""
  folder = getattr(jax.config, "jax_compilation_cache_dir", None)
  if not folder and by_default:
    if (cache := cache_folder()) is None:
      _note(
        "there is no home folder to keep compiled programs in; XDG_CACHE_HOME=DIR names another"
      )
      return
    folder = str(cache)
    jax.config.update("jax_compilation_cache_dir", folder)
  if not folder:
    return
  _tell_once_of_the_cache(Path(folder))
  with contextlib.suppress(ImportError):  # if a later JAX lacks this API
    from jax._src import cache_key

    # A home folder may be shared by machines whose CPUs differ, and JAX's key leaves that out: XLA
    # would load another CPU's program, and could crash.
    features = cpu_features()
    cache_key.custom_hook = lambda: features


def _tell_once_of_the_cache(folder: Path) -> None:
  """Turns JAX's warnings about its cache into one line.

  JAX never overwrites a damaged program: it is removed, and so written anew.
  """
  show = warnings.showwarning
  told: list[str] = []

  def show_once(message, *arguments, **others) -> None:
    if not (about := _CACHE_FAILED.match(str(message))):
      show(message, *arguments, **others)
      return
    verb, program, reason = about.groups()
    with contextlib.suppress(OSError):
      for file in folder.glob(f"{glob.escape(program)}-*-cache"):
        file.unlink()
    if not told:
      told.append(program)
      _note(f"{verb} compiled programs in {folder} failed ({reason}): this run compiles its own")

  warnings.showwarning = show_once


def skip_missing_tpu(root: Path = Path("/")) -> None:
  """Keeps JAX from trying libtpu on a machine without a TPU, where libtpu prints errors.

  Call it before anything starts JAX's backend. It does nothing if there may be a TPU, or if the
  user has set JAX_PLATFORMS.

  Args:
    root: root of the file system; tests pass another.
  """
  # JAX itself sets the platforms if it sees a TPU; libtpu also looks at the device files.
  if getattr(jax.config, "jax_platforms", None) or _may_have_tpu(root / "dev"):
    return
  with contextlib.suppress(ImportError, TypeError, RuntimeError):  # if a later JAX lacks this API
    from jax.extend.backend import register_backend_factory

    register_backend_factory("tpu", lambda: None)  # JAX skips None silently


def _may_have_tpu(devices: Path) -> bool:
  vfio = [path for path in devices.glob("vfio/*") if path.name != "vfio"]
  return bool(vfio) or any(devices.glob("accel[0-9]*"))


def _note(text: str) -> None:
  print(f"note: {text}", file=sys.stderr, flush=True)


def set_xla_flags() -> None:
  """Adds our options to XLA_FLAGS, except those that the user has set, there or in a file."""
  flags = os.environ.get("XLA_FLAGS", "").strip()
  if flags and not flags.startswith("-"):  # for XLA this is a file's name
    flags = _flags_in(Path(flags))
  ours = [flag for flag in _XLA_FLAGS if flag.split("=")[0] not in flags]
  os.environ["XLA_FLAGS"] = " ".join([flags, *ours]).strip()


def _flags_in(file: Path) -> str:
  """The flags in a file, in which XLA reads nothing that follows another word."""
  try:
    text = file.read_text().strip()
  except (OSError, ValueError):
    text = ""
  if text.startswith("-"):
    return text
  _note(f"XLA_FLAGS={file} is neither flags nor a file of flags: it is not used")
  return ""


def _use_every_core(batch_size: int) -> None:
  """Makes each physical CPU core that may be used a JAX device, so that a step runs on all of them.

  XLA's own threads split one batch poorly among cores; as separate devices, the cores work on small
  microbatches that stay in their caches. It uses the largest number of cores that divides
  `batch_size`, at most _MOST_CPU_DEVICES, unless the user has set the number of CPU devices, and
  does not affect accelerators.
  """
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  if "JAX_NUM_CPU_DEVICES" in os.environ:
    return
  most = min(physical_cores(), _MOST_CPU_DEVICES)
  devices = next(n for n in range(most, 0, -1) if batch_size % n == 0)
  with contextlib.suppress(RuntimeError):  # JAX has already started: its devices stay
    jax.config.update("jax_num_cpu_devices", devices)


def _keep_freed_memory() -> None:
  """Makes glibc keep up to 64 MiB of freed memory for the next allocation.

  On a CPU, each of XLA's matrix products allocates its temporaries anew. By default glibc returns
  them to the system in between, and mapping them again page by page is slow.
  """
  if platform.libc_ver()[0] == "glibc":
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # glibc's maximum
    libc.mallopt(_M_TRIM_THRESHOLD, 2**26)


def compiler_options(config: ConfigDict, mesh: Mesh) -> dict[str, str]:
  """XLA's options to compile the gradients of `config.model`."""
  if config.remat and mesh.devices.flat[0].platform == "cpu":
    # On a CPU, XLA drops the barriers before recomputed operations and merges them with the
    # originals: remat would save nothing.
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}
  return {}


def in_background(compile_all: Callable[[], Result]) -> Future[Result]:
  """Compiles in a thread: XLA releases Python's lock, so images can be read meanwhile."""
  worker = ThreadPoolExecutor(1)
  compiling = worker.submit(compile_all)
  worker.shutdown(wait=False)
  return compiling
