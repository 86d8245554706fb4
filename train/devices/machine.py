"""CPU cores and memory available to this process, and what it has used of them."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:  # preparing a dataset needs no JAX, which takes a second to import
  from jax.sharding import Mesh


def cores() -> int:
  """CPU cores that this process may use."""
  affinity = getattr(os, "sched_getaffinity", None)  # Linux only
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def memory_limit(root: Path = Path("/")) -> int:
  """Bytes that this process may use: the least of the host's memory and its cgroups' limits.

  Args:
    root: root of the file system; tests pass another.
  """
  limits = [psutil.virtual_memory().total]
  groups = root / "proc/self/cgroup"
  for line in groups.read_text().splitlines() if groups.exists() else []:
    _, controllers, path = line.split(":", 2)
    if controllers not in ("", "memory"):  # cgroups version 2, version 1
      continue
    name = "memory.limit_in_bytes" if controllers else "memory.max"
    group = root / "sys/fs/cgroup" / controllers / path.lstrip("/")
    # Parent groups limit memory as well. A container may see its own group as the root.
    for folder in (group, *group.parents):
      if (folder / name).exists() and (text := (folder / name).read_text().strip()) != "max":
        limits.append(int(text))
  return min(limits)


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
