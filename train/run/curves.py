"""Draws a run's curves."""

import io
import math
import os
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.errors import printable
from train.run.storage import write_atomically


def draw_curves(rows: list[dict[str, Any]], path: str | os.PathLike, title: str = "") -> None:
  """Draws loss, accuracies and learning rate over the epochs to a PNG.

  Args:
    rows: epochs, from `metrics.read`.
    path: of the PNG, replaced as a whole.
    title: above the panels.
  """
  column = {key: np.array([row[key] for row in rows], float) for key in rows[0]}  # None -> nan
  epochs = column["epoch"]
  figure = Figure(figsize=(12, 3.8), dpi=120, layout="constrained")
  FigureCanvasAgg(figure)
  loss, accuracy, learning_rate = figure.subplots(1, 3, width_ratios=(3, 3, 2))
  marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(rows) <= 30 else {}

  def plot(axes: Axes, key: str, label: str, **style) -> None:
    axes.plot(epochs, column[key], label=label, linewidth=1.8, **marker, **style)

  for split, name, color in (("train", "train", "tab:blue"), ("val", "validation", "tab:orange")):
    plot(loss, f"{split}_loss", name, color=color)
    column[f"{split}_top5"] *= 100
    column[f"{split}_accuracy"] *= 100
    plot(accuracy, f"{split}_top5", f"{name}, top-5", color=color)
    plot(accuracy, f"{split}_accuracy", f"{name}, top-1", color=color, linestyle="--")
  plot(learning_rate, "learning_rate", "", color="tab:green", drawstyle="steps-post")

  loss.set_title("Loss")
  accuracy.set_title("Accuracy (%)")
  accuracy.set_ylim(bottom=0)
  learning_rate.set_title("Learning rate")
  rates = np.unique(column["learning_rate"])
  if rates.size == 1:
    learning_rate.set_ylim(0, 2 * rates[0] or 1)
  elif rates[0]:
    learning_rate.set_yscale("log")
    learning_rate.minorticks_off()
  if rates.size == 1 or rates[0]:  # a schedule that ends at 0 has a linear axis
    ticks = rates[:: math.ceil(rates.size / 8)]
    learning_rate.set_yticks(ticks, [f"{rate:.1e}" for rate in ticks])
  for axes in (loss, accuracy):
    axes.legend(frameon=False, fontsize=9)
  for axes in (loss, accuracy, learning_rate):
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
  figure.suptitle(printable(title), fontweight="bold", parse_math=False)

  png = io.BytesIO()
  figure.savefig(png, format="png")
  write_atomically(epath.Path(path), png.getvalue())
