"""How a run starts from weights that `config.init` names, or with a variant of a model."""

import functools
from typing import Any, TextIO

import jax
import numpy as np
from etils import epath
from flax import linen as nn
from ml_collections import ConfigDict

import mlp_models
from mlp_models import registry
from mlp_models.pretrained import describe
from train.check import check_model
from train.data.splits import DatasetInfo
from train.errors import ConfigError, shown
from train.run import workdir
from train.state import TrainState

_PREPARATION = ("mean", "variance", "interpolation", "crop")  # knobs of config.data


def resolve(config: ConfigDict, folder: epath.Path | None = None) -> ConfigDict:
  """Adds what weights or a variant decide: the model's fields, and how images are prepared.

  What the config gives counts more. A run that goes on takes all from its own config.json, and
  needs the weights no more.

  Args:
    config: accepted by `check.check_config`.
    folder: the workdir, if there is one.
  Returns:
    A copy whose `model` has every field; the config itself without `init` and `model.variant`.
  Raises:
    ConfigError: the weights can't be read, are of another family or variant, or do not fit the
      config.
  """
  if not config.init and "variant" not in config.model:
    return config
  config = config.copy_and_resolve_references()
  given = {name: value for name, value in config.model.to_dict().items() if value is not None}
  variant = given.pop("variant", None) if config.init else None
  begun = workdir.begun_config(folder) if folder else None
  if not config.init:
    fields, preparation = _all_fields(mlp_models.create(**given)), {}
  elif begun is not None and begun.init == config.init:
    fields, preparation = begun.model.to_dict(), begun.data.to_dict()
  else:
    fields, preparation = _said_by_weights(config.init, given)
  if variant is not None:
    _require_variant(variant, given, fields)
  with config.unlocked(), config.ignore_type():
    config.model = ConfigDict(fields | given)
    for key in _PREPARATION:
      if not config.data[key] and key in preparation:
        config.data[key] = preparation[key]
  check_model(config)
  return config.lock()


def load(
  config: ConfigDict, info: DatasetInfo, file: TextIO | None = None
) -> dict[str, Any] | None:
  """The parameters that the run starts from, as numpy arrays; None without `config.init`.

  Args:
    config: from `resolve`.
    info: without classes, the model has no head.
    file: where lines say what is kept, resampled and reset; None: stdout.
  Raises:
    ConfigError: the weights can't be read, or do not fit the model.
  """
  if not config.init:
    return None
  fields = config.model.to_dict()
  del fields["name"]
  try:
    _, params, _ = mlp_models.load(
      config.init,
      info.num_classes,
      class_names=info.class_names,
      say=functools.partial(_say, file=file),
      seed=config.seed,
      **fields,
    )
  except ValueError as error:
    raise ConfigError(f"config.init: {error}") from None
  return params


def begin(state: TrainState, params: dict[str, Any] | None) -> TrainState:
  """A run's first state with these parameters, laid out as its own; None: it keeps its own.

  Args:
    params: from `load`, the same in all processes.
  Raises:
    ConfigError: an array has another shape, as with images of another number of channels.
  """
  if params is None:
    return state

  def place(path, array: np.ndarray, own: jax.Array) -> jax.Array:
    if array.shape != own.shape:
      raise ConfigError(
        f"config.init: {'/'.join(key.key for key in path)} has the shape {list(array.shape)}, and "
        f"for the images of this dataset it must be {list(own.shape)}"
      )
    array = array.astype(own.dtype)
    return jax.make_array_from_callback(array.shape, own.sharding, array.__getitem__)

  params = jax.tree_util.tree_map_with_path(place, params, state.params)
  return state.replace(params=params).begin_average()


def _said_by_weights(source: str, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """All fields of the model, and the knobs of `config.data`, as the weights have them.

  Args:
    given: fields that the config gives, `name` among them.
  """
  given = dict(given)
  name = given.pop("name")
  try:
    found = describe(source)
    if found.name != name:
      raise ConfigError(
        f"config.init = {shown(source)}: the weights are of {found}, and config.model.name is "
        f"{name!r}: choose configs/{found.name}.py:finetune"
      )
    # Before the dataset is looked at: do they fit?
    model, _, preprocessing = mlp_models.load(source, say=lambda line: None, **given)
  except ConfigError:
    raise
  except ValueError as error:
    raise ConfigError(f"config.init: {error}") from None
  return _all_fields(model), {
    "mean": tuple(255 * x for x in preprocessing.mean),
    "variance": tuple((255 * x) ** 2 for x in preprocessing.std),
    "interpolation": preprocessing.interpolation,
    "crop": preprocessing.crop,
  }


def _require_variant(variant: str, given: dict[str, Any], fields: dict[str, Any]) -> None:
  """Raises ConfigError if weights are not of the variant that the config gives.

  Args:
    given, fields: of the model, by the config and by the weights.
  """
  try:
    asked = mlp_models.create(variant=variant, **given)
  except (TypeError, ValueError) as error:
    raise ConfigError(f"config.model: {error}") from None
  found = mlp_models.create(**fields)
  if not registry.have_same_sizes(asked, found):
    raise ConfigError(
      f"config.model.variant = {shown(variant)}: the weights in config.init decide the "
      f"variant, and are of {registry.variant_of(found) or 'none that has a name'}: leave it out"
    )


def _all_fields(model: nn.Module) -> dict[str, Any]:
  """`config.model` of a model."""
  name, fields = registry.describe(model)
  del fields["num_classes"]  # the dataset says how many there are
  return {"name": name} | fields


def _say(line: str, file: TextIO | None) -> None:
  if not jax.process_index():
    print(line, file=file, flush=True)
