"""The FLOPs of a training step, and the peak FLOP/s of the devices."""

import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mlp_models.flops import flops_of
from train.data.splits import DatasetInfo
from train.devices.mesh import by_example, make_mesh
from train.state import abstract_state, make_init
from train.step import make_train_step, trace_train_step


def flops_per_image(
  config: ConfigDict, info: DatasetInfo, recomputed: bool = False, platform: str | None = None
) -> float:
  """Floating-point operations per image of a training step, by XLA's count before it optimizes.

  On accelerators only products, convolutions and Fourier transforms are counted, which are nearly
  all of them.

  XLA counts a loop's body only once. So the step has one microbatch on one device, and a loop in
  the model counts as often as it runs by its share of the products.

  Args:
    recomputed: also count the operations that `config.remat` repeats.
    platform: to lower the step for, such as "tpu"; None: the platform of this machine.
  """
  device = make_mesh(devices=jax.devices()[:1])
  config = config.copy_and_resolve_references()
  config.steps_per_call = 1
  config.remat = config.remat and recomputed
  step = make_train_step(config, info, config.batch_size, device)
  state = abstract_state(make_init(config, info, device), info)
  traced = trace_train_step(step, state, config, info, device)
  costs = traced.lower(lowering_platforms=(platform,) if platform else None).cost_analysis()
  if costs is None:  # CUDA's and TPUs' backends count nothing before they compile
    return flops_of(traced.jaxpr) / config.batch_size
  repeats = flops_of(traced.jaxpr) / flops_of(traced.jaxpr, repeated=False)
  return costs["flops"] * repeats / config.batch_size


def matmul_peak(devices: Mesh, dtype: str) -> float:
  """GFLOP/s of a square matrix product on all devices at once, the best of ten runs."""
  side = 2048 if devices.devices.flat[0].platform == "cpu" else 8192
  matrices = jax.device_put(jnp.ones((devices.size, side, side), dtype), by_example(devices))
  product = jax.jit(lambda x: x @ x)
  times = []
  for _ in range(11):
    began = time.perf_counter()
    jax.block_until_ready(product(matrices))
    times.append(time.perf_counter() - began)
  return 2 * side**3 * devices.size / min(times[1:]) / 1e9
