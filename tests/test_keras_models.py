"""The Keras models that `benchmarks/compare_keras.py` times, against Keras' golden numbers.

Skipped without the extra [bench], which is larger than all other dependencies together.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN
from needs import CIFAR100_DIR
from test_golden import overrides
from test_keras_weights import golden_weights

import mlp_models

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.needs(what="keras")


@pytest.mark.needs(what="cifar100")
def test_both_are_timed_by_turns():
  command = [sys.executable, BENCHMARKS / "compare_keras.py", "--models", "mixer", "--json"]
  output = subprocess.check_output(
    [*command, "--rounds=2", "--seconds=0.5"],
    cwd=BENCHMARKS.parent,
    env=os.environ | {"TFDS_DATA_DIR": str(CIFAR100_DIR)},
    text=True,
  )
  row = json.loads(output.splitlines()[-1])
  assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
  assert row["ours"] > 0 and row["keras"] > 0


@pytest.mark.parametrize("name", mlp_models.MODELS)
def test_the_models_that_are_timed_give_the_golden_logits(name, monkeypatch):
  monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
  monkeypatch.syspath_prepend(BENCHMARKS)
  import keras_models

  with np.load(GOLDEN / f"{name}.npz") as arrays:
    golden = dict(arrays)
  sizes = overrides(name, json.loads(str(golden["config"])))
  model = keras_models.make(
    name,
    mlp_models.create(name, **sizes),
    {"flip": False, "rotation": 0, "zoom": 0},
    golden["input/mean"],
    golden["input/variance"],
  )
  variables, weights = keras_models.variables(model), golden_weights(name)
  assert variables.keys() == weights.keys()
  for key, variable in variables.items():
    variable.assign(weights[key])
  images = golden["input/image"].astype(np.float32)
  logits = np.asarray(model(images, training=False))
  expected = golden["output/logits"]
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
