"""Weights saved for timm: a folder that says all of the model, and what bare files leave open.

tests/test_peers_full.py makes timm read such folders.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDEN

import mlp_models
from mlp_models import layers
from mlp_models.pretrained import describe

PREPROCESSING = mlp_models.Preprocessing(8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9)
NAMES = ("ant", "bee", "cow", "dog", "eel")
SIZES = {"image_size": 8, "patch_size": 4, "width": 12, "num_blocks": 1, "num_classes": 5}
VIT = SIZES | {"num_heads": 2, "head_dim": 6, "mlp_units": (7, 12)}
MODELS = {
  "vit": ("vit", "B/16", VIT),
  "vit_tanh_without_biases": ("vit", "B/16", VIT | {"gelu": "tanh", "qkv_bias": False}),
  "vit_mean_of_others": ("vit", "B/16", VIT | {"pool": "mean", "class_token": True}),
  "vit_cls_norm": ("vit", "B/16", VIT | {"pool": "cls_norm", "norm_epsilon": 1e-3}),
  "vit_map": ("vit", "B/16", VIT | {"pool": "map", "qkv_bias": False}),
  "mixer_tanh": ("mixer", "B/16", SIZES | {"token_units": 5, "channel_units": 7}),
  "mixer_oblong": ("mixer", "B/16", SIZES | {"image_size": (8, 12), "gelu": "exact"}),
  "gmlp_oblong": ("gmlp", "S/16", SIZES | {"image_size": (12, 8), "drop_path_rate": 0.0}),
  "gmlp": ("gmlp", "S/16", SIZES | {"hidden_units": 10, "drop_path_rate": 0.0}),
}


def random_params(model):
  rng = np.random.default_rng(0)
  image = np.zeros((1, *layers.grid(model.image_size), 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def save(file, model, params=None, **kwargs):
  """Writes timm's layout, and returns what is said."""
  lines = []
  params = random_params(model) if params is None else params
  options = {"class_names": NAMES, "preprocessing": PREPROCESSING, "layout": "timm"} | kwargs
  mlp_models.save(file, model, params, say=lines.append, **options)
  return lines


def load(source, **kwargs):
  lines = []
  return *mlp_models.load(source, say=lines.append, **kwargs), lines


def vit(**fields):
  return mlp_models.create("vit", "B/16", **VIT | {"gelu": "exact"} | fields)


@pytest.mark.parametrize("file", ["", "weights.safetensors"])
@pytest.mark.parametrize("case", MODELS)
def test_what_is_saved_for_timm_is_loaded_as_it_was(case, file, tmp_path):
  name, variant, fields = MODELS[case]
  model = mlp_models.create(name, variant, **fields)
  save(tmp_path / "it" / file, model)
  loaded, params, preprocessing, lines = load(tmp_path / "it" / file)
  inits = {"spatial_init": "near_zero"} if name == "gmlp" else {}  # of no meaning to weights
  assert loaded.clone(**inits) == model
  assert preprocessing == dataclasses.replace(PREPROCESSING, image_size=model.image_size)
  jax.tree.map(np.testing.assert_array_equal, params, random_params(model))
  assert describe(tmp_path / "it" / file).class_names == NAMES
  assert not any(line.startswith("assumed") for line in lines)


def test_config_says_what_timm_makes_the_model_of(tmp_path):
  save(tmp_path, vit(pool="mean_norm", gelu="tanh"))
  config = json.loads((tmp_path / "config.json").read_text())
  assert (config["architecture"], config["num_classes"]) == ("vit_base_patch16_224", 5)
  assert config["label_names"] == list(NAMES)
  args = config["model_args"]
  sizes = [args[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")]
  assert sizes == [8, 4, 12, 1, 2] and int(args["mlp_ratio"] * 12) == 7
  words = [args[key] for key in ("global_pool", "fc_norm", "class_token", "act_layer")]
  assert words == ["avg", True, False, "gelu_tanh"]
  known = config["pretrained_cfg"]
  assert (known["mean"], known["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
  assert (known["interpolation"], known["crop_pct"]) == ("bilinear", 0.9)
  assert (known["input_size"], known["first_conv"]) == ([3, 8, 8], "patch_embed.proj")


@pytest.mark.parametrize(
  ("name", "variant", "fields", "architecture", "args"),
  [
    ("mixer", "S/32", {}, "mixer_s32_224", {"img_size", "in_chans", "mlp_ratio", "act_layer"}),
    ("gmlp", "Ti/16", {"image_size": 32}, "gmlp_ti16_224", {"img_size", "in_chans"}),
  ],
)
def test_architectures_of_fixed_sizes_are_not_told_them_twice(
  name, variant, fields, architecture, args, tmp_path
):
  model = mlp_models.create(name, variant, **fields)
  shape = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), shape)["params"]
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
  said = save(tmp_path, model, params, class_names=(), preprocessing=None)
  config = json.loads((tmp_path / "config.json").read_text())
  assert (config["architecture"], set(config["model_args"])) == (architecture, args)
  tanh = ["timm's mixer is this model if it is made with act_layer=timm.layers.GELUTanh"]
  assert said == (tanh if name == "mixer" else [])


def test_sizes_without_an_architecture_and_other_epsilons_are_said(tmp_path):
  sizes = SIZES | {"gelu": "exact", "token_units": 5, "channel_units": 7}
  lines = save(tmp_path / "mixer", mlp_models.create("mixer", "B/16", **sizes))
  assert len(lines) == 1 and "no mixer of these sizes: timm.models.mlp_mixer.MlpMixer(" in lines[0]
  assert "architecture" not in json.loads((tmp_path / "mixer" / "config.json").read_text())
  (line,) = save(tmp_path / "vit", vit(norm_epsilon=1e-3))
  assert "norm_layer=functools.partial(torch.nn.LayerNorm, eps=0.001)" in line


def test_a_config_of_something_else_is_not_overwritten(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  for file in (tmp_path, tmp_path / "weights.safetensors"):
    with pytest.raises(mlp_models.WeightsError, match="config.json belongs to something else"):
      save(file, vit())
  assert (tmp_path / "config.json").read_text() == "{}" and len(list(tmp_path.iterdir())) == 1

  folder = tmp_path / "timm"
  save(folder, vit())
  save(folder, vit(num_classes=2), class_names=())  # its own is replaced
  assert json.loads((folder / "config.json").read_text())["num_classes"] == 2
  with pytest.raises(mlp_models.WeightsError, match="timm/config.json belongs"):
    save(folder / "other.safetensors", vit())


def test_what_timm_lacks_is_refused_before_anything_is_written(tmp_path):
  with pytest.raises(mlp_models.WeightsError, match="num_heads x head_dim must be the width, 12"):
    save(tmp_path, vit(head_dim=5))
  with pytest.raises(mlp_models.WeightsError, match="timm's vit has head_units|head_mlp"):
    save(tmp_path, vit(head_units=(8,)))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_row", [True, False])
@pytest.mark.parametrize("norm", ["norm", "fc_norm"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_timms_files_return_to_the_same_names_and_arrays(has_row, norm, has_bias, tmp_path):
  arrays = safetensors.numpy.load_file(GOLDEN / "peers" / "timm_vit_cls" / "model.safetensors")
  if not has_row:
    arrays["pos_embed"] = np.ascontiguousarray(arrays["pos_embed"][:, 1:])
  arrays |= {f"{norm}.{leaf}": arrays.pop(f"norm.{leaf}") for leaf in ("weight", "bias")}
  arrays = {name: x for name, x in arrays.items() if has_bias or "qkv.bias" not in name}
  safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors")
  model, params, _, _ = load(tmp_path / "theirs.safetensors", num_heads=2)
  save(tmp_path / "ours", model, params)
  returned = safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors")
  assert returned.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(returned[name], array, err_msg=name)
  args = json.loads((tmp_path / "ours" / "config.json").read_text())["model_args"]
  said = [args[key] for key in ("no_embed_class", "fc_norm", "qkv_bias")]
  assert said == [not has_row, norm == "fc_norm", has_bias]


def test_attention_without_biases_keeps_those_of_its_output(tmp_path):
  params = random_params(vit(qkv_bias=False))
  attention = params["block0"]["attention"]
  assert [sorted(attention[part]) for part in ("query", "key", "value", "out")] == [
    ["kernel"],
    ["kernel"],
    ["kernel"],
    ["bias", "kernel"],
  ]
  images = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
  logits = jax.jit(vit(qkv_bias=False).apply)({"params": params}, images)
  for part in ("query", "key", "value"):
    attention[part]["bias"] = np.zeros((2, 6), np.float32)
  np.testing.assert_allclose(jax.jit(vit().apply)({"params": params}, images), logits, atol=1e-5)


# What a bare file leaves open -------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path):
  """A function that copies a golden case's file under another name, without its config.json."""

  def make(case, name="bare.safetensors"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / "peers" / case / "model.safetensors", tmp_path / name)
    return tmp_path / name

  return make


def test_assumed_fields_are_said_with_the_way_to_say_otherwise(bare):
  file = bare("timm_vit_map")
  model, _, _, lines = load(file)
  assert (model.num_heads, model.gelu) == (1, "exact")
  (line,) = [line for line in lines if line.startswith("assumed")]
  assert "num_heads 1, gelu exact" in line
  assert "load(..., gelu='tanh') or --config.model.gelu=tanh" in line
  model, params, _, lines = load(file, gelu="tanh", num_heads=2)
  assert (model.num_heads, model.gelu) == (2, "tanh")
  assert not any(line.startswith("assumed") for line in lines)

  with np.load(GOLDEN / "peers" / "timm_vit_map" / "expected.npz") as expected:
    logits = jax.jit(model.apply)({"params": params}, expected["images"])
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
  with pytest.raises(mlp_models.WeightsError, match="3 heads do not divide the width 16"):
    load(file, num_heads=3)


@pytest.mark.parametrize(
  "name",
  [
    "vit_so400m_patch16_siglip_256.v2_webli.safetensors",
    "vit_so400m_patch16_siglip_256.v2_webli/model.safetensors",
  ],
)
def test_the_name_of_a_file_or_its_folder_tells_the_gelu(name, bare):
  found = describe(bare("timm_vit_map", name))
  assert (found.fields["gelu"], found.assumed) == ("tanh", ())


@pytest.mark.parametrize("case", ["timm_mixer", "timm_gmlp", "transformers_vit"])
def test_gelu_is_assumed_for_every_bare_file(case, bare):
  assert "gelu" in describe(bare(case)).assumed
  assert "gelu" not in describe(GOLDEN / "peers" / case).assumed


def test_no_global_pool_is_said(bare):
  file = bare("timm_vit_cls", "folder/model.safetensors")
  config = {"architecture": "vit", "model_args": {"global_pool": "", "num_heads": 2}}
  (file.parent / "config.json").write_text(json.dumps(config))
  model, _, _, lines = load(file.parent)
  assert model.pool == "cls" and "global_pool ''" in lines[1]
  assert "pool cls" in lines[2] and "load(..., pool='mean')" in lines[2]


def test_crop_that_timms_config_leaves_out_is_timms_default(tmp_path):
  save(tmp_path, vit())
  file = tmp_path / "config.json"
  config = json.loads(file.read_text())
  del config["pretrained_cfg"]["crop_pct"]
  file.write_text(json.dumps(config))
  assert mlp_models.load(tmp_path)[2].crop == 0.875
