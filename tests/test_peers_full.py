"""Models of timm and transformers at their published sizes, beside ours with the same weights.

Also what we save for timm, beside what timm makes of it.

Skipped without the extra [peers], which is larger than all other dependencies together.
"""

import json

import jax
import numpy as np
import pytest
from needs import NEEDS

import mlp_models
from mlp_models import layers

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


VIT = {"image_size": 64, "num_blocks": 2, "num_classes": 7}
SAVED = [
  ("vit", "S/16", VIT),
  ("vit", "S/16", VIT | {"width": 60, "num_heads": 3, "head_dim": 20, "mlp_units": (77, 60)}),
  ("vit", "S/16", VIT | {"pool": "cls_norm", "gelu": "exact"}),
  ("vit", "S/16", VIT | {"pool": "mean", "class_token": True, "image_size": (32, 64)}),
  ("vit", "S/16", VIT | {"pool": "mean_norm"}),
  ("vit", "S/16", VIT | {"pool": "map", "qkv_bias": False}),
  ("mixer", "S/32", {"image_size": (64, 32), "num_classes": 7, "gelu": "exact"}),
  ("gmlp", "Ti/16", {"image_size": (32, 64), "num_classes": 0}),
]


@pytest.mark.parametrize(("name", "variant", "fields"), SAVED)
def test_timm_makes_the_model_of_a_saved_folder(name, variant, fields, tmp_path):
  import timm
  import torch

  model = mlp_models.create(name, variant, **fields)
  rng = np.random.default_rng(0)
  height, width = layers.grid(model.image_size)
  images = rng.normal(size=(2, height, width, 3)).astype(np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  params = jax.tree.map(
    lambda x: rng.normal(scale=max(x.shape) ** -0.5, size=x.shape).astype(np.float32), shapes
  )
  preprocessing = mlp_models.Preprocessing(64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9)
  names = [f"class {n}" for n in range(model.num_classes)]
  mlp_models.save(tmp_path / "it", model, params, names, preprocessing, layout="timm")

  theirs = timm.create_model(f"local-dir:{tmp_path / 'it'}", pretrained=True).eval()
  with torch.no_grad():
    expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
  logits = jax.jit(model.apply)({"params": params}, images)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  data = timm.data.resolve_data_config({}, model=theirs)
  said = [data[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")]
  assert said == [(3, height, width), [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], "bilinear", 0.9]
  assert list(theirs.pretrained_cfg.get("label_names", [])) == names
