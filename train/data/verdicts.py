"""Looks at every image of a folder once, and remembers which ones can be decoded."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import tqdm

from train.data.decode import MAX_PIXELS
from train.data.listing import Found
from train.devices.machine import cache_folder, cores

_DECODER = f"1, Pillow {PIL.__version__}, {MAX_PIXELS} pixels"  # another may judge otherwise
SILENT_SECONDS = 1.0
_SECONDS_BETWEEN_LINES = 10.0


class Processes(NamedTuple):
  """How the processes that open a folder together divide the work.

  share: returns this process' part of a sequence that is the same in all processes.
  gather: returns every process' argument (of JSON's types), in order; waits for all of them.
  """

  share: Callable[[Sequence], Sequence]
  gather: Callable[[Any], list]


ALONE = Processes(share=lambda items: items, gather=lambda content: [content])


def look(
  folder: Path,
  files: Sequence[Found],
  decode: Callable[[str], object],
  processes: Processes = ALONE,
  silent: float = SILENT_SECONDS,
) -> dict[str, str]:
  """Paths of the images that can't be decoded, and why.

  Args:
    folder: that holds the files; what is found is remembered under its name.
    files: the same in all processes.
    decode: is called with a path, in threads; raises ValueError if the content is no image.
    processes: those that look together.
    silent: seconds until it is said what takes so long.
  """
  recalled = _recall(folder)
  known = {f.path: recalled[f.path] for f in files if recalled.get(f.path, ())[:2] == f[2:]}
  mine = processes.share(files)
  unknown = [file for file in mine if file.path not in known]
  broken = [(file.path, known[file.path][2]) for file in mine if known.get(file.path, ("",))[-1]]
  passing: list[tuple[str, str]] = []  # such as a network drive's error: not remembered

  good: dict[str, tuple] = {}

  def judge(file: Found) -> None:
    try:
      decode(file.path)
      good[file.path] = (file.size, file.changed, "")
    except ValueError as error:
      broken.append((file.path, str(error)))
    except (OSError, MemoryError) as error:
      passing.append((file.path, getattr(error, "strerror", None) or type(error).__name__))

  try:
    if unknown:
      _judge_all(unknown, judge, folder, silent)
  except BaseException:  # a signal: the next start goes on from here
    _remember(folder, recalled | good)
    raise
  everyone = processes.gather([broken, passing])
  verdicts = {path: reason for part, _ in everyone for path, reason in part}
  unread = {path: reason for _, part in everyone for path, reason in part}
  judged = {
    file.path: (file.size, file.changed, verdicts.get(file.path, ""))
    for file in files
    if file.path not in unread
  }
  if judged != known:
    _remember(folder, recalled | judged)
  return verdicts | unread


def _judge_all(files, judge, folder, silent) -> None:
  text = f"Looking at {len(files):,} images in {folder}; what is found is remembered."
  threads = concurrent.futures.ThreadPoolExecutor(cores())  # decoders release Python's lock
  with aloud(text, silent, len(files)) as count:
    try:
      for _ in threads.map(judge, files):
        count()
    finally:
      threads.shutdown(wait=False, cancel_futures=True)  # after a signal, cancels the others


@contextlib.contextmanager
def aloud(text: str, silent: float, total: int = 0) -> Iterator[Callable[[], None]]:
  """Says what takes long, and how far it is: with a bar on a terminal, else in lines.

  Args:
    text: what is done in this context.
    silent: seconds until it is said.
    total: how often the function that is yielded will be called; 0: never.
  """
  done, ended = 0, threading.Event()
  hidden = not total or not sys.stderr.isatty()
  bar = tqdm.tqdm(total=total, unit=" images", delay=max(silent, 1e-3), disable=hidden)

  def tell() -> None:
    if ended.wait(max(silent, 0)):
      return
    print(text, file=sys.stderr, flush=True)
    while total and bar.disable and not ended.wait(_SECONDS_BETWEEN_LINES):
      print(f"  {done:,} of {total:,} images", file=sys.stderr, flush=True)

  def count() -> None:
    nonlocal done
    done += 1
    bar.update()

  thread = threading.Thread(target=tell, daemon=True)
  thread.start()
  try:
    yield count
  finally:
    ended.set()
    thread.join()
    bar.close()


def _file(folder: Path) -> Path | None:
  """Where the verdicts on a folder are kept; None where the user has no cache folder."""
  if (cache := cache_folder()) is None:
    return None
  name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
  return cache / "folders" / f"{name}.json"


def _recall(folder: Path) -> dict[str, tuple]:
  """Size, time of change and verdict ("": good) by path; {} if nothing is kept, or damaged."""
  try:
    file = _file(folder)
    content = json.loads(file.read_bytes()) if file else {}
    if content["decoder"] != _DECODER:
      return {}
    return {
      path: (int(size), int(changed), str(verdict))
      for path, (size, changed, verdict) in content["files"].items()
    }
  except (OSError, ValueError, TypeError, KeyError, AttributeError):
    return {}


def _remember(folder: Path, known: dict[str, tuple]) -> None:
  """Keeps the verdicts, if there is a place to write to."""
  if (file := _file(folder)) is None:
    return
  part = file.with_suffix(f".{socket.gethostname()}-{os.getpid()}")
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps({"decoder": _DECODER, "files": known}))
    part.replace(file)
  except OSError:  # read-only or full: the next start looks anew
    with contextlib.suppress(OSError):
      part.unlink()
