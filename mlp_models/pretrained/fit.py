"""Fits arrays to a model: another image size, other classes, and what the weights lack."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from mlp_models import layers
from mlp_models.pretrained.errors import WeightsError, shape_words
from mlp_models.pretrained.layouts import listed
from mlp_models.pretrained.positions import resample

Arrays = dict[str, np.ndarray]  # by path
_HEAD = "head/"
_POSITION = "position/embedding"
_FREE = ("num_classes", "image_size", "variant", "gelu", "_rate", "_init", "_epsilon")  # of fields
_OVER_TOKENS = ("token_mlp/", "spatial/")  # layers whose sizes are numbers of tokens


class Fit:
  """Arrays on their way into a model, and what is said about them.

  arrays: by path; the methods change them.
  model: the module that they are for.
  fields: of the weights' own model.
  said: the source, for messages.
  say: called with each line.
  """

  def __init__(
    self,
    arrays: Arrays,
    model: Any,
    fields: Mapping[str, Any],
    said: str,
    say: Callable[[str], object],
  ):
    self.arrays, self._model, self._fields = arrays, model, fields
    self._said, self._say = said, say
    self._images = jax.ShapeDtypeStruct(
      _image_shape(arrays, model.image_size, fields.get("patch_size")), jnp.float32
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), self._images)["params"]
    self._shapes = {path: x.shape for path, x in flatten_dict(shapes, sep="/").items()}

  def head(self, theirs: Sequence[str], ours: Sequence[str], num_theirs: int) -> None:
    """Keeps the head for the same classes, in our order; drops it for others.

    Args:
      theirs, ours: names of the classes; () if unknown.
      num_theirs: classes of the weights' head; 0: they have none.
    """
    num_ours: int = self._model.num_classes
    if theirs and ours and set(theirs) == set(ours) and len(ours) == len(theirs) == num_theirs:
      order = [list(theirs).index(name) for name in ours]
      for path, x in self.arrays.items():
        if path.startswith(_HEAD) and x.shape[-1:] == (num_theirs,):
          self.arrays[path] = x[..., order]
      moved = ", in another order" if order != sorted(order) else ""
      self._say(f"head kept: the {num_ours:,} classes have the same names{moved}")
    elif num_ours == num_theirs and not (theirs and ours):
      self._say(f"head kept: {num_ours:,} classes" if num_ours else "no head: features")
    else:
      self.arrays = {k: x for k, x in self.arrays.items() if not k.startswith(_HEAD)}
      before = "classes of other names" if num_ours == num_theirs else f"{num_theirs:,}"
      if not num_ours:
        self._say("head left out: the model returns features")
      elif not num_theirs:
        self._say(f"head new, {num_ours:,} classes: the weights have none")
      else:
        self._say(f"head reset: {num_ours:,} classes instead of {before}")

  def positions(self) -> None:
    """Resamples position embeddings to the model's grid of patches."""
    path = next((path for path in self._shapes if path.endswith(_POSITION)), None)
    if path is None or path not in self.arrays:
      return
    has_class_token, needs_one = ("class_token" in x for x in (self.arrays, self._shapes))
    if has_class_token and not needs_one:
      raise WeightsError(
        f"{self._said} has a class token, and the model has none: class_token=True keeps it"
      )
    if needs_one and not has_class_token:
      raise WeightsError(f"{self._said} has no class token{self._way_out()}")
    old = layers.grid(self._fields["image_size"], self._fields.get("patch_size", 1))
    new = layers.grid(self._model.image_size, getattr(self._model, "patch_size", 1))
    if self.arrays[path].shape[1] != self._shapes[path][1] or old == new:
      return
    try:
      self.arrays[path] = resample(self.arrays[path], old, new, class_tokens=int(needs_one))
    except ValueError as error:
      raise WeightsError(f"{self._said}: {error}") from None
    self._say(
      f"position embeddings resampled from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"
    )

  def params(self, may_be_new: Sequence[str], seed: int) -> dict[str, Any]:
    """The model's parameters; those that the weights lack start as in a new model.

    Args:
      may_be_new: prefixes of paths, beside those of a head that is new as a whole.
      seed: of the new ones.
    Raises:
      WeightsError: other arrays are missing, are too many, or have other shapes.
    """
    has_head = any(path.startswith(_HEAD) for path in self.arrays)
    allowed = (*may_be_new, *(() if has_head else (_HEAD,)))
    missing = [path for path in self._shapes if path not in self.arrays]
    if lost := [path for path in missing if not path.startswith(allowed)]:
      raise WeightsError(f"{self._said} lacks {listed(lost)}{self._way_out()}")
    if extra := [path for path in self.arrays if path not in self._shapes]:
      raise WeightsError(
        f"{self._said} has {listed(extra)}, which the model lacks{self._way_out()}"
      )
    wrong = [path for path, x in self.arrays.items() if x.shape != self._shapes[path]]
    if wrong:
      raise WeightsError(self._mismatch(wrong))
    if new := [path for path in missing if not path.startswith(_HEAD)]:
      self._say(f"new, as the weights lack them: {listed(new)}")
    flat: dict[str, Any] = {k: jnp.asarray(x, jnp.float32) for k, x in self.arrays.items()}
    if missing:

      @jax.jit  # computes no other array
      def init() -> dict[str, jax.Array]:
        images = jnp.zeros(self._images.shape, jnp.float32)
        params = self._model.init(jax.random.key(seed), images)["params"]
        return {path: x for path, x in flatten_dict(params, sep="/").items() if path in missing}

      flat |= init()
    return flat

  def _mismatch(self, wrong: Sequence[str]) -> str:
    lines = [
      f"{path} {shape_words(self.arrays[path].shape)}, the model {shape_words(self._shapes[path])}"
      for path in wrong
    ]
    text = f"{self._said} has {'; '.join(lines[:3])}"
    if len(lines) > 3:
      text += f"; and {len(lines) - 3} more of other shapes"
    if any(part in path for path in wrong for part in _OVER_TOKENS):
      text += ". Weights over tokens fit one number of patches only: "
      return text + "image_size {image_size} with patch_size {patch_size}".format(**self._fields)
    return text + self._way_out()

  def _way_out(self) -> str:
    """Where the model was asked to differ from the weights' own, in the words of its fields."""
    fields = [name for name in self._fields if not name.endswith(_FREE) and name not in _FREE]
    asked = [x for x in fields if getattr(self._model, x, self._fields[x]) != self._fields[x]]
    own = ", ".join(f"{name}={self._fields[name]!r}" for name in asked)
    return f". It fits {own}" if own else ""


def _image_shape(
  arrays: Mapping[str, np.ndarray], size: layers.ImageSize, patch_size: int | None
) -> tuple[int, int, int, int]:
  """Of one image: the patch embedding knows the number of channels."""
  channels = 3
  if patch_size and "patch_embed/kernel" in arrays:
    channels = arrays["patch_embed/kernel"].shape[0] // patch_size**2
  return 1, *layers.grid(size), channels
