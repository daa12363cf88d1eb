"""Figure 4 of the papers: the weights of the heads over the first steps.

The papers' posterior settles on one head after about 4,000 samples.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import tyro

from benchmarks.planning import OptionError
from benchmarks.progress import Display
from benchmarks.results import RunRecords
from benchmarks.studies import optimizers, pictures
from benchmarks.studies.arms import Images, Trainer
from benchmarks.studies.runner import Arm
from benchmarks.studies.study import Study

CERTAIN = 0.99
EARLY_STEPS = 10


@dataclasses.dataclass(frozen=True)
class Posterior(Study):
  """How fast the heads' posterior settles, on which head, and whether for good."""

  images: Annotated[Images, tyro.conf.arg(name="")] = Images(epochs=10)
  seeds: int = 10
  """Number of runs."""
  network: str = "small_cnn"
  """Network of benchmarks/models."""
  out: Path = Path("out/studies/posterior")
  """Folder for records, numbers and picture."""

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers.

    Raises:
      OptionError: Too few steps.
    """
    steps_per_epoch = self.images.num_train // self.images.batch_size
    if steps_per_epoch * self.images.epochs <= EARLY_STEPS:
      raise OptionError(f"--num-train and --epochs must give over {EARLY_STEPS} steps.")
    arm = Arm("alrao", optimizers.ALRAO, "alrao", network=self.network)
    with Display() as display:
      trainer = Trainer(
        "posterior",
        self.images,
        self.out,
        display,
        steps_per_epoch - 1,
        used=self.used,
      )
      runs = trainer.run([arm], range(self.seeds))
    weights = np.array([_weights(run) for run in runs])
    _draw(weights, self.images.batch_size, self.out / "posterior.png")
    return _table(weights, self.images.batch_size)


def _weights(run: RunRecords) -> np.ndarray:
  """Weights before each step, (steps, num_heads)."""
  return np.array(
    [weights for record in run.epochs for weights in record["head_weights"]]
  )


def _table(weights: np.ndarray, batch_size: int) -> list[str]:
  num_heads = weights.shape[2]
  # Before step t + 1 the switch has just redistributed 1 / (t + 1) of all weight, and
  # gives every head its part of that.
  least = 1 / ((EARLY_STEPS + 1) * num_heads)
  earliest = math.ceil((1 - 1 / num_heads) / (1 - CERTAIN)) - 1
  lines = [
    f"The switch leaves every head at least {least:.3f} after {EARLY_STEPS} steps, and "
    f"lets none pass {CERTAIN} before {earliest * batch_size:,} samples. A head is "
    f"called dead after {EARLY_STEPS} steps if it has less than twice that least.",
    "",
    f"| seed | samples until a weight passes {CERTAIN} | that head | dead after "
    f"{EARLY_STEPS} steps | heaviest at the end | changes of the heaviest head after "
    "that |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for seed, run in enumerate(weights):
    certain = np.flatnonzero(run.max(axis=1) > CERTAIN)
    dead = np.flatnonzero(run[EARLY_STEPS] < 2 * least) + 1
    leader = run.argmax(axis=1)
    first = certain[0] if certain.size else None
    lines.append(
      f"| {seed} | {'never' if first is None else f'{first * batch_size:,}'} | "
      f"{'' if first is None else leader[first] + 1} | "
      f"{', '.join(map(str, dead)) or 'none'} | {leader[-1] + 1} | "
      f"{'' if first is None else np.count_nonzero(np.diff(leader[first:]))} |"
    )
  return lines


def _draw(weights: np.ndarray, batch_size: int, path: Path) -> None:
  """The first run's heads over the first samples, and every run's heaviest."""
  figure, (first, all_runs) = pictures.subplots(2)
  samples = batch_size * np.arange(weights.shape[1])
  colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, weights.shape[2]))
  for head, colour in enumerate(colours):
    first.plot(samples, weights[0, :, head], color=colour, label=f"{head + 1}")
  first.set(
    xlabel="samples",
    ylabel="posterior weight",
    title="seed 0, by head (1: slowest)",
  )
  first.set_xscale("symlog", linthresh=batch_size)
  first.legend(fontsize=7, ncols=2)
  for run in weights:
    all_runs.plot(samples, run.max(axis=1), linewidth=1)
  all_runs.set(xlabel="samples", ylabel="largest weight", title="all seeds")
  all_runs.set_xscale("symlog", linthresh=batch_size)
  all_runs.axhline(CERTAIN, color="0.7", linewidth=0.8)
  all_runs.axvline(4000, color="0.7", linewidth=0.8, linestyle="--")
  pictures.save(figure, path)
