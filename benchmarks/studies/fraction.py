"""Figure 7 of the papers: plain SGD in which only a random fraction of units learns.

One ordinary output layer, which always learns; each unit below it learns with
probability p, else keeps its initial weights.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks import pictures
from benchmarks.methods import FRACTION
from benchmarks.records import Run
from benchmarks.studies._study import (
  LOSSES,
  Arm,
  ImageRunner,
  Images,
  Source,
  Study,
  final_accuracy,
)
from benchmarks.tables import markdown, spread

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
Runs = dict[tuple[float, float], list[Run]]  # by width and fraction


@dataclasses.dataclass(frozen=True)
class FractionStudy(Study[Runs]):
  """Loss and accuracy against the fraction p of the units that learn."""

  name = "fraction"
  images: Annotated[Images, tyro.conf.arg(name="")] = Images(num_train=10_000, epochs=5)
  seeds: int = 3
  """Number of runs of each."""
  rate: float = 0.1
  """Learning rate of what learns."""
  fractions: tuple[float, ...] = FRACTIONS
  """Values of p."""
  widths: tuple[float, ...] = (1.0, 3.0)
  """Factors on the channels of the network."""
  network: str = "small_cnn"
  """Network of benchmarks/models."""
  out: Path = Path("out/studies/fraction")
  """Folder for records, numbers and picture."""

  def find(self, source: Source) -> Runs:
    """Returns runs by width and fraction.

    Args:
      source: Where all runs come from.
    """
    runner = ImageRunner(source, self.images)
    found: Runs = {}
    for width in self.widths:
      for p in self.fractions:
        name, compiled = f"p{p:g}-x{width:g}", f"fraction-{self.rate:g}"
        size = {"network": self.network, "width": width}
        arm = Arm(name, FRACTION, compiled, (self.rate, p), **size)
        found[width, p] = runner.run([arm], range(self.seeds))
    return found

  def table(self, found: Runs) -> list[str]:
    """Returns accuracies by fraction and width.

    Args:
      found: The runs.
    """
    header = ["fraction p", *(f"width {width:g}" for width in self.widths)]
    rows = []
    for p in self.fractions:
      scores = [[final_accuracy(run) for run in found[w, p]] for w in self.widths]
      rows.append([f"{p:g}", *(spread(values, 1, 100) for values in scores)])
    text = "Held-out accuracy after the last epoch, %:"
    return [text, "", *markdown(header, rows)]

  def draw(self, found: Runs, path: Path) -> None:
    """Draws losses by fraction.

    Args:
      found: The runs.
      path: The PNG file.
    """
    figure, axes = pictures.subplots(2)
    for axis, (name, title) in zip(axes, LOSSES.items(), strict=True):
      for width in self.widths:
        losses = np.array(
          [[run.curve(name)[-1] for run in found[width, p]] for p in self.fractions]
        )
        axis.errorbar(
          self.fractions,
          losses.mean(axis=1),
          losses.std(axis=1, ddof=1),
          marker="o",
          capsize=3,
          label=f"width {width:g}",
        )
      axis.set(
        xlabel="fraction p of the units that learn",
        ylabel="loss",
        title=title,
        ylim=(0, None),
      )
      axis.legend()
    pictures.save(figure, path)


STUDY = FractionStudy
