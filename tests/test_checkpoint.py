"""Checkpoints: saved one at a time, read by the version that wrote them, and never when damaged."""

import collections
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import numbers

import mlp_models
from train import data
from train.devices.mesh import by_example, make_mesh
from train.errors import StorageError, WorkdirError
from train.loop import train_and_evaluate
from train.run.checkpoint import Checkpoints, load_trained_model
from train.run.checksum import checksum
from train.state import abstract_state, make_init


@pytest.mark.slow
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


def damage_metadata(checkpoint: Path) -> None:
  path = checkpoint / "_CHECKPOINT_METADATA"
  path.write_text(path.read_text()[:40])


def empty(checkpoint: Path) -> None:
  for path in arrays(checkpoint):
    path.write_bytes(b"")


def tear(checkpoint: Path) -> None:
  for path in arrays(checkpoint):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(checkpoint: Path) -> None:
  for path in arrays(checkpoint):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def remove_arrays(checkpoint: Path) -> None:
  for path in arrays(checkpoint):
    path.unlink()


def remove_tree_description(checkpoint: Path) -> None:
  (checkpoint / "default" / "_METADATA").unlink()


def arrays(checkpoint: Path) -> list[Path]:
  return list((checkpoint / "default" / "ocdbt.process_0" / "d").iterdir())


@pytest.fixture
def stopped_run(finished_run, tmp_path) -> Path:
  """A copy of the finished run that has yet to be tested; its last states are 18 and 27."""
  folder = tmp_path / "run"
  shutil.copytree(finished_run, folder)
  (folder / "summary.json").unlink()
  return folder


DAMAGES = [damage_metadata, flip_a_bit, empty, tear, remove_arrays, remove_tree_description]


@pytest.mark.parametrize(
  "damage",
  [*DAMAGES[:2], *(pytest.param(damage, marks=pytest.mark.slow) for damage in DAMAGES[2:])],
)
def test_instead_of_a_damaged_state_the_one_before_is_used(
  damage, stopped_run, finished_run, smoke_config, capsys
):
  damage(stopped_run / "checkpoints" / "last" / "27")
  train_and_evaluate(smoke_config(epochs=3), stopped_run)
  error = capsys.readouterr().err
  assert "last/27 can't be read" in error and "the one before it is used" in error
  assert error.count("\n") == 1
  assert numbers(stopped_run) == numbers(finished_run)
  assert len(list((stopped_run / "checkpoints").glob("damaged-last-27-*"))) == 1
  names = {path.name for path in (stopped_run / "checkpoints" / "last").iterdir()}
  assert names == {"18", "27"}


def test_a_changed_number_that_orbax_does_not_notice_is_found(stopped_run, smoke_config, capsys):
  template = abstract_state_of(smoke_config(epochs=3))
  with Checkpoints(stopped_run) as checkpoints:
    state = checkpoints.restore_last(template)
    path = stopped_run / "checkpoints" / "last" / "27" / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    changed = np.asarray(state.mean).view(np.uint32) ^ np.uint32(1 << 3)
    state = state.replace(mean=changed.view(np.float32), step=state.step + 1)
    checkpoints.save_last(state, wait=True)
  path = stopped_run / "checkpoints" / "last" / "28" / "_CHECKPOINT_METADATA"
  changed = json.loads(path.read_text())
  changed["custom_metadata"]["checksum"] = metadata["custom_metadata"]["checksum"]
  path.write_text(json.dumps(changed))
  capsys.readouterr()
  with Checkpoints(stopped_run) as checkpoints:
    assert int(checkpoints.restore_last(template).step) == int(state.step) - 1
  assert "28 can't be read: its checksum is another" in capsys.readouterr().err


RUIN = {
  "empty": lambda content: b"",
  "torn": lambda content: content[: len(content) // 2],
  "zeros": lambda content: bytes(len(content)),
  "flipped": lambda content: content[:9] + bytes([content[9] ^ 4]) + content[10:],
}


@pytest.mark.slow
@pytest.mark.parametrize("ruin", [*RUIN, "missing"])
def test_no_damage_to_any_file_gives_another_state(
  ruin, stopped_run, smoke_config, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr("train.run.checkpoint._PAUSES", (0.0,))
  template = abstract_state_of(smoke_config(epochs=3))

  def restored(folder: Path) -> int:
    with Checkpoints(folder) as checkpoints:
      return checksum(checkpoints.restore_last(template))

  def copy(number: int) -> Path:
    return Path(shutil.copytree(stopped_run, tmp_path / str(number)))

  newest = restored(copy(0))
  shutil.rmtree(copy(1) / "checkpoints" / "last" / "27")
  before = restored(tmp_path / "1")
  last = stopped_run / "checkpoints" / "last" / "27"
  files = [path.relative_to(stopped_run) for path in last.rglob("*") if path.is_file()]
  found = collections.Counter()
  for number, file in enumerate(files, start=2):
    path = copy(number) / file
    path.unlink() if ruin == "missing" else path.write_bytes(RUIN[ruin](path.read_bytes()))
    capsys.readouterr()
    state = restored(tmp_path / str(number))
    assert state in (newest, before)
    assert ("can't be read" in capsys.readouterr().err) == (state == before)
    found[state] += 1
  assert found[before] >= 3  # the others hold nothing that is read


def test_if_every_state_is_damaged_nothing_is_lost(stopped_run, smoke_config):
  for step in ("18", "27"):
    tear(stopped_run / "checkpoints" / "last" / step)
  before = contents(stopped_run)
  with pytest.raises(WorkdirError, match="last/18 can't be read"):
    train_and_evaluate(smoke_config(epochs=3), stopped_run)
  assert contents(stopped_run) == before


def contents(folder: Path) -> collections.Counter:
  return collections.Counter(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_damaged_best_weights_are_replaced_by_those_before(stopped_run, smoke_config, capsys):
  template = abstract_state_of(smoke_config(epochs=3))
  with Checkpoints(stopped_run) as checkpoints:
    state = checkpoints.restore_last(template)
    checkpoints.save_best(state)  # of epoch 3
  tear(stopped_run / "checkpoints" / "best" / "3")
  capsys.readouterr()
  assert load_trained_model(stopped_run, make_mesh()).weights.mean.shape == (3,)
  error = capsys.readouterr().err
  assert "best/3 can't be read" in error and "the one before it is used" in error
  assert (stopped_run / "checkpoints" / "best" / "3").exists()  # evaluation moves nothing


def test_a_save_that_orbax_declines_is_an_error(stopped_run, smoke_config, monkeypatch):
  monkeypatch.setattr("train.run.storage._PAUSES", ())
  template = abstract_state_of(smoke_config(epochs=3))
  with Checkpoints(stopped_run) as checkpoints:
    state = checkpoints.restore_last(template)
    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *_, **__: False)
    with pytest.raises(StorageError, match="last/28 can't be written: orbax declines to save it"):
      checkpoints.save_last(state.replace(step=state.step + 1), wait=True)


def test_the_checksum_is_the_same_on_any_mesh_and_sees_every_bit():
  tree = {"a": jnp.arange(24, dtype=jnp.float32).reshape(4, 6), "b": jnp.int32(3)}
  expected = checksum(tree)
  for devices in (1, 2, 4):
    mesh = make_mesh(fsdp=devices, devices=jax.devices()[:devices])
    spread = jax.device_put(tree["a"], by_example(mesh))
    assert checksum({"a": spread, "b": tree["b"]}) == expected
  for place in range(24):
    for bit in (0, 1, 22, 31):
      changed = np.array(tree["a"]).reshape(-1)
      changed.view(np.uint32)[place] ^= np.uint32(1 << bit)
      assert checksum({"a": jnp.asarray(changed.reshape(4, 6)), "b": tree["b"]}) != expected


def abstract_state_of(config):
  mesh, info = make_mesh(), data.describe(config.data)
  return abstract_state(make_init(config, info, mesh), info)
