"""What a model is trained on: augmented images, and the targets that it should give.

A target is a share for each class. Without label smoothing and mixing there is one class for each
image, and its number, the label, is used instead: a step computes nothing that it does not need.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from train import augment
from train.augment import mixing
from train.state import Sums, TrainState

Array = jax.Array
Batch = dict[str, Array]  # image uint8 [B, H, W, C], label int32 [B], mask bool [B]
# (examples, key, positions, state) -> images and labels or targets: see `make_prepare`.
Prepare = Callable[[Batch, Array, Array, TrainState], tuple[Array, Array]]
_MIXING = 2**30  # no position in a batch is as large: other draws from the same key


def make_prepare(config: ConfigDict, num_classes: int) -> Prepare:
  """Makes (examples, key, positions, state) -> what the model is trained on.

  The function gives images (float32 [B, image_size, image_size, channels]) and targets (float32
  [B, num_classes]) or, if each is of one class, labels (int32 [B]). `key` is the step's and
  `positions` int32 [B] are the examples' in the global batch; `state` has the channels' statistics.
  """
  options = augment.options(config)
  mixed, smoothing = mixing.options(config), config.label_smoothing

  def prepare(examples: Batch, key: Array, positions: Array, state: TrainState):
    images = augment.augment(
      examples["image"],
      key,
      positions,
      mean=state.mean,
      variance=state.variance,
      image_size=config.model.image_size,
      **options,
    )
    if not (smoothing or mixed):
      return images, examples["label"]
    targets_BxC = targets(examples["label"], num_classes, smoothing)
    if mixed:
      mix_key = jax.random.fold_in(key, _MIXING)
      return mixing.mix(images, targets_BxC, mix_key, positions, examples["mask"], mixed)
    return images, targets_BxC

  return prepare


def targets(labels: Array, num_classes: int, smoothing: float = 0.0) -> Array:
  """The share of each class, float32 [B, C]: 1 - smoothing of the label's, the rest equally.

  The label's class has its part of the rest, too: 1 - smoothing + smoothing / C.

  Args:
    labels: int32 [B].
    smoothing: from 0 to below 1.
  Follows Szegedy et al. (arXiv:1512.00567, section 7).
  """
  return (1 - smoothing) * jax.nn.one_hot(labels, num_classes) + smoothing / num_classes


def sum_metrics(logits: Array, labels: Array, mask: Array) -> Sums:
  """Cross-entropy and top-1 and top-5 hits, summed.

  Args:
    logits: float32 [B, C].
    labels: int32 [B], or targets, float32 [B, C], whose largest share is then the label.
    mask: bool [B]; examples whose mask is False are ignored.
  """
  if labels.ndim == 2:
    losses, labels = optax.softmax_cross_entropy(logits, labels), labels.argmax(1)
  else:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  label_logits = jnp.take_along_axis(logits, labels[:, None], axis=1)
  ties_before = (logits == label_logits) & (jnp.arange(logits.shape[1]) < labels[:, None])
  better = (~(logits <= label_logits) | ties_before).sum(axis=1)  # NaN is better: never a hit
  total = functools.partial(jnp.sum, where=mask, dtype=jnp.float32)
  return Sums(total(losses), total(better < 1), total(better < 5), total(mask))
