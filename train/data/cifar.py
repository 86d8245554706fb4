"""TFDS's CIFAR-10 and CIFAR-100, prepared without TensorFlow.

TFDS's own builders read files and encode PNGs with TensorFlow; these use Python and Pillow. They
keep TFDS's name, version, features, URL and checksum, so that TFDS reads the result as its own.
"""

import tarfile

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.image_classification import cifar

_PIXELS = 3 * 32 * 32  # bytes of an image: the red, green and blue planes


class _WithoutTensorFlow(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Reads the binary archive: each image's label bytes, then its pixels, plane by plane."""

  archive = ""  # path of the archive on disk; "": TFDS downloads it and verifies its checksum

  @property
  def url_infos(self) -> dict[str, checksums.UrlInfo]:
    """The archive's URL with its published size and sha256."""
    url = self._cifar_info.url
    return {url: checksums.get_all_url_infos()[url]}

  def _split_generators(self, dl_manager):
    layout = self._cifar_info
    archive = self.archive or dl_manager.download(layout.url)
    names = (*layout.train_files, *layout.test_files, *layout.label_files)
    with tarfile.open(archive, "r:gz") as tar:
      files = {name: _read(tar, layout.prefix + name) for name in names}
    for key, name in zip(layout.label_keys, layout.label_files, strict=True):
      self.info.features[key].names = files[name].decode().split()
    return {
      "train": self._generate_examples("train_", [files[name] for name in layout.train_files]),
      "test": self._generate_examples("test_", [files[name] for name in layout.test_files]),
    }

  def _generate_examples(self, prefix, contents):
    label_keys = self._cifar_info.label_keys
    records = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, len(label_keys) + _PIXELS)
    for index, record in enumerate(records):
      labels, pixels = np.split(record, [len(label_keys)])
      image = Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0).copy())
      yield (
        index,
        {
          "id": f"{prefix}{index:05d}",
          "image": image,  # TFDS has Pillow encode it as PNG
          **dict(zip(label_keys, labels.tolist(), strict=True)),
        },
      )


def _read(tar: tarfile.TarFile, name: str) -> bytes:
  file = tar.extractfile(name)
  if file is None:
    raise ValueError(f"{name} is no file")
  return file.read()


# Not registered: TFDS has its own classes of these names.
class Cifar10(_WithoutTensorFlow, cifar.Cifar10, skip_registration=True):
  """CIFAR-10: 50,000 + 10,000 images of 32x32 in 10 classes."""


class Cifar100(_WithoutTensorFlow, cifar.Cifar100, skip_registration=True):
  """CIFAR-100: 50,000 + 10,000 images of 32x32 in 100 classes."""
