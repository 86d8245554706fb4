"""Which part of an image a model sees, and how the image is resized."""

import math
from typing import NamedTuple

from ml_collections import ConfigDict

MODES = ("center", "squash")
INTERPOLATIONS = ("bilinear", "bicubic")
# Larger images of one size are decoded smaller: 128 of them would take more than 100 MB.
_LARGEST_KEPT = 512


class Framing(NamedTuple):
  """How an image gets the size it has in memory and, on the device, the model's.

  crop: fraction of the shorter side that evaluation sees, in (0, 1].
  mode: "center": the middle, with its aspect kept; "squash": all of both sides, made square.
  interpolation: "bilinear" or "bicubic".
  decode_size: side in pixels of the squares in memory; None: see `shape_in_memory`.
  """

  crop: float = 1.0
  mode: str = "center"
  interpolation: str = "bilinear"
  decode_size: int | None = None

  @classmethod
  def of(cls, data_config: ConfigDict) -> "Framing":
    """The framing of `config.data`; None there are the defaults here."""
    return cls(
      data_config.crop or 1.0,
      data_config.crop_mode,
      data_config.interpolation or "bilinear",
      data_config.decode_size,
    )

  def shape_in_memory(
    self, image_shape: tuple[int | None, int | None, int], image_size: int
  ) -> tuple[int, int, int]:
    """H, W and C of a dataset's images once decoded.

    Without a `decode_size`, images that all have one size keep it, unless they are large photos.
    The others become squares of which `crop` is the model's input: 256 for 224 and 0.875.

    Args:
      image_shape: H, W and C of the dataset; None where images differ in size.
      image_size: of the model's input.
    """
    height, width, channels = image_shape
    size = self.decode_size or math.floor(image_size / self.crop)  # rounded as timm does
    if height and width and not self.decode_size:
      is_large = min(height, width) > max(size, _LARGEST_KEPT)
      if self.mode == "squash" or not is_large:
        return height, width, channels
    return size, size, channels

  def seen(self, height: int, width: int) -> tuple[int, int, int, int]:
    """The part of an image in memory that evaluation sees: top, left, height, width.

    In whole pixels: where they are as many as the model takes, it sees them unchanged.
    """
    if self.mode == "center":
      seen_height = seen_width = self._part(min(height, width))
    else:
      seen_height, seen_width = self._part(height), self._part(width)
    return (height - seen_height) // 2, (width - seen_width) // 2, seen_height, seen_width

  def _part(self, side: int) -> int:
    # Rounded up, since shape_in_memory rounds down; 1e-6: 0.07 * 100 is a little more than 7.
    return math.ceil(self.crop * side - 1e-6)

  def source(
    self, height: int, width: int, new_height: int, new_width: int
  ) -> tuple[float, float, float, float]:
    """The part of a decoded image that becomes new_height x new_width: left, top, right, bottom.

    "center" cuts the middle with the new aspect, at whole pixels for a square.
    """
    if self.mode == "squash":
      return 0, 0, width, height
    source_width = min(width, height * new_width / new_height)
    source_height = min(height, width * new_height / new_width)
    left, top = (width - source_width) // 2, (height - source_height) // 2
    return left, top, left + source_width, top + source_height


CENTER = Framing()  # the default: the whole centre square
