"""How JAX is started, and what its compiler is told."""

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
  # XLA ends the process if a CPU device waits 40 s for another at the sum of the gradients: a step
  # of Perceiver on a busy machine, or a laptop's lid.
  "--xla_cpu_collective_call_terminate_timeout_seconds=3600",
  # Results that read the same arrays are computed in one loop. On a CPU, the gradients of FNet take
  # 6 % less time, those of gMLP 5 %.
  "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true",
)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def start_jax(config: ConfigDict) -> None:
  """Sets JAX up for a run, before anything starts its backend.

  Compiled programs are kept in the user's cache folder, if `config.compilation_cache` says so and
  the user has chosen no other folder (JAX_COMPILATION_CACHE_DIR).
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

  Call it before anything starts JAX's backend. It changes nothing where there may be a TPU, or
  where the user has set JAX_PLATFORMS.

  Args:
    root: of the file system, for tests.
  """
  # JAX sets the platforms itself where it sees a TPU; libtpu also looks at the device files.
  if getattr(jax.config, "jax_platforms", None) is not None or _may_have_tpu(root / "dev"):
    return
  with contextlib.suppress(ImportError, TypeError, RuntimeError):  # a later JAX: nothing changes
    from jax.extend.backend import register_backend_factory

    register_backend_factory("tpu", lambda: None)  # None: there is none, which JAX takes quietly


def _may_have_tpu(devices: Path) -> bool:
  vfio = [path for path in devices.glob("vfio/*") if path.name != "vfio"]
  return bool(vfio) or any(devices.glob("accel[0-9]*"))


def set_xla_flags() -> None:
  """Adds our options to XLA_FLAGS, but for those that the user has set."""
  flags = os.environ.get("XLA_FLAGS", "")
  ours = [flag for flag in _XLA_FLAGS if flag.split("=")[0] not in flags]
  os.environ["XLA_FLAGS"] = " ".join([flags, *ours]).strip()


def _use_every_core(batch_size: int) -> None:
  """Makes each CPU core a JAX device, so that one step runs on all of them.

  XLA's own threads share one batch poorly between cores; as devices of their own, the cores work
  through small microbatches that stay in their caches. Has no effect where JAX finds an
  accelerator, or where the user has set the number of CPU devices.

  Args:
    batch_size: of the run; the largest number of cores that divides it is taken.
  """
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  if "JAX_NUM_CPU_DEVICES" in os.environ:
    return
  devices = next(n for n in range(cores(), 0, -1) if batch_size % n == 0)
  jax.config.update("jax_num_cpu_devices", devices)


def _keep_freed_memory() -> None:
  """Has glibc keep up to 64 MiB that is freed, for what is allocated next.

  XLA's products on a CPU allocate their temporaries anew each time. Given back to the system in
  between, and mapped again page by page, they double the time of ViT's evaluation.
  """
  if platform.libc_ver()[0] == "glibc":
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that glibc takes
    libc.mallopt(_M_TRIM_THRESHOLD, 2**26)


def compiler_options(config: ConfigDict, mesh: Mesh) -> dict[str, str]:
  """What XLA must be told to compile gradients for `config`."""
  if config.remat and mesh.devices.flat[0].platform == "cpu":
    # On a CPU, XLA drops the barriers in front of what is computed again, and then finds that it
    # has computed it before: remat would save nothing.
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}
  return {}


def in_background(compile_all: Callable[[], Result]) -> Future[Result]:
  """Calls a function that compiles, in a thread: XLA needs no Python, so images can be read."""
  worker = ThreadPoolExecutor(1)
  compiling = worker.submit(compile_all)
  worker.shutdown(wait=False)
  return compiling
