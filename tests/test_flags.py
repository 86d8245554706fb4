"""A mistyped command line ends with one line of error, before anything is loaded."""

import sys

import pytest

from train import main

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
  ("--coordinator=localhost:1", "--process_id and --processes go together: give all three", 2),
]


@pytest.mark.parametrize(("flag", "message", "status"), BAD, ids=[flag for flag, *_ in BAD])
def test_bad_flag_is_one_line(flag, message, status, monkeypatch, capsys, tmp_path):
  workdir = tmp_path / "run"
  argv = ["train.main", "--config", "configs/mixer.py", "--workdir", str(workdir), flag]
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
