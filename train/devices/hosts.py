"""Several processes that train one model: how they connect, and how they decide together.

A TPU slice runs one process per host, a GPU cluster one per GPU. All make the same calls in the
same order, and vote on what a single process decides alone (after a signal, by the clock).
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import socket
import sys
import traceback
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from train.devices.compile import in_background
from train.devices.mesh import by_example, find_devices
from train.errors import (
  ConfigError,
  Disagreement,
  Interrupted,
  SavedAndStopped,
  fail,
  first_line,
)

LOST = 75  # exit status if another process is missing or lost: EX_TEMPFAIL of sysexits.h
_HOURS_TO_WAIT = 24  # while another process prepares a dataset
_SECONDS_TO_CONNECT = 300  # from the start of the first process to that of the last
_LAUNCHED_BY = {"OMPI_COMM_WORLD_SIZE": "Open MPI", "JOB_COMPLETION_INDEX": "Kubernetes"}


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that identify this process, for launchers that JAX does not detect."""
  group = parser.add_argument_group(
    "several hosts",
    "detected on TPU VMs, SLURM, Open MPI (5 needs mpi4py) and Kubernetes (needs jax[k8s]); "
    "elsewhere give all three",
  )
  group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
  group.add_argument("--process_id", type=int, metavar="N", help="index of this process, from 0")
  group.add_argument("--processes", type=int, metavar="N", help="total; 1: do not look for others")


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[None]:
  """Inside this context the processes of a run are connected; only the first one prints to stdout.

  A process that fails exits at once: in JAX's shutdown, it and the others could wait for ever.

  Args:
    arguments: parsed flags of `add_flags`.
  """
  try:
    _connect(arguments.coordinator, arguments.process_id, arguments.processes)
  except Exception as error:  # each way to detect a cluster has its own
    fail(f"the processes of this run could not connect: {first_line(error)}", 1)
  if not jax.distributed.is_initialized():
    _require_devices()
    yield
    return
  try:
    _keep_stdout_for_the_first()
    _require_devices()
    yield
  except SystemExit as end:
    if not isinstance(end.__context__, SavedAndStopped):  # which all processes have agreed on
      _exit_at_once(end.code if isinstance(end.code, int) else 1)
    raise
  except Exception:
    traceback.print_exc()
    _exit_at_once(1)


def _require_devices() -> None:
  try:
    find_devices()
  except ConfigError as error:
    fail(error, 2)


def _connect(coordinator: str | None, process_id: int | None, processes: int | None) -> None:
  """Connects to the other processes, if any, before anything starts JAX's backend."""
  if processes == 1 and coordinator is None and process_id is None:
    return
  is_explicit = (coordinator, process_id, processes) != (None, None, None)
  if not is_explicit and _is_started_alone():
    return
  who = "--coordinator and its two flags help where no cluster is detected"
  if is_explicit:
    if coordinator is None or process_id is None or processes is None:
      fail("--coordinator, --process_id and --processes go together: give all three", 2)
    port = coordinator.rpartition(":")[2] if ":" in coordinator else ""
    if not (port.isdecimal() and 0 < int(port) < 2**16 and 0 <= process_id < processes):
      fail(
        f"--coordinator {coordinator} --process_id {process_id} --processes {processes}: "
        "HOST:PORT is needed, and a process_id from 0 to processes - 1",
        2,
      )
    who = f"--coordinator {coordinator}, --process_id {process_id} of {processes}"
  # Otherwise JAX handles SIGTERM itself.
  jax.config.update("jax_enable_preemption_service", False)
  connect = functools.partial(
    jax.distributed.initialize,
    coordinator,
    processes,
    process_id,
    cluster_detection_method="deactivate" if is_explicit else _detection(),
    initialization_timeout=2 * _SECONDS_TO_CONNECT,
  )
  try:
    # In a thread, because JAX would neither hear a signal nor end without an abort.
    in_background(connect).result(_SECONDS_TO_CONNECT)
  except TimeoutError:
    _give_up(
      f"some processes of this run have not connected after {_SECONDS_TO_CONNECT} s ({who}): "
      "check which one has not started or can't reach the coordinator",
      LOST,
    )
  except Interrupted as interruption:
    _give_up(f"stopped by {interruption}", interruption.exit_status)
  except ValueError as error:
    # JAX reports a missing coordinator_address if it detects no cluster.
    if is_explicit or "coordinator_address" not in str(error):
      raise
    _require_alone()


def _is_started_alone() -> bool:
  """Whether a launcher says that this process is the only one.

  Without a coordinator, two such runs in one job do not compete for its port.

  Exits with one line in a job of SLURM for several processes of which srun has started none, as in
  a shell of salloc: JAX would train alone or wait for the others, depending on the variables.
  """
  if processes := os.environ.get("OMPI_COMM_WORLD_SIZE"):  # also inside a job of SLURM
    return processes == "1"
  tasks = os.environ.get("SLURM_NTASKS")
  if tasks is None or "SLURM_JOB_ID" not in os.environ:
    return False
  # Only srun sets the latter; it is 1 in a shell that salloc starts as a step.
  if tasks != "1" and tasks != os.environ.get("SLURM_STEP_NUM_TASKS"):
    fail(
      f"SLURM_NTASKS={tasks}, but srun has not started this process as one of them: start all with "
      "srun, or say --processes=1 to train with this one alone",
      2,
    )
  return tasks == "1"


def _detection() -> str | None:
  """JAX's way to detect the cluster; None: the default, which knows Open MPI up to version 4."""
  is_open_mpi_5 = "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ
  return "mpi4py" if is_open_mpi_5 and importlib.util.find_spec("mpi4py") else None


def _require_alone() -> None:
  """Exits with one line if a launcher started several processes that JAX can't find."""
  for name, launcher in _LAUNCHED_BY.items():
    if name in os.environ:
      fail(
        f"{launcher} has started this process ({name}={os.environ[name]}), and JAX does not find "
        "the others: give --coordinator, --process_id and --processes, install what --help names, "
        "or say --processes=1 if it is alone",
        2,
      )


def _keep_stdout_for_the_first() -> None:
  """Keeps only the first process' Python output on stdout: Gloo announces each connection there."""
  descriptor = os.dup(1)
  with open(os.devnull, "w") as nowhere:
    os.dup2(nowhere.fileno(), 1)
    if jax.process_index():
      os.dup2(nowhere.fileno(), descriptor)
  sys.stdout = os.fdopen(descriptor, "w", buffering=1)


@contextlib.contextmanager
def first_goes_first(on_each_host: bool = False) -> Iterator[None]:
  """The first process runs this block before the others, so that they find what it writes.

  Args:
    on_each_host: after the first process, the first one of each other host runs the block before
      the rest: it finds what is written on a shared file system, or writes it on its own.
  """
  index, last = jax.process_index(), 1
  turn = min(index, last)
  if on_each_host:
    names, last = gather(socket.gethostname()), 2
    turn = 0 if index == 0 else 1 if names.index(names[index]) == index else 2
  for _ in range(turn):
    _wait_for_all("turn")
  yield
  for _ in range(turn, last):
    _wait_for_all("turn")


def _wait_for_all(key: str) -> None:
  """Waits for hours if needed; a collective on CPUs would give up after 30 s."""
  if jax.process_count() > 1:
    import orbax.checkpoint as ocp  # late: takes seconds

    wait = ocp.multihost.get_barrier_sync_fn()
    # In a thread, because JAX would not hear a signal.
    in_background(lambda: wait(key=key, timeout_ms=_HOURS_TO_WAIT * 3_600_000)).result()


def share(items: Sequence) -> Sequence:
  """This process' part of a sequence that is the same in all processes."""
  if not jax.distributed.is_initialized():
    return items
  return items[jax.process_index() :: jax.process_count()]


def gather(content: Any) -> list:
  """The `content` of every process, in the order of processes; waits for all of them.

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
  """Whether an error means that another process has ended or can't be reached."""
  signs = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "Gloo", "NCCL", "Connection")
  return jax.process_count() > 1 and any(sign in str(error) for sign in signs)


def _give_up(error: str, status: int) -> NoReturn:
  print(f"error: {error}", file=sys.stderr)
  _exit_at_once(status)


def _exit_at_once(status: int) -> NoReturn:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)  # skips JAX's shutdown, in which each process waits for all


class Agreement:
  """The largest vote of a run's processes after each call of the step.

  The answer comes one call later, so that no device waits for a host; all processes get it at the
  same call. A single process gets its own vote at once.
  """

  def __init__(self, mesh: Mesh):
    self._votes = by_example(mesh)
    self._largest = jax.jit(jnp.max)
    self._before = 0

  def __call__(self, vote: int) -> int:
    """Casts a vote (int32, at least 0) and returns the decision. All processes must call this."""
    if jax.process_count() == 1:
      return vote
    votes = np.full(jax.local_device_count(), vote, np.int32)
    before = self._before
    self._before = self._largest(jax.make_array_from_process_local_data(self._votes, votes))
    return int(before)

  def forget(self) -> None:
    """Drops votes that are not answered yet; a process that still wants its vote casts it again."""
    self._before = 0
