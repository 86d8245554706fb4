"""One decoder for image files: absolute expectations, and the same array in training as alone."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import TESTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from configs import default
from train import data
from train.data import decode, folder
from train.data.decode import decode_file
from train.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (12, 17, 4), dtype=np.uint8)
SHAPE = (12, 17, 3)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encode(image: Image.Image, format: str, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def pixels(encoded: bytes, shape=SHAPE, background="white", upright=True) -> np.ndarray:
  return decode_file(encoded, shape, background=background, upright=upright)


def noise(mode: str) -> Image.Image:
  if mode.startswith("I;16"):
    levels = 257 * NOISE[..., 0].astype(np.uint16) ^ 0x55  # another low byte than high byte
    return Image.fromarray(levels.astype(">u2" if mode == "I;16B" else "<u2"))
  if mode == "PA":
    return Image.fromarray(NOISE).convert("RGB").convert("P").convert("PA")
  if mode == "P":
    return Image.fromarray(NOISE).convert("RGB").convert("P")
  return (
    Image.fromarray(NOISE).convert("RGB" if mode in ("CMYK", "YCbCr") else "RGBA").convert(mode)
  )


# What is expected ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_of_grey_become_the_high_byte(format):
  ramp = np.arange(0, 65536, 257 * 15, dtype=np.uint16)[None].repeat(3, 0) + 100
  for order in ("<u2", ">u2") if format == "TIFF" else ("<u2",):
    encoded = encode(Image.fromarray(ramp.astype(order)), format)
    decoded = pixels(encoded, (*ramp.shape, 3))
    np.testing.assert_array_equal(decoded, (ramp >> 8)[..., None].repeat(3, -1))


def png(header: tuple, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
  """A PNG from its IHDR, pixels with filter bytes, and other chunks; Pillow can't write all."""
  parts = [(b"IHDR", struct.pack(">IIBBBBB", *header)), *chunks]
  parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
  made = [
    struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts
  ]
  return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def test_16_bits_of_colour_become_the_high_byte():
  wide = struct.pack(">6H", 0x1234, 0x56FF, 0xFF00, 1, 2, 0x8000)
  encoded = png((2, 1, 16, 2, 0, 0, 0), b"\0" + wide)
  np.testing.assert_array_equal(pixels(encoded, (1, 2, 3)), [[[0x12, 0x56, 0xFF], [0, 0, 0x80]]])


@pytest.mark.parametrize(
  ("header", "row", "key", "visible"),
  [
    ((2, 1, 2, 0, 0, 0, 0), b"\0\x60", b"\0\1", 170),  # levels 1 and 2 of 3
    ((2, 1, 8, 0, 0, 0, 0), b"\0\1\7", b"\0\1", 7),
    ((2, 1, 16, 0, 0, 0, 0), b"\0\x33\x01\x33\x02", b"\x33\x01", 0x33),
    ((2, 1, 8, 2, 0, 0, 0), b"\0\1\2\3\4\4\4", b"\0\1\0\2\0\3", 4),
    ((2, 1, 16, 2, 0, 0, 0), b"\0" + bytes(range(12)), bytes(range(6)), None),
    ((2, 1, 8, 3, 0, 0, 0), b"\0\0\1", b"\0\xff", 9),
  ],
  ids=["2 bits", "grey", "16 bits", "colour", "16 bits of colour", "palette"],
)
def test_a_transparent_level_shows_the_background(header, row, key, visible):
  chunks = [(b"PLTE", bytes([1, 1, 1, 9, 9, 9]))] if header[3] == 3 else []
  decoded = pixels(png(header, row, *chunks, (b"tRNS", key)), (1, 2, 3), background="#ff8000")
  np.testing.assert_array_equal(decoded[0, 0], [255, 128, 0])
  if visible is not None:
    np.testing.assert_array_equal(decoded[0, 1], [visible] * 3)


def test_transparent_pixels_are_never_what_lay_under_them():
  red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
  for format in ("PNG", "WEBP", "TIFF"):
    encoded = encode(red, format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    assert (pixels(encoded, (4, 4, 3)) == 255).all()
    assert (pixels(encoded, (4, 4, 1), background="black") == 0).all()
    np.testing.assert_array_equal(pixels(encoded, (4, 4, 4))[0, 0], [255, 0, 0, 0])
  half = encode(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "PNG")
  np.testing.assert_array_equal(pixels(half, (4, 4, 3))[0, 0], [255, 127, 127])
  gif = encode(Image.new("P", (4, 4)), "GIF", transparency=0)
  assert (pixels(gif, (4, 4, 3), background="navy")[0, 0] == [0, 0, 128]).all()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(format, orientation):
  """A dark bar lies at the top of the upright picture."""
  upright = np.full((16, 24, 3), 250, np.uint8)
  upright[:8] = 5
  back = {2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (3, 1), 6: (1, 0), 7: (1, 1), 8: (3, 0)}
  turns, mirrored = back.get(orientation, (0, 0))
  stored = np.rot90(upright, turns)
  stored = stored[:, ::-1] if mirrored else stored
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {"lossless": True} if format == "WEBP" else {}
  encoded = encode(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options)
  np.testing.assert_allclose(pixels(encoded, upright.shape), upright, atol=4)
  if format != "TIFF":  # TFDS's sets have none, and Pillow turns it
    np.testing.assert_allclose(pixels(encoded, stored.shape, upright=False), stored, atol=4)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest's filters replace ours
@settings(max_examples=60, deadline=None)
@given(damage=st.dictionaries(st.integers(0, 60), st.integers(0, 255), min_size=1, max_size=9))
def test_damaged_exif_is_no_damaged_image(damage):
  image = Image.fromarray(NOISE[..., :3])
  exif = Image.Exif()
  exif[0x010E], exif[0x011A], exif[0x0128] = "a photo", 72.0, 2  # JFIF's resolution comes from it
  content = bytearray(exif.tobytes())
  for place, value in damage.items():
    content[6 + place % (len(content) - 6)] = value
  expected = pixels(encode(image, "JPEG"), (12, 12, 3))
  decoded = pixels(encode(image, "JPEG", exif=bytes(content)), (12, 12, 3))
  turned = [np.rot90(expected, turns) for turns in range(4)]
  assert decoded.shape == expected.shape
  if b"\x01\x12" not in content and b"\x12\x01" not in content:  # no orientation came about
    np.testing.assert_array_equal(decoded, turned[0])


def test_of_an_animation_the_first_frame():
  frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
  for format in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):  # MPO: a phone's JPEG of several pictures
    options = {"lossless": True} if format == "WEBP" else {}
    encoded = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_allclose(pixels(encoded, (8, 8, 3))[4, 4], [255, 0, 0], atol=1)


def test_colour_profiles_become_srgb():
  image = Image.fromarray(NOISE[..., :3])
  lab = ImageCms.createProfile("LAB")
  to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), lab, "RGB", "LAB")
  in_lab = ImageCms.applyTransform(image, to_lab)
  assert abs(pixels(encode(in_lab, "TIFF")).astype(int) - NOISE[..., :3]).mean() < 3
  # Red and blue change places in this profile.
  swapped = bytearray(SRGB)
  tags = {swapped[i : i + 4].decode(): i for i in range(132, 132 + 12 * swapped[131], 12)}
  for tag, other in (("rXYZ", b"bXYZ"), ("bXYZ", b"rXYZ")):
    swapped[tags[tag] : tags[tag] + 4] = other
  for format in ("PNG", "TIFF", "WEBP"):
    options = {"lossless": True} if format == "WEBP" else {}
    same = pixels(encode(image, format, icc_profile=SRGB, **options))
    np.testing.assert_array_equal(same, NOISE[..., :3])
    converted = encode(image, format, icc_profile=bytes(swapped), **options)
    np.testing.assert_allclose(pixels(converted), NOISE[..., 2::-1], atol=3)
    np.testing.assert_array_equal(pixels(converted, upright=False), NOISE[..., :3])
    damaged = encode(image, format, icc_profile=b"no profile" * 30, **options)
    np.testing.assert_array_equal(pixels(damaged), NOISE[..., :3])


def test_texts_of_any_size_and_number_are_no_damage():
  texts = PngImagePlugin.PngInfo()
  texts.add_text("long", "x" * 3_000_000, zip=True)
  for i in range(200):
    texts.add_itxt(f"key {i}", "y" * 50_000, zip=True)
  profile = b"\0" * 2**21  # longer than Pillow takes
  encoded = encode(Image.fromarray(NOISE[..., :3]), "PNG", pnginfo=texts, icc_profile=profile)
  np.testing.assert_array_equal(pixels(encoded), NOISE[..., :3])


# What is refused ----------------------------------------------------------------------------------


def test_too_many_pixels_are_refused_before_they_are_decoded():
  side = 2**14 + 1
  bomb = png((side, side, 1, 0, 0, 0, 0), b"")  # without pixels, which are not looked for
  with pytest.raises(ValueError, match=f"16,385 x 16,385 pixels are more than {2**28:,}"):
    pixels(bomb)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_refused_with_the_reason(mode):
  with pytest.raises(ValueError, match="32-bit numbers, whose range is unknown"):
    pixels(encode(noise("L").convert(mode), "TIFF"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None)
@given(
  format=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]),
  cut=st.integers(0, 400),
  damage=st.dictionaries(st.integers(0, 2000), st.integers(0, 255), max_size=6),
)
def test_any_bytes_are_an_image_or_one_line(format, cut, damage):
  content = bytearray(encode(Image.fromarray(NOISE[..., :3]), format))
  for place, value in damage.items():
    content[place % len(content)] = value
  try:
    assert pixels(bytes(content[: len(content) - cut])).shape == SHAPE
  except ValueError as error:
    assert str(error) and "\n" not in str(error)


def test_pillow_does_not_warn_on_the_terminal(tmp_path):
  tiff = bytearray(encode(Image.fromarray(NOISE[..., :3]), "TIFF"))
  tiff[4] = 1  # the place of its tags
  (tmp_path / "a.tiff").write_bytes(tiff)
  (tmp_path / "b.png").write_bytes(encode(Image.new("1", (9500, 9500)), "PNG"))  # Pillow warns
  code = """
import sys, threading
from pathlib import Path
from train.data.decode import decode_file
def read(path):
  try:
    decode_file(Path(path).read_bytes(), (8, 8, 3), background="white", upright=True)
  except ValueError as error:
    print(error)
threads = [threading.Thread(target=read, args=[path]) for path in sys.argv[1:]]
[thread.start() for thread in threads], [thread.join() for thread in threads]
"""
  command = [sys.executable, "-c", code, tmp_path / "a.tiff", tmp_path / "b.png"]
  process = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=60)
  assert (process.returncode, process.stderr) == (0, "")
  assert len(process.stdout.splitlines()) == 1  # of the TIFF


# The same as elsewhere ----------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pillow_decodes_jpeg_as_opencv_decodes_tfds_records(mode, progressive, subsampling):
  options = {"progressive": progressive} | ({"subsampling": subsampling} if mode == "RGB" else {})
  encoded = encode(noise(mode), "JPEG", **options)
  for shape in (SHAPE, (9, 30, 3)):
    np.testing.assert_array_equal(
      pixels(encoded, shape, upright=False), decode.decode(encoded, shape)
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_pillow_decodes_png_as_opencv_decodes_tfds_records(mode):
  encoded = encode(noise(mode), "PNG")
  np.testing.assert_array_equal(pixels(encoded, upright=False), decode.decode(encoded, SHAPE))


WRITERS = [
  *((mode, "PNG", {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
  *((mode, "PNG", {"transparency": 3}) for mode in ("L", "P", "1")),
  ("RGB", "PNG", {"transparency": (1, 2, 3), "icc_profile": SRGB}),
  *((mode, "JPEG", {"progressive": p}) for mode in ("L", "RGB", "CMYK", "YCbCr") for p in (0, 1)),
  *((mode, "WEBP", {"lossless": x}) for mode in ("RGB", "RGBA", "L") for x in (False, True)),
  *((mode, "BMP", {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
  *((mode, "GIF", {"interlace": x}) for mode in ("1", "L", "P", "RGB", "RGBA") for x in (0, 1)),
  *((m, "TIFF", {}) for m in "1 L LA P PA RGB RGBA CMYK YCbCr I;16 I;16B".split()),
  *((mode, "TIFF", {"compression": "tiff_lzw"}) for mode in ("L", "RGB", "RGBA")),
]
SUFFIXES = {"JPEG": ["jpg", "JPEG", "jpe", "jfif", "JFIF"], "TIFF": ["tif", "TIFF"]}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
  files=st.lists(
    st.tuples(st.sampled_from(WRITERS), st.integers(1, 8), st.integers(0, 4)),
    min_size=1,
    max_size=6,
  ),
  background=st.sampled_from(["white", "#102030", "orange"]),
  size=st.integers(4, 20),
)
def test_training_and_prediction_see_the_same_array(tmp_path_factory, files, background, size):
  path = tmp_path_factory.mktemp("images")
  (path / "train" / "cat").mkdir(parents=True)
  for i, ((mode, format, options), orientation, suffix) in enumerate(files):
    exif = Image.Exif()
    exif[0x0112] = orientation
    endings = SUFFIXES.get(format, [format.lower(), format])
    file = path / "train" / "cat" / f"{i}.{endings[suffix % len(endings)]}"
    with_exif = {"exif": exif} if format in ("JPEG", "WEBP", "PNG") else {}
    file.write_bytes(encode(noise(mode), format, **options, **with_exif))
  config = default.get_config().data
  config.name, config.background = f"folder:{path}", background
  seen = []
  for limit in (None, 0):
    folder.forget()
    config.in_memory_bytes = limit
    train = data.load(config, size, splits=("train",)).train
    assert isinstance(train, data.Split if limit is None else data.StreamedSplit)
    seen.append(train[np.arange(len(train))][0])
  records = folder.open_folder(path, background).records("train", ["cat"])
  alone = [
    pixels(Path(records.file(i)).read_bytes(), (size, size, 3), background)
    for i in range(len(files))
  ]
  np.testing.assert_array_equal(seen[0], alone)
  np.testing.assert_array_equal(seen[1], alone)


def test_a_broken_file_is_refused_in_training_as_alone(tmp_path):
  (tmp_path / "train" / "cat").mkdir(parents=True)
  torn = tmp_path / "train" / "cat" / "torn.jpg"
  torn.write_bytes(encode(noise("RGB"), "JPEG")[:-100])
  with pytest.raises(ValueError):
    pixels(torn.read_bytes())
  config = default.get_config().data
  config.name = f"folder:{tmp_path}"
  with pytest.raises(DataError, match="torn.jpg"):
    data.describe(config)
