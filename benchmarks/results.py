"""The records of many runs, put in order: tables of rows of runs."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from benchmarks.optimizers import OPTIMIZERS
from benchmarks.records import Record, RecordError, read
from benchmarks.sweeps import mean_validation_loss

CHANCE = 0.1  # both data sets have ten classes of about one size

# What tells one table from another, and one size of experiment from another.
TABLE_OPTIONS = ("network", "width", "norm")
SIZE_OPTIONS = (
  "dataset",
  "num_train",
  "num_validation",
  "num_test",
  "max_epochs",
  "patience",
  "batch_size",
  "augment",
  "dtype",
)


@dataclasses.dataclass(frozen=True)
class RunRecords:
  """One run that has ended.

  Attributes:
    summary: Its summary.
    epochs: The records of its epochs.
  """

  summary: Record
  epochs: list[Record]

  @property
  def config(self) -> Record:
    """The run's options."""
    return self.summary["config"]

  @property
  def accuracy(self) -> float:
    """Test accuracy; that of chance for a run with nothing to test."""
    accuracy = self.summary["test_accuracy"]
    return CHANCE if accuracy is None else accuracy


@dataclasses.dataclass(frozen=True)
class Row:
  """The runs of one optimizer at one rate, all seeds.

  Attributes:
    optimizer: Its name.
    rate: Its learning rate, if it takes one.
    num_heads: Number of Alrao's heads, if it has any.
    runs: The runs.
  """

  optimizer: str
  rate: float | None
  num_heads: int | None
  runs: list[RunRecords]

  @property
  def accuracies(self) -> list[float]:
    """Test accuracy of each run."""
    return [run.accuracy for run in self.runs]

  @property
  def mean_accuracy(self) -> float:
    """Mean test accuracy."""
    return sum(self.accuracies) / len(self.runs)

  @property
  def label(self) -> str:
    """Name for tables and pictures."""
    rate = "" if self.rate is None else f" {self.rate:g}"
    heads = "" if self.num_heads in (None, 10) else f", {self.num_heads} heads"
    return OPTIMIZERS[self.optimizer].label + rate + heads


@dataclasses.dataclass(frozen=True)
class Table:
  """All runs of one network at one size of experiment.

  Attributes:
    title: Which network.
    rows: By optimizer and rate.
  """

  title: str
  rows: list[Row]

  @property
  def sgd(self) -> list[Row]:
    """The rows of SGD, by rate."""
    return [row for row in self.rows if row.optimizer == "sgd"]

  @property
  def best_sgd(self) -> Row | None:
    """SGD at the rate of least validation loss, over the seeds that all rates have."""
    seeds = [{run.config["seed"] for run in row.runs} for row in self.sgd]
    common = set.intersection(*seeds) if seeds else set()

    def loss(row: Row) -> float:
      runs = [run.summary for run in row.runs if run.config["seed"] in common]
      return mean_validation_loss(runs or [run.summary for run in row.runs])

    return min(self.sgd, key=loss, default=None)

  @property
  def alrao(self) -> Row | None:
    """Alrao's row."""
    return next((row for row in self.rows if row.optimizer == "alrao"), None)

  @property
  def threshold(self) -> float | None:
    """The accuracy above which a run has learned; None without SGD."""
    best = self.best_sgd
    return None if best is None else CHANCE + (best.mean_accuracy - CHANCE) / 2


def load(folders: Iterable[Path]) -> list[RunRecords]:
  """Reads all runs that have ended.

  Args:
    folders: Where the records are, with their subfolders.

  Raises:
    RecordError: A file is damaged, or no run has ended.
  """
  folders = list(folders)
  runs = []
  for folder in folders:
    for path in sorted(folder.rglob("*.jsonl")):
      *epochs, last = read(path) or [{"kind": "epoch"}]
      if last["kind"] == "summary":
        runs.append(RunRecords(last, epochs))
  if not runs:
    places = ", ".join(str(folder) for folder in folders)
    raise RecordError(f"no run that has ended below {places}; name it with --results.")
  return runs


def by_size(runs: list[RunRecords]) -> dict[tuple, list[Table]]:
  """Returns tables by size of experiment, the values of `SIZE_OPTIONS`.

  Args:
    runs: The runs.
  """
  sizes: dict[tuple, dict[tuple, dict[tuple, list[RunRecords]]]] = {}
  for run in runs:
    size, table = (
      tuple(run.config[name] for name in names)
      for names in (SIZE_OPTIONS, TABLE_OPTIONS)
    )
    row = tuple(run.config[name] for name in ("optimizer", "rate", "num_heads"))
    sizes.setdefault(size, {}).setdefault(table, {}).setdefault(row, []).append(run)
  return {
    size: [
      Table(table_title(*key), _rows(rows)) for key, rows in sorted(tables.items())
    ]
    for size, tables in sizes.items()
  }


def _rows(runs: dict[tuple, list[RunRecords]]) -> list[Row]:
  """Rows in the order of `OPTIMIZERS`, then of their rates."""
  order = list(OPTIMIZERS)
  rows = [
    Row(optimizer, rate, num_heads, found)
    for (optimizer, rate, num_heads), found in runs.items()
  ]
  return sorted(rows, key=lambda row: (order.index(row.optimizer), row.rate or 0))


def table_title(network: str, width: float, norm: str) -> str:
  """Returns a network's name with its options.

  Args:
    network: The network.
    width: Factor on its channels.
    norm: Its normalisation.
  """
  return f"{network}, width {width:g}" + (
    "" if norm == "batch" else ", no normalisation"
  )
