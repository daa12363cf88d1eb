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
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks import commands, engine, records, results
from benchmarks.cifar10 import Data
from benchmarks.experiments import Experiment
from benchmarks.planning import OptionError
from benchmarks.progress import Display
from benchmarks.results import RunRecords, Table

LOW, HIGH = 1e-5, 10.0  # Alrao's interval


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


@dataclasses.dataclass(frozen=True)
class Check:
  """Compare suggestions with the best rates of measured sweeps."""

  results: tuple[Path, ...] = (Path("benchmarks/results"),)
  """Folders of records, searched with their subfolders."""
  epoch: int = 2
  """The epoch of Alrao's runs whose posterior suggests."""

  def __call__(self) -> None:
    """Prints a table."""
    found = results.load(self.results)
    tables = [table for tables in results.by_size(found) for table in tables]
    print("\n".join(compare(tables, self.epoch)))


def compare(tables: list[Table], epoch: int) -> list[str]:
  """Returns a Markdown table: suggestions beside the best of SGD's rates.

  Args:
    tables: Of measured runs; those without Alrao or SGD are passed over.
    epoch: The epoch of Alrao's runs whose posterior suggests, their last if they have
      fewer.
  """
  lines = [
    "| task | best SGD rate | suggestions | off by decades, median |",
    "| --- | --- | --- | --- |",
  ]
  near = total = 0
  for table in tables:
    if table.alrao is None or table.best_sgd is None or table.best_sgd.rate is None:
      continue
    rates = [_suggested(run, epoch) for run in table.alrao.runs]
    off = np.log10(np.array(rates) / table.best_sgd.rate)
    near, total = near + np.sum(np.abs(off) <= 0.5), total + off.size
    suggestions = ", ".join(f"{rate:.2g}" for rate in rates)
    lines.append(
      f"| {table.title} | {table.best_sgd.rate:g} | {suggestions} | "
      f"{np.median(off):+.1f} |"
    )
  share = f"{near} of {total} suggestions are within half a decade of the best rate"
  return [*lines, "", f"{share} (of a grid in whole decades), at epoch {epoch}."]


def _suggested(run: RunRecords, epoch: int) -> float:
  record = run.epochs[min(epoch, len(run.epochs)) - 1]
  return suggest(record["head_weights"][-1])


if __name__ == "__main__":
  commands.main(Run | Check, __doc__)
