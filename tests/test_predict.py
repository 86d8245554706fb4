"""Using a trained model: evaluation of splits and classification of image files."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from train import data, evaluate, predict
from train.devices.mesh import make_mesh
from train.run import checkpoint, metrics
from train.step import evaluate as evaluate_split
from train.step import make_eval_step


def run(module, monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
  """Exit status, stdout and stderr of a module's main."""
  monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
  monkeypatch.setattr("train.evaluate.start_jax", lambda config: None)  # keep eight devices
  status = 0
  try:
    module.main()
  except SystemExit as exit:
    status = exit.code
  return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def pngs(smoke_config, tmp_path_factory):
  """The 500 test images of the smoke config as files, in order, and their labels."""
  config = smoke_config()
  split = data.load(config.data, config.model.image_size, splits=("test",)).test
  folder = tmp_path_factory.mktemp("pngs")
  paths = [folder / f"{i}.png" for i in range(len(split))]
  for path, image in zip(paths, split.images, strict=True):
    Image.fromarray(image).save(path)
  return paths, split.labels


def test_evaluate_repeats_the_test_metrics_of_the_run(finished_run, monkeypatch, capsys):
  status, out, _ = run(evaluate, monkeypatch, capsys, "--workdir", finished_run)
  result, expected = json.loads(out), metrics.read_summary(finished_run)
  assert status == 0
  assert (result["split"], result["images"]) == ("test", 500)
  for name in ("loss", "accuracy", "top5"):
    assert result[name] == expected[f"test_{name}"]


def test_run_of_an_older_version_lacks_knobs_and_is_evaluated(finished_run, tmp_path):
  shutil.copytree(finished_run, tmp_path / "old")
  path = tmp_path / "old" / "config.json"
  config = json.loads(path.read_text())
  for knob in ("remat", "steps_per_call", "compilation_cache"):
    del config[knob]
  path.write_text(json.dumps(config))
  mesh = make_mesh(devices=jax.devices()[:1])
  trained = checkpoint.load_trained_model(tmp_path / "old", mesh)
  assert trained.config.remat is False
  assert trained.config.optimizer.learning_rate == 5e-3


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_evaluation_counts_every_image_once(smoke_config, finished_run, devices):
  mesh = make_mesh(devices=jax.devices()[:devices])
  trained = checkpoint.load_trained_model(finished_run, mesh)
  split = data.load(smoke_config().data, 32, splits=("test",)).test
  step = make_eval_step(trained.model, 4, mesh)
  result = evaluate_split(step, trained.weights, split, 96, mesh)  # 500 = 5 x 96 + 20
  expected = metrics.read_summary(finished_run)
  assert result["accuracy"] == expected["test_accuracy"]
  assert result["top5"] == expected["test_top5"]
  np.testing.assert_allclose(result["loss"], expected["test_loss"], rtol=1e-5)


def test_evaluate_other_split(finished_run, monkeypatch, capsys):
  _, out, _ = run(evaluate, monkeypatch, capsys, "--workdir", finished_run, "--split=validation")
  best = metrics.read(finished_run)[metrics.read_summary(finished_run)["best_epoch"] - 1]
  assert json.loads(out)["loss"] == best["val_loss"]


def test_predict_agrees_with_evaluate(finished_run, pngs, monkeypatch, capsys):
  paths, labels = pngs
  status, out, _ = run(predict, monkeypatch, capsys, "--workdir", finished_run, "--json", *paths)
  answers = [json.loads(line) for line in out.splitlines()]
  names = json.loads((finished_run / "dataset.json").read_text())["class_names"]
  top5 = [[names.index(c["class"]) for c in answer["top5"]] for answer in answers]
  expected = metrics.read_summary(finished_run)
  assert status == 0
  assert [answer["image"] for answer in answers] == [str(path) for path in paths]
  assert (
    np.mean([t[0] == y for t, y in zip(top5, labels, strict=True)]) == expected["test_accuracy"]
  )
  assert np.mean([y in t for t, y in zip(top5, labels, strict=True)]) == expected["test_top5"]
  for answer in answers:
    probabilities = [c["probability"] for c in answer["top5"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 5 / 100 <= sum(probabilities) <= 1


def test_unreadable_image_is_reported_and_the_others_answered(
  finished_run, pngs, tmp_path, monkeypatch, capsys
):
  broken, photo = tmp_path / "broken.png", tmp_path / "photo.jpg"
  broken.write_bytes(pngs[0][0].read_bytes()[:300])
  Image.fromarray(np.full((90, 160), 99, np.uint8)).save(photo)  # grey, of another size
  missing = tmp_path / "no.png"
  arguments = ("--workdir", finished_run, broken, missing, photo)
  status, out, error = run(predict, monkeypatch, capsys, *arguments)
  assert status == 1
  assert [line for line in out.splitlines() if not line.startswith(" ")] == [str(photo)]
  assert out.count("%") == 5
  assert error.count("\n") == 2
  assert str(broken) in error and str(missing) in error


@pytest.mark.parametrize("module", [evaluate, predict])
def test_folder_without_a_run_is_one_line(module, tmp_path, monkeypatch, capsys):
  images = [tmp_path / "x.png"] if module is predict else []
  status, _, error = run(module, monkeypatch, capsys, "--workdir", tmp_path, *images)
  assert status == 1
  assert "holds no run" in error
  assert error.count("\n") == 1
  assert not list(tmp_path.iterdir())
