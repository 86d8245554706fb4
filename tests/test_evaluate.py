"""evaluate: classes joined by name, any number of devices, and one valid JSON object."""

import importlib
import json
import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from test_predict import run

from train import evaluate, predict
from train.devices.mesh import fitting_sizes, make_mesh
from train.loop import train_and_evaluate
from train.run import metrics

COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}


def add_class(folder, name: str, colour, images: dict[str, int]) -> None:
  """Adds noisy images of a colour to PATH/SPLIT/NAME."""
  for split, count in images.items():
    (folder / split / name).mkdir(parents=True)
    for i in range(count):
      noise = np.random.default_rng([i, *os.fsencode(name + split)]).normal(colour, 25, (32, 32, 3))
      image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
      image.save(folder / split / name / f"{i}.png")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
  """An image folder, and the workdir of a run on it."""
  place = tmp_path_factory.mktemp("colours")
  for name, colour in COLOURS.items():
    add_class(place / "set", name, colour, {"train": 40, "test": 8})
  config = importlib.import_module("configs.mixer").get_config("smoke")
  config.data.name = f"folder:{place / 'set'}"
  config.epochs, config.batch_size = 3, 24
  train_and_evaluate(config, place / "run")
  return place / "set", place / "run"


def result(monkeypatch, capsys, *arguments) -> dict:
  status, out, error = run(evaluate, monkeypatch, capsys, *arguments)
  assert status == 0, error
  return json.loads(out)


def test_classes_are_joined_by_name(colours, tmp_path, monkeypatch, capsys):
  folder, workdir = colours
  whole = result(monkeypatch, capsys, "--workdir", workdir)
  assert whole["images"] == 24
  assert whole["accuracy"] > 0.8
  hits = {}
  for name in COLOURS:  # a set with `test` alone, and with one class alone
    shutil.copytree(folder / "test" / name, tmp_path / name / "test" / name)
    alone = result(monkeypatch, capsys, "--workdir", workdir, "--data_dir", tmp_path / name)
    assert alone["images"] == 8
    hits[name] = 8 * alone["accuracy"]
  assert sum(hits.values()) / 24 == pytest.approx(whole["accuracy"])


def test_class_that_the_run_does_not_know_is_refused_by_name(
  colours, tmp_path, monkeypatch, capsys
):
  folder, workdir = colours
  shutil.copytree(folder, tmp_path / "set")
  add_class(tmp_path / "set", "amber", (250, 190, 0), {"train": 2, "test": 2})  # the first by name
  arguments = ("--workdir", workdir, "--data_dir", tmp_path / "set")
  status, out, error = run(evaluate, monkeypatch, capsys, *arguments)
  assert (status, out) == (1, "")
  assert "amber" in error
  assert error.count("\n") == 1
  assert "--config." not in error


def test_folder_that_has_gone_is_said_with_the_flag_that_helps(colours, monkeypatch, capsys):
  _, workdir = colours
  arguments = ("--workdir", workdir, "--data_dir", "/no/such/folder")
  status, out, error = run(evaluate, monkeypatch, capsys, *arguments)
  assert (status, out) == (1, "")
  assert "/no/such/folder" in error
  assert error.count("\n") == 1
  assert "--config." not in error


@pytest.mark.parametrize(
  ("devices", "microbatch"), [(1, None), (3, None), (3, 16), (5, 64), (8, 3)]
)
def test_any_number_of_devices_serves_whatever_the_training_had(
  devices, microbatch, finished_run, tmp_path, monkeypatch, capsys
):
  shutil.copytree(finished_run, tmp_path / "run")
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  config["microbatch"] = microbatch
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  mesh = make_mesh(devices=jax.devices()[:devices])
  monkeypatch.setattr("train.evaluate.make_mesh", lambda: mesh)
  expected = metrics.read_summary(finished_run)
  found = result(monkeypatch, capsys, "--workdir", tmp_path / "run")
  assert found["images"] == 500
  assert found["accuracy"] == expected["test_accuracy"]
  assert found["top5"] == expected["test_top5"]
  assert found["loss"] == pytest.approx(expected["test_loss"], rel=1e-5)


@pytest.mark.parametrize(
  ("batch_size", "microbatch", "devices", "fitting"),
  [(64, None, 8, (64, 2)), (64, 4, 8, (64, 4)), (64, 16, 3, (66, 11)), (1, 64, 8, (8, 1))],
)
def test_batch_is_rounded_up_and_the_largest_microbatch_taken(
  batch_size, microbatch, devices, fitting, smoke_config
):
  config = smoke_config(batch_size=batch_size, microbatch=microbatch)
  assert fitting_sizes(config, make_mesh(devices=jax.devices()[:devices])) == fitting


def test_loss_that_is_no_number_is_null(finished_run, monkeypatch, capsys):
  numbers = {"loss": float("nan"), "accuracy": 0.5, "top5": float("inf")}
  monkeypatch.setattr("train.evaluate.evaluate", lambda *arguments: numbers)
  found = result(monkeypatch, capsys, "--workdir", finished_run)
  assert (found["loss"], found["accuracy"], found["top5"]) == (None, 0.5, None)


def test_flags_of_training_are_not_advised():
  message = "X is broken: move it, --config.data.data_dir=DIR, or --config.data.skip_broken=True."
  assert evaluate._with_own_flags(message) == (
    "X is broken: move it, --data_dir=DIR, or data.skip_broken=True in the run's config.json."
  )


@pytest.mark.parametrize(
  ("module", "place"),
  [(evaluate, "train.evaluate.evaluate"), (predict, "train.predict.make_predict")],
)
def test_lack_of_memory_is_one_line(module, place, finished_run, monkeypatch, capsys):
  def fail(*arguments):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")

  monkeypatch.setattr(place, fail)
  images = ["x.png"] if module is predict else []
  status, out, error = run(module, monkeypatch, capsys, "--workdir", finished_run, *images)
  assert (status, out) == (1, "")
  assert error.startswith("error: out of memory") and error.count("\n") == 1
