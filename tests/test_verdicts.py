"""Looking at a folder's images: once, aloud, and remembered."""

import json

import numpy as np
import pytest
from PIL import Image
from runs import run_code
from test_listing import config_of, make

from train import data
from train.data import decode, folder, listing, verdicts
from train.errors import DataError


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
  """Notes the path of each file that is decoded."""
  paths: list[str] = []
  original = folder._decode

  def noting(path, *how):
    paths.append(path)
    return original(path, *how)

  monkeypatch.setattr(folder, "_decode", noting)
  return paths


def test_images_that_train_are_decoded_once(tmp_path, decoded, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  config = config_of(make(tmp_path / "set"))
  data.describe(config, image_size=8)
  in_memory = data.load(config, 8)
  assert len(decoded) == len(set(decoded)) == 48
  folder.forget()
  again = data.load(config, 8)  # what was found is remembered
  assert len(decoded) == 2 * 48
  np.testing.assert_array_equal(in_memory.train.images, again.train.images)


def test_verdicts_are_remembered_by_size_and_time(tmp_path, decoded, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  config = config_of(make(tmp_path / "set"), skip_broken=True)
  torn = tmp_path / "set" / "train" / "cat" / "1.png"
  torn.write_bytes(torn.read_bytes()[:45])
  for _ in range(2):
    folder.forget()
    assert data.describe(config).sizes["train"] + data.describe(config).sizes["validation"] == 23
    assert f"{torn}: " in capsys.readouterr().err  # said again
    assert len(decoded) == 48
  Image.new("RGB", (9, 9)).save(torn)
  folder.forget()
  assert data.describe(config).sizes["train"] + data.describe(config).sizes["validation"] == 24
  assert decoded[48:] == [str(torn)]


@pytest.mark.parametrize("cache", ["damaged", "unwritable", "no home"])
def test_a_cache_that_cannot_be_used_is_done_without(tmp_path, decoded, monkeypatch, cache):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  config = config_of(make(tmp_path / "set"))
  if cache == "damaged":
    data.describe(config)
    (file,) = (tmp_path / "cache" / "mlp_models" / "folders").iterdir()
    for content in ("", "[]", '{"files": 3}', json.dumps({"decoder": verdicts._DECODER})):
      file.write_text(content)
      folder.forget()
      assert data.describe(config).sizes["test"] == 24
  elif cache == "unwritable":
    (tmp_path / "cache").write_text("a file, no folder")
  else:
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/cache")
    monkeypatch.chdir(tmp_path)
  folder.forget()
  assert data.describe(config).sizes["test"] == 24
  assert not list(tmp_path.glob("~*"))


def test_only_the_split_to_evaluate_is_looked_at(tmp_path, decoded):
  make(tmp_path)
  (tmp_path / "train" / "cat" / "1.png").write_bytes(b"broken")
  test = data.load(config_of(tmp_path), 8, splits=("test",)).test
  assert len(test) == 24 and all("/test/" in path for path in decoded)
  with pytest.raises(DataError, match="broken images"):
    data.load(config_of(tmp_path), 8, splits=("train",))


def test_a_long_look_says_so_within_two_seconds_and_goes_on_saying(tmp_path):
  make(tmp_path)
  code = """
import sys, threading, time
from pathlib import Path
from train.data import verdicts
from train.data.listing import Found
verdicts._SECONDS_BETWEEN_LINES = 0.4
began, write = time.monotonic(), sys.stderr.write
def timed(text):
  return write(f"[{time.monotonic() - began:.1f}] {text}" if text.strip() else text)
sys.stderr.write = timed
files = [Found(f"/nowhere/{i}.png", "", 0, i) for i in range(100_000)]
gate = threading.Event()
threading.Timer(2.5, gate.set).start()
def decode(path):
  gate.wait()
verdicts.look(Path("/nowhere"), files[:1000], decode, verdicts.ALONE)
"""
  process = run_code(code, XDG_CACHE_HOME=str(tmp_path / "cache"))
  lines = process.stderr.splitlines()
  assert process.returncode == 0, process.stderr
  assert "Looking at 1,000 images in /nowhere" in lines[0]
  assert float(lines[0][1:4]) <= 2
  assert "0 of 1,000 images" in lines[1] and len(lines) >= 3


def test_a_look_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  files = [listing.Found(f"{i}", "", 1, 1) for i in range(100)]
  looked: list[str] = []

  def check(path: str) -> None:
    if path == "60":
      raise KeyboardInterrupt
    looked.append(path)

  with pytest.raises(KeyboardInterrupt):
    verdicts.look(tmp_path, files, check)
  before = set(looked)
  assert len(before) >= 50
  looked.clear()
  assert verdicts.look(tmp_path, files, looked.append) == {}
  assert before.isdisjoint(looked) and before | set(looked) == {str(i) for i in range(100)}


def test_processes_share_the_look_and_agree(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  files = [listing.Found(f"{i}", "", 1, 1) for i in range(10)]
  shares: list = []

  def look(first: int, others: list) -> dict[str, str]:
    looked: list[str] = []

    def check(path: str) -> None:
      looked.append(path)
      if path in ("3", "4"):
        raise ValueError(f"bad {path}")

    def gather(content):
      shares.append(content)
      return [content, *others]

    def share(items):
      return items[first::2]

    broken = verdicts.look(tmp_path, files, check, verdicts.Processes(share, gather))
    assert looked == [str(i) for i in range(first, 10, 2)]
    return broken

  monkeypatch.setattr(verdicts, "_recall", lambda folder: {})
  assert look(0, [[[["3", "bad 3"]], []]]) == {"4": "bad 4", "3": "bad 3"}
  assert look(1, [shares[0]]) == {"4": "bad 4", "3": "bad 3"}


def test_no_kind_of_file_takes_more_pixels_than_the_limit(tmp_path, monkeypatch):
  make(tmp_path)
  monkeypatch.setattr(decode, "MAX_PIXELS", 35)
  with pytest.raises(DataError, match="6 x 6 pixels are more than 35"):
    data.describe(config_of(tmp_path))
