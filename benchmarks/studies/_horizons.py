"""Runs of several lengths: a task, an arm, a seed, and a share of the task's steps."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import records, training
from benchmarks.console import Display
from benchmarks.methods import Method
from benchmarks.records import Run
from benchmarks.training import Plan, make_plan
from benchmarks.workloads.search import SearchTask, SearchWorkload
from benchmarks.workloads.short import NUM_POINTS, ShortData


class HorizonRun(NamedTuple):
  """A run.

  Attributes:
    task: Name of the task.
    arm: Name of the arm.
    seed: Its seed.
    horizon: Share of the task's steps.
    rate: Learning rate, where the arm has one to choose, else None.
    decay: Weight decay, likewise.
  """

  task: str
  arm: str
  seed: int
  horizon: float = 1.0
  rate: float | None = None
  decay: float | None = None


class HorizonArm(NamedTuple):
  """A method, and of how many of its training examples one judges (None: none).

  Attributes:
    method: The method; its `rate` is a rate and a decay, or None.
    one_in: As in `SearchWorkload`.
  """

  method: Method
  one_in: int | None = None


class KnownRuns:
  """Runs that have ended."""

  def __init__(self, runs: Sequence[Run] = ()):
    """Sorts the runs.

    Args:
      runs: The runs; later ones take the place of equal ones.
    """
    self.runs: dict[HorizonRun, Run] = {}
    for run in runs:
      self.add(run)

  def add(self, run: Run) -> None:
    """Takes up a run.

    Args:
      run: The run.
    """
    wanted = HorizonRun(*(run.config[name] for name in HorizonRun._fields))
    self.runs[wanted] = run

  def losses(self, one: HorizonRun, part: str = "validation") -> np.ndarray | None:
    """Returns a run's losses by point; None if it has not been trained.

    A point that is not finite, and those that a failed run lacks, are infinite.

    Args:
      one: The run.
      part: On which part of the data.
    """
    if one not in self.runs:
      return None
    found = self.runs[one].curve(f"{part}_loss")
    found = np.where(np.isfinite(found), found, np.inf)
    return np.concatenate([found, np.full(NUM_POINTS - len(found), np.inf)])

  def best(self, settings: Sequence[HorizonRun]) -> HorizonRun | None:
    """Returns the run that ends with the least held-out loss; None if one lacks.

    Args:
      settings: The runs.
    """
    losses = {one: self.losses(one) for one in settings}
    known = {one: found[-1] for one, found in losses.items() if found is not None}
    if not known or len(known) < len(losses):
      return None
    return min(known, key=lambda one: known[one])


def known_in(places: Sequence[Path]) -> list[Run]:
  """Returns the runs that have ended in some places, which need not exist.

  Args:
    places: Archives and folders.

  Raises:
    RecordError: A file is damaged.
  """
  found = [place for place in places if place.is_file() or any(place.glob("*.jsonl"))]
  try:
    return records.load(found) if found else []
  except records.RecordError as error:
    if "no run that has ended" in str(error):
      return []
    raise


class HorizonTrainer:
  """Trains runs, one process, one after the other."""

  def __init__(
    self,
    study: str,
    suite: str,
    tasks: Mapping[str, SearchTask],
    arms: Mapping[str, HorizonArm],
    *,
    out: Path,
    data_dir: Path | None,
    display: Display,
    workload: type[SearchWorkload] = SearchWorkload,
  ):
    """Keeps its arguments; nothing is loaded yet.

    Args:
      study: Name of the study, for records.
      suite: Name of the kind of tasks, likewise.
      tasks: The tasks by name.
      arms: The arms by name.
      out: Folder of the runs' records.
      data_dir: Folder below which to look for data.
      display: Where progress is shown.
      workload: How the tasks are trained.
    """
    self._names = {"study": study, "suite": suite}
    self._tasks, self._arms, self._kind = tasks, arms, workload
    self._out, self._data_dir, self._display = out, data_dir, display
    self._data: tuple[str, ShortData] | None = None
    self._workload: tuple[tuple, SearchWorkload] | None = None

  def train(self, one: HorizonRun) -> Run:
    """Trains a run, on from its checkpoint if it was killed.

    Args:
      one: The run.

    Raises:
      DataError: There is no data to train on.
    """
    plan = self._plan(one)
    training.train(self._workload_of(one), plan, self._display, restart=True)
    *epochs, summary = records.read(plan.path)
    return Run(summary, epochs)

  def _plan(self, one: HorizonRun) -> Plan:
    task = self._tasks[one.task].short
    config: dict[str, Any] = {
      **self._names,
      "optimizer": one.arm,
      **one._asdict(),
      "num_steps": round(one.horizon * task.num_steps),
      "batch_size": task.batch_size,
      "max_epochs": NUM_POINTS,
    }
    title = [one.task, f"h{one.horizon:g}"]
    plan = make_plan(title, config, {}, self._out, patience=NUM_POINTS + 1)
    rate = None if one.rate is None else (one.rate, one.decay)
    return dataclasses.replace(plan, rate=rate)

  def _workload_of(self, one: HorizonRun) -> SearchWorkload:
    wanted = (one.task, one.arm, one.horizon)
    if self._workload is None or self._workload[0] != wanted:
      task, arm = self._tasks[one.task], self._arms[one.arm]
      if self._data is None or self._data[0] != one.task:
        self._data = self._workload = None  # frees the ones before
        self._data = (one.task, task.short.load(self._data_dir))
      num_steps = round(one.horizon * task.short.num_steps)
      task = task._replace(short=task.short._replace(num_steps=num_steps))
      any_rate = next(iter(arm.method.rates), None)
      made = self._kind(
        task, self._data[1], arm.method, one_in=arm.one_in, any_rate=any_rate
      )
      self._workload = (wanted, made)
    return self._workload[1]
