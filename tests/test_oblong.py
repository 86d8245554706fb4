"""Images that are not square: each family, its positions, and weights that go out and come back.

tests/test_peers.py has the logits and gradients of timm's ViT for such images.
"""

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDEN

import mlp_models
from mlp_models import layers, vit
from mlp_models.flops import count_flops
from mlp_models.perceiver_tokens import fourier_features
from mlp_models.pretrained import describe

ORIGIN = GOLDEN / "peers" / "timm_vit_oblong"
SMALL = {"patch_size": 4, "width": 16, "num_blocks": 1, "num_classes": 5}
SIZES = {
  "mixer": SMALL,
  "fnet": SMALL,
  "gmlp": SMALL,
  "vit": SMALL | {"mlp_units": (16,), "num_heads": 2, "head_dim": 8, "head_units": ()},
  "perceiver": SMALL | {"num_latents": 4, "num_heads": 2, "ffn_units": (16,)},
}
IO = {"num_latents": 4, "width": 16, "num_iterations": 1, "num_blocks": 1, "num_heads": 2}
IO |= {"embed_channels": 6, "num_bands": 3, "num_classes": 5}


def shapes_and_flops(model, height, width):
  """Shapes of the parameters by path, and the operations of one image."""
  images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  paths, _ = jax.tree.flatten_with_path(variables["params"])
  shapes = {"/".join(key.key for key in path): leaf.shape for path, leaf in paths}
  return shapes, count_flops(model.apply, variables, images)


@pytest.mark.parametrize("name", mlp_models.MODELS)
def test_tokens_are_as_many_as_of_a_square_with_as_many_patches(name):
  oblong = mlp_models.create(name, image_size=(8, 32), **SIZES[name])
  square = mlp_models.create(name, image_size=16, **SIZES[name])
  found = shapes_and_flops(oblong, 8, 32)
  assert found == shapes_and_flops(square, 16, 16)
  tokens = {"mixer": "block0/token_mlp/in/kernel", "gmlp": "block0/spatial/kernel"}
  assert found[0][tokens.get(name, "position/embedding")][0] == 16
  with pytest.raises(ValueError, match=r"shape \(1, 32, 8, 3\), the model takes \[B, 8, 32, C\]"):
    shapes_and_flops(oblong, 32, 8)


def test_patches_are_cut_row_by_row():
  images = jnp.arange(4 * 6, dtype=jnp.float32).reshape(1, 4, 6, 1)
  x_TxP = np.asarray(layers.patches(images, image_size=(4, 6), patch_size=2)[0])
  assert x_TxP.shape == (6, 4)
  np.testing.assert_array_equal(x_TxP[[0, 2, 5]], [[0, 1, 6, 7], [4, 5, 10, 11], [16, 17, 22, 23]])


@pytest.mark.parametrize(
  ("image_size", "message"),
  [
    ((16, 18), r"image_size \(16, 18\) is not a multiple of patch_size 4"),
    ((18, 16), r"image_size \(18, 16\) is not a multiple of patch_size 4"),
    ((16, 0), r"image_size is \(16, 0\), it must be one or two positive integers"),
    ([16], r"image_size is \[16\], it must be one or two positive integers"),
    ((16, 16, 3), "it must be one or two positive integers"),
    ("16", "image_size is '16', it must be a positive integer"),
  ],
)
def test_sizes_that_do_not_fit_are_named(image_size, message):
  with pytest.raises(ValueError, match=message):
    mlp_models.create("mixer", image_size=image_size, patch_size=4)


def test_two_equal_sides_are_one():
  model = mlp_models.create("mixer", image_size=[16, 16], patch_size=4)
  assert model == mlp_models.create("mixer", image_size=16, patch_size=4)


def test_fixed_positions_have_the_angles_of_their_row_and_column():
  positions = vit.sincos2d((2, 5), width=8).reshape(2, 5, 8)
  expected = [
    f(place / 10_000**k) for place in (4, 1) for f in (math.sin, math.cos) for k in (0, 1)
  ]
  np.testing.assert_allclose(positions[1, 4], expected, atol=1e-6)
  features = fourier_features((2, 5), bands=3, max_resolution=8).reshape(2, 5, 14)
  np.testing.assert_allclose(features[1, 3, :2], [1, 0.5])
  np.testing.assert_allclose(
    features[1, 3, 5:8], np.sin(np.pi * 0.5 * np.array([1, 2.5, 4])), atol=1e-6
  )


@pytest.mark.parametrize(
  ("preprocessing", "tokens"), [("learned", 6 * 10), ("fourier", 6 * 10), ("conv", 1 * 2)]
)
def test_perceiver_io_takes_them_with_each_kind_of_tokens(preprocessing, tokens):
  model = mlp_models.create(
    "perceiver", "io-fourier", image_size=(6, 10), preprocessing=preprocessing, **IO
  )
  images = jax.ShapeDtypeStruct((2, 6, 10, 3), jnp.float32)
  init = functools.partial(model.init_with_output, mutable=True)
  logits, variables = jax.eval_shape(init, jax.random.key(0), images)
  assert logits.shape == (2, 5)
  assert variables["intermediates"]["cross0"]["attention"]["weights"][0].shape[-1] == tokens
  if preprocessing == "learned":
    assert variables["params"]["position"]["embedding"].shape == (60, 6)


@pytest.mark.parametrize("has_row", [True, False])  # of the class token's position
@pytest.mark.parametrize("layout", ["ours", "timm"])
def test_weights_go_out_and_come_back(layout, has_row, tmp_path):
  arrays = safetensors.numpy.load_file(ORIGIN / "model.safetensors")
  arrays["pos_embed"] = np.ascontiguousarray(arrays["pos_embed"][:, 0 if has_row else 1 :])
  (tmp_path / "theirs").mkdir()
  safetensors.numpy.save_file(arrays, tmp_path / "theirs" / "model.safetensors")
  shutil.copy(ORIGIN / "config.json", tmp_path / "theirs")
  model, params, preprocessing = mlp_models.load(tmp_path / "theirs", say=lambda line: None)
  assert model.image_size == preprocessing.image_size == (16, 24)
  assert params["position"]["embedding"][0].any() == has_row
  assert str(describe(tmp_path / "theirs")).endswith("for 16 x 24 pixels")
  file = tmp_path / "model.safetensors"
  mlp_models.save(file, model, params, (), preprocessing, layout)
  if layout == "timm":
    written = safetensors.numpy.load_file(file)
    for name, array in arrays.items():
      np.testing.assert_array_equal(written[name], array, err_msg=name)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["img_size"] == [16, 24]
    assert config["model_args"]["no_embed_class"] != has_row
    assert config["pretrained_cfg"]["input_size"] == [3, 16, 24]
  again, same, prepared = mlp_models.load(file, say=lambda line: None)
  assert (again, prepared) == (model, preprocessing)
  jax.tree.map(np.testing.assert_array_equal, same, params)
