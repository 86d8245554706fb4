"""Evaluates the best checkpoint of a run.

    python -m train.evaluate --workdir DIR [--split test]

Prints one JSON object: split, images, loss, accuracy and top5, the last two as fractions.
"""

import argparse
import json

from train import data, flags
from train.devices.compile import start_jax
from train.devices.mesh import make_mesh, microbatch_size
from train.errors import ConfigError, DataError, UnreachableError, WorkdirError, fail
from train.run.workdir import from_flag, read_config
from train.step import evaluate, make_eval_step


def main() -> None:
  """Exit status: 0 done, 1 no usable run or dataset, 2 wrong flags."""
  parser = argparse.ArgumentParser(prog="python -m train.evaluate", allow_abbrev=False)
  parser.add_argument("--workdir", type=from_flag, required=True, help="workdir of the run")
  parser.add_argument("--split", default="test", choices=data.SPLITS)
  parser.add_argument("--data_dir", help="folder of the dataset, if it has moved since training")
  arguments = parser.parse_args()
  flags.quiet_libraries()
  try:
    from train.run import checkpoint  # late: takes seconds, and wrong flags should fail at once

    config = read_config(arguments.workdir)
    start_jax(config)
    mesh = make_mesh()
    microbatch = microbatch_size(config, mesh)
    trained = checkpoint.load_trained_model(arguments.workdir, mesh)
    if arguments.data_dir:
      data.move(config.data, arguments.data_dir)
    dataset = data.load(config.data, config.model.image_size, splits=(arguments.split,))
  except (ConfigError, WorkdirError) as error:
    fail(error, 1)
  except UnreachableError as error:
    fail(f"{str(error).splitlines()[0]} Say where it is with --data_dir.", 1)
  except DataError as error:
    fail(str(error).replace("--config.data.", "--"), 1)
  split = dataset[arguments.split]
  step = make_eval_step(trained.model, microbatch, mesh)
  metrics = evaluate(step, trained.weights, split, config.batch_size, mesh)
  print(json.dumps({"split": arguments.split, "images": len(split), **metrics}))


if __name__ == "__main__":
  main()
