"""The search's runs: made once, kept in a file a task, found again."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.arena.problem import Task
from benchmarks.arena.program import Program, Start
from benchmarks.optimizers import OPTIMIZERS, Optimizer
from benchmarks.planning import OptionError
from benchmarks.recipe.candidates import FAMILY, Candidate
from benchmarks.records import Record
from benchmarks.studies.optimizers import ADAM

REFERENCE = "adam"
REFERENCE_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
PEER = "schedule_free_adamw"
SEARCH_SEED = 0


class Runs:
  """All runs so far, and those that are asked for."""

  def __init__(
    self,
    tasks: dict[str, Task],
    out: Path,
    data_dir: Path | None,
    say: Callable[[str], None],
  ):
    """Reads what has been recorded.

    Args:
      tasks: The tasks, by name.
      out: Folder of the records, one file a task.
      data_dir: The folder below which to look for data.
      say: Prints a line for each run.

    Raises:
      OptionError: The records are of tasks of another length.
    """
    self.tasks, self._out, self._data_dir, self._say = tasks, out, data_dir, say
    self._data: dict[str, Any] = {}
    self._programs: dict[tuple[str, str], Program] = {}
    self._kept: dict[str, list[Record]] = {}
    for name, task in tasks.items():
      path = self._path(name)
      self._kept[name] = records.read(path) if path.exists() else []
      lengths = {record["steps"][-1] for record in self._kept[name]}
      if lengths - {task.num_steps}:
        raise OptionError(
          f"{path} has runs of {sorted(lengths)} steps, where {name} now has "
          f"{task.num_steps}. Give another --out."
        )

  @property
  def count(self) -> int:
    """The number of runs recorded."""
    return sum(len(kept) for kept in self._kept.values())

  def candidate(
    self, candidate: Candidate, task: str, seed: int = SEARCH_SEED
  ) -> float:
    """Returns a candidate's last held-out loss on a task, infinity where it failed.

    Args:
      candidate: The candidate.
      task: Name of the task.
      seed: Seed of the run.
    """
    return self._loss(task, "candidate", FAMILY, candidate.numbers(), seed)

  def reference(self, task: str) -> tuple[float, float]:
    """Returns the best of Adam's rates on a task and its last held-out loss.

    Args:
      task: Name of the task.
    """
    losses = {rate: self.adam(task, rate) for rate in REFERENCE_RATES}
    best = min(losses, key=lambda rate: losses[rate])
    return best, losses[best]

  def adam(self, task: str, rate: float, seed: int = SEARCH_SEED) -> float:
    """Returns Adam's last held-out loss.

    Args:
      task: Name of the task.
      rate: Learning rate.
      seed: Seed of the run.
    """
    return self._loss(task, REFERENCE, ADAM, rate, seed)

  def peer(self, task: str, seed: int = SEARCH_SEED) -> float:
    """Returns schedule-free AdamW's last held-out loss, at its defaults.

    Args:
      task: Name of the task.
      seed: Seed of the run.
    """
    return self._loss(task, PEER, OPTIMIZERS[PEER], None, seed)

  def _loss(
    self, task: str, method: str, made: Optimizer, rate: Any, seed: int
  ) -> float:
    identity = {"method": method, "rate": rate, "seed": seed}
    for record in self._kept[task]:
      if all(record[name] == value for name, value in identity.items()):
        return _last(record)
    if task not in self._data:
      self._data[task] = self.tasks[task].load(self._data_dir)
    if (task, method) not in self._programs:
      self._programs[task, method] = Program(
        self.tasks[task], self._data[task], made, any_rate=rate, side_by_side=False
      )
    (outcome,) = self._programs[task, method].run([Start(seed, rate)], ["validation"])
    record = {"kind": "summary", "task": task, "method": method, **outcome}
    record["environment"] = records.environment()
    self._kept[task].append(record)
    records.write(self._path(task), self._kept[task])
    self._say(
      f"{self.count:3d}  {task}  {method}  {_last(record):.4f}  "
      f"{record['seconds']:.0f} s"
    )
    return _last(record)

  def _path(self, task: str) -> Path:
    return self._out / f"{task}.jsonl"


def _last(record: Record) -> float:
  loss = record["validation_loss"][-1]
  return math.inf if loss is None else loss
