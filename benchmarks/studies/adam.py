"""Figure 5 of the papers: Alrao on Adam beside Adam at several rates.

The papers find Alrao on Adam less reliable than on SGD: it fits the training data, and
oscillates or overfits late.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks.planning import OptionError
from benchmarks.progress import Display
from benchmarks.results import RunRecords
from benchmarks.studies import optimizers, pictures
from benchmarks.studies.arms import Images, Trainer
from benchmarks.studies.runner import Arm
from benchmarks.studies.study import Study

INTERVALS = ((1e-5, 10.0), (1e-6, 1.0))
RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclasses.dataclass(frozen=True)
class Adam(Study):
  """Train against held-out loss on Adam, and single runs to the end."""

  images: Annotated[Images, tyro.conf.arg(name="")] = Images(
    num_train=10_000, epochs=15
  )
  seeds: int = 3
  """Number of runs of each."""
  single_runs: int = 10
  """Number of runs of Alrao on Adam, on the second interval."""
  out: Path = Path("out/studies/adam")
  """Folder for records, numbers and picture."""

  @property
  def spread(self) -> str:
    """How many runs there are, and how they are summed up."""
    return (
      f"{self.seeds} seeds, {self.single_runs} of the last row; losses are means over "
      "them, and not a number where one is not finite."
    )

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers.

    Raises:
      OptionError: No single run, or a single epoch, which has no course.
    """
    if self.single_runs < 1 or self.images.epochs < 2:
      raise OptionError("--single-runs must be at least 1, --epochs at least 2.")
    alrao = [
      Arm(
        f"alrao-{low:g}-{high:g}", optimizers.ALRAO_ADAM_INTERVAL, "alrao", (low, high)
      )
      for low, high in INTERVALS
    ]
    adam = [Arm(f"adam-{rate:g}", optimizers.ADAM, "adam", rate) for rate in RATES]
    with Display() as display:
      trainer = Trainer("adam", self.images, self.out, display, used=self.used)
      runs = trainer.run([*alrao, *adam], range(self.seeds))
      single = trainer.run(alrao[-1:], range(self.single_runs))
    _draw(runs, single, self.out / "adam.png")
    return _table(runs, single)


def _label(run: RunRecords) -> str:
  rate = run.config["rate"]
  if isinstance(rate, (list, tuple)):
    return f"Alrao on Adam, [{rate[0]:g}, {rate[1]:g}]"
  return f"Adam {rate:g}"


def _by_label(runs: list[RunRecords]) -> dict[str, list[RunRecords]]:
  found: dict[str, list[RunRecords]] = {}
  for run in runs:
    found.setdefault(_label(run), []).append(run)
  return found


def _curve(runs: list[RunRecords], name: str) -> np.ndarray:
  """Mean over runs, as far as the shortest goes; nan where a loss is not finite."""
  length = min(len(run.epochs) for run in runs)
  values = [[record[name] for record in run.epochs[:length]] for run in runs]
  return np.array(values, float).mean(axis=0)


def _table(runs: list[RunRecords], single: list[RunRecords]) -> list[str]:
  lines = [
    "A run's rise is the largest of its held-out loss from one epoch to the next, in "
    "the later half.",
    "",
    "| | last train loss | last held-out loss | the same less its least | rise, median "
    "| rise, largest |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  by_label = _by_label(runs)
  by_label[f"{_label(single[0])}, {len(single)} runs"] = single
  for label, found in by_label.items():
    train, test = _curve(found, "train_loss"), _curve(found, "validation_loss")
    rises = [_rise(run) for run in found]
    cells = [
      train[-1],
      test[-1],
      test[-1] - test.min(),
      np.median(rises),
      np.max(rises),
    ]
    lines.append(" | ".join([f"| {label}", *(f"{x:.3f}" for x in cells)]) + " |")
  return lines


def _rise(run: RunRecords) -> float:
  """The largest rise from one epoch to the next in the later half; nan without two."""
  rises = np.diff(_curve([run], "validation_loss"))
  return float(np.max(rises[len(rises) // 2 :])) if rises.size else math.nan


def _draw(runs: list[RunRecords], single: list[RunRecords], path: Path) -> None:
  figure, axes = pictures.subplots(3)
  for axis, name in zip(axes, ("train_loss", "validation_loss"), strict=False):
    for label, found in _by_label(runs).items():
      curve = _curve(found, name)
      style = "-" if label.startswith("Alrao") else "--"
      axis.plot(np.arange(1, len(curve) + 1), curve, style, label=label)
    title = {"train_loss": "train", "validation_loss": "held-out"}[name]
    axis.set(xlabel="epoch", ylabel="loss", title=title, ylim=(0.6, 2.6))
  axes[1].legend(fontsize=7)
  for run in single:
    curve = _curve([run], "validation_loss")
    axes[2].plot(np.arange(1, len(curve) + 1), curve, linewidth=1)
  axes[2].set(
    xlabel="epoch", ylabel="held-out loss", title=f"{_label(single[0])}, single runs"
  )
  axes[2].set_ylim(0.6, 2.6)
  pictures.save(figure, path)
