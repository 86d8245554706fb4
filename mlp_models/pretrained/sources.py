"""Where weights come from: files, folders as a hub lays them out, our workdirs, and the hub itself.

A source gives names and shapes first; arrays are read one by one.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from etils import epath

HUB = "hf://"
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle", ".pth.tar")
_TO_SAFETENSORS = (
  'python -c "import torch, safetensors.torch as s; '
  "w = torch.load({path!r}, 'cpu', weights_only=True); "
  's.save_file({{k: x.clone() for k, x in w.items()}}, {new!r})"'
)


class WeightsError(ValueError):
  """Weights that can't be read, are not known, or do not fit; one line says which and why."""


class Source(NamedTuple):
  """Arrays on disk.

  said: what messages call it.
  shapes: of all arrays, by name.
  read: name -> array, of the dtype on disk.
  config: content of the config.json and preprocessor_config.json beside the arrays.
  own: of weights that this library has saved, what describes them; None for others'.
  """

  said: str
  shapes: dict[str, tuple[int, ...]]
  read: Callable[[str], np.ndarray]
  config: dict[str, Any]
  own: dict[str, Any] | None = None


def open_source(source: str | os.PathLike[str]) -> Source:
  """Opens weights.

  Args:
    source: a .safetensors or .npz file, a folder with model.safetensors and config.json, a workdir
      of `train.main`, which may be in a bucket, or "hf://ORG/NAME" or "hf://ORG/NAME@REVISION".
  Raises:
    WeightsError: there is no such file, or it is of another kind or damaged.
  """
  said = os.fspath(source)
  if said.startswith(HUB):
    return _open_folder(_download(said))._replace(said=said)
  if "://" in said:
    try:
      return _open_workdir(epath.Path(said))
    except (ImportError, KeyError) as error:  # of epath, for what it has no way to
      raise WeightsError(f"{said} can't be read: {_first_line(error)}") from None
  path = Path(os.path.expanduser(said))
  if path.name.endswith(_PICKLES):
    new = path.name.split(".")[0] + ".safetensors"
    command = _TO_SAFETENSORS.format(path=path.name, new=new)
    raise WeightsError(
      f"{path} is a pickle, which can run any program when it is opened. Where it can be trusted, "
      f"this writes a file that is safe: {command}"
    )
  if path.is_dir():
    return _open_folder(path)
  if not path.is_file():
    raise WeightsError(f"{path}: there is no such file or folder")
  if path.suffix == ".npz":
    return _open_npz(path)
  if path.suffix == ".safetensors":
    config = _config(path.parent) if path.name == "model.safetensors" else {}
    return _open_safetensors([path], path, config)
  raise WeightsError(f"{path}: weights are read from .safetensors and .npz files, and from folders")


def _open_folder(path: Path) -> Source:
  if (path / "checkpoints").is_dir() and (path / "dataset.json").is_file():
    return _open_workdir(epath.Path(path.absolute()))
  if (index := path / "model.safetensors.index.json").is_file():
    parts = _parts(index)
    return _open_safetensors([path / part for part in parts], path, _config(path))
  if (path / "model.safetensors").is_file():
    return _open_safetensors([path / "model.safetensors"], path, _config(path))
  files = sorted(path.glob("*.safetensors"))
  if len(files) == 1:
    return _open_safetensors(files, path, _config(path))
  if pickles := [file for file in sorted(path.iterdir()) if file.name.endswith(_PICKLES)]:
    return open_source(pickles[0])
  raise WeightsError(f"{path} holds no model.safetensors, and is no workdir of a run")


def _open_workdir(path: epath.Path) -> Source:
  from mlp_models.pretrained import workdir  # late: orbax takes seconds to import

  try:
    arrays, own = workdir.read(path)
  except (OSError, ValueError) as error:
    raise WeightsError(_first_line(error)) from None
  except (KeyError, TypeError) as error:
    raise WeightsError(f"{path} is damaged: {_first_line(error)}") from None
  return Source(str(path), {k: x.shape for k, x in arrays.items()}, arrays.__getitem__, {}, own)


def _open_safetensors(files: list[Path], said: Path, config: dict[str, Any]) -> Source:
  shapes, where, own = {}, {}, None
  for file in files:
    try:
      opened = safetensors.safe_open(file, "numpy")
      for name in opened.keys():
        shapes[name], where[name] = tuple(opened.get_slice(name).get_shape()), opened
      metadata = opened.metadata() or {}
      own = json.loads(metadata["mlp_models"]) if "mlp_models" in metadata else own
    except (OSError, ValueError, safetensors.SafetensorError) as error:
      raise WeightsError(f"{file} can't be read: {_first_line(error)}") from None
  return Source(str(said), shapes, lambda name: where[name].get_tensor(name), config, own)


def _open_npz(path: Path) -> Source:
  try:
    arrays: Mapping[str, np.ndarray] = np.load(path, allow_pickle=False)
    # Shapes are not in the archive's index, and reading takes less time than two ways would code.
    loaded = {name: arrays[name] for name in arrays}
  except Exception as error:  # of zipfile, zlib and numpy
    raise WeightsError(f"{path} can't be read: {_first_line(error)}") from None
  return Source(str(path), {name: x.shape for name, x in loaded.items()}, loaded.__getitem__, {})


def _parts(index: Path) -> list[str]:
  """The names of the files that hold the arrays, all in the folder of the index."""
  where = _json(index).get("weight_map")
  parts = sorted(set(map(str, where.values()))) if isinstance(where, dict) else []
  if not parts or any(part != Path(part).name for part in parts):
    raise WeightsError(f"{index} names no files of its folder")
  return parts


def _config(folder: Path) -> dict[str, Any]:
  config: dict[str, Any] = {}
  for name in ("config.json", "preprocessor_config.json"):
    if (folder / name).is_file():
      config |= _json(folder / name)
  return config


def _json(path: Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise WeightsError(f"{path} can't be read: {_first_line(error)}") from None
  if not isinstance(content, dict):
    raise WeightsError(f"{path} holds no JSON object")
  return content


def _download(source: str) -> Path:
  """The folder of a repository on the hub, downloaded first if it is not in the hub's cache."""
  name, _, revision = source.removeprefix(HUB).partition("@")
  try:
    from huggingface_hub import snapshot_download  # late: an extra
  except ModuleNotFoundError:
    raise WeightsError(
      f"{source} needs the package huggingface_hub: pip install '.[hub]'"
    ) from None
  try:
    path = snapshot_download(
      name, revision=revision or None, allow_patterns=["*.json", "*.safetensors"]
    )
  except Exception as error:  # of the network, the hub, and names that it does not know
    raise WeightsError(
      f"{source} can't be downloaded ({_first_line(error)}). Download its config.json and "
      "model.safetensors elsewhere, and name the folder that holds them instead"
    ) from None
  if not list(Path(path).glob("*.safetensors")):
    raise WeightsError(
      f"{source} has no safetensors, perhaps a pickle only. If another revision has them, "
      f"{HUB}{name}@REVISION names it, such as {HUB}{name}@refs/pr/1"
    )
  return Path(path)


def _first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
