"""Prints parameters, operations and memory of every variant: the columns of docs/models.md.

    python -m benchmarks.model_sizes [--models vit mixer]

Memory is what XLA's CPU compiler needs for a training step of 8 images in float32 on one device:
parameters, AdamW's moments, activations and gradients. Nothing is run.
"""

import argparse

import jax

import mlp_models
from configs import default
from mlp_models.__main__ import size_of
from train import pretrained
from train.data.splits import DatasetInfo
from train.devices.mesh import make_mesh
from train.state import abstract_state, make_init
from train.step import make_train_step, trace_train_step

_IMAGES = 8  # in a step


def step_bytes(name: str, variant: str) -> int:
  """Bytes of a training step, by the compiler's count."""
  model = mlp_models.create(name, variant)
  config = default.get_config()
  config.model = {"name": name, "variant": variant}
  config.batch_size = _IMAGES
  config = pretrained.resolve(config)
  classes = tuple(str(n) for n in range(model.num_classes))
  shape = (model.image_size, model.image_size, 3)
  info = DatasetInfo("drawn", classes, shape, {"train": _IMAGES})
  mesh = make_mesh(devices=jax.devices()[:1])
  step = make_train_step(config, info, _IMAGES, mesh)
  state = abstract_state(make_init(config, info, mesh), info)
  memory = trace_train_step(step, state, config, info, mesh).lower().compile().memory_analysis()
  assert memory is not None
  arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return arguments - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument("--models", nargs="+", default=mlp_models.MODELS, choices=mlp_models.MODELS)
  for name in parser.parse_args().models:
    for variant in mlp_models.VARIANTS[name]:
      size, memory = size_of(name, variant), step_bytes(name, variant)
      print(
        f"| {name} {variant} | {size.parameters:,} | {size.flops / 1e9:.2f} "
        f"| {memory / 2**30:.2f} GiB |",
        flush=True,
      )


if __name__ == "__main__":
  main()
