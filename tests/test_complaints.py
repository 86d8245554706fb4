"""What C libraries print about images is counted and said once; all else is passed on."""

import io
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import TESTS
from PIL import Image
from runs import run_code

NOISE = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


def encode(pixels: np.ndarray, format: str, **options) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format, **options)
  return file.getvalue()


class Complained(tfds.core.GeneratorBasedBuilder):
  """Six JPEG with bytes too many, and six PNG with a damaged profile."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {
      "image": tfds.features.Image(shape=(8, 8, 3)),
      "label": tfds.features.ClassLabel(num_classes=2),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i, pixels in enumerate(NOISE):
      jpeg = encode(pixels, "JPEG")
      png = encode(pixels, "PNG", icc_profile=b"damaged" * 30)
      yield i, {"image": png if i % 2 else jpeg[:-2] + b"abcdef" + jpeg[-2:], "label": i % 2}


@pytest.mark.parametrize(
  "where", ["memory", "threads", pytest.param("processes", marks=pytest.mark.slow)]
)
def test_complaints_are_counted_and_said_once_with_a_file(tmp_path, where):
  Complained(data_dir=tmp_path).download_and_prepare(file_format="array_record")
  code = f"""
import os, sys
from configs import default
from train import data
from train.data.batches import batches
config = default.get_config().data
config.update(name="complained", data_dir={str(tmp_path)!r}, train_split="train", workers=2)
config.in_memory_bytes = None if {where == "memory"} else 0
from test_complaints import Complained
train = data.load(config, 8, splits=("train",)).train
cut = batches(train, 4, numbers=range(9), in_processes={where == "processes"})  # three epochs
print(sum(batch["mask"].sum() for batch in cut))
os.write(2, b"the last words\\n")
"""
  script = tmp_path / "read.py"
  script.write_text(f"if __name__ == '__main__':\n{textwrap.indent(code, '  ')}")
  process = subprocess.run(
    [sys.executable, script],
    env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert process.returncode == 0 and process.stdout == "36\n", process.stderr
  said, last = process.stderr.splitlines()
  assert last == "the last words"
  assert "Decoders complained" in said and "complained-train.array_record-00000-of-00001" in said
  if where == "memory":
    assert "complained 10 times" in said  # two of the JPEGs pass


def test_other_lines_are_passed_on_in_order():
  code = """
import os, sys, threading
from train.data.complaints import complaints
def decode(i):
  with complaints.counted("shard"):
    os.write(2, b"libpng warning: iCCP: too short\\n")
    os.write(2, f"a line of thread {i}\\n".encode())
threads = [threading.Thread(target=decode, args=[i]) for i in range(20)]
[t.start() for t in threads], [t.join() for t in threads]
try:
  with complaints.counted("shard"):
    raise ValueError
except ValueError:
  print("out of it", file=sys.stderr)
complaints.say()
complaints.say()
"""
  process = run_code(code)
  *others, out, said = process.stderr.splitlines()
  assert sorted(others) == sorted(f"a line of thread {i}" for i in range(20))
  assert out == "out of it"
  assert said == (
    "Decoders complained 20 times about images, first in shard: libpng warning: iCCP: too short"
  )


def test_what_libtiff_prints_about_a_folders_image_is_said_once(tmp_path):
  (tmp_path / "train" / "cat").mkdir(parents=True)
  for i, pixels in enumerate(NOISE):
    file = io.BytesIO()
    Image.fromarray(pixels).convert("1").resize((64, 64)).save(file, "TIFF", compression="group3")
    damaged = file.getvalue().replace(b"\0\0\0\0\0", b"\1\2\3\4\5")
    content = bytearray(damaged)
    content[20:60] = bytes(range(40))
    (tmp_path / "train" / "cat" / f"{i:02}.tif").write_bytes(content if i < 3 else file.getvalue())
  code = f"""
from configs import default
from train import data
config = default.get_config().data
config.update(name={f"folder:{tmp_path}"!r}, skip_broken=True, train_split="train")
config.update(validation_split="train", test_split="train")
print(data.describe(config).sizes["train"])
"""
  process = run_code(code, XDG_CACHE_HOME=str(tmp_path / "cache"))
  assert process.returncode == 0, process.stderr
  (said,) = [
    line for line in process.stderr.splitlines() if "ecode" in line and "complained" in line
  ]
  assert f"first in {tmp_path}/train/cat/0" in said
  assert not [line for line in process.stderr.splitlines() if line.startswith(("Fax", "TIFF"))]
