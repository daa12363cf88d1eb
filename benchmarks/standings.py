"""The arena: how methods compare on short tasks, and the tables that show it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.methods import ARENA, METHODS, Method
from benchmarks.records import Record, Run, conditions_of_all
from benchmarks.tables import MISSING, markdown

COMMAND = "python -m benchmarks sweep arena"


class Result(NamedTuple):
  """A method on a short task.

  Attributes:
    losses: Test loss of each seed, at its rate; a seed that failed has the loss of
      knowing nothing.
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


def result(runs: Sequence[Run], cost: float = 1.0) -> Result:
  """Returns a method's result on a task, at the best of its rates.

  Args:
    runs: All its runs on the task.
    cost: Time of a step as a multiple of that which the budget allows: the loss is read
      off the curve at the last step divided by it.
  """
  by_rate: dict[float | None, list[Run]] = {}
  for run in runs:
    by_rate.setdefault(run.config["rate"], []).append(run)

  def held_out(rate: float | None) -> float:
    return float(np.mean([_at(run, "validation_loss", cost) for run in by_rate[rate]]))

  best = min(by_rate, key=held_out)
  losses = tuple(_at(run, "test_loss", cost) for run in by_rate[best])
  chances = [run.config["chance"] for run in by_rate[best]]
  failures = sum(loss >= chance for loss, chance in zip(losses, chances, strict=True))
  return Result(losses, best, failures)


def relative(
  results: Mapping[str, Result | None], tuned: Iterable[str]
) -> dict[str, float]:
  """Returns each method's mean loss on a task, relative to the best tuned one's.

  Args:
    results: By method; None where it has not been measured.
    tuned: The methods of which the best counts 1.

  Returns:
    By method; without those that have not been measured, and empty if no tuned one has.
  """
  means = {name: found.mean for name, found in results.items() if found is not None}
  best = min((means[name] for name in tuned if name in means), default=None)
  return {} if best is None else {name: mean / best for name, mean in means.items()}


def geometric_mean(values: Sequence[float]) -> float:
  """Returns the geometric mean of positive numbers.

  Args:
    values: The numbers.

  Example:
    >>> geometric_mean([1.0, 4.0])
    2.0
  """
  return math.exp(sum(map(math.log, values)) / len(values))


class Standing(NamedTuple):
  """How a method does over all tasks.

  Attributes:
    name: The method.
    ratios: By task, its loss relative to the best tuned one's; None: not measured.
    failures: Number of failed runs; None: no run.
  """

  name: str
  ratios: dict[str, float | None]
  failures: int | None

  @property
  def mean(self) -> float | None:
    """Geometric mean over tasks, if it has been measured on all."""
    values = [value for value in self.ratios.values() if value is not None]
    return geometric_mean(values) if len(values) == len(self.ratios) else None

  @property
  def worst(self) -> float | None:
    """The largest ratio, if it has been measured on all tasks."""
    values = [value for value in self.ratios.values() if value is not None]
    return max(values) if len(values) == len(self.ratios) else None


class Arena:
  """The standings of methods on short tasks, from their records.

  Attributes:
    tasks: The tasks that anything has been trained on.
    methods: The arena's methods, by name, measured or not.
    runs: By task and method.
    costs: By task and method, the time of a step in SGD's.
  """

  def __init__(
    self,
    labels: Mapping[str, str],
    runs: Iterable[Run],
    costs: Iterable[Record],
    methods: Sequence[str] = ARENA,
  ):
    """Sorts the records.

    Args:
      labels: The tasks' names in tables, by name, in order.
      runs: The runs.
      costs: The times of steps.
      methods: Names of the methods.
    """
    self._labels, self._records = labels, [list(runs), list(costs)]
    self.methods: dict[str, Method] = {name: METHODS[name] for name in methods}
    self.runs: dict[str, dict[str, list[Run]]] = {}
    self.costs: dict[str, dict[str, float]] = {}
    for run in self._records[0]:
      of_task = self.runs.setdefault(run.config["task"], {})
      of_task.setdefault(run.config["optimizer"], []).append(run)
    for cost in self._records[1]:
      self.costs.setdefault(cost["task"], {})[cost["optimizer"]] = cost["ratio"]
    self.tasks = [name for name in labels if name in self.runs]

  @property
  def tuned(self) -> list[str]:
    """The methods of which the best of several rates counts."""
    return [name for name, method in self.methods.items() if len(method.rates) > 1]

  @property
  def missing_costs(self) -> list[str]:
    """Which times of steps have not been measured, as TASK/METHOD."""
    return [
      f"{task}/{name}"
      for task in self.tasks
      for name in self.methods
      if name in self.runs[task] and name not in self.costs.get(task, {})
    ]

  def result(self, task: str, name: str, *, equal_compute: bool = False):
    """Returns a method's `Result` on a task, or None where a record is missing.

    Args:
      task: The task.
      name: The method.
      equal_compute: Whether to stop when SGD's steps would have taken the time.
    """
    runs = self.runs[task].get(name)
    cost = self.costs.get(task, {}).get(name) if equal_compute else 1.0
    return None if runs is None or cost is None else result(runs, cost)

  def standings(self, *, equal_compute: bool = False) -> list[Standing]:
    """Returns the methods, least geometric mean first, those without one last.

    Args:
      equal_compute: As in `result`.
    """
    ratios: dict[str, dict[str, float]] = {}
    for task in self.tasks:
      found = {
        name: self.result(task, name, equal_compute=equal_compute)
        for name in self.methods
      }
      ratios[task] = relative(found, self.tuned)
    standings = []
    for name in self.methods:
      counts = [self.result(task, name) for task in self.tasks]
      counts = [one.failures for one in counts if one is not None]
      by_task = {task: ratios[task].get(name) for task in self.tasks}
      standings.append(Standing(name, by_task, sum(counts) if counts else None))
    return sorted(standings, key=lambda one: math.inf if one.mean is None else one.mean)

  def lines(self) -> list[str]:
    """Returns the tables' Markdown; what has not been measured shows as such."""
    if not self.tasks:
      return ["No task has been trained yet."]
    labels = [self._labels[task] for task in self.tasks]
    measured = [
      len(found.losses)
      for task in self.tasks
      for name in self.methods
      if (found := self.result(task, name)) is not None
    ]
    count = "/".join(map(str, sorted(set(measured))))
    lines = [
      "Test losses relative to the better of the tuned optimizers, means of "
      f"{count} runs; below 1 is better than any tuned rate. A run that fails (ends no "
      "better than knowing nothing) counts with the loss of knowing nothing. Held-out "
      f"data chooses the tuned rates. {MISSING}: not measured.",
      *self._section("Equal steps", labels, self.standings()),
    ]
    if any(self.costs.get(task) for task in self.tasks):
      lines += self._section(
        "Equal compute", labels, self.standings(equal_compute=True)
      )
      lines += [
        "",
        "What a run has reached when SGD's steps would have taken their whole time, "
        "read off its curve. The curve has eight points, and before the first one it "
        "is a line from the loss of knowing nothing: that is rough for steps many "
        "times as long. The seven runs of a tuned optimizer count as one.",
        "",
        "### Time of a step, in SGD's",
        "",
        *markdown(
          ["method", *labels],
          (
            [method.label, *(self._cost(task, name) for task in self.tasks)]
            for name, method in self.methods.items()
          ),
        ),
      ]
    if self.missing_costs:
      names = ", ".join(self.missing_costs)
      methods = " ".join(
        name
        for name in self.methods
        if any(one.endswith(f"/{name}") for one in self.missing_costs)
      )
      lines += [
        "",
        f"Times of steps that have not been measured: {names}. `{COMMAND} --methods "
        f"{methods}` and `python -m benchmarks collect arena` add them.",
      ]
    lines += [
      "",
      "### Test losses, and the rates chosen",
      "",
      *markdown(
        ["method", *labels],
        (
          [method.label, *(self._loss(task, name) for task in self.tasks)]
          for name, method in self.methods.items()
        ),
      ),
      "",
      "### Settings",
      "",
      *(f"- **{method.label}**: {method.source}" for method in self.methods.values()),
      "",
      f"`{COMMAND}`; "
      + conditions_of_all(
        run.summary
        for task in self.tasks
        for kept in self.runs[task].values()
        for run in kept
      ),
    ]
    timed = [cost for cost in self._records[1] if cost["task"] in self.tasks]
    if timed:
      lines += ["", f"Times of steps: {conditions_of_all(timed)}"]
    return lines

  def _section(
    self, title: str, labels: list[str], standings: list[Standing]
  ) -> list[str]:
    header = ["method", *labels, "geometric mean", "worst", "failures"]
    rows = []
    for one in standings:
      values = [*one.ratios.values(), one.mean, one.worst]
      cells = [MISSING if value is None else f"{value:.3f}" for value in values]
      failures = MISSING if one.failures is None else str(one.failures)
      rows.append([self.methods[one.name].label, *cells, failures])
    return ["", f"### {title}", "", *markdown(header, rows)]

  def _cost(self, task: str, name: str) -> str:
    found = self.costs.get(task, {}).get(name)
    return MISSING if found is None else f"{found:.2f}"

  def _loss(self, task: str, name: str) -> str:
    found = self.result(task, name)
    if found is None:
      return MISSING
    rate = f" ({found.rate:g})" if name in self.tuned else ""
    return f"{found.mean:.3f}{rate}"


def points(config: Record) -> np.ndarray:
  """Returns the steps at which a short task's curve has been measured.

  Args:
    config: The options of one of its runs.
  """
  count = config["max_epochs"]
  return np.linspace(0, config["num_steps"], count + 1).astype(int)[1:]


def _at(run: Run, name: str, cost: float) -> float:
  """The loss when the budget is spent, at most that of knowing nothing."""
  chance, steps = run.config["chance"], points(run.config)
  values = [epoch[name] for epoch in run.epochs]
  curve = [chance if value is None else min(value, chance) for value in values]
  curve += [chance] * (len(steps) - len(curve))  # a run that failed has ended early
  budget = steps[-1] / max(cost, 1.0)
  return float(np.interp(budget, [0, *steps], [chance, *curve]))
