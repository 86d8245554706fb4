"""Background saves do not overlap, and only the version that wrote a checkpoint reads it."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import mlp_models
from train import data
from train.devices.mesh import make_mesh
from train.errors import WorkdirError
from train.loop import train_and_evaluate
from train.run.checkpoint import Checkpoints, load_trained_model
from train.state import abstract_state, make_init


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


@pytest.mark.parametrize(("by", "number"), [("0.1", 0), ("9.9.9", 99)])
def test_a_checkpoint_of_another_version_is_refused_in_one_line(
  by, number, finished_run, smoke_config, tmp_path, monkeypatch
):
  folder = tmp_path / "run"
  shutil.copytree(finished_run, folder)
  (folder / "summary.json").unlink()  # only an unfinished run is resumed
  if by == "0.1":  # which saved no version
    path = folder / "checkpoints" / "last" / "27" / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))
  else:
    metadata = {"state_version": 99, "saved_by": f"mlp_models {by}"}
    monkeypatch.setattr("train.run.checkpoint._VERSION", metadata)
    with Checkpoints(folder) as checkpoints:
      template = abstract_state_of(smoke_config(epochs=3))
      state = checkpoints.restore_last(template)
      checkpoints.save_last(state.replace(step=state.step + 1))
    monkeypatch.undo()
  before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  with pytest.raises(WorkdirError) as error:
    train_and_evaluate(smoke_config(epochs=3), folder)
  assert f"was saved by mlp_models {by} (state version {number}), which reads it" in str(
    error.value
  )
  assert f"this is mlp_models {mlp_models.__version__} (version 2)" in str(error.value)
  assert "\n" not in str(error.value)
  assert {path: path.read_bytes() for path in before} == before


def test_weights_of_an_earlier_version_are_read_and_of_a_later_one_refused(
  finished_run, tmp_path, monkeypatch
):
  shutil.copytree(finished_run / "checkpoints", tmp_path / "checkpoints")
  for name in ("config.json", "dataset.json"):
    shutil.copy(finished_run / name, tmp_path)
  for path in tmp_path.glob("checkpoints/best/*/_CHECKPOINT_METADATA"):  # as 0.1 wrote it
    path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))
  assert load_trained_model(tmp_path, make_mesh()).weights.mean.shape == (3,)
  for path in tmp_path.glob("checkpoints/best/*/_CHECKPOINT_METADATA"):
    later = {"state_version": 99, "saved_by": "mlp_models 9.9.9"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": later}))
  with pytest.raises(WorkdirError, match=r"saved by mlp_models 9.9.9 \(state version 99\)"):
    load_trained_model(tmp_path, make_mesh())


def test_a_checkpoint_whose_metadata_is_damaged_is_not_taken_for_an_old_one(
  finished_run, smoke_config, tmp_path
):
  folder = tmp_path / "run"
  shutil.copytree(finished_run, folder)
  (folder / "summary.json").unlink()
  path = folder / "checkpoints" / "last" / "27" / "_CHECKPOINT_METADATA"
  path.write_text(path.read_text()[:40])
  with pytest.raises(WorkdirError, match="27 can't be read: its metadata is missing or damaged"):
    train_and_evaluate(smoke_config(epochs=3), folder)


def abstract_state_of(config):
  mesh, info = make_mesh(), data.describe(config.data)
  return abstract_state(make_init(config, info, mesh), info)
