"""Many short tasks, on which optimizers at their defaults meet tuned ones.

    python -m benchmarks sweep arena
    python -m benchmarks run arena --task gru --optimizer prodigy

Who takes part is said in `benchmarks.methods.ARENA`, the tasks are those of
`benchmarks.workloads.short`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from benchmarks import records
from benchmarks.console import Display, check_seeds, refuse, writing_to
from benchmarks.methods import ARENA, METHODS, MethodName
from benchmarks.suites._suite import Preset, Suite, check_options, sweep
from benchmarks.timing import in_turns
from benchmarks.training import Plan, make_plan
from benchmarks.workloads.short import (
  ARENA_TASKS,
  NUM_POINTS,
  SHORT_TASKS,
  ShortData,
  ShortWorkload,
)

ROUNDS, STEPS = 15, 10  # of timing
REFERENCE = "sgd_rates"  # whose steps others are timed next to

if TYPE_CHECKING:
  TaskName = str
else:
  TaskName = Literal[tuple(SHORT_TASKS)]  # what the command line accepts


@dataclasses.dataclass(frozen=True)
class ShortOptions:
  """All that determines a result."""

  task: TaskName = "digits"
  """What to train; benchmarks/workloads/short.py has the tasks."""
  optimizer: MethodName = "alrao"
  """Optimizer; benchmarks/methods.py says where its settings come from."""
  rate: float | None = None
  """Learning rate, for those that take one."""
  seed: int = 0
  """Determines initial weights, the order of examples and Alrao's rates."""

  def check(self) -> None:
    """Checks what can be without the data.

    Raises:
      OptionError: Options out of range, or that do not go together.
    """
    check_options(self, ())


@dataclasses.dataclass(frozen=True)
class ShortPlace:
  """Where the data is."""

  data_dir: Path | None = None
  """Folder below which to look for data; by default ALRAO_DATA_DIR."""


def _table(tasks: Sequence[str], methods: Sequence[str], seeds: int) -> Preset:
  bases = tuple(ShortOptions(task=task) for task in tasks)
  return Preset(bases, tuple(methods), num_seeds=seeds, num_rate_seeds=seeds)


@dataclasses.dataclass(frozen=True)
class ArenaSweep:
  """Train what is missing; a killed command goes on where it was."""

  tasks: tuple[str, ...] = tuple(ARENA_TASKS)
  """Names of the tasks."""
  methods: tuple[str, ...] = ARENA
  """Names of the methods."""
  seeds: int = 3
  """Number of runs of each method, at each rate."""
  costs: bool = True
  """Whether to time the methods' steps, too."""
  out: Path = Path("out/arena")
  """Folder of the records."""
  data_dir: Path | None = None
  """Folder below which to look for data; by default ALRAO_DATA_DIR."""

  def __call__(self) -> None:
    """Trains.

    Raises:
      OptionError: An unknown name, or no seed.
    """
    for name, given, known in (
      ("tasks", self.tasks, SHORT_TASKS),
      ("methods", self.methods, METHODS),
    ):
      for one in given:
        if one not in known:
          refuse(name, f"must be some of {', '.join(known)}", one)
    check_seeds(self.seeds)
    suite = ArenaSuite(ShortPlace(self.data_dir))
    with writing_to(self.out), Display() as display:
      for task in self.tasks:
        sweep(_table([task], self.methods, self.seeds), suite, self.out, display)
        if self.costs:
          measure_costs(task, suite.data(task), self.methods, self.out, display)


class ArenaSuite(Suite[ShortOptions, ShortPlace]):
  """Short tasks."""

  name = "arena"
  options = ShortOptions
  place = ShortPlace
  presets = {"arena": _table(tuple(ARENA_TASKS), ARENA, 3)}
  sweep_command = ArenaSweep

  def __init__(self, place: ShortPlace | None = None):
    """Prepares; nothing is loaded yet.

    Args:
      place: Where the data is.
    """
    super().__init__(place)
    self._data: tuple[str, ShortData] | None = None

  def data(self, task: str) -> ShortData:
    """Returns a task's data, that of the call before if it is the same.

    Args:
      task: Its name.

    Raises:
      DataError: It is missing or damaged.
    """
    if self._data is None or self._data[0] != task:
      self._data = task, SHORT_TASKS[task].load(self._place.data_dir)
    return self._data[1]

  def find_data(self, options: ShortOptions) -> None:
    """Loads the data of a run.

    Args:
      options: Of the run.

    Raises:
      DataError: It is missing or damaged.
    """
    self.data(options.task)

  def plan(self, options: ShortOptions, out: Path) -> Plan:
    """Returns how a run is trained.

    Args:
      options: Of the run.
      out: Folder of the results.

    Raises:
      OptionError: The options make no run.
      DataError: The data is missing or damaged.
    """
    options.check()
    task, method = SHORT_TASKS[options.task], METHODS[options.optimizer]
    config = {
      **dataclasses.asdict(options),
      "num_heads": method.num_heads if method.has_heads else None,
      "num_steps": task.num_steps,
      "batch_size": task.batch_size,
      "max_epochs": NUM_POINTS,
    }
    notes = {"suite": self.name, "chance": self.data(options.task).chance}
    # What counts is where a run ends: no early stopping.
    return make_plan([options.task], config, notes, out, patience=NUM_POINTS + 1)

  def _make_workload(self, options: ShortOptions) -> ShortWorkload:
    task = SHORT_TASKS[options.task]
    return ShortWorkload(task, self.data(options.task), METHODS[options.optimizer])


def measure_costs(
  task: str, data: ShortData, methods: Sequence[str], out: Path, display: Display
) -> None:
  """Times the steps of those methods that have not been timed, in turns with SGD's.

  Args:
    task: Name of the task.
    data: Its data.
    methods: Names of the methods.
    out: Folder of the records.
    display: Where a line is shown.
  """
  path = out / f"costs-{task}.jsonl"
  kept = records.read(path) if path.exists() else []
  timed = {row["optimizer"] for row in kept}
  missing = [name for name in methods if name not in timed]
  if not missing:
    return
  names = list(dict.fromkeys([REFERENCE, *missing]))
  times = in_turns([_timer(task, data, name) for name in names], ROUNDS)
  seconds = dict(zip(names, times.T, strict=True))
  rows = [
    {
      "kind": "cost",
      "suite": "arena",
      "task": task,
      "optimizer": name,
      "ratio": float(np.median(seconds[name] / seconds[REFERENCE])),
      "milliseconds": 1e3 * float(np.median(seconds[name])) / STEPS,
      **records.now(),
    }
    for name in missing
  ]
  records.write(path, [*kept, *rows])
  told = "  ".join(f"{row['optimizer']} {row['ratio']:.2f}" for row in rows)
  display.say(f"{task}  costs  {told}")


def _timer(task: str, data: ShortData, name: str) -> Callable[[], float]:
  """Returns a function that trains on for some steps, and returns the seconds."""
  rate = next(iter(METHODS[name].rates), None)
  workload = ShortWorkload(SHORT_TASKS[task], data, METHODS[name])
  state: Any = workload.init(0, rate)
  batches = workload.batches(0, 1)[:STEPS]
  step = functools.partial(workload.step, data=workload.data, batches=batches)

  def measure() -> float:
    nonlocal state
    begun = time.perf_counter()
    state, _ = step(state)
    jax.block_until_ready(state)
    return time.perf_counter() - begun

  measure()  # compiles
  return measure


SUITE = ArenaSuite
