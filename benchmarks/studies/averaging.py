"""The papers' appendix A in numbers: switch, plain Bayes and fixed share.

Plain Bayes is slow to leave a head that was best at first (the catch-up phenomenon);
the switch distribution is meant to be quick. The mean over a mini-batch of the heads'
log-likelihoods is what the papers' authors feed it; their sum is what Bayes asks for.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

import alrao_jax
from benchmarks import pictures
from benchmarks.methods import averaging
from benchmarks.records import Run
from benchmarks.studies._study import (
  LOSSES,
  Arm,
  ImageRunner,
  Images,
  Source,
  Study,
  curves,
)
from benchmarks.tables import markdown, spread

Runs = dict[str, list[Run]]  # by label


@dataclasses.dataclass(frozen=True)
class AveragingStudy(Study[Runs]):
  """How the heads' averaging matters."""

  name = "averaging"
  images: Annotated[Images, tyro.conf.arg(name="")] = Images(num_train=10_000, epochs=6)
  seeds: int = 5
  """Number of runs of each."""
  share: float = 0.01
  """What fixed share redistributes at every step."""
  out: Path = Path("out/studies/averaging")
  """Folder for records, numbers and picture."""

  def find(self, source: Source) -> Runs:
    """Returns runs by averaging.

    Args:
      source: Where all runs come from.
    """
    every_step = self.images.num_train // self.images.batch_size - 1
    runner = ImageRunner(source, self.images, every_step)
    found: Runs = {}
    for how, scale in (("mean", 1.0), ("sum", float(self.images.batch_size))):
      laws = {
        "switch": alrao_jax.switch(likelihood_scale=scale),
        "Bayes": alrao_jax.bayes(likelihood_scale=scale),
        "fixed share": alrao_jax.fixed_share(self.share, likelihood_scale=scale),
      }
      for name, law in laws.items():
        label = f"{name}, {how}"
        arm = f"{label}, {self.share:g}" if name == "fixed share" else label
        arm = arm.replace(", ", "-").replace(" ", "-")
        runs = runner.run([Arm(arm, averaging(law), label)], range(self.seeds))
        found[label] = runs
    return found

  def table(self, found: Runs) -> list[str]:
    """Returns losses, and how often the heaviest head changes.

    Args:
      found: The runs.
    """
    rows = []
    for label, runs in found.items():
      changes = [np.count_nonzero(np.diff(_leaders(run))) for run in runs]
      train, held_out = (curves(runs, name) for name in LOSSES)
      cells = [spread(losses, 4) for losses in (train[:, 0], train[:, -1])]
      rows.append(
        [label, *cells, spread(held_out[:, -1], 4), f"{np.mean(changes):.1f}"]
      )
    header = [
      "averaging",
      "first epoch's train loss",
      "last train loss",
      "last held-out loss",
      "changes of the heaviest head",
    ]
    return [
      "The first epoch's train loss is sequential: each batch is predicted before it "
      "is learned from.",
      "",
      *markdown(header, rows),
    ]

  def draw(self, found: Runs, path: Path) -> None:
    """Draws mean losses by epoch.

    Args:
      found: The runs.
      path: The PNG file.
    """
    figure, axes = pictures.subplots(2)
    for axis, (name, title) in zip(axes, LOSSES.items(), strict=True):
      for label, runs in found.items():
        losses = curves(runs, name).mean(axis=0)
        style = "-" if label.endswith("mean") else "--"
        axis.plot(np.arange(1, len(losses) + 1), losses, style, label=label)
      axis.set(xlabel="epoch", ylabel="loss", title=title)
      axis.legend(fontsize=8)
    pictures.save(figure, path)


def _leaders(run: Run) -> np.ndarray:
  """The heaviest head by step; an archive keeps the steps next to its changes."""
  weights = [weights for record in run.epochs for weights in record["head_weights"]]
  return np.argmax(weights, axis=1)


STUDY = AveragingStudy
