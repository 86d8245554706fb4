"""The sizes of the papers train with everything that saves memory."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_step import INFO, mesh_of

from configs import default
from train import pretrained
from train.devices.mesh import by_example
from train.state import make_init
from train.step import make_train_step

STEPS = 2  # the second loss sees the first update


def losses(config: ConfigDict, devices: int, microbatch: int) -> list[float]:
  """Of two steps over the same eight images."""
  mesh = mesh_of(1, devices)
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8),
    "label": rng.integers(0, 100, 8).astype(np.int32),
    "mask": np.ones(8, bool),
  }
  batches = jax.tree.map(lambda x: np.stack([x] * STEPS), batch)
  state = make_init(config, INFO, mesh)(np.full(3, 127, np.float32), np.full(3, 5400, np.float32))
  step = make_train_step(config, INFO, microbatch, mesh)
  _, sums = step(state, jax.device_put(batches, by_example(mesh, axis=1)))
  return (sums.loss / sums.count).tolist()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["mixer", "vit"])
def test_b16_learns_the_same_sharded_in_microbatches_and_recomputed(name):
  config = default.get_config()
  config.model = {"name": name, "variant": "B/16", "image_size": 32, "head_init": "glorot"}
  config.optimizer.learning_rate = 1e-5
  config = pretrained.resolve(config)
  with config.unlocked():
    whole = losses(config, devices=1, microbatch=8)
    assert abs(whole[1] - whole[0]) > 0.1
    config.remat = True
    cut = losses(config, devices=8, microbatch=1)
    config.dtype = "bfloat16"
    rounded = losses(config, devices=8, microbatch=1)
  np.testing.assert_allclose(cut, whole, rtol=1e-4)
  np.testing.assert_allclose(rounded, whole, rtol=5e-3)
