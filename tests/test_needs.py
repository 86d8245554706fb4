"""A test is skipped for a reason of tests/needs.py, or fails."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import TESTS

SELF_SKIPPING = {
  "in the test": "def test(): pytest.skip('because')",
  "by a mark": "@pytest.mark.skipif(True, reason='because')\ndef test(): pass",
  "in a fixture": "@pytest.fixture\ndef it(): pytest.skip('because')\ndef test(it): pass",
  "in the module": "pytest.skip('because', allow_module_level=True)",
}


def run_pytest(folder, content, **environment):
  for name in ("conftest.py", "needs.py"):
    shutil.copy(TESTS / name, folder)
  (folder / "test_it.py").write_text(f"import pytest\n{content}\n")
  return subprocess.run(
    [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder / "test_it.py"],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(TESTS.parent)} | environment,
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize("content", SELF_SKIPPING.values(), ids=SELF_SKIPPING)
def test_what_skips_itself_fails(content, tmp_path):
  process = run_pytest(tmp_path, content)
  assert process.returncode in (1, 2)
  assert "skipped, but not by tests/needs.py: Skipped: because" in process.stdout


def test_what_lacks_a_need_is_skipped_by_name_or_refused(tmp_path):
  content = "@pytest.mark.needs(what='cifar100')\ndef test(): pass"
  process = run_pytest(tmp_path, content, TFDS_DATA_DIR=str(tmp_path))
  assert process.returncode == 0
  assert "1 skipped: CIFAR-100 is not prepared: set TFDS_DATA_DIR" in process.stdout
  required = {"TFDS_DATA_DIR": str(tmp_path), "MLP_MODELS_REQUIRE": "keras cifar100"}
  process = run_pytest(tmp_path, content, **required)
  assert process.returncode == pytest.ExitCode.USAGE_ERROR
  assert "MLP_MODELS_REQUIRE=cifar100: CIFAR-100 is not prepared" in process.stderr
