"""The linear probe and the nearest neighbours, against the same computed plainly."""

import functools
import json

import jax
import numpy as np
import pytest
from etils import epath
from test_predict import run

from train import data, evaluate, probe
from train.data.framing import CENTER
from train.devices.mesh import make_mesh
from train.run.checkpoint import load_trained_model
from train.step import eval_logits


def clusters(count: int, spread: float, seed: int, classes: int = 3, size: int = 8):
  """Features around a centre for each class, and labels."""
  centres = np.random.default_rng(0).normal(size=(classes, size))
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, count).astype(np.int32)
  return np.float32(centres[labels] + spread * rng.normal(size=(count, size))), labels


def knn_by_hand(train, judged, classes: int, k: int, temperature: float) -> float:
  """Image by image, in float64."""
  unit = [x.astype(float) / np.linalg.norm(x, axis=1, keepdims=True) for x in (train[0], judged[0])]
  hits = 0
  for feature, label in zip(unit[1], judged[1], strict=True):
    similarities = unit[0] @ feature
    votes = np.zeros(classes)
    for n in np.argsort(-similarities)[:k]:
      votes[train[1][n]] += np.exp(similarities[n] / temperature)
    hits += votes.argmax() == label
  return hits / len(judged[1])


def loss_and_gradient(kernel, bias, features, labels, l2: float):
  """Of regularised multinomial logistic regression, in float64."""
  logits = features @ kernel + bias
  logits -= logits.max(1, keepdims=True)
  probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  chosen = probabilities[np.arange(len(labels)), labels]
  error = (probabilities - np.eye(kernel.shape[1])[labels]) / len(labels)
  loss = -np.log(chosen).mean() + 0.5 * l2 * (kernel**2).sum()
  return loss, features.T @ error + l2 * kernel, error.sum(0)


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (500, 1.0)])
def test_nearest_neighbours_vote_as_by_hand(k, temperature):
  train, judged = clusters(200, 1.5, 1), clusters(300, 1.5, 2)
  expected = knn_by_hand(train, judged, 3, min(k, 200), temperature)
  assert 0.4 < expected < 0.99
  assert probe.knn_accuracy(train, judged, 3, k, temperature) == pytest.approx(expected, abs=0.004)


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_logistic_regression_is_at_the_minimum(l2):
  features, labels = clusters(120, 1.5, 3)
  start = probe.Linear(np.zeros((8, 3), np.float32), np.zeros(3, np.float32))
  linear = probe.fit(start, features, labels, l2)
  found = [np.asarray(x, float) for x in linear]
  loss, *gradients = loss_and_gradient(*found, features, labels, l2)
  assert max(np.abs(gradient).max() for gradient in gradients) < 1e-4
  for _ in range(3000):  # plain gradient descent, from elsewhere
    _, down, aside = loss_and_gradient(*found, features, labels, l2)
    found = [found[0] - 0.3 * down, found[1] - 0.3 * aside]
  assert loss == pytest.approx(loss_and_gradient(*found, features, labels, l2)[0], rel=1e-5)


def test_regularisation_is_chosen_on_the_validation_split():
  def noisy(count, seed):
    features, labels = clusters(count, 1.0, seed)
    noise = np.random.default_rng(seed).normal(size=(count, 20))
    return np.float32(np.concatenate([features, noise], axis=1)), labels

  train, validation, judged = noisy(30, 1), noisy(200, 2), noisy(200, 3)
  mean, deviation = train[0].mean(0), train[0].std(0)
  standard = [((x - mean) / deviation, y) for x, y in (train, validation, judged)]
  linear = probe.Linear(np.zeros((28, 3), np.float32), np.zeros(3, np.float32))
  accuracies = {}
  for l2 in (1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
    linear = probe.fit(linear, *standard[0], l2)
    accuracies[l2] = [probe._accuracy(linear, *part) for part in standard]
  chosen = []
  for number, chooses in enumerate((train, validation)):
    best = max(accuracies, key=lambda l2: accuracies[l2][number])  # the first of equal ones
    assert probe.linear_accuracy(train, chooses, judged, 3) == (accuracies[best][2], best)
    chosen.append(best)
  assert chosen[0] != chosen[1]


def test_constant_features_and_few_images_are_no_error():
  train, judged = clusters(5, 0.1, 1), clusters(4, 0.1, 2)
  for features, _ in (train, judged):
    features[:, 3] = 7.0
  accuracy, _ = probe.linear_accuracy(train, train, judged, 3)
  assert 0 <= accuracy <= 1
  assert 0 <= probe.knn_accuracy(train, judged, 3) <= 1


def test_features_are_what_the_head_reads(finished_run):
  mesh = make_mesh()
  trained = load_trained_model(epath.Path(finished_run), mesh)
  dataset = data.load(trained.config.data, 32, splits=("test",))
  batch_size = 4 * mesh.size * 4  # the last batch is not full
  features, labels = probe.features_and_labels(
    trained.model.clone(num_classes=0), trained.weights, dataset["test"], CENTER, batch_size, mesh
  )
  images, expected_labels = dataset["test"][np.arange(500)]
  np.testing.assert_array_equal(labels, expected_labels)
  head = jax.device_get(trained.weights.params["head"])
  whole = jax.jit(functools.partial(eval_logits, trained.model, framing=CENTER))
  logits = whole(trained.weights, images)
  np.testing.assert_allclose(
    features @ head["kernel"] + head["bias"], logits, atol=1e-4 * np.abs(logits).max()
  )


def test_command_prints_both_accuracies(finished_run, monkeypatch, capsys):
  arguments = ("--workdir", finished_run, "--probe", "--split", "validation")
  status, out, error = run(evaluate, monkeypatch, capsys, *arguments)
  assert status == 0, error
  found = json.loads(out)
  assert (found["split"], found["images"], found["train_images"]) == ("validation", 500, 512)
  assert (found["features"], found["probe_l2"] in probe._STRENGTHS) == (32, True)
  assert 0 < found["probe_accuracy"] < 1 and 0 < found["knn_accuracy"] < 1


def test_weights_without_a_run_are_judged_as_those_of_their_run(
  finished_run, monkeypatch, capsys, shapes100
):
  known = {"data_dir": shapes100, "name": "shapes100", "max_images": 512}
  known |= {"validation_split": "train[3500:]"}  # as the run has it
  flags = [f"--config.data.{key}={value}" for key, value in known.items()]
  config = ("--config", "configs/mixer.py:finetune", f"--config.init={finished_run}", *flags)
  arguments = (*config, "--probe", "--split=validation")
  status, out, error = run(evaluate, monkeypatch, capsys, *arguments)
  assert status == 0, error
  assert "head left out: the model returns features" in error
  arguments = ("--workdir", finished_run, "--probe", "--split=validation")
  expected = json.loads(run(evaluate, monkeypatch, capsys, *arguments)[1])
  found = json.loads(out)
  for name in ("probe_accuracy", "knn_accuracy"):  # statistics are rounded on their way
    assert found.pop(name) == pytest.approx(expected.pop(name), abs=0.01)
  assert found == expected


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--config.init=x.npz",), "--config needs --probe and --config.init=FILE"),
    (("--config.init=x.npz", "--probe", "--data_dir=x"), "a config has --config.data.data_dir"),
    (("--config.init=x.npz", "--probe"), "config.init: x.npz: there is no such file or folder"),
    (("--probe",), "this config requires --config.init=VALUE"),
    (("--config.init=x.npz", "--workdir=runs"), "not allowed with argument"),
  ],
)
def test_weights_that_can_not_be_judged_are_one_line(arguments, message, monkeypatch, capsys):
  config = ("--config", "configs/mixer.py:finetune")
  status, out, error = run(evaluate, monkeypatch, capsys, *config, *arguments)
  assert (status, out, error.count("\n")) == (2, "", 1)
  assert message in error
