"""Which files of a folder are images."""

import os
from collections.abc import Iterator

# In any case.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def is_image(name: str) -> bool:
  """Whether a file's name is that of an image, and not of a system's companion (`._x.png`)."""
  return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def is_junk(name: str) -> bool:
  """Whether a folder is a system's or a tool's, not the user's."""
  return name.startswith(".") or name == "__MACOSX"


def image_files(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
  """Paths of all images below a folder, also through links, sorted within each of its folders.

  Args:
    above: folders that this one is in, so that a link to one of them ends.
  Raises:
    OSError: a folder can't be read.
  """
  here = os.path.realpath(folder)
  if here in above:
    return
  for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
    if entry.is_dir() and not is_junk(entry.name):
      yield from image_files(entry.path, (*above, here))
    elif entry.is_file() and is_image(entry.name):
      yield entry.path
