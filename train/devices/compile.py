"""Sets JAX up before its backend starts: devices, memory, caches and XLA's options."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train.devices.machine import cores

Result = TypeVar("Result")

_XLA_FLAGS = (
  # By default XLA aborts if a CPU device waits 40 s for another to sum gradients: Perceiver on a
  # busy machine can take that long, and so does a sleeping laptop.
  "--xla_cpu_collective_call_terminate_timeout_seconds=3600",
  # Computes results that read the same arrays in one loop: faster gradients on a CPU.
  "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true",
)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def start_jax(config: ConfigDict) -> None:
  """Sets JAX up for a run, before anything starts its backend.

  With `config.compilation_cache` compiled programs are kept in the user's cache folder, unless
  JAX_COMPILATION_CACHE_DIR names another.
  """
  skip_missing_tpu()
  _use_every_core(config.batch_size)
  _keep_freed_memory()
  set_xla_flags()
  if config.compilation_cache and not getattr(jax.config, "jax_compilation_cache_dir", None):
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlp_models"
    jax.config.update("jax_compilation_cache_dir", str(folder))


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


def set_xla_flags() -> None:
  """Adds our options to XLA_FLAGS, except those that the user has set."""
  flags = os.environ.get("XLA_FLAGS", "")
  ours = [flag for flag in _XLA_FLAGS if flag.split("=")[0] not in flags]
  os.environ["XLA_FLAGS"] = " ".join([flags, *ours]).strip()


def _use_every_core(batch_size: int) -> None:
  """Makes each CPU core a JAX device, so that one step runs on all of them.

  XLA's own threads split one batch poorly among cores; as separate devices, the cores work on small
  microbatches that stay in their caches. It uses the largest number of cores that divides
  `batch_size`, unless the user has set the number of CPU devices, and does not affect accelerators.
  """
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  if "JAX_NUM_CPU_DEVICES" in os.environ:
    return
  devices = next(n for n in range(cores(), 0, -1) if batch_size % n == 0)
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
