"""The arena's runs and costs, measured once: a file for each task and method."""

import datetime
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from benchmarks import records
from benchmarks.arena.methods import Method
from benchmarks.arena.problem import Data, Task
from benchmarks.arena.program import Program, Start
from benchmarks.planning import OptionError
from benchmarks.records import Record

LANES = 7  # most runs that train side by side
ROUNDS, STEPS = 15, 10  # of timing

Say = Callable[[str], None]


def train(
  task: Task,
  data: Data,
  name: str,
  method: Method,
  seeds: Iterable[int],
  out: Path,
  say: Say,
) -> None:
  """Trains what is missing of one method on one task.

  Args:
    task: The task.
    data: Its data.
    name: The method's name.
    method: The method.
    seeds: Seeds of the runs, for each rate.
    out: Folder of the records.
    say: Prints a line for each few runs.
  """
  path = out / task.name / f"{name}.jsonl"
  kept = load(path, task)
  done = {(record["seed"], record["rate"]) for record in kept}
  missing = [
    Start(seed, rate)
    for seed in seeds
    for rate in method.rates
    if (seed, rate) not in done
  ]
  if not missing:
    return
  # On one core of a CPU seven runs at once saved no time on the four networks tried:
  # GRU 1.01, words 1.11, transformer 1.23, wide perceptron 1.43 of the time alone.
  program = Program(
    task,
    data,
    method.optimizer,
    any_rate=method.rates[0],
    side_by_side=jax.default_backend() != "cpu",
  )
  lanes = LANES if program.side_by_side else 1
  for first in range(0, len(missing), lanes):
    outcomes = program.run(missing[first : first + lanes])
    about = {
      "kind": "summary",
      "task": task.name,
      "method": name,
      "environment": records.environment(),
      "date": datetime.date.today().isoformat(),
    }
    kept += [{**about, **outcome} for outcome in outcomes]
    records.write(path, kept)
    losses = ", ".join(_shown(outcome["test_loss"][-1]) for outcome in outcomes)
    say(f"{task.name}  {name}  {losses}  {outcomes[0]['seconds']:.1f} s a run")


def load(path: Path, task: Task) -> list[Record]:
  """Returns the runs of a file, none if there is no such file.

  Args:
    path: The file.
    task: The task.

  Raises:
    OptionError: The runs have another length.
  """
  kept = records.read(path) if path.exists() else []
  lengths = {record["steps"][-1] for record in kept}
  if lengths - {task.num_steps}:
    raise OptionError(
      f"{path} has runs of {sorted(lengths)} steps, where {task.name} now has "
      f"{task.num_steps}. Give another --out."
    )
  return kept


def measure_costs(
  task: Task, data: Data, methods: dict[str, Method], out: Path, say: Say
) -> None:
  """Times all methods in turns, unless that has been done.

  Args:
    task: The task.
    data: Its data.
    methods: The methods; ``"sgd"`` is what the others are compared with.
    out: Folder of the records.
    say: Prints a line.
  """
  path = out / task.name / "costs.jsonl"
  if path.exists():
    return
  timers = {
    name: Program(
      task, data, method.optimizer, any_rate=method.rates[0], side_by_side=False
    ).time_steps(Start(0, method.rates[0]), STEPS)
    for name, method in methods.items()
  }
  generator = np.random.default_rng(0)
  names = list(timers)
  seconds = {name: np.zeros(ROUNDS) for name in names}
  for i in range(ROUNDS):
    for j in generator.permutation(len(names)):
      seconds[names[j]][i] = timers[names[j]]()
  ratios = {name: float(np.median(seconds[name] / seconds["sgd"])) for name in names}
  about = {
    "kind": "summary",
    "task": task.name,
    "environment": records.environment(),
    "date": datetime.date.today().isoformat(),
  }
  milliseconds = {name: 1e3 * float(np.median(seconds[name])) / STEPS for name in names}
  rows = [
    {**about, "method": name, "ratio": ratios[name], "milliseconds": milliseconds[name]}
    for name in names
  ]
  records.write(path, rows)
  say(f"{task.name}  costs  " + "  ".join(f"{n} {r:.2f}" for n, r in ratios.items()))


def _shown(loss: float | None) -> str:
  return "failed" if loss is None else f"{loss:.4f}"
