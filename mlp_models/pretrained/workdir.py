"""The best weights of a run of `train.main`, by the layout of its workdir alone."""

import json
import logging
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict


def read(folder: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """The weights of a run's best epoch by path, and what describes them.

  Args:
    folder: an absolute path; also gs://BUCKET/...
  Raises:
    KeyError, OSError, TypeError, ValueError: the folder holds no run, no epoch has ended, or files
      are damaged.
  """
  config, dataset = _json(folder / "config.json"), _json(folder / "dataset.json")
  best = folder / "checkpoints" / "best"
  names = [path.name for path in best.iterdir()] if best.is_dir() else []
  epochs = sorted((int(name) for name in names if name.isdigit()), reverse=True)
  if not epochs:
    raise ValueError(f"{folder} holds no weights yet: no epoch of its run has ended")
  try:
    weights = _restore(best / str(epochs[0]) / "default")
  except Exception as error:  # orbax and tensorstore raise many types over damaged files
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ValueError(f"{best / str(epochs[0])} can't be read: {line}") from None
  arrays = {key: np.asarray(x) for key, x in flatten_dict(weights["params"], sep="/").items()}
  data = config.get("data", {})
  own = {
    "fields": config["model"],
    "class_names": dataset["class_names"],
    "preprocessing": {
      "image_size": config["model"]["image_size"],
      "mean": [float(x) / 255 for x in weights["mean"]],
      "std": [float(x) ** 0.5 / 255 for x in weights["variance"]],
      "interpolation": data.get("interpolation") or "bilinear",
      "crop": data.get("crop") or 1.0,
    },
  }
  own["fields"]["num_classes"] = len(dataset["class_names"])
  return arrays, own


def _restore(path: epath.Path) -> dict[str, Any]:
  """A checkpoint's arrays as NumPy's, whatever devices saved them."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)  # orbax warns that it sees a part of a larger checkpoint
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      tree = checkpointer.metadata(path).item_metadata.tree
      each = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      arguments = ocp.args.PyTreeRestore(restore_args=each)
      weights: dict[str, Any] = checkpointer.restore(path, arguments)
      return weights
  finally:
    logger.setLevel(level)


def _json(path: epath.Path) -> dict[str, Any]:
  try:
    content: dict[str, Any] = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} can't be read: {error}") from None
  return content
