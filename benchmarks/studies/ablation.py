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

from benchmarks.progress import Display
from benchmarks.results import RunRecords
from benchmarks.studies import optimizers, pictures
from benchmarks.studies.arms import Images, Trainer, by_arm
from benchmarks.studies.going_on import PARTS, check_epochs, curves, go_on, rest_trainer
from benchmarks.studies.runner import Arm
from benchmarks.studies.study import Study

ALRAO = "Alrao"
LOW, HIGH = 1e-3, 1.0  # of 1 - beta
MEAN = optimizers.MEAN_RATE

# Label, and arm.
ARMS = {
  ALRAO: Arm("alrao", optimizers.ALRAO, "alrao"),
  "Adam": Arm("adam", optimizers.OPTIMIZERS["adam"], "adam"),
  "Adam, 10 equal heads": Arm(
    "adam-heads", optimizers.ADAM_EQUAL_HEADS, "adam with heads"
  ),
  "Alrao, rates redrawn every step": Arm("redrawn", optimizers.REDRAWN, "redrawn"),
  f"Alrao's heads, units at the mean rate {MEAN:.3f}": Arm(
    "units-at-mean", optimizers.UNITS_AT_MEAN_RATE, "units at mean"
  ),
  f"SGD at the mean rate {MEAN:.3f}": Arm("sgd-mean", optimizers.SGD, "sgd", MEAN),
  f"Alrao, running mean of gradients, 1 - β by unit on [{LOW:g}, {HIGH:g}]": Arm(
    "unit-momentum", optimizers.with_unit_momentum(LOW, HIGH), "unit momentum"
  ),
  "Alrao, running mean of gradients, β .9 for all units": Arm(
    "momentum", optimizers.with_unit_momentum(0.1, 0.1), "momentum"
  ),
}
KEPT = (1, 3)


@dataclasses.dataclass(frozen=True)
class Ablation(Study):
  """Alrao less one of its parts, or with one more."""

  images: Annotated[Images, tyro.conf.arg(name="")] = Images(num_train=10_000, epochs=6)
  seeds: int = 5
  """Number of runs of each."""
  network: str = "small_cnn"
  """Network of benchmarks/models."""
  out: Path = Path("out/studies/ablation")
  """Folder for records, numbers and picture."""

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers.

    Raises:
      OptionError: A single epoch, after which there are no heads to throw away.
    """
    check_epochs(self.images)
    arms = {label: arm._replace(network=self.network) for label, arm in ARMS.items()}
    with Display() as display:
      trainer = Trainer("ablation", self.images, self.out, display, used=self.used)
      found = by_arm(trainer.run(arms.values(), range(self.seeds)))
      runs = {label: found[arm.name] for label, arm in arms.items()}
      rest = rest_trainer("ablation", self.images, self.out, display, self.used)
      for keep in KEPT:
        label = f"Alrao, best {'head' if keep == 1 else f'{keep} heads'} after epoch 1"
        runs[label] = go_on(rest, arms[ALRAO], keep, runs[ALRAO])
    _draw(runs, self.out / "ablation.png")
    return _table(runs)


def _table(runs: dict[str, list[RunRecords]]) -> list[str]:
  lines = [
    "After the last epoch. The difference is that of the held-out losses, by seed, "
    "with the 95 % interval of its mean, by Student's t. "
    "β is the decay of a unit's running mean of its gradients; heads have none. A run "
    "that failed has no loss, and neither has the mean of its arm.",
    "",
    "| | train loss | held-out loss | held-out accuracy, % | less Alrao's |",
    "| --- | --- | --- | --- | --- |",
  ]
  reference = _last(runs[ALRAO], "validation_loss")
  for label, found in runs.items():
    held_out = _last(found, "validation_loss")
    change = held_out - reference
    accuracy = 100 * _last(found, "validation_accuracy")
    cells = [_cell(_last(found, "train_loss")), _cell(held_out), _cell(accuracy, 1)]
    cells.append("" if label == ALRAO else _cell(change, sign="+"))
    if label != ALRAO and np.isfinite(change).all():
      interval = ttest_rel(held_out, reference).confidence_interval()
      cells[-1] += f" ({interval.low:+.3f} to {interval.high:+.3f})"
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  return lines


def _last(runs: list[RunRecords], name: str) -> np.ndarray:
  """What each run has after the last epoch; chance and no loss where it failed."""
  failed = {"validation_accuracy": runs[0].config["chance"]}.get(name, np.nan)
  values = [
    failed if run.summary["ending"] == "failed" else run.epochs[-1][name]
    for run in runs
  ]
  return np.array(values, float)


def _cell(values: np.ndarray, digits: int = 3, sign: str = "") -> str:
  if np.isnan(values).any():
    return f"{np.isnan(values).sum()} of {len(values)} failed"
  return f"{values.mean():{sign}.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def _draw(runs: dict[str, list[RunRecords]], path: Path) -> None:
  figure, axes = pictures.subplots(2, 5.5, 4.5)
  for axis, (name, title) in zip(axes, PARTS.items(), strict=True):
    for i, (label, found) in enumerate(runs.items()):
      style = {"color": "black", "linewidth": 2.5} if label == ALRAO else {}
      whole = [run for run in found if run.summary["ending"] != "failed"]
      if not whole:
        continue
      if len(whole) < len(found):
        label += f" ({len(whole)} of {len(found)})"
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
