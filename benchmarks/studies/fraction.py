"""Figure 7 of the papers: plain SGD in which only a random fraction of units learns.

One ordinary output layer, which always learns; each unit below it learns with
probability p, else keeps its initial weights.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks.progress import Display
from benchmarks.results import RunRecords
from benchmarks.studies import optimizers, pictures
from benchmarks.studies.arms import Images, Trainer, final_accuracy
from benchmarks.studies.runner import Arm
from benchmarks.studies.study import Study

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


@dataclasses.dataclass(frozen=True)
class Fraction(Study):
  """Loss and accuracy against the fraction p of the units that learn."""

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

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers."""
    arms = [
      Arm(
        f"p{p:g}-x{width:g}",
        optimizers.FRACTION,
        f"fraction-{self.rate:g}",
        (self.rate, p),
        network=self.network,
        width=width,
      )
      for width in self.widths
      for p in self.fractions
    ]
    with Display() as display:
      trainer = Trainer("fraction", self.images, self.out, display, used=self.used)
      runs = trainer.run(arms, range(self.seeds))
    _draw(runs, self.widths, self.fractions, self.out / "fraction.png")
    return _table(runs, self.widths, self.fractions)


def _select(runs: list[RunRecords], width: float, p: float) -> list[RunRecords]:
  return [
    run for run in runs if run.config["width"] == width and run.config["rate"][1] == p
  ]


def _table(runs, widths, fractions) -> list[str]:
  lines = [
    "Held-out accuracy after the last epoch, %:",
    "",
    "| fraction p | " + " | ".join(f"width {width:g}" for width in widths) + " |",
    "|" + " --- |" * (len(widths) + 1),
  ]
  for p in fractions:
    cells = []
    for width in widths:
      scores = [100 * final_accuracy(run) for run in _select(runs, width, p)]
      cells.append(f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}")
    lines.append(f"| {p:g} | " + " | ".join(cells) + " |")
  return lines


def _draw(runs, widths, fractions, path: Path) -> None:
  figure, axes = pictures.subplots(2)
  for axis, part in zip(axes, ("train", "validation"), strict=True):
    for width in widths:
      losses = np.array(
        [
          [run.epochs[-1][f"{part}_loss"] for run in _select(runs, width, p)]
          for p in fractions
        ],
        float,
      )
      axis.errorbar(
        fractions,
        losses.mean(axis=1),
        losses.std(axis=1, ddof=1),
        marker="o",
        capsize=3,
        label=f"width {width:g}",
      )
    axis.set(
      xlabel="fraction p of the units that learn",
      ylabel="loss",
      title={"train": "train", "validation": "held-out"}[part],
      ylim=(0, None),
    )
    axis.legend()
  pictures.save(figure, path)
