"""The progress of a run on the terminal. Only the first of several processes prints."""

import contextlib
import shutil
import sys
import time

import jax
from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30.0  # if stderr is not a terminal


class Progress:
  """Images per second and time left: a bar on a terminal, a line now and then elsewhere.

  Use it as a context manager. `description` may be changed at any time.
  """

  def __init__(self, total_steps: int, initial: int, batch_size: int, description: str = ""):
    """
    Args:
      total_steps: steps of the whole run.
      initial: steps already done by an earlier run.
      batch_size: images per step, over all devices.
      description: text before the bar, such as "epoch 3/50".
    """
    self.description = description
    self._total, self._done, self._batch_size = total_steps, initial, batch_size
    self._active = jax.process_index() == 0
    self._last_line = (time.monotonic(), initial)
    self._bar = tqdm(
      desc=description,
      total=total_steps * batch_size,
      initial=initial * batch_size,
      ncols=min(80, shutil.get_terminal_size().columns) - 1,
      nrows=20,  # otherwise tqdm hides the bar on terminals of unknown height
      bar_format="{desc} {percentage:3.0f} % |{bar}| {rate_noinv_fmt}, {remaining} left",
      unit=" images",
      mininterval=0.5,
      leave=False,
      disable=not (self._active and sys.stderr and sys.stderr.isatty()),
    )

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *exception) -> None:
    with contextlib.suppress(OSError):
      self._bar.close()

  def update(self, steps: int = 1) -> None:
    """Counts finished steps."""
    self._done += steps
    with contextlib.suppress(OSError):  # the terminal has gone: SIGHUP ends the run in good order
      if not self._bar.disable:
        self._bar.set_description_str(self.description, refresh=False)
        self._bar.update(steps * self._batch_size)
      elif self._active:
        self._print_line()

  def skip_pause(self) -> None:
    """Leaves the time since the last `update` out of the rate on plain lines."""
    self._last_line = (time.monotonic(), self._done)

  def write(self, text: str) -> None:
    """Prints to stdout without disturbing the bar."""
    if self._active:
      with contextlib.suppress(OSError):
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

  def _print_line(self) -> None:
    now = time.monotonic()
    last, last_done = self._last_line
    if now - last < _SECONDS_BETWEEN_LINES:
      return
    rate = (self._done - last_done) / (now - last)
    left = tqdm.format_interval((self._total - self._done) / rate)
    line = f"{self.description}  step {self._done}/{self._total}"
    line += f"  {rate * self._batch_size:.0f} images/s, {left} left"
    print(line, file=sys.stderr, flush=True)
    self._last_line = (now, self._done)
