"""MLP-Mixer (Tolstikhin et al., arXiv:2105.01601) as in the Keras example, on CIFAR-100.

    python -m train.main --config configs/mixer.py --workdir runs/mixer

242,788 parameters. Keras publishes 47.6 % top-1 after 50 epochs (with weight decay not multiplied
by the learning rate: --config.optimizer.independent_weight_decay=True). Variants: smoke (seconds),
finetune (weights on other images; default.py says where its recipe comes from):

    python -m train.main --config configs/mixer.py:finetune --config.init=FILE \
      --config.data.name=folder:PATH
"""

from configs import default


def get_config(variant=None):
  if variant == "finetune":
    return default.finetune("mixer", dropout_rate=0.0, drop_path_rate=0.0)
  config = default.get_config()
  config.model = {
    "name": "mixer",
    "image_size": 64,  # images are resized to this height and width, in pixels
    "patch_size": 8,  # pixels a side
    "width": 256,  # channels of a token
    "num_blocks": 4,
    "dropout_rate": 0.2,
  }
  config.cpu_microbatch = 2  # the fastest by train.bench --tune
  config.optimizer.learning_rate = 5e-3
  smoke = {"model.image_size": 32, "model.width": 32, "model.num_blocks": 2}
  variants = {"smoke": default.SMOKE | smoke, "finetune": {}}
  return default.apply_variant(config, variant, variants)
