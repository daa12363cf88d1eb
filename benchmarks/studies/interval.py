"""Figure 3 of both papers: which intervals work, and SGD at one rate beside them.

The papers claim that Alrao works as soon as its interval holds one suitable rate,
though SGD fails at the interval's upper end.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from matplotlib.patches import Rectangle

from benchmarks import pictures
from benchmarks.methods import ALRAO_INTERVAL, SGD
from benchmarks.records import Run
from benchmarks.studies._study import (
  LOSSES,
  Arm,
  ImageRunner,
  Images,
  Source,
  Study,
  final_accuracy,
  final_losses,
  threshold,
)
from benchmarks.tables import markdown

DECADES = tuple(range(-9, 8, 2))
WIDTHS = (1 / 2, 1.0, 2.0, 4.0, 8.0)
BASE_WIDTH = 1 / 4  # of the small CNN: 4, 8 and 16 channels
WIDE = (1e-12, 1e4)

ByInterval = dict[tuple[float, float], list[Run]]


class IntervalRuns(NamedTuple):
  """What table and picture show.

  Attributes:
    grid: Runs by interval; SGD's is a single rate twice.
    widths: Runs by label, then width.
  """

  grid: ByInterval
  widths: dict[str, dict[float, list[Run]]]


@dataclasses.dataclass(frozen=True)
class IntervalStudy(Study[IntervalRuns]):
  """Train and held-out loss over the grid of intervals, and over the width."""

  name = "interval"
  images: Annotated[Images, tyro.conf.arg(name="")] = Images()
  seeds: int = 3
  """Number of runs of each interval."""
  decades: tuple[int, ...] = DECADES
  """Exponents of the bounds."""
  widths: tuple[float, ...] = WIDTHS
  """Factors on the channels (4, 8, 16)."""
  out: Path = Path("out/studies/interval")
  """Folder for records, numbers and picture."""

  def find(self, source: Source) -> IntervalRuns:
    """Returns the runs.

    Args:
      source: Where all runs come from.
    """
    runner, seeds = ImageRunner(source, self.images), range(self.seeds)
    grid: ByInterval = {}
    for low, high in itertools.combinations(self.decades, 2):
      interval = (10.0**low, 10.0**high)
      arm = Arm(f"alrao-{low}-{high}", ALRAO_INTERVAL, "alrao", interval)
      grid[interval] = runner.run([arm], seeds)
    for decade in self.decades:
      rate = 10.0**decade
      grid[rate, rate] = runner.run([Arm(f"sgd-{decade}", SGD, "sgd", rate)], seeds)
    widths: dict[str, dict[float, list[Run]]] = {}
    for width in self.widths:
      for label, arm in _arms_of_width(width).items():
        widths.setdefault(label, {})[width] = runner.run([arm], seeds)
    return IntervalRuns(grid, widths)

  def table(self, found: IntervalRuns) -> list[str]:
    """Returns the papers' claim in numbers, and accuracies by width.

    Args:
      found: The runs.
    """
    rows = [
      [
        label,
        *(_percent([final_accuracy(run) for run in runs]) for runs in row.values()),
      ]
      for label, row in found.widths.items()
    ]
    return [
      *claim(found.grid),
      "",
      "Held-out accuracy, %, by factor on the channels (4, 8, 16):",
      "",
      *markdown(["", *(f"x{width:g}" for width in self.widths)], rows),
    ]

  def draw(self, found: IntervalRuns, path: Path) -> None:
    """Draws losses over the grid of intervals.

    Args:
      found: The runs.
      path: The PNG file.
    """
    bounds = [10.0**decade for decade in self.decades]
    ticks = [f"$10^{{{decade}}}$" for decade in self.decades]
    count = len(bounds)
    figure, axes = pictures.subplots(2, 5.2, 4.6)
    for axis, (part, title) in zip(axes, enumerate(LOSSES.values()), strict=True):
      grid = np.full((count, count), np.nan)
      for i, j in itertools.combinations_with_replacement(range(count), 2):
        grid[j, i] = mean_losses(found.grid[bounds[i], bounds[j]])[part]
      colours = pictures.colormap("viridis_r").with_extremes(bad="0.75")
      masked = np.ma.masked_invalid(np.where(grid > 5, np.nan, grid))
      image = axis.imshow(masked, origin="lower", cmap=colours)
      for i in range(count):
        for j in range(i):  # no interval has its bounds the wrong way round
          axis.add_patch(Rectangle((i - 0.5, j - 0.5), 1, 1, color="white"))
      axis.set(
        xticks=range(count),
        yticks=range(count),
        xticklabels=ticks,
        yticklabels=ticks,
        xlabel=r"$\eta_{\min}$",
        ylabel=r"$\eta_{\max}$",
        title=f"{title} loss (diagonal: SGD; grey: over 5)",
      )
      figure.colorbar(image, ax=axis, shrink=0.8)
    pictures.save(figure, path)


def _arms_of_width(width: float) -> dict[str, Arm]:
  """Arms by label, of networks of one width."""
  size: dict[str, Any] = {"width": BASE_WIDTH * width}
  arms = {}
  for name, interval in (("wide", WIDE), ("default", (1e-5, 10.0))):
    arm = Arm(f"{name}-x{width:g}", ALRAO_INTERVAL, "alrao", interval, **size)
    arms[f"Alrao [{interval[0]:g}, {interval[1]:g}]"] = arm
  for rate in (1e-2, 1e-1, 1.0):
    arms[f"SGD {rate:g}"] = Arm(f"sgd-{rate:g}-x{width:g}", SGD, "sgd", rate, **size)
  return arms


def _percent(accuracies: list[float]) -> str:
  # Means are scaled, not accuracies, which round otherwise at a tie.
  mean, deviation = np.mean(accuracies), np.std(accuracies, ddof=1)
  return f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def mean_losses(runs: list[Run]) -> list[float]:
  """Returns mean train and held-out loss; nan where a run failed.

  Args:
    runs: The runs.
  """
  return np.mean([final_losses(run) for run in runs], axis=0).tolist()


def claim(runs: ByInterval) -> list[str]:
  """Returns the papers' claim in numbers: runs that learn, by their interval.

  Args:
    runs: By interval.
  """
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
  rows = [
    ["holds a suitable rate", f"{counts[1, 0]} of {counts[1, 1]}"],
    ["... and SGD fails at its upper end", f"{despite[0]} of {despite[1]}"],
    ["holds none", f"{counts[0, 0]} of {counts[0, 1]}"],
  ]
  return [
    f"A run has learned above {least:.1%} held-out accuracy: chance plus half of "
    f"what SGD at its best rate ({best:g}) reaches beyond it. Suitable rates, at which "
    f"SGD learns: {', '.join(f'{rate:g}' for rate in suitable)}.",
    "",
    *markdown(["interval", "runs of Alrao that learn"], rows),
  ]


STUDY = IntervalStudy
