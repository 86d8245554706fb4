"""Position embeddings for another grid of patches."""

import jax
import numpy as np


def resample(
  embedding_TxD: np.ndarray, old: tuple[int, int], new: tuple[int, int], class_tokens: int
) -> np.ndarray:
  """Resamples learned position embeddings, bicubic and antialiased, as timm does.

  Args:
    embedding_TxD: [class_tokens + H * W, D], row by row of the old grid.
    old, new: the grids, (H, W) in patches; neither needs to be square.
    class_tokens: rows before the grid's, which stay as they are.
  Returns:
    float32 [class_tokens + H * W, D] of the new grid.
  Raises:
    ValueError: the rows are not as many as the class tokens and the old grid need.
  """
  rows, width = embedding_TxD.shape
  if rows != class_tokens + old[0] * old[1]:
    raise ValueError(f"{rows} position embeddings are not {class_tokens} + {old[0]} x {old[1]}")
  grid = np.asarray(embedding_TxD[class_tokens:], np.float32).reshape(*old, width)
  resized = jax.image.resize(grid, (*new, width), "cubic", antialias=True)
  kept = np.asarray(embedding_TxD[:class_tokens], np.float32)
  return np.concatenate([kept, np.asarray(resized).reshape(-1, width)])
