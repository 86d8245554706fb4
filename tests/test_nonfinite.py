"""NaN and infinity: the state before them is kept, and nonfinite.json says where they began."""

import functools
import json
import os
import re
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import COMMAND, start
from test_step import BATCH, INFO, mesh_of, new_state, noise_batch
from test_step import smoke_config as config_of

import train.step
from train import optimizer
from train.check import check_config
from train.data import Split
from train.data.batches import image_numbers, stack
from train.data.framing import CENTER
from train.devices.mesh import by_example, state_shardings
from train.errors import ConfigError, TrainingFailed
from train.loop import train_and_evaluate
from train.nonfinite import Guard, losses_not_finite
from train.run import metrics
from train.state import make_model
from train.step import make_train_step

loss, eval_logits = train.step.loss, train.step.eval_logits
slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("fast_compilation")


def small_config(nonfinite: str = "stop"):
  config = config_of("mixer")
  config.model.num_blocks, config.nonfinite = 1, nonfinite
  config.steps_per_call = 1
  return config


def poison(monkeypatch, kind: str, step: int, image=None) -> None:
  """Makes the loss or a gradient of the image at place 5 wrong at `step`; only of this image."""

  def poisoned(params, examples, positions, *, state, **named):
    value, sums = loss(params, examples, positions, state=state, **named)
    bad = (state.step == step) & (positions == 5).any()
    if image is not None:
      bad &= (examples["image"] == image).all((1, 2, 3)).any()
    bias = params["head"]["bias"].sum()
    if kind == "loss inf":  # its gradients are finite
      return value, sums.replace(loss=sums.loss + jnp.where(bad, jnp.inf, 0.0))
    if kind == "gradient nan":  # 0 * the infinite slope of a root at 0; the loss is finite
      return value + jnp.sqrt(jnp.where(bad, 0.0 * bias, 1.0)), sums
    return value + jnp.where(bad, 1e25, 0.0) * bias, sums  # the square overflows in Adam

  monkeypatch.setattr("train.step.loss", poisoned)


def run_steps(config, mesh, batches: list[dict], folder, state=None):
  """Steps under a Guard, which looks one call later: the losses and the last state."""
  config.batch_size, microbatch = BATCH, BATCH // mesh.size
  step = make_train_step(config, INFO, microbatch, mesh)
  images = Split(np.zeros((100, 1, 1, 3), np.uint8), np.zeros(100, np.int32))
  guard = Guard(config, make_model(config, 100), {"train": images}, microbatch, mesh, folder)
  state = state or new_state(config)
  state = jax.device_put(state, state_shardings(state, mesh))
  losses, before, error = [], None, None
  for call in stack(iter(batches), iter([config.steps_per_call] * 9)):
    call = jax.device_put(call, by_example(mesh, axis=1))
    state, sums = step(state, call)
    try:
      if before:
        guard.look_at_losses(state, *before)
    except TrainingFailed as failure:
      error = failure
      break
    before = call, sums.loss
    losses += sums.loss.tolist()
  return losses, jax.device_get(state), error


def report(folder) -> dict:
  def no_constant(name):
    raise ValueError(f"{name} is no JSON")

  return json.loads((folder / "nonfinite.json").read_text(), parse_constant=no_constant)


def assert_same(tree, expected) -> None:
  jax.tree.map(np.testing.assert_array_equal, tree, expected)


@pytest.mark.parametrize(
  ("kind", "mesh", "steps_per_call"),
  [
    ("gradient nan", (1, 1), 5),
    pytest.param("loss inf", (4, 2), 1, marks=slow),
    pytest.param("gradient huge", (1, 1), 1, marks=slow),
    pytest.param("gradient huge", (2, 1), 5, marks=slow),
    pytest.param("gradient nan", (2, 1), 1, marks=slow),
    pytest.param("gradient nan", (1, 8), 5, marks=slow),
    pytest.param("loss inf", (8, 1), 5, marks=slow),
  ],
)
def test_the_state_stays_as_before_the_step(kind, mesh, steps_per_call, monkeypatch, tmp_path):
  monkeypatch.setattr("train.devices.mesh._SHARDED_FROM", 64)
  config, mesh = small_config(), mesh_of(*mesh)
  config.steps_per_call = steps_per_call
  batches = [noise_batch(i) for i in range(10)]
  # The batches after it would be finite at its step, which the state stays at.
  poison(monkeypatch, kind, step=3, image=batches[3]["image"][5])
  _, state, error = run_steps(config, mesh, batches, tmp_path)
  config.steps_per_call = 1
  monkeypatch.setattr("train.step.loss", loss)
  losses, expected, _ = run_steps(config, mesh, batches[:3], tmp_path)
  assert (int(state.step), int(state.skipped), bool(state.stopped)) == (3, 0, True)
  np.testing.assert_allclose(state.sums.loss, sum(losses), rtol=1e-6)
  assert float(state.sums.count) == 3 * BATCH
  for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)
  if steps_per_call == 1:  # the same program
    assert_same(state.replace(stopped=False), expected)
  found = report(tmp_path)
  assert (found["step"], found["epoch"], found["split"]) == (3, 1, "train")
  assert found["examples"] == [5]
  # Batch 3 of four an epoch holds four images; this row of it is padding.
  assert found["images"] == image_numbers(100, BATCH, 0, 3, np.array([5])).tolist() == [-1]
  assert found["parameters"] == []
  assert found["learning_rate"] == config.optimizer.learning_rate
  if kind != "loss inf":
    assert found["layers"][0]["name"] == "head"
    assert (found["layers"][0]["gradient"] is None) == (kind == "gradient nan")
  else:
    assert found["loss"] is None
  norms = [layer["gradient"] for layer in found["layers"][1:]]
  assert norms == sorted(norms, reverse=True)
  assert len(norms) == 6  # four of the block, the patches, and what is not the first
  assert "step 3:" in str(error) and "nonfinite.json" in str(error)
  assert "nonfinite=skip" in str(error) and "\n" not in str(error)
  assert error.exit_status == 70


@pytest.mark.parametrize(
  "kind", ["gradient nan", *(pytest.param(x, marks=slow) for x in ("loss inf", "gradient huge"))]
)
def test_a_skipped_step_changes_only_the_two_counts(kind, monkeypatch, tmp_path):
  config, mesh = small_config("skip"), mesh_of(2)
  batches = [noise_batch(i) for i in range(6)]
  poison(monkeypatch, kind, step=3)
  losses, state, error = run_steps(config, mesh, batches, tmp_path)
  assert error is None
  assert (int(state.step), int(state.skipped), bool(state.stopped)) == (6, 1, False)
  assert np.isnan(losses).tolist() == [False, False, False, True, False, False]
  assert float(state.sums.count) == 5 * BATCH
  monkeypatch.setattr("train.step.loss", loss)
  _, expected, _ = run_steps(config, mesh, batches[:3], tmp_path)
  # The batches after the one left out; the step counts it.
  _, expected, _ = run_steps(
    config, mesh, batches[4:], tmp_path, expected.replace(step=np.int32(4))
  )
  assert_same(state.replace(skipped=0), expected.replace(skipped=0))
  assert not (tmp_path / "nonfinite.json").exists()


def test_images_whose_validation_loss_is_not_finite_are_found(monkeypatch):
  def poisoned(model, weights, images, framing):
    bright = images[:, :1, 0, 0] == 255
    return jnp.where(bright, jnp.nan, eval_logits(model, weights, images, framing))

  monkeypatch.setattr("train.nonfinite.eval_logits", poisoned)
  batch = noise_batch(0, masked=2)
  batch["image"][:, 0, 0, 0] = 0
  batch["image"][[3, 17, 31], 0, 0, 0] = 255  # the last one is padding
  config = small_config()
  model, state = make_model(config, 100), new_state(config)
  for mesh, microbatch in ((mesh_of(1), 32), (mesh_of(4, 2), 2)):
    bad = jax.jit(
      lambda *x, m=microbatch, on=mesh: losses_not_finite(
        *x, model=model, framing=CENTER, microbatch=m, mesh=on
      )
    )(state.weights(), batch)
    assert np.flatnonzero(bad).tolist() == [3, 17]


def test_a_validation_loss_that_is_not_finite_is_no_improvement():
  config = small_config().plateau
  config.patience, config.factor = 2, 0.5
  plateau = optimizer.make_plateau(config)
  state = plateau.init({})
  scales = []
  for value in (3.0, np.nan, np.inf, 2.0, np.nan, 1.0):
    state = optimizer.end_of_epoch(plateau, state, value)
    scales.append(float(state.scale))
  assert scales == [1, 1, 0.5, 0.5, 0.5, 0.5]
  assert float(state.best_value) == 1.0


def test_nonfinite_is_stop_or_skip():
  config = small_config("ignore")
  with pytest.raises(ConfigError, match="config.nonfinite = 'ignore': stop or skip"):
    check_config(config)


# Whole runs from here on: eight steps per epoch.


@pytest.fixture
def run_config(smoke_config):
  """A config of whole runs whose step compiles soon."""
  return functools.partial(smoke_config, model__num_blocks=1, data__validation_split="train[3900:]")


def last(folder) -> list[str]:
  """The states of a run that are saved, the newest last, without that before the first step."""
  names = (path.name for path in (folder / "checkpoints" / "last").iterdir())
  return sorted(filter(int, names), key=int)


def failure(config, folder) -> str:
  with pytest.raises(TrainingFailed) as error:
    train_and_evaluate(config, folder)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.mark.slow
def test_a_run_stops_again_at_the_same_step_and_can_skip_it(
  run_config, monkeypatch, tmp_path, capsys
):
  poison(monkeypatch, "gradient nan", step=11)
  message = failure(run_config(), tmp_path)
  assert message.startswith("step 11:")
  found = report(tmp_path)
  assert (found["step"], found["epoch"], found["examples"]) == (11, 2, [5])
  order = np.random.RandomState([0, 2]).permutation(512)  # of the second epoch
  assert found["images"] == [order[3 * 64 + 5]]
  assert last(tmp_path) == ["9"]  # eight steps and an epoch
  rows = (tmp_path / "metrics.jsonl").read_text()
  assert [row["epoch"] for row in metrics.read(tmp_path)] == [1]
  assert failure(run_config(), tmp_path) == message
  assert (last(tmp_path), (tmp_path / "metrics.jsonl").read_text()) == (["9"], rows)
  summary = train_and_evaluate(run_config(nonfinite="skip"), tmp_path)
  assert summary["epochs"] == 2
  assert [row["step"] for row in metrics.read(tmp_path)] == [8, 16]
  assert "updates skipped so far, because they were not finite: 1" in capsys.readouterr().out


@slow
@pytest.mark.parametrize("steps_per_call", [1, 5])
def test_a_signal_in_the_same_step_saves_no_nan(run_config, monkeypatch, tmp_path, steps_per_call):
  poison(monkeypatch, "loss inf", step=11)

  def make_step(*arguments):
    step, calls = make_train_step(*arguments), []

    def call(state, batches):
      calls.append(len(batches["label"]))
      if sum(calls) > 11:
        os.kill(os.getpid(), signal.SIGTERM)
      return step(state, batches)

    call.trace = step.trace
    return call

  monkeypatch.setattr("train.loop.make_train_step", make_step)
  config = run_config(checkpoint_seconds=1e-9, steps_per_call=steps_per_call)
  assert failure(config, tmp_path).startswith("step 11:")
  assert last(tmp_path)[-1] == ("12" if steps_per_call == 1 else "9")
  monkeypatch.setattr("train.loop.make_train_step", make_train_step)
  assert failure(config, tmp_path).startswith("step 11:")
  assert report(tmp_path)["parameters"] == []


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_not_saved_even_if_updates_are_skipped(
  run_config, tmp_path
):
  # The first update overflows although its gradients are finite.
  rates = {"optimizer__learning_rate": 3e38, "optimizer__weight_decay": 0.9}
  config = run_config(**rates, batch_size=512, nonfinite="skip")
  message = failure(config, tmp_path)
  assert re.match(r"step 0: parameters such as \S+ are not finite", message)
  assert "nonfinite=skip" not in message
  assert len(report(tmp_path)["parameters"]) == 7  # kernels and scales: the biases are 0
  assert last(tmp_path) == [] and metrics.read(tmp_path) == []


def test_an_epoch_whose_updates_were_all_skipped_has_no_training_loss(
  run_config, monkeypatch, tmp_path
):
  poison(monkeypatch, "gradient nan", step=0)
  summary = train_and_evaluate(run_config(batch_size=512, epochs=2, nonfinite="skip"), tmp_path)
  rows = metrics.read(tmp_path)
  assert [row["train_loss"] is None for row in rows] == [True, False]
  assert np.isfinite(rows[0]["val_loss"])
  assert summary["epochs"] == 2


def test_a_loss_that_is_not_finite_only_in_validation_ends_the_run(run_config, tmp_path):
  # One step per epoch: its own loss is finite, and the weights after it are, but too large.
  config = run_config(optimizer__learning_rate=1e30, batch_size=512)
  message = failure(config, tmp_path)
  assert message.startswith("step 1: the loss on the validation images is not finite")
  found = report(tmp_path)
  assert (found["split"], found["step"], found["epoch"], found["loss"]) == (
    "validation",
    1,
    1,
    None,
  )
  assert f"({len(found['images'])} of 100 images)" in message
  assert found["images"] and found["parameters"] == []
  assert last(tmp_path) == [] and metrics.read(tmp_path) == []
  assert failure(config, tmp_path) == message


@pytest.mark.parametrize("best_metric", [pytest.param("val_loss", marks=slow), "val_accuracy"])
def test_without_a_finite_validation_loss_there_are_no_best_weights(
  run_config, tmp_path, best_metric
):
  config = run_config(
    optimizer__learning_rate=1e30, batch_size=512, nonfinite="skip", best_metric=best_metric
  )
  message = failure(config, tmp_path)
  assert "no epoch has a finite validation loss" in message
  rows = metrics.read(tmp_path)
  assert [row["val_loss"] for row in rows] == [None, None]
  assert not list((tmp_path / "checkpoints" / "best").glob("[0-9]*"))
  assert failure(config, tmp_path) == message


@pytest.mark.slow
def test_an_epoch_without_a_finite_validation_loss_is_never_the_best(
  run_config, tmp_path, monkeypatch
):
  evaluate, calls = train.step.evaluate, []

  def first_is_nan(*arguments, **named):
    calls.append(1)
    values = evaluate(*arguments, **named)
    return values | {"loss": np.nan, "accuracy": 0.99} if len(calls) == 1 else values

  monkeypatch.setattr("train.loop.evaluate", first_is_nan)
  config = run_config(nonfinite="skip", best_metric="val_accuracy")
  assert train_and_evaluate(config, tmp_path)["best_epoch"] == 2
  assert metrics.read(tmp_path)[0]["val_loss"] is None


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("steps_per_call", [1, 7])
def test_a_diverging_run_leaves_one_line(shapes100, tmp_path, devices, steps_per_call):
  flags = ["--config.optimizer.learning_rate=1e30", f"--config.steps_per_call={steps_per_call}"]
  process = start(tmp_path / "run", *flags, devices=devices)
  _, error = process.communicate(timeout=200)
  assert process.returncode == 70
  assert error.startswith("error: step 1: ") and error.count("\n") == 1
  assert report(tmp_path / "run")["step"] == 1
  assert report(tmp_path / "run")["layers"]


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(shapes100, tmp_path):
  launcher = [sys.executable, "-m", "launch.local", "--processes", "2"]
  launcher += ["--devices-per-process", "1", "--", *COMMAND[3:]]
  flags = ["--config.optimizer.learning_rate=1e30"]
  process = start(tmp_path / "run", *flags, command=launcher)
  _, error = process.communicate(timeout=200)
  assert process.returncode != 0
  assert "error: step 1: " in error
  assert report(tmp_path / "run")["step"] == 1
