"""FNet (Lee-Thorp et al., arXiv:2105.03824) as in the Keras example, on CIFAR-100.

    python -m train.main --config configs/fnet.py --workdir runs/fnet

621,924 parameters. Keras publishes 46.6 % top-1 after 50 epochs (with weight decay not multiplied
by the learning rate: --config.optimizer.independent_weight_decay=True). Variants: smoke (seconds),
finetune (weights on other images, with --config.init=FILE).
"""

from configs import default


def get_config(variant=None):
  if variant == "finetune":
    return default.finetune("fnet", dropout_rate=0.0, drop_path_rate=0.0)
  config = default.get_config()
  config.model = {
    "name": "fnet",
    "image_size": 64,  # images are resized to this height and width, in pixels
    "patch_size": 8,  # pixels a side
    "width": 256,  # channels of a token
    "num_blocks": 4,
    "dropout_rate": 0.2,
  }
  config.optimizer.learning_rate = 1e-3
  smoke = {"model.image_size": 32, "model.width": 32, "model.num_blocks": 2}
  return default.apply_variant(config, variant, {"smoke": default.SMOKE | smoke, "finetune": {}})
