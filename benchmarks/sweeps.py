"""Whole tables of runs: which experiments they hold, and running what is missing."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks import engine, records
from benchmarks.data import DataError
from benchmarks.optimizers import OPTIMIZERS, SGD_RATES
from benchmarks.planning import OptionError
from benchmarks.progress import Display

# A dataclass with the fields `optimizer`, `rate`, `seed` and whatever its task needs.
Experiment = Any


class Workshop(Protocol):
  """Prepares the experiments of one task."""

  def find_data(self, experiment: Experiment) -> None:
    """Loads an experiment's data; raises `DataError` where it is missing."""
    ...

  def plan(self, experiment: Experiment, out: Path) -> engine.Plan:
    """Returns how the engine shall run an experiment."""
    ...

  def program(self, experiment: Experiment) -> engine.Program:
    """Returns the program that trains it."""
    ...


class Preset(NamedTuple):
  """A table of runs.

  Attributes:
    bases: An experiment for each network, without optimizer and seed.
    optimizers: Names of the optimizers that each of them trains with.
    rates: Rates of those that take one.
    num_seeds: Number of runs of an optimizer; of the best rate only, where it has
      several.
    num_rate_seeds: Number of runs of every rate.
    without_data: What to replace in `bases` where their data is missing; None makes
      that an error.
  """

  bases: tuple[Any, ...]
  optimizers: tuple[str, ...]
  rates: tuple[float, ...] = SGD_RATES
  num_seeds: int = 3
  num_rate_seeds: int = 1
  without_data: dict[str, Any] | None = None


def select(
  preset: Preset, networks: tuple[str, ...], optimizers: tuple[str, ...]
) -> Preset:
  """Returns a part of a preset.

  Args:
    preset: The preset.
    networks: Networks to keep; empty for all.
    optimizers: Optimizers to keep; empty for all.

  Raises:
    OptionError: One that the preset does not hold.
  """
  for given, known in (
    (networks, sorted({base.network for base in preset.bases})),
    (optimizers, sorted(preset.optimizers)),
  ):
    unknown = set(given) - set(known)
    if unknown:
      raise OptionError(
        f"the preset has {', '.join(known)}; it does not have {sorted(unknown)}."
      )
  return preset._replace(
    bases=tuple(b for b in preset.bases if not networks or b.network in networks),
    optimizers=tuple(n for n in preset.optimizers if not optimizers or n in optimizers),
  )


def sweep(
  preset: Preset, workshop: Workshop, out: Path, display: Display
) -> list[records.Record]:
  """Runs what is missing of a table.

  Args:
    preset: The table.
    workshop: Where its experiments are prepared.
    out: Folder of the results; runs that have ended there are not repeated.
    display: Where progress is shown.

  Returns:
    The summaries of all runs.

  Raises:
    DataError: The data is missing or damaged.
  """
  bases = preset.bases
  if preset.without_data is not None:
    try:
      workshop.find_data(bases[0])
    except DataError as error:
      display.say(f"{error}\nGoing on without it: {preset.without_data}.")
      bases = [dataclasses.replace(base, **preset.without_data) for base in bases]
  summaries: list[records.Record] = []

  def run(experiment: Experiment) -> records.Record:
    plan = workshop.plan(experiment, out)
    summary = records.read_summary(plan.path)
    if summary is None:
      summary = engine.train(workshop.program(experiment), plan, display)
    summaries.append(summary)
    display.say(f"[{len(summaries)}/{total}] {describe(summary)}")
    return summary

  total = len(bases) * sum(_num_runs(preset, name) for name in preset.optimizers)
  for base in bases:
    for name in preset.optimizers:
      for experiment in _with_best_rate(preset, name, base, run):
        run(experiment)
  return summaries


def _num_runs(preset: Preset, name: str) -> int:
  if not OPTIMIZERS[name].takes_rate:
    return preset.num_seeds
  rate_seeds = preset.num_rate_seeds
  return len(preset.rates) * rate_seeds + max(0, preset.num_seeds - rate_seeds)


def _with_best_rate(preset, name, base, run) -> Iterator[Experiment]:
  """Runs all rates, if there are any; yields what else is to run."""
  base = dataclasses.replace(base, optimizer=name)
  seeds = range(preset.num_seeds)
  if OPTIMIZERS[name].takes_rate:
    losses = {}
    for rate in preset.rates:
      ended = [
        run(dataclasses.replace(base, rate=rate, seed=seed))
        for seed in range(preset.num_rate_seeds)
      ]
      losses[rate] = mean_validation_loss(ended)
    base = dataclasses.replace(base, rate=min(losses, key=lambda rate: losses[rate]))
    seeds = seeds[preset.num_rate_seeds :]
  for seed in seeds:
    yield dataclasses.replace(base, seed=seed)


def mean_validation_loss(summaries: list[records.Record]) -> float:
  """Returns what the best rate is chosen by: inf if any run has no finite loss.

  Args:
    summaries: Of runs of one rate.
  """
  losses = [summary["validation_loss"] for summary in summaries]
  return math.inf if None in losses else sum(losses) / len(losses)


def describe(summary: records.Record) -> str:
  """Returns a run's outcome in a line.

  Args:
    summary: The run's summary.
  """
  if summary["test_loss"] is None:
    outcome = "no epoch with a finite validation loss"
  else:
    measured = ", ".join(
      f"{name.replace('_', ' ')} {value:.4f}"
      for name, value in summary.items()
      if name.startswith("test_")
    )
    outcome = f"{measured}, at epoch {summary['best_epoch']}"
  ending = {
    "early": f"stopped early after {summary['epochs']}",
    "maximum": f"hit the maximum of {summary['epochs']}",
    "failed": f"FAILED in epoch {summary['epochs']}: a loss was not finite",
  }[summary["ending"]]
  return f"{summary['name']}: {outcome} ({ending}; {summary['seconds']:.0f} s)"
