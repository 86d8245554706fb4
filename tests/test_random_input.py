"""Random values of knobs and random files of weights: accepted, or one clear error."""

import functools
import io
import sys

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

import mlp_models
from configs import fnet, gmlp, mixer, perceiver, vit
from train import flags
from train.check import check_config
from train.errors import ConfigError
from train.knobs import knobs

MODULES = {module.__name__: module for module in (mixer, fnet, gmlp, perceiver, vit)}
KNOBS = {name: sorted(knobs(module.get_config())) for name, module in MODULES.items()}

bounded = functools.partial(
  settings, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
any_knob = st.sampled_from([(name, key) for name, keys in KNOBS.items() for key in keys])
numbers = st.integers() | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**9, 10**18])
values = st.recursive(
  st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
  lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner),
  max_leaves=4,
) | st.sampled_from([np.float32, np.float32(1), np.ones(2), np.int64(3), {}, {"a": 1}, object()])


@bounded(max_examples=400)
@given(any_knob, values)
def test_value_of_any_type_in_a_config_is_accepted_or_refused_in_one_line(knob, value):
  name, key = knob
  config = MODULES[name].get_config()
  *groups, last = key.split(".")
  holder = functools.reduce(lambda group, part: group[part], groups, config)
  with holder.ignore_type():
    holder[last] = value
  try:
    check_config(config)
  except ConfigError as error:
    assert "\n" not in str(error)
    assert len(str(error)) < 1000


texts = st.text(max_size=12) | values.map(str) | st.just("9" * 5000)


@bounded(max_examples=400)
@given(any_knob, texts)
def test_text_on_the_command_line_is_accepted_or_refused_in_one_line(knob, text):
  name, key = knob
  path = f"{name.replace('.', '/')}.py"
  parser = flags.Parser()
  parser.add_argument("--config")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", ["train.main", "--config", path, f"--config.{key}={text}"])
    patch.setattr(sys, "stderr", io.StringIO())
    try:
      _, config = flags.parse(parser)
    except SystemExit as exit:
      assert exit.code == 2
      error = sys.stderr.getvalue()
      assert error.startswith("error: ") and error.count("\n") == 1
      return
  assert isinstance(config, ConfigDict)
  try:
    check_config(config)
  except ConfigError as error:
    assert "\n" not in str(error)


@functools.cache
def weights(name: str) -> dict[str, np.ndarray]:
  """Weights by canonical name of a small model."""
  sizes = {"image_size": 16, "patch_size": 8, "width": 12, "num_blocks": 1}
  if name in ("perceiver", "vit"):
    sizes |= {"num_heads": 2} | {"ffn_units" if name == "perceiver" else "mlp_units": (12, 12)}
  model = mlp_models.create(name, **sizes)
  images = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
  return mlp_models.keras_weights.from_params(name, zeros)


arrays = st.sampled_from([np.zeros(()), np.zeros(0), np.zeros((2, 3)), np.array(["a"])])
names = st.text("ab/0", max_size=8) | st.sampled_from(["block1/norm/scale", "ä", "../x"])
arrays |= st.sampled_from([np.array([object()]), np.array([1j]), [[1], [1, 2]], None, "a", 0.5])


@bounded(max_examples=60)
@given(st.data(), st.sampled_from(mlp_models.MODELS))
def test_wrong_weights_are_one_clear_error(data, name):
  wrong = dict(weights(name))
  key = data.draw(st.sampled_from(sorted(wrong)))
  change = data.draw(st.sampled_from(["value", "name", "missing", "more"]))
  if change == "value":
    wrong[key] = data.draw(arrays)
  elif change == "more":
    wrong[data.draw(names)] = data.draw(arrays)
  else:
    array = wrong.pop(key)
    if change == "name":
      wrong[data.draw(names)] = array
  try:
    mlp_models.keras_weights.to_params(name, wrong)
  except ValueError as error:
    assert "\n" not in str(error)
    assert name in str(error)
  else:  # scalars of a right shape
    assert {k: np.shape(v) for k, v in wrong.items()} == {
      k: np.shape(v) for k, v in weights(name).items()
    }
