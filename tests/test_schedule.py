"""The learning rate goes as its schedule says, and is printed as it is used."""

import math

import numpy as np
import pytest
from test_step import BATCH, INFO, new_state, noise_batch, run_steps
from test_step import smoke_config as config_of

from configs import mixer
from train import optimizer
from train.check import check_config
from train.data.batches import num_batches
from train.errors import ConfigError, WorkdirError
from train.loop import train_and_evaluate
from train.run import metrics
from train.schedule import check_warmup, depends_on_epochs, learning_rate, make_schedule, plateau


def config_with(**schedule):
  config = mixer.get_config()
  config.schedule.update(schedule)
  return config


def by_hand(name: str, total: int, warmup: int, final: float) -> list[float]:
  factors = []
  for step in range(total):
    way = max(0, step - warmup) / (total - 1 - warmup)
    shape = {"linear": 1 - way, "cosine": 0.5 + 0.5 * math.cos(math.pi * way)}.get(name, 1.0)
    falls = name in ("linear", "cosine")
    rise = min(1, (step + 1) / (warmup or 1))
    factors.append(rise * (final + (1 - final) * shape if falls else 1))
  return factors


@pytest.mark.parametrize("name", ["plateau", "constant", "linear", "cosine"])
@pytest.mark.parametrize(
  ("total", "warmup", "final"), [(50, {}, 0.0), (50, {"warmup_steps": 7}, 0.1)]
)
def test_factors_are_those_of_the_definition(name, total, warmup, final):
  schedule = make_schedule(config_with(name=name, final=final, **warmup), total)
  factors = [float(schedule(step)) for step in range(total)]
  expected = by_hand(name, total, warmup.get("warmup_steps", 0), final)
  np.testing.assert_allclose(factors, expected, atol=1e-6)
  assert factors[0] > 0 and max(factors) == 1.0
  if name in ("linear", "cosine"):
    np.testing.assert_allclose(factors[-1], final, atol=1e-7)


def test_a_fraction_is_of_all_steps():
  schedule = make_schedule(config_with(name="linear", warmup_fraction=0.08), 100)
  np.testing.assert_allclose([float(schedule(n)) for n in (0, 7, 8)], [1 / 8, 1, 1])
  assert float(schedule(9)) < 1


def test_runs_of_one_step_or_of_warm_up_alone_have_a_rate():
  for name in ("linear", "cosine"):
    assert float(make_schedule(config_with(name=name), 1)(0)) == 1
    assert float(make_schedule(config_with(name=name, warmup_steps=8), 4)(3)) == 0.5


def test_constant_turns_the_plateau_off():
  for name, expected in (("plateau", 0.5), ("constant", 1.0), ("linear", 0.5)):
    config = config_with(name=name)
    config.plateau.patience = 1
    transformation = optimizer.make_plateau(plateau(config))
    state = transformation.init({})
    for _ in range(2):
      state = optimizer.end_of_epoch(transformation, state, 1.0)
    assert state.scale == expected


def test_the_step_uses_the_rate_that_is_printed():
  config = config_of("fnet")
  config.optimizer.weight_decay, config.batch_size = 0.0, BATCH
  config.schedule.update({"name": "linear", "warmup_steps": 4})
  total = config.epochs * num_batches(INFO.sizes["train"], BATCH)
  step = total - 3
  state = new_state(config)
  before = np.array(state.params["head"]["kernel"])  # the step donates its state
  half = state.plateau._replace(scale=np.float32(0.5))
  rate = learning_rate(config, total, step, half.scale)
  np.testing.assert_allclose(rate, 1e-3 * 0.5 * 2 / (total - 5), rtol=1e-4)
  state = state.replace(step=np.int32(step), plateau=half)
  _, after = run_steps(config, 1, BATCH, [noise_batch(0)], state)
  # Adam's first step moves each weight by the learning rate.
  moved = np.abs(after.params["head"]["kernel"] - before)
  np.testing.assert_allclose(np.median(moved), rate, rtol=0.02)


@pytest.mark.parametrize(
  ("knobs", "message"),
  [
    ({"name": "cosin"}, "config.schedule.name = 'cosin': one of plateau, constant, linear, cosine"),
    ({"warmup_steps": -1}, "config.schedule.warmup_steps = -1: at least 0"),
    ({"warmup_fraction": 1.0}, "config.schedule.warmup_fraction = 1.0: from 0"),
    ({"warmup_fraction": 0.1, "warmup_steps": 5}, "warmup_steps is given, too: give one"),
    ({"final": 1.5}, "config.schedule.final = 1.5: from 0 to 1"),
  ],
)
def test_wrong_schedules_are_refused(knobs, message):
  with pytest.raises(ConfigError, match=message):
    check_config(config_with(**knobs))


def test_a_warm_up_longer_than_the_run_is_refused():
  with pytest.raises(ConfigError, match="warmup_steps = 1,000: the run ends after 600 steps"):
    check_warmup(config_with(warmup_steps=1000), 600)
  check_warmup(config_with(warmup_steps=599), 600)
  check_warmup(config_with(), 0)


def test_which_schedules_depend_on_the_number_of_epochs():
  for knobs, expected in [
    ({}, False),
    ({"name": "constant", "warmup_steps": 9}, False),
    ({"warmup_fraction": 0.1}, True),
    ({"name": "linear"}, True),
    ({"name": "cosine"}, True),
  ]:
    assert depends_on_epochs(config_with(**knobs)) == expected


def test_a_run_prints_its_rates_and_is_not_prolonged(smoke_config, tmp_path, capsys):
  config = smoke_config(epochs=2, schedule__name="cosine", schedule__final=0.1)
  train_and_evaluate(config, tmp_path)
  rates = [row["learning_rate"] for row in metrics.read(tmp_path)]
  expected = by_hand("cosine", 16, 0, 0.1)
  np.testing.assert_allclose(rates, [5e-3 * expected[7], 5e-3 * expected[15]], rtol=1e-5)
  assert "lr 5.0e-04" in capsys.readouterr().out
  config.epochs = 4
  with pytest.raises(WorkdirError, match="a run of 2 epochs.*with --config.epochs=2") as error:
    train_and_evaluate(config, tmp_path)
  assert "\n" not in str(error.value)
