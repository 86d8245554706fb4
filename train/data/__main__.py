"""Prepares a dataset, or draws samples of one.

python -m train.data prepare --name cifar100 [--data_dir DIR] [--archive FILE]
python -m train.data show --config configs/mixer.py [--config.KEY=VALUE] [--output FILE.png]
"""

import argparse

from ml_collections import ConfigDict

from train import check, flags, pretrained
from train.data.prepared import open_prepared
from train.data.show import draw_samples
from train.errors import DataError, fail
from train.interrupt import interruptible


def _parser() -> argparse.ArgumentParser:
  parser = flags.Parser(prog="python -m train.data")
  commands = parser.add_subparsers(dest="command", required=True)
  prepare = commands.add_parser("prepare", help="write a dataset to disk")
  prepare.add_argument("--name", required=True, help='dataset of TFDS, or "shapes100"')
  prepare.add_argument("--data_dir", default="", help="target folder; default: $TFDS_DATA_DIR")
  prepare.add_argument("--archive", default="", help="archive on disk, instead of a download")
  samples = commands.add_parser("show", help="draw sample images and patches")
  samples.add_argument("--config", required=True, help=flags.CONFIG_HELP)
  samples.add_argument("--output", type=flags.path, default="samples.png", help="PNG file to write")
  return parser


@interruptible()
def main() -> None:
  """Runs the command line; exit status 1: no usable dataset, 2: wrong flags,
  128 + N: stopped by signal N."""
  parser = _parser()
  arguments, unknown = parser.parse_known_args()
  try:
    if arguments.command == "show":
      arguments, config = flags.parse(parser)
      check.check_config(config)
      config = pretrained.resolve(config)  # weights or a variant may give the model's sizes
      if not arguments.output.parent.is_dir():
        raise FileNotFoundError(f"--output {arguments.output}: its folder is missing")
      draw_samples(config, arguments.output)
      print(f"Wrote {arguments.output}")
    elif unknown:
      parser.error(f"unknown argument {unknown[0]!r}")
    else:
      dataset = open_prepared(ConfigDict(vars(arguments)))
      print(f"{arguments.name} is prepared in {dataset.folder}")
  except DataError as error:
    # `prepare` has the same flags, without the prefix.
    prefix = "--" if arguments.command == "prepare" else "--config.data."
    fail(str(error).replace("--config.data.", prefix), 1)
  except (OSError, ValueError) as error:  # an output that can't be written, a wrong config
    fail(error, 2)


if __name__ == "__main__":
  main()
