"""gMLP of timm."""

import functools

from timm.layers import GatedMlp
from timm.models.mlp_mixer import MlpMixer, SpatialGatingBlock

from benchmarks.peers import Case, of_timm


def _small() -> Case:
  sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_blocks": 2, "num_classes": 5}
  model = MlpMixer(**sizes, mlp_ratio=3, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp)
  return of_timm("gmlp_s16_224", model)


CASES = {"timm_gmlp": _small}

FULL_CASES = {"gmlp_s16": functools.partial(of_timm, "gmlp_s16_224")}
