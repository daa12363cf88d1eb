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

from benchmarks import pictures
from benchmarks.console import OptionError
from benchmarks.methods import ADAM, ALRAO_ADAM_INTERVAL
from benchmarks.records import Run
from benchmarks.studies._study import LOSSES, Arm, ImageRunner, Images, Source, Study
from benchmarks.tables import markdown

INTERVALS = ((1e-5, 10.0), (1e-6, 1.0))
RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
Runs = dict[str, list[Run]]  # by label; those of the last one are the single runs


@dataclasses.dataclass(frozen=True)
class AdamStudy(Study[Runs]):
  """Train against held-out loss on Adam, and single runs to the end."""

  name = "adam"
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

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: No single run, or a single epoch, which has no course.
    """
    super().check()
    if self.single_runs < 1 or self.images.epochs < 2:
      raise OptionError("--single-runs must be at least 1, --epochs at least 2.")

  def find(self, source: Source) -> Runs:
    """Returns runs by label.

    Args:
      source: Where all runs come from.
    """
    runner = ImageRunner(source, self.images)
    arms = {
      _label(interval): Arm(
        f"alrao-{interval[0]:g}-{interval[1]:g}", ALRAO_ADAM_INTERVAL, "alrao", interval
      )
      for interval in INTERVALS
    }
    arms |= {
      f"Adam {rate:g}": Arm(f"adam-{rate:g}", ADAM, "adam", rate) for rate in RATES
    }
    found = {label: runner.run([arm], range(self.seeds)) for label, arm in arms.items()}
    last = _label(INTERVALS[-1])
    single = runner.run([arms[last]], range(self.single_runs))
    return {**found, f"{last}, {len(single)} runs": single}

  def table(self, found: Runs) -> list[str]:
    """Returns last losses, and how much they rise late.

    Args:
      found: The runs.
    """
    rows = []
    for label, runs in found.items():
      train, held_out = (_mean_curve(runs, name) for name in LOSSES)
      rises = [largest_rise(run) for run in runs]
      cells = [
        train[-1],
        held_out[-1],
        held_out[-1] - held_out.min(),
        np.median(rises),
        np.max(rises),
      ]
      rows.append([label, *(f"{cell:.3f}" for cell in cells)])
    header = ["", "last train loss", "last held-out loss", "the same less its least"]
    return [
      "A run's rise is the largest of its held-out loss from one epoch to the next, in "
      "the later half.",
      "",
      *markdown([*header, "rise, median", "rise, largest"], rows),
    ]

  def draw(self, found: Runs, path: Path) -> None:
    """Draws mean losses by epoch, and the single runs.

    Args:
      found: The runs.
      path: The PNG file.
    """
    figure, axes = pictures.subplots(3)
    *labels, single = found
    for axis, (name, title) in zip(axes, LOSSES.items(), strict=False):
      for label in labels:
        curve = _mean_curve(found[label], name)
        style = "-" if label.startswith("Alrao") else "--"
        axis.plot(np.arange(1, len(curve) + 1), curve, style, label=label)
      axis.set(xlabel="epoch", ylabel="loss", title=title, ylim=(0.6, 2.6))
    axes[1].legend(fontsize=7)
    for run in found[single]:
      curve = run.curve("validation_loss")
      axes[2].plot(np.arange(1, len(curve) + 1), curve, linewidth=1)
    title = f"{_label(INTERVALS[-1])}, single runs"
    axes[2].set(xlabel="epoch", ylabel="held-out loss", title=title, ylim=(0.6, 2.6))
    pictures.save(figure, path)


def _label(interval: tuple[float, float]) -> str:
  return f"Alrao on Adam, [{interval[0]:g}, {interval[1]:g}]"


def _mean_curve(runs: list[Run], name: str) -> np.ndarray:
  """Mean over runs, as far as the shortest goes; nan where a loss is not finite."""
  length = min(len(run.epochs) for run in runs)
  return np.mean([run.curve(name)[:length] for run in runs], axis=0)


def largest_rise(run: Run) -> float:
  """Returns the largest rise of the held-out loss from one epoch to the next.

  Args:
    run: The run, whose later half counts; nan if it has no two epochs.
  """
  rises = np.diff(run.curve("validation_loss"))
  return float(np.max(rises[len(rises) // 2 :])) if rises.size else math.nan


STUDY = AdamStudy
