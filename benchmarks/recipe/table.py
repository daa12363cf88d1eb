"""The search as a table."""

import dataclasses
import math

from benchmarks.recipe.runs import Runs
from benchmarks.recipe.search import Trial, chosen, confirm, score


def table(runs: Runs, trials: list[Trial]) -> str:
  """Returns all trials, the winner, and its comparison on fresh seeds, in Markdown.

  Args:
    runs: The runs.
    trials: The search.
  """
  tasks = list(runs.tasks)
  titles = [runs.tasks[task].label for task in tasks]
  best = [runs.reference(task) for task in tasks]
  peer = [runs.peer(task) / loss for task, (_, loss) in zip(tasks, best, strict=True)]
  lines = [
    f"{runs.count} runs. Losses on held-out data after "
    f"{runs.tasks[tasks[0]].num_steps} steps, relative to Adam at the best of 7 rates; "
    "bold: adopted.",
    "",
    _row("choice", "change", *titles, "geometric mean"),
    _row(*["---"] * (len(tasks) + 3)),
    _row("Adam, best rate", "", *[f"{rate:g}: {loss:.3f}" for rate, loss in best], "1"),
    _numbers("schedule-free AdamW", "", peer, score(peer), bold=False),
  ]
  for trial in trials:
    changes = ", ".join(f"{name}={value}" for name, value in trial.changes.items())
    ratios = list(trial.ratios.values())
    lines.append(
      _numbers(trial.coordinate, changes, ratios, trial.score, trial.adopted)
    )
  winner = chosen(trials)
  settings = ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(winner).items())
  lines += [
    "",
    f"The winner: {settings}.",
    "",
    "Two seeds that chose nothing, relative to Adam at the rate chosen before:",
    "",
    _row("method", *titles, "geometric mean"),
    _row(*["---"] * (len(tasks) + 2)),
  ]
  for name, by_task in confirm(runs, winner).items():
    means = [math.exp(score(by_task[task])) for task in tasks]
    cells = [f"{mean:.3f}" for mean in means]
    lines.append(_row(name, *cells, f"{math.exp(score(means)):.3f}"))
  return "\n".join(lines) + "\n"


def _numbers(
  name: str, changes: str, ratios: list[float], mean: float, bold: bool
) -> str:
  cells = [f"{ratio:.3f}" for ratio in [*ratios, math.exp(mean)]]
  if bold:
    name, cells = f"**{name}**", [f"**{cell}**" for cell in cells]
  return _row(name, f"`{changes}`" if changes else "", *cells)


def _row(*cells: str) -> str:
  return "| " + " | ".join(cells) + " |"
