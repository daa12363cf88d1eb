"""A learning rate for a later tuned run, from a few epochs of Alrao.

    python -m benchmarks study probe --network vgg19 --width 0.25
    python -m benchmarks report probe    # suggestions next to the best measured rates

The suggestion is the mean of the heads' rates, in logarithms, weighted by their
posterior (as in `alrao_jax.report`). That is the best rate of the output layer alone,
below units of all rates: whether it is a good rate for the whole network is an
empirical question. The report answers it from the sweeps that have been measured.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from benchmarks import records, suites, training
from benchmarks.console import Display, OptionError, writing_to
from benchmarks.records import RESULTS, Run
from benchmarks.standings import Arena
from benchmarks.suites.cifar10 import SUITE, ImageOptions, ImagePlace
from benchmarks.tables import Table, by_size, markdown
from benchmarks.workloads.short import ARENA_TASKS

LOW, HIGH = 1e-5, 10.0  # Alrao's interval
GUESS = 0.1  # what most recipes for SGD start from, which a suggestion should beat
EPOCH = 2  # after which runs of the suites suggest


def suggest(head_weights: Sequence[float]) -> float:
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
class Probe:
  """Train a few epochs with Alrao, and print a learning rate."""

  options: Annotated[ImageOptions, tyro.conf.arg(name="")] = ImageOptions(
    max_epochs=EPOCH
  )
  place: Annotated[ImagePlace, tyro.conf.arg(name="")] = ImagePlace()
  out: Path = Path("out/studies/probe")
  """Folder for the run's records and checkpoint."""

  def __call__(self) -> None:
    """Trains, and prints the rate.

    Raises:
      OptionError: The optimizer is not Alrao's with the default interval.
    """
    if self.options.optimizer != "alrao":
      raise OptionError(
        "--optimizer must be alrao, the only one that has heads to ask."
      )
    suite = SUITE(self.place)
    with writing_to(self.out), Display() as display:
      plan = suite.plan(self.options, self.out)
      training.train(suite.workload(self.options), plan, display)
      *_, last, _ = records.read(plan.path)
      weights = last["head_weights"][-1]
      display.say(f"posterior over {LOW:g} ... {HIGH:g}: {np.round(weights, 3)}")
      display.say(f"suggested learning rate for plain SGD: {suggest(weights):.2g}")

  def derive(self, results: Path = RESULTS) -> list[str]:
    """Returns suggestions next to the best of SGD's rates, as Markdown.

    Args:
      results: Folder of the archives.
    """
    kinds = {name: kind for name, kind in suites.kinds().items() if kind is not None}
    runs = [
      run
      for run in records.load([results])
      if "study" not in run.config and run.config["suite"] in kinds
    ]
    tables = [table for size in by_size(runs, kinds) for table in size]
    return [
      "The rate that the heads' posterior suggests, next to the best of the rates that "
      "plain SGD was tried at, by held-out loss.",
      "",
      "The arena, whole runs, SGD at rates in half decades:",
      "",
      *compare(arena_sweeps(records.load([results / "arena.jsonl"]))),
      "",
      f"The other suites, after epoch {EPOCH}, SGD at rates in whole decades:",
      "",
      *compare(table_sweeps(tables, EPOCH)),
    ]


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


def compare(sweeps: Sequence[Comparison]) -> list[str]:
  """Returns a Markdown table: suggestions next to the best of SGD's rates.

  Args:
    sweeps: The tasks.
  """
  if not sweeps:
    return ["Not measured yet."]
  rows: list[list[str]] = []
  off: list[float] = []
  medians: list[float] = []
  for sweep in sweeps:
    rates = np.array(sweep.suggestions)
    decades = np.log10(rates / sweep.best_rate)
    off += decades.tolist()
    medians.append(float(np.median(decades)))
    rows.append(
      [
        sweep.title,
        f"{sweep.best_rate:g}",
        f"{np.median(rates):.2g}",
        f"{rates.min():.2g} to {rates.max():.2g}",
        str(rates.size),
        f"{medians[-1]:+.1f}",
      ]
    )
  guess = math.log10(GUESS)
  guesses = [
    guess - math.log10(sweep.best_rate) for sweep in sweeps for _ in sweep.suggestions
  ]
  near, near_medians, near_guesses = (
    sum(abs(d) <= 0.5 for d in each) for each in (off, medians, guesses)
  )
  header = ["task", "best SGD rate", "suggestion, median", "least to largest", "runs"]
  return [
    *markdown([*header, "off by decades, median"], rows),
    "",
    f"{near} of {len(off)} suggestions, and the median of {near_medians} of "
    f"{len(medians)} tasks, are within half a decade of the best rate; of so many "
    f"guesses of {GUESS:g}, {near_guesses} would be.",
  ]


def table_sweeps(tables: Sequence[Table], epoch: int) -> list[Comparison]:
  """Returns the sweeps of the suites' tables.

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


def arena_sweeps(runs: Sequence[Run]) -> list[Comparison]:
  """Returns the sweeps of the arena.

  Args:
    runs: Its runs; tasks without Alrao or SGD are passed over.
  """
  arena = Arena({name: task.label for name, task in ARENA_TASKS.items()}, runs, [])
  found = []
  for task in arena.tasks:
    sgd, alrao = arena.result(task, "sgd_rates"), arena.runs[task].get("alrao")
    if alrao and sgd is not None and sgd.rate is not None:
      last = max(len(run.epochs) for run in alrao)
      suggestions = [_suggested(run, last) for run in alrao]
      found.append(Comparison(ARENA_TASKS[task].label, sgd.rate, suggestions))
  return found


def _suggested(run: Run, epoch: int) -> float:
  record = run.epochs[min(epoch, len(run.epochs)) - 1]
  return suggest(record["head_weights"][-1])


STUDY = Probe
