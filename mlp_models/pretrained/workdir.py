"""The best weights of a run of `train.main`, by the layout of its workdir alone."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from mlp_models.pretrained.sources import Source, WeightsError


def open_workdir(folder: Path) -> Source:
  """Opens the weights of a run's best epoch.

  Raises:
    WeightsError: no epoch has ended, or the files are damaged.
  """
  config, dataset = _json(folder / "config.json"), _json(folder / "dataset.json")
  best = folder / "checkpoints" / "best"
  names = [path.name for path in best.iterdir()] if best.is_dir() else []
  epochs = sorted((int(name) for name in names if name.isdigit()), reverse=True)
  if not epochs:
    raise WeightsError(f"{folder} holds no weights yet: no epoch of its run has ended")
  try:
    weights = _restore(best / str(epochs[0]) / "default")
  except Exception as error:  # orbax and tensorstore raise many types over damaged files
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise WeightsError(f"{best / str(epochs[0])} can't be read: {line}") from None
  arrays = {key: np.asarray(x) for key, x in flatten_dict(weights["params"], sep="/").items()}
  data = config.get("data", {})
  own = {
    "fields": config["model"],
    "class_names": dataset["class_names"],
    "preprocessing": {
      "image_size": config["model"]["image_size"],
      "mean": [float(x) / 255 for x in weights["mean"]],
      "std": [float(x) ** 0.5 / 255 for x in weights["variance"]],
      "interpolation": data.get("interpolation", "bilinear"),
      "crop": data.get("crop", 1.0),
    },
  }
  own["fields"]["num_classes"] = len(dataset["class_names"])
  return Source(str(folder), {k: x.shape for k, x in arrays.items()}, arrays.__getitem__, {}, own)


def _restore(path: Path) -> dict[str, Any]:
  """A checkpoint's arrays as NumPy's, whatever devices saved them."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)  # orbax warns that it sees a part of a larger checkpoint
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      tree = checkpointer.metadata(path.absolute()).item_metadata.tree
      each = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      arguments = ocp.args.PyTreeRestore(restore_args=each)
      weights: dict[str, Any] = checkpointer.restore(path.absolute(), arguments)
      return weights
  finally:
    logger.setLevel(level)


def _json(path: Path) -> dict[str, Any]:
  try:
    content: dict[str, Any] = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise WeightsError(f"{path} can't be read: {error}") from None
  return content
