"""A mistyped command line ends with one line of error, before anything is loaded."""

import functools
import sys

import pytest
from ml_collections import ConfigDict

from train import flags, main
from train.check import check_config

BAD = [
  ("--config.optimizer.learnin_rate=1", "did you mean 'optimizer.learning_rate'?", 2),
  ("--config.batch_size=many", "--config.batch_size=many", 2),
  ("--config.epochs=1.5", "--config.epochs=1.5", 2),
  ("--confg=x", "unknown flag --confg=x", 2),
  ("stray", "unknown argument 'stray'", 2),
  ("--config.model.image_size=60", "image_size 60 is not a multiple of patch_size 8", 2),
  ("--config.model.name=mixr", "did you mean 'mixer'?", 2),
  ("--config.dtype=float16", "must be float32 or bfloat16", 2),
  ("--config.epochs=0", "config.epochs = 0: at least 1", 2),
  ("--config.augment.zoom=1.5", "config.augment.zoom = 1.5", 2),
  ("--config.plateau.factor=0.0", "config.plateau.factor = 0.0", 2),
  ("--config.best_metric=loss", "config.best_metric = 'loss': val_loss or val_accuracy", 2),
  ("--config.optimizer.learning_rate=-1.0", "config.optimizer.learning_rate = -1.0", 2),
  ("--config.seed=-1", "config.seed = -1", 2),
  ("--config.microbatch=5", "microbatch=5 does not divide a device's 16 images", 2),
  ("--config.batch_size=100", "batch_size=100 does not divide by 8 devices", 2),
  ("--config.mesh.fsdp=3", "config.mesh = -1 x 3: 8 devices do not divide by 3", 2),
  ("--config.mesh.data=0", "config.mesh.data = 0: at least 1, or -1", 2),
  ("--config.mesh.data=-1 --config.mesh.fsdp=-1", "config.mesh.fsdp = -1: only one axis", 2),
  ("--config.mesh.data=1000000000", "config.mesh.data = 1000000000: at most", 2),
  ("--config.mesh=4", "config.mesh is a group of knobs: mesh.data, mesh.fsdp", 2),
  ("--config.model=vit", "config.model is a group of knobs: model.dropout_rate", 2),
  ("--config.model.num_classes=10", "config has no key 'model.num_classes'", 2),
  ("--config.=3", "config has no key ''", 2),
  ("--config.epochs", "--config.epochs lacks a value", 2),
  ("--config.epochs=", "--config.epochs=: it must be a whole number", 2),
  ("--config.epochs=None", "--config.epochs=None: it must be a whole number", 2),
  ("--config.epochs=1000000000000000000", "at most 1,000,000", 2),
  (f"--config.epochs={'9' * 5000}", "999...: it must be a whole number", 2),
  ("--config.epochs=1\n2", r"--config.epochs=1\n2: it must be a whole number", 2),
  ("--config.epochs=\udcff", r"--config.epochs=\udcff: it must be a whole number", 2),
  ("--config.batch_size=1000000000", "config.batch_size = 1000000000: at most 1,048,576", 2),
  ("--config.batch_size=-8", "config.batch_size = -8: at least 1", 2),
  ("--config.microbatch=0", "config.microbatch = 0: at least 1, or None", 2),
  ("--config.cpu_microbatch=0", "config.cpu_microbatch = 0: at least 1", 2),
  ("--config.steps_per_call=0", "config.steps_per_call = 0: at least 1", 2),
  ("--config.seed=4294967296", "config.seed = 4294967296: from 0 to 2**32 - 1", 2),
  ("--config.dtype=None", "--config.dtype=None: it must be text", 2),
  ("--config.remat=2", "--config.remat=2: it must be True or False", 2),
  ("--config.checkpoint_seconds=nan", "config.checkpoint_seconds = nan: a number above 0", 2),
  ("--config.checkpoint_seconds=inf", "config.checkpoint_seconds = inf: a number above 0", 2),
  ("--config.augment.zoom=nan", "config.augment.zoom = nan", 2),
  ("--config.augment.shift=0.6", "config.augment.shift = 0.6: from 0 to 0.5 of a side", 2),
  ("--config.augment.crop_aspect=0.5", "config.augment.crop_aspect = 0.5: from 1", 2),
  ("--config.augment.randaugment_magnitude=31", "randaugment_magnitude = 31: at most 30", 2),
  (
    "--config.augment.trivial_augment=True --config.augment.randaugment_ops=2",
    "config.augment.trivial_augment = True: only with augment.randaugment_ops=0",
    2,
  ),
  ("--config.augment.erase=1.5", "config.augment.erase = 1.5: from 0 (none) to 1", 2),
  ("--config.augment.rotation=0.6", "config.augment.rotation = 0.6: from 0 to 0.5", 2),
  ("--config.optimizer.learning_rate=nan", "config.optimizer.learning_rate = nan", 2),
  ("--config.optimizer.learning_rate=1e400", "config.optimizer.learning_rate = inf", 2),
  ("--config.optimizer.learning_rate=fast", "learning_rate=fast: it must be a number", 2),
  ("--config.optimizer.weight_decay=1.0", "config.optimizer.weight_decay = 1.0", 2),
  ("--config.optimizer.b1=1", "config.optimizer.b1 = 1.0: at least 0 and less than 1", 2),
  ("--config.optimizer.b2=-0.1", "config.optimizer.b2 = -0.1", 2),
  ("--config.optimizer.epsilon=0", "config.optimizer.epsilon = 0.0: a number above 0", 2),
  ("--config.plateau.patience=0", "config.plateau.patience = 0: at least 1 epoch", 2),
  ("--config.plateau.patience=3000000000", "config.plateau.patience = 3000000000: at most", 2),
  ("--config.plateau.min_delta=inf", "config.plateau.min_delta = inf", 2),
  ("--config.early_stop_patience=-1", "config.early_stop_patience = -1: at least 0 (0: never", 2),
  ("--config.data.workers=0", "config.data.workers = 0: at least 1, or None", 2),
  ("--config.data.in_memory_bytes=-1", "config.data.in_memory_bytes = -1: at least 0", 2),
  ("--config.data.in_memory_bytes=1GB", "1GB: it must be a whole number, or None", 2),
  ("--config.data.background=whit", "config.data.background = 'whit': a colour's name", 2),
  ("--config.data.fallback=None", "--config.data.fallback=None: it must be text", 2),
  ("--config.data.data_dir=a\nb", "it must be one line of text", 2),
  ("--config.model.image_size=1000000", "config.model.image_size = 1000000: at most 32,768", 2),
  ("--config.model.image_size=32768", "GiB for parameters, optimizer state and 1 images", 2),
  ("--config.model.image_size=-64", "image_size is -64, it must be a positive integer", 2),
  ("--config.model.patch_size=0", "patch_size is 0, it must be a positive integer", 2),
  ("--config.model.width=1000000000", "config.model.width = 1000000000: at most", 2),
  ("--config.model.width=0x", "--config.model.width=0x: it must be a whole number", 2),
  ("--config.model.num_blocks=1000000000", "config.model.num_blocks = 1000000000: at most", 2),
  ("--config.model.num_blocks=0", "num_blocks is 0, it must be a positive integer", 2),
  ("--config.model.dropout_rate=1.5", "dropout_rate is 1.5", 2),
  ("--config.model.dropout_rate=nan", "dropout_rate is nan", 2),
  ("--config.model.num_heads=2", "config has no key 'model.num_heads'", 2),
  ("--workdir", "argument --workdir: expected one argument", 2),
  ("--processes=many", "argument --processes: invalid int value: 'many'", 2),
  ("--coordinator=localhost:1", "--process_id and --processes go together: give all three", 2),
]


@pytest.mark.parametrize(("flag", "message", "status"), BAD, ids=[flag[:40] for flag, *_ in BAD])
def test_bad_flag_is_one_line(flag, message, status, monkeypatch, capsys, tmp_path):
  workdir = tmp_path / "run"
  argv = ["train.main", "--config", "configs/mixer.py", "--workdir", str(workdir), *flag.split(" ")]
  argv.append("--processes=1")  # JAX's backend has started: too late to look for other processes
  monkeypatch.setattr(sys, "argv", argv)
  monkeypatch.setattr("train.main.start_jax", lambda config: None)  # keep conftest's eight devices
  with pytest.raises(SystemExit) as exit:
    main.main()
  error = capsys.readouterr().err
  assert exit.value.code == status
  assert message in error
  assert error.count("\n") == 1
  assert not workdir.exists()


@pytest.mark.parametrize(
  ("workdir", "message"),
  [
    ("nowhere://bucket/run", "nowhere:// is unknown"),
    pytest.param(
      "gs://bucket/run",
      "Please install gcsfs to access Google Storage. For gs://: pip install -c constraints.txt -e",
      marks=pytest.mark.needs(what="no gcsfs"),
    ),
  ],
)
def test_bucket_that_cannot_be_opened_is_a_wrong_flag(workdir, message, monkeypatch, capsys):
  argv = ["train.main", "--config", "configs/mixer.py", "--workdir", workdir]
  monkeypatch.setattr(sys, "argv", argv)
  with pytest.raises(SystemExit) as exit:
    main.main()
  assert exit.value.code == 2
  assert f"--workdir: {workdir}: {message}" in capsys.readouterr().err


MODEL_FLAGS = [  # of other models
  ("vit", "--config.model.num_heads=0", "num_heads is 0, it must be a positive integer"),
  ("vit", "--config.model.head_dim=-1", "head_dim is -1, it must be a positive integer"),
  ("vit", "--config.model.mlp_units=128,65", "mlp_units (128, 65) must end in width 64"),
  ("vit", "--config.model.head_units=", "--config.model.head_units=: it must be whole numbers"),
  ("vit", "--config.model.head_units=64,x", "head_units=64,x: it must be whole numbers"),
  ("vit", "--config.model.head_units=1.5", "head_units=1.5: it must be whole numbers"),
  ("vit", "--config.model.head_units=64,0", "head_units is (64, 0), it must hold positive"),
  ("vit", f"--config.model.head_units={'64,' * 200}", "at most 100 layers"),
  ("vit", "--config.model.pool=max", "unknown pool 'max', known are flatten, mean"),
  ("perceiver", "--config.model.num_latents=0", "num_latents is 0, it must be a positive"),
  ("perceiver", "--config.model.num_iterations=1000000000", "num_iterations = 1000000000: at most"),
  ("perceiver", "--config.model.ffn_units=256,128", "must end in width 256"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "flag", "message"), MODEL_FLAGS)
def test_bad_size_of_a_model_is_one_line(name, flag, message, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["train.main", "--config", f"configs/{name}.py", flag])
  with pytest.raises(SystemExit) as exit:
    main.main()
  error = capsys.readouterr().err
  assert exit.value.code == 2
  assert message in error
  assert error.count("\n") == 1


def parsed(monkeypatch, config: str, *overrides: str) -> ConfigDict:
  monkeypatch.setattr(sys, "argv", ["train.main", "--config", config, *overrides])
  parser = flags.Parser()
  parser.add_argument("--config")
  _, config = flags.parse(parser)
  check_config(config)
  return config


def test_overrides_have_the_types_of_their_knobs(monkeypatch):
  overrides = {
    "epochs": ("0x10", 16),
    "augment.flip": ("false", False),
    "augment.zoom": ("0", 0.0),
    "optimizer.learning_rate": ("1e-2", 0.01),
    "data.name": ("folder:~/ä b", "folder:~/ä b"),
    "model.head_units": ("[64, 32]", (64, 32)),
    "model.mlp_units": ("64,", (64,)),
    "microbatch": ("4", 4),
  }
  arguments = [f"--config.{key}={text}" for key, (text, _) in overrides.items()]
  config = parsed(monkeypatch, "configs/vit.py", *arguments)
  for key, (_, value) in overrides.items():
    found = functools.reduce(lambda group, name: group[name], key.split("."), config)
    assert found == value and type(found) is type(value), key
  assert (
    parsed(monkeypatch, "configs/vit.py", "--config.model.head_units=()").model.head_units == ()
  )
  assert parsed(monkeypatch, "configs/mixer.py", "--config.epochs", "3", "--config.remat").remat


def test_none_can_be_said_where_a_knob_may_be_none(monkeypatch):
  imagenet = "configs/perceiver.py:imagenet"
  assert parsed(monkeypatch, imagenet).microbatch == 4
  for none in ("None", "none"):
    assert parsed(monkeypatch, imagenet, f"--config.microbatch={none}").microbatch is None
  for knob in ("data.workers", "data.in_memory_bytes", "data.test_split"):
    parsed(monkeypatch, "configs/mixer.py", f"--config.{knob}=None")


def test_last_of_two_overrides_counts_and_references_follow_it(monkeypatch, tmp_path):
  (tmp_path / "mine.py").write_text(
    "from configs import mixer\nfrom ml_collections import config_dict\n"
    "def get_config():\n  config = mixer.get_config('smoke')\n"
    "  config.seed = config_dict.required_placeholder(int)\n"
    "  config.early_stop_patience = config.get_ref('epochs') * 2\n  return config\n"
  )
  overrides = ("--config.epochs=3", "--config.seed=5", "--config.epochs=7")
  config = parsed(monkeypatch, str(tmp_path / "mine.py"), *overrides)
  assert (config.epochs, config.early_stop_patience, config.seed) == (7, 14, 5)


def test_config_file_is_read_anew_and_leaves_no_bytecode(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  for epochs in (3, 4):  # as long, and changed within the same second
    (tmp_path / "a:b.py").write_text(
      "from configs import mixer\ndef get_config(v=None):\n  config = mixer.get_config(v)\n"
      f"  config.epochs = {epochs}\n  return config\n"
    )
    assert parsed(monkeypatch, "~/a:b.py").epochs == epochs
    assert parsed(monkeypatch, "~/a:b.py:smoke").batch_size == 64
  assert [path.name for path in tmp_path.iterdir()] == ["a:b.py"]


def test_unknown_config_file_and_variant(monkeypatch, capsys):
  for config, message in (
    ("configs/mxer.py", "--config configs/mxer.py: no such file"),
    ("configs/mixer.py:tiny", "variant 'tiny' is unknown: choose one of smoke"),
  ):
    monkeypatch.setattr(sys, "argv", ["train.main", "--config", config])
    with pytest.raises(SystemExit) as exit:
      main.main()
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
