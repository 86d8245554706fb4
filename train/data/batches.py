"""Cuts images into batches, and puts them on the mesh.

Batches are numbered from 0 over all epochs. Batch n depends only on (seed, n), not on the number of
processes or the source of the images, so a checkpoint needs to hold only the step.
"""

import collections
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Generator, Iterator, Mapping

import absl.flags
import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from ml_collections import ConfigDict

from train.data.complaints import complaints
from train.data.splits import AnySplit, StreamedSplit
from train.devices.mesh import by_example
from train.interrupt import SIGNALS

Batch = Mapping[str, np.ndarray]  # image uint8 [B, H, W, C], label int32 [B], mask bool [B]

_SHARED_MEMORY = "/dev/shm"  # Linux's; 64 MB in docker's containers by default
_PR_SET_PDEATHSIG = 1  # from Linux's sys/prctl.h


def num_batches(num_examples: int, batch_size: int) -> int:
  """Number of batches that hold every example once; the last may be padded."""
  return -(-num_examples // batch_size)


@functools.lru_cache(maxsize=2)  # the current epoch and the next
def _order(size: int, seed: int | None, epoch: int) -> np.ndarray:
  """Indices of the images of an epoch (from 0) in order; without a seed, the order on disk."""
  if seed is None:
    return np.arange(size)
  # numpy has frozen RandomState's stream, so a run can resume with a later numpy. Recipes count
  # epochs from 1.
  return np.random.RandomState([seed, epoch + 1]).permutation(size)


@dataclasses.dataclass(frozen=True)
class _Batches:
  """Batches by number: a data source for Grain."""

  split: AnySplit
  batch_size: int
  seed: int | None
  numbers: range
  rows: np.ndarray  # rows of each batch to read

  def __len__(self) -> int:
    return len(self.numbers)

  def __getitem__(self, index: int) -> Batch:
    size = len(self.split)
    epoch, number = divmod(self.numbers[index], num_batches(size, self.batch_size))
    places = number * self.batch_size + self.rows
    mask = places < size
    images = np.where(mask, _order(size, self.seed, epoch)[places * mask], 0)
    image, label = self.split[images]
    return {"image": image, "label": label, "mask": mask}


def batches(
  split: AnySplit,
  batch_size: int,
  *,
  seed: int | None = None,
  numbers: range | None = None,
  rows: np.ndarray | None = None,
  in_processes: bool = False,
) -> Iterator[Batch]:
  """Cuts a split into batches, every image exactly once per epoch.

  Args:
    split: the images; Grain reads and decodes a streamed split ahead.
    batch_size: B, rows of each batch, over all devices of all processes.
    seed: shuffles: the order depends only on (seed, epoch). None: the order on disk.
    numbers: batches to yield, counted over all epochs; None: one epoch.
    rows: rows of each batch to yield, such as this process' own; None: all.
    in_processes: decode a streamed split in worker processes, which take seconds to start, instead
      of threads, if shared memory has room for their batches.
  Yields:
    {"image": uint8 [B, H, W, C], "label": int32 [B], "mask": bool [B]}, or only the `rows` of it.
    An epoch's last batch is padded with rows whose mask is False.
  Raises:
    DataError: an image can't be read.
  """
  if numbers is None:
    numbers = range(num_batches(len(split), batch_size))
  rows = np.arange(batch_size) if rows is None else rows
  source = _Batches(split, batch_size, seed, numbers, rows)
  if not source:
    return
  if isinstance(split, StreamedSplit):
    if in_processes:
      batch_bytes = len(rows) * math.prod(split.shape)
      in_processes = _fits_shared_memory(batch_bytes, min(split.workers, len(source)))
    yield from _stream(source, split.workers, in_processes)
  else:
    yield from map(source.__getitem__, range(len(source)))


def _stream(source: _Batches, workers: int, in_processes: bool) -> Iterator[Batch]:
  """Yields the batches of a source in order; workers take turns to read them ahead."""
  import grain  # late: takes seconds, and only streamed sets need it

  absl.flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags, which nothing else parses
  threads = 1 if in_processes else workers
  dataset = grain.MapDataset.source(source).to_iter_dataset(
    # One batch more than threads, so that no thread waits for a batch to be taken.
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
  )
  if in_processes:
    options = grain.MultiprocessingOptions(num_workers=min(workers, len(source)))
    # Python warns when it removes shared memory that Grain leaves behind.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    dataset = dataset.mp_prefetch(options, worker_init_fn=_begin_worker)
  with contextlib.closing(iter(dataset)) as iterator:
    yield from iterator


def _fits_shared_memory(batch_bytes: int, workers: int) -> bool:
  """Whether the batches that workers hand over fit in shared memory; says once if they do not.

  A worker that writes more than fits is killed by the kernel (SIGBUS).
  """
  # Each worker makes one while another is in its queue; those taken wait to be placed on devices.
  needed = batch_bytes * (3 * workers + 4)
  try:
    free = shutil.disk_usage(_SHARED_MEMORY).free
  except OSError:  # a system that keeps it elsewhere
    return True
  if needed > free:
    _advise_shared_memory(needed, workers)
  return needed <= free


@functools.cache  # once
def _advise_shared_memory(needed: int, workers: int) -> None:
  print(
    f"{_SHARED_MEMORY} is too small for {workers} workers, which need {needed / 1e6:,.0f} MB: "
    "images are decoded in threads, which may be slower. In a container "
    f"--shm-size={-(-needed // 2**30)}g helps.",
    file=sys.stderr,
    flush=True,
  )


def _begin_worker(worker: int, workers: int) -> None:
  """Makes a worker ignore signals, end with its parent process, and say what others say once."""
  del workers
  complaints.said = worker > 0  # the first speaks for all
  for signum in SIGNALS:
    signal.signal(signum, signal.SIG_IGN)
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before the kernel was asked to say so.
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:
      os._exit(1)


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Indices of the rows of a batch that this process' devices hold, in order."""
  places = by_example(mesh).addressable_devices_indices_map((batch_size,)).values()
  rows = np.arange(batch_size)
  return np.unique(np.concatenate([rows[place] for place in places]))


def train_calls(
  split: AnySplit, config: ConfigDict, mesh: Mesh, steps: range
) -> Generator[dict[str, jax.Array]]:
  """Yields the batches of each call of the train step, on the mesh: image [K, B, H, W, C] etc.

  Args:
    steps: counted over all epochs. All K steps of a call are in one epoch, so an epoch's last call
      may have fewer than `config.steps_per_call`.
  """
  per_epoch = num_batches(len(split), config.batch_size)
  rows = own_rows(mesh, config.batch_size)
  iterator = batches(
    split, config.batch_size, seed=config.seed, numbers=steps, rows=rows, in_processes=True
  )

  def sizes() -> Iterator[int]:
    step = steps.start
    while step < steps.stop:
      size = min(config.steps_per_call, per_epoch - step % per_epoch, steps.stop - step)
      yield size
      step += size

  return prefetch(stack(iterator, sizes()), by_example(mesh, axis=1))


def eval_batches(split: AnySplit, batch_size: int, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
  """Yields the batches for the eval step, on the mesh: every image of the split once."""
  iterator = batches(split, batch_size, rows=own_rows(mesh, batch_size))
  return prefetch(iterator, by_example(mesh))


def stack(iterator: Iterator[Batch], sizes: Iterator[int]) -> Iterator[Batch]:
  """Stacks as many batches as `sizes` says, until none are left: image [size, B, H, W, C] etc."""
  for size in sizes:
    if not (group := list(itertools.islice(iterator, size))):
      return
    yield {key: np.stack([batch[key] for batch in group]) for key in group[0]}


def prefetch(
  iterator: Iterator[Batch], sharding: Sharding, size: int = 2
) -> Generator[dict[str, jax.Array]]:
  """Puts batches on the mesh ahead of their use, at most `size` at a time; keeps their order.

  Each process passes its own rows. Copies are asynchronous: the next batches are copied while a
  step computes.
  """
  ahead: collections.deque[dict[str, jax.Array]] = collections.deque()
  for batch in iterator:
    ahead.append(
      {key: jax.make_array_from_process_local_data(sharding, x) for key, x in batch.items()}
    )
    if len(ahead) > size:
      yield ahead.popleft()
  yield from ahead
