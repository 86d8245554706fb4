"""Odd weights and overrides: one line says what fits, in words of the field."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDEN

import mlp_models

PEERS = GOLDEN / "peers"


def load(source, **kwargs):
  lines = []
  return *mlp_models.load(source, say=lines.append, **kwargs), lines


def refused(source, match, **kwargs):
  with pytest.raises(mlp_models.WeightsError, match=match) as error:
    load(source, **kwargs)
  said = str(error.value)
  assert "\n" not in said and not re.search(r"\(\d+,|object|NoneType|unpack|invalid literal", said)


@pytest.fixture
def changed(tmp_path):
  """A function that writes the arrays of a golden file with others in their place."""

  def make(**others):
    arrays = safetensors.numpy.load_file(PEERS / "timm_vit_cls" / "model.safetensors")
    arrays |= {name.replace("__", "."): x for name, x in others.items()}
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items() if x is not None}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"

  return make


@pytest.mark.parametrize(
  ("case", "overrides", "match"),
  [
    ("timm_vit_cls", {"pool": "mean"}, "has a class token.*: class_token=True keeps it"),
    ("timm_vit_cls", {"pool": "map"}, "class_token=True keeps it"),
    ("timm_vit_gap", {"pool": "cls"}, "has no class token. It fits pool='mean'"),
    ("timm_vit_gap", {"class_token": True}, "has no class token. It fits class_token=False"),
    ("timm_vit_map", {"pool": "mean"}, "has pool/probe.*model lacks. It fits pool='map'"),
    ("timm_vit_cls", {"num_blocks": 3}, "lacks block2/.*It fits num_blocks=2"),
    ("timm_vit_cls", {"num_heads": 4}, r"\[16, 2, 8\], the model \[16, 4, 8\].*fits num_heads=2"),
    ("timm_vit_cls", {"position": "sincos2d"}, "has position/.*It fits position='learned'"),
    ("timm_vit_cls", {"qkv_bias": False}, "query/bias.*It fits qkv_bias=True"),
  ],
)
def test_overrides_that_contradict_the_arrays_are_told_what_fits(case, overrides, match):
  refused(PEERS / case, match, **overrides)


def test_other_pools_keep_the_class_token_if_they_are_told_to():
  model, params, _, _ = load(PEERS / "timm_vit_cls", pool="mean", class_token=True)
  assert params["class_token"].shape == (16,) and model.pool == "mean"


@pytest.mark.parametrize(
  ("others", "match"),
  [
    ({"patch_embed__proj__weight": np.zeros((16, 192), np.float32)}, "not have the shapes of such"),
    ({"pos_embed": np.zeros((1, 7, 16), np.float32)}, "6 tokens, which make no square grid"),
    ({"blocks__0__attn__qkv__weight": np.zeros((47, 16), np.float32)}, r"is \[47, 16\], which"),
    ({"blocks__1__attn__qkv__bias": None}, "lacks block1/attention/key/bias"),
    ({"norm__bias": np.zeros(16, np.int32)}, "norm.bias holds int32, and weights are floats"),
    ({"norm__bias": np.zeros(16, ml_dtypes.float8_e4m3fn)}, "norm.bias can't be read.*F8_E4M3"),
    ({"extra": np.zeros(1, np.float32)}, "timm's vit with extra is not supported"),
    ({"dist_token": np.zeros((1, 1, 16), np.float32)}, "dist_token is not supported"),
  ],
)
def test_arrays_of_other_models_are_one_line(others, match, changed):
  refused(changed(**others), match)


@pytest.mark.parametrize(
  ("config", "match"),
  [
    ({"mean": [1, 2]}, r"config.json: mean is \[1, 2\], it must be 1, 3 or 4 numbers"),
    ({"pretrained_cfg": {"mean": [0.5], "std": [0]}}, "std is .*positive numbers"),
    ({"model_args": {"num_heads": "2"}}, 'num_heads is "2", it must be a positive whole number'),
    ({"model_args": {"num_heads": 3}}, "3 heads do not divide the width 16"),
    ({"architecture": ["vit"]}, "architecture is .*, it must be text"),
  ],
)
def test_values_of_a_config_are_named(config, match, tmp_path):
  shutil.copy(PEERS / "timm_vit_cls" / "model.safetensors", tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(config))
  refused(tmp_path, match)


def test_null_in_a_config_says_nothing_and_names_may_be_by_number(tmp_path):
  shutil.copy(PEERS / "timm_vit_cls" / "model.safetensors", tmp_path)
  names = {str(n): name for n, name in enumerate("edcba")}
  config = {"model_args": None, "mean": None, "pretrained_cfg": {"std": None}, "label_names": names}
  (tmp_path / "config.json").write_text(json.dumps(config))
  _, _, preprocessing, lines = load(tmp_path, class_names=list("abcde"))
  assert preprocessing == mlp_models.Preprocessing(16)
  assert "head kept: the 5 classes have the same names, in another order" in lines
  refused(tmp_path, "class_names is 'abcde', it must be a list", class_names="abcde")
  refused("", "the weights have no name")


def test_parts_of_weights_are_read_by_their_index(tmp_path):
  folder = PEERS / "timm_vit_cls"
  arrays = safetensors.numpy.load_file(folder / "model.safetensors")
  parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
  where = {name: parts[n % 2] for n, name in enumerate(arrays)}
  for part in parts:
    own = {name: arrays[name] for name in arrays if where[name] == part}
    safetensors.numpy.save_file(own, tmp_path / part)
  shutil.copy(folder / "config.json", tmp_path)
  refused(tmp_path, "holds 2 files of weights: name one, such as model-00001-of-00002")
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": where}))
  _, expected, _, _ = load(folder)
  for source in (tmp_path, index, tmp_path / parts[1]):
    params = load(source)[1]
    np.testing.assert_array_equal(
      params["block1"]["mlp"]["dense0"]["kernel"], expected["block1"]["mlp"]["dense0"]["kernel"]
    )
  (tmp_path / parts[0]).unlink()
  refused(tmp_path, f"{parts[0]} can't be read")
