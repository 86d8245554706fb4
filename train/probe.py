"""What a model's frozen features tell of classes: a linear probe, and the nearest neighbours.

Shapes: N images that train, M images that are judged, D features, C classes.
"""

import dataclasses
import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train import data, pretrained
from train.data import Dataset, statistics
from train.data.batches import eval_batches
from train.data.framing import Framing
from train.data.splits import AnySplit
from train.devices.mesh import fitting_sizes, replicated
from train.run.checkpoint import TrainedModel
from train.state import Weights, abstract_state, make_init, make_model
from train.step import eval_logits

Array = jax.Array

_STRENGTHS = tuple(10.0**power for power in range(0, -7, -1))  # of the regularisation, each tried
_STEPS = 200  # of L-BFGS, at most
_SMALLEST_GRADIENT = 1e-5  # its norm, at which L-BFGS ends
_JUDGED_AT_A_TIME = 256  # images whose similarities to all others are held


class Linear(NamedTuple):
  """A linear classifier of standardised features."""

  kernel: Array  # float32 [D, C]
  bias: Array  # float32 [C]


def from_weights(config: ConfigDict, mesh: Mesh) -> tuple[TrainedModel, Dataset]:
  """The model of the weights in `config.init`, without its head, and the dataset of the config.

  Images are normalised and framed as a run would do it. Lines on stderr say what was found.

  Args:
    config: accepted by `check.check_config`.
  Raises:
    ConfigError: the weights can't be read, or do not fit the config or the images.
    DataError: the dataset is unavailable or broken.
  """
  config = pretrained.resolve(config).unlock()
  config.data = data.resolve(config.data)
  info = data.describe(config.data, image_size=config.model.image_size)
  headless = dataclasses.replace(info, class_names=())
  template = abstract_state(make_init(config, headless, mesh), headless)
  params = pretrained.load(config, headless, file=sys.stderr)
  params = pretrained.begin(template, params).params
  dataset = data.load(config.data, config.model.image_size)
  mean, variance = statistics.of_config(config.data, dataset["train"])
  weights = Weights(params, *jax.device_put((mean, variance), replicated(mesh)))
  return TrainedModel(config, headless, make_model(config, 0), weights), dataset


def probe(trained: TrainedModel, dataset: Dataset, split: str, mesh: Mesh) -> dict[str, Any]:
  """Accuracies of a linear probe and of the nearest neighbours, both on features of `train`.

  Args:
    trained: its head is not used.
    dataset: any, with `train`, `validation` (on which the probe's regularisation is chosen) and
      `split`; its classes need not be the model's.
  Returns:
    split, images (M), train_images (N), features (D), probe_accuracy and knn_accuracy (fractions),
    and the probe's l2.
  """
  model = trained.model.clone(num_classes=0)
  size = fitting_sizes(trained.config, mesh)[1] * mesh.size
  framing = Framing.of(trained.config.data)
  compute = functools.partial(
    features_and_labels, model, trained.weights, framing=framing, batch_size=size, mesh=mesh
  )
  num_classes = len(dataset.class_names)
  parts = {name: compute(dataset[name]) for name in {"train", "validation", split}}
  train, validation, judged = parts["train"], parts["validation"], parts[split]
  accuracy, l2 = linear_accuracy(train, validation, judged, num_classes)
  return {
    "split": split,
    "images": len(judged[1]),
    "train_images": len(train[1]),
    "features": train[0].shape[1],
    "probe_accuracy": accuracy,
    "probe_l2": l2,
    "knn_accuracy": knn_accuracy(train, judged, num_classes),
  }


def features_and_labels(
  model: nn.Module,
  weights: Weights,
  split: AnySplit,
  framing: Framing,
  batch_size: int,
  mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
  """Features (float32 [N, D]) and labels (int32 [N]) of a split, without augmentation.

  Args:
    model: has num_classes = 0.
    framing: which part of an image is seen.
    batch_size: a multiple of the devices.
  """
  step = jax.jit(functools.partial(eval_logits, model, framing=framing))
  features, labels = [], []
  for batch in eval_batches(split, batch_size, mesh):
    mask = np.asarray(batch["mask"])
    features.append(np.asarray(step(weights, batch["image"]))[mask])
    labels.append(np.asarray(batch["label"])[mask])
  return np.concatenate(features), np.concatenate(labels)


def knn_accuracy(
  train: tuple[np.ndarray, np.ndarray],
  judged: tuple[np.ndarray, np.ndarray],
  num_classes: int,
  k: int = 20,
  temperature: float = 0.07,
) -> float:
  """The accuracy (a fraction) of a vote of the nearest neighbours.

  Each of the k training images with the largest cosine similarity s votes with exp(s /
  temperature).

  Args:
    train, judged: features [N, D] and [M, D], and their labels.
  Follows Caron et al., "DINO" (arXiv:2104.14294), section 4.1; Wu et al. (arXiv:1805.01978),
  section 3.4.
  """
  k = min(k, len(train[1]))

  @jax.jit
  def vote(train_NxD: Array, labels_N: Array, judged_MxD: Array) -> Array:
    similarity_MxK, nearest_MxK = jax.lax.top_k(judged_MxD @ train_NxD.T, k)
    votes_MxK = jnp.exp((similarity_MxK - 1) / temperature)  # at most 1
    of_classes_MxKxC = jax.nn.one_hot(labels_N[nearest_MxK], num_classes)
    return jnp.einsum("mk,mkc->mc", votes_MxK, of_classes_MxKxC).argmax(1)

  train_NxD, labels_N = _unit(train[0]), train[1]
  hits = 0
  for start in range(0, len(judged[1]), _JUDGED_AT_A_TIME):
    part = slice(start, start + _JUDGED_AT_A_TIME)
    hits += int((vote(train_NxD, labels_N, _unit(judged[0][part])) == judged[1][part]).sum())
  return hits / len(judged[1])


def linear_accuracy(
  train: tuple[np.ndarray, np.ndarray],
  validation: tuple[np.ndarray, np.ndarray],
  judged: tuple[np.ndarray, np.ndarray],
  num_classes: int,
) -> tuple[float, float]:
  """The accuracy (a fraction) of a linear classifier of features, and the l2 of its `fit`.

  Features are standardised by those of `train`. Of several strengths of regularisation the one
  with the best accuracy on `validation` is taken, of equal ones the strongest.
  """
  mean, deviation = train[0].mean(axis=0), train[0].std(axis=0)
  deviation = np.where(deviation > 0, deviation, 1)
  train, validation, judged = (
    ((features - mean) / deviation, labels) for features, labels in (train, validation, judged)
  )
  size = train[0].shape[1]
  linear = Linear(jnp.zeros((size, num_classes)), jnp.zeros(num_classes))
  best, accuracy, chosen = -1.0, 0.0, 0.0
  for l2 in _STRENGTHS:  # each starts from the one before
    linear = fit(linear, *train, l2)
    if (found := _accuracy(linear, *validation)) > best:
      best, accuracy, chosen = found, _accuracy(linear, *judged), l2
  return accuracy, chosen


@jax.jit
def fit(start: Linear, features_NxD: Array, labels_N: Array, l2: float) -> Linear:
  """Multinomial logistic regression by L-BFGS.

  Minimises the mean cross-entropy plus l2 / 2 times the sum of the kernel's squares. The bias is
  free.

  Args:
    start: where to begin.
  """

  def loss(linear: Linear) -> Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(
      features_NxD @ linear.kernel + linear.bias, labels_N
    )
    return losses.mean() + 0.5 * l2 * (linear.kernel**2).sum()

  solver = optax.lbfgs()
  value_and_gradient = optax.value_and_grad_from_state(loss)

  def step(carry):
    linear, state = carry
    value, gradient = value_and_gradient(linear, state=state)
    updates, state = solver.update(
      gradient, state, linear, value=value, grad=gradient, value_fn=loss
    )
    return optax.apply_updates(linear, updates), state

  def goes_on(carry):
    count, gradient = (optax.tree.get(carry[1], name) for name in ("count", "grad"))
    large = optax.tree.norm(gradient) > _SMALLEST_GRADIENT
    return (count == 0) | ((count < _STEPS) & large)

  linear, _ = jax.lax.while_loop(goes_on, step, (start, solver.init(start)))
  return linear


def _accuracy(linear: Linear, features: np.ndarray, labels: np.ndarray) -> float:
  logits = features @ np.asarray(linear.kernel) + np.asarray(linear.bias)
  return float((logits.argmax(axis=1) == labels).mean())


def _unit(features: np.ndarray) -> np.ndarray:
  """Rows divided by their length."""
  return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
