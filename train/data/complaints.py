"""What libjpeg, libpng and libtiff print about images: counted, and said once with a file."""

import contextlib
import fcntl
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import BinaryIO

# How lines begin in libjpeg's jerror.h, in libpng, in OpenCV when it speaks of their files, and in
# libtiff (which calls each file tempfile.tif).
_LINE = re.compile(
  rb"Corrupt JPEG data|Premature end of JPEG|Warning: unknown JFIF|Invalid SOS param|"
  rb"Inconsistent progression|Unknown Adobe color|libpng (warning|error)|\[.{5,40}\] .*grfmt_|"
  rb"_?(TIFF|JPEG|LZW|ZIP|LZMA|ZSTD|WEBP|LERC|Fax|PackBits|Missing)\w*: |tempfile.tif: |: WEBP "
)


class Complaints:
  """Those of this process.

  The libraries print on file descriptor 2, which has no other name for them. While threads decode,
  it leads to a file, from which all other lines are passed on.
  """

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._threads = 0  # that decode
    self._read = 0  # bytes of the file
    self.count, self._first = 0, ""
    self.said = False

  @contextlib.contextmanager
  def counted(self, file: str) -> Iterator[None]:
    """Counts the complaints of this context, in which images of a file are decoded."""
    with self._lock:
      if not self._threads:
        if sys.stderr:
          sys.stderr.flush()
        self._file = _memory_file()
        self._stderr = os.dup(2)
        self._read = 0
        os.dup2(self._file.fileno(), 2)
      self._threads += 1
    try:
      yield
    finally:
      with self._lock:
        self._threads -= 1
        if not self._threads:
          if sys.stderr:
            sys.stderr.flush()
          os.dup2(self._stderr, 2)
        self._sort(file)
        if not self._threads:
          os.close(self._stderr)
          self._file.close()

  def _sort(self, file: str) -> None:
    """Counts the lines of the libraries, and passes on the others."""
    size = os.fstat(self._file.fileno()).st_size
    # Not file.read: descriptor 2 shares its position.
    printed = os.pread(self._file.fileno(), size - self._read, self._read)
    if self._threads:  # the last line may not be whole
      printed = printed[: printed.rfind(b"\n") + 1]
    self._read += len(printed)
    for line in printed.splitlines(keepends=True):
      if not _LINE.match(line):
        os.write(self._stderr, line)
        continue
      self._first = self._first or f"{file}: {line.decode(errors='replace').strip()}"
      self.count += 1

  def say(self) -> None:
    """Prints how many there were, once."""
    with self._lock:
      if self.said or not self.count:
        return
      self.said = True
    times = f"{self.count:,} times" if self.count > 1 else "once"
    text = f"Decoders complained {times} about images, first in {self._first}"
    print(text, file=sys.stderr, flush=True)


def _memory_file() -> BinaryIO:
  """A file that needs no folder, where the system has such."""
  if hasattr(os, "memfd_create"):
    file: BinaryIO = open(os.memfd_create("complaints"), "w+b", buffering=0)
  else:
    file = tempfile.TemporaryFile(buffering=0)
  fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)  # else threads could write over each other's lines
  return file


complaints = Complaints()
