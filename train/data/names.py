"""Names of datasets that are wrong, or nearly right, and what to say about them."""

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

FOLDER = "folder:"  # before the path of an image folder


def problem(name: str, ours: Mapping[str, Any], on_disk: bool) -> str:
  """One line about a `config.data.name` that TFDS does not know; "" if it does.

  Args:
    name: NAME[/CONFIG][:VERSION].
    ours: builders of this project, by name.
    on_disk: there is a folder of this name, which may hold a dataset of the user's own.
  """
  import tensorflow_datasets as tfds  # late: slow to import

  said = f"--config.data.name={name}"
  if name.startswith(("/", "~", ".")) or os.path.isdir(os.path.expanduser(name)):
    return f"{said} is a path: an image folder is {FOLDER}{name}."
  dataset, _, rest = name.partition("/")
  dataset, _, version = dataset.partition(":")
  config, _, config_version = rest.partition(":")
  known = sorted({*tfds.list_builders(with_community_datasets=False), *ours})
  if dataset not in known:
    if on_disk:
      return ""
    near = _near(dataset, known)
    text = f" Near names: {', '.join(near)}." if near else ""
    text += f" An image folder is {FOLDER}PATH." if "/" in name else ""
    return f"{said} is no dataset that TFDS knows.{text}"
  builder = ours.get(dataset) or tfds.builder_cls(dataset)
  if rest and config not in builder.builder_configs:
    configs = list(builder.builder_configs)
    listed = ", ".join((_near(config, configs) or configs)[:10]) or "none"
    return f"{said}: {dataset} has no config {config!r}; it has {len(configs)}: {listed}."
  versions = [str(each) for each in (builder.VERSION, *builder.SUPPORTED_VERSIONS) if each]
  version = version or config_version
  if version and version not in versions and "*" not in version:
    return f"{said}: {dataset} has no version {version}; TFDS knows {', '.join(versions)}."
  return ""


def _near(name: str, known: Sequence[str]) -> list[str]:
  """Names that begin alike, and those that differ in few letters; at most four of either."""
  plain = {_plain(each): each for each in known}
  wanted = _plain(name)
  longer = sorted(each for each in plain if wanted and each.startswith(wanted))[:4]
  close = difflib.get_close_matches(wanted, plain, 4, cutoff=0.7)
  return [plain[each] for each in dict.fromkeys([*longer, *close])]


def _plain(name: str) -> str:
  return "".join(letter for letter in name.lower() if letter.isalnum())
