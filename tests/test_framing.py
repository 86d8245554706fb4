"""Which part of an image is seen: the same in training, evaluation and prediction."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from test_crops import FILTERS, MEAN, VARIANCE, noise, see

from configs import default, mixer
from train import augment, data, predict
from train.check import check_config
from train.data import folder, show, statistics
from train.data.decode import decode, decode_file, resize
from train.data.framing import CENTER, Framing
from train.devices.mesh import make_mesh
from train.errors import ConfigError
from train.run.workdir import read_config
from train.state import abstract_state, make_init
from train.step import make_train_step, trace_train_step


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 2000), crop=st.floats(0.05, 1))
def test_what_is_decoded_is_cut_to_the_model_without_resampling(size, crop):
  framing = Framing(crop)
  side, _, _ = framing.shape_in_memory((None, None, 3), size)
  assert framing.seen(side, side)[2:] == (size, size)
  assert framing.seen(side, side)[0] == (side - size) // 2


@pytest.mark.parametrize(
  ("framing", "image_shape", "expected"),
  [
    (Framing(), (None, None, 3), (224, 224, 3)),
    (Framing(0.875), (None, None, 3), (256, 256, 3)),
    (Framing(0.9), (None, None, 1), (248, 248, 1)),  # as timm
    (Framing(decode_size=320), (None, None, 3), (320, 320, 3)),
    (Framing(), (32, 32, 3), (32, 32, 3)),
    (Framing(0.875), (218, 178, 3), (218, 178, 3)),
    (Framing(decode_size=64), (218, 178, 3), (64, 64, 3)),
    (Framing(), (512, 900, 3), (512, 900, 3)),
    (Framing(0.875), (5000, 5000, 3), (256, 256, 3)),
    (Framing(mode="squash"), (5000, 5000, 3), (5000, 5000, 3)),
  ],
)
def test_shapes_in_memory(framing, image_shape, expected):
  assert framing.shape_in_memory(image_shape, 224) == expected


# Decoding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("width", "height"), [(64, 32), (33, 32), (20, 20), (16, 48), (64, 128), (288, 96)]
)
def test_decoding_resizes_the_shorter_side_and_cuts_the_centre(width, height):
  image = Image.fromarray(64 + noise(height, width, 3) // 2)  # cubics overshoot, none is clipped
  side = min(width, height)
  whole = (width * 32 // side, height * 32 // side)
  left, top = (whole[0] - 32) // 2, (whole[1] - 32) // 2
  for interpolation, filter in FILTERS.items():
    ours = resize(image, (32, 32, 3), Framing(interpolation=interpolation))
    expected = image.resize(whole, filter).crop((left, top, left + 32, top + 32))
    # Pillow rounds after each axis, and may take them in another order.
    difference = np.asarray(ours, int) - np.asarray(expected, int)
    assert np.abs(difference).max() <= (0 if side == 32 else 2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """A folder of one class: wide photos with a black disc of two thirds of the height."""
  path = tmp_path_factory.mktemp("photos")
  (path / "train" / "disc").mkdir(parents=True)
  for i, (width, height) in enumerate([(64, 32), (50, 60), (90, 45), (40, 40)]):
    image = Image.new("RGB", (width, height), (255, 200, 200))
    radius = min(width, height) // 3
    centre = (width // 2, height // 2)
    ImageDraw.Draw(image).circle(centre, radius, "black")
    image.save(path / "train" / "disc" / f"{i}.png")
  return path


def photos_config(photos, **overrides):
  folder.forget()
  config = mixer.get_config("smoke")
  config.data.name = f"folder:{photos}"
  config.data.train_split = config.data.validation_split = config.data.test_split = "train"
  config.update_from_flattened_dict(overrides)
  return config


def predicted(config, photos, monkeypatch) -> np.ndarray:
  """What `predict` makes of the files before the model sees them, in the order of the split."""
  info, seen = data.describe(config.data), []
  monkeypatch.setattr(predict, "_print_answer", lambda *_: None)

  def apply(images):
    seen.extend(images)
    return np.ones((len(images), 1))

  monkeypatch.setattr(predict, "make_predict", lambda trained, mesh: apply)
  records = folder.open_folder(photos).records("train", info.class_names)
  paths = [records.file(i) for i in range(len(records))]
  trained = SimpleNamespace(config=config, info=info)
  mesh = jax.sharding.Mesh(jax.devices()[:1], "data")
  monkeypatch.setattr(predict, "fitting_sizes", lambda *_: (64, 8))
  assert predict._answer(trained, mesh, iter(paths), as_json=True)
  return np.stack(seen)


@pytest.mark.parametrize(
  "knobs",
  [{}, {"data.crop": 0.875, "data.interpolation": "bicubic"}, {"data.decode_size": 24}],
  ids=["default", "bicubic", "decode_size"],
)
def test_a_wide_photo_is_not_squashed_wherever_it_is_read(photos, knobs, monkeypatch):
  config = photos_config(photos, **knobs)
  sets = data.load(config.data, 32)
  config.data.in_memory_bytes = 0
  streamed = data.load(config.data, 32)
  assert isinstance(sets.train, data.Split) and isinstance(streamed.train, data.StreamedSplit)
  rows = np.arange(4)
  images = sets.train[rows][0]
  np.testing.assert_array_equal(images, streamed.train[rows][0])
  np.testing.assert_array_equal(images, sets.validation[rows][0])
  np.testing.assert_array_equal(images, predicted(config, photos, monkeypatch))
  options = augment.options(config)
  evaluated = see(images, 32, options["framing"])
  still = options | {"flip": False, "zoom": 0.0}
  trained = augment.augment(
    images, jax.random.key(0), rows, mean=MEAN, variance=VARIANCE, image_size=32, **still
  )
  np.testing.assert_allclose(trained, evaluated, atol=1e-3)
  for image in evaluated:
    dark = image[..., 0] < 128
    height, width = dark.any(1).sum(), dark.any(0).sum()
    assert (
      abs(int(height) - int(width)) <= 1 and abs(height - 64 / 3 / options["framing"].crop) < 2.5
    )


def test_limits_and_compiled_steps_follow_decode_size(photos):
  config = photos_config(photos, **{"data.decode_size": 24})
  config.data.in_memory_bytes = 12 * 24 * 24 * 3  # four images in each of three splits
  assert isinstance(data.load(config.data, 32).train, data.Split)
  config.data.in_memory_bytes -= 1
  assert isinstance(data.load(config.data, 32).train, data.StreamedSplit)
  mesh, info = make_mesh(devices=jax.devices()[:1]), data.foresee(config.data)
  step = make_train_step(config, info, 8, mesh)
  state = abstract_state(make_init(config, info, mesh), info)
  lowered = trace_train_step(step, state, config, info, mesh).lower()
  assert f"tensor<1x{config.batch_size}x24x24x3xui8>" in lowered.as_text()


def test_squashing_is_what_0_3_did(photos, monkeypatch):
  config = photos_config(photos, **{"data.crop_mode": "squash"})
  images = data.load(config.data, 32).train[np.arange(4)][0]
  records = folder.open_folder(photos).records("train", ["disc"])
  for i, image in enumerate(images):
    expected = Image.open(records.file(i)).resize((32, 32), FILTERS["bilinear"])
    np.testing.assert_array_equal(image, expected)
  np.testing.assert_array_equal(images, predicted(config, photos, monkeypatch))


def test_runs_of_0_3_are_squashed_as_they_were(tmp_path):
  content = json.loads(mixer.get_config("smoke").to_json())
  path = tmp_path / "config.json"
  content["data"]["crop"] = 0.5
  path.write_text(json.dumps(content))
  assert Framing.of(read_config(epath.Path(tmp_path)).data) == Framing(crop=0.5)
  for knob in ("crop", "crop_mode", "decode_size", "interpolation", "mean", "variance"):
    del content["data"][knob]
  del content["augment"]["crop"]
  path.write_text(json.dumps(content))
  config = read_config(epath.Path(tmp_path))
  assert Framing.of(config.data) == Framing(mode="squash")
  assert augment.options(config)["crop"] == 0


def test_images_kept_from_the_look_are_those_of_the_framing(photos):
  config = photos_config(photos)
  data.describe(config.data, image_size=32)
  config.data.interpolation = "bicubic"
  kept = data.load(config.data, 32).train[np.arange(4)][0]
  folder.forget()
  np.testing.assert_array_equal(kept, data.load(config.data, 32).train[np.arange(4)][0])


def test_opencv_and_pillow_frame_alike(photos):
  encoded = (photos / "train" / "disc" / "2.png").read_bytes()
  for framing in (CENTER, Framing(mode="squash"), Framing(interpolation="bicubic")):
    alone = decode_file(encoded, (24, 24, 3), background="white", upright=True, framing=framing)
    np.testing.assert_array_equal(decode(encoded, (24, 24, 3), framing), alone)


def test_show_draws_what_the_model_sees():
  image = noise(20, 30, 3)
  np.testing.assert_array_equal(show._as_seen(image, CENTER, 20), image[:, 5:25])
  assert show._as_seen(image[..., :1], Framing(0.5), 8).shape == (8, 8)


# Knobs --------------------------------------------------------------------------------------------


class Unread(data.Split):
  def __getitem__(self, rows):
    raise AssertionError("an image is read")


def test_a_given_mean_and_variance_are_used_and_nothing_is_read():
  split = Unread(noise(9, 8, 8, 3), np.zeros(9, np.int32))
  config = default.get_config().data
  config.mean, config.variance = (127.5,), (16256.25,)
  mean, variance = statistics.of_config(config, split)
  assert mean.dtype == variance.dtype == np.float32
  np.testing.assert_array_equal([mean, variance], [[127.5] * 3, [16256.25] * 3])
  config.mean, config.variance = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
  np.testing.assert_array_equal(statistics.of_config(config, split), [[1, 2, 3], [4, 5, 6]])
  config.mean = config.variance = (1.0, 2.0, 3.0, 4.0)
  with pytest.raises(ConfigError, match="the images have 3 channels"):
    statistics.of_config(config, split)
  config.mean = config.variance = ()
  split = data.Split(split.images, split.labels)
  for ours, own in zip(
    statistics.of_config(config, split), statistics.channel_statistics(split), strict=True
  ):
    np.testing.assert_array_equal(ours, own)


@pytest.mark.parametrize(
  ("knob", "value", "message"),
  [
    ("data.decode_size", 0, "at least 1, or None"),
    ("data.crop", 0.0, "more than 0, at most 1"),
    ("data.crop", 1.01, "more than 0, at most 1"),
    ("data.crop_mode", "centre", "center or squash"),
    ("data.interpolation", "lanczos", "bilinear or bicubic"),
    ("data.mean", (1.0, 2.0), "one value, one for each channel"),
    ("data.variance", (1.0,), "as many values as data.mean"),
    ("augment.crop", 1.5, r"from 0 \(none\) to 1"),
  ],
)
def test_impossible_values_are_one_line(knob, value, message):
  config = mixer.get_config()
  config.update_from_flattened_dict({knob: value})
  with pytest.raises(ConfigError, match=f"config.{knob} = .*{message}"):
    check_config(config)


def test_statistics_of_another_scale_are_refused():
  config = mixer.get_config()
  config.data.mean, config.data.variance = (0.5,), (0.25,)
  with pytest.raises(ConfigError, match=r"variance = .*numbers from 1 to 65,025, for pixels of 0"):
    check_config(config)
