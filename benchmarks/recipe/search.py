"""A coordinate search: one choice after the other, each kept if it helps."""

import dataclasses
import math
from typing import Any, NamedTuple

from benchmarks.recipe.candidates import Candidate
from benchmarks.recipe.runs import Runs

# What a choice must gain: one percent of the loss. Losses of runs that differ in
# rounding only, of an unnormalised network, came out two percent apart.
MARGIN = 0.01
CONFIRM_SEEDS = (1, 2)


def interval(low: float, high: float) -> dict[str, float]:
  """Returns the numbers of one interval for units and heads.

  Args:
    low: Lower bound.
    high: Upper bound.
  """
  return {"low": low, "high": high, "head_low": low, "head_high": high}


# Alrao on Adam with an average over the last hundred steps.
START = Candidate()

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
    candidate: The candidate.
    ratios: Its loss by task, relative to Adam's at its best rate.
    score: Mean logarithm of `ratios`.
    adopted: Whether the search went on with it.
  """

  coordinate: str
  changes: dict[str, Any]
  candidate: Candidate
  ratios: dict[str, float]
  score: float
  adopted: bool


def search(runs: Runs) -> list[Trial]:
  """Runs what is missing of the search; returns it from the start.

  Args:
    runs: The runs.
  """
  best = _trial(runs, "start", {}, START)._replace(adopted=True)
  trials = [best]
  for coordinate, alternatives in COORDINATES.items():
    tried = []
    for changes in alternatives:
      candidate = dataclasses.replace(best.candidate, **changes)
      if candidate != best.candidate:
        tried.append(_trial(runs, coordinate, changes, candidate))
    leader = min(tried, key=lambda trial: trial.score)
    if leader.score < best.score - MARGIN:
      best = leader._replace(adopted=True)
      tried[tried.index(leader)] = best
    trials += tried
  return trials


def chosen(trials: list[Trial]) -> Candidate:
  """Returns what the search ended with.

  Args:
    trials: The search.
  """
  return [trial for trial in trials if trial.adopted][-1].candidate


def confirm(runs: Runs, winner: Candidate) -> dict[str, dict[str, list[float]]]:
  """Compares on seeds that chose nothing.

  Args:
    runs: The runs.
    winner: The winner.

  Returns:
    By method and task, ratios to Adam's loss at the rate chosen before, one a seed.
  """
  found: dict[str, dict[str, list[float]]] = {
    name: {task: [] for task in runs.tasks}
    for name in ("winner", "start", "schedule-free AdamW")
  }
  for seed in CONFIRM_SEEDS:
    for task in runs.tasks:
      reference = runs.adam(task, runs.reference(task)[0], seed)
      losses = (
        runs.candidate(winner, task, seed),
        runs.candidate(START, task, seed),
        runs.peer(task, seed),
      )
      for name, loss in zip(found, losses, strict=True):
        found[name][task].append(loss / reference)
  return found


def score(ratios: list[float]) -> float:
  """Returns the mean logarithm.

  Args:
    ratios: Positive numbers.
  """
  return sum(math.log(ratio) for ratio in ratios) / len(ratios)


def _trial(
  runs: Runs, coordinate: str, changes: dict[str, Any], candidate: Candidate
) -> Trial:
  ratios = {
    task: runs.candidate(candidate, task) / runs.reference(task)[1]
    for task in runs.tasks
  }
  return Trial(
    coordinate, changes, candidate, ratios, score(list(ratios.values())), False
  )
