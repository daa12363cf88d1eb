"""The arena's tables, in Markdown."""

from collections.abc import Mapping, Sequence

from benchmarks.arena.methods import METHODS
from benchmarks.arena.problem import Task
from benchmarks.arena.standings import Costs, Runs, geometric_mean, relative, result
from benchmarks.records import Record, conditions_of_all


def tables(
  tasks: Mapping[str, Task],
  runs: Mapping[str, Runs],
  timings: Mapping[str, Sequence[Record]],
) -> str:
  """Returns the tables of what has been measured.

  Args:
    tasks: The tasks, by name.
    runs: Their runs, by task and method; tasks with a method missing are left out.
    timings: What timing the steps of a task gave, a record for each method.
  """
  whole = [name for name in tasks if set(runs.get(name, {})) == set(METHODS)]
  lines = ["# Arena", ""]
  if not whole:
    return "\n".join([*lines, "No task has been trained with all methods yet.", ""])
  seeds = {len(result(kept).losses) for task in whole for kept in runs[task].values()}
  tuned = [name for name, method in METHODS.items() if method.is_tuned]
  labels = [tasks[name].label for name in whole]
  count = "/".join(map(str, sorted(seeds)))
  lines += [
    f"Test losses relative to the better of the tuned optimizers, means of {count} "
    "runs; below 1 is better than any tuned rate. A run that fails (ends no better "
    "than knowing nothing) counts with the loss of knowing nothing. Tuned rates are "
    "chosen on held-out data.",
  ]
  failures = {
    name: sum(result(runs[task][name]).failures for task in whole) for name in METHODS
  }
  equal_steps = {task: relative(runs[task], tuned) for task in whole}
  lines += _section("Equal steps", labels, whole, equal_steps, failures)
  if all(task in timings for task in whole):
    costs: dict[str, Costs] = {
      task: {row["method"]: row["ratio"] for row in timings[task]} for task in whole
    }
    equal_compute = {task: relative(runs[task], tuned, costs[task]) for task in whole}
    lines += _section("Equal compute", labels, whole, equal_compute, failures)
    lines += [
      "",
      "What a run has reached when SGD's steps would have taken their whole time, read "
      "off its curve, which has eight points, and before the first one is a line from "
      "the loss of knowing nothing: rough for steps many times as long. The seven runs "
      "of a tuned optimizer count as one.",
    ]
    lines += ["", "## Time of a step, in SGD's", ""]
    lines += [_row("method", *labels), _row(*["---"] * (len(labels) + 1))]
    for name, method in METHODS.items():
      cells = [f"{costs[task][name]:.2f}" for task in whole]
      lines.append(_row(method.optimizer.label, *cells))
  lines += ["", "## Test losses, and the rates chosen", ""]
  lines += [_row("method", *labels), _row(*["---"] * (len(labels) + 1))]
  for name, method in METHODS.items():
    found = [result(runs[task][name]) for task in whole]
    cells = [
      f"{one.mean:.3f}" + (f" ({one.rate:g})" if method.is_tuned else "")
      for one in found
    ]
    lines.append(_row(method.optimizer.label, *cells))
  lines += ["", "## Settings", ""]
  lines += [
    f"- **{m.optimizer.label}**: {m.optimizer.source}" for m in METHODS.values()
  ]
  used = [run for task in whole for kept in runs[task].values() for run in kept]
  lines += ["", f"`python -m benchmarks.arena run`; {conditions_of_all(used)}"]
  timed = [row for task in whole for row in timings.get(task, ())]
  if timed:
    lines.append(f"Times of steps: {conditions_of_all(timed)}")
  return "\n".join(lines) + "\n"


def _section(
  title: str,
  labels: Sequence[str],
  whole: Sequence[str],
  ratios: Mapping[str, Mapping[str, float]],
  failures: Mapping[str, int],
) -> list[str]:
  means = {
    name: geometric_mean([ratios[task][name] for task in whole]) for name in METHODS
  }
  lines = ["", f"## {title}", ""]
  lines.append(_row("method", *labels, "geometric mean", "worst", "failures"))
  lines.append(_row(*["---"] * (len(labels) + 4)))
  for name in sorted(METHODS, key=lambda name: means[name]):
    values = [ratios[task][name] for task in whole]
    cells = [f"{value:.3f}" for value in [*values, means[name], max(values)]]
    lines.append(_row(METHODS[name].optimizer.label, *cells, str(failures[name])))
  return lines


def _row(*cells: str) -> str:
  return "| " + " | ".join(cells) + " |"
