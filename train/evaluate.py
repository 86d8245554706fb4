"""Evaluates the best checkpoint of a run, or the features of weights.

    python -m train.evaluate --workdir DIR [--split test] [--data_dir DIR]
    python -m train.evaluate --workdir DIR --probe
    python -m train.evaluate --config configs/vit.py:finetune --config.init=FILE --probe

Prints one JSON object: split, images, loss, accuracy and top5, the last two as fractions; null
where a loss is no number. Classes are joined to the run's by name.

`--probe` judges the features before the head instead: the accuracies of a linear classifier of them
and of their nearest neighbours, both from the training split, whatever classes it has. With
`--config` they are the features of the weights in `config.init`, before any fine-tuning.
"""

import argparse
import json
import re
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from train import check, data, flags
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

if TYPE_CHECKING:
  from train.run.checkpoint import TrainedModel


@interruptible()
def main() -> None:
  """Exit status: 0 done, 1 no usable run or dataset, 2 wrong flags, 128 + N stopped by signal N."""
  parser = flags.Parser(prog="python -m train.evaluate")
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--workdir", type=from_flag, help="workdir of the run")
  source.add_argument("--config", help=f"{flags.CONFIG_HELP}, with --config.init and --probe")
  parser.add_argument("--split", default="test", choices=data.SPLITS)
  parser.add_argument("--data_dir", help="folder of the dataset, if it has moved since training")
  parser.add_argument("--probe", action="store_true", help="judge the features before the head")
  arguments, _ = parser.parse_known_args()
  flags.quiet_libraries()
  try:
    found = _of_weights(parser) if arguments.config else _of_run(parser.parse_args())
  except ConfigError as error:
    fail(error, 2 if arguments.config else 1)
  except WorkdirError as error:
    fail(error, 1)
  except DataError as error:  # also of a streamed image that can't be read
    if arguments.config:
      fail(error, 1)
    if isinstance(error, UnreachableError):
      fail(f"{str(error).splitlines()[0]} Say where it is with --data_dir.", 1)
    fail(_with_own_flags(str(error)), 1)
  with until_nobody_reads():
    print(json.dumps(found))


def _of_run(arguments: argparse.Namespace) -> dict:
  # Late: these take seconds, and wrong flags should fail at once.
  from train.run import checkpoint

  config = read_config(arguments.workdir)
  start_jax(config)
  mesh = make_mesh()
  trained = checkpoint.load_trained_model(arguments.workdir, mesh)
  if arguments.data_dir:
    data.move(config.data, arguments.data_dir)
  dataset = data.load(
    config.data,
    config.model.image_size,
    splits=data.SPLITS if arguments.probe else (arguments.split,),
    class_names=None if arguments.probe else trained.info.class_names,
  )
  with until_memory_ends():
    return (_probe if arguments.probe else _evaluate)(trained, dataset, arguments.split, mesh)


def _of_weights(parser: argparse.ArgumentParser) -> dict:
  arguments, config = flags.parse(parser)
  check.check_config(config)
  if not (arguments.probe and config.init):
    raise ConfigError("--config needs --probe and --config.init=FILE, the weights to probe")
  if arguments.data_dir:
    raise ConfigError("--data_dir goes with --workdir: a config has --config.data.data_dir")
  # Late: see `_of_run`.
  from train.probe import from_weights

  start_jax(config)
  mesh = make_mesh()
  with until_memory_ends():
    trained, dataset = from_weights(config, mesh)
    return _probe(trained, dataset, arguments.split, mesh)


def _evaluate(trained: "TrainedModel", dataset: data.Dataset, split: str, mesh: Mesh) -> dict:
  from train.run.metrics import number_for_json

  batch_size, microbatch = fitting_sizes(trained.config, mesh)
  step = make_eval_step(trained.config, trained.info.num_classes, microbatch, mesh)
  metrics = evaluate(step, trained.weights, dataset[split], batch_size, mesh)
  numbers = {name: number_for_json(value) for name, value in metrics.items()}
  return {"split": split, "images": len(dataset[split]), **numbers}


def _probe(trained: "TrainedModel", dataset: data.Dataset, split: str, mesh: Mesh) -> dict:
  from train.probe import probe

  return probe(trained, dataset, split, mesh)


def _with_own_flags(message: str) -> str:
  """An error's message without flags that only training has: here they are the run's config."""
  message = message.replace("--config.data.data_dir", "--data_dir")
  return re.sub(r"--config\.(\S*\w)", r"\1 in the run's config.json", message)


if __name__ == "__main__":
  main()
