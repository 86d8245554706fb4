"""Writes what timm and transformers compute for small models with random weights.

    pip install --constraint constraints.txt ".[peers]"
    python -m benchmarks.make_golden_peers [CASE ...]

makes tests/golden/peers/CASE/ as tests/golden/README.md describes it; without names, for all cases.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks import peers

FOLDER = Path(__file__).parents[1] / "tests" / "golden" / "peers"
BATCH_SIZE = 3
DEVIATION = 0.1  # of pixels: small enough for the norms' epsilons to show in the logits


def main() -> None:
  cases = peers.cases("CASES")
  for name in sys.argv[1:] or cases:
    if name not in cases:
      sys.exit(f"unknown case {name!r}, known are {', '.join(cases)}")
    write(FOLDER / name, cases[name]())


def write(folder: Path, case: peers.Case) -> None:
  """Writes config.json, model.safetensors and expected.npz."""
  generator = torch.Generator().manual_seed(1)
  shape = (BATCH_SIZE, 3, *np.broadcast_to(case.image_size, 2).tolist())
  images = DEVIATION * torch.randn(shape, generator=generator)
  logits = case.logits(images)
  cotangent = torch.randn(logits.shape, generator=generator)
  (logits * cotangent).sum().backward()

  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(case.config, indent=2) + "\n")
  arrays = {name: array.contiguous() for name, array in case.model.state_dict().items()}
  save_file(arrays, folder / "model.safetensors", {"format": "pt"})
  gradients = {
    f"grad/{name}": parameter.grad.numpy()
    for name, parameter in case.model.named_parameters()
    if parameter.grad is not None
  }
  np.savez_compressed(
    folder / "expected.npz",
    images=images.permute(0, 2, 3, 1).numpy(),
    logits=logits.detach().numpy(),
    cotangent=cotangent.numpy(),
    **gradients,
  )
  size = sum(path.stat().st_size for path in folder.iterdir())
  print(f"{folder.name}: logits of about {logits.std():.2f}, {size / 1e3:.0f} kB")


if __name__ == "__main__":
  main()
