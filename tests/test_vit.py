"""ViT at the sizes of the papers, and its weights in the layouts of the JAX codebases.

tests/test_peers.py compares it with timm and transformers.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import mlp_models
from mlp_models import vit
from mlp_models.pretrained import describe, rules
from mlp_models.pretrained.vit import LAYOUTS

TINY = {
  "image_size": 8,
  "patch_size": 4,
  "width": 16,
  "num_blocks": 2,
  "num_heads": 2,
  "head_dim": 8,
  "mlp_units": (24, 16),
  "num_classes": 5,
}
ONE_HEAD = {"width": 64, "mlp_units": (24, 64), "num_heads": 1, "head_dim": 64}
IMAGES = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)


def tiny(**fields):
  """A small model as the papers have it."""
  return mlp_models.create("vit", "B/16", **TINY | fields)


@functools.cache
def random_params(model):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
  return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def apply(model, **options):
  return model.apply({"params": random_params(model)}, IMAGES, **options)


# timm's number of parameters. The plain one has fixed positions, no class token, and a hidden layer
# of 384 units in the head.
@pytest.mark.parametrize(
  ("variant", "expected"),
  [
    ("Ti/16", 5_717_416),
    ("S/16", 22_050_664),
    ("S/16 plain", 22_050_664 - 198 * 384 + 385 * 384),
    ("B/8", 86_576_872),
    ("B/32", 88_224_232),
    ("L/16", 304_326_632),
  ],
)
def test_variants_have_the_papers_sizes(variant, expected):
  model = mlp_models.create("vit", variant)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected
  assert model.width == 64 * model.num_heads and model.mlp_units[0] == 4 * model.width


def test_class_token_and_head_start_at_zero():
  @jax.jit  # computes what is returned only
  def start(key):
    params = tiny().init(key, IMAGES)["params"]
    return params["class_token"], params["head"]["kernel"]

  class_token, kernel = start(jax.random.key(0))
  assert class_token.shape == (16,) and not np.any(class_token)
  assert kernel.shape == (16, 5) and not np.any(kernel)


@pytest.mark.parametrize("pool", ["cls", "mean", "mean_norm", "map", "flatten"])
def test_features_are_what_the_head_reads(pool):
  model = tiny(pool=pool, head_units=(12,), head_activation="tanh")
  params = random_params(model)
  rows = params["position"]["embedding"].shape[0]
  assert rows == (5 if pool == "cls" else 4)
  features = tiny(pool=pool, head_units=(12,), head_activation="tanh", num_classes=0).apply(
    {"params": {k: v for k, v in params.items() if k != "head"}}, IMAGES
  )
  assert features.shape == (4, 12) and np.abs(features).max() <= 1
  head = params["head"]
  expected = features @ head["kernel"] + head["bias"]
  np.testing.assert_allclose(apply(model), expected, atol=1e-5)


def test_fixed_positions_are_sines_and_cosines_of_column_and_row():
  positions = vit.sincos2d((3, 3), width=16)
  assert positions.shape == (9, 16) and positions.dtype == np.float32
  row, column = 2, 1
  expected = [
    wave(place / 10_000 ** (k / 3))
    for place in (column, row)
    for wave in (math.sin, math.cos)
    for k in range(4)
  ]
  np.testing.assert_allclose(positions[3 * row + column], expected, atol=1e-6)
  fixed = tiny(position="sincos2d")
  assert "position" not in random_params(fixed)
  # The class token has no position: the same as learned ones that begin with zeros.
  embedding = np.concatenate([np.zeros((1, 16)), vit.sincos2d((2, 2), 16)]).astype(np.float32)
  params = random_params(fixed) | {"position": {"embedding": embedding}}
  np.testing.assert_allclose(tiny().apply({"params": params}, IMAGES), apply(fixed), atol=1e-5)
  with pytest.raises(ValueError, match="width of 8, 12, 16, ..., not 18"):
    vit.sincos2d((2, 2), 18)


def test_intermediates_have_names():
  _, state = apply(tiny(pool="map"), mutable=["intermediates"])
  found = jax.tree.map(lambda x: x.shape, state["intermediates"])
  block = {
    "attention": {"weights": ((4, 2, 4, 4),)},
    "token_mixing": ((4, 4, 16),),
    "output": ((4, 4, 16),),
  }
  assert found == {
    "block0": block,
    "block1": block,
    "pool": {"attention": {"weights": ((4, 2, 1, 4),)}},
  }


def test_stochastic_depth_drops_both_branches_and_more_of_them_in_later_blocks():
  model = tiny(drop_path_rate=0.6)
  images = np.tile(IMAGES[:1], (64, 1, 1, 1))
  variables = {"params": random_params(model)}
  _, state = jax.jit(
    lambda key: model.apply(
      variables, images, train=True, rngs={"dropout": key}, mutable=["intermediates"]
    )
  )(jax.random.key(0))
  first, second = (state["intermediates"][name]["output"][0] for name in ("block0", "block1"))
  np.testing.assert_allclose(first, np.broadcast_to(first[:1], first.shape), atol=1e-5)
  # The blocks' results: without both branches 0.6 * 0.6, with one of them twice 0.6 * 0.4.
  change = np.abs(second - first).max(axis=(1, 2))
  kinds, counts = np.unique(np.round(change, 3), return_counts=True)
  assert kinds[0] == 0 and len(kinds) == 4
  assert 0.2 < counts[0] / 64 < 0.55
  np.testing.assert_array_equal(apply(model), apply(tiny()))


# JAX codebases ------------------------------------------------------------------------------------


def conv_kernel(params):
  kernel = params["patch_embed"]["kernel"]
  patch_size = math.isqrt(len(kernel) // 3)
  return kernel.reshape(patch_size, patch_size, 3, 16)


def vision_transformer(params):
  """Arrays by name, as google-research/vision_transformer writes them."""
  arrays = {
    "embedding/kernel": conv_kernel(params),
    "embedding/bias": params["patch_embed"]["bias"],
    "cls": params["class_token"].reshape(1, 1, 16),
    "Transformer/posembed_input/pos_embedding": params["position"]["embedding"][None],
    "Transformer/encoder_norm/scale": params["norm"]["scale"],
    "Transformer/encoder_norm/bias": params["norm"]["bias"],
    "head/kernel": params["head"]["kernel"],
    "head/bias": params["head"]["bias"],
  }
  if "head_mlp" in params:
    arrays["pre_logits/kernel"] = params["head_mlp"]["dense0"]["kernel"]
    arrays["pre_logits/bias"] = params["head_mlp"]["dense0"]["bias"]
  for i in range(2):
    names = "LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"
    arrays |= encoder_block(params[f"block{i}"], f"Transformer/encoderblock_{i}", *names)
  return arrays


def encoder_block(block, prefix, norm1, attention, norm2, mlp):
  arrays = {}
  for theirs, ours in ((norm1, "norm1"), (norm2, "norm2")):
    for leaf in ("scale", "bias"):
      arrays[f"{prefix}/{theirs}/{leaf}"] = block[ours][leaf]
  for leaf in ("kernel", "bias"):
    for part in ("query", "key", "value", "out"):
      arrays[f"{prefix}/{attention}/{part}/{leaf}"] = block["attention"][part][leaf]
    arrays[f"{prefix}/{mlp}/Dense_0/{leaf}"] = block["mlp"]["dense0"][leaf]
    arrays[f"{prefix}/{mlp}/Dense_1/{leaf}"] = block["mlp"]["dense1"][leaf]
  return arrays


def big_vision(params, is_stacked=False):
  """Arrays by name, as google-research/big_vision writes them."""
  names = "LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"
  blocks = [encoder_block(params[f"block{i}"], "", *names) for i in range(2)]
  if is_stacked:
    arrays = {f"Transformer/encoderblock{k}": np.stack([b[k] for b in blocks]) for k in blocks[0]}
  else:
    arrays = {
      f"Transformer/encoderblock_{i}{k}": x
      for i, block in enumerate(blocks)
      for k, x in block.items()
    }
  arrays |= {
    "embedding/kernel": conv_kernel(params),
    "embedding/bias": params["patch_embed"]["bias"],
    "Transformer/encoder_norm/scale": params["norm"]["scale"],
    "Transformer/encoder_norm/bias": params["norm"]["bias"],
  }
  if "head" in params:
    arrays |= {f"head/{leaf}": params["head"][leaf] for leaf in ("kernel", "bias")}
  if "class_token" in params:
    arrays["cls"] = params["class_token"].reshape(1, 1, 16)
  if "position" in params:
    embedding = params["position"]["embedding"]
    arrays["pos_embedding"] = embedding[None, 1:] if "cls" in arrays else embedding[None]
  if "pool" in params:
    pool = params["pool"]
    block = encoder_block(
      {"norm1": pool["norm"], "norm2": pool["norm"], "attention": pool["attention"]}
      | {"mlp": pool["mlp"]},
      "MAPHead_0",
      *names,
    )
    arrays |= {k: x for k, x in block.items() if "LayerNorm_1" not in k}
    arrays["MAPHead_0/probe"] = pool["probe"].reshape(1, 1, 16)
  return arrays


def loaded_logits(file, images=IMAGES):
  model, params, _ = mlp_models.load(file, say=lambda line: None)
  return model.apply({"params": params}, images), model


@pytest.mark.parametrize("head_units", [(), (12,)])
def test_files_of_vision_transformer_give_the_same_logits(head_units, tmp_path):
  model = tiny(head_units=head_units, head_activation="tanh")
  np.savez(tmp_path / "it.npz", **vision_transformer(random_params(model)))
  logits, found = loaded_logits(tmp_path / "it.npz")
  assert (found.gelu, found.norm_epsilon, found.num_heads) == ("tanh", 1e-6, 2)
  np.testing.assert_array_equal(logits, apply(model))


@pytest.mark.parametrize("prefix", ["", "params/"])
@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
def test_files_of_big_vision_give_the_same_logits(pool, is_stacked, prefix, tmp_path):
  model = tiny(pool=pool)
  params = random_params(model)
  if pool == "cls":  # it has no position there
    embedding = params["position"]["embedding"].copy()
    embedding[0] = 0
    params = params | {"position": {"embedding": embedding}}
  arrays = {prefix + k: x for k, x in big_vision(params, is_stacked).items()}
  np.savez(tmp_path / "it.npz", **arrays)
  logits, found = loaded_logits(tmp_path / "it.npz")
  assert found == model
  np.testing.assert_array_equal(logits, model.apply({"params": params}, IMAGES))


def test_a_file_without_positions_has_fixed_ones_for_224_pixels(tmp_path):
  sizes = {"image_size": 224, "patch_size": 32, "num_blocks": 2, "pool": "mean"}
  model = tiny(**sizes, position="sincos2d", num_classes=0)
  images = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  params = jax.tree.map(lambda x: np.full(x.shape, 0.01, np.float32), shapes)
  np.savez(tmp_path / "it.npz", **big_vision(params))
  logits, found = loaded_logits(tmp_path / "it.npz", images)
  assert found == model
  np.testing.assert_array_equal(logits, model.apply({"params": params}, images))


# timm ---------------------------------------------------------------------------------------------


def saved_as_timm(file, **fields):
  model = tiny(gelu="exact", **fields)
  mlp_models.save(file, model, random_params(model), layout="timm")
  return model, safetensors.numpy.load_file(file)


@pytest.mark.parametrize("pool", ["cls", "mean", "mean_norm", "map"])
def test_what_is_written_for_timm_is_read_again(pool, tmp_path):
  model, arrays = saved_as_timm(tmp_path / "it.safetensors", pool=pool, **ONE_HEAD)
  assert ("fc_norm.weight" in arrays) == (pool == "mean_norm")
  logits, found = loaded_logits(tmp_path / "it.safetensors")
  assert found == model
  np.testing.assert_array_equal(logits, apply(model))


def test_class_tokens_without_a_position_are_known_by_the_number_of_rows(tmp_path):
  file = tmp_path / "it.safetensors"
  model, arrays = saved_as_timm(file, **ONE_HEAD)
  arrays["pos_embed"] = arrays["pos_embed"][:, 1:]
  safetensors.numpy.save_file(arrays, file)
  params = random_params(model)
  embedding = params["position"]["embedding"].copy()
  embedding[0] = 0
  expected = model.apply({"params": params | {"position": {"embedding": embedding}}}, IMAGES)
  np.testing.assert_array_equal(loaded_logits(file)[0], expected)

  (timm,) = (layout for layout in LAYOUTS if layout.project == "timm")
  shapes = {name: x.shape for name, x in arrays.items()}
  table = timm.rules(timm.fields(shapes, {}), shapes)
  returned = rules.invert(
    table, rules.apply({rule.theirs: rule for rule in table}, arrays.__getitem__)
  )
  assert returned["pos_embed"].shape == (1, 4, 64)
  jax.tree.map(np.testing.assert_array_equal, returned, arrays)


def test_other_structures_are_refused_by_the_names_of_their_arrays(tmp_path):
  file = tmp_path / "it.safetensors"
  _, arrays = saved_as_timm(file)
  safetensors.numpy.save_file(arrays | {"blocks.0.ls1.gamma": np.ones(16, np.float32)}, file)
  with pytest.raises(mlp_models.WeightsError, match=r"timm's vit with blocks\.0\.ls1\.gamma"):
    mlp_models.load(file)


def test_what_timm_must_be_told_is_said(tmp_path):
  lines = []
  for epsilon in (1e-6, 1e-5):
    model = tiny(norm_epsilon=epsilon, **ONE_HEAD)
    mlp_models.save(tmp_path, model, random_params(model), layout="timm", say=lines.append)
  expected = "timm's vit is this model if it is made with norm_layer=functools.partial("
  assert len(lines) == 1 and lines[0].startswith(expected)


@pytest.mark.parametrize(
  ("config", "num_heads", "gelu"),
  [
    ({}, 16, "exact"),
    ({"architecture": "vit_so400m_patch14_siglip_224"}, 16, "exact"),
    ({"architecture": "vit_so400m_patch16_siglip_gap_256"}, 16, "tanh"),
    ({"architecture": "vit_base_patch16_siglip_224"}, 12, "exact"),
    ({"model_args": {"num_heads": 8, "act_layer": "gelu_tanh"}}, 8, "tanh"),
  ],
)
def test_heads_and_gelu_follow_config_and_architecture(config, num_heads, gelu, tmp_path):
  shapes = {"width": 1152, "mlp_units": (24, 1152), "num_heads": 16, "head_dim": 72}
  model = tiny(gelu="exact", num_blocks=1, **shapes)
  mlp_models.save(tmp_path / "model.safetensors", model, random_params(model), layout="timm")
  (tmp_path / "config.json").write_text(json.dumps(config))
  fields = describe(tmp_path).fields
  assert (fields["num_heads"], fields["gelu"]) == (num_heads, gelu)
  with pytest.raises(mlp_models.WeightsError, match="'quick_gelu' is not supported"):
    (tmp_path / "config.json").write_text('{"model_args": {"act_layer": "quick_gelu"}}')
    describe(tmp_path)
