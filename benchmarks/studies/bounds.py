"""Which upper bound for which base, momentum and batch size.

The papers give one interval for SGD and one for Adam. Here the upper bound varies, and
with it base and batch size; the lower bound stays. So a higher bound does two things
that this cannot tell apart: it gives some units larger rates, and the wider interval
thins out those near any good rate. Batch sizes are compared at equal epochs, hence at
unequal numbers of steps.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks import pictures
from benchmarks.console import refuse
from benchmarks.methods import (
  ALRAO_ADAM_INTERVAL,
  ALRAO_INTERVAL,
  ALRAO_MOMENTUM_INTERVAL,
)
from benchmarks.studies._study import (
  Arm,
  ImageRunner,
  Images,
  Source,
  Study,
  final_accuracy,
)
from benchmarks.tables import markdown, spread

LOWER = 1e-5
BASES = {
  "SGD": ALRAO_INTERVAL,
  "momentum .9": ALRAO_MOMENTUM_INTERVAL,
  "Adam": ALRAO_ADAM_INTERVAL,
}
Accuracies = dict[str, np.ndarray]  # by base, (batch sizes, upper bounds, seeds)


@dataclasses.dataclass(frozen=True)
class BoundsStudy(Study[Accuracies]):
  """Accuracy over upper bound and batch size, for three bases."""

  name = "bounds"
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

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: No batch size, or --batch-size; upper bounds below the lower one.
    """
    super().check()
    if self.images.batch_size != Images.batch_size:
      rule = "must be left out, for --batch-sizes"
      refuse("batch_size", rule, self.images.batch_size)
    if not self.batch_sizes:
      refuse("batch_sizes", "must have at least one", self.batch_sizes)
    if not self.uppers or min(self.uppers) <= LOWER:
      refuse("uppers", f"must have at least one, all above {LOWER:g}", self.uppers)

  def find(self, source: Source) -> Accuracies:
    """Returns accuracies by base, batch size, upper bound and seed.

    Args:
      source: Where all runs come from.
    """
    shape = (len(self.batch_sizes), len(self.uppers), self.seeds)
    found = {base: np.zeros(shape) for base in BASES}
    for i, size in enumerate(self.batch_sizes):
      images = dataclasses.replace(self.images, batch_size=size)
      runner = ImageRunner(source, images)
      for base, method in BASES.items():
        for j, upper in enumerate(self.uppers):
          name = f"{base.replace(' .', '-')}-b{size}-{upper:g}"
          runs = runner.run(
            [Arm(name, method, base, (LOWER, upper))], range(self.seeds)
          )
          found[base][i, j] = [final_accuracy(run) for run in runs]
    return found

  def table(self, found: Accuracies) -> list[str]:
    """Returns the accuracies, the best mean of a row in bold.

    Args:
      found: The accuracies.
    """
    steps = ", ".join(
      f"{self.images.num_train // size * self.images.epochs:,} (batches of {size})"
      for size in self.batch_sizes
    )
    rows = []
    for base, grid in found.items():
      for size, row in zip(self.batch_sizes, grid, strict=True):
        cells = [spread(values, 1, 100) for values in row]
        best = int(np.argmax(row.mean(axis=1)))
        cells[best] = f"**{cells[best]}**"
        rows.append([base, str(size), *cells])
    return [
      f"At equal epochs, hence steps: {steps}. A higher bound also widens the "
      "interval, so fewer units have a rate near any good one: the two are not told "
      "apart.",
      "",
      f"Held-out accuracy, %, by upper bound of the interval (lower bound {LOWER:g}).",
      "",
      *markdown(["base", "batch", *(f"{upper:g}" for upper in self.uppers)], rows),
    ]

  def draw(self, found: Accuracies, path: Path) -> None:
    """Draws mean accuracies by upper bound.

    Args:
      found: The accuracies.
      path: The PNG file.
    """
    means = {base: grid.mean(axis=2) for base, grid in found.items()}
    figure, axes = pictures.subplots(len(means), width=4.0)
    top = max(grid.max() for grid in means.values())
    for axis, (base, grid) in zip(axes, means.items(), strict=True):
      for size, row in zip(self.batch_sizes, grid, strict=True):
        axis.semilogx(self.uppers, 100 * row, "o-", label=f"batches of {size}")
      axis.set(
        xlabel="upper bound of the interval",
        ylabel="held-out accuracy, %",
        title=f"Alrao on {base}",
        ylim=(0, 105 * top),
      )
      axis.legend(fontsize=8)
    pictures.save(figure, path)


STUDY = BoundsStudy
