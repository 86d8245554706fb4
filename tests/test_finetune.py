"""Runs that start from weights, and train a part of them."""

import importlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import GOLDEN
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from runs import numbers
from test_predict import run
from test_step import INFO, mesh_of, noise_batch, run_steps

import mlp_models
from mlp_models.pretrained import describe
from train import check, export, knobs, pretrained
from train.cost import flops_per_image
from train.devices.mesh import make_mesh
from train.errors import ConfigError
from train.loop import train_and_evaluate
from train.run import metrics
from train.run.checkpoint import Checkpoints, load_trained_model
from train.run.workdir import read_config, read_dataset
from train.state import abstract_state, make_init

PERCEIVER = "transformers_perceiver_conv"
SIZES = dict(image_size=16, patch_size=8, width=16, num_blocks=2)
PREPARED = mlp_models.Preprocessing(16, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic", 0.875)


def save_weights(file: Path, num_classes: int = 7, **fields) -> dict:
  """Writes random weights of a small Mixer, and returns them by path."""
  model = mlp_models.create("mixer", **SIZES | {"num_classes": num_classes} | fields)
  images = np.zeros((1, model.image_size, model.image_size, 3), np.float32)
  params = jax.jit(model.init)(jax.random.key(5), images)["params"]
  rng = np.random.default_rng(0)  # biases are not zero
  params = jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), params)
  names = [f"class {n}" for n in range(num_classes)]
  mlp_models.save(file, model, params, names, PREPARED)
  return flatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[Path, dict]:
  """A file, and its arrays by path."""
  file = tmp_path_factory.mktemp("weights") / "mixer.safetensors"
  return file, save_weights(file)


@pytest.fixture
def finetune_config(smoke_config, weights):
  """A smoke run from the weights; `model` holds no more than a name and what is given."""

  def make(file: Path | None = None, model: dict | None = None, **overrides) -> ConfigDict:
    config = smoke_config(init=str(file or weights[0]), data__max_images=128, **overrides)
    config.model = {"name": "mixer"} | (model or {})
    check.check_config(config)
    return config

  return make


def states(config: ConfigDict, folder: Path):
  """The last state of a run, and its parameters by path."""
  config, info = read_config(epath.Path(folder)), read_dataset(epath.Path(folder))
  template = abstract_state(make_init(config, info, make_mesh()), info)
  with Checkpoints(epath.Path(folder), read_only=True) as checkpoints:
    state = checkpoints.restore_last(template)
  return state, flatten_dict(jax.device_get(state.params), sep="/")


def test_run_starts_from_weights_and_goes_on_without_them(
  finetune_config, weights, tmp_path, capsys
):
  file, arrays = tmp_path / "gone.safetensors", weights[1]
  file.write_bytes(weights[0].read_bytes())
  frozen = ("patch_embed", "block0", "block1", "norm")  # so that they can be compared at the end
  frozen = tuple(name for name in frozen if any(key.startswith(f"{name}/") for key in arrays))
  options = dict(file=file, freeze=frozen, optimizer__learning_rate=1e-20)
  train_and_evaluate(finetune_config(**options, epochs=1), tmp_path / "run")
  assert "head reset: 100 classes instead of 7" in capsys.readouterr().out

  state, params = states(None, tmp_path / "run")
  assert params.keys() == arrays.keys()
  for name in set(arrays) - {"head/kernel", "head/bias"}:
    np.testing.assert_array_equal(params[name], arrays[name], err_msg=name)
  assert params["head/kernel"].shape == (16, 100)
  np.testing.assert_allclose(state.mean, [127.5, 102.0, 76.5], rtol=1e-6)
  np.testing.assert_allclose(state.variance, [51.0**2, 63.75**2, 76.5**2], rtol=1e-6)

  config = json.loads((tmp_path / "run" / "config.json").read_text())
  assert config["model"]["width"] == 16 and config["model"]["num_blocks"] == 2
  assert "num_classes" not in config["model"]
  assert (config["data"]["interpolation"], config["data"]["crop"]) == ("bicubic", 0.875)

  file.unlink()
  trained = load_trained_model(epath.Path(tmp_path / "run"), make_mesh())
  assert trained.model.width == 16
  train_and_evaluate(finetune_config(**options, epochs=2), tmp_path / "run")
  assert [row["epoch"] for row in metrics.read(tmp_path / "run")] == [1, 2]


def test_frozen_arrays_stay_and_have_no_optimizer_state_and_a_resumed_run_is_equal(
  finetune_config, weights, tmp_path
):
  options = dict(freeze=("patch_embed", "block0"), optimizer__layer_decay=0.5)
  train_and_evaluate(finetune_config(**options, epochs=2), tmp_path / "once")
  for epochs in (1, 2):
    train_and_evaluate(finetune_config(**options, epochs=epochs), tmp_path / "twice")
  assert numbers(tmp_path / "once") == numbers(tmp_path / "twice")
  state, params = states(None, tmp_path / "once")
  other, _ = states(None, tmp_path / "twice")
  jax.tree.map(np.testing.assert_array_equal, state, other)

  moments = flatten_dict(state.opt_state[0].mu, sep="/")
  for name, array in weights[1].items():
    frozen = name.startswith(("patch_embed/", "block0/"))
    assert (name in moments) != frozen
    if frozen:
      np.testing.assert_array_equal(params[name], array)
    elif not name.startswith("head/"):
      assert np.abs(params[name] - array).max() > 1e-4, name


def test_head_is_kept_for_classes_of_the_same_names(finetune_config, tmp_path, capsys):
  config = finetune_config()
  info = pretrained.DatasetInfo("set", tuple(f"class {n}" for n in range(7)), (32, 32, 3), {})
  params = pretrained.load(pretrained.resolve(config), info)
  assert "head kept: the 7 classes have the same names" in capsys.readouterr().out
  assert params["head"]["kernel"].shape == (16, 7)


def test_what_the_config_gives_counts_more_than_the_weights(finetune_config):
  normal = dict(data__mean=(1.0,), data__variance=(2.0,))
  config = finetune_config(model={"dropout_rate": 0.3, "num_blocks": None}, **normal)
  resolved = pretrained.resolve(config)
  assert (resolved.model.dropout_rate, resolved.model.num_blocks) == (0.3, 2)
  assert (resolved.data.mean, resolved.data.variance) == ((1.0,), (2.0,))
  assert resolved.data.interpolation == "bicubic"
  assert config.model.to_dict() == {"name": "mixer", "dropout_rate": 0.3, "num_blocks": None}


REFUSED = [
  ({"model": {"name": "vit"}}, "the weights are of mixer .*config.model.name is 'vit': choose"),
  ({"model": {"image_size": (8, 32)}}, r"\(8, 32\): training takes squares: .*image_size=8"),
  ({"model": {"image_size": 32}}, "Weights over tokens fit one number of patches"),
  ({"model": {"depth": 3}}, "no field 'depth'"),
  ({"file": Path("/no/such.safetensors")}, "/no/such.safetensors"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_weights_that_do_not_fit_are_refused_before_the_workdir_is_made(
  options, message, finetune_config, tmp_path
):
  with pytest.raises(ConfigError, match=message) as error:
    train_and_evaluate(finetune_config(**options), tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not list((tmp_path / "run").glob("config.json"))


@pytest.mark.parametrize(
  ("freeze", "message"),
  [
    (("block7",), "no 'block7': there are backbone, block0, block1, head, patch_embed"),
    (("block",), "no 'block'"),
    (("backbone", "head"), "nothing is left to train"),
  ],
)
def test_freezing_what_is_not_there_or_everything_is_one_line(
  freeze, message, smoke_config, tmp_path
):
  with pytest.raises(ConfigError, match=message):
    train_and_evaluate(smoke_config(freeze=freeze), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_frozen_backbone_costs_no_backward_pass(smoke_config):
  wide = dict(model__width=256)  # so that the model costs more than the augmentation
  whole, head = smoke_config(**wide), smoke_config(**wide, freeze=("backbone",))
  assert flops_per_image(head, INFO) < 0.5 * flops_per_image(whole, INFO)
  assert check._trained_parameters(head) == 256 + 1  # the head, for one class


def test_frozen_run_does_not_depend_on_the_mesh(smoke_config, monkeypatch):
  monkeypatch.setattr("train.devices.mesh._SHARDED_FROM", 64)
  config = smoke_config(freeze=("patch_embed", "block1"), optimizer__layer_decay=0.5)
  batches = [noise_batch(i) for i in range(4)]
  losses, state = run_steps(config, 1, 32, batches)
  others, other = run_steps(config, mesh_of(2, 4), 2, batches)
  np.testing.assert_allclose(others, losses, rtol=5e-6)
  np.testing.assert_array_equal(
    other.params["block1"]["norm"]["scale"], state.params["block1"]["norm"]["scale"]
  )


@pytest.mark.parametrize(
  ("flag", "value"),
  [
    ("--config.freeze=backbone", ("backbone",)),
    ("--config.freeze=patch_embed,block0", ("patch_embed", "block0")),
    ("--config.freeze=('patch_embed', \"block0\",)", ("patch_embed", "block0")),
    ("--config.freeze=()", ()),
  ],
)
def test_names_are_parsed_from_the_command_line(flag, value, smoke_config):
  config = smoke_config()
  knobs.override(config, [flag])
  assert config.freeze == value


@pytest.mark.parametrize("name", ["mixer", "vit"])
def test_recipe_needs_weights_and_leaves_the_sizes_to_them(name):
  config = importlib.import_module(f"configs.{name}").get_config("finetune")
  with pytest.raises(ValueError, match="this config requires --config.init=VALUE"):
    knobs.require_all(config)
  knobs.override(config, ["--config.init=weights.npz"])
  check.check_config(config)
  assert (config.optimizer.layer_decay, config.optimizer.weight_decay) == (0.75, 0.0)
  given = {key for key, value in config.model.items() if value is not None}
  assert {key for key in given if not key.endswith("_rate")} == {"name"}


@pytest.mark.parametrize("name", mlp_models.MODELS)
def test_recipe_without_weights_is_one_line_that_says_what_they_are(name):
  config = importlib.import_module(f"configs.{name}").get_config("finetune")
  knobs.override(config, ["--config.init="])
  with pytest.raises(
    ConfigError, match="config.init = '': this config needs weights: a .safetensors or"
  ):
    check.check_config(config)


@pytest.mark.parametrize(
  "case", ["timm_vit_map", "timm_mixer", "timm_gmlp", "transformers_fnet", PERCEIVER]
)
def test_recipe_has_a_flag_for_each_field_that_a_bare_file_leaves_open(case, tmp_path):
  shutil.copy(GOLDEN / "peers" / case / "model.safetensors", tmp_path / "bare.safetensors")
  found = describe(tmp_path / "bare.safetensors")
  config = importlib.import_module(f"configs.{found.name}").get_config("finetune")
  knobs.override(config, [f"--config.model.{x}={found.fields[x]}" for x in found.assumed])
  assert found.assumed and all(config.model[x] == found.fields[x] for x in found.assumed)


def test_weights_decide_the_variant_and_the_recipe_keeps_its_rates(tmp_path):
  model = mlp_models.create("vit", "Ti/16", dropout_rate=0.1, num_classes=2, image_size=32)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  mlp_models.save(tmp_path / "w.safetensors", model, params)

  def resolve(*flags):
    config = importlib.import_module("configs.vit").get_config("finetune")
    knobs.override(config, [f"--config.init={tmp_path / 'w.safetensors'}", *flags])
    check.check_config(config)
    return pretrained.resolve(config).model

  resolved = resolve("--config.model.variant=Ti/16")
  assert (resolved.width, resolved.image_size, resolved.dropout_rate) == (192, 32, 0)
  assert resolved == resolve()
  with pytest.raises(ConfigError, match="variant = 'S/16': the weights .* are of Ti/16: leave it"):
    resolve("--config.model.variant=S/16")
  with pytest.raises(ConfigError, match="vit has no variant 'Ti/17'; did you mean 'Ti/16'"):
    resolve("--config.model.variant=Ti/17")


def test_variant_gives_the_sizes_that_the_config_leaves_out(smoke_config):
  config = smoke_config()
  config.model = {"name": "mixer", "variant": "keras", "width": 16}
  resolved = pretrained.resolve(config)
  assert (resolved.model.image_size, resolved.model.width) == (64, 16)
  assert pretrained.resolve(smoke_config()).to_json() == smoke_config().to_json()


def test_export_is_what_the_library_loads(finished_run, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr("train.export.start_jax", lambda config: None)
  file = tmp_path / "weights.safetensors"
  status, out, error = run(export, monkeypatch, capsys, "--workdir", finished_run, "--output", file)
  assert (status, error) == (0, "")
  assert "mixer, 12,836 parameters, 100 classes" in out
  trained = load_trained_model(epath.Path(finished_run), make_mesh())
  found = describe(file)
  assert (found.name, found.class_names) == ("mixer", trained.info.class_names)
  model, params, preprocessing = mlp_models.load(file, say=lambda line: None)
  assert model == trained.model
  jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(trained.weights.params))
  mean, deviation = 255 * np.array(preprocessing.mean), 255 * np.array(preprocessing.std)
  np.testing.assert_allclose(mean, trained.weights.mean, rtol=1e-5)
  np.testing.assert_allclose(deviation**2, trained.weights.variance, rtol=1e-5)


def test_export_without_a_place_is_one_line(finished_run, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr("train.export.start_jax", lambda config: None)
  for output in (tmp_path / "no" / "weights.safetensors", tmp_path / "weights.bin"):
    status, out, error = run(
      export, monkeypatch, capsys, "--workdir", finished_run, "--output", output
    )
    assert (status, out, error.count("\n")) == (1, "", 1)
    assert str(output) in error
