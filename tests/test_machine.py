"""The memory of a process is that of its container or job."""

import psutil
import pytest

from train.devices.machine import memory_limit


@pytest.mark.parametrize(
  ("group", "files", "expected"),
  [
    ("0::/pod/task", {"pod/memory.max": 2**30, "pod/task/memory.max": "max"}, 2**30),
    ("0::/of/the/host", {"memory.max": 2**29}, 2**29),  # as in a container
    ("4:memory:/job", {"memory/job/memory.limit_in_bytes": 2**28}, 2**28),
    ("0::/", {}, psutil.virtual_memory().total),
  ],
)
def test_memory_is_that_of_the_container_or_job(group, files, expected, tmp_path):
  (tmp_path / "proc" / "self").mkdir(parents=True)
  (tmp_path / "proc" / "self" / "cgroup").write_text(f"9:pids:/other\n{group}\n")
  for name, limit in files.items():
    file = tmp_path / "sys" / "fs" / "cgroup" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{limit}\n")
  assert memory_limit(tmp_path) == expected


def test_memory_without_cgroups_is_the_hosts(tmp_path):
  assert memory_limit(tmp_path) == psutil.virtual_memory().total
