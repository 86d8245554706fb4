"""Perceiver IO's models for images as transformers keeps them."""

import numpy as np

from mlp_models.pretrained.rules import (
  Config,
  Fields,
  Layout,
  Rule,
  Shapes,
  conv_patches,
  count,
  image_size,
  linear,
  norm,
  same,
  transformers_gelu,
)

_INPUT = "perceiver.input_preprocessor"
_PIXEL_EMBED = f"{_INPUT}.convnet_1x1"
_CONV = f"{_INPUT}.convnet.conv.weight"
_BATCH_NORM = f"{_INPUT}.convnet.batchnorm"
_POSITIONS = f"{_INPUT}.position_embeddings.position_embeddings"
_LATENTS = "perceiver.embeddings.latents"
_CROSS = "perceiver.encoder.cross_attention"
_BLOCK = "perceiver.encoder.self_attends.{}"
_DECODER = "perceiver.decoder.decoder"
_QUERY = f"{_DECODER}.output_position_encodings.position_embeddings"
_HEAD = f"{_DECODER}.final_layer"

_BATCH_NORM_EPSILON = 1e-5
# What no shape tells: our field, and its value in the published models.
_PUBLISHED = {
  "num_blocks": ("num_iterations", 8),
  "num_self_attention_heads": ("num_heads", 8),
  "num_cross_attention_heads": ("num_cross_heads", 1),
}


def _fields(shapes: Shapes, config: Config) -> Fields:
  if not config.get("use_query_residual", True):
    raise ValueError("use_query_residual is False: the latents need their residual")
  told = {ours: config.get(key, usual) for key, (ours, usual) in _PUBLISHED.items()}
  num_latents, width = shapes[_LATENTS]
  block, cross = _BLOCK.format(0), f"{_CROSS}.attention.self"
  cross_qk_channels, token_width = shapes[f"{cross}.key.weight"]
  return (
    _preprocessing(shapes, config, token_width)
    | told
    | {
      "assumed": [ours for key, (ours, _) in _PUBLISHED.items() if key not in config],
      "num_latents": num_latents,
      "width": width,
      "num_blocks": count(shapes, _BLOCK + "."),
      "qk_channels": _unless(width, shapes[f"{block}.attention.self.query.weight"][0]),
      "widening": shapes[f"{block}.mlp.dense1.weight"][0] // width,
      "cross_qk_channels": _unless(token_width, cross_qk_channels),
      "cross_v_channels": _unless(cross_qk_channels, shapes[f"{cross}.value.weight"][0]),
      "cross_widening": shapes[f"{_CROSS}.mlp.dense1.weight"][0] // width,
      "num_classes": shapes.get(f"{_HEAD}.weight", (0,))[0],
      "gelu": transformers_gelu(config, "gelu"),
    }
  )


def _unless(usual: int, channels: int) -> int | None:
  """None if the channels are the model's usual ones."""
  return None if channels == usual else channels


def _preprocessing(shapes: Shapes, config: Config, token_width: int) -> Fields:
  """The fields of what makes tokens; token_width: their channels."""
  if f"{_PIXEL_EMBED}.weight" in shapes:
    num_tokens, channels = shapes[_POSITIONS]
    fields = {"variant": "io-learned", "preprocessing": "learned", "embed_channels": channels}
    return fields | {"image_size": image_size(num_tokens, _POSITIONS)}
  # The other two take any size. Published configs give transformers' default, 56, and mean 224.
  size = config.get("image_size", 56)
  if _CONV in shapes:
    channels = shapes[_CONV][0]
    fields = {"variant": "io-conv", "preprocessing": "conv", "embed_channels": channels}
  else:
    channels = 3
    fields = {"variant": "io-fourier", "preprocessing": "fourier"}
  num_bands = (token_width - channels - 2) // 4
  return fields | {"image_size": 224 if size == 56 else size, "num_bands": num_bands}


def _rules(fields: Fields, shapes: Shapes) -> list[Rule]:
  rules = [same(_LATENTS, "latents"), same(_QUERY, "query/embedding")]
  if fields["preprocessing"] == "learned":
    rules += conv_patches(_PIXEL_EMBED, "pixel_embed", patch_size=1)
    rules.append(same(_POSITIONS, "position/embedding"))
    rules += linear(f"{_INPUT}.positions_projection", "position_projection")
  elif fields["preprocessing"] == "conv":
    rules += _conv()
  rules += _block(_CROSS, "cross0")
  rules += norm(f"{_CROSS}.attention.self.layernorm2", "cross0/norm_data")
  for i in range(fields["num_blocks"]):
    rules += _block(_BLOCK.format(i), f"latent/block{i}")
  decoder = f"{_DECODER}.decoding_cross_attention"
  rules += _block(decoder, "decoder")
  rules += norm(f"{decoder}.attention.self.layernorm2", "decoder/norm_data")
  return rules + linear(_HEAD, "head")


def _block(theirs: str, ours: str) -> list[Rule]:
  rules = norm(f"{theirs}.attention.self.layernorm1", f"{ours}/norm1")
  for name in ("query", "key", "value"):
    rules += linear(f"{theirs}.attention.self.{name}", f"{ours}/attention/{name}")
  rules += linear(f"{theirs}.attention.output.dense", f"{ours}/attention/out")
  rules += norm(f"{theirs}.layernorm", f"{ours}/norm2")
  rules += linear(f"{theirs}.mlp.dense1", f"{ours}/mlp/dense0")
  return rules + linear(f"{theirs}.mlp.dense2", f"{ours}/mlp/dense1")


def _conv() -> list[Rule]:
  """The convolution, [D, C, 7, 7] to [7, 7, C, D], and its batch norm with fixed statistics.

  The statistics are folded into scale and bias.
  """
  weight, bias, mean, variance = (
    f"{_BATCH_NORM}.{name}" for name in ("weight", "bias", "running_mean", "running_var")
  )

  def deviation(variance: np.ndarray) -> np.ndarray:
    return np.sqrt(variance + np.float32(_BATCH_NORM_EPSILON))

  return [
    Rule(
      _CONV,
      ("conv_embed/conv/kernel",),
      lambda x: [x.transpose(2, 3, 1, 0)],
      lambda x: x[0].transpose(3, 2, 0, 1),
    ),
    Rule(
      weight,
      ("conv_embed/scale",),
      lambda x, variance: [x / deviation(variance)],
      lambda x: x[0],
      beside=(variance,),
    ),
    Rule(
      bias,
      ("conv_embed/bias",),
      lambda x, weight, mean, variance: [x - weight * mean / deviation(variance)],
      lambda x: x[0],
      beside=(weight, mean, variance),
    ),
  ]


LAYOUTS: tuple[Layout, ...] = (
  Layout(
    project="transformers",
    family="perceiver",
    marks=(_LATENTS, f"{_CROSS}.attention.self.key.weight", _QUERY),
    fields=_fields,
    rules=_rules,
    ignored=(rf"{_BATCH_NORM}\.(running_mean|running_var|num_batches_tracked)",),
  ),
)
