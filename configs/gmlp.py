"""gMLP (Liu et al., arXiv:2105.08050) as in the Keras example, on CIFAR-100.

    python -m train.main --config configs/gmlp.py --workdir runs/gmlp

885,348 parameters. Keras publishes 50.6 % top-1 after 50 epochs (with weight decay not multiplied
by the learning rate: --config.optimizer.independent_weight_decay=True). Variants: strong (a modern
recipe of 100 epochs, not yet measured to its end), smoke (seconds), finetune (weights on other
images, with --config.init=FILE), imagenet (the paper's S/16, for a TPU slice; not trained here).
"""

from configs import default


def get_config(variant=None):
  if variant == "finetune":
    return default.finetune("gmlp", dropout_rate=0.0, drop_path_rate=0.0)
  if variant == "imagenet":
    return _imagenet()
  config = default.get_config()
  config.model = {
    "name": "gmlp",
    "image_size": 64,  # images are resized to this height and width, in pixels
    "patch_size": 8,  # pixels a side
    "width": 256,  # channels of a token
    "num_blocks": 4,
    "dropout_rate": 0.2,
  }
  config.cpu_microbatch = 4  # the fastest by train.bench --tune
  config.optimizer.learning_rate = 3e-3
  smoke = {"model.image_size": 32, "model.width": 32, "model.num_blocks": 2}
  variants = {
    "smoke": default.SMOKE | smoke,
    "strong": default.STRONG | {"epochs": 100, "model.dropout_rate": 0.0},
    "finetune": {},
    "imagenet": {},
  }
  return default.apply_variant(config, variant, variants)


def _imagenet():
  """gMLP S/16 on ImageNet-1k as in the paper's appendix A; 79.6 % top-1 in the paper, 300 epochs.

  The paper has AutoAugment, which is not here: RandAugment with its usual values takes its place.
  """
  config = default.imagenet("gmlp", "S/16")  # with a stochastic depth of 0.05
  config.batch_size = 4096
  config.epochs = 300
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 0.05
  config.optimizer.epsilon = 1e-6
  config.augment.randaugment_ops = 2
  config.augment.randaugment_magnitude = 9
  config.augment.mixup = 0.8
  config.augment.cutmix = 1.0
  config.label_smoothing = 0.1
  return config
