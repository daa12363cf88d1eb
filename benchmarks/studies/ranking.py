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
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from scipy.stats import rankdata

from benchmarks import pictures
from benchmarks.console import refuse
from benchmarks.methods import ALRAO, METHODS, SGD, SGD_RATES
from benchmarks.models.layers import ConvBlock
from benchmarks.records import Run
from benchmarks.studies._study import CHANCE, Arm, ImageRunner, Images, Source, Study
from benchmarks.tables import markdown, spread

FIXED_RATE = 0.1
FIXED = SGD_RATES.index(FIXED_RATE)
ONE_RATE = f"SGD {FIXED_RATE:g}"
TUNED = "tuned SGD itself"
SHORTLIST = 3
NUM_RESAMPLES = 2000

Kind = Literal["mlp", "cnn"]
Activation = Literal["relu", "tanh"]


# --- Networks


class Layers(nn.Module):
  """Alike layers, each with batch normalisation and an activation.

  Attributes:
    kind: ``"mlp"``, dense layers on all pixels, or ``"cnn"``, 3x3 convolutions of
      stride 2.
    depth: Number of layers.
    features: Units of each, or channels.
    activation: ``"relu"`` or ``"tanh"``.
  """

  kind: Kind
  depth: int
  features: int
  activation: Activation = "relu"

  @property
  def title(self) -> str:
    """A name that no other has."""
    return f"{self.kind}-{self.depth}x{self.features}-{self.activation}"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, channels) to (batch, ..., `features`)."""
    x = images if self.kind == "cnn" else images.reshape(len(images), 1, 1, -1)
    for _ in range(self.depth):
      if self.kind == "cnn":
        x = ConvBlock(self.features, strides=2, activate=False)(x, train=train)
      else:
        x = nn.Dense(self.features)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
      x = nn.relu(x) if self.activation == "relu" else nn.tanh(x)
    return x


def _grid(
  kind: Kind,
  depths: Sequence[int],
  widths: Sequence[int],
  activations: Sequence[Activation],
) -> tuple[Layers, ...]:
  return tuple(
    Layers(kind, depth, features, activation)
    for depth in depths
    for features in widths
    for activation in activations
  )


DIGITS = (
  *_grid("mlp", (1, 2, 3), (8, 64), ("relu", "tanh")),
  *_grid("cnn", (1, 2, 3), (4, 16), ("relu", "tanh")),
)
CIFAR10 = (
  *_grid("mlp", (1, 3), (16, 128), ("relu",)),
  *_grid("cnn", (1, 3), (8, 32), ("relu",)),
)


# --- Orders


class Scores(NamedTuple):
  """What one kind of run has reached.

  Attributes:
    loss: On the images that choose, at the epoch where it is least; inf if it failed.
    accuracy: On the same images, at the same epoch; chance if it failed.
    scored_loss: Like `loss`, at the same epoch, on the images that score.
    scored_accuracy: Like `accuracy`, likewise.
  """

  loss: np.ndarray
  accuracy: np.ndarray
  scored_loss: np.ndarray
  scored_accuracy: np.ndarray


class Truth(NamedTuple):
  """SGD at its best rate.

  Attributes:
    rate: Index of the rate, (networks,): of least mean loss on the images that choose.
    chosen_by: That loss.
    loss: Mean loss on the images that score, (networks,).
    accuracy: Mean accuracy on them.
  """

  rate: np.ndarray
  chosen_by: np.ndarray
  loss: np.ndarray
  accuracy: np.ndarray


def scores_of(run: Run) -> list[float]:
  """Returns the fields of `Scores`.

  Args:
    run: A run.
  """
  summary = run.summary
  # A failed run may have had a good epoch before, which nobody gets by training again.
  if run.failed or summary["best_epoch"] is None:
    return [np.inf, CHANCE, np.inf, CHANCE]
  names = ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy")
  return [summary[name] for name in names]


def tune(sgd: Scores, seeds: Sequence[int]) -> Truth:
  """Returns SGD at its best rate, by some of the seeds.

  Args:
    sgd: Its scores, (networks, rates, seeds).
    seeds: Which seeds.
  """
  part = Scores(*(values[:, :, list(seeds)].mean(axis=2) for values in sgd))
  rate = part.loss.argmin(axis=1)
  index = (np.arange(len(rate)), rate)
  return Truth(
    rate, part.loss[index], part.scored_loss[index], part.scored_accuracy[index]
  )


def tune_by_others(sgd: Scores) -> list[Truth]:
  """Returns for each seed what the others say, so that no run meets itself.

  Args:
    sgd: SGD's scores, (networks, rates, seeds).
  """
  seeds = range(sgd.loss.shape[2])
  return [tune(sgd, [other for other in seeds if other != seed]) for seed in seeds]


def correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Returns Spearman's rank correlation; 0 where all of one are equal, so no order.

  Args:
    one: Scores, (..., n).
    other: Others of the same, (..., n).

  Returns:
    Correlations, (...).
  """
  # The mean of n ranks is (n + 1) / 2 exactly, so equal ones end at exactly 0.
  one, other = (
    rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2 for values in (one, other)
  )
  product, size = (one * other).sum(-1), np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
  return np.divide(product, size, out=np.zeros_like(size), where=size > 0)


def correlations(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
  """Returns the mean correlation of pairs of scores, also when networks are resampled.

  Which networks a sample has depends on their number alone. So what two methods have
  there is paired, and their difference is one of the same networks.

  Args:
    pairs: Scores and true scores of the same networks, (networks,) each; a pair a seed.

  Returns:
    (1 + NUM_RESAMPLES,): of all networks; then of as many, drawn with replacement.
  """
  stacked = np.array(pairs)  # (seeds, 2, networks)
  count, generator = stacked.shape[2], np.random.default_rng(0)
  drawn = generator.integers(count, size=(NUM_RESAMPLES, count))
  networks = np.vstack([np.arange(count), drawn])
  one, other = np.moveaxis(stacked[:, :, networks], 1, 0)  # (seeds, samples, count)
  return correlation(one, other).mean(axis=0)


def with_interval(values: np.ndarray) -> list[float]:
  """Returns a number, and the bounds of its 95 % bootstrap interval.

  Args:
    values: What `correlations` returned, or the difference of two.
  """
  return [float(values[0]), *np.percentile(values[1:], [2.5, 97.5]).tolist()]


def regret(order: np.ndarray, truth: Truth) -> float:
  """Returns the accuracy lost by tuning the shortlist only.

  Args:
    order: What the shortlist has most of, (networks,).
    truth: Tuned SGD. Of what is tuned, the network of least loss on the images that
      choose is taken.
  """
  shortlist = np.argsort(-order, kind="stable")[:SHORTLIST]
  taken = shortlist[truth.chosen_by[shortlist].argmin()]
  return float(truth.accuracy[truth.chosen_by.argmin()] - truth.accuracy[taken])


# --- The study

# By data set and method, (networks, seeds); SGD's (networks, rates, seeds).
AllScores = dict[str, dict[str, Scores]]


@dataclasses.dataclass(frozen=True)
class RankingStudy(Study[AllScores]):
  """Whether one run of Alrao each puts architectures in the order of tuned SGD."""

  name = "ranking"
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

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: Too few architectures to have an order.
    """
    super().check()
    for name, known in (("num_digits", DIGITS), ("num_cifar10", CIFAR10)):
      count = getattr(self, name)
      if count and not SHORTLIST < count <= len(known):
        refuse(name, f"must be 0, or from {SHORTLIST + 1} to {len(known)}", count)
    if not self.num_digits and not self.num_cifar10:
      refuse("num_digits", "or --num-cifar10 must be more than 0", "0 for both")

  def find(self, source: Source) -> AllScores:
    """Returns scores by data set and method.

    Args:
      source: Where all runs come from.
    """
    found: AllScores = {}
    for name, images, networks in (
      ("digits", self.digits, DIGITS[: self.num_digits]),
      ("cifar10", self.cifar10, CIFAR10[: self.num_cifar10]),
    ):
      if networks:
        runner = ImageRunner(source, images, 1, halve=True)
        found[name] = _scores(runner, networks, range(self.seeds))
    return found

  def table(self, found: AllScores) -> list[str]:
    """Returns correlations and regrets of each order.

    Args:
      found: The scores.
    """
    lines = [
      "Tuned SGD: the best of 7 rates by the loss on the images that choose, of the "
      "seeds other than the one that puts in order; its score is on the images that "
      "score. Spearman's correlation with it, mean over the seeds, with its 95 % "
      "bootstrap interval over the networks. The difference to Alrao's is taken on the "
      "same resampled networks. The last row is a run of SGD at that rate, for "
      "comparison. A run that failed is last by loss, and at chance by accuracy.",
      "",
      f"Regret: accuracy lost, in points, by tuning only the first {SHORTLIST} (by "
      "accuracy) and not all; ± is the standard deviation over the seeds, whose truths "
      "overlap, since each is that of the other seeds, so not that of independent "
      "repetitions. Runs: trainings of each network once and of the shortlist at 7 "
      "rates, of those of all networks at 7 rates; by one seed.",
    ]
    for name, scores in found.items():
      count = len(scores["SGD"].loss)
      lines += ["", f"## {count} networks on {name}", "", *_table(scores)]
    return lines

  def draw(self, found: AllScores, path: Path) -> None:
    """Draws the first seed's runs against what the others say.

    Args:
      found: The scores.
      path: The PNG file.
    """
    figure, axes = pictures.subplots(len(found))
    for axis, (name, scores) in zip(axes, found.items(), strict=True):
      truths = tune_by_others(scores["SGD"])
      one_run = _one_run_each(scores, truths)
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


def _scores(
  runner: ImageRunner, networks: Sequence[Layers], seeds: range
) -> dict[str, Scores]:
  """Scores of each method on some networks."""
  found: dict[str, list] = {"Alrao": [], "Adam": [], "SGD": []}
  for network in networks:
    title = network.title
    size: dict[str, Any] = {"network": title, "body": network}
    alrao = Arm(f"alrao-{title}", ALRAO, "alrao", **size)
    adam = Arm(f"adam-{title}", METHODS["adam"], "adam", **size)
    for label, arm in (("Alrao", alrao), ("Adam", adam)):
      found[label].append([scores_of(run) for run in runner.run([arm], seeds)])
    sgd = [Arm(f"sgd-{rate:g}-{title}", SGD, "sgd", rate, **size) for rate in SGD_RATES]
    found["SGD"].append(
      [[scores_of(run) for run in runner.run([arm], seeds)] for arm in sgd]
    )
  return {
    label: Scores(*np.moveaxis(np.array(scores, float), -1, 0))
    for label, scores in found.items()
  }


def _table(scores: dict[str, Scores]) -> list[str]:
  sgd = scores["SGD"]
  num_networks, num_rates, _ = sgd.loss.shape
  truths = tune_by_others(sgd)
  alrao: dict[str, np.ndarray] = {}
  rows = []
  for label, found in _one_run_each(scores, truths).items():
    cells = [label]
    for name in ("accuracy", "loss"):
      predicted = getattr(found, name).T
      values = correlations(
        [(p, getattr(t, name)) for p, t in zip(predicted, truths, strict=True)]
      )
      cells.append(_cell(values))
      cells.append(_cell(values - alrao[name], "+") if name in alrao else "")
      alrao.setdefault(name, values)
    lost = [regret(p, t) for p, t in zip(found.accuracy.T, truths, strict=True)]
    cells.append(spread(lost, 2, 100))
    reused = label == ONE_RATE  # one of the seven
    runs = num_networks + SHORTLIST * (num_rates - reused)
    cells.append("" if label == TUNED else f"{runs} of {num_networks * num_rates}")
    rows.append(cells)
  header = [
    "in order by one run of",
    "correlation, by accuracy",
    "less Alrao's",
    "by loss",
    "less Alrao's",
    "regret",
    "runs",
  ]
  return markdown(header, rows)


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


STUDY = RankingStudy
