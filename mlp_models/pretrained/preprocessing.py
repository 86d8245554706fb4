"""How images were prepared for the weights: said by the files of each project in its own words."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mlp_models.layers import ImageSize, grid

_PILLOW = {2: "bilinear", 3: "bicubic"}  # transformers names filters by Pillow's numbers


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What a model expects of its images.

  image_size: in pixels, both sides or (height, width).
  mean, std: one for each channel, of pixels between 0 and 1: the model takes (pixel / 255 - mean) /
    std.
  interpolation: "bilinear" or "bicubic", of the resize.
  crop: the part of an image's shorter side that evaluation keeps, around the centre.
  """

  image_size: ImageSize
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  interpolation: str = "bilinear"
  crop: float = 1.0

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "Preprocessing":
    """The inverse of `dataclasses.asdict`, also after JSON has made lists of tuples."""
    given: dict[str, Any] = {k: tuple(x) if isinstance(x, list) else x for k, x in fields.items()}
    return cls(**given)


def of(project: str, config: Mapping[str, Any], image_size: ImageSize) -> Preprocessing:
  """As the config beside a project's weights says, or as the project does without one."""
  if project == "npz":  # vision_transformer and big_vision: resize to 256, cut 224, -1 to 1
    return Preprocessing(image_size, crop=0.875)
  read = {"timm": _of_timm, "transformers": _of_transformers}[project]
  return read(config, image_size) or Preprocessing(image_size)


def _of_timm(config: Mapping[str, Any], image_size: ImageSize) -> Preprocessing | None:
  """As timm's config.json says, on its top level or in `pretrained_cfg`; None if it does not."""
  found = {**config, **(config.get("pretrained_cfg") or {})}
  if "mean" not in found:
    return None
  return Preprocessing(
    image_size,
    tuple(found["mean"]),
    tuple(found.get("std", (0.5, 0.5, 0.5))),
    _interpolation(found.get("interpolation", "bicubic")),
    float(found.get("crop_pct") or 0.875),  # which timm takes where nothing is said
  )


def _of_transformers(config: Mapping[str, Any], image_size: ImageSize) -> Preprocessing | None:
  """As transformers' preprocessor_config.json says; None if it does not."""
  if "image_mean" not in config:
    return None
  size, crop = config.get("size"), 1.0
  shorter = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
  if config.get("do_center_crop") and shorter:
    side = min(grid(image_size))
    cut = config.get("crop_size") or side
    cut = cut.get("height", side) if isinstance(cut, dict) else cut
    crop = min(cut, shorter) / max(cut, shorter)  # Perceiver cuts first, and has the two swapped
  return Preprocessing(
    image_size,
    tuple(config["image_mean"]),
    tuple(config.get("image_std", (0.5, 0.5, 0.5))),
    _interpolation(_PILLOW.get(config.get("resample", 2), "bilinear")),
    crop,
  )


def _interpolation(name: str) -> str:
  """timm also has "random", and filters that we lack: the nearest is bicubic."""
  return "bilinear" if name == "bilinear" else "bicubic"
