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
from benchmarks.progress import Display
from benchmarks.results import RunRecords
from benchmarks.studies import optimizers, pictures
from benchmarks.studies.arms import Images, Trainer
from benchmarks.studies.runner import Arm
from benchmarks.studies.study import Study


@dataclasses.dataclass(frozen=True)
class Averaging(Study):
  """How the heads' averaging matters."""

  images: Annotated[Images, tyro.conf.arg(name="")] = Images(num_train=10_000, epochs=6)
  seeds: int = 5
  """Number of runs of each."""
  share: float = 0.01
  """What fixed share redistributes at every step."""
  out: Path = Path("out/studies/averaging")
  """Folder for records, numbers and picture."""

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers."""
    arms = []
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
        arms.append(Arm(arm, optimizers.averaging(law), label))
    with Display() as display:
      every_step = self.images.num_train // self.images.batch_size - 1
      trainer = Trainer(
        "averaging", self.images, self.out, display, every_step, used=self.used
      )
      runs = trainer.run(arms, range(self.seeds))
    by_arm = {
      arm.compiled: [run for run in runs if run.config["arm"] == arm.name]
      for arm in arms
    }
    _draw(by_arm, self.out / "averaging.png")
    return _table(by_arm)


def _table(by_arm: dict[str, list[RunRecords]]) -> list[str]:
  lines = [
    "The first epoch's train loss is sequential: each batch is predicted before it is "
    "learned from.",
    "",
    "| averaging | first epoch's train loss | last train loss | last held-out loss | "
    "changes of the heaviest head |",
    "| --- | --- | --- | --- | --- |",
  ]
  for label, runs in by_arm.items():
    changes = [np.count_nonzero(np.diff(_leaders(run))) for run in runs]
    columns = [
      [run.epochs[0]["train_loss"] for run in runs],
      [run.epochs[-1]["train_loss"] for run in runs],
      [run.epochs[-1]["validation_loss"] for run in runs],
    ]
    arrays = [np.array(column, float) for column in columns]
    cells = [f"{c.mean():.4f} ± {c.std(ddof=1):.4f}" for c in arrays]
    lines.append(f"| {label} | " + " | ".join(cells) + f" | {np.mean(changes):.1f} |")
  return lines


def _leaders(run: RunRecords) -> np.ndarray:
  weights = [weights for record in run.epochs for weights in record["head_weights"]]
  return np.argmax(weights, axis=1)


def _draw(by_arm: dict[str, list[RunRecords]], path: Path) -> None:
  figure, axes = pictures.subplots(2)
  for axis, part in zip(axes, ("train", "validation"), strict=True):
    for label, runs in by_arm.items():
      values = [[record[f"{part}_loss"] for record in run.epochs] for run in runs]
      losses = np.array(values, float).mean(axis=0)
      style = "-" if label.endswith("mean") else "--"
      axis.plot(np.arange(1, len(losses) + 1), losses, style, label=label)
    axis.set(
      xlabel="epoch",
      ylabel="loss",
      title={"train": "train", "validation": "held-out"}[part],
    )
    axis.legend(fontsize=8)
  pictures.save(figure, path)
