"""Lists the models and their variants, with their sizes and where these are from.

python -m mlp_models
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import mlp_models
from mlp_models.flops import count_flops

_KERAS = "the Keras example"
_SOURCES = {  # by model and variant; "": the model's other variants
  "mixer": {"keras": _KERAS, "": "arXiv:2105.01601, table 1"},
  "fnet": {"keras": _KERAS, "": "arXiv:2105.03824, table 1"},
  "gmlp": {"keras": _KERAS, "": "arXiv:2105.08050, table 1"},
  "perceiver": {
    "keras": _KERAS,
    "paper": "arXiv:2103.03206, sec. 4.1",
    "": "arXiv:2107.14795, table 7",
  },
  "vit": {
    "keras": _KERAS,
    "S/16 plain": "arXiv:2205.01580, table 1",
    "": "arXiv:2010.11929, table 1",
  },
}
_ROW = "{:<10}{:<12}{:>6}{:>15}{:>9}  {}"


class Size(NamedTuple):
  """image_size in pixels; parameters; operations of one image's logits."""

  image_size: int
  parameters: int
  flops: int


def size_of(name: str, variant: str) -> Size:
  """The size of a variant, from shapes alone."""
  model: Any = mlp_models.create(name, variant)
  images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
  return Size(model.image_size, parameters, count_flops(model.apply, variables, images))


def main() -> None:
  print(_ROW.format("model", "variant", "pixels", "parameters", "GFLOP", "as in"))
  for name, variants in mlp_models.VARIANTS.items():
    for variant in variants:
      size = size_of(name, variant)
      source = _SOURCES[name].get(variant, _SOURCES[name][""])
      gflop = f"{size.flops / 1e9:.2f}"
      row = (name, variant, size.image_size, f"{size.parameters:,}", gflop, source)
      print(_ROW.format(*row), flush=True)


if __name__ == "__main__":
  main()
