"""What of the machine this process may use."""

import os
from pathlib import Path

import psutil


def cores() -> int:
  """CPU cores that this process may use."""
  affinity = getattr(os, "sched_getaffinity", None)  # Linux only
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def memory_limit(root: Path = Path("/")) -> int:
  """Bytes that this process may use: the host's, or those of its container or job (Linux cgroups).

  Args:
    root: of the file system, for tests.
  """
  limits = [psutil.virtual_memory().total]
  groups = root / "proc/self/cgroup"
  for line in groups.read_text().splitlines() if groups.exists() else []:
    _, controllers, path = line.split(":", 2)
    if controllers not in ("", "memory"):  # of version 2, and of version 1
      continue
    name = "memory.limit_in_bytes" if controllers else "memory.max"
    group = root / "sys/fs/cgroup" / controllers / path.lstrip("/")
    # Those above limit it, too. A container may see its own group as the topmost one.
    for folder in (group, *group.parents):
      if (folder / name).exists() and (text := (folder / name).read_text().strip()) != "max":
        limits.append(int(text))
  return min(limits)
