"""How often training works: draws of rates and weights, beside Adam's.

The papers report that not a single run of Alrao failed. Here a run learns if its
held-out accuracy after the last epoch is above chance by more than half of what the
best rate of plain SGD reaches above it, which is fixed before the draws are looked at.
"""

import dataclasses
import datetime
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks import records
from benchmarks.optimizers import OPTIMIZERS, SGD_RATES
from benchmarks.planning import refuse
from benchmarks.progress import Display
from benchmarks.results import RunRecords
from benchmarks.studies import optimizers, pictures
from benchmarks.studies.arms import (
  CHANCE,
  Images,
  Trainer,
  final_accuracy,
  share,
  threshold,
)
from benchmarks.studies.programs import Draws
from benchmarks.studies.runner import Arm
from benchmarks.studies.study import Study

METHODS = {"Alrao": ("alrao", optimizers.ALRAO), "Adam": ("adam", OPTIMIZERS["adam"])}


@dataclasses.dataclass(frozen=True)
class Seeds(Study):
  """The share of runs that learn, over many draws, of Alrao and of Adam."""

  images: Annotated[Images, tyro.conf.arg(name="")] = Images()
  seeds: int = 3
  """Number of runs of each rate of SGD."""
  mlp_draws: int = 300
  """Number of runs of the MLP, of each method."""
  block: int = 50
  """Number of them that train side by side; divides --mlp-draws."""
  cnn_draws: int = 30
  """Number of runs of the CNN, of each method."""
  mlp_width: float = 1 / 4
  """Factor on the MLP's two layers of 512 units."""
  cnn_width: float = 1.0
  """Factor on the CNN's 16, 32 and 64 channels."""
  out: Path = Path("out/studies/seeds")
  """Folder for records, numbers and picture."""

  @property
  def spread(self) -> str:
    """How many runs there are, and how they are summed up."""
    return f"{self.seeds} seeds of each rate of SGD. Runs that failed are at chance."

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers.

    Raises:
      OptionError: Draws that make no whole blocks, or no draws.
    """
    for name in ("mlp_draws", "block", "cnn_draws"):
      if getattr(self, name) < 1:
        refuse(name, "must be at least 1", getattr(self, name))
    if self.mlp_draws % self.block:
      refuse("block", f"must divide --mlp-draws ({self.mlp_draws})", self.block)
    with Display() as display:
      trainer = Trainer("seeds", self.images, self.out, display, 1, used=self.used)
      found = {
        f"MLP, width {self.mlp_width:g}": self._mlp(trainer, display),
        f"CNN, width {self.cnn_width:g}": self._cnn(trainer),
      }
    _draw(found, self.out / "seeds.png")
    return _table(found)

  def _mlp(self, trainer: Trainer, display: Display) -> "_Found":
    size = {"network": "mlp", "width": self.mlp_width}
    sgd = _sgd(trainer, size, range(self.seeds))
    accuracies = {}
    for label, (name, optimizer) in METHODS.items():
      name = f"{name}-mlp-{self.block}draws"
      arm = Arm(name, optimizer, name, **size, program=Draws)
      blocks = range(self.mlp_draws // self.block)
      accuracies[label] = [
        accuracy
        for block in blocks
        for accuracy in self._train_block(trainer, arm, block, display)
      ]
    return _Found(*threshold(sgd), accuracies)

  def _train_block(
    self, trainer: Trainer, arm: Arm, block: int, display: Display
  ) -> list[float]:
    """The accuracies of a block of draws, trained if that was not done before."""
    plan = trainer.plan(arm, block)
    if records.read_summary(plan.path) is None:

      def say(epoch: int, loss: float) -> None:
        display.say(f"{plan.name}  epoch {epoch}  mean train loss {loss:.4f}")

      start = time.perf_counter()
      seeds = range(block * self.block, (block + 1) * self.block)
      accuracies = trainer.program(arm).accuracies(seeds, self.images.epochs, say)
      summary = {
        "kind": "summary",
        "name": plan.name,
        "config": plan.config,
        "accuracies": accuracies,
        "seconds": time.perf_counter() - start,
        "date": datetime.date.today().isoformat(),
        "environment": records.environment(),
      }
      records.write(plan.path, [summary])
    (summary,) = records.read(plan.path)
    self.used.append(summary)
    return [CHANCE if found is None else found for found in summary["accuracies"]]

  def _cnn(self, trainer: Trainer) -> "_Found":
    size = {"network": "small_cnn", "width": self.cnn_width}
    sgd = _sgd(trainer, size, range(self.seeds))
    accuracies = {}
    for label, (name, optimizer) in METHODS.items():
      arm = Arm(f"{name}-cnn", optimizer, name, **size)
      runs = trainer.run([arm], range(self.cnn_draws))
      accuracies[label] = [final_accuracy(run) for run in runs]
    return _Found(*threshold(sgd), accuracies)


@dataclasses.dataclass(frozen=True)
class _Found:
  """What was found of one network.

  Attributes:
    rate: The best rate of SGD.
    threshold: The accuracy above which a run has learned.
    accuracies: Of all runs, by method.
  """

  rate: float
  threshold: float
  accuracies: dict[str, list[float]]


def _sgd(trainer: Trainer, size: dict, seeds: range) -> dict[float, list[float]]:
  """SGD's accuracies by rate."""
  found = {}
  for rate in SGD_RATES:
    name = f"sgd-{size['network']}-{rate:g}"
    runs: Iterable[RunRecords] = trainer.run(
      [Arm(name, optimizers.SGD, "sgd", rate, **size)], seeds
    )
    found[rate] = [final_accuracy(run) for run in runs]
  return found


def _table(found: dict[str, _Found]) -> list[str]:
  lines = ["A run learns if its last held-out accuracy is above"]
  for network, one in found.items():
    lines.append(
      f"- {network}: {100 * one.threshold:.1f} %, half-way from chance to the mean of "
      f"SGD's best rate, {one.rate:g}."
    )
  lines += [
    "",
    "Shares with exact (Clopper-Pearson) 95 % intervals; accuracy in %.",
    "",
    "| network | method | runs that learn | least accuracy | median | largest |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for network, one in found.items():
    for method, accuracies in one.accuracies.items():
      values = 100 * np.array(accuracies)
      learned = share([accuracy > one.threshold for accuracy in accuracies])
      cells = [f"{q:.1f}" for q in (values.min(), np.median(values), values.max())]
      lines.append(f"| {network} | {method} | {learned} | " + " | ".join(cells) + " |")
  return lines


def _draw(found: dict[str, _Found], path: Path) -> None:
  figure, axes = pictures.subplots(len(found))
  for axis, (network, one) in zip(axes, found.items(), strict=True):
    for method, accuracies in one.accuracies.items():
      axis.ecdf(100 * np.array(accuracies), label=method)
    axis.axvline(
      100 * one.threshold, color="0.5", linestyle="--", linewidth=1, label="learns"
    )
    axis.set(
      xlabel="held-out accuracy, %",
      ylabel="share of runs at or below",
      title=network,
      xlim=(0, None),
    )
    axis.legend(loc="upper left", fontsize=8)
  pictures.save(figure, path)
