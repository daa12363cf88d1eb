"""Figure 6 of the papers: rates by unit against rates by weight, on an LSTM.

Reference: Blier, Wolinski, Ollivier, arXiv 1810.01322, appendix E.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from benchmarks.planning import OptionError
from benchmarks.progress import Display
from benchmarks.results import RunRecords
from benchmarks.studies import optimizers, pictures
from benchmarks.studies.arms import by_arm
from benchmarks.studies.runner import Arm
from benchmarks.studies.study import Study
from benchmarks.studies.texts import Texts, TextTrainer

GRANULARITIES: dict[Literal["per_unit", "per_weight"], str] = {
  "per_unit": "a rate for each unit",
  "per_weight": "a rate for each weight",
}
PARTS = {"train": "train", "validation": "held-out"}


@dataclasses.dataclass(frozen=True)
class Granularity(Study):
  """Loss against the upper bound of the interval, with rates by unit and by weight."""

  texts: Annotated[Texts, tyro.conf.arg(name="")] = Texts()
  seeds: int = 3
  """Number of runs of each."""
  min_learning_rate: float = 1e-3
  """Lower bound of all intervals; the papers' for this text."""
  max_learning_rates: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0)
  """Upper bounds."""
  num_heads: int = 6
  """Number of heads; the papers' for this text."""
  out: Path = Path("out/studies/granularity")
  """Folder for records, numbers and picture."""

  @property
  def trained_on(self) -> str:
    """What the runs train on."""
    return self.texts.describe()

  @property
  def spread(self) -> str:
    """How many runs there are, and how they are summed up."""
    return f"{self.seeds} seeds; ± is the standard deviation over them."

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers.

    Raises:
      OptionError: Bounds that make no interval, or no heads.
    """
    low = self.min_learning_rate
    if not all(0 < low <= high < np.inf for high in self.max_learning_rates):
      raise OptionError(
        "--max-learning-rates must be at least --min-learning-rate, a positive number, "
        f"got {self.max_learning_rates} and {low:g}."
      )
    if self.num_heads < 1:
      raise OptionError(f"--num-heads must be at least 1, got {self.num_heads}.")
    arms = [
      Arm(
        f"{granularity}-{low:g}-{high:g}",
        optimizers.upper(low, granularity),
        granularity,
        high,
        network="lstm",
        num_heads=self.num_heads,
      )
      for granularity in GRANULARITIES
      for high in self.max_learning_rates
    ]
    with Display() as display:
      trainer = TextTrainer(
        "granularity", self.texts, self.out, display, used=self.used
      )
      runs = by_arm(trainer.run(arms, range(self.seeds)))
    losses = {
      (arm.compiled, arm.rate, part): _last_bits(runs[arm.name], part)
      for arm in arms
      for part in PARTS
    }
    self._draw(losses)
    return self._table(losses)

  def _table(self, losses: dict[tuple, np.ndarray]) -> list[str]:
    title = (
      f"Bits a character after the last epoch, interval [{self.min_learning_rate:g}, "
    )
    header = " | ".join(
      f"{label}, {part}" for label in GRANULARITIES.values() for part in PARTS.values()
    )
    lines = [
      f"{title}η max] (a run whose loss is not finite leaves no mean; train: mean over "
      "the epoch, with dropout):",
      "",
      f"| η max | {header} |",
      "|" + " --- |" * (1 + len(GRANULARITIES) * len(PARTS)),
    ]
    for high in self.max_learning_rates:
      cells = []
      for granularity in GRANULARITIES:
        for part in PARTS:
          values = losses[granularity, high, part]
          cell = f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
          cells.append(cell if np.isfinite(values).all() else "not finite")
      lines.append(f"| {high:g} | " + " | ".join(cells) + " |")
    return lines

  def _draw(self, losses: dict[tuple, np.ndarray]) -> None:
    figure, axes = pictures.subplots(len(PARTS))
    for axis, (part, title) in zip(axes, PARTS.items(), strict=True):
      for granularity, label in GRANULARITIES.items():
        values = np.array(
          [losses[granularity, high, part] for high in self.max_learning_rates]
        )
        axis.errorbar(
          self.max_learning_rates,
          values.mean(axis=1),
          values.std(axis=1, ddof=1),
          marker="o",
          capsize=3,
          label=label,
        )
      axis.set(
        xscale="log",
        xlabel=r"$\eta_{\max}$",
        ylabel="bits a character",
        title=f"{title}, $\\eta_{{\\min}}$ = {self.min_learning_rate:g}",
      )
      axis.legend(fontsize=8)
    pictures.save(figure, self.out / "granularity.png")


def _last_bits(runs: list[RunRecords], part: str) -> np.ndarray:
  values = [run.epochs[-1][f"{part}_loss"] for run in runs]
  return np.array(values, float) / np.log(2)
