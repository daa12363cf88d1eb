"""Training goes on with the best head alone after the first epoch, or with all."""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from scipy.stats import ttest_rel

from benchmarks.progress import Display
from benchmarks.results import RunRecords
from benchmarks.studies import optimizers, pictures
from benchmarks.studies.arms import Images, Trainer
from benchmarks.studies.going_on import PARTS, check_epochs, curves, go_on, rest_trainer
from benchmarks.studies.runner import Arm
from benchmarks.studies.study import Study


@dataclasses.dataclass(frozen=True)
class Collapse(Study):
  """The curve with collapse to the best head after epoch 1 beside that without."""

  images: Annotated[Images, tyro.conf.arg(name="")] = Images(num_train=10_000, epochs=6)
  seeds: int = 5
  """Number of runs of each."""
  network: str = "small_cnn"
  """Network of benchmarks/models."""
  out: Path = Path("out/studies/collapse")
  """Folder for records, numbers and picture."""

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers.

    Raises:
      OptionError: A single epoch, after which nothing is left.
    """
    check_epochs(self.images)
    arm = Arm("alrao", optimizers.ALRAO, "alrao", network=self.network)
    with Display() as display:
      trainer = Trainer("collapse", self.images, self.out, display, used=self.used)
      plain = trainer.run([arm], range(self.seeds))
      rest = rest_trainer("collapse", self.images, self.out, display, self.used)
      collapsed = go_on(rest, arm, 1, plain)
    _draw(plain, collapsed, self.out / "collapse.png")
    return _table(plain, collapsed)


def _table(plain: list[RunRecords], collapsed: list[RunRecords]) -> list[str]:
  lines = [
    "| | last train loss | last held-out loss | last held-out accuracy, % |",
    "| --- | --- | --- | --- |",
  ]
  for label, runs in (("all heads", plain), ("best head after epoch 1", collapsed)):
    cells = []
    for name, factor in (*((name, 1) for name in PARTS), ("validation_accuracy", 100)):
      last = factor * curves(runs, name)[:, -1]
      digits = 1 if factor == 100 else 4
      cells.append(f"{last.mean():.{digits}f} ± {last.std(ddof=1):.{digits}f}")
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  with_all, with_one = (
    curves(runs, "validation_loss")[:, -1] for runs in (plain, collapsed)
  )
  change = with_one - with_all
  found = ttest_rel(with_one, with_all).confidence_interval()
  return [
    *lines,
    "",
    f"Held-out loss with the best head alone less that with all, by seed: "
    f"{change.mean():+.4f} ± {change.std(ddof=1):.4f} (95 % interval of the mean, by "
    f"Student's t: {found.low:+.4f} to {found.high:+.4f}).",
  ]


def _draw(plain: list[RunRecords], collapsed: list[RunRecords], path: Path) -> None:
  figure, axes = pictures.subplots(2)
  for axis, (name, title) in zip(axes, PARTS.items(), strict=True):
    for colour, label, runs in (
      ("C0", "all heads", plain),
      ("C1", "best head after epoch 1", collapsed),
    ):
      losses = curves(runs, name)
      epochs = np.arange(1, losses.shape[1] + 1)
      axis.plot(epochs, losses.T, color=colour, linewidth=0.7, alpha=0.4)
      axis.plot(epochs, losses.mean(axis=0), "o-", color=colour, label=label)
    axis.axvline(1, color="0.7", linewidth=0.8, linestyle="--")
    axis.set(xlabel="epoch", ylabel="loss", title=title)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=8)
  pictures.save(figure, path)
