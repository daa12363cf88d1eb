"""How pictures look, and how they get to disk: whole or not at all."""

import os
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt


def subplots(columns: int, width: float = 5.0, height: float = 4.0) -> tuple[Any, Any]:
  """Returns a figure and its axes, side by side.

  Args:
    columns: Number of axes.
    width: Of each, in inches.
    height: In inches.
  """
  figure, axes = plt.subplots(
    1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False
  )
  return figure, axes[0]


def colormap(name: str) -> Any:
  """Returns a function from numbers in [0, 1] to colours.

  Args:
    name: Matplotlib's name of the colormap.
  """
  return plt.get_cmap(name)


def save(figure: Any, path: Path) -> None:
  """Writes a figure, and closes it.

  Args:
    figure: The figure.
    path: The PNG file; its folder is made if need be.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as aside:
    part = Path(aside) / path.name
    figure.savefig(part, dpi=120)
    os.replace(part, path)
  plt.close(figure)
