"""Draws samples of a dataset, and the patches that a model sees."""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from train.data import load, resolve
from train.data.decode import resize
from train.data.framing import Framing
from train.errors import printable


def draw_samples(config: ConfigDict, output: str) -> None:
  """Draws validation images with their labels, and one resized and cut into the model's patches.

  Args:
    config: from `pretrained.resolve`; a model without a `patch_size` has no patches.
    output: the PNG file to write.
  Raises:
    DataError: the dataset is unavailable or broken.
  """
  import matplotlib

  matplotlib.use("Agg")  # no screen needed
  from matplotlib import pyplot as plt

  size, patch = config.model.image_size, config.model.get("patch_size", config.model.image_size)
  data_config = resolve(config.data)
  dataset = load(data_config, size, splits=("validation",))
  validation = dataset["validation"]
  images, labels = validation[np.arange(min(32, len(validation)))]
  seen = _as_seen(images[0], Framing.of(data_config), size)
  names = [dataset.class_names[label].replace("_", " ") for label in labels]

  figure = plt.figure(figsize=(15, 5.6), layout="constrained")
  left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(9, 6)))
  height, width, _ = images.shape[1:]
  left.suptitle(
    printable(f"{dataset.name}: validation images, {height}x{width} pixels"), parse_math=False
  )
  for axes, image, name in zip(left.subplots(4, 8).flat, images, names, strict=False):
    axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
    axes.set_title(printable(name), fontsize=8, parse_math=False)
  count = (size // patch) ** 2
  patches = f", {count} patches of {patch}x{patch}" if count > 1 else ""
  right.suptitle(printable(f"{names[0]}: resized to {size}x{size}{patches}"), parse_math=False)
  axes = right.subplots()
  axes.imshow(_cut_in_patches(seen, patch), cmap="gray", vmin=0, vmax=255)
  for axes in figure.axes:
    axes.axis("off")
  figure.savefig(output, dpi=120)
  plt.close(figure)


def _as_seen(image, framing, size):
  """The part of an image [H, W, C] that the model sees, resized to [size, size(, C)]."""
  top, left, height, width = framing.seen(*image.shape[:2])
  part = Image.fromarray(image[top : top + height, left : left + width].squeeze())
  return np.asarray(resize(part, (size, size, image.shape[2]), framing))


def _cut_in_patches(image, patch):
  """Separates the patches of an image [S, S, ...] by white gaps, a sixth of a patch wide."""
  for axis in (0, 1):
    image = np.repeat(image, 6, axis)  # so that a sixth of a patch is a whole number
    cuts = np.arange(6 * patch, image.shape[axis], 6 * patch)
    image = np.insert(image, np.repeat(cuts, patch), 255, axis=axis)
  return image
