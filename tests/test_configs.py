"""Each config is the recipe of its Keras example."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mlp_models
from train import knobs, pretrained
from train.check import check_config
from train.data import __main__ as show
from train.errors import ConfigError
from train.state import make_model

#             learning rate, batch, epochs, factor, plateau patience, early stop, best
RECIPES = {
  "mixer": (5e-3, 128, 50, 0.5, 5, 10, "val_loss"),
  "fnet": (1e-3, 128, 50, 0.5, 5, 10, "val_loss"),
  "gmlp": (3e-3, 128, 50, 0.5, 5, 10, "val_loss"),
  "perceiver": (1e-3, 64, 50, 0.2, 3, 15, "val_loss"),
  "vit": (1e-3, 256, 100, 1.0, 5, 0, "val_accuracy"),
}


def get_config(name, variant=None):
  return importlib.import_module(f"configs.{name}").get_config(variant)


@pytest.mark.parametrize("name", mlp_models.MODELS)
def test_recipe_is_that_of_the_keras_example(name):
  config = get_config(name)
  assert RECIPES[name] == (
    config.optimizer.learning_rate,
    config.batch_size,
    config.epochs,
    config.plateau.factor,
    config.plateau.patience,
    config.early_stop_patience,
    config.best_metric,
  )
  assert config.optimizer.epsilon == 1e-7
  assert config.optimizer.weight_decay == 1e-4
  assert not config.optimizer.independent_weight_decay
  assert config.augment.to_dict() == {
    "flip": True,
    "zoom": 0.2,
    "rotation": 0.02 if name == "vit" else 0.0,
    "shift": 0.0,
    "crop": 0.0,
    "crop_aspect": 4 / 3,
    "randaugment_ops": 0,
    "randaugment_magnitude": 9,
    "trivial_augment": False,
    "erase": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "mix_probability": 1.0,
  }


@pytest.mark.parametrize("name", mlp_models.MODELS)
def test_config_and_library_agree_on_the_default_sizes(name):
  sizes = get_config(name).model.to_dict()
  assert mlp_models.create(**sizes) == mlp_models.create(name)
  assert {"image_size", "patch_size", "width", "num_blocks", "dropout_rate"} <= set(sizes)


@pytest.mark.parametrize(
  ("name", "variant"),
  [(name, "smoke") for name in mlp_models.MODELS] + [("perceiver", "small"), ("vit", "small")],
)
def test_variants_are_valid_and_smaller(name, variant):
  config = get_config(name, variant)
  check_config(config)
  assert config.model != get_config(name).model


def test_strong_recipe_has_no_plateau_and_no_dropout():
  config = get_config("gmlp", "strong")
  check_config(config)
  assert (config.schedule.name, config.plateau.factor, config.early_stop_patience) == (
    "linear",
    1,
    0,
  )
  assert (config.model.dropout_rate, config.optimizer.name) == (0, "muon")


def test_variant_by_a_flag_brings_its_own_sizes_and_other_flags_count_more():
  flags = ("model.image_size=64", "model.variant=B/16", "model.mlp_units=96,768")
  config = get_config("vit")
  knobs.override(config, [f"--config.{flag}" for flag in flags])
  check_config(config)
  sizes = {"image_size": 64, "mlp_units": (96, 768)}
  expected = mlp_models.create("vit", "B/16", num_classes=100, **sizes)
  assert make_model(pretrained.resolve(config), 100) == expected
  assert expected.dropout_rate == 0 and expected.width == 768


def test_unknown_variant_is_one_line():
  config = get_config("mixer")
  knobs.override(config, ["--config.model.variant", "B/17"])
  with pytest.raises(ConfigError, match="mixer has no variant 'B/17'; did you mean 'B/16'"):
    check_config(config)


@pytest.mark.parametrize(
  "config",
  [
    ("configs/mixer.py:finetune", "--config.init={folder}/w.safetensors"),
    pytest.param(
      ("configs/perceiver.py", "--config.model.variant=io-fourier", "--config.model.image_size=16"),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_show_knows_the_sizes_that_weights_and_variants_give(config, tmp_path, monkeypatch, capsys):
  for n in range(10):
    (tmp_path / "set" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (20 * n, 0, 0)).save(tmp_path / "set" / "ab"[n % 2] / f"{n}.png")
  model = mlp_models.create("mixer", image_size=16, patch_size=8, width=8, num_blocks=1)
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes["params"])
  mlp_models.save(tmp_path / "w.safetensors", model, params)
  output, name = tmp_path / "samples.png", f"--config.data.name=folder:{tmp_path / 'set'}"
  flags = (flag.format(folder=tmp_path) for flag in config)
  monkeypatch.setattr(sys, "argv", ["data", "show", f"--output={output}", name, "--config", *flags])
  show.main()
  assert f"Wrote {output}" in capsys.readouterr().out
  assert output.stat().st_size > 1000


#                             rule, learning rate, decay, clip, batch, epochs, parameters
IMAGENET = {
  "mixer": ("B/16", "adamw", 1e-3, 0.1, 1.0, 4096, 300, 59_880_472),
  "gmlp": ("S/16", "adamw", 1e-3, 0.05, 1.0, 4096, 300, 19_422_656),
  "perceiver": ("paper", "lamb", 4e-3, 0.1, 10.0, 1024, 120, 44_912_254),
  "vit": ("S/16 plain", "adamw", 1e-3, 0.1, 1.0, 1024, 90, 22_122_472),
}


@pytest.mark.parametrize("name", IMAGENET)
def test_recipes_for_imagenet_are_the_papers(name):
  config = get_config(name, "imagenet")
  check_config(config)
  variant, *recipe, parameters = IMAGENET[name]
  optimizer = config.optimizer
  assert config.model.variant == variant
  assert recipe == [
    optimizer.name,
    optimizer.learning_rate,
    optimizer.weight_decay,
    optimizer.clip_norm,
    config.batch_size,
    config.epochs,
  ]
  assert (optimizer.b1, optimizer.b2, optimizer.decay) == (0.9, 0.999, "kernels")
  model = mlp_models.create(**config.model)
  images = jnp.zeros((1, 224, 224, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters
