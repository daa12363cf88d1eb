"""Which upper bound for which base, momentum and batch size.

The papers give one interval for SGD and one for Adam. Here the upper bound varies, and
with it base and batch size; the lower bound stays. So a higher bound does two things
that this cannot tell apart: it gives some units larger rates, and the wider interval
thins out those near any good rate. Batch sizes are compared at equal epochs, hence at
unequal numbers of steps.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks.planning import refuse
from benchmarks.progress import Display
from benchmarks.results import RunRecords
from benchmarks.studies import optimizers, pictures
from benchmarks.studies.arms import Images, Trainer, final_accuracy
from benchmarks.studies.runner import Arm
from benchmarks.studies.study import Study

LOWER = 1e-5
BASES = {
  "SGD": optimizers.ALRAO_INTERVAL,
  "momentum .9": optimizers.ALRAO_MOMENTUM_INTERVAL,
  "Adam": optimizers.ALRAO_ADAM_INTERVAL,
}


@dataclasses.dataclass(frozen=True)
class Bounds(Study):
  """Accuracy over upper bound and batch size, for three bases."""

  images: Annotated[Images, tyro.conf.arg(name="")] = Images(num_train=4_000, epochs=4)
  batch_sizes: tuple[int, ...] = (8, 32, 128)
  """Sizes of the batches, each in place of --batch-size."""
  uppers: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
  """Upper bounds of the interval; the lower one is 1e-5."""
  seeds: int = 3
  """Number of runs of each."""
  out: Path = Path("out/studies/bounds")
  """Folder for records, numbers and picture."""

  @property
  def trained_on(self) -> str:
    """What the runs train on."""
    sizes = ", ".join(map(str, self.batch_sizes))
    return f"{self.images.amount}, batches of {sizes}"

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers.

    Raises:
      OptionError: No batch size, or --batch-size; upper bounds below the lower one.
    """
    if self.images.batch_size != Images.batch_size:
      rule = "must be left out, for --batch-sizes"
      refuse("batch_size", rule, self.images.batch_size)
    if not self.batch_sizes:
      refuse("batch_sizes", "must have at least one", self.batch_sizes)
    if not self.uppers or min(self.uppers) <= LOWER:
      refuse("uppers", f"must have at least one, all above {LOWER:g}", self.uppers)
    found: dict[tuple[str, int, float], list[RunRecords]] = {}
    with Display() as display:
      for size in self.batch_sizes:
        images = dataclasses.replace(self.images, batch_size=size)
        trainer = Trainer("bounds", images, self.out, display, used=self.used)
        for base, optimizer in BASES.items():
          for upper in self.uppers:
            name = f"{base.replace(' .', '-')}-b{size}-{upper:g}"
            arm = Arm(name, optimizer, base, (LOWER, upper))
            found[base, size, upper] = trainer.run([arm], range(self.seeds))
    accuracies = {
      base: np.array(
        [
          [
            [final_accuracy(run) for run in found[base, size, upper]]
            for upper in self.uppers
          ]
          for size in self.batch_sizes
        ]
      )
      for base in BASES
    }
    _draw(accuracies, self.batch_sizes, self.uppers, self.out / "bounds.png")
    steps = ", ".join(
      f"{self.images.num_train // size * self.images.epochs:,} (batches of {size})"
      for size in self.batch_sizes
    )
    return [
      f"At equal epochs, hence steps: {steps}. A higher bound also widens the "
      "interval, so fewer units have a rate near any good one: the two are not told "
      "apart.",
      "",
      *table(accuracies, self.batch_sizes, self.uppers),
    ]


def table(
  accuracies: dict[str, np.ndarray],
  batch_sizes: Sequence[int],
  uppers: Sequence[float],
) -> list[str]:
  """Returns the accuracies as Markdown, the best mean of a row in bold.

  Args:
    accuracies: By base, (batch sizes, upper bounds, seeds).
    batch_sizes: The batch sizes.
    uppers: The upper bounds.
  """
  lines = [
    f"Held-out accuracy, %, by upper bound of the interval (lower bound {LOWER:g}).",
    "",
    "| base | batch | " + " | ".join(f"{upper:g}" for upper in uppers) + " |",
    "| --- | --- |" + " --- |" * len(uppers),
  ]
  for base, grid in accuracies.items():
    for size, row in zip(batch_sizes, 100 * grid, strict=True):
      cells = [f"{found.mean():.1f} ± {found.std(ddof=1):.1f}" for found in row]
      best = int(np.argmax(row.mean(axis=1)))
      cells[best] = f"**{cells[best]}**"
      lines.append(f"| {base} | {size} | " + " | ".join(cells) + " |")
  return lines


def _draw(
  accuracies: dict[str, np.ndarray],
  batch_sizes: Sequence[int],
  uppers: Sequence[float],
  path: Path,
) -> None:
  means = {base: grid.mean(axis=2) for base, grid in accuracies.items()}
  figure, axes = pictures.subplots(len(means), width=4.0)
  top = max(grid.max() for grid in means.values())
  for axis, (base, grid) in zip(axes, means.items(), strict=True):
    for size, row in zip(batch_sizes, grid, strict=True):
      axis.semilogx(uppers, 100 * row, "o-", label=f"batches of {size}")
    axis.set(
      xlabel="upper bound of the interval",
      ylabel="held-out accuracy, %",
      title=f"Alrao on {base}",
      ylim=(0, 105 * top),
    )
    axis.legend(fontsize=8)
  pictures.save(figure, path)
