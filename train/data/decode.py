"""Image files -> pixels.

`decode_file` reads a user's file, in training, evaluation and prediction alike. `decode` reads the
records of TFDS's sets, faster, and like TFDS it neither turns photos nor converts colours.
"""

import contextlib
import functools
import io
import logging
import struct
import warnings
import zlib
from typing import Any

import cv2
import numpy as np
from PIL import (
  BmpImagePlugin,
  GifImagePlugin,
  Image,
  ImageCms,
  JpegImagePlugin,
  PngImagePlugin,
  TiffImagePlugin,
  WebPImagePlugin,
)

from train.data.complaints import complaints
from train.data.framing import CENTER, Framing

MAX_PIXELS = 2**28  # of a file's image; a small file can claim more and exhaust the memory

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
_FLAGS = {  # for cv2.imdecode, by number of channels; as in TFDS, photos are not turned
  1: cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION,
  3: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
  4: cv2.IMREAD_UNCHANGED,
}
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_TO_RGBA = {1: cv2.COLOR_GRAY2RGBA, 3: cv2.COLOR_BGR2RGBA, 4: cv2.COLOR_BGRA2RGBA}

_PNG = b"\x89PNG\r\n\x1a\n"
# By a file's first bytes. Not with Image.open, which would try decoders that run other programs
# (EPS), and has a limit of pixels below what phones take.
_FORMATS: dict[bytes, Any] = {
  _PNG: PngImagePlugin.PngImageFile,
  b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
  b"RIFF": WebPImagePlugin.WebPImageFile,
  b"BM": BmpImagePlugin.BmpImageFile,
  b"GIF8": GifImagePlugin.GifImageFile,
  b"II": TiffImagePlugin.TiffImageFile,
  b"MM": TiffImagePlugin.TiffImageFile,
}
_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {  # by EXIF's orientation; 1 is upright
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}

# Pillow warns of odd metadata, which changes no pixel, and of many pixels, which have a limit here.
# A filter for a while (warnings.catch_warnings) would not be safe in threads.
for _category in (UserWarning, Image.DecompressionBombWarning):
  warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its errors reach the terminal


def decode(encoded: bytes, shape: tuple[int, int, int], framing: Framing = CENTER) -> np.ndarray:
  """Decodes a PNG or JPEG to uint8 of `shape` [H, W, C], cut and resized if its size differs.

  With OpenCV, which is faster than Pillow on small images.

  Raises:
    ValueError: the image is damaged.
  """
  channels = shape[2]
  image = cv2.imdecode(np.frombuffer(encoded, np.uint8), _FLAGS[channels])
  if image is None:
    raise ValueError("an image is damaged")
  if channels == 4:  # IMREAD_UNCHANGED gives grey, BGR or BGRA
    image = cv2.cvtColor(image, _TO_RGBA[image.shape[2] if image.ndim == 3 else 1])
  if image.shape[:2] != shape[:2]:
    image = np.asarray(resize(Image.fromarray(image), shape, framing))
  return image.reshape(shape)


def decode_file(
  encoded: bytes,
  shape: tuple[int, int, int],
  *,
  background: str,
  upright: bool,
  framing: Framing = CENTER,
  name: str = "a TIFF file",
) -> np.ndarray:
  """Decodes a PNG, JPEG, WebP, BMP, GIF or TIFF file of any mode; of an animation, the first frame.

  16 bits a channel become their high byte.

  Args:
    encoded: the file's content.
    shape: H, W and C; an image of another size is cut and resized as `framing` says.
    background: colour on which transparent pixels are composed, if C is 1 or 3; a name or #rrggbb.
    upright: turn photos as their EXIF says, and convert embedded colour profiles to sRGB. False:
      neither, like `decode`, for comparison with TFDS's sets.
    name: of the file, for what libtiff prints about it (`complaints`).
  Returns:
    uint8 [H, W, C].
  Raises:
    ValueError: the file is no such image, is damaged, or has more than MAX_PIXELS.
  """
  channels = shape[2]
  try:
    is_tiff = encoded.startswith((b"II", b"MM"))
    with complaints.counted(name) if is_tiff else contextlib.nullcontext():
      image = _load(encoded, background, upright, keep_alpha=channels == 4)
  except (ValueError, MemoryError):
    raise
  except Exception as error:  # Pillow's decoders raise errors of any type
    text = str(error).strip() or type(error).__name__
    raise ValueError(text.splitlines()[0]) from error
  image = resize(image.convert(PIL_MODES[channels]), shape, framing)
  return np.asarray(image).reshape(shape)


def resize(image: Image.Image, shape: tuple[int, int, int], framing: Framing) -> Image.Image:
  """Gives an image the height and width of `shape` [H, W, C], with Pillow's antialiasing."""
  height, width, _ = shape
  if image.size == (width, height):
    return image
  box = framing.source(image.height, image.width, height, width)
  return image.resize((width, height), _FILTERS[framing.interpolation], box)


def _load(encoded: bytes, background: str, upright: bool, keep_alpha: bool) -> Image.Image:
  """The image of a file: grey, RGB or RGBA of 8 bits."""
  format = next((_FORMATS[prefix] for prefix in _FORMATS if encoded.startswith(prefix)), None)
  if format is None:
    raise ValueError("it is no PNG, JPEG, WebP, BMP, GIF or TIFF" if encoded else "it is empty")
  profile = None
  if format is PngImagePlugin.PngImageFile:
    encoded, profile = _strip_png(encoded)
  with format(io.BytesIO(encoded)) as file:
    if file.width * file.height > MAX_PIXELS:
      raise ValueError(f"{file.width:,} x {file.height:,} pixels are more than {MAX_PIXELS:,}")
    file.load()
    depth = encoded[24] if format is PngImagePlugin.PngImageFile else 8
    image, alpha = _separate_alpha(file, depth)
    profile = profile or file.info.get("icc_profile")
    turn = _TURNS.get(_orientation(file)) if upright else None
  image = _to_srgb(image, profile if upright else None)
  if alpha is not None and keep_alpha:
    image = image.convert("RGBA")
    image.putalpha(alpha)
  elif alpha is not None:
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image.convert("RGB"), mask=alpha)
    image = canvas
  return image if turn is None else image.transpose(turn)


def _strip_png(encoded: bytes) -> tuple[bytes, bytes | None]:
  """A PNG with the chunks that pixels need, and its colour profile.

  Pillow refuses an image for its texts if they are long, many or damaged.
  """
  kept, profile, start = [_PNG], None, len(_PNG)
  while start + 8 <= len(encoded):
    length, kind = struct.unpack_from(">I4s", encoded, start)
    end = start + 12 + length
    content = encoded[start + 8 : end - 4]
    if kind == b"iCCP":
      profile = _unpack_profile(content)
    needed = kind[:1].isupper() or kind == b"tRNS"
    if needed or (
      kind == b"eXIf" and zlib.crc32(kind + content).to_bytes(4) == encoded[end - 4 : end]
    ):
      kept.append(encoded[start:end])
    start = end
  return b"".join(kept), profile


def _unpack_profile(chunk: bytes) -> bytes | None:
  """The profile of a PNG's iCCP chunk (its name, 0, 0, zlib); None if it is damaged."""
  _, _, packed = chunk.partition(b"\0")
  try:
    return zlib.decompressobj().decompress(packed[1:], 2**24)
  except zlib.error:
    return None


def _orientation(file: Image.Image) -> int:
  """EXIF's orientation; 1, upright, if there is none or the metadata are damaged."""
  try:
    return file.getexif().get(_ORIENTATION, 1)
  except Exception:  # of any type, like the damage
    return 1


def _separate_alpha(image: Image.Image, depth: int) -> tuple[Image.Image, Image.Image | None]:
  """Colours in mode L, RGB, CMYK or LAB, and opacity in mode L; None if there is none.

  Args:
    image: of any mode.
    depth: bits of a channel in the file.
  """
  key = image.info.get("transparency")  # a level or colour, as in the file, that is transparent
  mode = image.mode
  if mode in ("I", "F"):
    raise ValueError("its pixels are 32-bit numbers, whose range is unknown; save it in 8 or 16")
  if mode in ("1", "L", "RGB") or mode.startswith("I;16"):
    levels = np.asarray(image)
    alpha = None
    if key is not None:
      key = np.asarray(key) & (2**depth - 1)
      if mode == "L" and depth < 8:
        key = key * (255 // (2**depth - 1))  # Pillow scales these levels
      if mode == "RGB" and depth == 16:
        key = key >> 8  # Pillow keeps the high bytes of colours
      visible = levels != key
      visible = visible.any(axis=-1) if mode == "RGB" else visible
      alpha = Image.fromarray(255 * visible.astype(np.uint8))
    if mode.startswith("I;16"):
      return Image.fromarray((levels >> 8).astype(np.uint8)), alpha
    return image.convert("L" if mode == "1" else mode), alpha
  if not image.has_transparency_data:
    return image.convert("RGB") if mode not in ("CMYK", "LAB") else image, None
  if mode in ("LA", "La"):
    grey, alpha = image.convert("LA").split()
    return grey, alpha
  *colours, alpha = image.convert("RGBA").split()
  return Image.merge("RGB", colours), alpha


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
  """Converts to mode L or RGB in sRGB. A profile that is damaged or does not fit is ignored."""
  if image.mode == "LAB":
    profile = None  # these colours are defined without one
  if (profile or image.mode == "LAB") and (transform := _transform(profile, image.mode)):
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # None only if it is converted in place
    return converted
  return image if image.mode == "L" else image.convert("RGB")


@functools.lru_cache(maxsize=64)  # a folder's photos come from a few cameras and programs
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
  """From a profile to sRGB; None if it is sRGB already, damaged, or of another mode.

  Args:
    profile: an ICC profile; None for mode LAB, whose colours are defined.
    mode: L, RGB, CMYK or LAB.
  """
  try:
    source = io.BytesIO(profile) if profile else ImageCms.createProfile("LAB")
    target = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(source, target, mode, "RGB")
  except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
    return None
  if mode in ("CMYK", "LAB"):
    return transform
  levels = np.arange(0, 256, 15, dtype=np.uint8)
  colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
  probe = Image.fromarray(colours if mode == "RGB" else levels[None])
  converted = ImageCms.applyTransform(probe, transform)
  difference = np.asarray(converted, int) - np.asarray(probe.convert("RGB"), int)
  return transform if abs(difference).max() > 1 else None  # programs round sRGB differently
