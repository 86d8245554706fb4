"""FNet of transformers, which reads text: its encoder is compared, on embeddings."""

import torch
from transformers import FNetConfig, FNetModel

from benchmarks.peers import Case, randomized


class FNetOnEmbeddings(FNetModel):
  """The encoder's output [B, T, D] for embeddings that are an image's pixels, channels last."""

  def forward(self, images_BxCxHxW: torch.Tensor) -> torch.Tensor:
    pixels_BxHxWxC = images_BxCxHxW.permute(0, 2, 3, 1)
    embeddings_BxTxD = pixels_BxHxWxC.reshape(len(pixels_BxHxWxC), -1, self.config.hidden_size)
    return self.encoder(embeddings_BxTxD).last_hidden_state


def _small() -> Case:
  config = FNetConfig(
    vocab_size=5,
    hidden_size=24,
    num_hidden_layers=2,
    intermediate_size=96,
    max_position_embeddings=32,
    layer_norm_eps=1e-3,  # the published 1e-12 would not show in what comes out
  )
  return Case(randomized(FNetOnEmbeddings(config)), config.to_diff_dict(), image_size=16)


CASES = {"transformers_fnet": _small}

FULL_CASES = {}
