"""Who stands where: losses relative to the best tuned optimizer, from the records."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.records import Record

Runs = Mapping[str, Sequence[Record]]  # of one task, by method
Costs = Mapping[str, float]  # of one task: time of a step, in SGD's


class Result(NamedTuple):
  """A method on a task.

  Attributes:
    losses: Test loss of each seed, at its rate; one that failed has the loss of knowing
      nothing.
    rate: The rate that did best on held-out data, None if it takes none.
    failures: Number of seeds that ended no better than knowing nothing.
  """

  losses: tuple[float, ...]
  rate: float | None
  failures: int

  @property
  def mean(self) -> float:
    """Mean over seeds."""
    return float(np.mean(self.losses))


def result(runs: Sequence[Record], cost: float = 1.0) -> Result:
  """Returns a method's result on a task, at the best of its rates.

  Args:
    runs: All its runs on the task.
    cost: Time of a step as a multiple of that which the budget allows: the loss is read
      off the curve at the last step divided by it.
  """
  by_rate: dict[float | None, list[Record]] = {}
  for run in runs:
    by_rate.setdefault(run["rate"], []).append(run)

  def held_out(rate: float | None) -> float:
    return float(np.mean([_at(run, "validation_loss", cost) for run in by_rate[rate]]))

  best = min(by_rate, key=held_out)
  losses = tuple(_at(run, "test_loss", cost) for run in by_rate[best])
  chances = [run["chance"] for run in by_rate[best]]
  failures = sum(loss >= chance for loss, chance in zip(losses, chances, strict=True))
  return Result(losses, best, failures)


def relative(
  runs: Runs, tuned: Sequence[str], costs: Costs | None = None
) -> dict[str, float]:
  """Returns each method's mean loss on a task, relative to the best tuned one's.

  Args:
    runs: The task's runs by method.
    tuned: The methods of which the best counts 1.
    costs: At equal compute, the time of each method's step in SGD's.
  """
  means = {
    name: result(kept, 1.0 if costs is None else costs[name]).mean
    for name, kept in runs.items()
  }
  best = min(means[name] for name in tuned if name in means)
  return {name: mean / best for name, mean in means.items()}


def geometric_mean(values: Sequence[float]) -> float:
  """Returns the geometric mean of positive numbers.

  Args:
    values: The numbers.

  Example:
    >>> geometric_mean([1.0, 4.0])
    2.0
  """
  return math.exp(sum(map(math.log, values)) / len(values))


def _at(run: Record, name: str, cost: float) -> float:
  """The loss when the budget is spent, at most that of knowing nothing."""
  chance = run["chance"]
  curve = [chance if x is None else min(x, chance) for x in run[name]]
  budget = run["steps"][-1] / max(cost, 1.0)
  return float(np.interp(budget, [0, *run["steps"]], [chance, *curve]))
