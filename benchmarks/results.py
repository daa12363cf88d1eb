"""The records of many runs, put in order: tables of rows of runs."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from benchmarks.optimizers import OPTIMIZERS
from benchmarks.records import Record, RecordError, read
from benchmarks.sweeps import mean_validation_loss
from benchmarks.tasks import TASKS, Task

# What tells one row of a table from another.
ROW_OPTIONS = ("optimizer", "rate", "num_heads")


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
  def task(self) -> Task:
    """What kind of task it is of."""
    return TASKS[self.config["task"]]

  @property
  def score(self) -> float:
    """The test score; that of chance for a run with nothing to test."""
    score = self.summary[f"test_{self.task.score.name}"]
    return self.config["chance"] if score is None else score


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
  def scores(self) -> list[float]:
    """Test score of each run."""
    return [run.score for run in self.runs]

  @property
  def mean_score(self) -> float:
    """Mean test score."""
    return sum(self.scores) / len(self.runs)

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
    task: What kind of task they are of.
    title: Which network.
    rows: By optimizer and rate.
  """

  task: Task
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

  def lead(self, one: float, other: float) -> float:
    """Returns by how much one score is better than another."""
    return one - other if self.task.score.higher_is_better else other - one

  def has_learned(self, score: float) -> bool:
    """Whether a score lies above chance by more than half of what best SGD's does.

    Args:
      score: The score, in a table with SGD.

    Raises:
      ValueError: There is no SGD to compare with.
    """
    best = self.best_sgd
    if best is None:
      raise ValueError(f"no run of SGD tells what learning means for {self.title}.")
    chance = best.runs[0].config["chance"]
    margin = max(0.0, self.lead(best.mean_score, chance))
    return self.lead(score, chance) > margin / 2


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
      # Studies have records of their own kind of table.
      if last["kind"] == "summary" and "study" not in last["config"]:
        runs.append(RunRecords(last, epochs))
  if not runs:
    places = ", ".join(str(folder) for folder in folders)
    raise RecordError(f"no run that has ended below {places}; name it with --results.")
  return runs


def by_size(runs: list[RunRecords]) -> list[list[Table]]:
  """Returns tables, those of one size of experiment together, in order of the tasks.

  Args:
    runs: The runs.
  """
  order = list(TASKS)
  sizes: dict[tuple, dict[tuple, dict[tuple, list[RunRecords]]]] = {}
  for run in sorted(runs, key=lambda run: order.index(run.config["task"])):
    size, table, row = (
      tuple(run.config[name] for name in names)
      for names in (run.task.size_options, run.task.table_options, ROW_OPTIONS)
    )
    size = (run.config["task"], *size)
    sizes.setdefault(size, {}).setdefault(table, {}).setdefault(row, []).append(run)
  return [
    [_table(rows) for _, rows in sorted(tables.items())] for tables in sizes.values()
  ]


def _table(runs: dict[tuple, list[RunRecords]]) -> Table:
  """Rows in the order of `OPTIMIZERS`, then of their rates."""
  order = list(OPTIMIZERS)
  rows = [
    Row(optimizer, rate, num_heads, found)
    for (optimizer, rate, num_heads), found in runs.items()
  ]
  rows.sort(key=lambda row: (order.index(row.optimizer), row.rate or 0))
  first = rows[0].runs[0]
  return Table(first.task, first.task.table_title(first.config), rows)
