"""One step of training and one of evaluation, as pure functions over a mesh.

Each device takes an equal part of the batch and works through it in microbatches. Sums over
examples (gradients, loss, hits) are taken on each device, then over the devices once per step.
"""

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train import augment
from train.data.batches import eval_batches, num_batches
from train.data.framing import Framing
from train.data.splits import AnySplit, DatasetInfo
from train.devices.compile import compiler_options, in_background
from train.devices.mesh import abstract, by_example, state_shardings
from train.devices.reduction import sum_over_batch
from train.optimizer import join, make_optimizer, split_frozen
from train.schedule import Schedule, make_schedule
from train.state import (
  Sums,
  TrainState,
  Weights,
  abstract_state,
  abstract_statistics,
  apply_model,
  make_model,
  update_average,
)
from train.targets import Batch, Prepare, make_prepare, sum_metrics

Array = jax.Array
# Larger gradients count as infinite: Adam averages their squares, which would overflow.
_LARGEST_GRADIENT = 2.0**63


def make_train_step(
  config: ConfigDict, info: DatasetInfo, microbatch: int, mesh: Mesh
) -> jax.stages.Wrapped:
  """`train_step` for a run, jitted: (state, batches) -> (next state, Sums of each step).

  `batches` stacks the batches of K steps: image [K, B, H, W, C] and so on. One dispatch runs all K
  steps in order. The input state is donated: it can't be used again.

  Args:
    info: gives the number of classes, and of training images: how long a schedule is.
    microbatch: images that a device computes at a time.
  """
  step = functools.partial(
    train_step,
    model=make_model(config, info.num_classes),
    optimizer=make_optimizer(config.optimizer, config.freeze, by_example(mesh)),
    schedule=make_schedule(config, total_steps(config, info.sizes["train"])),
    ema_decay=config.ema_decay,
    freeze=config.freeze,
    prepare=make_prepare(config, info.num_classes),
    skip_nonfinite=config.nonfinite == "skip",
    microbatch=microbatch,
    mesh=mesh,
  )

  def steps(state: TrainState, batches: Batch) -> tuple[TrainState, Sums]:
    single = len(batches["label"]) == 1
    return jax.lax.scan(step, state, batches, unroll=single)

  return jax.jit(steps, donate_argnums=0, compiler_options=compiler_options(config, mesh))


def trace_train_step(
  step: jax.stages.Wrapped,
  state: TrainState,
  config: ConfigDict,
  info: DatasetInfo,
  mesh: Mesh,
  steps: int | None = None,
) -> jax.stages.Traced:
  """Traces a step of `make_train_step` for the shapes of a call; `lower` is what follows.

  Args:
    state: from `abstract_state`.
    steps: of the call; None: as many as the first of an epoch has.
  """
  steps = steps or min(config.steps_per_call, _steps_per_epoch(config, info))
  steps_and_batch = (steps, config.batch_size)
  framing, size = Framing.of(config.data), config.model.image_size
  shapes = {
    "image": ((*steps_and_batch, *framing.shape_in_memory(info.image_shape, size)), jnp.uint8),
    "label": (steps_and_batch, jnp.int32),
    "mask": (steps_and_batch, jnp.bool),
  }
  batches = {key: jax.ShapeDtypeStruct(*shape) for key, shape in shapes.items()}
  return step.trace(state, abstract(batches, by_example(mesh, axis=1)))


def _steps_per_epoch(config: ConfigDict, info: DatasetInfo) -> int:
  return num_batches(info.sizes["train"], config.batch_size)


def total_steps(config: ConfigDict, train_images: int) -> int:
  """Steps of a run over all epochs, if it does not stop early."""
  return config.epochs * num_batches(train_images, config.batch_size)


def compile_in_background(
  step: jax.stages.Wrapped,
  init: jax.stages.Wrapped,
  config: ConfigDict,
  info: DatasetInfo,
  mesh: Mesh,
) -> Future[tuple[jax.stages.Compiled, float]]:
  """Compiles `step`, also for an epoch's shorter last call, and `init` in a thread.

  Later calls reuse the results. XLA releases Python's lock, so images can be read meanwhile.

  Args:
    step: from `make_train_step`.
    init: from `make_init`.
  Returns:
    A future of the step compiled for an epoch's first call, and the seconds that this took.
  """

  def compile_all():
    began = time.perf_counter()
    state = abstract_state(init, info)
    compiled = trace_train_step(step, state, config, info, mesh).lower().compile()
    seconds = time.perf_counter() - began
    init.lower(*abstract_statistics(info)).compile()
    steps = _steps_per_epoch(config, info)
    if steps > config.steps_per_call and (rest := steps % config.steps_per_call):
      trace_train_step(step, state, config, info, mesh, steps=rest).lower().compile()
    return compiled, seconds

  return in_background(compile_all)


def make_eval_step(
  config: ConfigDict, num_classes: int, microbatch: int, mesh: Mesh
) -> jax.stages.Wrapped:
  """`eval_step` for a run, jitted: (weights, batch) -> Sums."""
  step = functools.partial(
    eval_step,
    model=make_model(config, num_classes),
    framing=Framing.of(config.data),
    microbatch=microbatch,
    mesh=mesh,
  )
  return jax.jit(step)


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  model: nn.Module,
  optimizer: optax.GradientTransformationExtraArgs,
  schedule: Schedule,
  ema_decay: float,
  freeze: Sequence[str],
  prepare: Prepare,
  skip_nonfinite: bool,
  microbatch: int,
  mesh: Mesh,
) -> tuple[TrainState, Sums]:
  """Augments, computes gradients of the mean cross-entropy, and updates the weights once.

  Every random draw depends only on (seed, step, position in the global batch): the number of
  devices and the microbatch do not change an image's augmentation or dropout masks.

  If the loss or a gradient is not finite, the weights stay as they are. With `skip_nonfinite` the
  step counts as skipped; otherwise the state stops: neither this step nor a later one changes it.

  Args:
    batch: the global batch; examples whose mask is False are ignored.
    schedule: from `schedule.make_schedule`; multiplies the learning rate, as the plateau does.
    ema_decay: of the weights' average, if the state has one.
    freeze: as for `optimizer.split_frozen`; these arrays have no gradients.
    prepare: from `targets.make_prepare`.
    microbatch: images that a device computes at a time; divides its part of the batch.
  Returns:
    The next state, and the sums over this batch, taken before the update; their loss is NaN if no
    update was made.
  """
  gradients = make_gradients(state, model, prepare, freeze)
  trained, frozen = split_frozen(state.params, freeze)
  template = (trained, state.sums)
  grads, sums = sum_over_batch(
    gradients, template, state.params, batch, microbatch, mesh, on_device=_mark_overflow
  )
  update = jnp.isfinite(sums.loss) & ~state.stopped
  grads = jax.tree.map(lambda g: g / sums.count, grads)
  scale = state.plateau.scale * schedule(state.step)
  updates, opt_state = optimizer.update(
    grads, state.opt_state, state.params, learning_rate_scale=scale
  )
  trained = optax.apply_updates(trained, updates)
  updated = state.replace(
    step=state.step + 1,
    params=join(trained, frozen),
    opt_state=opt_state,
    sums=jax.tree.map(jnp.add, state.sums, sums),
    average=update_average(state.average, trained, state.step + 1, ema_decay),
  )
  if skip_nonfinite:
    kept = state.replace(step=state.step + 1, skipped=state.skipped + 1)
  else:
    kept = state.replace(stopped=jnp.ones_like(state.stopped))
  state = jax.tree.map(functools.partial(jnp.where, update), updated, kept)
  sums = sums.replace(loss=jnp.where(update, sums.loss, jnp.nan))
  return jax.lax.with_sharding_constraint(state, state_shardings(state, mesh)), sums


def make_gradients(
  state: TrainState, model: nn.Module, prepare: Prepare, freeze: Sequence[str] = ()
) -> Callable:
  """Makes (params, examples, positions) -> (gradients of `loss` at the state's step, Sums).

  The gradients are a tree of the parameters that train: none is computed for those in `freeze`.
  """
  at_step = functools.partial(loss, state=state, model=model, prepare=prepare)

  def gradients(params: dict, examples: Batch, positions: Array) -> tuple[dict, Sums]:
    trained, frozen = split_frozen(params, freeze)

    def of_trained(trained: dict) -> tuple[Array, Sums]:
      return at_step(join(trained, frozen), examples, positions)

    return jax.grad(of_trained, has_aux=True)(trained)

  return gradients


def overflow(gradients: dict) -> Array:
  """Whether a gradient is NaN, infinite, or so large that its square is (bool [])."""
  leaves = jax.tree.leaves(gradients)
  return ~jnp.stack([jnp.all(jnp.abs(x) < _LARGEST_GRADIENT) for x in leaves]).all()


def _mark_overflow(total: tuple[dict, Sums]) -> tuple[dict, Sums]:
  """Makes the loss NaN if a gradient overflows: so all devices learn it from the sum of losses."""
  grads, sums = total
  return grads, sums.replace(loss=jnp.where(overflow(grads), jnp.nan, sums.loss))


def loss(
  params: dict,
  examples: Batch,
  positions: Array,
  *,
  state: TrainState,
  model: nn.Module,
  prepare: Prepare,
) -> tuple[Array, Sums]:
  """Summed cross-entropy (float32 []) of augmented examples at the state's step, and all Sums.

  Args:
    params: of the model, used instead of `state.params`.
    positions: int32 [B], the examples' positions in the global batch.
  """
  key = jax.random.fold_in(jax.random.key(state.seed), state.step)
  augment_key, dropout_key = jax.random.split(key)
  images, labels = prepare(examples, augment_key, positions, state)
  logits = apply_model(
    model, params, images, train=True, positions=positions, rngs={"dropout": dropout_key}
  )
  sums = sum_metrics(logits, labels, examples["mask"])
  return sums.loss, sums


def eval_step(
  weights: Weights,
  batch: Batch,
  *,
  model: nn.Module,
  framing: Framing,
  microbatch: int,
  mesh: Mesh,
) -> Sums:
  """Sums of loss and hits over the examples of `batch` whose mask is True, without augmentation."""

  def forward(params, examples: Batch, positions: Array):
    del positions
    logits = eval_logits(model, weights.replace(params=params), examples["image"], framing)
    return sum_metrics(logits, examples["label"], examples["mask"])

  return sum_over_batch(forward, Sums.zero(), weights.params, batch, microbatch, mesh)


def eval_logits(model: nn.Module, weights: Weights, images: Array, framing: Framing) -> Array:
  """Logits (float32 [B, C]) of images (uint8 [B, H, W, channels]), without augmentation."""
  images = augment.preprocess(
    images,
    mean=weights.mean,
    variance=weights.variance,
    image_size=model.image_size,
    framing=framing,
  )
  return apply_model(model, weights.params, images)


def evaluate(
  step: Callable,
  weights: Weights,
  split: AnySplit,
  batch_size: int,
  mesh: Mesh,
  after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
  """Loss, accuracy and top5 (fractions) over a split, every image counted once.

  Args:
    step: from `make_eval_step`.
    after_batch: called after each batch; its exceptions end the evaluation.
  """
  total = Sums.zero()
  for batch in eval_batches(split, batch_size, mesh):
    before, sums = total, step(weights, batch)
    total = jax.tree.map(jnp.add, total, sums)
    jax.block_until_ready(before)  # at most one batch waits, so that `after_batch` runs in time
    after_batch()
  return total.means()
