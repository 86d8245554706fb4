"""Writes a run's files: whole or not at all, and again if a write fails once."""

import contextlib
import errno
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from etils import epath

from train.errors import StorageError

Result = TypeVar("Result")

_PAUSES = (0.5, 2.0, 5.0)  # seconds before each further attempt
# Tensorstore raises ValueError if the disk is full, orbax RuntimeError if a save before has failed.
_FAILED = (OSError, ValueError, RuntimeError, StorageError)
# Trying again can't help.
_LASTING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


def retry(write: Callable[[], Result], what: object) -> Result:
  """The result of `write()`; after an error tries again, three times within eight seconds.

  Args:
    what: the path that the messages name.
  Raises:
    StorageError: the last attempt failed as well.
    OSError: trying again can't help: a read-only file system, for example.
  """
  for pause in _PAUSES:
    try:
      return write()
    except _FAILED as error:
      if isinstance(error, OSError) and error.errno in _LASTING:
        raise
      print(f"{what} can't be written: {reason(error)}; trying again", file=sys.stderr, flush=True)
    time.sleep(pause)
  try:
    return write()
  except _FAILED as error:
    raise StorageError(
      f"{what} can't be written: {reason(error)}. With that mended, the same command goes on from "
      "the last checkpoint."
    ) from error


def reason(error: BaseException) -> str:
  """Why a write or a read failed, in a few words."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = str(error) or repr(error)
  for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
    if f"os_error_code='{code}'" in text:  # as tensorstore reports it, after long paths
      return os.strerror(code)
  return text.splitlines()[0].partition(". See full TensorStore")[0]


@contextlib.contextmanager
def last_writes(ending: BaseException | None) -> Iterator[None]:
  """For the last writes of a run, in an `__exit__`: their errors do not hide why it ends.

  Args:
    ending: the exception that ends the run; None: it has finished.
  """
  try:
    yield
  except Exception as error:
    if ending is None:
      raise
    with contextlib.suppress(OSError):
      print("also:", str(error).partition("\n")[0], file=sys.stderr, flush=True)


def is_local(path: epath.Path) -> bool:
  """Whether a path is in the local file system, not in a bucket."""
  return "://" not in str(path)


@contextlib.contextmanager
def plain_name(folder: epath.Path) -> Iterator[epath.Path]:
  """Another name for a folder whose own orbax takes for a pattern, or can't encode."""
  name = os.fspath(folder)
  if not is_local(folder) or (name.isprintable() and not set(name) & set("[]*?\\")):
    yield folder
    return
  with tempfile.TemporaryDirectory(prefix="mlp_models-") as place:
    link = epath.Path(place) / "checkpoints"
    os.symlink(folder, link)
    yield link


def write_atomically(path: epath.Path, content: str | bytes) -> None:
  """Writes a file as a whole or, if the process is killed or the machine stops, not at all.

  Raises:
    StorageError, OSError: it can't be written; what was there before is still there.
  """
  data = content.encode() if isinstance(content, str) else content
  retry(lambda: _replace(path, data), path)


def _replace(path: epath.Path, data: bytes) -> None:
  if not is_local(path):  # buckets write objects atomically, and moving one would copy it
    path.write_bytes(data)
    return
  partial = path.with_name(path.name + ".partial")
  try:
    with open(partial, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())  # otherwise the new name may reach the disk before the content
    partial.replace(path)
  except OSError:
    with contextlib.suppress(OSError):
      partial.unlink()  # makes room on a full disk
    raise
