"""shapes100: ten shapes times ten textures, drawn locally if no other dataset is available.

Sizes and splits are those of CIFAR-100: 50,000 + 10,000 images of 32x32 pixels, equally many of 100
classes. A class is a shape, visible only across patches (token mixing), in a texture, visible
within a patch (channel mixing). Place, size, angle, colours, background and noise are random.

Every image is the same on every machine: numpy has frozen RandomState's stream, and floats are only
added, multiplied, divided and floored, which IEEE 754 defines to the last bit.
"""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SHAPES = (
  "circle",
  "ring",
  "square",
  "frame",
  "triangle",
  "cross",
  "crescent",
  "half-disc",
  "hourglass",
  "bar",
)
TEXTURES = (
  "plain",
  "striped",
  "checked",
  "dotted",
  "gridded",
  "ringed",
  "shaded",
  "speckled",
  "zigzag",
  "halved",
)
CLASS_NAMES = tuple(f"{shape}, {texture}" for shape in SHAPES for texture in TEXTURES)
SIZE = 32  # pixels a side
CHUNK = 1000  # images drawn at a time: ten of each class


def _depth(shape, x, y):
  """Depth of points inside a shape of radius 1 at the origin; negative outside.

  `x`, `y` and the result are float32 arrays of one shape. Near edges it is close to the distance.
  """
  square_radius = x * x + y * y
  disc = (1 - square_radius) * np.float32(0.5)
  box = np.maximum(abs(x), abs(y))
  match shape:
    case "circle":
      return disc
    case "ring":
      return np.minimum(disc, square_radius - np.float32(0.3))
    case "square":
      return np.float32(0.8) - box
    case "frame":
      return np.minimum(np.float32(0.85) - box, box - np.float32(0.5))
    case "triangle":
      return np.minimum(y + np.float32(0.5), np.float32(0.5) - y * 0.5 - abs(x) * np.float32(0.866))
    case "cross":
      return np.minimum(np.float32(0.95) - box, np.float32(0.32) - np.minimum(abs(x), abs(y)))
    case "crescent":
      bite = (x - np.float32(0.55)) * (x - np.float32(0.55)) + y * y
      return np.minimum(disc, (bite - np.float32(0.6)) * np.float32(0.6))
    case "half-disc":
      return np.minimum(disc, y + np.float32(0.1))
    case "hourglass":
      return np.minimum(np.float32(0.85) - abs(y), (abs(y) + np.float32(0.1) - abs(x)) * 0.7)
    case "bar":
      return np.minimum(np.float32(1.0) - abs(x), np.float32(0.35) - abs(y))


def _weave(texture, x, y, grain):
  """Weight of an object's second colour at each point, 0 to 1, float32.

  Args:
    texture: one of TEXTURES.
    x, y: pixels along the object's own axes, from its centre; float32.
    grain: noise for speckles, uint8, uniform, in the shape of `x`.
  """

  def alternate(z):  # stripes of 0 and 1, 2.4 pixels wide
    return np.floor(z / np.float32(2.4)) % 2

  match texture:
    case "plain":
      return np.zeros_like(x)
    case "striped":
      return alternate(x)
    case "checked":
      return (alternate(x) + alternate(y)) % 2
    case "dotted":
      u, v = x % 5 - np.float32(2.5), y % 5 - np.float32(2.5)
      return (u * u + v * v < np.float32(2.9)).astype(np.float32)
    case "gridded":
      return np.maximum(x % 5 < np.float32(1.4), y % 5 < np.float32(1.4)).astype(np.float32)
    case "ringed":
      return np.floor((x * x + y * y) / 14) % 2
    case "shaded":
      return np.clip(y / 16 + np.float32(0.5), 0, 1)
    case "speckled":
      return (grain < 90).astype(np.float32)
    case "zigzag":
      return alternate(x + abs(y % 8 - 4))
    case "halved":
      return (y > 0).astype(np.float32)


def draw(split: str, chunk: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws one chunk of a split.

  Args:
    split: "train" or "test".
    chunk: its index, from 0.
  Returns:
    Images, uint8 [CHUNK, 32, 32, 3], and labels, int64 [CHUNK]: CLASS_NAMES' indices, in cycles.
  """
  random = np.random.RandomState([("train", "test").index(split), chunk])

  def uniform(low, high, *shape):
    return (low + (high - low) * random.random_sample((CHUNK, *shape))).astype(np.float32)

  # Three colours, at least a quarter of the range apart (modulo 256) in each channel.
  background = uniform(0, 256, 1, 1, 3)
  near, far = uniform(64, 107, 1, 1, 3), uniform(149, 192, 1, 1, 3)
  swap = uniform(0, 1, 1, 1, 3) < 0.5
  first = (background + np.where(swap, far, near)) % 256
  second = (background + np.where(swap, near, far)) % 256

  radius = uniform(8, 14, 1, 1)
  middle_x, middle_y = uniform(10, SIZE - 10, 1, 1), uniform(10, SIZE - 10, 1, 1)
  half_tangent = uniform(-1, 1, 1, 1)  # tan(angle / 2): the angle is within +- a quarter turn
  cosine = (1 - half_tangent * half_tangent) / (1 + half_tangent * half_tangent)
  sine = 2 * half_tangent / (1 + half_tangent * half_tangent)

  pixel = np.arange(SIZE, dtype=np.float32)
  right, down = pixel[None, None, :] - middle_x, pixel[None, :, None] - middle_y
  x, y = right * cosine + down * sine, down * cosine - right * sine
  grain = random.randint(0, 256, (CHUNK, SIZE, SIZE), np.uint8)

  labels = np.arange(CHUNK) % len(CLASS_NAMES)
  depth, weave = np.empty_like(x), np.empty_like(x)
  for index, shape in enumerate(SHAPES):
    rows = labels // len(TEXTURES) == index
    depth[rows] = _depth(shape, x[rows] / radius[rows], y[rows] / radius[rows])
  for index, texture in enumerate(TEXTURES):
    rows = labels % len(TEXTURES) == index
    weave[rows] = _weave(texture, x[rows], y[rows], grain[rows])

  inside = np.clip(depth * radius + np.float32(0.5), 0, 1)[..., None]  # edges one pixel soft
  weave = weave[..., None]
  images = background + inside * (first + weave * (second - first) - background)
  images += random.randint(-24, 25, images.shape, np.int8)
  return np.clip(images, 0, 255).astype(np.uint8), labels


class Shapes100(tfds.core.GeneratorBasedBuilder):
  """The TFDS builder: `tfds.builder("shapes100")` after this module is imported."""

  VERSION = tfds.core.Version("1.0.0")
  chunks = {"train": 50, "test": 10}  # per split; tests draw fewer

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description="Small colour images of 10 shapes in 10 textures: 100 classes.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(SIZE, SIZE, 3)),
          "label": tfds.features.ClassLabel(names=CLASS_NAMES),
        }
      ),
      supervised_keys=("image", "label"),
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split, count) for split, count in self.chunks.items()}

  def _generate_examples(self, split, chunks):
    for chunk in range(chunks):
      for row, (image, label) in enumerate(zip(*draw(split, chunk), strict=True)):
        yield chunk * CHUNK + row, {"image": Image.fromarray(image), "label": int(label)}
