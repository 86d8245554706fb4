"""Writes the best weights of a run to a file.

    python -m train.export --workdir DIR --output FILE.safetensors
    python -m train.export --workdir DIR --output FOLDER --layout timm

`mlp_models.load` reads them, with the names of the classes and how images are prepared. In timm's
layout, timm does as well: a config.json beside the weights says what its model must be.
"""

import math

import jax
import numpy as np

from train import flags
from train.data.framing import Framing
from train.devices.compile import start_jax
from train.devices.mesh import make_mesh
from train.errors import ConfigError, WorkdirError, fail, until_memory_ends
from train.interrupt import interruptible
from train.run.workdir import from_flag, read_config

LAYOUTS = ("ours", "timm")


@interruptible()
def main() -> None:
  """Exit status: 0 written, 1 no usable run or nowhere to write, 2 wrong flags, 128 + N stopped by
  signal N."""
  parser = flags.Parser(prog="python -m train.export")
  parser.add_argument("--workdir", type=from_flag, required=True, help="workdir of the run")
  parser.add_argument("--output", type=flags.path, required=True, help="file, or timm's folder")
  parser.add_argument("--layout", default="ours", choices=LAYOUTS, help="whose names arrays have")
  arguments = parser.parse_args()
  flags.quiet_libraries()
  try:
    # Late: these take seconds, and wrong flags should fail at once.
    import mlp_models
    from train.run.checkpoint import load_trained_model

    start_jax(read_config(arguments.workdir))
    with until_memory_ends():
      trained = load_trained_model(arguments.workdir, make_mesh())
    weights, framing = jax.device_get(trained.weights), Framing.of(trained.config.data)
    preprocessing = mlp_models.Preprocessing(
      image_size=trained.config.model.image_size,
      mean=tuple((weights.mean / 255).tolist()),
      std=tuple((np.sqrt(weights.variance) / 255).tolist()),
      interpolation=framing.interpolation,
      crop=framing.crop,
    )
    mlp_models.save(
      arguments.output,
      trained.model,
      weights.params,
      trained.info.class_names,
      preprocessing,
      layout=arguments.layout,
    )
  except (ConfigError, WorkdirError, mlp_models.WeightsError) as error:
    fail(error, 1)
  except OSError as error:
    fail(f"{arguments.output}: {error.strerror or error}", 1)
  arrays = [math.prod(x.shape) for x in jax.tree.leaves(weights.params)]
  print(
    f"Wrote {arguments.output}: {trained.config.model.name}, {sum(arrays):,} parameters, "
    f"{trained.info.num_classes} classes, in layout {arguments.layout!r}."
  )


if __name__ == "__main__":
  main()
