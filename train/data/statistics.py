"""Mean and variance of a dataset's pixels."""

import functools
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from ml_collections import ConfigDict

from train.data.splits import AnySplit, Split
from train.devices.machine import cores
from train.errors import ConfigError

# For a channel that never changes: by less than a level images would be divided by nearly 0.
_LEAST_VARIANCE = 1.0
_BYTES_AT_A_TIME = 2**22  # images that a thread holds; OpenCV counts pixels in 32 bits


def of_config(data_config: ConfigDict, split: AnySplit) -> tuple[np.ndarray, np.ndarray]:
  """Mean and variance with which a run normalises images, in pixel units: float32 [C] each.

  Args:
    data_config: `config.data`; its `mean` and `variance`, if they are given, or else those of
    split: the training images.
  Raises:
    ConfigError: it gives neither one value nor one for each channel.
  """
  if not data_config.mean:
    return channel_statistics(split)
  channels = (split.images.shape if isinstance(split, Split) else split.shape)[-1]
  given = [np.asarray(data_config[name], np.float32) for name in ("mean", "variance")]
  if len(given[0]) not in (1, channels):
    raise ConfigError(
      f"config.data.mean = {tuple(data_config.mean)}: the images have {channels} channels"
    )
  mean, variance = (np.broadcast_to(values, (channels,)) for values in given)
  return mean, variance


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
