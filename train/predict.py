"""Classifies images with the best checkpoint of a run.

    python -m train.predict --workdir DIR IMAGE... [--json]

Prints the five likeliest classes of each image. Images that can't be read are reported on stderr;
the others are still classified, and the exit status is 1.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image, ImageOps

from train import augment, flags
from train.data.batches import batches
from train.data.decode import PIL_MODES
from train.data.splits import Split
from train.devices.compile import skip_missing_tpu
from train.devices.mesh import make_mesh
from train.errors import WorkdirError, fail
from train.run.checkpoint import TrainedModel, load_trained_model
from train.run.workdir import from_flag
from train.state import apply_model

TOP = 5


def predict(trained: TrainedModel, images: np.ndarray) -> np.ndarray:
  """Class probabilities.

  Args:
    trained: from `checkpoint.load_trained_model`.
    images: uint8 [B, H, W, C], of the size that the dataset's images have in memory.
  Returns:
    float32 [B, num_classes].
  """
  model, weights = trained.model, trained.weights

  @jax.jit
  def probabilities(weights, images):
    x = augment.preprocess(
      images, mean=weights.mean, variance=weights.variance, image_size=model.image_size
    )
    return jax.nn.softmax(apply_model(model, weights.params, x))

  labels = np.zeros(len(images), np.int32)  # unknown and unused
  size = min(len(images), trained.config.batch_size)
  rows = batches(Split(images, labels), size)
  answers = [probabilities(weights, batch["image"])[batch["mask"]] for batch in rows]
  return np.concatenate(answers)


def read_image(path: str, shape: Sequence[int]) -> np.ndarray:
  """Reads any image that Pillow decodes as uint8 of `shape` [H, W, C], resized with antialiasing.

  Raises:
    Exception: the file is missing or not an image; the type depends on Pillow's decoder.
  """
  height, width, channels = shape
  with Image.open(path) as file:
    image = ImageOps.exif_transpose(file)  # turn photos upright
    image = image.convert(PIL_MODES[channels])
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(shape)


def main() -> None:
  """Exit status: 0 all images classified, 1 some can't be read or no usable run, 2 wrong flags."""
  parser = argparse.ArgumentParser(prog="python -m train.predict", allow_abbrev=False)
  parser.add_argument("--workdir", type=from_flag, required=True, help="workdir of the run")
  parser.add_argument("images", nargs="+", metavar="IMAGE", help="any file that Pillow reads")
  parser.add_argument("--json", action="store_true", help="print one line of JSON per image")
  arguments = parser.parse_args()
  flags.quiet_libraries()
  skip_missing_tpu()
  try:
    trained = load_trained_model(arguments.workdir, make_mesh())
  except WorkdirError as error:
    fail(error, 1)

  shape = trained.info.shape_in_memory(trained.config.model.image_size)
  read = {}
  for path in arguments.images:
    try:
      read[path] = read_image(path, shape)
    except Exception as error:  # Pillow's decoders raise errors of any type
      print(f"{path}: {error}", file=sys.stderr)
  if read:
    answers = predict(trained, np.stack(list(read.values())))
    for path, probabilities in zip(read, answers, strict=True):
      top = np.argsort(-probabilities)[:TOP]
      classes = [(trained.info.class_names[i], float(probabilities[i])) for i in top]
      _print_answer(path, classes, arguments.json)
  if len(read) < len(set(arguments.images)):
    sys.exit(1)


def _print_answer(path: str, classes: list[tuple[str, float]], as_json: bool) -> None:
  if as_json:
    top = [{"class": name, "probability": probability} for name, probability in classes]
    print(json.dumps({"image": path, "top5": top}))
    return
  print(path)
  for name, probability in classes:
    print(f"  {probability:6.1%}  {name}")


if __name__ == "__main__":
  main()
