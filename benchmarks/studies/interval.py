"""Figure 3 of both papers: which intervals work, and SGD at one rate beside them.

The papers claim that Alrao works as soon as its interval holds one suitable rate,
though SGD fails at the interval's upper end.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated

import matplotlib.patches
import matplotlib.pyplot as plt
import numpy as np
import tyro

from benchmarks.progress import Display
from benchmarks.results import RunRecords
from benchmarks.studies import optimizers, pictures
from benchmarks.studies.arms import (
  Images,
  Trainer,
  final_accuracy,
  final_losses,
  threshold,
)
from benchmarks.studies.runner import Arm
from benchmarks.studies.study import Study

DECADES = tuple(range(-9, 8, 2))
WIDTHS = (1 / 2, 1.0, 2.0, 4.0, 8.0)
BASE_WIDTH = 1 / 4  # of the small CNN: 4, 8 and 16 channels
WIDE = (1e-12, 1e4)


@dataclasses.dataclass(frozen=True)
class Interval(Study):
  """Train and held-out loss over the grid of intervals, and over the width."""

  images: Annotated[Images, tyro.conf.arg(name="")] = Images()
  seeds: int = 3
  """Number of runs of each interval."""
  decades: tuple[int, ...] = DECADES
  """Exponents of the bounds."""
  widths: tuple[float, ...] = WIDTHS
  """Factors on the channels (4, 8, 16)."""
  out: Path = Path("out/studies/interval")
  """Folder for records, numbers and picture."""

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers."""
    seeds = range(self.seeds)
    with Display() as display:
      trainer = Trainer("interval", self.images, self.out, display, used=self.used)
      grid = trainer.run(self._grid(), seeds)
      wide = trainer.run(self._widths(), seeds)
    losses = {
      (low, high): _mean_losses(runs) for (low, high), runs in _by_rate(grid).items()
    }
    _draw(self.decades, losses, self.out / "interval.png")
    return [*_claim(_by_rate(grid)), "", *_width_table(wide)]

  def _grid(self) -> list[Arm]:
    pairs = itertools.combinations(self.decades, 2)
    alrao = [
      Arm(
        f"alrao-{low}-{high}",
        optimizers.ALRAO_INTERVAL,
        "alrao",
        (10.0**low, 10.0**high),
      )
      for low, high in pairs
    ]
    sgd = [Arm(f"sgd-{d}", optimizers.SGD, "sgd", 10.0**d) for d in self.decades]
    return alrao + sgd

  def _widths(self) -> list[Arm]:
    arms = []
    for width in self.widths:
      scaled = BASE_WIDTH * width
      for name, interval in (("wide", WIDE), ("default", (1e-5, 10.0))):
        optimizer = optimizers.ALRAO_INTERVAL
        arms.append(
          Arm(f"{name}-x{width:g}", optimizer, "alrao", interval, width=scaled)
        )
      for rate in (1e-2, 1e-1, 1.0):
        name = f"sgd-{rate:g}-x{width:g}"
        arms.append(Arm(name, optimizers.SGD, "sgd", rate, width=scaled))
    return arms


def _by_rate(runs: list[RunRecords]) -> dict[tuple[float, float], list[RunRecords]]:
  """Runs by interval; SGD's is a single rate twice."""
  found: dict[tuple[float, float], list[RunRecords]] = {}
  for run in runs:
    rate = run.config["rate"]
    low, high = rate if isinstance(rate, (list, tuple)) else (rate, rate)
    found.setdefault((low, high), []).append(run)
  return found


def _mean_losses(runs: list[RunRecords]) -> tuple[float, float]:
  """Mean train and held-out loss; nan where a run failed."""
  return tuple(np.mean([final_losses(run) for run in runs], axis=0).tolist())


def _claim(runs: dict[tuple[float, float], list[RunRecords]]) -> list[str]:
  """The papers' claim, in numbers: runs that learn, by what their interval holds."""
  accuracy = {
    interval: [final_accuracy(run) for run in found] for interval, found in runs.items()
  }
  of_sgd = {low: acc for (low, high), acc in accuracy.items() if low == high}
  best, least = threshold(of_sgd)
  sgd = {rate: np.mean(acc) for rate, acc in of_sgd.items()}
  suitable = [rate for rate in sgd if sgd[rate] > least]
  counts = np.zeros((2, 2), int)
  despite = np.zeros(2, int)
  for (low, high), found in accuracy.items():
    if low == high:
      continue
    holds = any(low <= rate <= high for rate in suitable)
    learned = sum(a > least for a in found)
    counts[int(holds)] += (learned, len(found))
    if holds and sgd[high] <= least:
      despite += (learned, len(found))
  return [
    f"A run has learned above {least:.1%} held-out accuracy: chance plus half of "
    f"what SGD at its best rate ({best:g}) reaches beyond it. Suitable rates, at which "
    f"SGD learns: {', '.join(f'{rate:g}' for rate in suitable)}.",
    "",
    "| interval | runs of Alrao that learn |",
    "| --- | --- |",
    f"| holds a suitable rate | {counts[1, 0]} of {counts[1, 1]} |",
    f"| ... and SGD fails at its upper end | {despite[0]} of {despite[1]} |",
    f"| holds none | {counts[0, 0]} of {counts[0, 1]} |",
  ]


def _width_table(runs: list[RunRecords]) -> list[str]:
  """Held-out accuracy by width."""
  arms: dict[tuple, list[float]] = {}
  for run in runs:
    rate, width = run.config["rate"], run.config["width"] / BASE_WIDTH
    label = (
      f"SGD {rate:g}"
      if isinstance(rate, float)
      else f"Alrao [{rate[0]:g}, {rate[1]:g}]"
    )
    arms.setdefault((label, width), []).append(final_accuracy(run))
  widths = sorted({width for _, width in arms})
  labels = list(dict.fromkeys(label for label, _ in arms))
  lines = [
    "Held-out accuracy, %, by factor on the channels (4, 8, 16):",
    "",
    "| | " + " | ".join(f"x{width:g}" for width in widths) + " |",
    "|" + " --- |" * (len(widths) + 1),
  ]
  for label in labels:
    cells = [
      f"{100 * np.mean(arms[label, width]):.1f} ± "
      f"{100 * np.std(arms[label, width], ddof=1):.1f}"
      for width in widths
    ]
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  return lines


def _draw(decades, losses, path: Path) -> None:
  figure, axes = pictures.subplots(2, 5.2, 4.6)
  for axis, part, title in zip(axes, (0, 1), ("train", "held-out"), strict=True):
    grid = np.full((len(decades), len(decades)), np.nan)
    for i, j in itertools.combinations_with_replacement(range(len(decades)), 2):
      grid[j, i] = losses[10.0 ** decades[i], 10.0 ** decades[j]][part]
    colours = plt.get_cmap("viridis_r").with_extremes(bad="0.75")
    masked = np.ma.masked_invalid(np.where(grid > 5, np.nan, grid))
    image = axis.imshow(masked, origin="lower", cmap=colours)
    for i in range(len(decades)):
      for j in range(i):  # no interval has its bounds the wrong way round
        box = matplotlib.patches.Rectangle((i - 0.5, j - 0.5), 1, 1, color="white")
        axis.add_patch(box)
    ticks = [f"$10^{{{d}}}$" for d in decades]
    axis.set(
      xticks=range(len(decades)),
      yticks=range(len(decades)),
      xticklabels=ticks,
      yticklabels=ticks,
      xlabel=r"$\eta_{\min}$",
      ylabel=r"$\eta_{\max}$",
      title=f"{title} loss (diagonal: SGD; grey: over 5)",
    )
    figure.colorbar(image, ax=axis, shrink=0.8)
  pictures.save(figure, path)
