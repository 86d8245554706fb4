"""Batches from memory or disk: every image once, in an order of seed and number alone."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import psutil
import pytest
from conftest import SHAPES100_DIR, TESTS

from configs import default
from train import data
from train.data.batches import batches, num_batches, prefetch, train_calls
from train.data.folder import Records
from train.devices.mesh import make_mesh
from train.errors import DataError


def numbered(n):
  """A split whose image i is filled with i and whose label is i."""
  labels = np.arange(n, dtype=np.int32)
  return data.Split(np.tile(labels.astype(np.uint8)[:, None, None, None], (1, 2, 2, 3)), labels)


def kept(batches):
  """Labels of the rows whose mask is True, in order."""
  return np.concatenate([batch["label"][batch["mask"]] for batch in batches])


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("batch_size", [1, 7, 50, 100, 128])
def test_every_image_comes_exactly_once(batch_size, seed):
  cut = list(batches(numbered(100), batch_size, seed=seed))
  assert len(cut) == num_batches(100, batch_size)
  assert sorted(kept(cut)) == list(range(100))
  for batch in cut:
    assert batch["image"].shape == (batch_size, 2, 2, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (batch_size,) and batch["label"].dtype == np.int32
    assert batch["mask"].shape == (batch_size,) and batch["mask"].dtype == bool
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])


def test_without_a_seed_the_order_is_that_on_disk():
  np.testing.assert_array_equal(kept(batches(numbered(100), 7)), np.arange(100))


def test_order_is_a_function_of_seed_and_epoch():
  def order(seed, epoch):
    numbers = range(13 * epoch, 13 * epoch + 13)
    return kept(batches(numbered(100), 8, seed=seed, numbers=numbers)).tolist()

  assert order(3, 4)[:8] == [2, 19, 57, 33, 60, 63, 75, 83]
  assert order(3, 4) == order(3, 4)
  assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_batches_go_on_with_the_one_that_was_next():
  whole = list(batches(numbered(100), 8, seed=1, numbers=range(40)))
  rest = list(batches(numbered(100), 8, seed=1, numbers=range(15, 40)))
  jax.tree.map(np.testing.assert_array_equal, rest, whole[15:])
  for epoch in range(3):
    assert sorted(kept(whole[13 * epoch : 13 * epoch + 13])) == list(range(100))


def test_processes_share_a_batch_between_them():
  whole = list(batches(numbered(100), 8, seed=1))
  shares = [list(batches(numbered(100), 8, seed=1, rows=np.arange(i, i + 4))) for i in (0, 4)]
  for batch, first, second in zip(whole, *shares, strict=True):
    together = jax.tree.map(lambda *x: np.concatenate(x), first, second)
    jax.tree.map(np.testing.assert_array_equal, together, batch)


@pytest.mark.parametrize("steps_per_call", [1, 3, 20])
def test_no_call_reaches_over_the_end_of_an_epoch(steps_per_call):
  config = default.get_config()
  config.batch_size, config.seed, config.steps_per_call = 8, 1, steps_per_call
  calls = train_calls(numbered(100), config, make_mesh(), range(5, 30))  # 13 an epoch
  sizes = {
    1: [1] * 25,
    3: [3, 3, 2, 3, 3, 3, 3, 1, 3, 1],
    20: [8, 13, 4],
  }
  calls = list(jax.device_get(list(calls)))
  assert [len(call["label"]) for call in calls] == sizes[steps_per_call]
  expected = kept(batches(numbered(100), 8, seed=1, numbers=range(5, 30)))
  np.testing.assert_array_equal(np.concatenate([c["label"][c["mask"]] for c in calls]), expected)


@pytest.mark.parametrize("size", [0, 2, 50])
def test_prefetch_keeps_order_and_places_batches_on_the_mesh(size):
  mesh = make_mesh()
  sharding = jax.NamedSharding(mesh, jax.P("data"))
  batch_size = 2 * jax.device_count()
  placed = list(prefetch(batches(numbered(100), batch_size), sharding, size))
  np.testing.assert_array_equal(kept(jax.device_get(placed)), np.arange(100))
  assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(placed))


def test_prefetch_reads_no_further_ahead_than_told():
  taken = []
  iterator = (taken.append(i) or {"label": np.full(1, i)} for i in range(10))
  next(prefetch(iterator, jax.sharding.SingleDeviceSharding(jax.devices()[0]), size=2))
  assert taken == [0, 1, 2]


# Streamed -----------------------------------------------------------------------------------------


def splits(**overrides) -> data.Dataset:
  """The splits of the fixture shapes100."""
  config = default.get_config().data
  config.name, config.data_dir = "shapes100", str(SHAPES100_DIR)
  config.train_split, config.test_split = "train[:600]", "test[:150]"
  config.update(overrides)
  return data.load(config, image_size=64, splits=("train", "test"))


@pytest.mark.parametrize("in_processes", [False, True])
def test_streamed_batches_are_those_in_memory(shapes100, in_processes):
  in_memory, streamed = splits(), splits(in_memory_bytes=0, workers=2)
  assert isinstance(in_memory.train, data.Split)
  assert isinstance(streamed.train, data.StreamedSplit)
  for name, seed, numbers in (("train", 3, range(7, 23)), ("test", None, None)):
    expected = batches(getattr(in_memory, name), 64, seed=seed, numbers=numbers)
    split = getattr(streamed, name)
    got = batches(split, 64, seed=seed, numbers=numbers, in_processes=in_processes)
    for batch, like in zip(got, expected, strict=True):
      jax.tree.map(np.testing.assert_array_equal, batch, like)


def test_an_image_that_cannot_be_read_by_a_worker_is_named(tmp_path):
  records = Records([str(tmp_path / "cat" / "1.png")], [0])
  split = data.StreamedSplit(records, (8, 8, 3), workers=1)
  with pytest.raises(
    DataError, match=r"cat/1.png can't be read: .*No such file.* out of the folder"
  ):
    list(batches(split, 4, in_processes=True))


def test_workers_end_with_their_process(shapes100, tmp_path):
  code = """
import os, signal, time
import psutil
from test_batches import batches, splits
split = splits(in_memory_bytes=0, workers=2).train
iterator = batches(split, 8, seed=0, numbers=range(1000), in_processes=True)
next(iterator)
workers = psutil.Process().children(recursive=True)
print(*(worker.pid for worker in workers if "spawn_main" in " ".join(worker.cmdline())), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
  script = tmp_path / "read.py"
  script.write_text(f"if __name__ == '__main__':\n{textwrap.indent(code, '  ')}")
  paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
  process = subprocess.run(
    [sys.executable, script],
    env=os.environ | {"PYTHONPATH": paths},
    stdout=subprocess.PIPE,
    text=True,
    timeout=200,
  )
  workers = [int(pid) for pid in process.stdout.split()]
  assert process.returncode == -signal.SIGKILL and len(workers) == 2
  deadline = time.monotonic() + 10
  while any(psutil.pid_exists(pid) for pid in workers):
    assert time.monotonic() < deadline
    time.sleep(0.05)


@pytest.mark.needs(what="namespaces")
def test_workers_that_would_overflow_shared_memory_are_threads(shapes100, tmp_path):
  code = """
import numpy as np
from test_batches import batches, splits
split = splits(in_memory_bytes=0, workers=2).train
for epoch in range(2):
  cut = list(batches(split, 64, in_processes=True))
print(len(cut), sum(int(batch["mask"].sum()) for batch in cut))
"""
  script = tmp_path / "read.py"
  script.write_text(f"if __name__ == '__main__':\n{textwrap.indent(code, '  ')}")
  paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
  mount = "mount -t tmpfs -o size=600k none /dev/shm && exec"
  process = subprocess.run(
    ["unshare", "-m", "sh", "-c", f"{mount} {sys.executable} {script}"],
    env=os.environ | {"PYTHONPATH": paths},
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert (process.returncode, process.stdout) == (0, "10 600\n"), process.stderr
  assert process.stderr.count("--shm-size=1g") == 1  # in two epochs
