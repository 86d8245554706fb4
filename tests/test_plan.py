"""Planning for a TPU slice: what the compiler is asked, and the plan made from its answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import mlp_models
from configs import mixer, perceiver, vit
from launch import plan
from train import cost, data
from train.errors import ConfigError, DataError

REPOSITORY = Path(__file__).parents[1]

needs_libtpu = pytest.mark.needs(what="libtpu")


def run_plan(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
  """Runs the command in its own process: libtpu's backend must not meet that of the tests."""
  command = [sys.executable, "-m", "launch.plan", "--config", "configs/mixer.py", *arguments]
  return subprocess.run(
    command,
    cwd=REPOSITORY,
    env=os.environ | {"TFDS_DATA_DIR": "/nowhere"} | environment,
    capture_output=True,
    text=True,
    timeout=280,
  )


@needs_libtpu
def test_mixer_is_compiled_for_a_slice_that_is_not_there():
  process = run_plan("--topology=v5e:2x2", "--json")
  assert (process.returncode, process.stderr) == (0, "")
  figures = json.loads(process.stdout)
  assert (figures["devices"], figures["params"]) == (4, 242_788)
  assert (figures["batch_size"], figures["microbatch"]) == (128, 32)
  assert figures["fits"]
  # At least three copies of the parameters: the optimizer has two.
  assert 3 * 4 * 242_788 < figures["state_gib"] * 2**30 < figures["used_gib"] * 2**30 < 2**28
  assert figures["available_gib"] == 15.75
  sums = 4 * 4  # loss, two kinds of hits, examples
  sent = 4 * 242_788 + sums
  assert figures["collectives"] == [
    {
      "kind": "all-reduce",
      "group_size": 4,
      "count": 1,
      "operand_bytes": sent,
      "wire_bytes": 2 * 3 / 4 * sent,
    }
  ]
  info = data.foresee(mixer.get_config().data)
  per_image = cost.flops_per_image(mixer.get_config(), info, platform="tpu")
  assert figures["flops"] == 32 * per_image
  # Parameters and optimizer state are read and written once each; XLA's own count is 450 MB.
  assert 2 * 3 * 4 * 242_788 < figures["hbm_bytes"] < 20e6
  seconds = figures["seconds"]
  assert seconds["compute"] == figures["flops"] / 197e12
  assert seconds["memory"] == figures["hbm_bytes"] / 819e9
  assert seconds["interconnect"] == 1.5 * sent / 200e9
  step = max(seconds.values())
  assert figures["bound_by"] == max(seconds, key=seconds.get)
  assert figures["images_per_second"] == pytest.approx(128 / step)
  assert figures["hours"] == pytest.approx(50 * 352 * step / 3600)  # 45,000 images


@needs_libtpu
def test_what_does_not_fit_is_said_with_the_numbers():
  # 250,000 images per device: the output of one layer takes 16 GB.
  process = run_plan(
    "--topology=v5e:2x2", "--config.batch_size=1000000", "--config.model.num_blocks=1"
  )
  assert (process.returncode, process.stderr) == (1, "")
  lines = process.stdout.splitlines()
  assert max(map(len, lines)) <= 80
  assert lines[-1].startswith("does not fit: needs ") and lines[-1].endswith(" of 15.75 GiB")


def test_without_libtpu_it_says_what_to_install(tmp_path):
  (tmp_path / "sitecustomize.py").write_text(
    "import importlib.util as u; find = u.find_spec\n"
    "u.find_spec = lambda name, *rest: None if name == 'libtpu' else find(name, *rest)\n"
  )
  process = run_plan("--topology=v5e:2x2", PYTHONPATH=str(tmp_path))
  assert (process.returncode, process.stdout) == (1, "")
  assert process.stderr.count("\n") == 1
  assert 'pip install -c constraints.txt -e ".[plan]"' in process.stderr


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--topology=v5e"], "as in v5e:2x2 or v4:2x2x4"),
    (["--topology=v9:2x2"], "--topology=v9:2x2: a chip (v4, v5e, v5p, v6e)"),
    (["--topology=v5e:0x2"], "as in v5e:2x2"),
    (["--topology=v5e:2x2", "--config.batch_size=0"], "config.batch_size = 0"),
    (["--topology=v5e:2x2", "--chips=4"], "unknown flag --chips=4"),
    ([], "the following arguments are required: --topology"),
  ],
)
def test_wrong_flags_are_one_line_and_status_2(arguments, message, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["plan", "--config", "configs/mixer.py", *arguments])
  with pytest.raises(SystemExit) as exit:
    plan.main()
  assert exit.value.code == 2
  assert message in capsys.readouterr().err.splitlines()[-1]


@needs_libtpu
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      ["--topology=v5e:2x2", "--config.batch_size=30"],
      "batch_size=30 does not divide by 4 devices",
    ),
    (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], "4 devices do not divide by 3"),
    (["--topology=v4:2x2x2x2"], "as in v5e:2x2"),
  ],
)
def test_what_does_not_fit_the_slice_is_one_line(arguments, message):
  process = run_plan(*arguments)
  assert (process.returncode, process.stdout) == (2, "")
  assert message in process.stderr and process.stderr.count("\n") == 1


def test_chips_are_known_by_the_name_of_a_topology():
  assert plan.chip_of("v4:2x2x4").flops == 275e12
  assert plan.chip_of("v6e:8x8").hbm == 31.25
  with pytest.raises(ConfigError, match="--topology=v3:2x2"):
    plan.chip_of("v3:2x2")


def test_xlas_words_for_too_little_memory_are_read():
  message = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(27.94G) exceeds available HBM (15.75G)."
  )
  assert plan.needed(message) == (27.94, 15.75)
  assert plan.needed("Used 1.5T of 15.75G hbm. Exceeded hbm capacity by 1.5T.") == (1536, 15.75)
  assert plan.needed("INTERNAL: something else") is None


@pytest.mark.parametrize("limit", [0, 1, 7, 16, 100, 1000])
@pytest.mark.parametrize("start", [1, 16, 5000])
def test_the_largest_that_fits_is_found_to_a_32nd(limit, start):
  tried = []

  def fits(number):
    tried.append(number)
    return number <= limit

  found = plan.largest(fits, start, most=1000)
  assert limit - limit // 32 <= found <= limit
  assert len(tried) == len(set(tried)) <= 20
  assert max(tried) <= 1000


def test_flops_of_what_remat_computes_again_are_counted_on_demand():
  config = perceiver.get_config("smoke")
  info = data.foresee(config.data)
  once = cost.flops_per_image(config, info)
  config.remat = True
  assert cost.flops_per_image(config, info) == once
  assert 1.2 * once < cost.flops_per_image(config, info, recomputed=True) < 1.5 * once


def test_the_papers_perceiver_has_its_sizes(tmp_path):
  config = perceiver.get_config("imagenet")
  config.data.data_dir = str(tmp_path)
  model = mlp_models.create(**config.model)
  assert (model.image_size**2, model.preprocessing, config.batch_size) == (50_176, "fourier", 1024)
  assert (model.num_latents, model.width, model.num_heads) == (512, 1024, 8)
  assert (model.num_iterations, model.num_cross_attends, model.num_blocks) == (8, 8, 6)
  info = data.foresee(config.data)
  assert (info.num_classes, info.image_shape) == (1000, (None, None, 3))
  assert info.sizes == {"train": 1_268_355, "validation": 12_812, "test": 50_000}


def test_a_dataset_is_foreseen_without_being_there(tmp_path):
  config = mixer.get_config().data
  config.data_dir = str(tmp_path)
  info = data.foresee(config)
  assert info.sizes == {"train": 45_000, "validation": 5_000, "test": 10_000}
  assert (info.num_classes, info.image_shape) == (100, (32, 32, 3))
  config.name = "mnist"
  with pytest.raises(DataError, match="--images=N says how many train"):
    data.foresee(config)
  info = data.foresee(config, train_images=60_000)
  assert (info.sizes, info.image_shape, info.num_classes) == ({"train": 60_000}, (28, 28, 1), 10)
  config.train_split = "training"
  config.name = "cifar10"
  with pytest.raises(DataError, match="'training' is no split of cifar10"):
    data.foresee(config)
  assert not list(tmp_path.iterdir())


def test_flops_are_products_where_the_backend_counts_nothing(monkeypatch):
  config = mixer.get_config("smoke")
  info = data.foresee(config.data)
  counted = cost.flops_per_image(config, info)
  monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)  # as on a GPU
  assert 0.6 * counted < cost.flops_per_image(config, info) < counted


def test_flops_for_a_tpu_are_those_of_its_form_of_attention():
  config = vit.get_config()
  info = data.foresee(config.data)
  on_cpu, on_tpu = (cost.flops_per_image(config, info, platform=p) for p in ("cpu", "tpu"))
  assert cost.flops_per_image(config, info) == on_cpu
  # On a CPU heads as wide as the model take fewer operations.
  assert 1.15 < on_tpu / on_cpu < 1.3
