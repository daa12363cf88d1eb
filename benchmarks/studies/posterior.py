"""Figure 4 of the papers: the weights of the heads over the first steps.

The papers' posterior settles on one head after about 4,000 samples.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks import pictures
from benchmarks.console import OptionError
from benchmarks.methods import ALRAO
from benchmarks.studies._study import Arm, ImageRunner, Images, Source, Study
from benchmarks.tables import markdown

CERTAIN = 0.99
EARLY_STEPS = 10


@dataclasses.dataclass(frozen=True)
class PosteriorStudy(Study[np.ndarray]):
  """How fast the heads' posterior settles, on which head, and whether for good."""

  name = "posterior"
  images: Annotated[Images, tyro.conf.arg(name="")] = Images(epochs=10)
  seeds: int = 10
  """Number of runs."""
  network: str = "small_cnn"
  """Network of benchmarks/models."""
  out: Path = Path("out/studies/posterior")
  """Folder for records, numbers and picture."""

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: Too few steps.
    """
    super().check()
    if self._steps_per_epoch * self.images.epochs <= EARLY_STEPS:
      raise OptionError(f"--num-train and --epochs must give over {EARLY_STEPS} steps.")

  @property
  def _steps_per_epoch(self) -> int:
    return self.images.num_train // self.images.batch_size

  def find(self, source: Source) -> np.ndarray:
    """Returns the weights before each step, (seeds, steps, num_heads).

    Args:
      source: Where all runs come from.
    """
    arm = Arm("alrao", ALRAO, "alrao", network=self.network)
    runner = ImageRunner(source, self.images, self._steps_per_epoch - 1)
    return np.array(
      [
        [weights for record in run.epochs for weights in record["head_weights"]]
        for run in runner.run([arm], range(self.seeds))
      ]
    )

  def table(self, found: np.ndarray) -> list[str]:
    """Returns when each run's posterior settles, and on what.

    Args:
      found: The weights.
    """
    batch_size, num_heads = self.images.batch_size, found.shape[2]
    # Before step t + 1 the switch has just redistributed 1 / (t + 1) of all weight, and
    # gives every head its part of that.
    least = 1 / ((EARLY_STEPS + 1) * num_heads)
    earliest = math.ceil((1 - 1 / num_heads) / (1 - CERTAIN)) - 1
    rows = []
    for seed, run in enumerate(found):
      certain = np.flatnonzero(run.max(axis=1) > CERTAIN)
      dead = np.flatnonzero(run[EARLY_STEPS] < 2 * least) + 1
      leader = run.argmax(axis=1)
      settled = ["never", "", ""]
      if certain.size:
        first = certain[0]
        changes = np.count_nonzero(np.diff(leader[first:]))
        settled = [f"{first * batch_size:,}", str(leader[first] + 1), str(changes)]
      samples, head, changes = settled
      dead = ", ".join(map(str, dead)) or "none"
      rows.append([str(seed), samples, head, dead, str(leader[-1] + 1), changes])
    header = [
      "seed",
      f"samples until a weight passes {CERTAIN}",
      "that head",
      f"dead after {EARLY_STEPS} steps",
      "heaviest at the end",
      "changes of the heaviest head after that",
    ]
    return [
      f"The switch leaves every head at least {least:.3f} after {EARLY_STEPS} steps, "
      f"and lets none pass {CERTAIN} before {earliest * batch_size:,} samples. A head "
      f"is called dead after {EARLY_STEPS} steps if it has less than twice that least.",
      "",
      *markdown(header, rows),
    ]

  def draw(self, found: np.ndarray, path: Path) -> None:
    """Draws the first run's heads over the samples, and every run's heaviest.

    Args:
      found: The weights.
      path: The PNG file.
    """
    figure, (first, all_runs) = pictures.subplots(2)
    batch_size = self.images.batch_size
    samples = batch_size * np.arange(found.shape[1])
    colours = pictures.colormap("viridis")(np.linspace(0, 0.95, found.shape[2]))
    for head, colour in enumerate(colours):
      first.plot(samples, found[0, :, head], color=colour, label=f"{head + 1}")
    first.set(
      xlabel="samples",
      ylabel="posterior weight",
      title="seed 0, by head (1: slowest)",
    )
    first.set_xscale("symlog", linthresh=batch_size)
    first.legend(fontsize=7, ncols=2)
    for run in found:
      all_runs.plot(samples, run.max(axis=1), linewidth=1)
    all_runs.set(xlabel="samples", ylabel="largest weight", title="all seeds")
    all_runs.set_xscale("symlog", linthresh=batch_size)
    all_runs.axhline(CERTAIN, color="0.7", linewidth=0.8)
    all_runs.axvline(4000, color="0.7", linewidth=0.8, linestyle="--")
    pictures.save(figure, path)


STUDY = PosteriorStudy
