"""The train step gives the result of a plain step, whatever the mesh and the microbatch."""

import functools
import importlib
import itertools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlp_models
from train import augment, optimizer
from train.data import DatasetInfo, Split
from train.data.batches import num_batches, stack
from train.data.statistics import channel_statistics
from train.devices.mesh import by_example, make_mesh, sharded_axis, state_shardings
from train.state import Sums, abstract_state, init_state, make_init, make_model
from train.step import (
  compile_in_background,
  loss,
  make_eval_step,
  make_train_step,
  trace_train_step,
)
from train.targets import sum_metrics

BATCH = 32
LARGE = ("perceiver", "vit")
pytestmark = pytest.mark.usefixtures("fast_compilation")
INFO = DatasetInfo("noise", tuple(map(str, range(100))), (32, 32, 3), {"train": 45000})


def smoke_config(name: str):
  return importlib.import_module(f"configs.{name}").get_config("smoke")


def noise_batch(seed: int, masked: int = 0) -> dict:
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8),
    "label": rng.integers(0, 100, BATCH).astype(np.int32),
    "mask": np.arange(BATCH) < BATCH - masked,
  }


def new_state(config):
  return init_state(config, INFO, np.full(3, 127.0), np.full(3, 5400.0))


def mesh_of(data: int, fsdp: int = 1):
  return make_mesh(data, fsdp, jax.devices()[: data * fsdp])


def run_steps(config, mesh, microbatch: int, batches: list[dict], state=None):
  """The loss of each step and the last state; `mesh` is a mesh or a number of devices."""
  mesh = mesh_of(mesh) if isinstance(mesh, int) else mesh
  step = make_train_step(config, INFO, microbatch, mesh)
  state = state or new_state(config)
  state = jax.device_put(state, state_shardings(state, mesh))
  losses = []
  for call in stack(iter(batches), itertools.repeat(config.steps_per_call)):
    state, sums = step(state, jax.device_put(call, by_example(mesh, axis=1)))
    losses += (sums.loss / sums.count).tolist()
  return losses, jax.device_get(state)


@pytest.fixture
def cut_all(monkeypatch):
  """Shards small parameters over "fsdp" as well, like those of larger models."""
  monkeypatch.setattr("train.devices.mesh._SHARDED_FROM", 64)


@functools.cache
def losses_on_one_device(name: str) -> list[float]:
  return run_steps(smoke_config(name), 1, BATCH, [noise_batch(i) for i in range(20)])[0]


# The two largest models on every mesh take long.
@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    pytest.param(name, mesh, marks=[pytest.mark.slow] * (mesh != (4, 2) and name in LARGE))
    for name in mlp_models.MODELS
    for mesh in [(8, 1), (4, 2), (1, 8)]
  ],
)
def test_losses_do_not_depend_on_the_mesh_or_the_microbatch(name, mesh, cut_all):
  batches = [noise_batch(i) for i in range(20)]
  losses, state = run_steps(smoke_config(name), mesh_of(*mesh), 2, batches)
  np.testing.assert_allclose(losses, losses_on_one_device(name), rtol=5e-6)
  assert losses[0] != losses[1]


def test_several_steps_in_one_call_are_those_steps():
  config = smoke_config("gmlp")
  batches = [noise_batch(i) for i in range(5)]
  one_by_one, state = run_steps(config, 2, 4, batches)
  config.steps_per_call = 3
  losses, after = run_steps(config, 2, 4, batches)
  np.testing.assert_allclose(losses, one_by_one, rtol=1e-5)
  assert after.step == state.step == 5
  np.testing.assert_allclose(after.sums.loss, state.sums.loss, rtol=1e-5)


def test_step_equals_a_plain_step_over_the_whole_batch():
  config = smoke_config("mixer")
  batch = noise_batch(0, masked=5)
  model, adamw = make_model(config, 100), optimizer.make_optimizer(config.optimizer)
  state = new_state(config)
  key = jax.random.fold_in(jax.random.key(config.seed), 0)
  augment_key, dropout_key = jax.random.split(key)

  def loss(params):
    images = augment.augment(
      batch["image"],
      augment_key,
      jnp.arange(BATCH),
      mean=state.mean,
      variance=state.variance,
      image_size=model.image_size,
      **augment.options(config),
    )
    logits = model.apply({"params": params}, images, train=True, rngs={"dropout": dropout_key})
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses[:-5].mean()

  value, grads = jax.jit(jax.value_and_grad(loss))(state.params)
  updates, _ = adamw.update(grads, state.opt_state, state.params, learning_rate_scale=1.0)
  expected = optax.apply_updates(state.params, updates)
  losses, after = run_steps(config, 2, 4, [batch])
  np.testing.assert_allclose(losses, [value], rtol=1e-6)
  # Adam's first step is the gradient's sign times the learning rate (5e-3). Rounding decides the
  # sign of gradients near zero, so the first moment is compared as well.
  moment = after.opt_state[0].mu
  for got, want in zip(jax.tree.leaves(moment), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(got, 0.1 * want, atol=1e-6 * np.abs(want).max())
  for got, want in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
    assert np.mean(np.abs(got - want) > 1e-5) < 0.01


def test_masked_examples_count_for_nothing():
  config = smoke_config("mixer")
  batch, other = noise_batch(0, masked=7), noise_batch(0, masked=7)
  other["image"][-7:], other["label"][-7:] = 0, 3
  losses, state = run_steps(config, 2, 4, [batch])
  other_losses, other_state = run_steps(config, 2, 4, [other])
  assert float(state.sums.count) == BATCH - 7
  assert losses == other_losses
  jax.tree.map(np.testing.assert_array_equal, state.params, other_state.params)


def test_same_seed_and_step_repeat_bit_for_bit_and_others_differ():
  config = smoke_config("gmlp")
  first, state = run_steps(config, 2, 4, [noise_batch(0)])
  again, state_again = run_steps(config, 2, 4, [noise_batch(0)])
  assert first == again
  jax.tree.map(np.testing.assert_array_equal, state, state_again)
  config.seed = 1
  other, _ = run_steps(config, 2, 4, [noise_batch(0)])
  assert abs(other[0] - first[0]) > 1e-4


def test_plateau_scale_multiplies_the_learning_rate():
  config = smoke_config("fnet")
  config.optimizer.weight_decay = 0.0
  states = [new_state(config)]
  for scale in (1.0, 0.5):
    state = new_state(config)
    state = state.replace(plateau=state.plateau._replace(scale=jnp.float32(scale)))
    states += [run_steps(config, 1, BATCH, [noise_batch(0)], state)[1]]
  before, full, half = (s.params["head"]["kernel"] for s in states)
  np.testing.assert_allclose(half - before, 0.5 * (full - before), atol=1e-7)


def test_eval_step_counts_every_image_once_and_ignores_the_mesh():
  config = smoke_config("vit")
  model, state = make_model(config, 100), new_state(config)
  batch = noise_batch(3, masked=3)
  images = augment.preprocess(
    batch["image"], mean=state.mean, variance=state.variance, image_size=model.image_size
  )
  logits = np.asarray(model.apply({"params": state.params}, images), np.float64)[:-3]
  labels = batch["label"][:-3]
  log_z = np.log(np.exp(logits).sum(1))
  rank = (logits > logits[np.arange(BATCH - 3), labels][:, None]).sum(1)
  expected = [
    (log_z - logits[np.arange(BATCH - 3), labels]).sum(),
    (rank == 0).sum(),
    (rank < 5).sum(),
    BATCH - 3,
  ]
  for devices, microbatch in ((1, 32), (2, 4), (8, 2)):
    sums = make_eval_step(config, 100, microbatch, mesh_of(devices))(state.weights(), batch)
    np.testing.assert_allclose(jax.tree.leaves(sums), expected, rtol=1e-5)


def test_sum_metrics_on_logits_made_by_hand():
  logits = jnp.zeros((4, 100)).at[0, 7].set(50.0).at[1, :5].set(50.0).at[2, :4].set(50.0)
  logits = logits.at[2, 9].set(40.0).at[3].set(jnp.nan)
  sums = sum_metrics(logits, jnp.array([7, 9, 9, 0]), jnp.array([True, True, True, True]))
  # Row 0 is a hit; row 1's label comes sixth; row 2's fifth; a row of NaN is never a hit.
  assert (float(sums.correct), float(sums.top5), float(sums.count)) == (1, 2, 4)
  # On a tie the first class wins, as in argmax: a constant model hits one in 100.
  uniform = sum_metrics(jnp.zeros((100, 100)), jnp.arange(100), jnp.arange(100) < 50)
  np.testing.assert_allclose(uniform.loss, 50 * np.log(100), rtol=1e-6)
  assert (float(uniform.correct), float(uniform.top5)) == (1, 5)


def compiled_step(config, mesh, microbatch: int) -> jax.stages.Compiled:
  mesh = mesh_of(mesh) if isinstance(mesh, int) else mesh
  config.batch_size = BATCH
  step = make_train_step(config, INFO, microbatch, mesh)
  state = abstract_state(make_init(config, INFO, mesh), INFO)
  return trace_train_step(step, state, config, INFO, mesh).lower().compile()


def collectives(hlo: str) -> dict[str, int]:
  """The number of collectives of each kind."""
  kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-[a-z]+"
  return Counter(re.findall(rf" ({kinds})(?:-start)?\(", hlo))


@pytest.mark.parametrize("name", mlp_models.MODELS)
def test_nothing_but_arithmetic_and_one_reduction_is_in_a_step(name):
  config = smoke_config(name)
  config.steps_per_call = 1  # otherwise the reduction is inside the loop over steps
  compiled = compiled_step(config, 8, 2)
  hlo = compiled.as_text()
  outside_loops = hlo[hlo.index("\nENTRY ") :]
  assert collectives(hlo) == collectives(outside_loops) == {"all-reduce": 1}
  assert not re.findall(r"callback| (?:infeed|outfeed|send|recv)\(", hlo)
  # The state is updated in place: all arrays are aliased, and none is copied.
  size = sum(x.nbytes for x in jax.tree.leaves(new_state(config)))
  assert compiled.memory_analysis().alias_size_in_bytes == size
  assert not re.findall(r"\[\d[^ ]* copy\(%param", outside_loops)


@pytest.mark.parametrize("name", mlp_models.MODELS)
def test_what_is_cut_is_gathered_and_its_gradient_scattered_once_a_step(name, cut_all):
  config, mesh = smoke_config(name), mesh_of(4, 2)
  config.steps_per_call = 1
  compiled = compiled_step(config, mesh, 2)
  hlo = compiled.as_text()
  state = abstract_state(make_init(config, INFO, mesh), INFO)
  leaves = jax.tree.leaves(state)
  cut = sum(sharded_axis(x.shape, mesh) is not None for x in jax.tree.leaves(state.params))
  assert cut >= 8
  # The key biases of Perceiver's two blocks have no gradient: they shift all logits equally.
  cut -= 2 if name == "perceiver" else 0
  # One all-reduce of replicated arrays over all devices, one of shards over the axis "data".
  expected = {"all-gather": cut, "reduce-scatter": cut, "all-reduce": 2}
  assert collectives(hlo) == collectives(hlo[hlo.index("\nENTRY ") :]) == expected
  held = [x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves]
  assert compiled.memory_analysis().alias_size_in_bytes == sum(held)


def test_a_device_holds_an_eighth_of_vit():
  config, mesh = importlib.import_module("configs.vit").get_config(), mesh_of(1, 8)
  init = make_init(config, INFO, mesh)
  state = abstract_state(init, INFO)
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.params, state.opt_state)))
  assert whole == 3 * 4 * 21_759_012 + 4  # parameters, two moments, and the count of updates
  state = init(np.full(3, 127, np.float32), np.full(3, 5400, np.float32))
  for device in mesh.devices.flat:
    held = sum(
      shard.data.nbytes
      for x in jax.tree.leaves((state.params, state.opt_state))
      for shard in x.addressable_shards
      if shard.device == device
    )
    assert held < whole / 7


def test_the_model_is_traced_once(monkeypatch):
  traced = []
  monkeypatch.setattr("train.step.loss", lambda *args, **kw: traced.append(1) or loss(*args, **kw))
  compiled_step(smoke_config("mixer"), 2, 4)
  assert len(traced) == 1


@pytest.mark.parametrize("calls", [[1, 1], [2, 1]])  # the latter as at the end of an epoch
def test_what_was_compiled_in_the_background_is_not_compiled_again(calls):
  config, mesh = smoke_config("fnet"), mesh_of(2)
  config.batch_size, config.steps_per_call = BATCH, calls[0]
  assert num_batches(INFO.sizes["train"], BATCH) % 2 == 1
  step, init = make_train_step(config, INFO, 4, mesh), make_init(config, INFO, mesh)
  compile_in_background(step, init, config, INFO, mesh).result()
  batches = stack(map(noise_batch, range(sum(calls))), iter(calls))
  batches = [jax.device_put(call, by_example(mesh, axis=1)) for call in batches]
  compilations = []

  def listen(event: str, seconds: float, **kwargs) -> None:
    if "backend_compile" in event:
      compilations.append(kwargs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    state = init(np.full(3, 127, np.float32), np.full(3, 5400, np.float32))
    for call in batches:
      state, _ = step(state, call)
    assert not compilations
    jax.jit(lambda x: x + 7)(np.ones(3))  # the listener works
    assert len(compilations) == 1
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", mlp_models.MODELS)
def test_remat_is_in_every_block(name):
  config = smoke_config(name)

  def checkpoints(remat: bool) -> int:
    config.remat = remat
    model = make_model(config, 100)
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    gradient = jax.grad(lambda params: model.apply(params, images).sum())
    return len(re.findall(r"\b(?:checkpoint|remat\d?)\[", str(jax.make_jaxpr(gradient)(params))))

  assert checkpoints(False) == 0
  assert checkpoints(True) >= config.model.num_blocks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixer", "perceiver", "vit"])
def test_remat_changes_no_loss(name):
  config = smoke_config(name)
  config.remat = True
  losses, _ = run_steps(config, 2, 4, [noise_batch(0), noise_batch(1)])
  np.testing.assert_allclose(losses, losses_on_one_device(name)[:2], rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "sizes"),
  [
    ("vit", {"image_size": 128, "patch_size": 4, "pool": "mean"}),  # 1,024 tokens
    ("perceiver", {"patch_size": 1}),  # 4,096 tokens
  ],
)
def test_remat_saves_memory_at_many_tokens(name, sizes):
  jax.config.update("jax_disable_most_optimizations", False)
  config = importlib.import_module(f"configs.{name}").get_config()
  config.model.update(sizes)
  bytes_needed = []
  for config.remat in (False, True):
    bytes_needed.append(compiled_step(config, 8, 4).memory_analysis().temp_size_in_bytes)
  assert bytes_needed[1] < 0.6 * bytes_needed[0]


def test_channel_statistics_are_those_of_the_images():
  images = np.random.default_rng(0).integers(0, 256, (3000, 8, 8, 3), dtype=np.uint8)
  images[..., 1] //= 2
  mean, variance = channel_statistics(Split(images, np.zeros(3000, np.int32)))
  np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(variance, images.var((0, 1, 2)), rtol=1e-6)


def test_sums_give_means():
  sums = Sums(jnp.float32(6), jnp.float32(1), jnp.float32(2), jnp.float32(4))
  assert sums.means() == {"loss": 1.5, "accuracy": 0.25, "top5": 0.5}
