"""CPU cores and memory available to this process, and what it has used of them."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:  # preparing a dataset needs no JAX, which takes a second to import
  from jax.sharding import Mesh


def cores(root: Path = Path("/")) -> int:
  """CPU cores that this process may use at once, hyperthreads included.

  Its affinity mask counts, and the quotas of its cgroups: 1.5 cores are 2.

  Args:
    root: root of the file system; tests pass another.
  """
  limits = [len(_cpus())]
  for group in _cgroups(root, "cpu"):
    quota = _words(group / "cpu.max")  # cgroups version 2, version 1
    quota = quota or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
    if len(quota) == 2 and quota[0] not in ("max", "-1"):
      limits.append(max(1, math.ceil(int(quota[0]) / int(quota[1]))))
  return min(limits)


def physical_cores(root: Path = Path("/")) -> int:
  """Physical cores that this process may use at once; the hyperthreads of one core count once.

  Where the system does not say which CPUs share a core, each counts.

  Args:
    root: root of the file system; tests pass another.
  """
  topology = [root / f"sys/devices/system/cpu/cpu{cpu}/topology" for cpu in _cpus()]
  siblings = {tuple(_words(cpu / "thread_siblings_list")) or cpu for cpu in topology}
  return min(len(siblings), cores(root))


def _cpus() -> set[int]:
  """The numbers of the CPUs on which this process may run."""
  affinity = getattr(os, "sched_getaffinity", None)  # Linux only
  return affinity(0) if affinity else set(range(psutil.cpu_count(logical=False) or 1))


def memory_limit(root: Path = Path("/")) -> int:
  """Bytes that this process may use: the least of the host's memory and its cgroups' limits.

  Args:
    root: root of the file system; tests pass another.
  """
  limits = [psutil.virtual_memory().total]
  for group in _cgroups(root, "memory"):
    for name in ("memory.max", "memory.limit_in_bytes"):  # cgroups version 2, version 1
      limits += [int(word) for word in _words(group / name) if word != "max"]
  return min(limits)


def cache_folder() -> Path | None:
  """The user's folder for what can be made anew; None where there is neither it nor a home."""
  folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  return None if folder.startswith("~") else Path(folder, "mlp_models")


def cpu_features(root: Path = Path("/")) -> str:
  """What the CPU's instructions depend on; "" where the system does not say.

  Args:
    root: root of the file system; tests pass another.
  """
  file = root / "proc/cpuinfo"
  lines = file.read_text().splitlines() if file.exists() else []
  of_cpus = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
  return "\n".join(sorted(of_cpus))


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
  """Folders of this process' cgroups for a controller, and of their parents: all of them limit it.

  A container may see its own group as the root.
  """
  groups = root / "proc/self/cgroup"
  for line in groups.read_text().splitlines() if groups.exists() else []:
    _, controllers, path = line.split(":", 2)
    if controllers and controller not in controllers.split(","):  # none: cgroups version 2
      continue
    for mount in {controllers, controllers and controller}:
      group = root / "sys/fs/cgroup" / mount / path.lstrip("/")
      yield from (group, *group.parents)


def _words(file: Path) -> list[str]:
  """The words of a file of the system; none if it can't be read."""
  try:
    return file.read_text().split()
  except OSError:
    return []


def peak_memory(devices: Mesh) -> int:
  """Peak bytes: of the fullest device on an accelerator, of the whole process on a CPU."""
  if devices.devices.flat[0].platform != "cpu":
    return max(d.memory_stats()["peak_bytes_in_use"] for d in devices.local_devices)
  return process_memory()


def process_memory() -> int:
  """Peak memory of this process so far, in bytes."""
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_age() -> float:
  """Seconds since this process started."""
  created = psutil.Process().create_time()
  if hasattr(time, "CLOCK_BOOTTIME"):
    # On Linux psutil adds the exact time from boot to start to a boot time in whole seconds.
    # Subtract the latter again, and compare with the clock that starts at boot.
    return time.clock_gettime(time.CLOCK_BOOTTIME) - (created - psutil.boot_time())
  return time.time() - created
