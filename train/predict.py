"""Classifies images with the best checkpoint of a run.

    python -m train.predict --workdir DIR IMAGE... [--json]

Prints the five likeliest classes of each image, in the order of the arguments, as they come. Of a
folder, all images below it are classified. Images that can't be read are reported on stderr; the
others are still classified, and the exit status is 1.
"""

import collections
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from train import augment, flags
from train.data.decode import decode_file
from train.data.framing import Framing
from train.data.listing import image_files
from train.data.names import FOLDER
from train.devices.compile import start_jax
from train.devices.machine import cores
from train.devices.mesh import by_example, fitting_sizes, make_mesh
from train.errors import (
  ConfigError,
  DataError,
  WorkdirError,
  fail,
  first_line,
  until_memory_ends,
  until_nobody_reads,
)
from train.interrupt import interruptible
from train.run.checkpoint import TrainedModel, load_trained_model
from train.run.workdir import from_flag, read_config
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
  sharding = trained.weights.mean.sharding
  mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
  assert isinstance(mesh, Mesh)  # so `load_trained_model` places them
  return make_predict(trained, mesh)(images)


def make_predict(trained: TrainedModel, mesh: Mesh) -> Callable[[np.ndarray], np.ndarray]:
  """`predict` for a model and a mesh: images -> probabilities.

  Images are computed on all devices, one microbatch on each at a time. The last are padded, so that
  one program serves any number of images.
  """
  model, weights = trained.model, trained.weights
  framing = Framing.of(trained.config.data)
  size = fitting_sizes(trained.config, mesh)[1] * mesh.size

  @jax.jit
  def probabilities(weights, images):
    x = augment.preprocess(
      images,
      mean=weights.mean,
      variance=weights.variance,
      image_size=model.image_size,
      framing=framing,
    )
    return jax.nn.softmax(apply_model(model, weights.params, x))

  def apply(images: np.ndarray) -> np.ndarray:
    answers = []
    for start in range(0, len(images), size):
      part = images[start : start + size]
      padded = np.zeros((size, *part.shape[1:]), np.uint8)
      padded[: len(part)] = part
      on_mesh = jax.device_put(padded, by_example(mesh))
      answers.append(probabilities(weights, on_mesh))  # not waited for
    return np.concatenate(answers)[: len(images)]

  return apply


@interruptible()
def main() -> None:
  """Exit status: 0 all images classified, 1 some can't be read or no usable run, 2 wrong flags,
  128 + N stopped by signal N."""
  parser = flags.Parser(prog="python -m train.predict")
  parser.add_argument("--workdir", type=from_flag, required=True, help="workdir of the run")
  parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file, or a folder")
  parser.add_argument("--json", action="store_true", help="print one line of JSON per image")
  arguments = parser.parse_args()
  flags.quiet_libraries()
  try:
    start_jax(read_config(arguments.workdir))
    mesh = make_mesh()
    trained = load_trained_model(arguments.workdir, mesh)
  except (ConfigError, WorkdirError) as error:
    fail(error, 1)
  if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be in no or another encoding
    is_utf8 = sys.stdout.encoding.lower() == "utf-8"
    sys.stdout.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")
  with until_memory_ends(), until_nobody_reads():
    answered = _answer(trained, mesh, _files(arguments.images), arguments.json)
  if not answered:
    sys.exit(1)


def _files(arguments: Sequence[str]) -> Iterator[str]:
  """The files of the arguments, in order; a folder itself if it can't be read or holds none."""
  for argument in arguments:
    path = argument if os.path.lexists(argument) else os.path.expanduser(argument)
    if not os.path.isdir(path):
      yield path
      continue
    found = image_files(path)
    try:
      yield from itertools.chain([next(found, path)], found)
    except DataError:
      yield path


def _answer(trained: TrainedModel, mesh: Mesh, paths: Iterator[str], as_json: bool) -> bool:
  """Prints an answer for each file, or on stderr why there is none; whether all had one."""
  data = trained.config.data
  framing = Framing.of(data)
  shape = framing.shape_in_memory(trained.info.image_shape, trained.config.model.image_size)
  upright = data.name.startswith(FOLDER)  # TFDS does not turn photos

  def read(path: str) -> np.ndarray | Exception:
    try:
      if os.path.isdir(path):
        collections.deque(image_files(path), maxlen=0)  # raises if a folder can't be read
        raise ValueError("a folder without images")
      return decode_file(
        Path(path).read_bytes(),
        shape,
        background=data.background,
        upright=upright,
        framing=framing,
      )
    except Exception as error:  # of the file system, of Pillow, or too little memory
      return error

  apply, answered = make_predict(trained, mesh), True
  batch_size = fitting_sizes(trained.config, mesh)[0]
  with ThreadPoolExecutor(cores()) as threads:  # decoders release Python's lock
    while batch := list(itertools.islice(paths, batch_size)):
      images = list(threads.map(read, batch))
      good = [image for image in images if isinstance(image, np.ndarray)]
      answers = iter(apply(np.stack(good)) if good else ())
      for path, image in zip(batch, images, strict=True):
        if isinstance(image, Exception):
          answered = False
          sys.stdout.flush()  # to keep the order where both go to one terminal
          reason = image.strerror if isinstance(image, OSError) else None
          print(f"{path}: {reason or first_line(image)}", file=sys.stderr, flush=True)
        else:
          _print_answer(path, _top(next(answers), trained.info.class_names), as_json)
      sys.stdout.flush()
  return answered


def _top(probabilities: np.ndarray, class_names: Sequence[str]) -> list[tuple[str, float]]:
  top = np.argsort(-probabilities)[:TOP]
  return [(class_names[i], float(probabilities[i])) for i in top]


def _print_answer(path: str, classes: Iterable[tuple[str, float]], as_json: bool) -> None:
  if as_json:
    top = [{"class": name, "probability": probability} for name, probability in classes]
    print(json.dumps({"image": path, "top5": top}))
    return
  print(path)
  for name, probability in classes:
    print(f"  {probability:6.1%}  {name}")


if __name__ == "__main__":
  main()
