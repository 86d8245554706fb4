"""Vision Transformer (Dosovitskiy et al., arXiv:2010.11929) as in the Keras example, on CIFAR-100.

    python -m train.main --config configs/vit.py --workdir runs/vit

21,759,012 parameters, 19 million of them in the head. Keras publishes 55 % top-1, 82 % top-5 after
100 epochs (with weight decay not multiplied by the learning rate:
--config.optimizer.independent_weight_decay=True). Variants: small (for a laptop), smoke (seconds),
tiny (the paper's architecture for 32 pixels), finetune (weights on other images; default.py says
where its recipe comes from):

    python -m train.main --config configs/vit.py:finetune --config.init=FILE \
      --config.data.name=folder:PATH

and imagenet (S/16 of "Better plain ViT baselines", for eight TPU cores; not trained here).
"""

from ml_collections import config_dict

from configs import default


def get_config(variant=None):
  if variant == "tiny":
    return _tiny()
  if variant == "imagenet":
    return _imagenet()
  if variant == "finetune":
    return default.finetune(
      "vit",
      dropout_rate=0.0,
      attention_dropout_rate=0.0,
      head_dropout_rate=0.0,
      drop_path_rate=0.0,
      num_heads=config_dict.placeholder(int),
      pool=config_dict.placeholder(str),
    )
  config = default.get_config()
  config.model = {
    "name": "vit",
    "image_size": 72,  # images are resized to this height and width, in pixels
    "patch_size": 6,  # pixels a side: 144 tokens
    "width": 64,  # channels of a token
    "num_blocks": 8,
    "num_heads": 4,
    "head_dim": 64,  # channels of a query, key or value
    "mlp_units": (128, 64),  # widths of the layers of each block's MLP
    "head_units": (2048, 1024),  # widths of the hidden layers of the classifier
    "pool": "flatten",  # tokens -> one vector: "flatten" or "mean"
    "attention_dropout_rate": 0.1,
    "dropout_rate": 0.1,
    "head_dropout_rate": 0.5,
  }
  config.batch_size = 256
  config.epochs = 100
  config.cpu_microbatch = 16  # the fastest by train.bench --tune
  # On a CPU, XLA maps its memory anew for each call; two steps per call halve that.
  config.steps_per_call = 2
  config.optimizer.learning_rate = 1e-3
  config.augment.rotation = 0.02
  config.plateau.factor = 1.0
  config.early_stop_patience = 0
  config.best_metric = "val_accuracy"
  small = {
    "batch_size": 128,
    "model.image_size": 48,
    "model.num_blocks": 4,
    "model.head_units": (512, 256),
  }
  smoke = {
    "model.image_size": 32,
    "model.patch_size": 8,
    "model.width": 32,
    "model.num_blocks": 2,
    "model.num_heads": 2,
    "model.head_dim": 16,
    "model.mlp_units": (64, 32),
    "model.head_units": (64, 32),
  }
  variants = {"small": small, "smoke": default.SMOKE | smoke}
  variants |= {"finetune": {}, "tiny": {}, "imagenet": {}}
  return default.apply_variant(config, variant, variants)


def _tiny():
  """The paper's architecture for images of 32 pixels, to train on two CPU cores within an hour."""
  config = default.get_config()
  config.model = {
    "name": "vit",
    "variant": "Ti/16",
    "image_size": 32,
    "patch_size": 4,  # pixels a side: 64 tokens
    "width": 128,
    "mlp_units": (512, 128),
    "num_heads": 2,
    "num_blocks": 6,
    "pool": "mean",
    "drop_path_rate": 0.1,
  }
  config.epochs = 30
  config.cpu_microbatch = 8
  config.optimizer.weight_decay = 0.05
  config.plateau.patience = 2
  config.best_metric = "val_accuracy"
  return config


def _imagenet():
  """S/16 on ImageNet-1k in 90 epochs (Beyer et al., "Better plain ViT baselines", 2205.01580).

  The figures are those of its authors' config, big_vision/configs/vit_s16_i1k.py, which names
  76.5 % top-1 after 6 to 7 hours on a TPU v3-8. Its decay of 1e-4 is not times the learning rate:
  here that is 0.1.
  """
  config = default.imagenet("vit", "S/16 plain")
  config.batch_size = 1024
  config.epochs = 90
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 0.1
  config.augment.randaugment_ops = 2
  config.augment.randaugment_magnitude = 30
  config.augment.mixup = 0.2
  return config
