"""Assess, shortlist, then tune: which the papers propose, and do not test.

Many small architectures are put in order by one run of Alrao each, and by two rivals
that tune nothing either: Adam at its default rate, and plain SGD at .1, which a user
who may try just one rate would take, being the one that most recipes start from. The
truth is SGD tuned over seven rates. Its score is taken from other seeds than the order,
so that no run is compared with itself, and on other images than its rate is chosen by.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.optimizers import OPTIMIZERS, SGD_RATES
from benchmarks.planning import refuse
from benchmarks.progress import Display
from benchmarks.results import RunRecords
from benchmarks.studies import optimizers, pictures
from benchmarks.studies.architectures import CIFAR10, DIGITS, Layers
from benchmarks.studies.arms import CHANCE, Images, Trainer
from benchmarks.studies.runner import Arm
from benchmarks.studies.shortlist import (
  SHORTLIST,
  Scores,
  Truth,
  correlations,
  regret,
  tune_by_others,
  with_interval,
)
from benchmarks.studies.study import Study

FIXED_RATE = 0.1
FIXED = SGD_RATES.index(FIXED_RATE)
ONE_RATE = f"SGD {FIXED_RATE:g}"
TUNED = "tuned SGD itself"


@dataclasses.dataclass(frozen=True)
class Ranking(Study):
  """Whether one run of Alrao each puts architectures in the order of tuned SGD."""

  digits: Images = Images("digits", num_train=500, num_held_out=1_000, epochs=8)
  """Images of the many architectures. Half of those held out choose; half score."""
  cifar10: Images = Images(num_train=4_000, num_held_out=4_000, epochs=4)
  """Images of the few."""
  num_digits: int = len(DIGITS)
  """How many of the architectures for digits to take; 0 leaves digits out."""
  num_cifar10: int = len(CIFAR10)
  """How many of those for CIFAR-10; 0 leaves it out."""
  seeds: int = 3
  """Number of runs of each."""
  out: Path = Path("out/studies/ranking")
  """Folder for records, numbers and picture."""

  @property
  def trained_on(self) -> str:
    """What the runs train on."""
    counts = ((self.num_digits, self.digits), (self.num_cifar10, self.cifar10))
    return "; ".join(images.describe() for count, images in counts if count)

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers.

    Raises:
      OptionError: Too few architectures to have an order.
    """
    tasks = {}
    for name, images, known in (
      ("digits", self.digits, DIGITS),
      ("cifar10", self.cifar10, CIFAR10),
    ):
      count = getattr(self, f"num_{name}")
      if count:
        tasks[name] = (images, known[:count])
      if count and not SHORTLIST < count <= len(known):
        rule = f"must be 0, or from {SHORTLIST + 1} to {len(known)}"
        refuse(f"num_{name}", rule, count)
    if not tasks:
      refuse("num_digits", "or --num-cifar10 must be more than 0", "0 for both")
    scores, lines = {}, [*_EXPLANATION]
    with Display() as display:
      for name, (images, networks) in tasks.items():
        trainer = Trainer(
          "ranking", images, self.out, display, 1, halve=True, used=self.used
        )
        scores[name] = _train(trainer, networks, range(self.seeds))
        lines += ["", *_table(f"{len(networks)} networks on {name}", scores[name])]
    _draw(scores, self.out / "ranking.png")
    return lines


def _train(
  trainer: Trainer, networks: Sequence[Layers], seeds: range
) -> dict[str, Scores]:
  """Arrays (networks, seeds) of each method; SGD's (networks, rates, seeds)."""
  found: dict[str, list] = {"Alrao": [], "Adam": [], "SGD": []}
  for network in networks:
    size = {"network": network.title, "body": network}
    alrao = Arm(f"alrao-{network.title}", optimizers.ALRAO, "alrao", **size)
    adam = Arm(f"adam-{network.title}", OPTIMIZERS["adam"], "adam", **size)
    for label, arm in (("Alrao", alrao), ("Adam", adam)):
      found[label].append([_scores(run) for run in trainer.run([arm], seeds)])
    sgd = [
      Arm(f"sgd-{rate:g}-{network.title}", optimizers.SGD, "sgd", rate, **size)
      for rate in SGD_RATES
    ]
    runs = [trainer.run([arm], seeds) for arm in sgd]
    found["SGD"].append([[_scores(run) for run in of_rate] for of_rate in runs])
  return {
    label: Scores(*np.moveaxis(np.array(scores, float), -1, 0))
    for label, scores in found.items()
  }


def _scores(run: RunRecords) -> list[float]:
  """The fields of `Scores`, of one run."""
  summary = run.summary
  # A failed run may have had a good epoch before, which nobody gets by training again.
  if summary["ending"] == "failed" or summary["best_epoch"] is None:
    return [np.inf, CHANCE, np.inf, CHANCE]
  names = ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy")
  return [summary[name] for name in names]


_EXPLANATION = (
  "Tuned SGD: the best of 7 rates by the loss on the images that choose, of the seeds "
  "other than the one that puts in order; its score is on the images that score. "
  "Spearman's correlation with it, mean over the seeds, with its 95 % bootstrap "
  "interval over the networks. The difference to Alrao's is taken on the same "
  "resampled networks. The last row is a run of SGD at that rate, for comparison. A "
  "run that failed is last by loss, and at chance by accuracy.",
  "",
  f"Regret: accuracy lost, in points, by tuning only the first {SHORTLIST} (by "
  "accuracy) and not all; ± is the standard deviation over the seeds, whose truths "
  "overlap, since each is that of the other seeds, so not that of independent "
  "repetitions. Runs: trainings of each network once and of the shortlist at 7 rates, "
  "of those of all networks at 7 rates; by one seed.",
)


def _table(title: str, scores: dict[str, Scores]) -> list[str]:
  lines = [
    f"## {title}",
    "",
    "| in order by one run of | correlation, by accuracy | less Alrao's | by loss | "
    "less Alrao's | regret | runs |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  sgd = scores["SGD"]
  num_networks, num_rates, _ = sgd.loss.shape
  truths = tune_by_others(sgd)
  alrao: dict[str, np.ndarray] = {}
  for label, found in _one_run_each(scores, truths).items():
    cells = []
    for name in ("accuracy", "loss"):
      predicted = getattr(found, name).T
      values = correlations(
        [(p, getattr(t, name)) for p, t in zip(predicted, truths, strict=True)]
      )
      cells.append(_cell(values))
      cells.append(_cell(values - alrao[name], "+") if name in alrao else "")
      alrao.setdefault(name, values)
    lost = [100 * regret(p, t) for p, t in zip(found.accuracy.T, truths, strict=True)]
    cells.append(f"{np.mean(lost):.2f} ± {np.std(lost, ddof=1):.2f}")
    reused = label == ONE_RATE  # one of the seven
    runs = num_networks + SHORTLIST * (num_rates - reused)
    cells.append("" if label == TUNED else f"{runs} of {num_networks * num_rates}")
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  return lines


def _cell(values: np.ndarray, sign: str = "") -> str:
  mean, low, high = with_interval(values)
  return f"{mean:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def _one_run_each(scores: dict[str, Scores], truths: list[Truth]) -> dict[str, Scores]:
  """Arrays (networks, seeds), Alrao's first.

  The last are those of the rates that other seeds have chosen.
  """
  sgd = scores["SGD"]
  rates = np.array([truth.rate for truth in truths]).T
  tuned = [np.take_along_axis(x, rates[:, None], axis=1)[:, 0] for x in sgd]
  return {
    "Alrao": scores["Alrao"],
    "Adam, default": scores["Adam"],
    ONE_RATE: Scores(*(x[:, FIXED] for x in sgd)),
    TUNED: Scores(*tuned),
  }


def _draw(scores: dict[str, dict[str, Scores]], path: Path) -> None:
  """The first seed's runs against what the others say."""
  figure, axes = pictures.subplots(len(scores))
  for axis, (name, found) in zip(axes, scores.items(), strict=True):
    truths = tune_by_others(found["SGD"])
    one_run = _one_run_each(found, truths)
    truth = 100 * truths[0].accuracy
    for marker, label in zip("ox+", one_run, strict=False):
      axis.plot(100 * one_run[label].accuracy[:, 0], truth, marker, label=label)
    ends = [truth.min(), truth.max()]
    axis.plot(ends, ends, color="0.8", linewidth=0.8, zorder=0)
    axis.set(
      xlabel="held-out accuracy of one run, %",
      ylabel="held-out accuracy of tuned SGD, %",
      title=f"{len(truth)} networks on {name}, seed 0",
    )
    axis.legend(fontsize=8)
  pictures.save(figure, path)
