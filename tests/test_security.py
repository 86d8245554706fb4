"""No file of a user's can run code, except a config, which is code."""

import ast
from pathlib import Path

import numpy as np
import pytest

import mlp_models
from train.data.decode import decode_file

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "launch", "mlp_models", "train")
FILES = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
# They run code that a file holds, or can.
UNSAFE_MODULES = set("pickle cPickle marshal shelve dill cloudpickle joblib torch".split())
UNSAFE_CALLS = set("eval exec np.load numpy.load yaml.load yaml.unsafe_load os.system".split())
ALLOWED = {
  ("train/flags.py", "exec"),  # a config file, which the command line names
  ("mlp_models/pretrained/sources.py", "np.load"),  # with allow_pickle=False
  ("mlp_models/pretrained/sources.py", "allow_pickle"),
}


def uses(path: Path) -> set[str]:
  """Modules that a file imports, and functions that it calls by these names."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found.add((node.module or "").split(".")[0])
    elif isinstance(node, ast.Call):
      found.add(ast.unparse(node.func))
      found |= {"allow_pickle" for word in node.keywords if word.arg == "allow_pickle"}
      found |= {"shell" for word in node.keywords if word.arg == "shell"}
  return found


def test_no_module_of_ours_can_run_what_a_file_holds():
  unsafe = UNSAFE_MODULES | UNSAFE_CALLS | {"allow_pickle", "shell"}
  found = {(str(path.relative_to(ROOT)), use) for path in FILES for use in uses(path) & unsafe}
  assert found == ALLOWED


def test_an_unsafe_use_is_found(tmp_path):
  path = tmp_path / "x.py"
  path.write_text("import dill.source\nnp.load(x, allow_pickle=True)\nos.system('ls')\n")
  assert uses(path) >= {"dill", "np.load", "allow_pickle", "os.system"}


class Trap:
  """Raises if it is unpickled."""

  def __reduce__(self):
    return (pytest.fail, ("unpickled",))


def test_pickles_are_neither_images_nor_weights():
  import pickle

  with pytest.raises(ValueError):
    decode_file(pickle.dumps(Trap()), (8, 8, 3), background="white", upright=True)
  with pytest.raises(ValueError, match="mixer weights 'head/bias' have the type object"):
    mlp_models.keras_weights.to_params("mixer", {"head/bias": np.array([Trap()])})
