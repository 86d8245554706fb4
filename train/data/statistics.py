"""Mean and variance of a dataset's pixels."""

import functools
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from train.data.splits import AnySplit
from train.devices.machine import cores

# For a channel that never changes: by less than a level images would be divided by nearly 0.
_LEAST_VARIANCE = 1.0
_BYTES_AT_A_TIME = 2**22  # images that a thread holds; OpenCV counts pixels in 32 bits


def channel_statistics(split: AnySplit) -> tuple[np.ndarray, np.ndarray]:
  """Mean and variance of each channel of a split's images, in pixel units: float32 [C] each.

  The variance is at least 1, so that a channel that never changes can be normalised.

  Of larger splits, 65,536 evenly spaced images are read.
  """
  rows = np.linspace(0, len(split), min(len(split), 2**16), endpoint=False, dtype=int)
  image, _ = split[rows[:1]]
  size = max(1, _BYTES_AT_A_TIME // image.nbytes)
  parts = np.split(rows, range(size, len(rows), size))

  def mean_and_deviation(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, _ = split[part]
    return cv2.meanStdDev(images.reshape(-1, *images.shape[2:]))

  with ThreadPoolExecutor(cores()) as threads:  # decoders release Python's lock
    each = list(threads.map(mean_and_deviation, parts))
  means, deviations = np.asarray(each)[..., 0].swapaxes(0, 1)
  average = functools.partial(np.average, axis=0, weights=[len(part) for part in parts])
  mean = average(means)
  variance = np.maximum(average(deviations**2 + means**2) - mean**2, _LEAST_VARIANCE)
  return mean.astype(np.float32), variance.astype(np.float32)
