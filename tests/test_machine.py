"""The memory and the cores of a process are those of its container or job."""

import os
from pathlib import Path

import psutil
import pytest

from train.devices.machine import cores, memory_limit, physical_cores


def write_groups(root: Path, groups: str, files: dict[str, object]) -> None:
  """/proc/self/cgroup, and files below /sys/fs/cgroup, with `root` as /."""
  (root / "proc" / "self").mkdir(parents=True)
  (root / "proc" / "self" / "cgroup").write_text(groups)
  for name, content in files.items():
    file = root / "sys" / "fs" / "cgroup" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{content}\n")


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
  write_groups(tmp_path, f"9:pids:/other\n{group}\n", files)
  assert memory_limit(tmp_path) == expected


def test_memory_without_cgroups_is_the_hosts(tmp_path):
  assert memory_limit(tmp_path) == psutil.virtual_memory().total


@pytest.fixture
def on_64_cpus(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)


V1, V2 = "3:cpu,cpuacct:/job", "0::/pod/task"
ONE_FOLDER, TWO_FOLDERS = "cpu,cpuacct/job", "cpu/job"


def quota_v1(folder: str, quota: int, period: int = 100_000) -> dict[str, int]:
  return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
  ("groups", "files", "expected"),
  [
    (V2, {"pod/task/cpu.max": "200000 100000"}, 2),
    (V2, {"pod/task/cpu.max": "150000 100000"}, 2),  # 1.5
    (V2, {"pod/task/cpu.max": "5000 100000"}, 1),  # 0.05
    (V2, {"pod/task/cpu.max": "max 100000", "pod/cpu.max": "300000 100000"}, 3),  # the parent's
    (V2, {"pod/task/cpu.max": "9900000 100000"}, 64),  # more than there are
    (V2, {"cpu.max": "25000 50000"}, 1),  # as in a container, which sees its group as the root
    (V1, quota_v1(ONE_FOLDER, 400_000), 4),
    (V1, quota_v1(TWO_FOLDERS, 400_000), 4),
    (V1, quota_v1("cpu,cpuacct", 20_000, 10_000), 2),  # the parent's
    (V1, quota_v1(ONE_FOLDER, -1), 64),
    (f"{V1}\n0::/", quota_v1(ONE_FOLDER, 100_000), 1),
    ("4:memory:/job", quota_v1("memory/job", 100_000), 64),
    ("0::/", {}, 64),
  ],
)
def test_cores_are_those_of_the_container_or_job(groups, files, expected, tmp_path, on_64_cpus):
  write_groups(tmp_path, groups + "\n", files)
  assert cores(tmp_path) == expected
  assert physical_cores(tmp_path) == expected  # nothing says which of them share a core


def test_hyperthreads_of_a_core_count_once(tmp_path, on_64_cpus, monkeypatch):
  write_groups(tmp_path, "0::/\n", {})
  for cpu in range(64):
    topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
    topology.mkdir(parents=True)
    (topology / "thread_siblings_list").write_text(f"{cpu % 32},{cpu % 32 + 32}\n")
  assert (cores(tmp_path), physical_cores(tmp_path)) == (64, 32)
  monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 32, 5})
  assert (cores(tmp_path), physical_cores(tmp_path)) == (4, 3)
  (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
  (tmp_path / "sys/fs/cgroup/cpu.max").write_text("200000 100000\n")
  assert (cores(tmp_path), physical_cores(tmp_path)) == (2, 2)


def test_cores_here_are_what_the_system_says():
  assert 1 <= physical_cores() <= cores() <= (os.cpu_count() or 1)
