"""What makes Alrao work: its heads, its fixed rates, or neither.

Heads are thrown away after the first epoch; Adam has as many heads, of equal rates;
rates are drawn anew at every step, which a footnote of the papers says equals SGD at
the mean rate; and, as the papers' conclusion imagines, units draw a momentum too, here
the decay of a running mean of gradients, which leaves the size of a step alone.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from scipy.stats import ttest_rel

from benchmarks import methods, pictures
from benchmarks.records import Run
from benchmarks.studies._study import (
  LOSSES,
  Arm,
  ImageRunner,
  Images,
  Source,
  Study,
  by_arm,
  curves,
)
from benchmarks.studies.collapse import check_epochs, go_on
from benchmarks.tables import markdown

ALRAO = "Alrao"
LOW, HIGH = 1e-3, 1.0  # of 1 - beta
MEAN = methods.MEAN_RATE

# Label, and arm.
ARMS = {
  ALRAO: Arm("alrao", methods.ALRAO, "alrao"),
  "Adam": Arm("adam", methods.METHODS["adam"], "adam"),
  "Adam, 10 equal heads": Arm(
    "adam-heads", methods.ADAM_EQUAL_HEADS, "adam with heads"
  ),
  "Alrao, rates redrawn every step": Arm("redrawn", methods.REDRAWN, "redrawn"),
  f"Alrao's heads, units at the mean rate {MEAN:.3f}": Arm(
    "units-at-mean", methods.UNITS_AT_MEAN_RATE, "units at mean"
  ),
  f"SGD at the mean rate {MEAN:.3f}": Arm("sgd-mean", methods.SGD, "sgd", MEAN),
  f"Alrao, running mean of gradients, 1 - β by unit on [{LOW:g}, {HIGH:g}]": Arm(
    "unit-momentum", methods.with_unit_momentum(LOW, HIGH), "unit momentum"
  ),
  "Alrao, running mean of gradients, β .9 for all units": Arm(
    "momentum", methods.with_unit_momentum(0.1, 0.1), "momentum"
  ),
}
KEPT = (1, 3)
Runs = dict[str, list[Run]]  # by label


@dataclasses.dataclass(frozen=True)
class AblationStudy(Study[Runs]):
  """Alrao less one of its parts, or with one more."""

  name = "ablation"
  images: Annotated[Images, tyro.conf.arg(name="")] = Images(num_train=10_000, epochs=6)
  seeds: int = 5
  """Number of runs of each."""
  network: str = "small_cnn"
  """Network of benchmarks/models."""
  out: Path = Path("out/studies/ablation")
  """Folder for records, numbers and picture."""

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: A single epoch, after which there are no heads to throw away.
    """
    super().check()
    check_epochs(self.images)

  def find(self, source: Source) -> Runs:
    """Returns runs by label.

    Args:
      source: Where all runs come from.
    """
    arms = {label: arm._replace(network=self.network) for label, arm in ARMS.items()}
    runner = ImageRunner(source, self.images)
    found = by_arm(runner.run(arms.values(), range(self.seeds)))
    runs = {label: found[arm.name] for label, arm in arms.items()}
    for keep in KEPT:
      label = f"Alrao, best {'head' if keep == 1 else f'{keep} heads'} after epoch 1"
      runs[label] = go_on(source, self.images, arms[ALRAO], keep, runs[ALRAO])
    return runs

  def table(self, found: Runs) -> list[str]:
    """Returns last losses and accuracies, and the difference to Alrao's loss.

    Args:
      found: The runs.
    """
    reference = _last(found[ALRAO], "validation_loss")
    rows = []
    for label, runs in found.items():
      train, held_out = (_last(runs, name) for name in LOSSES)
      accuracy = 100 * _last(runs, "validation_accuracy")
      cells = [_cell(train), _cell(held_out), _cell(accuracy, 1), ""]
      if label != ALRAO:
        change = held_out - reference
        cells[-1] = _cell(change, sign="+")
        if np.isfinite(change).all():
          interval = ttest_rel(held_out, reference).confidence_interval()
          cells[-1] += f" ({interval.low:+.3f} to {interval.high:+.3f})"
      rows.append([label, *cells])
    header = ["", "train loss", "held-out loss", "held-out accuracy, %"]
    return [
      "After the last epoch. The difference is that of the held-out losses, by seed, "
      "with the 95 % interval of its mean, by Student's t. β is the decay of a unit's "
      "running mean of its gradients; heads have none. A run that failed has no loss, "
      "and neither has the mean of its arm.",
      "",
      *markdown([*header, "less Alrao's"], rows),
    ]

  def draw(self, found: Runs, path: Path) -> None:
    """Draws mean losses by epoch.

    Args:
      found: The runs.
      path: The PNG file.
    """
    figure, axes = pictures.subplots(2, 5.5, 4.5)
    for axis, (name, title) in zip(axes, LOSSES.items(), strict=True):
      for i, (label, runs) in enumerate(found.items()):
        style = {"color": "black", "linewidth": 2.5} if label == ALRAO else {}
        whole = [run for run in runs if not run.failed]
        if not whole:
          continue
        if len(whole) < len(runs):
          label += f" ({len(whole)} of {len(runs)})"
        losses = curves(whole, name).mean(axis=0)
        epochs = np.arange(1, len(losses) + 1)
        marker = "o-" if i % 2 else "s--"
        axis.plot(epochs, losses, marker, markersize=3, label=label, **style)
      axis.set(xlabel="epoch", ylabel="loss", title=title)
      axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(
      *axes[0].get_legend_handles_labels(),
      loc="outside lower center",
      ncols=2,
      fontsize=8,
    )
    pictures.save(figure, path)


def _last(runs: list[Run], name: str) -> np.ndarray:
  """What each run has after the last epoch; chance and no loss where it failed."""
  failed = {"validation_accuracy": runs[0].config["chance"]}.get(name, np.nan)
  return np.array([failed if run.failed else run.curve(name)[-1] for run in runs])


def _cell(values: np.ndarray, digits: int = 3, sign: str = "") -> str:
  if np.isnan(values).any():
    return f"{np.isnan(values).sum()} of {len(values)} failed"
  return f"{values.mean():{sign}.{digits}f} ± {values.std(ddof=1):.{digits}f}"


STUDY = AblationStudy
