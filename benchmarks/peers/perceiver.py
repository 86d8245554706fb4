"""Perceiver IO's models for images in transformers.

transformers fixes some sizes that would make golden files large, such as 512 channels of a token.
The small models are put together from its parts, with the names of its own models.
"""

from typing import Any

import torch
from transformers import (
  PerceiverConfig,
  PerceiverForImageClassificationConvProcessing,
  PerceiverForImageClassificationFourier,
  PerceiverForImageClassificationLearned,
  PerceiverModel,
)
from transformers.models.perceiver.modeling_perceiver import (
  PerceiverClassificationDecoder,
  PerceiverImagePreprocessor,
)

from benchmarks.peers import Case, randomized

_CLASSES = {
  "learned": PerceiverForImageClassificationLearned,
  "fourier": PerceiverForImageClassificationFourier,
  "conv": PerceiverForImageClassificationConvProcessing,
}
# As in the published models, but with eight channels and three bands in the place of 256 and 64.
_SMALL_PREPROCESSORS: dict[str, dict[str, Any]] = {
  "learned": {
    "prep_type": "conv1x1",
    "out_channels": 8,
    "position_encoding_type": "trainable",
    "project_pos_dim": 8,
    "trainable_position_encoding_kwargs": {"num_channels": 8, "index_dims": 8**2},
  },
  "fourier": {
    "prep_type": "pixels",
    "fourier_position_encoding_kwargs": {"num_bands": 3, "max_resolution": (224, 224)},
  },
  "conv": {
    "prep_type": "conv",
    "out_channels": 8,
    "fourier_position_encoding_kwargs": {"num_bands": 3, "max_resolution": (56, 56)},
  },
}


class _Small(torch.nn.Module):
  """A classifier with a small preprocessor."""

  def __init__(self, config: PerceiverConfig, preprocessor: dict[str, Any]):
    super().__init__()
    self.perceiver = PerceiverModel(
      config,
      input_preprocessor=PerceiverImagePreprocessor(
        config, spatial_downsample=1, concat_or_add_pos="concat", **preprocessor
      ),
      decoder=PerceiverClassificationDecoder(
        config,
        num_channels=config.d_latents,
        trainable_position_encoding_kwargs={"num_channels": config.d_latents, "index_dims": 1},
        use_query_residual=True,
      ),
    )

  def forward(self, images: torch.Tensor) -> Any:
    return self.perceiver(inputs=images)


def _small(kind: str) -> Case:
  # Heads, repeats and widths that are not those of the published models.
  config = PerceiverConfig(
    image_size={"learned": 8, "fourier": 12, "conv": 32}[kind],
    num_latents=6,
    d_latents=16,
    num_blocks=3,
    num_self_attends_per_block=2,
    num_self_attention_heads=4,
    num_cross_attention_heads=1,
    self_attention_widening_factor=2,
    num_labels=5,
  )
  return _case(kind, _Small(config, _SMALL_PREPROCESSORS[kind]), config)


def _published(kind: str) -> Case:
  config = PerceiverConfig(
    image_size=224,
    num_latents=512,
    d_latents=1024,
    num_blocks=8,
    num_self_attends_per_block=6,
    num_self_attention_heads=8,
    num_cross_attention_heads=1,
    num_labels=1000,
  )
  return _case(kind, _CLASSES[kind](config), config)


def _case(kind: str, model: torch.nn.Module, config: PerceiverConfig) -> Case:
  randomized(model)
  for part in model.modules():
    if isinstance(part, torch.nn.BatchNorm2d):
      # Statistics that change nothing, so that the gradients of its weights are those of ours.
      part.running_mean.zero_()
      part.running_var.fill_(1 - part.eps)
      part.weight.data += 1
  said = config.to_dict() | {"architectures": [_CLASSES[kind].__name__]}
  return Case(model, said, config.image_size)


CASES = {
  "transformers_perceiver_learned": lambda: _small("learned"),
  "transformers_perceiver_fourier": lambda: _small("fourier"),
  "transformers_perceiver_conv": lambda: _small("conv"),
}
FULL_CASES = {
  "PerceiverForImageClassificationLearned": lambda: _published("learned"),
  "PerceiverForImageClassificationFourier": lambda: _published("fourier"),
  "PerceiverForImageClassificationConvProcessing": lambda: _published("conv"),
}
