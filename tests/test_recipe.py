"""Targets and averaged weights, and with mixing and a schedule all parts of a recipe together."""

import functools
import json
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from runs import numbers
from test_nonfinite import poison
from test_nonfinite import run_steps as guarded_steps
from test_step import BATCH, INFO, mesh_of, new_state, run_steps
from test_step import smoke_config as config_of

from train.errors import SavedAndStopped, TrainingFailed
from train.loop import train_and_evaluate
from train.pretrained import begin
from train.run.checkpoint import Checkpoints
from train.state import abstract_state, make_init, update_average
from train.step import make_train_step, trace_train_step
from train.targets import sum_metrics, targets

pytestmark = pytest.mark.usefixtures("fast_compilation")

PARTS = {
  "schedule.name": "cosine",
  "schedule.warmup_steps": 4,
  "label_smoothing": 0.1,
  "augment.mixup": 0.8,
  "augment.cutmix": 1.0,
  "augment.mix_probability": 0.7,
  "ema_decay": 0.9,
}
STATISTICS = np.full(3, 127, np.float32), np.full(3, 5400, np.float32)


def recipe_config(**knobs):
  config = config_of("mixer")
  config.model.num_blocks, config.steps_per_call = 1, 1
  config.update_from_flattened_dict(PARTS | {k.replace("__", "."): v for k, v in knobs.items()})
  return config


def a_batch(seed: int, count: int = 128, masked: int = 0) -> dict:
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
    "label": rng.integers(0, 100, count).astype(np.int32),
    "mask": np.arange(count) < count - masked,
  }


# Targets ------------------------------------------------------------------------------------------


def test_targets_are_those_of_the_definition():
  got = np.asarray(targets(jnp.array([2, 0]), 4, 0.2))
  assert_allclose(got, [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]], rtol=1e-6)
  assert got.dtype == np.float32
  assert_array_equal(targets(jnp.array([1]), 3), [[0, 1, 0]])


def test_loss_is_the_cross_entropy_against_targets_and_hits_are_of_the_largest_share():
  rng = np.random.default_rng(0)
  logits, shares = rng.normal(size=(6, 8)).astype(np.float32), rng.dirichlet(np.ones(8), 6)
  logits[0, shares[0].argmax()] = 9.0
  mask = np.array([True] * 5 + [False])
  sums = sum_metrics(jnp.array(logits), jnp.array(shares, jnp.float32), jnp.array(mask))
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  assert_allclose(sums.loss, -(shares * log_p).sum(1)[:5].sum(), rtol=1e-5)
  assert sums.correct == (logits.argmax(1) == shares.argmax(1))[:5].sum() >= 1
  assert sums.count == 5
  labels = jnp.array([3, 1, 4, 1, 5, 0])  # one-hot targets are labels
  by_label = sum_metrics(jnp.array(logits), labels, jnp.array(mask))
  by_target = sum_metrics(jnp.array(logits), targets(labels, 8), jnp.array(mask))
  jax.tree.map(functools.partial(assert_allclose, rtol=1e-6), by_target, by_label)


@functools.cache
def lowered(are_on: bool) -> str:
  config, mesh = config_of("mixer"), mesh_of(1)
  config.model.num_blocks, config.batch_size, config.microbatch = 1, 8, 8
  config.steps_per_call = 1
  if are_on:
    config.update_from_flattened_dict(PARTS)
  step = make_train_step(config, INFO, 8, mesh)
  state = abstract_state(make_init(config, INFO, mesh), INFO)
  assert (state.average is not None) == are_on
  return trace_train_step(step, state, config, INFO, mesh).lower().as_text()


def test_what_is_off_is_not_in_the_program():
  one_hot = r"convert .*tensor<8x100xi1>\) -> tensor<8x100xf32>"
  for pattern in (one_hot, r"stablehlo\.cosine", r"tensor<4x2x\d+x\d+x3xf32>"):
    assert re.search(pattern, lowered(True)), pattern
    assert not re.search(pattern, lowered(False)), pattern


# The average of the weights -----------------------------------------------------------------------


def test_the_average_is_that_of_the_definition():
  rng = np.random.default_rng(0)
  weights = rng.normal(size=(60, 4))
  average, expected = {"w": jnp.array(weights[0])}, weights[0]
  for updates, new in enumerate(weights[1:], start=1):
    average = update_average(average, {"w": jnp.array(new)}, jnp.int32(updates), 0.8)
    decay = min(0.8, (1 + updates) / (10 + updates))
    expected = decay * expected + (1 - decay) * new
    if updates == 1:
      assert_allclose(expected, 2 / 11 * weights[0] + 9 / 11 * new)
  assert_allclose(average["w"], expected, atol=1e-5)
  assert update_average(None, {}, jnp.int32(1), 0.9) is None


def test_only_what_trains_is_averaged_from_the_first_weights_on():
  state = make_init(recipe_config(freeze=("patch_embed",)), INFO, mesh_of(1))(*STATISTICS)
  assert "patch_embed" in state.params and "patch_embed" not in state.average
  params = jax.tree.map(lambda x: np.asarray(x) + 3, state.params)
  state = begin(state, params)  # of a fine-tuned model
  jax.tree.map(assert_array_equal, state.weights().params, params)
  state = state.replace(average=jax.tree.map(lambda x: x + 1, state.average))
  weights = state.weights().params
  assert_array_equal(weights["patch_embed"]["kernel"], params["patch_embed"]["kernel"])
  assert_array_equal(weights["head"]["bias"], params["head"]["bias"] + 1)


def test_a_checkpoint_without_an_average_is_one_of_before(tmp_path):
  config, mesh = recipe_config(ema_decay=0.0), mesh_of(1)
  init = make_init(config, INFO, mesh)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save_last(init(*STATISTICS), wait=True)
    restored = checkpoints.restore_last(abstract_state(init, INFO))
  assert restored.average is None
  (metadata,) = tmp_path.glob("checkpoints/last/0/default/_METADATA")
  assert "average" not in metadata.read_text() and "plateau" in metadata.read_text()


# All of it ----------------------------------------------------------------------------------------


def test_neither_devices_nor_microbatches_change_a_recipe():
  batches = [a_batch(0), a_batch(1, masked=37)]
  results = {}
  for devices, microbatch in ((1, 64), (2, 8), (8, 2)):
    losses, state = run_steps(recipe_config(), devices, microbatch, batches)
    results[devices] = [*losses, float(state.sums.correct)], state
  losses, state = results[1]
  assert losses[0] != losses[1]
  for other, other_state in (results[2], results[8]):
    assert_allclose(other, losses, rtol=5e-6)
    for got, want in zip(
      jax.tree.leaves(other_state.average), jax.tree.leaves(state.average), strict=True
    ):
      assert np.mean(np.abs(got - want) > 1e-5) < 0.01
  moved = state.params["head"]["bias"] - state.average["head"]["bias"]
  assert np.abs(moved).max() > 1e-5


@pytest.mark.slow
def test_a_stopped_recipe_goes_on_bit_for_bit(smoke_config, tmp_path, monkeypatch):
  config = smoke_config(epochs=2, model__num_blocks=1)
  config.update_from_flattened_dict(PARTS | {"data.max_images": 256, "batch_size": 64})
  train_and_evaluate(config, tmp_path / "whole")
  calls = []

  def make_step(*arguments):
    step = make_train_step(*arguments)

    def call(state, batches):
      calls.append(1)
      if len(calls) == 6:  # in the second epoch
        signal.raise_signal(signal.SIGTERM)
      return step(state, batches)

    call.trace = step.trace
    return call

  with monkeypatch.context() as patch:
    patch.setattr("train.loop.make_train_step", make_step)
    with pytest.raises(SavedAndStopped):
      train_and_evaluate(config, tmp_path / "stopped")
  result = train_and_evaluate(config, tmp_path / "stopped")
  assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
  assert result["best_epoch"] in (1, 2)


def test_a_bad_image_is_reported_with_its_partner(monkeypatch, tmp_path):
  poison(monkeypatch, "loss inf", step=0)
  batches = [a_batch(number, BATCH) for number in (0, 1)]
  _, state, error = guarded_steps(recipe_config(), mesh_of(2), batches, tmp_path)
  assert isinstance(error, TrainingFailed)
  jax.tree.map(assert_array_equal, state.average, new_state(recipe_config()).average)
  report = json.loads((tmp_path / "nonfinite.json").read_text())
  assert (report["examples"], report["learning_rate"]) == ([4, 5], 1.25e-3)
