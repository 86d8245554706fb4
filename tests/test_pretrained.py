"""Loading and saving weights: sources, heads, positions, and what is refused.

tests/test_peers.py compares logits with the projects that the weights come from.
"""

import json
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDEN
from etils import epath

import mlp_models
from mlp_models.__main__ import size_of
from mlp_models.pretrained import describe
from mlp_models.pretrained.positions import resample
from train.data.framing import Framing
from train.devices.mesh import make_mesh
from train.run.checkpoint import load_trained_model
from train.step import eval_logits

SIZES = {"image_size": 8, "patch_size": 4, "width": 16, "num_blocks": 2}
NAMES = ("cat", "dog", "eel")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A small gMLP for NAMES, its parameters, and the file that holds them."""
  model = mlp_models.create("gmlp", num_classes=3, dropout_rate=0.0, **SIZES)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
  preprocessing = mlp_models.Preprocessing(8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", 0.875)
  mlp_models.save(file, model, params, NAMES, preprocessing)
  return model, params, file, preprocessing


def load(*args, **kwargs):
  """What `mlp_models.load` gives, and what it says."""
  lines = []
  return *mlp_models.load(*args, say=lines.append, **kwargs), "\n".join(lines)


def test_what_is_saved_is_loaded_again(weights):
  model, params, file, preprocessing = weights
  loaded, loaded_params, loaded_preprocessing, said = load(file)
  assert loaded == model and loaded_preprocessing == preprocessing
  jax.tree.map(np.testing.assert_array_equal, loaded_params, params)
  assert "gmlp" in said and "head kept: 3 classes" in said
  assert describe(file).class_names == NAMES


def test_a_head_is_kept_for_the_same_classes_and_reset_for_others(weights):
  _, params, file, _ = weights
  kernel = params["head"]["kernel"]

  def head(**classes):
    model, loaded, _, said = load(file, **classes)
    jax.tree.map(np.testing.assert_array_equal, loaded["block1"], params["block1"])
    return model.num_classes, loaded.get("head", {}).get("kernel"), said.splitlines()[1]

  number, same, said = head(num_classes=3)
  assert number == 3 and said == "head kept: 3 classes"
  np.testing.assert_array_equal(same, kernel)
  number, moved, said = head(class_names=("eel", "cat", "dog"))
  assert said == "head kept: the 3 classes have the same names, in another order"
  np.testing.assert_array_equal(moved, kernel[:, [2, 0, 1]])
  number, other, said = head(class_names=("cat", "dog", "fox"))
  assert said == "head reset: 3 classes instead of classes of other names"
  assert not np.any(np.isclose(other, kernel))
  number, other, said = head(num_classes=5)
  assert (number, other.shape, said) == (5, (16, 5), "head reset: 5 classes instead of 3")
  number, none, said = head(num_classes=0)
  assert (number, none, said) == (0, None, "head left out: the model returns features")


def test_a_new_head_follows_the_seed(weights):
  first, again, other = (
    load(weights[2], num_classes=5, seed=seed)[1]["head"]["kernel"] for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert not np.any(first == other)


def test_half_precision_is_read_as_float32(weights, tmp_path):
  _, params, file, _ = weights
  arrays = safetensors.numpy.load_file(file)
  with safetensors.safe_open(file, "numpy") as opened:
    metadata = opened.metadata()
  half = {name: x.astype(ml_dtypes.bfloat16) for name, x in arrays.items()}
  safetensors.numpy.save_file(half, tmp_path / "half.safetensors", metadata)
  loaded = load(tmp_path / "half.safetensors")[1]
  assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), loaded, params)


@pytest.mark.parametrize("image_size", [16, 24])
def test_weights_over_tokens_fit_one_number_of_patches(weights, image_size):
  with pytest.raises(
    mlp_models.WeightsError, match=r"spatial/.*\[4, 4\].*: image_size 8 with patch_size 4$"
  ):
    load(weights[2], image_size=image_size)


@pytest.mark.parametrize(("image_size", "patch_size", "inputs"), [(16, 8, 192), (4, 2, 12)])
def test_patches_of_another_size_are_no_mismatch_of_tokens_or_channels(
  image_size, patch_size, inputs, weights
):
  match = rf"patch_embed/kernel \[48, 16\].*\[{inputs}, 16\]"
  with pytest.raises(mlp_models.WeightsError, match=match):
    load(weights[2], image_size=image_size, patch_size=patch_size)


def test_positions_are_resampled_and_said(tmp_path):
  model = mlp_models.create("fnet", num_classes=3, **SIZES | {"image_size": 16})
  params = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
  ramp = np.arange(4.0)[:, None, None] + np.zeros((4, 4, 16))  # by rows
  params["position"]["embedding"] = ramp.reshape(16, 16)
  mlp_models.save(tmp_path / "fnet.safetensors", model, params)
  larger, resampled, _, said = load(tmp_path / "fnet.safetensors", image_size=32)
  assert "position embeddings resampled from 4 x 4 to 8 x 8 patches" in said
  grid = resampled["position"]["embedding"].reshape(8, 8, 16)
  np.testing.assert_allclose(grid[3:5, 4, 0], [1.25, 1.75], atol=0.02)
  np.testing.assert_allclose(grid, grid[:, :1, :1] + np.zeros((8, 8, 16)), atol=1e-5)
  assert larger.apply({"params": resampled}, jnp.zeros((1, 32, 32, 3))).shape == (1, 3)


@pytest.mark.parametrize(("old", "new"), [((3, 5), (5, 3)), ((4, 4), (2, 6)), ((2, 3), (4, 4))])
@pytest.mark.parametrize("class_tokens", [0, 1, 2])
def test_grids_need_not_be_square_and_class_tokens_stay(old, new, class_tokens):
  rng = np.random.default_rng(0)
  embedding = rng.normal(size=(class_tokens + old[0] * old[1], 7)).astype(np.float32)
  resampled = resample(embedding, old, new, class_tokens)
  assert resampled.shape == (class_tokens + new[0] * new[1], 7)
  np.testing.assert_array_equal(resampled[:class_tokens], embedding[:class_tokens])
  same = resample(embedding, old, old, class_tokens)
  np.testing.assert_allclose(same, embedding, atol=1e-6)
  with pytest.raises(ValueError, match="position embeddings are not"):
    resample(embedding, old, new, class_tokens + 1)


# 2 x 4 patches and a class token are 9 rows, as are 3 x 3 patches without one.
@pytest.mark.parametrize("columns", [3, 4])
def test_a_grid_that_is_not_square_is_known_by_its_config(columns, tmp_path):
  folder = GOLDEN / "peers" / "timm_vit_cls"
  arrays = safetensors.numpy.load_file(folder / "model.safetensors")
  config = json.loads((folder / "config.json").read_text())
  patch_size, width = arrays["patch_embed.proj.weight"].shape[-1], arrays["pos_embed"].shape[-1]
  rows = np.random.default_rng(0).normal(size=(1, 1 + 2 * columns, width)).astype(np.float32)
  safetensors.numpy.save_file(arrays | {"pos_embed": rows}, tmp_path / "model.safetensors")
  if columns == 3:
    with pytest.raises(mlp_models.WeightsError, match="6 tokens, which make no square grid"):
      load(tmp_path)
  config["pretrained_cfg"]["input_size"] = [3, 2 * patch_size, columns * patch_size]
  del config["model_args"]["img_size"]
  (tmp_path / "config.json").write_text(json.dumps(config))
  model, params, preprocessing, said = load(tmp_path)
  assert model.image_size == preprocessing.image_size == (2 * patch_size, columns * patch_size)
  assert f"for {2 * patch_size} x {columns * patch_size} pixels" in said
  np.testing.assert_array_equal(params["position"]["embedding"], rows[0])
  _, params, _, said = load(tmp_path, image_size=(3 * patch_size, patch_size))
  assert f"resampled from 2 x {columns} to 3 x 1 patches" in said
  expected = resample(rows[0], (2, columns), (3, 1), class_tokens=1)
  np.testing.assert_array_equal(params["position"]["embedding"], expected)


@pytest.mark.parametrize("name", ["model.bin", "vit.pth", "a.pt", "x.ckpt", "x.pth.tar"])
def test_pickles_are_refused_with_the_way_out(name, tmp_path):
  (tmp_path / name).write_bytes(b"\x80\x04N.")
  with pytest.raises(mlp_models.WeightsError, match="pickle.*safetensors.torch") as error:
    load(tmp_path / name)
  assert "\n" not in str(error.value)


def test_what_is_no_weights_is_one_line_that_names_it(tmp_path, monkeypatch):
  def refused(source, match):
    with pytest.raises(mlp_models.WeightsError, match=match) as error:
      load(source)
    assert "\n" not in str(error.value)

  (tmp_path / "broken.safetensors").write_bytes(b"no header")
  (tmp_path / "broken.npz").write_bytes(b"PK no zip")
  np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
  np.savez(tmp_path / "other.npz", **{f"x{n}": np.zeros(3) for n in range(5)})
  refused(tmp_path / "broken.safetensors", "broken.safetensors can't be read")
  refused(tmp_path / "broken.npz", "broken.npz can't be read")
  refused(tmp_path / "pickled.npz", "pickled.npz can't be read")
  refused(tmp_path / "other.npz", "no known model has arrays named x0, x1, x2 and 2 more; known")
  refused(tmp_path / "nowhere", "nowhere: there is no such file")
  refused("https://example.org/x.safetensors", "https://example.org/x.safetensors can't be read")
  (tmp_path / "empty").mkdir()
  refused(tmp_path / "empty", "holds no model.safetensors")
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  refused("hf://google/vit-base-patch16-224", "needs the package huggingface_hub")


def test_the_hub_gives_a_folder_of_a_revision(monkeypatch, tmp_path):
  """With a stand-in for the package: there may be no network."""
  asked = []

  def snapshot_download(name, revision, allow_patterns):
    asked.append((name, revision, allow_patterns))
    if name == "org/away":
      raise ConnectionError("no network\nat all")
    return str(GOLDEN / "peers" / "timm_vit_cls" if name == "org/vit" else tmp_path)

  hub = types.SimpleNamespace(snapshot_download=snapshot_download)
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  said = load("hf://org/vit@refs/pr/1")[-1]
  assert said.startswith("hf://org/vit@refs/pr/1: vit")
  load("hf://org/vit")
  patterns = ["*.json", "*.safetensors"]
  assert asked == [("org/vit", "refs/pr/1", patterns), ("org/vit", None, patterns)]
  with pytest.raises(mlp_models.WeightsError, match=r"\(no network\).*name the folder"):
    load("hf://org/away")
  with pytest.raises(mlp_models.WeightsError, match="no safetensors.*hf://org/pickles@REVISION"):
    load("hf://org/pickles")


@pytest.mark.parametrize(
  "config",
  [
    {"model_args": [1]},
    {"mean": 5},
    {"id2label": {"a": "b"}},
    {"model_args": {"img_size": [16, 0]}},
  ],
)
def test_a_damaged_config_is_one_line(config, tmp_path):
  shutil.copy(GOLDEN / "peers" / "timm_vit_cls" / "model.safetensors", tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(mlp_models.WeightsError, match=r"config.json: \w+ is .*, it must be"):
    load(tmp_path)


@pytest.mark.parametrize("part", ["../x.safetensors", "/x.safetensors", 1])
def test_an_index_names_files_of_its_folder_only(part, tmp_path):
  index = {"weight_map": {"a": part} if part != 1 else [1]}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(mlp_models.WeightsError, match="index.json names no files of its folder"):
    load(tmp_path)


def test_another_architecture_is_refused_by_the_names_of_its_arrays(weights, tmp_path):
  _, _, file, _ = weights
  arrays = safetensors.numpy.load_file(file)
  with safetensors.safe_open(file, "numpy") as opened:
    metadata = opened.metadata()

  def refused(arrays, match):
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", metadata)
    with pytest.raises(mlp_models.WeightsError, match=match):
      load(tmp_path / "x.safetensors")

  refused({k: x for k, x in arrays.items() if "norm1" not in k}, r"lacks block0/norm1/\w+, ")
  refused(arrays | {"block0/gamma": np.zeros(16, np.float32)}, "has block0/gamma, which")
  refused(arrays | {"norm9/scale": np.zeros(2, np.float32)}, "has norm9/scale")
  wrong = arrays | {"block0/proj_out/bias": np.zeros(9, np.float32)}
  refused(wrong, r"block0/proj_out/bias \[9\], the model \[16\]")
  refused({k: x for k, x in arrays.items() if k != "head/bias"}, "lacks head/bias")


def test_a_saved_file_replaces_another_only_when_it_is_whole(weights, tmp_path, monkeypatch):
  model, params, _, _ = weights
  file = tmp_path / "x.safetensors"
  file.write_bytes(b"before")
  monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
  with pytest.raises(OSError, match="no space"):
    mlp_models.save(file, model, params)
  assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]
  with pytest.raises(mlp_models.WeightsError, match="ends in .safetensors"):
    mlp_models.save(tmp_path / "x.npz", model, params)
  with pytest.raises(mlp_models.WeightsError, match="unknown layout 'keras'"):
    mlp_models.save(file, model, params, layout="keras")


def test_the_size_of_a_model_is_counted_without_running_it():
  T, D = 64, 256
  embedding, block, head = T * 192 * D, 2 * T * T * D + 2 * T * D * T, D * 100
  assert size_of("mixer", "keras") == (64, 242_788, 2 * (embedding + 4 * block + head))


@pytest.mark.slow
def test_the_list_of_models_fits_a_terminal_and_names_every_variant():
  command = [sys.executable, "-m", "mlp_models"]
  lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
  assert max(map(len, lines)) <= 80
  listed = [(line[:10].strip(), line[10:22].strip()) for line in lines[1:]]
  assert listed == [(name, v) for name, of in mlp_models.VARIANTS.items() for v in of]
  assert lines[1].split()[:5] == ["mixer", "keras", "64", "242,788", "0.04"]


def test_a_workdir_gives_the_weights_of_its_best_epoch(finished_run, tmp_path):
  model, params, preprocessing, said = load(finished_run)
  trained = load_trained_model(epath.Path(finished_run), make_mesh())
  jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(trained.weights.params))
  assert "head kept: 100 classes" in said and model.num_classes == 100
  assert describe(finished_run).class_names == trained.info.class_names

  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  normalised = (images / 255 - preprocessing.mean) / preprocessing.std
  logits = model.apply({"params": params}, jnp.asarray(normalised, jnp.float32))
  framing = Framing.of(trained.config.data)
  expected = eval_logits(trained.model, trained.weights, images, framing)
  np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_workdir_without_weights_or_with_damaged_ones_is_one_line(finished_run, tmp_path):
  copy = tmp_path / "run"
  shutil.copytree(finished_run, copy)
  for file in copy.glob("checkpoints/best/*/default/d/*"):
    file.write_bytes(b"")
  with pytest.raises(mlp_models.WeightsError, match="checkpoints/best/.* can't be read") as error:
    load(copy)
  assert "\n" not in str(error.value)
  shutil.rmtree(copy / "checkpoints" / "best")
  with pytest.raises(mlp_models.WeightsError, match="no weights yet"):
    load(copy)
  (copy / "config.json").write_text("{")
  with pytest.raises(mlp_models.WeightsError, match="config.json can't be read"):
    load(copy)
