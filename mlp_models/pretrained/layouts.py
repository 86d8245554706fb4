"""Which project's names a file's arrays have."""

import re
from collections.abc import Iterable

from mlp_models.pretrained import fnet, gmlp, mixer, perceiver, vit, vit_npz
from mlp_models.pretrained.errors import WeightsError
from mlp_models.pretrained.rules import Layout, Rule
from mlp_models.pretrained.sources import Source

LAYOUTS: tuple[Layout, ...] = (
  *mixer.LAYOUTS,
  *gmlp.LAYOUTS,
  *fnet.LAYOUTS,
  *vit.LAYOUTS,
  *vit_npz.LAYOUTS,
  *perceiver.LAYOUTS,
)
_NAMED = 3  # arrays that a message names at most


def find_layout(source: Source) -> tuple[Layout, dict[str, str]]:
  """The layout of a file's arrays, and their full names by their names without a prefix.

  Raises:
    WeightsError: none of the layouts has such names.
  """
  for layout in LAYOUTS:
    full = {_without_prefix(name, layout.prefixes): name for name in source.shapes}
    if all(mark in full for mark in layout.marks):
      return layout, full
  if not source.shapes:
    raise WeightsError(f"{source.said} holds no array")
  families: dict[str, list[str]] = {}
  for layout in LAYOUTS:
    families.setdefault(layout.project, []).append(layout.family)
  known = ", ".join(f"{project} ({', '.join(of)})" for project, of in families.items())
  raise WeightsError(
    f"{source.said}: no known model has arrays named {listed(source.shapes)}; known are {known}"
  )


def require_all_used(layout: Layout, rules: list[Rule], full: dict[str, str], said: str) -> None:
  """Raises WeightsError if a file has arrays that no rule reads: their model is another one."""
  used = {rule.theirs for rule in rules}
  ignored = re.compile("|".join(layout.ignored) or "(?!)")
  unknown = [name for name in full if name not in used and not ignored.fullmatch(name)]
  if unknown:
    raise WeightsError(
      f"{said}: {layout.project}'s {layout.family} with {listed(unknown)} is not supported"
    )


def listed(names: Iterable[str]) -> str:
  """The first names, and how many more there are."""
  names = list(names)
  more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
  return ", ".join(names[:_NAMED]) + more


def _without_prefix(name: str, prefixes: tuple[str, ...]) -> str:
  for prefix in prefixes:
    if name.startswith(prefix):
      return name.removeprefix(prefix)
  return name
