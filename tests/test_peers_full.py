"""Models of timm and transformers at their published sizes, beside ours with the same weights.

Skipped without the extra [peers], which is larger than all other dependencies together.
"""

import json

import jax
import numpy as np
import pytest
from needs import NEEDS

import mlp_models

pytestmark = pytest.mark.needs(what="torch")

if NEEDS["torch"].is_here:
  from benchmarks import peers

  CASES = peers.cases("FULL_CASES")
else:
  CASES = {"all": None}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_peer(name, tmp_path):
  import torch
  from safetensors.torch import save_model

  case = CASES[name]()
  (tmp_path / "config.json").write_text(json.dumps(case.config))
  save_model(case.model, tmp_path / "model.safetensors", {"format": "pt"})
  images = np.random.default_rng(0).normal(size=(2, *np.broadcast_to(case.image_size, 2), 3))
  images = images.astype(np.float32)
  with torch.no_grad():
    expected = case.logits(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()

  model, params, _ = mlp_models.load(tmp_path)
  logits = jax.jit(model.apply)({"params": params}, images)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
