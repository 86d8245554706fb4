"""What Mixer, gMLP and FNet have beyond the Keras examples: the papers' sizes, intermediates,
stochastic depth, and models without a head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlp_models
from mlp_models import dropout

FAMILIES = ("mixer", "gmlp", "fnet")
SMALL = {
  "image_size": 8,
  "patch_size": 4,
  "width": 16,
  "num_blocks": 2,
  "num_classes": 5,
  "dropout_rate": 0.0,
}
every_family = pytest.mark.parametrize("name", FAMILIES)
IMAGES = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)


def small(name, **overrides):
  return mlp_models.create(name, **SMALL | overrides)


@functools.cache
def images():
  return np.random.default_rng(1).normal(size=IMAGES.shape).astype(np.float32)


@functools.cache
def variables(name):
  """Random parameters, biases and scales included."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(small(name).init, jax.random.key(0), IMAGES)
  return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def parameters(model):
  images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


@pytest.mark.parametrize(
  ("name", "variant", "expected"),
  [
    # arXiv:2105.01601, table 1, in millions: 19, 18, 60, 59, 207 and 431, without the head.
    ("mixer", "S/32", 18_591_624),
    ("mixer", "S/16", 18_015_264),
    ("mixer", "B/32", 59_524_428),
    ("mixer", "B/16", 59_111_472),
    ("mixer", "L/16", 207_171_168),
    ("mixer", "H/14", 431_069_952),
    # arXiv:2105.08050, table 1: 6, 20 and 73 with the head; timm has as many as we.
    ("gmlp", "Ti/16", 5_867_328 - 129_000),
    ("gmlp", "S/16", 19_422_656 - 257_000),
    ("gmlp", "B/16", 73_075_392 - 513_000),
    # arXiv:2105.03824 counts 83 and 238 with what reads text.
    ("fnet", "base", 57_447_168),
    ("fnet", "large", 202_535_936),
  ],
)
def test_variants_have_the_papers_parameters(name, variant, expected):
  params = parameters(mlp_models.create(name, variant, num_classes=0))
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected
  head = parameters(mlp_models.create(name, variant, num_blocks=1))["head"]["kernel"]
  assert head.shape[1] == 1000


@every_family
def test_fields_give_the_layers_their_sizes(name):
  if name == "mixer":
    fields = {"token_units": 6, "channel_units": 24, "shared_norm": False, "head_norm": True}
    params = parameters(small(name, **fields))
    assert params["block1"]["token_mlp"]["in"]["kernel"].shape == (4, 6)
    assert params["block1"]["channel_mlp"]["out"]["kernel"].shape == (24, 16)
    assert params["block1"].keys() == {"norm1", "norm2", "token_mlp", "channel_mlp"}
    assert "norm" in params
  elif name == "gmlp":
    params = parameters(small(name, hidden_units=24, head_norm=True))
    assert params["block1"]["proj_in"]["kernel"].shape == (16, 24)
    assert params["block1"]["proj_out"]["kernel"].shape == (12, 16)
    assert "norm" in params
    with pytest.raises(ValueError, match="hidden_units is 25"):
      small(name, hidden_units=25)
  else:
    params = parameters(small(name, hidden_units=24))
    assert params["block1"]["ffn"]["in"]["kernel"].shape == (16, 24)


@every_family
def test_intermediates_are_there_when_asked_for_and_change_nothing(name):
  model, features = small(name), small(name, num_classes=0)

  @jax.jit
  def apply(variables, images):
    return (
      model.apply(variables, images),
      model.apply(variables, images, mutable=["intermediates"]),
      features.apply(variables, images),
    )

  logits, (same_logits, state), mean = apply(variables(name), images())
  np.testing.assert_array_equal(logits, same_logits)
  blocks = state["intermediates"]
  assert blocks.keys() == {"block0", "block1"}
  for block in blocks.values():
    assert block.keys() == {"token_mixing", "output"}
    assert block["output"][0].shape == block["token_mixing"][0].shape == (4, 4, 16)
  # Without a norm before the head, features are the mean over the tokens of the last output.
  np.testing.assert_allclose(mean, blocks["block1"]["output"][0].mean(axis=1), atol=1e-5)
  remat = functools.partial(small(name, remat=True).apply, mutable=["intermediates"])
  _, shapes = jax.eval_shape(remat, variables(name), IMAGES)
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, state)


@every_family
def test_token_mixing_is_what_joins_the_residual(name):
  params = dict(variables(name)["params"])
  if name == "mixer":  # let channels add nothing
    block = params["block1"]
    params["block1"] = block | {"channel_mlp": jax.tree.map(np.zeros_like, block["channel_mlp"])}
  apply = jax.jit(functools.partial(small(name).apply, mutable=["intermediates"]))
  blocks = apply({"params": params}, images())[1]["intermediates"]
  before, after = (blocks[block]["output"][0] for block in ("block0", "block1"))
  mixed = blocks["block1"]["token_mixing"][0]
  if name == "fnet":
    np.testing.assert_allclose(mixed, np.fft.fft2(before).real, atol=1e-4)
    return
  if name == "gmlp":
    proj_out = params["block1"]["proj_out"]
    mixed = mixed @ proj_out["kernel"] + proj_out["bias"]
  np.testing.assert_allclose(after - before, mixed, atol=1e-5)
  assert np.abs(mixed).max() > 0.1


@every_family
def test_without_classes_there_is_no_head(name):
  model = small(name, num_classes=0)
  assert "head" not in parameters(model)
  features = jax.eval_shape(model.apply, variables(name), IMAGES)
  assert features.shape == (4, 16) and features.dtype == jnp.float32


def initial(model, *path):
  """Initial values of some parameters; XLA drops the others."""

  @jax.jit
  def init(key):
    params = model.init(key, images())["params"]
    return functools.reduce(lambda tree, key: tree[key], path, params)

  return init(jax.random.key(0))


@every_family
def test_heads_start_as_in_the_papers_code(name):
  np.testing.assert_array_equal(initial(small(name, head_init="zeros"), "head", "kernel"), 0)
  papers = {
    fields.get("head_init") for key, fields in mlp_models.VARIANTS[name].items() if key != "keras"
  }
  assert papers == {None if name == "fnet" else "zeros"}


def test_gates_start_open_and_alike_in_all_tokens():
  spatial = initial(small("gmlp", spatial_init="near_zero"), "block0", "spatial")
  assert 0 < np.abs(spatial["kernel"]).max() < 1e-5
  np.testing.assert_array_equal(spatial["bias"], 1)


@every_family
def test_stochastic_depth_leaves_out_whole_branches_by_the_place_in_the_batch(name):
  count = 64
  same = np.repeat(images()[:1], count, axis=0)
  model = small(name, num_classes=0, drop_path_rate=0.5)

  @jax.jit
  def features(variables, images, positions):
    rngs = {"dropout": jax.random.key(3)}
    return model.apply(variables, images, train=True, positions=positions, rngs=rngs)

  places = np.arange(count, dtype=np.int32)
  drawn = features(variables(name), same, places)
  np.testing.assert_array_equal(features(variables(name), same, places[::-1]), drawn[::-1])

  # The first block's rate is 0. In the second, each branch is left out or not, and counts twice.
  outcomes, counts = np.unique(np.round(drawn, 4), axis=0, return_counts=True)
  assert len(counts) == {"gmlp": 2, "mixer": 4, "fnet": 4}[name]
  assert counts.min() > count / len(counts) / 3
  if name == "fnet":
    return
  params = variables(name)["params"]
  first = {key: params[key] for key in params if key != "block1"}
  without = small(name, num_classes=0, num_blocks=1).apply({"params": first}, same[:1])
  assert np.abs(outcomes - without).max(axis=1).min() < 1e-3
  if name == "gmlp":  # linear after its only branch: the mean is what evaluation gives
    evaluation = model.apply(variables(name), same[:1])
    np.testing.assert_allclose(outcomes.mean(axis=0), evaluation[0], atol=1e-3)


def test_stochastic_depth_preserves_the_mean_and_grows_with_depth():
  assert dropout.path_rates(0.2, 5) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
  assert dropout.path_rates(0.2, 1) == [0]
  layer, x = dropout.DropPath(0.2), np.ones((10_000, 2, 3), np.float32)
  seeds = np.random.default_rng(0).integers(2**32, size=10_000, dtype=np.uint32)
  y = np.asarray(layer.apply({}, x, rngs=dropout.stream(seeds)))
  assert (y == y[:, :1, :1]).all() and set(np.unique(y)) == {0, np.float32(1.25)}
  assert np.mean(y) == pytest.approx(1, abs=0.02)
  np.testing.assert_array_equal(layer.apply({}, x), x)
