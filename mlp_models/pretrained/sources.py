"""Where weights come from: files, folders as a hub lays them out, our workdirs, and the hub itself.

A source gives names and shapes first; arrays are read one by one.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from etils import epath

from mlp_models.pretrained import config
from mlp_models.pretrained.errors import WeightsError, first_line

HUB = "hf://"
_TIMM = re.compile(r"vit_[a-z0-9]+_patch\d+_[a-z0-9_]+")  # timm's architectures of ViT
_INDEX = "model.safetensors.index.json"
_PART = re.compile(r"-\d+-of-\d+\.safetensors$")  # one of several files that an index joins
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle", ".pth.tar")
_TO_SAFETENSORS = (
  'python -c "import torch, safetensors.torch as s; '
  "w = torch.load({path!r}, 'cpu', weights_only=True); "
  's.save_file({{k: x.clone() for k, x in w.items()}}, {new!r})"'
)


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
  if not said:
    raise WeightsError("the weights have no name: give a file, a folder or hf://ORG/NAME")
  if said.startswith(HUB):
    return _open_folder(_download(said))._replace(said=said)
  if "://" in said:
    try:
      return _open_workdir(epath.Path(said))
    except (ImportError, KeyError) as error:  # of epath, for what it has no way to
      raise WeightsError(f"{said} can't be read: {first_line(error)}") from None
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
  if path.name == _INDEX or (_PART.search(path.name) and (path.parent / _INDEX).is_file()):
    return _open_folder(path.parent)
  if path.suffix == ".npz":
    return _open_npz(path)
  if path.suffix == ".safetensors":
    return _open_safetensors([path], path, _config_beside(path))
  raise WeightsError(f"{path}: weights are read from .safetensors and .npz files, and from folders")


def _open_folder(path: Path) -> Source:
  if (path / "checkpoints").is_dir() and (path / "dataset.json").is_file():
    return _open_workdir(epath.Path(path.absolute()))
  if (index := path / _INDEX).is_file():
    parts = _parts(index)
    return _open_safetensors(
      [path / part for part in parts], path, _with_name(config.read(path), path)
    )
  if (path / "model.safetensors").is_file():
    return _open_safetensors(
      [path / "model.safetensors"], path, _with_name(config.read(path), path)
    )
  files = sorted(path.glob("*.safetensors"))
  if len(files) > 1:
    names = ", ".join(file.name for file in files[:3])
    raise WeightsError(f"{path} holds {len(files)} files of weights: name one, such as {names}")
  if files:
    return _open_safetensors(files, path, _with_name(config.read(path), *files, path))
  if pickles := [file for file in sorted(path.iterdir()) if file.name.endswith(_PICKLES)]:
    return open_source(pickles[0])
  raise WeightsError(f"{path} holds no model.safetensors, and is no workdir of a run")


def _open_workdir(path: epath.Path) -> Source:
  from mlp_models.pretrained import workdir  # late: orbax takes seconds to import

  try:
    arrays, own = workdir.read(path)
  except (OSError, ValueError) as error:
    raise WeightsError(first_line(error)) from None
  except (KeyError, TypeError) as error:
    raise WeightsError(f"{path} is damaged: {first_line(error)}") from None
  return Source(str(path), {k: x.shape for k, x in arrays.items()}, arrays.__getitem__, {}, own)


def _open_safetensors(files: list[Path], said: Path, beside: dict[str, Any]) -> Source:
  shapes, where, own = {}, {}, None
  for file in files:
    try:
      opened = safetensors.safe_open(file, "numpy")
      for name in opened.keys():
        shapes[name], where[name] = tuple(opened.get_slice(name).get_shape()), opened
      metadata = opened.metadata() or {}
      own = json.loads(metadata["mlp_models"]) if "mlp_models" in metadata else own
    except (OSError, ValueError, safetensors.SafetensorError) as error:
      raise WeightsError(f"{file} can't be read: {first_line(error)}") from None

  def read(name: str) -> np.ndarray:
    try:
      array: np.ndarray = where[name].get_tensor(name)
      return array
    except (AttributeError, OSError, TypeError, safetensors.SafetensorError):
      kind = where[name].get_slice(name).get_dtype()
      raise WeightsError(f"{said}: {name} can't be read, it holds {kind}") from None

  return Source(str(said), shapes, read, beside, own)


def _open_npz(path: Path) -> Source:
  try:
    arrays: Mapping[str, np.ndarray] = np.load(path, allow_pickle=False)
    # Shapes are not in the archive's index, and reading takes less time than two ways would code.
    loaded = {name: arrays[name] for name in arrays}
  except Exception as error:  # of zipfile, zlib and numpy
    raise WeightsError(f"{path} can't be read: {first_line(error)}") from None
  return Source(str(path), {name: x.shape for name, x in loaded.items()}, loaded.__getitem__, {})


def _config_beside(file: Path) -> dict[str, Any]:
  """What config.json says of a file: the hub has one for model.safetensors, `save` for any name."""
  is_its = file.name == "model.safetensors" or config.is_of(file.parent / "config.json", file)
  return _with_name(config.read(file.parent) if is_its else {}, file, file.parent)


def _with_name(config: dict[str, Any], *paths: Path) -> dict[str, Any]:
  """The config with the architecture of timm that a file or its folder is named after, if any."""
  named = [name for path in paths if _TIMM.fullmatch(name := path.name.partition(".")[0])]
  return {"architecture": named[0]} | config if named else config


def _parts(index: Path) -> list[str]:
  """The names of the files that hold the arrays, all in the folder of the index."""
  where = config.read_json(index).get("weight_map")
  parts = sorted(set(map(str, where.values()))) if isinstance(where, dict) else []
  if not parts or any(part != Path(part).name for part in parts):
    raise WeightsError(f"{index} names no files of its folder")
  return parts


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
      f"{source} can't be downloaded ({first_line(error)}). Download its config.json and "
      "model.safetensors elsewhere, and name the folder that holds them instead"
    ) from None
  if not list(Path(path).glob("*.safetensors")):
    raise WeightsError(
      f"{source} has no safetensors, perhaps a pickle only. If another revision has them, "
      f"{HUB}{name}@REVISION names it, such as {HUB}{name}@refs/pr/1"
    )
  return Path(path)
