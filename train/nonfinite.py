"""Ends a run whose loss, gradients or parameters are not finite, and writes down where it began.

workdir/nonfinite.json names the step, the layers with the largest gradients and the images. Every
process of a run comes to the same decision; the first one writes.
"""

import functools
import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train import schedule
from train.augment import mixing
from train.data import Dataset
from train.data.batches import eval_batches, image_numbers
from train.data.framing import Framing
from train.devices.mesh import replicated
from train.devices.reduction import sum_over_batch
from train.errors import StorageError, TrainingFailed, first_line
from train.optimizer import split_frozen
from train.run.metrics import number_for_json
from train.run.storage import write_atomically
from train.run.workdir import NONFINITE
from train.state import Sums, TrainState, Weights
from train.step import Batch, eval_logits, make_gradients, overflow, total_steps
from train.targets import Prepare, make_prepare

Array = jax.Array
_ADVICE = "try a smaller --config.optimizer.learning_rate in another --workdir"


class Guard:
  """Looks at what a run has computed; what it needs for a diagnosis is compiled only then.

  Args:
    microbatch: images that a device computes at a time.
  """

  def __init__(
    self,
    config: ConfigDict,
    model: nn.Module,
    dataset: Dataset,
    microbatch: int,
    mesh: Mesh,
    folder: epath.Path,
  ):
    self._config, self._dataset, self._folder, self._mesh = config, dataset, folder, mesh
    self._stops = config.nonfinite == "stop"
    jit = functools.partial(jax.jit, out_shardings=replicated(mesh))
    self._all_finite = jit(lambda params: jnp.stack(jax.tree.leaves(_finite(params))).all())
    self._diagnose = jit(
      functools.partial(
        diagnose,
        model=model,
        prepare=make_prepare(config, model.num_classes),
        freeze=config.freeze,
        microbatch=2 if mixing.options(config) else 1,
        mesh=mesh,
      )
    )
    self._losses_not_finite = jit(
      functools.partial(
        losses_not_finite,
        model=model,
        framing=Framing.of(config.data),
        microbatch=microbatch,
        mesh=mesh,
      )
    )

  def look_at_losses(self, state: TrainState, batches: Batch, losses: Array) -> None:
    """Ends the run if a step was not finite, unless such steps are skipped.

    Args:
      state: after this call of the train step, or after a later one: a stopped state stays.
      batches: of the call: image [K, B, H, W, C] and so on.
      losses: float32 [K], of the call; NaN where no update was made.
    Raises:
      TrainingFailed: NONFINITE says where it began.
    """
    if self._stops and not (finite := np.isfinite(losses)).all():
      self._end_training(state, batches, int(finite.argmin()))

  def look_at_state(self, state: TrainState, batches: Batch, losses: Array) -> None:
    """Ends the run, before the state is saved, if it is not finite: see `look_at_losses`.

    Parameters that are not finite end the run even if such steps are skipped: all would be.
    """
    self.look_at_losses(state, batches, losses)
    if not self._all_finite(state.params):
      self._end_training(state, batches, len(losses) - 1)

  def look_at_validation(self, state: TrainState, loss: float) -> None:
    """Ends the run if the validation loss is not finite, unless such steps are skipped.

    Raises:
      TrainingFailed: NONFINITE names the images.
    """
    if math.isfinite(loss) or not self._stops:
      return
    size, split = self._config.batch_size, self._dataset["validation"]
    weights, images = state.weights(), []
    for number, batch in enumerate(eval_batches(split, size, self._mesh)):
      found = np.flatnonzero(self._losses_not_finite(weights, batch))
      images += (number * size + found).tolist()
    report = {
      "split": "validation",
      **self._place(state),
      "loss": number_for_json(loss),
      "images": images,
    }
    report["parameters"] = _names(jax.jit(_finite)(state.params))
    self._end(
      f"step {report['step']}: the loss on the validation images is not finite "
      f"({len(images)} of {len(split)} images), though training's is",
      report,
    )

  def _end_training(self, state: TrainState, batches: Batch, index: int) -> NoReturn:
    """Ends the run after the step that computed with `batches[index]`."""
    try:
      found = jax.device_get(self._diagnose(state, batches, index))
    except jax.errors.JaxRuntimeError as error:  # no memory left: must not hide why the run ends
      report = {"split": "train", **self._place(state), "diagnosis_failed": first_line(error)}
      self._end(f"step {report['step']}: the loss or a gradient is not finite", report)
    layers = _layers(found)
    parameters = _names(found["finite"])
    number = _last_step(state)
    report = {
      "split": "train",
      **self._place(state),
      "step": number,
      "loss": number_for_json(found["loss"]),
      "layers": layers,
      "examples": np.flatnonzero(found["bad"]).tolist(),
      "parameters": parameters,
    }
    report["images"] = image_numbers(
      len(self._dataset["train"]),
      self._config.batch_size,
      self._config.seed,
      number,
      np.array(report["examples"], int),
    ).tolist()
    what = f"parameters such as {parameters[0]} are" if parameters else "the loss or a gradient is"
    self._end(
      f"step {report['step']}: {what} not finite: training diverged; "
      f"the largest gradient is in {layers[0]['name']}",
      report,
    )

  def _place(self, state: TrainState) -> dict[str, Any]:
    steps, number = total_steps(self._config, len(self._dataset["train"])), _last_step(state)
    rate = schedule.learning_rate(self._config, steps, number, state.plateau.scale)
    return {"step": int(state.step), "epoch": int(state.epoch) + 1, "learning_rate": rate}

  def _end(self, what: str, report: dict[str, Any]) -> NoReturn:
    path = self._folder / NONFINITE
    details = f"{path} says more"
    if jax.process_index() == 0:
      try:
        write_atomically(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
      except (OSError, StorageError) as error:  # must not hide why the run ends
        details = first_line(error).removesuffix(".")
    skip = ", or --config.nonfinite=skip" if self._stops else ""
    raise TrainingFailed(f"{what}; {details}; {_ADVICE}{skip}")


def diagnose(
  state: TrainState,
  batches: Batch,
  index: Array,
  *,
  model: nn.Module,
  prepare: Prepare,
  freeze: Sequence[str],
  microbatch: int,
  mesh: Mesh,
) -> dict[str, Any]:
  """Computes a step's gradients anew, by single examples: less memory than the step needs.

  Args:
    state: before the step.
    batches: image [K, B, H, W, C] and so on; the step's batch is `batches[index]`.
    microbatch: 1, or 2 where images are mixed in pairs: a pair is then bad as a whole.
  Returns:
    "loss": float32 [], the mean. "bad": bool [B], examples whose loss or gradient is not finite.
    Trees like the parameters: "gradients" (of those that train) and "norms", norms (float32 []) of
    the loss' gradient and of the parameter, and "finite" (bool []), whether the parameter is.
  """
  batch = jax.tree.map(lambda x: x[index], batches)
  gradients = make_gradients(state, model, prepare, freeze)
  places = jnp.arange(len(batch["label"]))

  def single(params, examples: Batch, positions: Array) -> tuple[dict, Sums, Array]:
    grads, sums = gradients(params, examples, positions)
    bad = ~jnp.isfinite(sums.loss) | overflow(grads)
    is_here = (places[:, None] == positions).any(1)
    return grads, sums, (is_here & bad).astype(jnp.float32)

  template = (split_frozen(state.params, freeze)[0], state.sums, jnp.zeros(places.shape))
  grads, sums, bad = sum_over_batch(single, template, state.params, batch, microbatch, mesh)
  return {
    "loss": sums.loss / sums.count,
    "bad": bad > 0,
    "gradients": jax.tree.map(lambda x: _norm(x / sums.count), grads),
    "norms": jax.tree.map(_norm, state.params),
    "finite": _finite(state.params),
  }


def losses_not_finite(
  weights: Weights,
  batch: Batch,
  *,
  model: nn.Module,
  framing: Framing,
  microbatch: int,
  mesh: Mesh,
) -> Array:
  """Which examples of a batch have a loss that is not finite, without augmentation (bool [B])."""
  places = jnp.arange(len(batch["label"]))

  def forward(params, examples: Batch, positions: Array) -> Array:
    logits = eval_logits(model, weights.replace(params=params), examples["image"], framing)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples["label"])
    bad = ~jnp.isfinite(losses) & examples["mask"]
    return ((places[:, None] == positions) & bad).any(1).astype(jnp.float32)

  template = jnp.zeros(places.shape)
  return sum_over_batch(forward, template, weights.params, batch, microbatch, mesh) > 0


def _last_step(state: TrainState) -> int:
  """The number, from 0, of the step that was computed last."""
  # A stopped state is as before the step that was not finite; another has its parameters from it.
  return int(state.step) - (not state.stopped)


def _norm(x: Array) -> Array:
  """The Euclidean norm; its squares do not overflow."""
  largest = jnp.max(jnp.abs(x))
  return jnp.where(largest > 0, largest * jnp.linalg.norm((x / largest).ravel()), largest)


def _finite(params: dict) -> dict:
  return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def _layers(found: dict[str, Any]) -> list[dict[str, Any]]:
  """The layers' gradient and parameter norms: what is not finite first, then the largest first."""
  norms: dict[str, list] = {}
  gradients, parameters = (flatten_dict(found[key], sep="/") for key in ("gradients", "norms"))
  for name, norm in gradients.items():
    layer = name.rpartition("/")[0] or name
    norms.setdefault(layer, []).append((norm, parameters[name]))
  # float64: sums of squares do not overflow.
  of_layers = {k: np.linalg.norm(np.array(v, np.float64), axis=0) for k, v in norms.items()}

  def size(layer: str) -> list[float]:
    return [x if math.isfinite(x) else math.inf for x in of_layers[layer]]

  return [
    {
      "name": layer,
      **dict(zip(("gradient", "parameters"), map(number_for_json, of_layers[layer]), strict=True)),
    }
    for layer in sorted(of_layers, key=size, reverse=True)
  ]


def _names(finite: dict) -> list[str]:
  """The names of the parameters that are not finite."""
  return [name for name, is_finite in flatten_dict(finite, sep="/").items() if not is_finite]
