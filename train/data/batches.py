"""Images -> batches on the mesh: which image is where, and how it gets there.

Batches are numbered from 0 over all epochs. What is in number n is a function of (seed, n), neither
of the processes nor of where the images come from: a step's number is all that a checkpoint needs
to know of the data.
"""

import collections
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import os
import signal
import sys
from collections.abc import Generator, Iterator, Mapping

import absl.flags
import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from ml_collections import ConfigDict

from train.data.splits import AnySplit, StreamedSplit
from train.devices.mesh import by_example
from train.interrupt import SIGNALS

Batch = Mapping[str, np.ndarray]  # image uint8 [B, H, W, C], label int32 [B], mask bool [B]

_PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


def num_batches(num_examples: int, batch_size: int) -> int:
  """Batches that hold every example once; the last may be filled up."""
  return -(-num_examples // batch_size)


@functools.lru_cache(maxsize=2)  # of the epoch under way, and of the next
def _order(size: int, seed: int | None, epoch: int) -> np.ndarray:
  """The images of an epoch (from 0), in order: as on disk without a seed."""
  if seed is None:
    return np.arange(size)
  # RandomState, as numpy has frozen its stream: a run may be resumed with a later numpy. Recipes
  # count epochs from 1.
  return np.random.RandomState([seed, epoch + 1]).permutation(size)


@dataclasses.dataclass(frozen=True)
class _Batches:
  """Batches by number, as Grain reads a source."""

  split: AnySplit
  batch_size: int
  seed: int | None
  numbers: range
  rows: np.ndarray  # of each batch, those to read

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
  """Cuts a split in batches, every image exactly once an epoch.

  Args:
    split: what to cut. A streamed one is read and decoded ahead by Grain.
    batch_size: B, rows of each batch, over all devices of all processes.
    seed: shuffles: the order is a function of (seed, epoch) alone. None: the order on disk.
    numbers: of the batches to give, counted over all epochs; None: those of one epoch.
    rows: of each batch, those to give: a process' own; None: all.
    in_processes: decode a streamed split in processes of their own, which take seconds to start,
      and not in threads.
  Yields:
    {"image": uint8 [B, H, W, C], "label": int32 [B], "mask": bool [B]}, or the `rows` of it. An
    epoch's last batch is filled up with rows whose mask is False.
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
    yield from _stream(source, split.workers, in_processes)
  else:
    yield from map(source.__getitem__, range(len(source)))


def _stream(source: _Batches, workers: int, in_processes: bool) -> Iterator[Batch]:
  """The batches of a source in order, read ahead by workers, each every `workers`th batch."""
  import grain  # late: seconds, and sets that fit the memory need it not

  absl.flags.FLAGS.mark_as_parsed()  # Grain reads flags of absl's, which nobody has parsed
  threads = 1 if in_processes else workers
  dataset = grain.MapDataset.source(source).to_iter_dataset(
    # One batch more than threads, so that none of them waits until a batch is taken.
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
  )
  if in_processes:
    options = grain.MultiprocessingOptions(num_workers=min(workers, len(source)))
    # What Grain leaves in shared memory at its end, Python's tracker removes, with a warning.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    dataset = dataset.mp_prefetch(options, worker_init_fn=_begin_worker)
  with contextlib.closing(iter(dataset)) as iterator:
    yield from iterator


def _begin_worker(worker: int, workers: int) -> None:
  """A worker leaves signals to the process that it reads for, and ends with it."""
  del worker, workers
  for signum in SIGNALS:
    signal.signal(signum, signal.SIG_IGN)
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a batch that lie on this process' devices, in order."""
  places = by_example(mesh).addressable_devices_indices_map((batch_size,)).values()
  rows = np.arange(batch_size)
  return np.unique(np.concatenate([rows[place] for place in places]))


def train_calls(
  split: AnySplit, config: ConfigDict, mesh: Mesh, steps: range
) -> Generator[dict[str, jax.Array]]:
  """What `step.make_train_step`'s function takes for some steps, counted over all epochs.

  A call's steps are all of one epoch: its last call may have fewer than `config.steps_per_call`.
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
  """What `step.make_eval_step`'s function takes: every image of the split once."""
  iterator = batches(split, batch_size, rows=own_rows(mesh, batch_size))
  return prefetch(iterator, by_example(mesh))


def stack(iterator: Iterator[Batch], sizes: Iterator[int]) -> Iterator[Batch]:
  """Stacks so many batches at a time, until there are none: image uint8 [size, B, H, W, C] etc."""
  for size in sizes:
    if not (group := list(itertools.islice(iterator, size))):
      return
    yield {key: np.stack([batch[key] for batch in group]) for key in group[0]}


def prefetch(
  iterator: Iterator[Batch], sharding: Sharding, size: int = 2
) -> Generator[dict[str, jax.Array]]:
  """Puts batches on the mesh ahead of their use, at most `size` at a time; keeps their order.

  Each process gives its own rows. Copies are asynchronous: while a step computes, the next batches
  are on their way.
  """
  ahead: collections.deque[dict[str, jax.Array]] = collections.deque()
  for batch in iterator:
    ahead.append(
      {key: jax.make_array_from_process_local_data(sharding, x) for key, x in batch.items()}
    )
    if len(ahead) > size:
      yield ahead.popleft()
  yield from ahead
