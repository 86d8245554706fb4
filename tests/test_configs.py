"""Each config is the recipe of its Keras example."""

import importlib

import pytest

import mlp_models
from train.check import check_config

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
    "crop": 0.0,
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
