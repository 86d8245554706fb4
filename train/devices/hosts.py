"""Several processes that train one model: how they meet, and what they decide together.

Each host of a TPU slice runs one process, a cluster of GPUs one a GPU. All make the same calls in
the same order; what a single one would decide for itself (a signal, a clock) is put to the vote.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from train.devices.mesh import by_example
from train.errors import Disagreement, Interrupted, fail

LOST = 75  # exit status where another process is missing or lost: sysexits' "try again"
_HOURS_TO_WAIT = 24  # while another process prepares a dataset
_SECONDS_TO_MEET = 300  # that the first process waits for the last one to start
_LAUNCHED_BY = {"OMPI_COMM_WORLD_SIZE": "Open MPI", "JOB_COMPLETION_INDEX": "Kubernetes"}


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that say which process of which run this is, for where nothing else says it."""
  group = parser.add_argument_group(
    "several hosts",
    "found out on TPU VMs, SLURM, Open MPI (5 needs mpi4py) and Kubernetes (needs jax[k8s]); "
    "elsewhere all three are needed",
  )
  group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
  group.add_argument("--process_id", type=int, metavar="N", help="of this process, from 0")
  group.add_argument("--processes", type=int, metavar="N", help="in all; 1: look for no others")


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[None]:
  """Within this context the process is one of its run's; only the first one prints to stdout.

  A process that fails leaves at once: the others could wait for it for ever, and it for them.

  Args:
    arguments: parsed flags of `add_flags`.
  """
  try:
    _connect(arguments.coordinator, arguments.process_id, arguments.processes)
  except (ValueError, RuntimeError) as error:
    fail(f"the processes of this run did not meet: {str(error).splitlines()[0]}", 1)
  if not jax.distributed.is_initialized():
    yield
    return
  try:
    _keep_stdout_for_the_first()
    yield
  except SystemExit as end:
    if not isinstance(end.__context__, Interrupted):  # which all processes have agreed on
      _leave(end.code if isinstance(end.code, int) else 1)
    raise
  except Exception:
    traceback.print_exc()
    _leave(1)


def _connect(coordinator: str | None, process_id: int | None, processes: int | None) -> None:
  """Joins the other processes, before anything starts JAX's backend; there may be none."""
  if processes == 1 and coordinator is None and process_id is None:
    return
  is_told = (coordinator, process_id, processes) != (None, None, None)
  who = "--coordinator and its two flags help where no cluster is detected"
  if is_told:
    if coordinator is None or process_id is None or processes is None:
      fail("--coordinator, --process_id and --processes go together: give all three", 2)
    if ":" not in coordinator or not 0 <= process_id < processes:
      fail(
        f"--coordinator {coordinator} --process_id {process_id} --processes {processes}: "
        "HOST:PORT is needed, and a process_id from 0 to processes - 1",
        2,
      )
    who = f"--coordinator {coordinator}, --process_id {process_id} of {processes}"
  # JAX would take SIGTERM for itself.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    with _time_limit(who):
      jax.distributed.initialize(
        coordinator,
        processes,
        process_id,
        cluster_detection_method="deactivate" if is_told else _detection(),
        initialization_timeout=2 * _SECONDS_TO_MEET,
      )
  except ValueError as error:
    if is_told or "coordinator_address" not in str(error):  # JAX misses it where no cluster is
      raise
    _require_alone()


def _detection() -> str | None:
  """How JAX is to find the cluster; None: as it does by itself, which knows Open MPI up to 4."""
  is_open_mpi_5 = "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ
  return "mpi4py" if is_open_mpi_5 and importlib.util.find_spec("mpi4py") else None


def _require_alone() -> None:
  """Ends the process with one line if it was started as one of several that it can't find."""
  for name, launcher in _LAUNCHED_BY.items():
    if name in os.environ:
      fail(
        f"{launcher} has started this process ({name}={os.environ[name]}), and JAX does not find "
        "the others: give --coordinator, --process_id and --processes, install what --help names, "
        "or say --processes=1 if it is alone",
        2,
      )


@contextlib.contextmanager
def _time_limit(who: str) -> Iterator[None]:
  """Ends the process with one line if the others do not come, where JAX would abort."""

  def give_up() -> None:
    print(
      f"error: after {_SECONDS_TO_MEET} s not all processes of this run have met ({who}): "
      "look which of them has not started, or does not reach the coordinator",
      file=sys.stderr,
    )
    _leave(LOST)

  timer = threading.Timer(_SECONDS_TO_MEET, give_up)
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _keep_stdout_for_the_first() -> None:
  """Leaves stdout to what the first process prints in Python: Gloo announces each connection."""
  descriptor = os.dup(1)
  with open(os.devnull, "w") as nowhere:
    os.dup2(nowhere.fileno(), 1)
    if jax.process_index():
      os.dup2(nowhere.fileno(), descriptor)
  sys.stdout = os.fdopen(descriptor, "w", buffering=1)


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
  """The first process goes through this block before the others: what it writes, they find."""
  if jax.process_index():
    _wait_for_all("first")
  yield
  if not jax.process_index():
    _wait_for_all("first")


def _wait_for_all(key: str) -> None:
  """Waits for hours if need be: on CPUs, devices that wait for each other give up after 30 s."""
  if jax.process_count() > 1:
    import orbax.checkpoint as ocp  # late: seconds

    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=_HOURS_TO_WAIT * 3_600_000)


def share(items: Sequence) -> Sequence:
  """This process' part of what is the same in all of them."""
  if not jax.distributed.is_initialized():
    return items
  return items[jax.process_index() :: jax.process_count()]


def gather(content: Any) -> list:
  """What each process passes, in their order; waits for all of them.

  Args:
    content: of JSON's types.
  """
  if not jax.distributed.is_initialized():
    return [content]
  _wait_for_all("gather")
  text = np.frombuffer(json.dumps(content).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.uint32(len(text))).reshape(-1)
  padded = np.pad(text, (0, int(sizes.max()) - len(text)))
  rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def require_same(what: str, content: Any) -> None:
  """Waits for all processes, and raises Disagreement unless `content` is the same in all of them.

  Args:
    content: of JSON's types.
  """
  checksum = zlib.crc32(json.dumps(content, sort_keys=True).encode())
  if len(set(gather(checksum))) > 1:
    raise Disagreement(
      f"the processes of this run differ in {what}, which must be the same for all"
    )


def processes_here() -> int:
  """How many of the run's processes are on this host."""
  host = socket.gethostname()
  return gather(host).count(host)


def is_loss_of_another(error: jax.errors.JaxRuntimeError) -> bool:
  """Whether a process has ended, or can't be reached, that this one has to do with."""
  signs = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "Gloo", "NCCL", "Connection")
  return jax.process_count() > 1 and any(sign in str(error) for sign in signs)


def time_of_first() -> int:
  """Seconds since 1970, by the clock of the first process."""
  return int(multihost_utils.broadcast_one_to_all(np.uint32(time.time())))


def _leave(status: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)  # without JAX's own end, in which each process waits for all


class Agreement:
  """What the processes of a run decide together after each call of the step: the largest vote.

  The answer is that of the call before, so that no device waits for a host: all processes get it at
  the same call. A process alone gets its own vote at once.
  """

  def __init__(self, mesh: Mesh):
    self._votes = by_example(mesh)
    self._largest = jax.jit(jnp.max)
    self._before = 0

  def __call__(self, vote: int) -> int:
    """Casts a vote (from 0, an int32) and returns what was decided; a call for all processes."""
    if jax.process_count() == 1:
      return vote
    votes = np.full(jax.local_device_count(), vote, np.int32)
    before = self._before
    self._before = self._largest(jax.make_array_from_process_local_data(self._votes, votes))
    return int(before)

  def forget(self) -> None:
    """Drops what was cast and is not answered yet: whoever still wants it will vote again."""
    self._before = 0
