"""Real runs of a user without a home folder, or with one in which nothing can be written."""

import os
import subprocess
from pathlib import Path

import pytest
from runs import COMMAND, REPOSITORY

from train.run import metrics

SMALL = [
  *("--config.epochs=1", "--config.data.train_split=train[:256]"),
  *("--config.data.validation_split=train[3900:]", "--config.data.test_split=test[:100]"),
]
UNKNOWN = "exec unshare --user --map-user=54321 --map-group=54321 env -u HOME"
MOUNTED = "exec unshare --user --map-root-user --mount sh -c"


def train(folder: Path, shell: str, home: Path) -> str:
  """What a run prints on stderr; "$@" in `shell` is its command."""
  own = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")
  environment = {name: value for name, value in os.environ.items() if name not in own}
  process = subprocess.run(
    ["sh", "-c", shell, "sh", *COMMAND, *SMALL, "--workdir", str(folder)],
    cwd=REPOSITORY,
    env=environment | {"HOME": str(home), "JAX_NUM_CPU_DEVICES": "2"},
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  assert metrics.read_summary(folder)["epochs"] == 1
  return process.stderr


@pytest.mark.needs(what="namespaces")
@pytest.mark.slow
def test_a_user_whom_the_system_does_not_know_trains(shapes100, tmp_path):
  (line,) = train(tmp_path / "run", f'{UNKNOWN} "$@"', tmp_path).splitlines()
  assert line.startswith("note: there is no home folder to keep compiled programs in;")


@pytest.mark.slow
def test_a_home_that_is_no_folder_is_one_line(shapes100, tmp_path):
  (tmp_path / "home").write_text("a file")
  (line,) = train(tmp_path / "run", 'exec "$@"', tmp_path / "home").splitlines()
  assert line.startswith(f"note: reading compiled programs in {tmp_path}/home/.cache/mlp_models")


@pytest.mark.slow
@pytest.mark.needs(what="namespaces")
@pytest.mark.parametrize(
  ("options", "verb", "reason"),
  [("ro", "reading", "Read-only file system"), ("size=64k", "writing", "No space left on device")],
)
def test_a_home_that_is_read_only_or_full_is_one_line(shapes100, options, verb, reason, tmp_path):
  home = tmp_path / "home"
  home.mkdir()
  mounted = f'mount -t tmpfs -o {options} none {home} && exec "$@"'
  (line,) = train(tmp_path / "run", f"{MOUNTED} '{mounted}' sh \"$@\"", home).splitlines()
  assert line.startswith(f"note: {verb} compiled programs in {home}/.cache/mlp_models failed (")
  assert reason in line
