"""Saves in the background do not overlap."""

import jax
import numpy as np
import orbax.checkpoint as ocp

from train import data
from train.devices.mesh import make_mesh
from train.run.checkpoint import Checkpoints
from train.state import make_init


def test_a_save_begins_when_no_other_is_under_way(smoke_config, tmp_path, monkeypatch):
  config = smoke_config()
  mesh = make_mesh(data=1, devices=jax.devices()[:1])
  info = data.describe(config.data)
  state = make_init(config, info, mesh)(np.zeros(3, np.float32), np.ones(3, np.float32))
  save, managers, under_way = ocp.CheckpointManager.save, set(), []

  def spy(manager, *arguments, **named):
    under_way.extend(other for other in managers if other.is_saving_in_progress())
    managers.add(manager)
    return save(manager, *arguments, **named)

  monkeypatch.setattr(ocp.CheckpointManager, "save", spy)
  with Checkpoints(tmp_path) as checkpoints:
    for epoch in range(1, 5):
      checkpoints.save_last(state.replace(epoch=np.int32(epoch)))
      checkpoints.save_best(state.replace(epoch=np.int32(epoch)))
  assert len(managers) == 2
  assert under_way == []
