"""The number of CPU devices, and of images that each computes at a time."""

import jax
import pytest

from configs import mixer
from train.devices.mesh import make_mesh, microbatch_size, sharded_axis
from train.errors import ConfigError


@pytest.mark.parametrize(
  ("batch_size", "microbatch", "cpu_microbatch", "expected"),
  [
    (128, None, 8, 8),
    (128, None, 24, 16),
    (128, None, 999, 64),
    (128, 32, 8, 32),
    (14, None, 4, 1),
  ],
)
def test_microbatch_divides_a_devices_share(batch_size, microbatch, cpu_microbatch, expected):
  config = mixer.get_config()
  config.batch_size, config.microbatch, config.cpu_microbatch = (
    batch_size,
    microbatch,
    cpu_microbatch,
  )
  assert microbatch_size(config, make_mesh(devices=jax.devices()[:2])) == expected


def test_what_does_not_divide_is_refused_with_the_numbers():
  config = mixer.get_config()
  mesh = make_mesh(devices=jax.devices()[:3])
  with pytest.raises(ConfigError, match="batch_size=128 does not divide by 3 devices"):
    microbatch_size(config, mesh)
  config.batch_size, config.microbatch = 96, 10
  with pytest.raises(ConfigError, match="microbatch=10 does not divide a device's 32 images"):
    microbatch_size(config, mesh)


def test_mesh_takes_what_is_left_and_cuts_the_largest_axis():
  devices = jax.devices()[:8]
  assert dict(make_mesh(devices=devices).shape) == {"data": 8, "fsdp": 1}
  mesh = make_mesh(-1, 4, devices)
  assert dict(mesh.shape) == dict(make_mesh(2, -1, devices).shape) == {"data": 2, "fsdp": 4}
  assert sharded_axis((3, 3, 64, 1024), mesh) == 3
  assert sharded_axis((4096, 10, 1023), mesh) == 0
  assert sharded_axis((1023, 1023), mesh) is None  # nothing divides
  assert sharded_axis((1024,), mesh) is None  # too small
  assert sharded_axis((4096, 1024), make_mesh(devices=devices)) is None


@pytest.mark.parametrize(
  ("data", "fsdp", "message"),
  [
    (4, 3, r"config.mesh = 4 x 3 needs 12 devices, and there are 8"),
    (2, 2, r"config.mesh = 2 x 2 needs 4 devices, and there are 8"),
    (-1, 3, r"config.mesh = -1 x 3: 8 devices do not divide by 3"),
  ],
)
def test_mesh_that_does_not_fit_is_refused_with_the_numbers(data, fsdp, message):
  with pytest.raises(ConfigError, match=message):
    make_mesh(data, fsdp, jax.devices()[:8])
