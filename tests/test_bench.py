"""The figures of train.bench are right."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from needs import CIFAR100_DIR
from PIL import Image

import mlp_models
from train import bench, cost, sweep, timing
from train.data import DatasetInfo

REPOSITORY = Path(__file__).parents[1]
INFO = DatasetInfo("noise", tuple(map(str, range(100))), (32, 32, 3), {"train": 45000})


def test_figures_hang_together(smoke_config):
  figures = bench.measure(timing.prepare(smoke_config()), repeats=3, seconds=0.2)
  assert (figures["model"], figures["params"], figures["batch_size"]) == ("mixer", 12836, 64)
  assert (figures["devices"], figures["platform"], figures["microbatch"]) == (8, "cpu", 2)
  slowest, rate = figures["images_per_second_min"], figures["images_per_second"]
  assert 0 < slowest <= rate <= figures["images_per_second_max"]
  np.testing.assert_allclose(rate * figures["step_ms"], 64e3)
  lines = bench.format_figures(figures).splitlines()
  assert [line.split()[0] for line in lines] == list(figures)
  assert all(len(line.split()) == 2 for line in lines)
  fraction = rate * figures["flops_per_image"] / figures["matmul_peak_gflops"] / 1e9
  np.testing.assert_allclose(figures["fraction_of_peak"], fraction)
  assert figures["evaluation_images_per_second"] > 0
  assert 0.1 < figures["peak_memory_bytes"] / 2**30 < 20


def test_run_trains_as_many_steps_as_told(smoke_config):
  training = timing.prepare(smoke_config(steps_per_call=3))  # an epoch has eight
  before = int(training.state.step)
  began = time.perf_counter()
  training, seconds = timing.run(training, steps=12)
  whole = time.perf_counter() - began
  assert int(training.state.step) == before + 12
  assert 0.5 * whole < 12 * seconds <= whole


def test_the_age_of_a_process_begins_with_it():
  code = (
    "import time; time.sleep(1); from train.devices import machine; print(machine.process_age())"
  )
  began = time.time()
  printed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
  assert 1 < float(printed.stdout) < time.time() - began + 0.05


def test_phases_are_parts_of_a_step(smoke_config):
  parts = bench.phases(timing.prepare(smoke_config()), repeats=3)
  assert list(parts) == ["augment", "forward", "backward", "optimizer", "input", "waited"]
  assert parts["backward"] > 0


def flops(name: str, **sizes) -> float:
  config = importlib.import_module(f"configs.{name}").get_config()
  config.model.update(sizes)
  return cost.flops_per_image(config, INFO)


def test_flops_are_those_of_the_matrix_products():
  tokens, width, patch = 64, 256, 8 * 8 * 3
  mixing = 4 * (2 * tokens * tokens * width + 2 * tokens * tokens * width)
  forward = 2 * (tokens * patch * width + mixing + width * 100)
  count = flops("mixer")
  assert 3 * forward < count < 1.15 * 3 * forward
  # Neither microbatches nor recomputation change the count.
  config = importlib.import_module("configs.mixer").get_config()
  config.microbatch, config.remat = 2, True
  assert cost.flops_per_image(config, INFO) == count


@pytest.mark.slow
def test_perceivers_cost_is_linear_in_the_tokens_and_vits_is_not():
  def growth(name, **sizes):
    few, many = (flops(name, image_size=64, patch_size=p, **sizes) for p in (2, 1))
    return many / few

  # Four times as many tokens. The cost of the latents' own blocks does not depend on them.
  assert growth("perceiver") < 2
  assert growth("perceiver", num_blocks=1, num_latents=32) < 4
  assert growth("vit", pool="mean") > 10


@pytest.mark.slow
def test_tune_tries_the_powers_of_two_in_a_devices_share(smoke_config):
  rates = sweep.tune(smoke_config(), repeats=1, seconds=0.05)  # 64 images over 8 devices
  assert list(rates) == [1, 2, 4, 8]
  assert min(rates.values()) > 0


@pytest.mark.slow
@pytest.mark.needs(what="cifar100")
def test_all_makes_a_table_of_the_default_configs(tmp_path):
  command = [sys.executable, "-m", "train.bench", "--all", "--output", tmp_path]
  command += ["--repeats", "1", "--seconds", "0.1"]
  environment = os.environ | {"TFDS_DATA_DIR": str(CIFAR100_DIR)}
  subprocess.run(command, check=True, cwd=REPOSITORY, env=environment, timeout=590)
  rows = json.loads((tmp_path / "bench.json").read_text())
  assert [row["model"] for row in rows] == list(mlp_models.MODELS)
  assert [row["params"] for row in rows] == [242788, 621924, 885348, 9697637, 21759012]
  table = (tmp_path / "bench.md").read_text().splitlines()
  assert len({line.count("|") for line in table[:7]}) == 1
  for line, row in zip(table[2:7], rows, strict=True):
    assert line.startswith(f"| {row['model']} | {row['images_per_second']:.4g} ")


def test_sweep_writes_numbers_and_a_picture(shapes100, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr("train.bench.start_jax", lambda config: None)  # conftest's eight devices
  monkeypatch.setattr(sweep, "_BATCHES", (16, 64))
  command = ["bench", "--config", str(REPOSITORY / "configs" / "mixer.py:smoke")]
  command += ["--sweep", "batch", "--output", str(tmp_path), "--repeats", "1", "--seconds", "0.05"]
  command += ["--config.data.name=shapes100", f"--config.data.data_dir={shapes100}"]
  monkeypatch.setattr(sys, "argv", command)
  bench.main()
  rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
  assert [row["batch"] for row in rows] == [16, 64]
  # A larger batch reduces only the optimizer's operations per image.
  assert 1 < rows[0]["flops_per_image"] / rows[1]["flops_per_image"] < 1.05
  assert Image.open(tmp_path / "sweep.png").width > 500
  assert "GFLOP" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "one of the arguments --config --all is required"),
    (["--all", "--config", "configs/mixer.py"], "not allowed with argument"),
    (["--config", "configs/mixer.py", "--repeats", "0"], "--repeats must be at least 1"),
    (["--all", "--tune"], "--all measures the defaults"),
    (["--config", "configs/mixer.py", "--sweep", "width"], "invalid choice: 'width'"),
  ],
)
def test_wrong_flags_are_one_line_and_status_2(arguments, message):
  command = [sys.executable, "-m", "train.bench", *arguments]
  process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
  assert process.returncode == 2
  assert message in process.stderr.splitlines()[-1]
