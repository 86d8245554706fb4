"""Every knob of a run, with its unit: the recipe that the Keras examples of MLP models share.

A model's file (`configs/mixer.py`, ...) starts from `get_config()` and changes what differs. On the
command line any knob is `--config.KEY=VALUE`; `configs/mixer.py:smoke` picks the variant `smoke`.
`--config.model.variant=B/16` takes the fields of the model from `mlp_models.VARIANTS` instead;
fields given by other flags count more.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
  """The shared recipe, without a model: configs/MODEL.py adds `config.model`."""
  config = ConfigDict()
  # Weights to start a new run from: a file, a folder, another run's workdir or hf://ORG/NAME, as
  # `mlp_models.load` reads them. What `model` does not give comes from them. "": random weights.
  config.init = ""
  # What does not train: beginnings of parameters' paths, as in patch_embed,block0; "backbone" is
  # all but the head.
  config.freeze = ()
  config.seed = 0  # for everything random: initial weights, order, augmentation, dropout
  config.epochs = 50  # passes over the training split
  config.batch_size = 128  # images per step, over all devices
  # Images that a device computes at a time; their gradients are summed for one update of the
  # weights. None: a device's whole part of the batch; on a CPU core at most `cpu_microbatch`.
  config.microbatch = config_dict.placeholder(int)
  config.cpu_microbatch = 8  # small, so that activations stay in a core's cache
  # Steps in one dispatch: raise it if a step takes less time than the host needs to start it. A
  # signal takes effect after them; an epoch's last, shorter call is a second program to compile.
  config.steps_per_call = 1
  config.dtype = "float32"  # or "bfloat16": activations, matrix products; weights are float32
  config.compilation_cache = True  # keep compiled steps in ~/.cache/mlp_models for the next run
  # Keep only each block's inputs for the backward pass and recompute the rest: less memory, one
  # more forward pass.
  config.remat = False

  # Devices along each axis; -1: all that the other leaves. The batch is sharded over both. `fsdp`
  # also shards parameters and optimizer state: less memory, but each step gathers the parameters.
  config.mesh = ConfigDict()
  config.mesh.data = -1
  config.mesh.fsdp = 1

  config.data = _data()

  config.augment = _augment()
  # What the label's class gives to all classes alike, in training. Training's loss is then against
  # these targets, also of mixed images, and its accuracy against the class with the largest share.
  config.label_smoothing = 0.0

  config.optimizer = _optimizer()
  config.schedule = _schedule()

  config.plateau = ConfigDict()  # the learning rate falls when val_loss does not
  config.plateau.factor = 0.5  # multiplies the learning rate; 1.0: it never changes
  config.plateau.patience = 5  # epochs without improvement
  config.plateau.min_delta = 1e-4  # absolute; less than this is no improvement

  # Of an exponential moving average of the weights, which is then what is evaluated, kept as the
  # best and used by all commands: 0.999 or 0.9999, less at first. 0.0: none.
  config.ema_decay = 0.0

  config.best_metric = "val_loss"  # which epoch's weights are kept: "val_loss" or "val_accuracy"
  # Epochs without a new best after which training stops; 0: train all epochs.
  config.early_stop_patience = 10

  # If a loss or gradient is NaN or infinite: "stop" ends the run before that update and says where
  # it began; "skip" leaves the update out, counts it and goes on.
  config.nonfinite = "stop"

  config.checkpoint_seconds = 300.0  # between checkpoints in an epoch; every epoch ends with one
  return config


def _augment() -> ConfigDict:
  augment = ConfigDict()
  augment.flip = True  # mirror half of the images left to right
  augment.zoom = 0.2  # height and width, each by a factor within 1 +- zoom
  augment.rotation = 0.0  # within +- this fraction of a full turn
  augment.shift = 0.0  # down and to the right, each within +- this fraction of the side
  # Least area of a random crop, as a fraction of the image in memory: usually 0.08 or 0.3.
  # 0.0: none, training sees what evaluation does.
  augment.crop = 0.0
  augment.crop_aspect = 4 / 3  # most width / height of a crop, and height / width
  # RandAugment: so many of its 14 operations on each image, 2 in the paper; 0: none.
  augment.randaugment_ops = 0
  augment.randaugment_magnitude = 9  # of all of them, from 0 to 30
  augment.trivial_augment = False  # TrivialAugment (Wide): one operation, at any magnitude
  augment.erase = 0.0  # the part of the images of which a rectangle becomes the mean colour
  # Mixing of neighbours in the batch, images and targets alike: shares are drawn from
  # Beta(alpha, alpha), alpha being 1.0 or less as a rule; 0.0: none. If both are on, half of the
  # mixed pairs are CutMix. A device's microbatch must be even.
  augment.mixup = 0.0  # alpha of MixUp: both images all over
  augment.cutmix = 0.0  # alpha of CutMix: a box of the one in the other
  augment.mix_probability = 1.0  # of a pair to be mixed, where one of the two is on
  return augment


def _optimizer() -> ConfigDict:
  optimizer = ConfigDict()
  # "adamw"; "lamb"; "lion" (wants about a tenth of AdamW's learning rate, ten times its decay, and
  # b2 = 0.99); "sgd" with momentum; or "muon": the blocks' matrices by Muon, all else by AdamW.
  optimizer.name = "adamw"
  optimizer.learning_rate = 1e-3
  optimizer.weight_decay = 1e-4  # per step, times the learning rate (Keras 3, optax)
  optimizer.independent_weight_decay = False  # True: not times the learning rate (TF Addons)
  # What decays: "all" (Keras), or "kernels": neither biases nor norms, positions, tokens, latents.
  optimizer.decay = "all"
  optimizer.clip_norm = 0.0  # largest norm of all gradients together; 0.0: no limit
  optimizer.b1 = 0.9  # of the mean gradient in adamw, lamb, lion, and muon's adamw
  optimizer.b2 = 0.999  # of the mean squared gradient in all of them; of the gradient in lion
  optimizer.epsilon = 1e-7  # Keras' default; optax has 1e-8, LAMB's paper 1e-6
  optimizer.momentum = 0.95  # in muon and sgd; the papers' sgd has 0.9
  optimizer.nesterov = True  # in muon and sgd; the papers' sgd has False
  # Multiplies the learning rate once for each block from the top down: less than 1 keeps the lower
  # layers of weights that have learned before. 1.0: all learn alike.
  optimizer.layer_decay = 1.0
  return optimizer


def _schedule() -> ConfigDict:
  """What the learning rate is multiplied by, step by step, beside the plateau."""
  schedule = ConfigDict()
  # After the warm-up: "plateau" and "constant" stay (the former falls by `config.plateau`, the
  # latter never), "linear" and "cosine" fall to `final` at the last step of all epochs. A run under
  # these two, or with a warmup_fraction, can't go on for more epochs. "linear" and "cosine" need no
  # plateau: config.plateau.factor = 1.0, nor early stopping: config.early_stop_patience = 0.
  schedule.name = "plateau"
  schedule.warmup_steps = 0  # steps in which the rate rises linearly
  schedule.warmup_fraction = 0.0  # the same, as a fraction of all steps; give one of the two
  schedule.final = 0.0  # what "linear" and "cosine" multiply the learning rate by in the last step
  return schedule


def _data() -> ConfigDict:
  data = ConfigDict()
  # Any TFDS image classification set; "shapes100" is built in; "folder:PATH" is an image folder,
  # PATH/{train,test}/CLASS/FILE or PATH/CLASS/FILE; PNG, JPEG, WebP, BMP, GIF or TIFF.
  data.name = "cifar100"
  data.skip_broken = False  # leave out a folder's images that can't be decoded
  data.background = "white"  # a name or #rrggbb: under what is transparent in a folder's images
  data.data_dir = ""  # TFDS's folder; "": $TFDS_DATA_DIR or ~/tensorflow_datasets
  data.archive = ""  # CIFAR archive on disk to prepare from, instead of a download
  data.fallback = ""  # dataset to use if `name` is not prepared and can't be downloaded
  # Side in pixels of images in memory, squares cut from the centre; above the model's image_size it
  # leaves detail for random crops. None: `crop` of it is image_size. But images that all have one
  # size, such as CIFAR's, keep it, unless they are photos of more than 512 pixels a side.
  data.decode_size = config_dict.placeholder(int)
  # The fraction of the shorter side that evaluation sees, around the centre. None: as the weights
  # of `init` want it, else 1.0.
  data.crop = config_dict.placeholder(float)
  data.crop_mode = "center"  # keep the aspect; "squash": see both sides, made square
  # "bilinear" as Keras: the device does not antialias, so decode_size should be near image_size; or
  # "bicubic" as Pillow, with antialiasing. Decoding always antialiases. None: as the weights of
  # `init` want it, else "bilinear".
  data.interpolation = config_dict.placeholder(str)
  # With which images are normalised, in pixel units (0 to 255): one value, or one for each channel.
  # (): as the weights of `init` want it, else of the training images.
  data.mean = ()
  data.variance = ()
  # Memory limit in bytes, summed over a host's processes; larger sets are streamed. None: a quarter
  # of the memory.
  data.in_memory_bytes = config_dict.placeholder(int)
  # Worker processes that decode streamed images, per process of the run. None: half the number of
  # cores, at most 16 on a host.
  data.workers = config_dict.placeholder(int)
  # In TFDS's notation, such as "train[:90%]". None: by what the dataset has. With only `train` and
  # `test`, the last tenth of `train` validates, as with Keras' validation_split=0.1.
  data.train_split = config_dict.placeholder(str)
  data.validation_split = config_dict.placeholder(str)
  data.test_split = config_dict.placeholder(str)
  data.max_images = config_dict.placeholder(int)  # of each split, the first ones; None: all
  return data


def apply_variant(config: ConfigDict, variant: str | None, variants: dict[str, dict]) -> ConfigDict:
  """Returns `config` with the overrides of `variants[variant]` (dotted keys); None: unchanged.

  Raises:
    ValueError: the variant is not among `variants`.
  """
  if variant and variant not in variants:
    raise ValueError(f"variant {variant!r} is unknown: choose one of {', '.join(variants)}")
  config.update_from_flattened_dict(variants[variant] if variant else {})
  return config


def finetune(name: str, **fields: Any) -> ConfigDict:
  """The recipe for fine-tuning the weights in `config.init`: what the papers' tables share.

  No weight decay, no dropout, flips and crops (Dosovitskiy et al., arXiv:2010.11929, table 4;
  Tolstikhin et al., arXiv:2105.01601, section 3). They use SGD with momentum, 512 images a step for
  500 to 20,000 steps, a cosine schedule and gradients clipped to a norm of 1. Here it is AdamW,
  whose learning rate is lower for lower layers (He et al., arXiv:2111.06377, table 9); 128 images a
  step leave a small set enough steps in an epoch.

  Args:
    name: of the family.
    **fields: of the model that the weights do not decide. A placeholder: they do, unless a flag
      says otherwise, as it may where nothing beside the weights tells.
  """
  config = get_config()
  config.init = config_dict.required_placeholder(str)
  config.model = {
    "name": name,
    "image_size": config_dict.placeholder(int),
    "gelu": config_dict.placeholder(str),  # a bare file does not tell
    **fields,
  }
  config.epochs = 20
  config.optimizer.learning_rate = 3e-4
  config.optimizer.weight_decay = 0.0
  config.optimizer.layer_decay = 0.75
  config.optimizer.clip_norm = 1.0
  config.schedule.name = "cosine"
  config.schedule.warmup_fraction = 0.1
  config.plateau.factor = 1.0
  config.early_stop_patience = 0
  config.augment.zoom = 0.0
  config.augment.crop = 0.3
  return config


def imagenet(name: str, variant: str, **fields: Any) -> ConfigDict:
  """What the papers' recipes for ImageNet share, for a TPU slice or several GPUs.

  Random crops and flips of 224 pixels; no dropout; a decay of kernels alone; gradients clipped to a
  norm of 1; a cosine after 10,000 steps of warm-up; the weights of the epoch with the best accuracy
  on the last 1 % of the training images. Crops are of the images' centre squares, where the papers'
  are of whole images. `batch_size`, `epochs`, the optimizer, RandAugment and mixing are the
  caller's. The papers' magnitudes of RandAugment end at 10, ours at 30.

  Args:
    name, variant: of mlp_models.VARIANTS.
    **fields: of the model that differ from the variant's.
  """
  config = get_config()
  config.model = {"name": name, "variant": variant, "image_size": 224} | fields
  config.data.name = "imagenet2012"
  config.data.train_split = "train[:99%]"
  config.data.validation_split = "train[99%:]"
  config.data.test_split = "validation"  # the labels of ImageNet's "test" are not public
  config.data.crop = 0.875  # 224 of 256 pixels
  config.data.mean, config.data.variance = (127.5,), (127.5**2,)  # pixels from -1 to 1
  config.dtype = "bfloat16"
  config.augment.zoom = 0.0
  config.augment.crop = 0.05
  config.optimizer.decay = "kernels"
  config.optimizer.clip_norm = 1.0
  config.schedule.name = "cosine"
  config.schedule.warmup_steps = 10_000
  config.plateau.factor = 1.0
  config.best_metric = "val_accuracy"
  config.early_stop_patience = 0
  return config


# A run of a few seconds that uses everything: two epochs of 512 images, or what there is.
SMOKE: dict[str, Any] = {"epochs": 2, "batch_size": 64, "data.max_images": 512}

# What has replaced the examples' recipe since: a schedule instead of the plateau, mixed images and
# smoothed targets instead of dropout, and Muon on the blocks' matrices.
STRONG: dict[str, Any] = {
  "schedule.name": "linear",
  "schedule.warmup_fraction": 0.08,
  "plateau.factor": 1.0,
  "early_stop_patience": 0,
  "best_metric": "val_accuracy",
  "label_smoothing": 0.1,
  "augment.shift": 0.1,
  "augment.mixup": 1.0,
  "augment.cutmix": 1.0,
  "augment.mix_probability": 0.5,
  "optimizer.name": "muon",
  "optimizer.decay": "kernels",
  "optimizer.weight_decay": 0.05,
}
