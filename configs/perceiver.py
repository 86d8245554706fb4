"""Perceiver (Jaegle et al., arXiv:2103.03206) as in the Keras example, on CIFAR-100.

    python -m train.main --config configs/perceiver.py --workdir runs/perceiver

9,697,637 parameters, 31 GFLOP per image and step. Keras publishes 53 % top-1, 81 % top-5
after 40 epochs (with weight decay not multiplied by the learning rate:
--config.optimizer.independent_weight_decay=True). Variants: small (for a laptop), smoke (seconds),
imagenet (the paper's model, for a TPU slice; docs/planning.md says which), finetune (weights on
other images, with --config.init=FILE).
"""

from ml_collections import config_dict

from configs import default


def get_config(variant=None):
  if variant == "finetune":
    return default.finetune(
      "perceiver",
      dropout_rate=0.0,
      attention_dropout_rate=0.0,
      num_heads=config_dict.placeholder(int),
      num_cross_heads=config_dict.placeholder(int),
      num_iterations=config_dict.placeholder(int),
    )
  if variant == "imagenet":
    return _imagenet()
  config = default.get_config()
  config.model = {
    "name": "perceiver",
    "image_size": 64,  # images are resized to this height and width, in pixels
    "patch_size": 2,  # pixels a side: 1,024 tokens
    "width": 256,  # channels of a token and of a latent
    "num_latents": 256,
    "num_heads": 8,  # in latent blocks, each as wide as the model; cross-attention has one
    "num_blocks": 4,  # latent blocks after each cross-attention
    "num_iterations": 2,  # repeats of cross-attention and latent blocks, with the same weights
    "ffn_units": (256, 256),  # widths of the layers of each feed-forward network
    "attention_dropout_rate": 0.1,
    "dropout_rate": 0.2,
  }
  config.batch_size = 64
  config.cpu_microbatch = 4  # the fastest gradients
  config.optimizer.learning_rate = 1e-3
  config.plateau.factor = 0.2
  config.plateau.patience = 3
  config.early_stop_patience = 15
  variants = {"small": SMALL, "smoke": default.SMOKE | SMOKE, "imagenet": {}, "finetune": {}}
  return default.apply_variant(config, variant, variants)


SMALL = {
  "model.patch_size": 4,
  "model.width": 128,
  "model.num_latents": 32,
  "model.num_heads": 2,
  "model.num_blocks": 2,
  "model.ffn_units": (128, 128),
  # At 1e-3 these sizes fall back to chance in their second epoch; built with Keras' layers they
  # reach at most 2 % top-1 in the first.
  "optimizer.learning_rate": 3e-4,
}
SMOKE = {
  "model.image_size": 32,
  "model.patch_size": 4,
  "model.width": 32,
  "model.num_latents": 16,
  "model.num_heads": 2,
  "model.num_blocks": 2,
  "model.ffn_units": (32, 32),
}


def _imagenet():
  """The paper's model and optimizer on ImageNet-1k (section 4.1); 78.0 % top-1 in the paper.

  Eight cross-attends, all but the first with the same weights, and after each of them six latent
  blocks with eight heads; each of the 50,176 pixels is a token. LAMB at 0.004 for 120 epochs; its
  decay, clipping and epsilon are from the authors' code for Perceiver IO
  (deepmind-research/perceiver/train), as the paper does not name them, and so is RandAugment's
  strength. That code also has CutMix, MixUp and smoothed labels, and lets the latents decay, which
  this recipe does not. The paper lowers the rate to a tenth after 84, 102 and 114 epochs: here it
  is a cosine. Not trained here.
  """
  fields = {"attention_dropout_rate": 0.0, "dropout_rate": 0.0, "drop_path_rate": 0.0}
  config = default.imagenet("perceiver", "paper", **fields)
  config.batch_size = 1024
  config.epochs = 120
  config.microbatch = 4  # one image's keys and values alone take 0.1 GB
  config.optimizer.name = "lamb"
  config.optimizer.learning_rate = 4e-3
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip_norm = 10.0
  config.optimizer.epsilon = 1e-6
  config.schedule.warmup_steps = 0
  config.augment.randaugment_ops = 4
  config.augment.randaugment_magnitude = 15
  return config
