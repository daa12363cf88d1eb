"""The search that found schedule-free Alrao: its table, from the records of its runs.

The search is finished: it is a result, and its runs are not made again. It went from
choice to choice, on the four tasks of `SEARCH_TASKS`: each alternative was measured
against the best so far, and kept if it gained more than `MARGIN`. The records say
which were kept, so the table goes through the choices again.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import records
from benchmarks.records import RESULTS, RecordError, Run
from benchmarks.tables import markdown
from benchmarks.workloads.short import SEARCH_TASKS

# What a choice must gain: one percent of the loss. Losses of runs that differ in
# rounding only, of an unnormalised network, came out two percent apart.
MARGIN = 0.01
SEARCH_SEED = 0
CONFIRM_SEEDS = (1, 2)
PEER = "schedule_free_adamw"

# The numbers of a candidate, with which the search began: Alrao on Adam with an average
# over the last hundred steps. The powers are those of the root of average squares by
# which gradients of units and of heads are divided (Adam: 1, SGD: 0); low to head_high
# are intervals of rates; b1 and b2 are Adam's; gradients are taken at (1 - beta) z +
# beta x, with the average x of what the base's steps reach, z; step t has the weight
# t^gamma in x, and the newest at least `share`; the units' interval contracts by the
# posterior, or after some steps, to `narrowest` of its width, around `offset` times the
# posterior's rate; likelihood_scale is the switch's; all rates fall after cool_after.
START: dict[str, float] = {
  "power": 1.0,
  "head_power": 1.0,
  "low": 1e-5,
  "high": 1e-1,
  "head_low": 1e-5,
  "head_high": 1e-1,
  "b1": 0.9,
  "b2": 0.999,
  "beta": 0.0,
  "gamma": 0.0,
  "share": 0.01,
  "narrowest": 1.0,
  "by_posterior": 0.0,
  "narrow_after": 1e9,
  "offset": 1.0,
  "likelihood_scale": 1.0,
  "cool_after": 1e9,
  "weight_decay": 0.0,
}


def interval(low: float, high: float) -> dict[str, float]:
  """Returns the numbers of one interval for units and heads.

  Args:
    low: Lower bound.
    high: Upper bound.
  """
  return {"low": low, "high": high, "head_low": low, "head_high": high}


SGD = {"power": 0.0, "head_power": 0.0}
SCHEDULE_FREE = {"b1": 0.0, "beta": 0.9, "share": 0.0}

COORDINATES: dict[str, tuple[dict[str, Any], ...]] = {
  "base and interval": (
    {**SGD, "b1": 0.0, **interval(1e-5, 10.0)},
    # With the mean of gradients in place of momentum's sum, ten times as fast.
    {**SGD, "b1": 0.9, **interval(1e-5, 10.0)},
    interval(1e-6, 1.0),
    interval(1e-4, 1e-1),
    interval(1e-5, 1e-2),
  ),
  "average": (
    {"share": 1.0},
    {"share": 0.0},
    {"share": 0.0, "gamma": 8.0},
    SCHEDULE_FREE,
    {**SCHEDULE_FREE, "gamma": 2.0},
  ),
  "contraction": (
    {"by_posterior": 1.0, "narrowest": 0.5},
    {"by_posterior": 1.0, "narrowest": 0.2},
    {"by_posterior": 1.0, "narrowest": 0.1},
    {"narrow_after": 20.0, "narrowest": 0.2},
  ),
  "where the units' rates go": ({"offset": 0.3}, {"offset": 3.0}),
  "interval": (interval(1e-4, 1.0), interval(1e-5, 1e-1), interval(1e-3, 1e-1)),
  "likelihood_scale": ({"likelihood_scale": 0.3}, {"likelihood_scale": 4.0}),
  "average of squares": ({"b2": 0.99}, {"b2": 0.95}),
  "interpolation": ({"beta": 0.8}, {"beta": 0.95}),
  "cooldown": ({"cool_after": 100.0}, {"cool_after": 400.0}),
  "heads": (
    {"head_power": 0.0, "head_low": 1e-5, "head_high": 10.0},
    {"head_low": 1e-3, "head_high": 1e-1},
  ),
  "weight decay": ({"weight_decay": 0.01}, {"weight_decay": 0.1}),
  "width in the end": ({"narrowest": 0.05}, {"narrowest": 0.0}),
}


class Trial(NamedTuple):
  """A candidate that was tried.

  Attributes:
    coordinate: The choice.
    changes: What it changes in the best so far.
    numbers: The candidate's numbers.
    ratios: Its loss by task, relative to Adam's at its best rate.
    score: Mean logarithm of `ratios`.
    adopted: Whether the search went on with it.
  """

  coordinate: str
  changes: dict[str, float]
  numbers: dict[str, float]
  ratios: dict[str, float]
  score: float
  adopted: bool


class Losses:
  """Last held-out losses of the search's runs, infinity where one failed."""

  def __init__(self, runs: Sequence[Run]):
    """Sorts the runs.

    Args:
      runs: The runs.
    """
    self.tasks = [task for task in SEARCH_TASKS if any(
      run.config["task"] == task for run in runs
    )]  # fmt: skip
    self.count = len(runs)
    self._losses: dict[tuple, float] = {}
    self._rates: dict[str, list[float]] = {}
    for run in runs:
      config, last = run.config, run.epochs[-1]["validation_loss"]
      rate = config["rate"]
      self._losses[
        self._key(config["task"], config["optimizer"], rate, config["seed"])
      ] = math.inf if last is None else last
      if config["optimizer"] == "adam" and config["seed"] == SEARCH_SEED:
        self._rates.setdefault(config["task"], []).append(rate)

  def candidate(
    self, numbers: Mapping[str, float], task: str, seed: int = SEARCH_SEED
  ) -> float:
    """Returns a candidate's loss on a task.

    Args:
      numbers: The candidate's numbers.
      task: Name of the task.
      seed: Seed of the run.
    """
    return self._loss(task, "candidate", numbers, seed)

  def reference(self, task: str) -> tuple[float, float]:
    """Returns the best of Adam's rates on a task, and its loss.

    Args:
      task: Name of the task.
    """
    losses = {rate: self.adam(task, rate) for rate in self._rates[task]}
    best = min(losses, key=lambda rate: losses[rate])
    return best, losses[best]

  def adam(self, task: str, rate: float, seed: int = SEARCH_SEED) -> float:
    """Returns Adam's loss.

    Args:
      task: Name of the task.
      rate: Learning rate.
      seed: Seed of the run.
    """
    return self._loss(task, "adam", rate, seed)

  def peer(self, task: str, seed: int = SEARCH_SEED) -> float:
    """Returns schedule-free AdamW's loss, at its defaults.

    Args:
      task: Name of the task.
      seed: Seed of the run.
    """
    return self._loss(task, PEER, None, seed)

  def _loss(self, task: str, optimizer: str, rate: Any, seed: int) -> float:
    try:
      return self._losses[self._key(task, optimizer, rate, seed)]
    except KeyError:
      raise RecordError(
        f"the search's records lack the run of {optimizer} at {rate} on {task}, seed "
        f"{seed}."
      ) from None

  @staticmethod
  def _key(task: str, optimizer: str, rate: Any, seed: int) -> tuple:
    known = tuple(sorted(rate.items())) if isinstance(rate, Mapping) else rate
    return task, optimizer, known, seed


def search(losses: Losses) -> list[Trial]:
  """Goes through the search once more.

  Args:
    losses: Its runs' losses.

  Returns:
    The trials, from the start.

  Raises:
    RecordError: A run is missing.
  """
  best = _trial(losses, "start", {}, START)._replace(adopted=True)
  trials = [best]
  for coordinate, alternatives in COORDINATES.items():
    tried = []
    for changes in alternatives:
      numbers = {**best.numbers, **changes}
      if numbers != best.numbers:
        tried.append(_trial(losses, coordinate, changes, numbers))
    leader = min(tried, key=lambda trial: trial.score)
    if leader.score < best.score - MARGIN:
      best = leader._replace(adopted=True)
      tried[tried.index(leader)] = best
    trials += tried
  return trials


def chosen(trials: Sequence[Trial]) -> dict[str, float]:
  """Returns the numbers that the search ended with.

  Args:
    trials: The search.
  """
  return [trial for trial in trials if trial.adopted][-1].numbers


def confirm(
  losses: Losses, winner: Mapping[str, float]
) -> dict[str, dict[str, list[float]]]:
  """Compares on seeds that chose nothing.

  Args:
    losses: The runs' losses.
    winner: The winner's numbers.

  Returns:
    By method and task, ratios to Adam's loss at the rate chosen before, one a seed.
  """
  found: dict[str, dict[str, list[float]]] = {
    name: {task: [] for task in losses.tasks}
    for name in ("winner", "start", "schedule-free AdamW")
  }
  for seed in CONFIRM_SEEDS:
    for task in losses.tasks:
      reference = losses.adam(task, losses.reference(task)[0], seed)
      of_task = (
        losses.candidate(winner, task, seed),
        losses.candidate(START, task, seed),
        losses.peer(task, seed),
      )
      for name, loss in zip(found, of_task, strict=True):
        found[name][task].append(loss / reference)
  return found


def score(ratios: Sequence[float]) -> float:
  """Returns the mean logarithm.

  Args:
    ratios: Positive numbers.
  """
  return sum(math.log(ratio) for ratio in ratios) / len(ratios)


def table(losses: Losses, trials: Sequence[Trial]) -> list[str]:
  """Returns all trials, the winner, and its comparison on fresh seeds, in Markdown.

  Args:
    losses: The runs' losses.
    trials: The search.
  """
  tasks = losses.tasks
  titles = [SEARCH_TASKS[task].label for task in tasks]
  best = [losses.reference(task) for task in tasks]
  peer = [losses.peer(task) / loss for task, (_, loss) in zip(tasks, best, strict=True)]
  steps = SEARCH_TASKS[tasks[0]].num_steps
  rows = [
    ["Adam, best rate", "", *[f"{rate:g}: {loss:.3f}" for rate, loss in best], "1"],
    _numbers("schedule-free AdamW", "", peer, score(peer), bold=False),
  ]
  for trial in trials:
    changes = ", ".join(f"{name}={value}" for name, value in trial.changes.items())
    ratios = list(trial.ratios.values())
    rows.append(_numbers(trial.coordinate, changes, ratios, trial.score, trial.adopted))
  winner = chosen(trials)
  settings = ", ".join(f"{name}={value}" for name, value in winner.items())
  fresh = []
  for name, by_task in confirm(losses, winner).items():
    means = [math.exp(score(by_task[task])) for task in tasks]
    cells = [f"{mean:.3f}" for mean in means]
    fresh.append([name, *cells, f"{math.exp(score(means)):.3f}"])
  return [
    f"{losses.count} runs. Losses on held-out data after {steps} steps, relative to "
    "Adam at the best of 7 rates; bold: adopted.",
    "",
    *markdown(["choice", "change", *titles, "geometric mean"], rows),
    "",
    f"The winner: {settings}.",
    "",
    "Two seeds that chose nothing, relative to Adam at the rate chosen before:",
    "",
    *markdown(["method", *titles, "geometric mean"], fresh),
  ]


def _numbers(
  name: str, changes: str, ratios: Sequence[float], mean: float, bold: bool
) -> list[str]:
  cells = [f"{ratio:.3f}" for ratio in [*ratios, math.exp(mean)]]
  if bold:
    name, cells = f"**{name}**", [f"**{cell}**" for cell in cells]
  return [name, f"`{changes}`" if changes else "", *cells]


def _trial(
  losses: Losses, coordinate: str, changes: dict[str, float], numbers: dict[str, float]
) -> Trial:
  ratios = {
    task: losses.candidate(numbers, task) / losses.reference(task)[1]
    for task in losses.tasks
  }
  return Trial(
    coordinate, changes, numbers, ratios, score(list(ratios.values())), False
  )


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Print the table of the finished search."""

  results: Path = RESULTS
  """Folder of the archives."""

  def __call__(self) -> None:
    """Prints the table."""
    print("\n".join(self.derive(self.results)))

  def derive(self, results: Path = RESULTS) -> list[str]:
    """Returns the table's Markdown.

    Args:
      results: Folder of the archives.

    Raises:
      RecordError: A run is missing.
    """
    losses = Losses(records.load([results / "recipe.jsonl"]))
    return table(losses, search(losses))


STUDY = Recipe
