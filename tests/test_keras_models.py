"""The Keras models that `benchmarks/compare_keras.py` times, against Keras' golden numbers.

Skipped without the extra [bench], which is larger than all the rest together.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN
from test_golden import overrides
from test_keras_weights import golden_weights

import mlp_models


@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras: make test-keras")
@pytest.mark.parametrize("name", mlp_models.MODELS)
def test_the_models_that_are_timed_give_the_golden_logits(name, golden_images, monkeypatch):
  monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
  monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
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
  images = np.stack([golden_images[digest] for digest in golden["input/sha256"].tolist()])
  logits = np.asarray(model(images.astype(np.float32), training=False))
  expected = golden["output/logits"]
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
