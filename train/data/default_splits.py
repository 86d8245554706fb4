"""Which images train, validate and test where the config does not say."""

from collections.abc import Collection

_VALIDATION = ("validation", "val", "valid", "dev")  # names of a validation split
KNOWN = ("train", "test", *_VALIDATION)
USUAL = {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"}
# TFDS's sets whose test split has no labels (-1).
_WITHOUT_TEST_LABELS = (
  "imagenet2012",
  "places365_small",
  "i_naturalist2017",
  "i_naturalist2018",
  "i_naturalist2021",
)
FEW = 10  # images, of which no tenth can be set aside


def choose(dataset: str, names: Collection[str], train_size: int) -> dict[str, str]:
  """Splits for "train", "validation" and "test", in TFDS's notation.

  Args:
    dataset: TFDS's name of it, without config and version; "" for a folder.
    names: of the splits that it has.
    train_size: images in its split `train`.
  """
  validation = next((name for name in _VALIDATION if name in names), None)
  if "train" not in names:  # it can only evaluate
    only = {"validation": validation, "test": "test" if "test" in names else validation}
    return {key: value for key, value in only.items() if value}
  if validation and "test" in names and dataset in _WITHOUT_TEST_LABELS:
    chosen = {"train": "train[:99%]", "validation": "train[99%:]", "test": validation}
  elif validation:
    chosen = {"train": "train", "validation": validation}
    chosen["test"] = "test" if "test" in names else validation
  elif "test" in names:
    chosen = USUAL
  else:
    chosen = {"train": "train[:80%]", "validation": "train[80%:90%]", "test": "train[90%:]"}
  if train_size < FEW:
    return {key: value.split("[")[0] for key, value in chosen.items()}
  return dict(chosen)


def explain(splits: dict[str, str], is_flat: bool) -> str:
  """Why splits are as they are, to be added to a line that says which ones; "": they say it.

  Args:
    splits: as `choose` returns them.
    is_flat: a folder's classes lie directly below it.
  """
  train, validation, test = (splits.get(key) for key in USUAL)
  if train == validation:
    return f": with fewer than {FEW} images, none can be set aside"
  if is_flat:
    return ": its classes lie directly below it, so a hash of CLASS/FILE splits them 80/10/10"
  if validation == test:
    return ": there is no test split, so the last figure is the validation split's, too"
  if train == "train[:80%]":
    return ": it has neither a validation nor a test split"
  if train == "train[:99%]":
    return ": the labels of its test split are not public"
  return ""


def names_in(instruction: str) -> list[str]:
  """Names of the splits in an instruction of TFDS, such as "train[:90%]+test"."""
  return [part.split("[")[0].strip() for part in instruction.split("+")]
