"""MLP-Mixer of timm."""

import functools

from timm.models.mlp_mixer import MlpMixer

from benchmarks.peers import Case, of_timm


def _small() -> Case:
  sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "num_blocks": 2, "num_classes": 5}
  return of_timm("mixer_b16_224", MlpMixer(**sizes, mlp_ratio=(0.5, 2.0)))


CASES = {"timm_mixer": _small}

FULL_CASES = {
  name: functools.partial(of_timm, f"{name}_224") for name in ("mixer_s16", "mixer_b16")
}
