"""Orders of networks: by one run of each, and by SGD tuned over its rates."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

SHORTLIST = 3
NUM_RESAMPLES = 2000


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


def correlation(one: np.ndarray, other: np.ndarray) -> float:
  """Returns Spearman's rank correlation; 0 where all of one are equal, so no order.

  Args:
    one: Scores, (n,).
    other: Others of the same, (n,).
  """
  ranks = rankdata([one, other], axis=1)
  return 0.0 if (np.ptp(ranks, axis=1) == 0).any() else np.corrcoef(ranks)[0, 1]


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
  return np.array(
    [
      np.mean([correlation(*pair[:, networks]) for pair in stacked])
      for networks in (np.arange(count), *drawn)
    ]
  )


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


def tune_by_others(sgd: Scores) -> list[Truth]:
  """Returns for each seed what the others say, so that no run meets itself.

  Args:
    sgd: SGD's scores, (networks, rates, seeds).
  """
  seeds = range(sgd.loss.shape[2])
  return [tune(sgd, [other for other in seeds if other != seed]) for seed in seeds]
