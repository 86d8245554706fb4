"""Wrong config files, workdirs and flags of any command: one line and a status, nothing else."""

import importlib
import json
import shutil
import subprocess
import sys

import pytest

FILE = "from configs import mixer\ndef get_config():\n  config = mixer.get_config('smoke')\n  {}\n"
RETURN = FILE + "  return config\n"

CONFIG_FILES = {  # content, or None for a folder; what the message says
  "import": ("import nosuchmodule\n", "line 1: ModuleNotFoundError: No module"),
  "name": (FILE.format("return nosuchname"), "line 4: NameError: name 'nosuchname'"),
  "raises": (FILE.format("raise KeyError('two\\nlines')"), "line 4: KeyError"),
  "exits": ("raise SystemExit(3)\n", "line 1: SystemExit: 3"),
  "syntax": ("def get_config(:\n", "line 1: SyntaxError"),
  "endless": ("def get_config():\n  return get_config()\n", "RecursionError"),
  "binary": ("\0", "SyntaxError"),
  "empty": ("", "it has no function get_config"),
  "no return": (FILE.format("pass"), "get_config() returns NoneType"),
  "dict": ("def get_config():\n  return {'epochs': 3}\n", "get_config() returns dict"),
  "arguments": ("def get_config(a, b):\n  return a\n", "missing 2 required positional arguments"),
  "folder": (None, "a folder"),
  "nothing": (
    "import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict()\n",
    "the config has no `model`: choose a file such as configs/mixer.py",
  ),
  "no model": (RETURN.format("del config.model"), "the config has no `model`"),
  "model by name": (RETURN.format("del config.model; config.model = 'mixer'"), "has no `model`"),
  "model without name": (RETURN.format("del config.model['name']"), "the config has no `model`"),
  "no plateau": (RETURN.format("del config.plateau"), "config lacks plateau.factor: start from"),
  "classes": (RETURN.format("config.model.num_classes = 10"), "config.model.num_classes: leave it"),
  "classes beside": (RETURN.format("config.num_classes = 10"), "config.num_classes: leave it out"),
  "typo": (RETURN.format("config.batchsize = 10"), "did you mean 'batch_size'?"),
  "dtype": (
    RETURN.format("import jax.numpy as jnp; config.dtype = jnp.float32"),
    "line 4: TypeError: Could not override field 'dtype'",
  ),
  "dtype in model": (
    RETURN.format("import numpy as np; config.model.dtype = np.float32"),
    "config.model.dtype: the knob is config.dtype",
  ),
  "numpy": (
    RETURN.format("import numpy as np; config.model.width = np.ones(3)"),
    "TypeError: Could not override field 'width'",
  ),
  "line break": (RETURN.format("config.data.name = 'a\\nb'"), "it must be one line of text"),
  "huge": (RETURN.format("config.epochs = 10**5000"), "config.epochs = a value of type int"),
  "units": (RETURN.format("config.model.width = 10**9"), "config.model.width = 1000000000"),
  "required": (
    RETURN.format("from ml_collections import config_dict as c; config.seed = "
                  "c.required_placeholder(int)"),
    "this config requires --config.seed=VALUE",
  ),
}  # fmt: skip


def run(name: str, monkeypatch, capsys, *arguments) -> tuple[int, str]:
  """Exit status and stderr of a command, in this process."""
  module = importlib.import_module(f"train.{name}")
  monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
  for place in ("train.main.start_jax", "train.evaluate.start_jax"):  # keep conftest's devices
    monkeypatch.setattr(place, lambda config: None)
  with pytest.raises(SystemExit) as exit:
    module.main()
  return exit.value.code, capsys.readouterr().err


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_bad_config_file_is_one_line(case, tmp_path, monkeypatch, capsys):
  content, message = CONFIG_FILES[case]
  file, workdir = tmp_path / "mine.py", tmp_path / "run"
  if content is None:
    file.mkdir()
  else:
    file.write_text(content)
  arguments = ("--config", file, "--workdir", workdir, "--processes=1")
  status, error = run("main", monkeypatch, capsys, *arguments)
  assert status == 2
  assert message in error
  assert error.count("\n") == 1
  assert error.startswith("error: ")
  assert list(tmp_path.iterdir()) == [file]


def cut(path):
  path.write_bytes(path.read_bytes()[:100])


def write(**changes):
  """Changes values in a JSON file."""

  def change(path):
    content = json.loads(path.read_text())
    for key, value in changes.items():
      *groups, last = key.split("__")
      place = content
      for group in groups:
        place = place[group]
      place[last] = value
    path.write_text(json.dumps(content))

  return change


WORKDIRS = {  # file, its change, what the message says
  "no config": ("config.json", lambda path: path.unlink(), "config.json is missing"),
  "half a config": ("config.json", cut, "config.json is damaged"),
  "empty config": ("config.json", lambda path: path.write_text(""), "config.json is damaged"),
  "list": ("config.json", lambda path: path.write_text("[1]"), "config.json is damaged"),
  "no model": ("config.json", write(model=None), "config.json is damaged"),
  "model": ("config.json", write(model__name="resnet"), "unknown model 'resnet'"),
  "size": ("config.json", write(model__width=-3), "width is -3"),
  "other size": ("config.json", write(model__width=48), "can't be read"),
  "text": ("config.json", write(batch_size="many"), "config.json is damaged"),
  "binary": ("config.json", lambda path: path.write_bytes(b"\xff\0"), "config.json is damaged"),
  "no dataset": ("dataset.json", lambda path: path.unlink(), "dataset.json is missing"),
  "empty dataset": ("dataset.json", lambda path: path.write_text("{}"), "dataset.json is damaged"),
  "fewer classes": ("dataset.json", write(class_names=["a", "b"]), "can't be read"),
  "weights": ("checkpoints/best", shutil.rmtree, "checkpoints/best"),
  "checkpoints": ("checkpoints", shutil.rmtree, "holds no weights"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize("case", WORKDIRS)
def test_damaged_workdir_is_one_line(case, command, finished_run, tmp_path, monkeypatch, capsys):
  name, change, message = WORKDIRS[case]
  workdir = tmp_path / "run"
  shutil.copytree(finished_run, workdir)
  change(workdir / name)
  images = [tmp_path / "x.png"] if command == "predict" else []
  status, error = run(command, monkeypatch, capsys, "--workdir", workdir, *images)
  assert status == 1
  assert message in error
  assert error.count("\n") == 1
  assert "--config." not in error


FLAGS = {  # command and flags; status; what the message says
  "no workdir": ("evaluate", [], 2, "one of the arguments --workdir --config is required"),
  "split": ("evaluate", ["--workdir=x", "--split=tset"], 2, "invalid choice: 'tset'"),
  "override": ("evaluate", ["--workdir=x", "--config.epochs=3"], 2, "--config.epochs=3"),
  "no images": ("predict", ["--workdir=x"], 2, "required: IMAGE"),
  "bucket": ("predict", ["--workdir=s4://x", "a.png"], 2, "s4:// is unknown"),
  "no run": ("predict", ["--workdir=nowhere", "a.png"], 1, "config.json is missing"),
  "file": ("evaluate", ["--workdir=pyproject.toml"], 1, "config.json is missing"),
  "set": ("data.__main__", ["prepare", "--name=nosuchset"], 1, "is no dataset that TFDS knows"),
  "no set": ("data.__main__", ["prepare"], 2, "required: --name"),
  "archive": (
    "data.__main__",
    ["prepare", "--name=cifar10", "--archive=~/no.tgz", "--data_dir=nowhere"],
    1,
    "/no.tgz is no file",
  ),
  "command": ("data.__main__", ["draw"], 2, "invalid choice: 'draw'"),
  "stray": ("data.__main__", ["prepare", "--name=x", "--y"], 2, "unknown argument '--y'"),
  "output": (
    "data.__main__",
    ["show", "--config", "configs/mixer.py", "--output=~/no/such/x.png"],
    2,
    "/no/such/x.png: its folder is missing",
  ),
  "patches": (
    "data.__main__",
    ["show", "--config", "configs/mixer.py", "--config.model.patch_size=7"],
    2,
    "image_size 64 is not a multiple of patch_size 7",
  ),
  "repeats": ("bench", ["--config", "configs/mixer.py", "--repeats=0"], 2, "--repeats must be"),
  "bench": ("bench", ["--config", "configs/mixer.py", "--config.seed=x"], 2, "--config.seed=x: it"),
}  # fmt: skip


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flag_of_any_command_is_one_line(case, monkeypatch, capsys):
  command, arguments, expected, message = FLAGS[case]
  status, error = run(command, monkeypatch, capsys, *arguments)
  assert status == expected
  assert message in error
  assert error.count("\n") == 1


def test_debug_shows_the_traceback_behind_an_error(tmp_path, monkeypatch, capsys):
  file = tmp_path / "mine.py"
  file.write_text(FILE.format("return nosuchname"))
  _, brief = run("main", monkeypatch, capsys, "--config", file)
  status, full = run("main", monkeypatch, capsys, "--config", file, "--debug")
  assert status == 2
  assert "Traceback" in full and "return nosuchname" in full and full.endswith(brief)
  for command, flags in {
    "evaluate": ["--workdir", tmp_path],
    "predict": ["--workdir", tmp_path, "x.png"],
    "data.__main__": ["prepare", "--name=nosuchset"],
    "bench": ["--config", file],
  }.items():
    _, brief = run(command, monkeypatch, capsys, *flags)
    _, full = run(command, monkeypatch, capsys, *flags, "--debug")
    assert "Traceback" not in brief
    assert "Traceback" in full and full.endswith(brief)
  _, error = run("main", monkeypatch, capsys, "--config", file)
  assert "Traceback" not in error


PROCESSES = {  # without the help of a process that has set JAX up; status
  "million": (["main", "--config", "configs/mixer.py", "--config.model.image_size=1000000"], 2),
  "memory": (["main", "--config", "configs/fnet.py", "--config.model.image_size=32768"], 2),
  "blocks": (["main", "--config", "configs/vit.py", "--config.model.num_blocks=1000000000"], 2),
  "folder": (["main", "--config", "configs"], 2),
  "no run": (["evaluate", "--workdir", "nowhere"], 1),
  "no image": (["predict", "--workdir", "nowhere", "--", "-x.png"], 1),
  "set": (["data", "prepare", "--name", "nosuchset"], 1),
}


@pytest.mark.parametrize("case", PROCESSES)
def test_bad_input_ends_a_process_with_one_line(case, tmp_path):
  arguments, status = PROCESSES[case]
  command = [sys.executable, "-m", f"train.{arguments[0]}", *arguments[1:]]
  if arguments[0] == "main":
    command += ["--workdir", tmp_path / "run"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=100)
  assert done.returncode == status
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert not (tmp_path / "run").exists()
