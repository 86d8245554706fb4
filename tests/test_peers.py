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
