"""Using a trained model: evaluation of splits and classification of image files."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from train import data, evaluate, predict
from train.data.decode import decode_file
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
  step = make_eval_step(trained.config, trained.info.num_classes, 4, mesh)
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


# Answers as they come -----------------------------------------------------------------------------


def command(workdir, *arguments, **options) -> subprocess.Popen:
  """predict in a process of its own."""
  line = [sys.executable, "-m", "train.predict", "--workdir", workdir, *arguments]
  return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def images_of(out: str) -> list[str]:
  return [json.loads(line)["image"] for line in out.splitlines()]


def test_each_argument_is_answered_in_its_order(finished_run, pngs, tmp_path, monkeypatch, capsys):
  a, b, c = (str(path) for path in pngs[0][:3])
  folder = tmp_path / "folder"
  for name in ("b.PNG", "a.jpe", "._a.png", "note.txt", "deep/x.png", "deep/.hidden/y.png"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.open(a).save(folder / name, "PNG")
  (folder / "deep" / "up").symlink_to(folder)
  (folder / "broken.webp").write_bytes(b"RIFF")
  (tmp_path / "empty").mkdir()
  found = [str(folder / name) for name in ("a.jpe", "b.PNG", "deep/x.png")]
  monkeypatch.setenv("HOME", str(tmp_path))
  arguments = (a, b, a, tmp_path / "no.png", folder, "~/folder/a.jpe", tmp_path / "empty", c)
  status, out, error = run(
    predict, monkeypatch, capsys, "--workdir", finished_run, "--json", *arguments
  )
  assert status == 1
  assert images_of(out) == [a, b, a, *found, found[0], c]
  assert out.splitlines()[0] == out.splitlines()[2]
  assert [line.split(": ")[0] for line in error.splitlines()] == [
    str(tmp_path / "no.png"),
    str(folder / "broken.webp"),
    str(tmp_path / "empty"),
  ]
  assert "No such file or directory" in error and "a folder without images" in error


def test_no_more_than_a_batch_is_held(finished_run, pngs, monkeypatch, capsys):
  counts = {"decoded": 0, "answered": 0, "most": 0}
  decode, answer = predict.decode_file, predict._print_answer

  def counting_decode(*arguments, **options):
    counts["decoded"] += 1
    counts["most"] = max(counts["most"], counts["decoded"] - counts["answered"])
    return decode(*arguments, **options)

  def counting_answer(*arguments):
    counts["answered"] += 1
    answer(*arguments)

  monkeypatch.setattr(predict, "decode_file", counting_decode)
  monkeypatch.setattr(predict, "_print_answer", counting_answer)
  run(predict, monkeypatch, capsys, "--workdir", finished_run, *pngs[0])
  assert counts == {"decoded": 500, "answered": 500, "most": 64}


def test_answers_of_a_batch_come_before_the_next_is_read(finished_run, pngs, tmp_path):
  os.mkfifo(tmp_path / "slow.png")
  paths = [*pngs[0][:64], tmp_path / "slow.png"]
  process = command(finished_run, "--json", *paths)
  first = [process.stdout.readline() for _ in range(64)]  # while slow.png has no content yet
  assert [json.loads(line)["image"] for line in first] == [str(path) for path in paths[:64]]
  assert process.poll() is None
  (tmp_path / "slow.png").write_bytes(pngs[0][64].read_bytes())
  out, error = process.communicate(timeout=100)
  assert images_of(out.decode()) == [str(tmp_path / "slow.png")], error
  assert process.returncode == 0


def test_reader_that_leaves_ends_it_quietly(finished_run, pngs):
  process = command(finished_run, *pngs[0])
  process.stdout.readline()
  process.stdout.close()  # as `| head -1` does
  assert process.stderr.read() == b""
  assert process.wait(timeout=100) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("encoding", ["utf-8", pytest.param("ascii", marks=pytest.mark.slow)])
def test_names_of_any_bytes_are_answered(encoding, finished_run, pngs, tmp_path):
  names = [b"-x.png", b"\xff.png", "ä b.png".encode(), b"line\nbreak.png"]
  for name in names:
    (tmp_path / os.fsdecode(name)).write_bytes(pngs[0][0].read_bytes())
  workdir = os.path.abspath(finished_run)
  environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": os.getcwd()}
  options = {"cwd": tmp_path, "env": environment}
  process = command(workdir, "--json", "--", *names, **options)
  out, error = process.communicate(timeout=100)
  assert process.returncode == 0, error
  assert [os.fsencode(name) for name in images_of(out.decode("ascii"))] == names
  process = command(workdir, "--", *names, **options)
  out, error = process.communicate(timeout=100)
  assert process.returncode == 0, error
  shown = names if encoding == "utf-8" else [rb"\udcff.png", rb"\xe4 b.png"]
  assert all(name + b"\n" in out for name in shown)


# The same pixels and numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["folder:/pics", "shapes100"])
def test_files_are_decoded_as_the_run_decodes_its_own(name, finished_run, tmp_path):
  shutil.copytree(finished_run, tmp_path / "run")
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  config["data"] |= {"name": name, "background": "red"}
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  noise = np.random.default_rng(0).integers(0, 256, (32, 32, 4), np.uint8)
  exif = Image.Exif()
  exif[0x0112] = 6
  paths = [str(tmp_path / "turned.jpg"), str(tmp_path / "clear.png")]
  Image.fromarray(noise[..., :3]).save(paths[0], exif=exif)
  Image.fromarray(noise).save(paths[1])
  trained = checkpoint.load_trained_model(tmp_path / "run", make_mesh())
  upright = name == "folder:/pics"
  expected = predict.predict(
    trained,
    np.stack(
      [
        decode_file(Path(path).read_bytes(), (32, 32, 3), background="red", upright=upright)
        for path in paths
      ]
    ),
  )
  process = command(tmp_path / "run", "--json", *paths)
  out, error = process.communicate(timeout=100)
  assert process.returncode == 0, error
  for line, probabilities in zip(out.splitlines(), expected, strict=True):
    found = [answer["probability"] for answer in json.loads(line)["top5"]]
    np.testing.assert_allclose(found, np.sort(probabilities)[::-1][:5], rtol=1e-5)


def test_any_number_of_devices_and_images_gives_the_same_probabilities(finished_run, pngs):
  images = np.stack([np.asarray(Image.open(path)) for path in pngs[0][:70]])
  alone = checkpoint.load_trained_model(finished_run, make_mesh(devices=jax.devices()[:1]))
  expected = predict.predict(alone, images)
  np.testing.assert_allclose(expected.sum(axis=1), 1, rtol=1e-5)
  for devices in (3, 8):
    mesh = make_mesh(devices=jax.devices()[:devices])
    trained = checkpoint.load_trained_model(finished_run, mesh)
    for count in (1, 7, 70):
      found = predict.predict(trained, images[:count])
      assert found.shape == (count, 100)
      np.testing.assert_allclose(found, expected[:count], rtol=2e-5, atol=1e-7)
