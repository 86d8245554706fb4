"""Each rule against its definition in NumPy, which arrays it treats how, and where its state is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from test_step import INFO, mesh_of, noise_batch, run_steps, smoke_config

import mlp_models
from configs import default, mixer
from train import optimizer
from train.check import check_config
from train.devices.mesh import by_example, sharded_axis, state_shardings
from train.errors import ConfigError
from train.run.checkpoint import Checkpoints
from train.state import abstract_state, make_init
from train.update_rules import RULES, kernels, muon_or_adamw, scale_by_keras_adam

pytestmark = pytest.mark.usefixtures("fast_compilation")

SHAPES = {
  "patch_embed/kernel": (3, 4),
  "latents": (2, 4),
  "block0/norm/scale": (4,),
  "block0/attention/query/kernel": (4, 2, 3),
  "block0/attention/query/bias": (2, 3),
  "block0/attention/out/kernel": (2, 3, 4),
  "block0/mlp/dense0/kernel": (4, 9),
  "block0/mlp/dense1/kernel": (9, 4),
  "block0/spatial/kernel": (5, 5),
  "cross/value/kernel": (9, 4),
  "head/kernel": (4, 7),
  "head/bias": (7,),
}
HIDDEN = {name for name in SHAPES if name.startswith(("block", "cross")) and "kernel" in name}
SCALES = (1.0, 0.5, 0.25)  # of the learning rate


def _config(**overrides) -> ConfigDict:
  recipe = default.get_config().optimizer.to_dict()
  return ConfigDict(recipe | dict(learning_rate=0.01, weight_decay=0.1) | overrides)


def _random(seed: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def _steps(config: ConfigDict, freeze: tuple[str, ...] = ()) -> list[dict[str, np.ndarray]]:
  """The parameters before and after each of three steps, by name."""
  transformation = optimizer.make_optimizer(config, freeze)
  params = unflatten_dict(_random(0), sep="/")
  state = transformation.init(params)
  update, after = jax.jit(transformation.update), [params]
  for step, scale in enumerate(SCALES, start=1):
    trained, frozen = optimizer.split_frozen(params, freeze)
    grads, _ = optimizer.split_frozen(unflatten_dict(_random(step), sep="/"), freeze)
    updates, state = update(grads, state, params, learning_rate_scale=scale)
    params = optimizer.join(optax.apply_updates(trained, updates), frozen)
    after.append(params)
  return [flatten_dict(params, sep="/") for params in after]


# The definitions in float64: (config, parameter, gradients up to this step, name) -> what the
# learning rate multiplies, the decay included.


def _moments(config, grads: list) -> tuple:
  m = v = 0.0
  for grad in grads:
    m = config.b1 * m + (1 - config.b1) * grad
    v = config.b2 * v + (1 - config.b2) * grad**2
  return m, v


def _adamw(config, param, grads, name):
  (m, v), t = _moments(config, grads), len(grads)
  corrected = m / (1 - config.b1**t) * np.sqrt(1 - config.b2**t)
  return corrected / (np.sqrt(v) + config.epsilon) + config.weight_decay * param


def _lamb(config, param, grads, name):
  (m, v), t = _moments(config, grads), len(grads)
  ratio = m / (1 - config.b1**t) / (np.sqrt(v / (1 - config.b2**t)) + config.epsilon)
  update = ratio + config.weight_decay * param
  return update * np.linalg.norm(param) / np.linalg.norm(update)


def _lion(config, param, grads, name):
  momentum = 0.0
  for grad in grads[:-1]:
    momentum = config.b2 * momentum + (1 - config.b2) * grad
  return np.sign(config.b1 * momentum + (1 - config.b1) * grads[-1]) + config.weight_decay * param


def _momentum(config, grads):
  momentum = 0.0
  for grad in grads:
    momentum = config.momentum * momentum + grad
  return grads[-1] + config.momentum * momentum if config.nesterov else momentum


def _sgd(config, param, grads, name):
  return _momentum(config, grads) + config.weight_decay * param


def _muon(config, param, grads, name):
  if name not in HIDDEN:
    return _adamw(config, param, grads, name)
  momentum = _momentum(config, grads)
  rows = param.size // param.shape[-1] if "out" in name else len(param)
  u, s, v = np.linalg.svd(momentum.reshape(rows, -1), full_matrices=False)
  s = s / np.linalg.norm(s)
  for _ in range(5):  # Jordan et al.: all singular values come near 1
    s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
  matrix = u * s @ v * 0.2 * np.sqrt(max(rows, param.size // rows))
  return matrix.reshape(param.shape) + config.weight_decay * param


DEFINITIONS = {"adamw": _adamw, "lamb": _lamb, "muon": _muon, "lion": _lion, "sgd": _sgd}


@pytest.mark.parametrize(
  ("name", "options"),
  [(name, {}) for name in RULES]
  + [("lion", {"b2": 0.99}), ("sgd", {"momentum": 0.9, "nesterov": False})],
)
def test_three_steps_equal_the_definition(name, options):
  """Whatever the layer's own learning rate, and with an array that is frozen."""
  config = _config(name=name, layer_decay=0.5, **options)
  after = _steps(config, freeze=("latents",))
  np.testing.assert_array_equal(after[3]["latents"], after[0]["latents"])
  for array in set(SHAPES) - {"latents"}:
    rate = 0.01 * (1.0 if "head" in array else 0.5 if "block" in array else 0.25)
    param, grads = np.float64(after[0][array]), []
    for step, scale in enumerate(SCALES, start=1):
      grads.append(np.float64(_random(step)[array]))
      param = param - scale * rate * DEFINITIONS[name](config, param, grads, array)
      np.testing.assert_allclose(after[step][array], param, rtol=1e-5, atol=1e-6, err_msg=array)


def test_muon_moves_as_far_as_adamw():
  before, after, *_ = _steps(_config(name="muon", weight_decay=0.0, learning_rate=1.0))
  for name in HIDDEN:
    assert 0.14 < np.sqrt(np.mean((after[name] - before[name]) ** 2)) < 0.3, name


@pytest.mark.parametrize("independent", [False, True])
def test_only_kernels_decay_if_so_wanted(independent):
  options = dict(name="muon", independent_weight_decay=independent)
  before, after, *_ = _steps(_config(decay="kernels", **options))
  _, without, *_ = _steps(_config(weight_decay=0.0, **options))
  decay = 0.1 if independent else 0.1 * 0.01
  for name in SHAPES:
    expected = without[name] - decay * before[name] * name.endswith("kernel")
    np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("limit", [0.3, 1e3])
def test_gradients_are_clipped_by_their_norm_together(limit):
  config = _config(name="sgd", momentum=0.0, weight_decay=0.0, learning_rate=1.0, clip_norm=limit)
  before, after, *_ = _steps(config)
  grads = _random(1)
  norm = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
  for name, grad in grads.items():
    expected = before[name] - grad * min(1.0, limit / norm)
    np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-6)


# By name, in all families.

_NORMS = {"norm1/scale", "norm1/bias", "norm2/scale", "norm2/bias"}
_VIT_BLOCK = {f"attention/{x}/kernel" for x in ("query", "key", "value", "out")} | {
  "mlp/dense0/kernel",
  "mlp/dense1/kernel",
}
_MIXER_BLOCK = {f"{mlp}/{x}/kernel" for mlp in ("token_mlp", "channel_mlp") for x in ("in", "out")}
_GMLP_BLOCK = {"proj_in/kernel", "spatial/kernel", "proj_out/kernel"}
_FNET_BLOCK = {"ffn/in/kernel", "ffn/out/kernel"}
_CROSS = {f"cross/{x}/kernel" for x in ("query", "key", "value", "ffn/dense0", "ffn/dense1")}


def _inside(beginning: str, names: set[str]) -> set[str]:
  return {f"{beginning}/{name}" for name in names}


_KERAS_PERCEIVER = _CROSS | {
  f"latent/block0/{x}/kernel"
  for x in (
    "ffn/dense0",
    "ffn/dense1",
    *(f"attention/{y}" for y in ("query", "key", "value", "out")),
  )
}
_PAPERS_PERCEIVER = (
  _inside("cross0", _VIT_BLOCK)
  | _inside("cross1", _VIT_BLOCK)
  | _inside("latent/block0", _VIT_BLOCK)
)
_PERCEIVER_IO = (
  _inside("cross0", _VIT_BLOCK)
  | _inside("latent/block0", _VIT_BLOCK)
  | _inside("decoder", _VIT_BLOCK)
)
# The kernels that Muon takes, and those that decay, too, and are AdamW's.
PARTS = {
  "mixer": (_inside("block0", _MIXER_BLOCK), {"patch_embed", "head"}),
  "mixer B/16": (_inside("block0", _MIXER_BLOCK), {"patch_embed", "head"}),
  "fnet": (_inside("block0", _FNET_BLOCK), {"patch_embed", "head"}),
  "fnet base": (_inside("block0", _FNET_BLOCK), {"patch_embed", "head"}),
  "gmlp": (_inside("block0", _GMLP_BLOCK), {"patch_embed", "head"}),
  "gmlp S/16": (_inside("block0", _GMLP_BLOCK), {"patch_embed", "head"}),
  "perceiver": (_KERAS_PERCEIVER, {"patch_embed", "head/dense0", "head/dense1"}),
  "perceiver paper": (_PAPERS_PERCEIVER, {"head"}),
  "perceiver io-learned": (_PERCEIVER_IO, {"pixel_embed", "position_projection", "head"}),
  "perceiver io-fourier": (_PERCEIVER_IO, {"head"}),
  "perceiver io-conv": (_PERCEIVER_IO, {"conv_embed/conv", "head"}),
  "vit": (
    _inside("block0", _VIT_BLOCK),
    {"patch_embed", "head_mlp/dense0", "head_mlp/dense1", "head"},
  ),
  "vit S/16": (_inside("block0", _VIT_BLOCK), {"patch_embed", "head"}),
  "vit S/16 plain": (_inside("block0", _VIT_BLOCK), {"patch_embed", "head_mlp/dense0", "head"}),
}


@pytest.mark.parametrize("model", PARTS)
def test_which_arrays_decay_and_which_are_muons(model):
  model_of = mlp_models.create(*model.split(maxsplit=1), num_blocks=1)
  images = jnp.zeros((1, model_of.image_size, model_of.image_size, 3))
  params = jax.eval_shape(model_of.init, jax.random.key(0), images)["params"]
  muons, others = PARTS[model]
  rules = flatten_dict(muon_or_adamw(params), sep="/")
  assert {name for name, rule in rules.items() if rule == "muon"} == muons
  decays = flatten_dict(kernels(params), sep="/")
  assert {k for k, v in decays.items() if v} == muons | {f"{layer}/kernel" for layer in others}
  assert rules.keys() == decays.keys() == flatten_dict(params, sep="/").keys()


# In a run.


def test_adamw_is_the_program_and_the_state_of_before():
  """So old checkpoints restore, and give the same numbers."""
  config = _config()

  def scale(updates, state, params, *, learning_rate_scale):
    del params
    step_size = -config.learning_rate * learning_rate_scale
    return jax.tree.map(lambda u: step_size * u, updates), state

  rate = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scale)
  adam = scale_by_keras_adam(config.b1, config.b2, config.epsilon)
  before = optax.chain(adam, optax.add_decayed_weights(config.weight_decay), rate)
  now = optimizer.make_optimizer(config)
  params = unflatten_dict(_random(0), sep="/")
  state = now.init(params)
  assert jax.tree.structure(state) == jax.tree.structure(before.init(params))

  def program(transformation) -> str:
    return str(
      jax.make_jaxpr(transformation.update)(params, state, params, learning_rate_scale=1.0)
    )

  assert program(now) == program(before)


@pytest.mark.parametrize("name", ["muon", "lamb"])
def test_state_is_sharded_like_its_parameters(name):
  config = mixer.get_config()
  config.optimizer.name = name
  mesh = mesh_of(1, 8)
  state = abstract_state(make_init(config, INFO, mesh), INFO)
  params = {f"/{k}": v for k, v in flatten_dict(state.params, sep="/").items()}
  large = 0
  for path, x in jax.tree.leaves_with_path(state.opt_state):
    keys = jax.tree_util.keystr(path, simple=True, separator="/")
    if sharded_axis(x.shape, mesh) is not None:
      (like,) = [param for name, param in params.items() if keys.endswith(name)]
      assert x.shape == like.shape
      assert x.sharding == like.sharding and not x.sharding.is_fully_replicated
      large += x.size
  total = sum(x.size for x in params.values())
  assert large > (1 if name == "muon" else 1.8) * 0.8 * total


@pytest.mark.parametrize("name", ["muon", "lamb"])
def test_sharded_arrays_have_the_update_of_whole_ones(name, monkeypatch):
  monkeypatch.setattr("train.devices.mesh._SHARDED_FROM", 1)
  config, mesh = _config(name=name, clip_norm=0.5), mesh_of(2, 2)
  params, grads = (unflatten_dict(_random(seed), sep="/") for seed in (0, 1))
  whole = optimizer.make_optimizer(config)
  state = whole.init(params)
  expected, _ = jax.jit(whole.update)(grads, state, params, learning_rate_scale=1.0)
  sharded = optimizer.make_optimizer(config, sharding=by_example(mesh))
  arguments = jax.device_put((grads, state, params), state_shardings((grads, state, params), mesh))
  updates, _ = jax.jit(sharded.update)(*arguments, learning_rate_scale=1.0)
  assert not arguments[0]["block0"]["mlp"]["dense0"]["kernel"].sharding.is_fully_replicated
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), updates, expected)


def test_run_with_muon_goes_on_from_its_checkpoint(tmp_path):
  config = smoke_config("gmlp")
  config.optimizer.update(name="muon", clip_norm=1.0, decay="kernels", layer_decay=0.9)
  config.freeze = ("patch_embed",)
  batches = [noise_batch(i) for i in range(4)]
  losses, last = run_steps(config, 2, 16, batches)
  before, state = run_steps(config, 2, 16, batches[:2])
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save_last(state)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    restored = checkpoints.restore_last(abstract_state(make_init(config, INFO, mesh_of(2)), INFO))
  after, resumed = run_steps(config, 2, 16, batches[2:], restored)
  assert before + after == losses
  jax.tree.map(np.testing.assert_array_equal, resumed, last)


@pytest.mark.parametrize(
  ("knobs", "message"),
  [
    ({"name": "adam"}, "config.optimizer.name = 'adam': one of adamw, lamb, muon, lion, sgd"),
    ({"decay": "none"}, "config.optimizer.decay = 'none': all or kernels"),
    ({"clip_norm": -1.0}, "config.optimizer.clip_norm = -1.0: a number, or 0 for no limit"),
    ({"momentum": 1.0}, "config.optimizer.momentum = 1.0: at least 0 and less than 1"),
    (
      {"name": "lamb", "independent_weight_decay": True},
      "config.optimizer.independent_weight_decay = True: not with lamb",
    ),
  ],
)
def test_what_makes_no_sense_is_refused(knobs, message):
  config = mixer.get_config()
  config.optimizer.update(knobs)
  with pytest.raises(ConfigError, match=message):
    check_config(config)
