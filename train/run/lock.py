"""A workdir has one owner: the process that holds its lock."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import TextIO

import jax
from etils import epath

from train.errors import WorkdirError
from train.run.storage import is_local

NAME = ".lock"  # of the file in the workdir
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def owned(workdir: epath.Path) -> Iterator[None]:
  """Inside this context this process owns the workdir; it is created, and removed if left empty.

  The kernel holds the lock, and drops it when its process ends, however it ends; on a network file
  system the server does the same for other hosts. The file says who holds it. Only the first of
  several processes locks. Buckets, and file systems that can't lock, are not protected.

  Raises:
    WorkdirError: another process owns the workdir, or it can't be created.
  """
  if jax.process_index() or not is_local(workdir):
    yield
    return
  path = workdir / NAME
  try:
    is_new = not workdir.exists()
    file = _lock(path)
  except OSError as error:
    raise WorkdirError(f"--workdir {workdir} can't be used: {error.strerror or error}") from None
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      path.unlink()
    file.close()
    if is_new:
      with contextlib.suppress(OSError):
        os.rmdir(workdir)  # only if it is empty


def _lock(path: epath.Path) -> TextIO:
  while True:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      file = open(path, "a+")
    except FileNotFoundError:  # the owner before has just removed the folder
      continue
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise WorkdirError(
        f"{path.parent} is in use by {_owner(file)}: choose another --workdir"
      ) from None
    except OSError as error:
      if error.errno not in _CANNOT_LOCK:
        raise
    # The owner before may have removed the file after it was opened here.
    if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
      break
    file.close()
  owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T")}
  file.truncate(0)
  file.write(json.dumps(owner) + "\n")
  file.flush()
  return file


def _owner(file: TextIO) -> str:
  """Who holds the lock, as its file says."""
  file.seek(0)
  try:
    owner = json.loads(file.read())
    return f"process {owner['process']} on {owner['host']} (since {owner['since']})"
  except (ValueError, KeyError, TypeError):  # it is just being written
    return "another process"
