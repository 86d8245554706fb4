"""Evaluates the best checkpoint of a run.

    python -m train.evaluate --workdir DIR [--split test]

Prints one JSON object: split, images, loss, accuracy and top5, the last two as fractions; null
where a loss is no number. Classes are joined to the run's by name.
"""

import json
import re

from train import data, flags
from train.devices.compile import start_jax
from train.devices.mesh import fitting_sizes, make_mesh
from train.errors import (
  ConfigError,
  DataError,
  UnreachableError,
  WorkdirError,
  fail,
  until_memory_ends,
  until_nobody_reads,
)
from train.interrupt import interruptible
from train.run.workdir import from_flag, read_config
from train.step import evaluate, make_eval_step


@interruptible()
def main() -> None:
  """Exit status: 0 done, 1 no usable run or dataset, 2 wrong flags, 128 + N stopped by signal N."""
  parser = flags.Parser(prog="python -m train.evaluate")
  parser.add_argument("--workdir", type=from_flag, required=True, help="workdir of the run")
  parser.add_argument("--split", default="test", choices=data.SPLITS)
  parser.add_argument("--data_dir", help="folder of the dataset, if it has moved since training")
  arguments = parser.parse_args()
  flags.quiet_libraries()
  try:
    # Late: these take seconds, and wrong flags should fail at once.
    from train.run import checkpoint
    from train.run.metrics import number_for_json

    config = read_config(arguments.workdir)
    start_jax(config)
    mesh = make_mesh()
    trained = checkpoint.load_trained_model(arguments.workdir, mesh)
    if arguments.data_dir:
      data.move(config.data, arguments.data_dir)
    dataset = data.load(
      config.data,
      config.model.image_size,
      splits=(arguments.split,),
      class_names=trained.info.class_names,
    )
  except (ConfigError, WorkdirError) as error:
    fail(error, 1)
  except UnreachableError as error:
    fail(f"{str(error).splitlines()[0]} Say where it is with --data_dir.", 1)
  except DataError as error:
    fail(_with_own_flags(str(error)), 1)
  split = dataset[arguments.split]
  batch_size, microbatch = fitting_sizes(config, mesh)
  step = make_eval_step(config, trained.info.num_classes, microbatch, mesh)
  try:
    with until_memory_ends():
      metrics = evaluate(step, trained.weights, split, batch_size, mesh)
  except DataError as error:  # a streamed image that can't be read
    fail(_with_own_flags(str(error)), 1)
  numbers = {name: number_for_json(value) for name, value in metrics.items()}
  with until_nobody_reads():
    print(json.dumps({"split": arguments.split, "images": len(split), **numbers}))


def _with_own_flags(message: str) -> str:
  """An error's message without flags that only training has: here they are the run's config."""
  message = message.replace("--config.data.data_dir", "--data_dir")
  return re.sub(r"--config\.(\S*\w)", r"\1 in the run's config.json", message)


if __name__ == "__main__":
  main()
