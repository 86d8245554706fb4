"""Trains a model:

python -m train.main --config configs/MODEL.py [--workdir DIR] [--config.KEY=VALUE ...]
"""

import contextlib
import os
import time

import jax
from etils import epath
from ml_collections import ConfigDict

from train import check, flags, interrupt
from train.devices import hosts
from train.devices.compile import start_jax
from train.errors import (
  ConfigError,
  DataError,
  Disagreement,
  SavedAndStopped,
  StorageError,
  TrainingFailed,
  WorkdirError,
  fail,
  first_line,
)
from train.run import workdir
from train.run.storage import is_local

_OUT_OF_MEMORY = """out of memory. Three knobs help:
  --config.microbatch=N            compute fewer images at a time (the result is the same)
  --config.batch_size=N            fewer images per step
  --config.model.KEY=VALUE         a smaller model, or larger patches"""


@interrupt.interruptible()
def main() -> None:
  """Exit status: 0 finished, 1 failed, 2 wrong flags; 70 a loss or gradient was not finite; 75
  another process was lost, or results can't be written now; 129 stopped by SIGHUP, 130 by SIGINT
  (Ctrl-C), 138 by SIGUSR1, 143 by SIGTERM."""
  parser = flags.Parser(prog="python -m train.main")
  parser.add_argument("--config", required=True, help=flags.CONFIG_HELP)
  parser.add_argument(
    "--workdir",
    type=workdir.from_flag,
    help="where results land, a folder or gs://BUCKET/...; runs/MODEL-TIME if not given",
  )
  hosts.add_flags(parser)
  arguments, config = flags.parse(parser)
  flags.quiet_libraries()
  try:
    check.check_config(config)
  except ConfigError as error:
    fail(error, 2)
  start_jax(config)
  with hosts.joined(arguments):
    _run(config, arguments.workdir)


def _run(config: ConfigDict, folder: epath.Path | None) -> None:
  try:
    # Late: these imports take seconds, and a wrong flag should fail at once.
    from train import loop
    from train.run import metrics

    folder = folder or _new_workdir(config)
    summary = loop.train_and_evaluate(config, folder)
  except SavedAndStopped as interruption:
    again = f"the same command with --workdir {folder} goes on from there"
    fail(f"stopped by {interruption}; {again}", interruption.exit_status)
  except ConfigError as error:
    fail(error, 2)
  except (StorageError, TrainingFailed) as error:
    fail(error, error.exit_status)
  except (DataError, WorkdirError, Disagreement) as error:
    fail(error, 1)
  except OSError as error:  # a read-only folder
    fail(f"{error.filename or folder}: {error.strerror or error}", 1)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" in str(error):
      fail(_OUT_OF_MEMORY, 1)
    if hosts.is_loss_of_another(error):
      fail(f"another process of this run is lost: {first_line(error)}", hosts.LOST)
    raise
  finally:
    if folder is not None and is_local(folder):
      with contextlib.suppress(OSError):
        os.rmdir(folder)  # if nothing was written: otherwise it is not empty
  print(metrics.format_summary(summary, folder))


def _new_workdir(config: ConfigDict) -> epath.Path:
  """A folder in runs/ that the first process has made for this run."""
  is_first = not jax.process_index()
  made = str(workdir.new(config.model.name, int(time.time()))) if is_first else ""
  return epath.Path(hosts.gather(made)[0])


if __name__ == "__main__":
  main()
