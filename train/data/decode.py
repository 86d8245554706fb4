"""Image files -> pixels."""

import cv2
import numpy as np
from PIL import Image

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
_FLAGS = {  # for cv2.imdecode, by number of channels; as in TFDS, photos are not turned
  1: cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION,
  3: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
  4: cv2.IMREAD_UNCHANGED,
}
_TO_RGBA = {1: cv2.COLOR_GRAY2RGBA, 3: cv2.COLOR_BGR2RGBA, 4: cv2.COLOR_BGRA2RGBA}


def decode(encoded: bytes, shape: tuple[int, int, int]) -> np.ndarray:
  """Decodes a PNG or JPEG to uint8 of `shape` [H, W, C], resized if its size differs.

  With OpenCV, which is faster than Pillow on small images.

  Raises:
    ValueError: the image is damaged.
  """
  height, width, channels = shape
  image = cv2.imdecode(np.frombuffer(encoded, np.uint8), _FLAGS[channels])
  if image is None:
    raise ValueError("an image is damaged")
  if channels == 4:  # IMREAD_UNCHANGED gives grey, BGR or BGRA
    image = cv2.cvtColor(image, _TO_RGBA[image.shape[2] if image.ndim == 3 else 1])
  if image.shape[:2] != (height, width):
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    image = np.asarray(resized)
  return image.reshape(shape)
