"""A learning rate for a later tuned run, from a few epochs of Alrao.

    python -m benchmarks.probe run --network vgg19 --width 0.25 --max-epochs 2
    python -m benchmarks.probe check

The suggestion is the mean of the heads' rates, in logarithms, weighted by their
posterior (as in `alrao_jax.report`). That is the best rate of the output layer alone,
below units of all rates: whether it is a good rate for the whole network is an
empirical question, which `check` answers from the sweeps that have been measured.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from benchmarks import commands, engine, records, results
from benchmarks.arena.runs import load
from benchmarks.arena.standings import result
from benchmarks.arena.tasks import TASKS
from benchmarks.cifar10 import Data
from benchmarks.experiments import Experiment
from benchmarks.planning import OptionError
from benchmarks.progress import Display
from benchmarks.results import RunRecords, Table

LOW, HIGH = 1e-5, 10.0  # Alrao's interval
GUESS = 0.1  # what most recipes for SGD start from, which a suggestion should beat


def suggest(head_weights: list[float]) -> float:
  """Returns the suggested rate.

  Args:
    head_weights: Weight of each head, whose rates are evenly spaced in logarithms.

  Example:
    >>> f"{suggest([0.0, 0.5, 0.5, 0.0]):.3f}"
    '0.010'
  """
  rates = np.linspace(math.log(LOW), math.log(HIGH), len(head_weights))
  return math.exp(float(np.dot(head_weights, rates) / np.sum(head_weights)))


@dataclasses.dataclass(frozen=True)
class Run:
  """Train a few epochs with Alrao, and print a learning rate."""

  experiment: Annotated[Experiment, tyro.conf.arg(name="")] = Experiment(max_epochs=2)
  data: Annotated[Data, tyro.conf.arg(name="")] = Data()
  out: Path = Path("out/probe")
  """Folder for the run's records and checkpoint."""

  def __call__(self) -> None:
    """Trains, and prints the rate.

    Raises:
      OptionError: The optimizer is not Alrao's with the default interval.
    """
    if self.experiment.optimizer != "alrao":
      raise OptionError(
        "--optimizer must be alrao, the only one that has heads to ask."
      )
    workshop = self.data.workshop()
    with Display() as display:
      plan = workshop.plan(self.experiment, self.out)
      engine.train(workshop.program(self.experiment), plan, display)
      *_, last, _ = records.read(plan.path)
      weights = last["head_weights"][-1]
      display.say(f"posterior over {LOW:g} ... {HIGH:g}: {np.round(weights, 3)}")
      display.say(f"suggested learning rate for plain SGD: {suggest(weights):.2g}")


class Comparison(NamedTuple):
  """A task on which SGD has been tried at several rates, and Alrao asked for one.

  Attributes:
    title: The task.
    best_rate: SGD's best rate, by held-out loss.
    suggestions: Of each run of Alrao.
  """

  title: str
  best_rate: float
  suggestions: list[float]


@dataclasses.dataclass(frozen=True)
class Check:
  """Compare suggestions with the best rates of measured sweeps."""

  arena: Path = Path("benchmarks/arena/results")
  """Folder of the arena's records: rates in half decades."""
  results: tuple[Path, ...] = (Path("benchmarks/results"),)
  """Folders of the other records, searched with their subfolders: rates in decades."""
  epoch: int = 2
  """The epoch after which runs in --results suggest; runs of the arena suggest at
  their end."""
  out: Path = Path("benchmarks/PROBE.md")
  """The file to write."""

  def __call__(self) -> None:
    """Writes the tables, and prints them."""
    found = results.load(self.results) if self.results else []
    tables = [table for tables in results.by_size(found) for table in tables]
    lines = [
      "# Suggested rates",
      "",
      "What `python -m benchmarks.probe check` finds in the committed records: the "
      "rate that the heads' posterior suggests, beside the best of those that plain "
      "SGD was tried at, by held-out loss.",
      "",
      "## The arena, whole runs, SGD at rates in half decades",
      "",
      *compare(arena_sweeps(self.arena)),
      "",
      f"## Other tables, after epoch {self.epoch}, SGD at rates in whole decades",
      "",
      *compare(table_sweeps(tables, self.epoch)),
    ]
    text = "\n".join(lines) + "\n"
    records.write_text(self.out, text)
    print(text)


def compare(sweeps: Sequence[Comparison]) -> list[str]:
  """Returns a Markdown table: suggestions beside the best of SGD's rates.

  Args:
    sweeps: The tasks.
  """
  if not sweeps:
    return ["Not measured yet."]
  lines = [
    "| task | best SGD rate | suggestion, median | least to largest | runs | off by "
    "decades, median |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  off: list[float] = []
  medians: list[float] = []
  for sweep in sweeps:
    rates = np.array(sweep.suggestions)
    decades = np.log10(rates / sweep.best_rate)
    off += decades.tolist()
    medians.append(float(np.median(decades)))
    lines.append(
      f"| {sweep.title} | {sweep.best_rate:g} | {np.median(rates):.2g} | "
      f"{rates.min():.2g} to {rates.max():.2g} | {rates.size} | {medians[-1]:+.1f} |"
    )
  guess = math.log10(GUESS)
  guesses = [
    guess - math.log10(sweep.best_rate) for sweep in sweeps for _ in sweep.suggestions
  ]
  near, near_medians, near_guesses = (
    sum(abs(d) <= 0.5 for d in each) for each in (off, medians, guesses)
  )
  ending = (
    f"{near} of {len(off)} suggestions, and the median of {near_medians} of "
    f"{len(medians)} tasks, are within half a decade of the best rate; of so many "
    f"guesses of {GUESS:g}, {near_guesses} would be."
  )
  return [*lines, "", ending]


def table_sweeps(tables: Sequence[Table], epoch: int) -> list[Comparison]:
  """Returns the sweeps of the benchmarks' tables.

  Args:
    tables: Of measured runs; those without Alrao or SGD are passed over.
    epoch: The epoch of Alrao's runs whose posterior suggests, their last if they have
      fewer.
  """
  return [
    Comparison(
      table.title,
      table.best_sgd.rate,
      [_suggested(run, epoch) for run in table.alrao.runs],
    )
    for table in tables
    if table.alrao and table.best_sgd and table.best_sgd.rate is not None
  ]


def arena_sweeps(folder: Path) -> list[Comparison]:
  """Returns the sweeps of the arena.

  Args:
    folder: Its records; tasks without Alrao or SGD are passed over.
  """
  found = []
  for name, task in TASKS.items():
    alrao, sgd = (
      load(folder / name / f"{method}.jsonl", task) for method in ("alrao", "sgd")
    )
    rate = result(sgd).rate if sgd else None
    if alrao and rate is not None:
      suggestions = [suggest(run["head_weights"]) for run in alrao]
      found.append(Comparison(task.label, rate, suggestions))
  return found


def _suggested(run: RunRecords, epoch: int) -> float:
  record = run.epochs[min(epoch, len(run.epochs)) - 1]
  return suggest(record["head_weights"][-1])


if __name__ == "__main__":
  commands.main(Run | Check, __doc__)
