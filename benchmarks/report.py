"""Records of runs -> RESULTS.md and its pictures."""

import collections
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from benchmarks import figures, papers, results
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.records import write_text
from benchmarks.results import Row, RunRecords, Table
from benchmarks.tasks import Measure, Task

HOW_TO_READ = """\
Written by `python -m benchmarks.cifar10 report` from the records of every run; none is
left out. Each run is tested once, at its epoch of least validation loss, Alrao with the
posterior of that epoch. ± is the standard deviation over seeds. The best SGD rate is
chosen by validation loss; the test part has no say in it.

A run has **learned** if its test score (of images, the accuracy) is better than chance
by more than half of what the best SGD rate's mean is better by. Failed runs (a loss was
not finite) are tested at their best epoch before, if there is one; one without counts
as a score of chance and is left out of the means of other measures. *Alrao ahead by* is
Alrao's mean score minus the row's: negative where Alrao falls behind. The papers'
columns are of the papers' own network and training, whatever the size of ours. What a
step of Alrao costs beside one of SGD is in [OVERHEAD.md](OVERHEAD.md), measured step by
step in turns.
"""


def write(folders: Iterable[Path], out: Path) -> Path:
  """Writes ``RESULTS.md``, and pictures below ``figures/``.

  Args:
    folders: Where the records are, with their subfolders.
    out: Where the report goes.

  Returns:
    The report.

  Raises:
    RecordError: A file is damaged, or no run has ended.
  """
  runs = results.load(folders)
  lines = ["# Results", "", HOW_TO_READ]
  drawn = collections.Counter[str]()
  for number, tables in enumerate(results.by_size(runs), 1):
    found = [run for table in tables for row in table.rows for run in row.runs]
    task, config = found[0].task, found[0].config
    lines += [f"## {number}. {task.title}: {task.size.format(**config)}", ""]
    lines += _conditions(found)
    for table in tables:
      name = table.title.replace(" ", "-").replace(",", "")
      drawn[name] += 1  # a network may be trained at several sizes
      name += f"-{drawn[name]}.png" if drawn[name] > 1 else ".png"
      figures.draw(table, out / "figures" / name)
      lines += [f"### {table.title}", "", *_table_1(table), ""]
      lines += [*_findings(table), "", f"![{table.title}](figures/{name})", ""]
  lines += ["## Parameters", "", *_table_2(runs), ""]
  lines += ["## Optimizers", "", *_sources(runs), ""]
  path = out / "RESULTS.md"
  write_text(path, "\n".join(lines))
  return path


def _conditions(runs: list[RunRecords]) -> list[str]:
  task, config = runs[0].task, runs[0].config
  seen = {
    name: sorted({str(run.summary["environment"][name])[:12] for run in runs})
    for name in ("device", "cores", "jax", "flax", "optax", "alrao_jax", "commit")
  }
  seen["date"] = sorted({run.summary["date"] for run in runs})
  options = ", ".join(f"{name} {config[name]}" for name in task.size_options)
  versions = "; ".join(f"{name} {', '.join(values)}" for name, values in seen.items())
  hit = sum(run.summary["ending"] == "maximum" for run in runs)
  lines = [
    f"{len(runs)} runs, {hit} of which hit the maximum of epochs.",
    "",
    f"Options: {options}.",
  ]
  if task.note:
    lines += ["", task.note]
  damaged = {name for run in runs for name in run.summary.get("skipped", ())}
  if damaged:
    count = sum(bool(run.summary.get("skipped")) for run in runs)
    lines += ["", f"{count} runs left out damaged images, {len(damaged)} in all."]
  if not config["real_data"]:
    lines += [
      "",
      f"**{task.not_real}**: this shows the pipeline, not the papers' result.",
    ]
  return [*lines, "", f"On: {versions}.", ""]


def _table_1(table: Table) -> list[str]:
  best, alrao, task = table.best_sgd, table.alrao, table.task
  with_papers = any(_papers(row, best) for row in table.rows)
  header = ["method", "runs", "learned"]
  header += [f"test {measure.label}" for measure in task.measures]
  header += ["Alrao ahead by"]
  if with_papers:
    header += [f"papers' {measure.label}" for measure in task.measures]
    header += ["papers' Alrao ahead by"]
  lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
  ours = [row for row in table.rows if row.optimizer != "sgd" or row is best]
  rest = [row for row in table.sgd if row is not best]
  for row in ours + rest:
    ahead = None
    if alrao is not None and row is not alrao:
      ahead = table.lead(alrao.mean_score, row.mean_score)
    cells = [
      f"**{row.label}, best rate**" if row is best else row.label,
      str(len(row.runs)),
      _num_learned(table, row),
      *(_measured(row, measure, task) for measure in task.measures),
      _signed(ahead, task),
    ]
    if with_papers:
      cells += _papers_cells(table, row)
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def _measured(row: Row, measure: Measure, task: Task) -> str:
  if measure == task.score:
    return _spread(row.scores, measure)
  values = [run.summary[f"test_{measure.name}"] for run in row.runs]
  return _spread([value for value in values if value is not None], measure)


def _papers(row: Row, best: Row | None) -> papers.Figures | None:
  if row.optimizer == "sgd" and row is not best:
    return None
  return row.runs[0].task.papers(row.runs[0].config)


def _papers_cells(table: Table, row: Row) -> list[str]:
  task, found = table.task, _papers(row, table.best_sgd)
  if found is None:
    return [""] * (len(task.measures) + 1)
  cells = []
  for measure in task.measures:
    mean, sd = found[measure.name]
    # As many digits as the papers have.
    text = f"{measure.scale * mean:.{measure.digits - 1}f}"
    spread = "" if sd is None else f" ± {measure.scale * sd:.{measure.digits - 1}f}"
    cells.append(text + spread)
  alrao = None if table.alrao is None else _papers(table.alrao, None)
  if alrao is None or row.optimizer == "alrao":
    return [*cells, ""]
  score = task.score.name
  return [*cells, _signed(table.lead(alrao[score].mean, found[score].mean), task, 1)]


def _findings(table: Table) -> list[str]:
  best, alrao = table.best_sgd, table.alrao
  lines = []
  if best is not None:
    learn = sum(table.has_learned(row.mean_score) for row in table.sgd)
    lines.append(f"- {learn} of {len(table.sgd)} SGD rates learn.")
  if alrao is not None and best is not None:
    beat = sum(table.lead(row.mean_score, alrao.mean_score) > 0 for row in table.sgd)
    lines[-1] += f" {beat} of {len(table.sgd)} beat Alrao."
    sweep = sum(row.runs[0].summary["epochs"] for row in table.sgd)
    one = float(np.median([run.summary["epochs"] for run in alrao.runs]))
    lines.append(
      f"- One run of Alrao took {one:g} epochs; one of each SGD rate, {sweep}."
    )
  if alrao is not None:
    ahead_of = [
      row.label
      for row in table.rows
      if row.optimizer not in ("alrao", "sgd") or row is best
      if table.lead(row.mean_score, alrao.mean_score) > 0
    ]
    ahead_of = "; ".join(ahead_of) or "none"
    lines.append(f"- Methods with a better mean score than Alrao's: {ahead_of}.")

  def counted(holds: Callable[[RunRecords], bool]) -> str:
    counts = ((row, sum(map(holds, row.runs))) for row in table.rows)
    return "; ".join(
      f"{row.label} ({count} of {len(row.runs)})" for row, count in counts if count
    )

  def has_failed(run: RunRecords) -> bool:
    return run.summary["ending"] == "failed"

  def went_on(run: RunRecords) -> bool:
    nonfinite = any(epoch["nonfinite_steps"] for epoch in run.epochs)
    return nonfinite and not has_failed(run)

  lines.append(
    f"- Failed with a loss that was not finite: {counted(has_failed) or 'none'}."
  )
  if survivors := counted(went_on):
    lines.append(f"- Trained on after such losses: {survivors}.")
  return lines


def _table_2(runs: list[RunRecords]) -> list[str]:
  counts: dict[tuple, dict[int | None, int]] = {}  # by number of heads
  for run in runs:
    title = run.task.table_title(run.config)
    known = papers.TABLE_2.get(title.removesuffix(", width 1"), (0, 0))
    ours = counts.setdefault((title, *known), {})
    ours[run.config["num_heads"]] = run.summary["num_parameters"]
  header = ["network", "ordinary", "with heads (how many)"]
  header += ["papers: ordinary", "papers: 10 heads"]
  lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
  for (title, *known), ours in sorted(counts.items(), key=lambda item: item[0]):
    ordinary = ours.pop(None, None)
    with_heads = ", ".join(f"{count:,} ({n})" for n, count in sorted(ours.items()))
    cells = [f"{count:,}" if count else "" for count in (ordinary, *known)]
    cells.insert(1, with_heads)
    lines.append(f"| {title} | " + " | ".join(cells) + " |")
  return lines


def _sources(runs: list[RunRecords]) -> list[str]:
  used = {run.config["optimizer"] for run in runs}
  return [
    f"- **{optimizer.label}**: {optimizer.source}"
    for name, optimizer in OPTIMIZERS.items()
    if name in used
  ]


def _num_learned(table: Table, row: Row) -> str:
  if table.best_sgd is None:
    return ""
  return str(sum(table.has_learned(score) for score in row.scores))


def _signed(lead: float | None, task: Task, fewer_digits: int = 0) -> str:
  if lead is None:
    return ""
  return f"{task.score.scale * lead:+.{task.score.digits - fewer_digits}f}"


def _spread(values: list[float], measure: Measure) -> str:
  if not values:
    return "none"
  scaled = measure.scale * np.array(values)
  text = f"{scaled.mean():.{measure.digits}f}"
  if len(values) == 1:
    return text
  return f"{text} ± {scaled.std(ddof=1):.{measure.digits}f}"
