"""Models with weights of timm and transformers, against what those compute.

tests/golden/README.md describes the files; tests/test_peers_full.py compares directly.
"""

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDEN
from flax.traverse_util import flatten_dict

import mlp_models
from mlp_models.fnet import FNet, FNetBlock
from mlp_models.pretrained import rules
from mlp_models.pretrained.layouts import find_layout
from mlp_models.pretrained.sources import open_source

CASES = sorted(path.parent for path in (GOLDEN / "peers").glob("*/expected.npz"))


def outputs(model, params, images):
  """What "logits" are in a golden file."""
  if not isinstance(model, FNet):
    return model.apply({"params": params}, images)
  # transformers' FNet reads text: its encoder is compared, with pixels in the place of embeddings.
  x_BxTxD = images.reshape(len(images), -1, model.width)
  for i in range(model.num_blocks):
    block = FNetBlock(
      hidden_units=model.hidden_units,
      gelu=model.gelu,
      norm_epsilon=model.norm_epsilon,
      dropout_rate=0.0,
      drop_path_rate=0.0,
      dtype=model.dtype,
    )
    x_BxTxD = block.apply({"params": params[f"block{i}"]}, x_BxTxD)
  return x_BxTxD


def in_their_names(folder, grads):
  """Gradients by the names of the arrays in a file."""
  source = open_source(folder)
  layout, full_names = find_layout(source)
  shapes = {name: source.shapes[full] for name, full in full_names.items()}
  table = layout.rules(layout.fields(shapes, source.config), shapes)
  found = rules.invert(
    [rule for rule in table if rule.theirs in shapes], flatten_dict(grads, sep="/")
  )
  return {full_names[name]: array for name, array in found.items()}


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_logits_and_gradients_are_those_of_the_peer(folder):
  with np.load(folder / "expected.npz") as arrays:
    expected = dict(arrays)
  model, params, _ = mlp_models.load(folder, say=lambda line: None)

  @jax.jit
  def logits_and_gradients(params):
    logits, pull_back = jax.vjp(lambda params: outputs(model, params, expected["images"]), params)
    return logits, pull_back(expected["cotangent"])[0]

  logits, grads = logits_and_gradients(params)
  largest = np.abs(expected["logits"]).max()
  np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5 * largest)

  grads = in_their_names(folder, jax.tree.map(np.asarray, grads))
  theirs = {name[5:]: array for name, array in expected.items() if name.startswith("grad/")}
  assert theirs.keys() == grads.keys()
  # Some are zero but for rounding: a softmax does not change with the bias of its keys.
  slack = 1e-6 * max(np.linalg.norm(grad) for grad in theirs.values())
  for name, grad in theirs.items():
    error = np.linalg.norm(grads[name] - grad)
    assert error <= 1e-4 * np.linalg.norm(grad) + slack, f"{name}: {error}"


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_arrays_return_to_the_file_as_they_were(folder):
  _, params, _ = mlp_models.load(folder, say=lambda line: None)
  arrays = safetensors.numpy.load_file(folder / "model.safetensors")
  for name, array in in_their_names(folder, params).items():
    np.testing.assert_array_equal(array, arrays[name], err_msg=name)


def mixer_of_the_authors(arrays, images):
  """Logits by the formulas of arXiv:2105.01601, section 2, from arrays in the authors' names."""

  def dense(name, x):
    return x @ arrays[f"{name}/kernel"] + arrays[f"{name}/bias"]

  def norm(name, x):
    deviation = x - x.mean(axis=-1, keepdims=True)
    x = deviation / np.sqrt((deviation**2).mean(axis=-1, keepdims=True) + 1e-6)
    return x * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]

  def mlp(name, x):
    h = dense(f"{name}/Dense_0", x)
    h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return dense(f"{name}/Dense_1", h)

  kernel_PxPxCxD = arrays["stem/kernel"]
  size, side = len(kernel_PxPxCxD), images.shape[1] // len(kernel_PxPxCxD)
  patches = images.reshape(-1, side, size, side, size, 3)
  x = np.einsum("bipjqc,pqcd->bijd", patches, kernel_PxPxCxD) + arrays["stem/bias"]
  x = x.reshape(len(x), side * side, -1)
  for block in ("MixerBlock_0", "MixerBlock_1"):
    y = norm(f"{block}/LayerNorm_0", x).swapaxes(1, 2)
    x = x + mlp(f"{block}/token_mixing", y).swapaxes(1, 2)
    x = x + mlp(f"{block}/channel_mixing", norm(f"{block}/LayerNorm_1", x))
  return dense("head", norm("pre_head_layer_norm", x).mean(axis=1))


@pytest.mark.parametrize("prefix", ["", "params/"])
def test_mixer_of_an_npz_file_has_the_logits_of_its_authors(prefix, tmp_path):
  tokens, width, token_units, channel_units = 4, 6, 5, 7
  layers = {"stem": (2, 2, 3, width), "head": (width, 8), "pre_head_layer_norm": (width,)}
  for block in ("MixerBlock_0", "MixerBlock_1"):
    layers |= {
      f"{block}/LayerNorm_0": (width,),
      f"{block}/LayerNorm_1": (width,),
      f"{block}/token_mixing/Dense_0": (tokens, token_units),
      f"{block}/token_mixing/Dense_1": (token_units, tokens),
      f"{block}/channel_mixing/Dense_0": (width, channel_units),
      f"{block}/channel_mixing/Dense_1": (channel_units, width),
    }
  rng = np.random.default_rng(0)
  arrays = {f"{layer}/bias": rng.normal(size=shape[-1]) for layer, shape in layers.items()}
  for layer, shape in layers.items():
    leaf = "scale" if len(shape) == 1 else "kernel"
    arrays[f"{layer}/{leaf}"] = rng.normal(size=shape)
  file = tmp_path / "Mixer.npz"
  np.savez(file, **{prefix + name: array.astype(np.float32) for name, array in arrays.items()})
  images = rng.normal(size=(3, 4, 4, 3))

  model, params, _ = mlp_models.load(file, say=lambda line: None)
  logits = jax.jit(model.apply)({"params": params}, images.astype(np.float32))
  expected = mixer_of_the_authors(arrays, images)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_timms_gated_mixer_is_refused_by_its_shapes(tmp_path):
  arrays = safetensors.numpy.load_file(GOLDEN / "peers" / "timm_mixer" / "model.safetensors")
  for mlp in ("mlp_tokens", "mlp_channels"):
    for block in (0, 1):
      name = f"blocks.{block}.{mlp}.fc2.weight"
      arrays[name] = np.ascontiguousarray(np.split(arrays[name], 2, axis=1)[0])
  safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
  with pytest.raises(mlp_models.WeightsError, match="gates.*gmixer"):
    mlp_models.load(tmp_path)
