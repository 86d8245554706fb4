"""Limits on the length of files and functions, and on the chains of imports."""

import ast
import functools
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
CODE = ("configs", "mlp_models", "train", "launch", "benchmarks")
FILES = sorted(
  path.relative_to(ROOT)
  for folder in (*CODE, "tests")
  for path in (ROOT / folder).rglob("*")
  if path.suffix in (".py", ".sh", ".sbatch", ".yaml")
)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_is_read_in_one_sitting(path):
  lines = (ROOT / path).read_text().splitlines()
  assert len(lines) <= (400 if path.parts[0] == "tests" else 350)


def test_a_function_fits_on_a_screen():
  for path in FILES:
    if path.suffix == ".py" and path.parts[0] != "tests":
      for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef):
          assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_vit_is_understood_in_three_files_and_480_lines():
  """Without dropout.py and kernels.py, which say how two known operations are computed."""
  files = [ROOT / "mlp_models" / name for name in ("vit.py", "attention.py", "layers.py")]
  assert sum(len(path.read_text().splitlines()) for path in files) <= 480


@functools.cache
def imports(*packages: str) -> dict[str, set[str]]:
  """The modules of these packages that each of them imports, late imports included."""
  graph = grimp.build_graph(*packages)
  return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def longest_chain(module: str, imported: dict, above: tuple[str, ...] = ()) -> tuple[str, ...]:
  """The longest chain of imports from a module down. Fails if there is a circle."""
  assert module not in above, f"a circle: {' -> '.join((*above, module))}"
  chains = [longest_chain(other, imported, (*above, module)) for other in imported[module]]
  return (module, *max(chains, key=len, default=()))


def test_imports_make_no_circle():
  imported = imports("configs", "launch", "mlp_models", "train")
  for module in imported:
    longest_chain(module, imported)


def test_train_has_at_most_eight_floors():
  imported = imports("train")
  for module in imported:
    chain = longest_chain(module, imported)
    assert len(chain) <= 8, " -> ".join(chain)


def test_a_circle_is_found():
  with pytest.raises(AssertionError, match="a circle: a -> b -> a"):
    longest_chain("a", {"a": {"b"}, "b": {"a"}})
