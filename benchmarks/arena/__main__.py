"""The arena: tuning-free optimizers at their defaults against tuned ones.

python -m benchmarks.arena run
python -m benchmarks.arena report
"""

import dataclasses
from pathlib import Path

from benchmarks import commands, records
from benchmarks.arena import runs
from benchmarks.arena.methods import METHODS
from benchmarks.arena.table import tables
from benchmarks.arena.tasks import TASKS
from benchmarks.planning import check_seeds, refuse
from benchmarks.progress import Display

OUT = Path("benchmarks/arena/results")


@dataclasses.dataclass(frozen=True)
class Run:
  """Train what is missing; a killed command goes on where it was."""

  tasks: tuple[str, ...] = tuple(TASKS)
  """Names of the tasks."""
  methods: tuple[str, ...] = tuple(METHODS)
  """Names of the methods."""
  seeds: int = 3
  """Number of runs of each method, at each rate."""
  costs: bool = True
  """Whether to time the methods' steps, too."""
  out: Path = OUT
  """Folder of the records."""
  data_dir: Path | None = None
  """Folder below which to look for data; by default ALRAO_DATA_DIR."""

  def __call__(self) -> None:
    """Trains.

    Raises:
      OptionError: An unknown name, or no seed.
    """
    for name, given, known in (
      ("tasks", self.tasks, TASKS),
      ("methods", self.methods, METHODS),
    ):
      for one in given:
        if one not in known:
          refuse(name, f"must be some of {', '.join(known)}", one)
    check_seeds(self.seeds)
    display = Display()
    for name in self.tasks:
      task = TASKS[name]
      data = task.load(self.data_dir)
      for method in self.methods:
        runs.train(
          task,
          data,
          method,
          METHODS[method],
          range(self.seeds),
          self.out,
          display.say,
        )
      if self.costs:
        runs.measure_costs(task, data, METHODS, self.out, display.say)


@dataclasses.dataclass(frozen=True)
class Report:
  """Write ARENA.md from the records."""

  results: Path = OUT
  """Folder of the records."""
  out: Path = Path("benchmarks/arena/ARENA.md")
  """The file to write."""

  def __call__(self) -> None:
    """Writes the tables, and prints them."""
    found, timings = {}, {}
    for name, task in TASKS.items():
      kept = {
        method: runs.load(self.results / name / f"{method}.jsonl", task)
        for method in METHODS
      }
      found[name] = {method: runs_ for method, runs_ in kept.items() if runs_}
      path = self.results / name / "costs.jsonl"
      if path.exists():
        timings[name] = records.read(path)
    text = tables(TASKS, found, timings)
    records.write_text(self.out, text)
    print(text)


if __name__ == "__main__":
  commands.main(Run | Report, __doc__)
