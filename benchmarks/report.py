"""Records of runs -> RESULTS.md and its pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks import figures, papers, results
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.records import write_text
from benchmarks.results import SIZE_OPTIONS, TABLE_OPTIONS, Row, RunRecords, Table

HOW_TO_READ = """\
Written by `python -m benchmarks.cifar10 report` from the records of every run; none is
left out. Each run is tested once, at its epoch of least validation loss, Alrao with the
posterior of that epoch. ± is the standard deviation over seeds. The best SGD rate is
chosen by validation loss; the test images have no say in it.

A run has **learned** if its test accuracy exceeds chance (10 %) by more than half of
what the best SGD rate's mean exceeds it by. Failed runs (a loss was not finite) are
tested at their best epoch before, if there is one; one without counts as accuracy 10 %
and is left out of the mean loss. *Alrao ahead by* is Alrao's mean accuracy minus the
row's, in points: negative where Alrao falls behind. *Speed* is training images per
second relative to SGD's, medians of epochs, on the machine that ran them.
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
  for number, (size, tables) in enumerate(results.by_size(runs).items(), 1):
    lines += [f"## {number}. {_size_title(size)}", ""]
    lines += _conditions([run for t in tables for row in t.rows for run in row.runs])
    for table in tables:
      name = f"{number}-{table.title.replace(' ', '-').replace(',', '')}.png"
      figures.draw(table, out / "figures" / name)
      lines += [f"### {table.title}", "", *_table_1(table), ""]
      lines += [*_findings(table), "", f"![{table.title}](figures/{name})", ""]
  lines += ["## Parameters", "", *_table_2(runs), ""]
  lines += ["## Optimizers", "", *_sources(runs), ""]
  path = out / "RESULTS.md"
  write_text(path, "\n".join(lines))
  return path


def _size_title(size: tuple) -> str:
  options = dict(zip(SIZE_OPTIONS, size, strict=True))
  return (
    f"{options['dataset']}, {options['num_train']:,} training images, "
    f"at most {options['max_epochs']} epochs"
  )


def _conditions(runs: list[RunRecords]) -> list[str]:
  config = runs[0].config
  seen = {
    name: sorted({str(run.summary["environment"][name]) for run in runs})
    for name in ("device", "cores", "jax", "flax", "optax", "alrao_jax", "commit")
  }
  text = (
    f"{config['num_validation']:,} validation and {config['num_test']:,} test images, "
    f"batches of {config['batch_size']}, early stopping after {config['patience']} "
    f"epochs, {'with' if config['augment'] else 'without'} augmentation, "
    f"{config['dtype']}."
  )
  seen["date"] = sorted({run.summary["date"] for run in runs})
  versions = "; ".join(f"{name} {', '.join(values)}" for name, values in seen.items())
  hit = sum(run.summary["ending"] == "maximum" for run in runs)
  lines = [text, "", f"{len(runs)} runs, {hit} of which hit the maximum of epochs."]
  if not config["real_data"]:
    lines += ["", "**Not CIFAR-10**: this shows the pipeline, not the papers' result."]
  return [*lines, "", f"On: {versions}.", ""]


def _table_1(table: Table) -> list[str]:
  best, alrao = table.best_sgd, table.alrao
  network, width, _ = (table.rows[0].runs[0].config[name] for name in TABLE_OPTIONS)
  with_papers = width == 1 and (network, "alrao") in papers.TABLE_1
  header = ["method", "runs", "learned", "test loss", "test accuracy, %"]
  header += ["Alrao ahead by", "speed"]
  if with_papers:
    header += ["papers' loss", "papers' accuracy, %", "papers' Alrao ahead by"]
  lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
  ours = [row for row in table.rows if row.optimizer != "sgd" or row is best]
  rest = [row for row in table.sgd if row is not best]
  for row in ours + rest:
    label = f"**{row.label}, best rate**" if row is best else row.label
    losses = [run.summary["test_loss"] for run in row.runs]
    ahead = "" if alrao is None or row is alrao else _ahead(alrao, row)
    cells = [
      label,
      str(len(row.runs)),
      _num_learned(table, row),
      _spread([loss for loss in losses if loss is not None], 1.0, 3),
      _spread(row.accuracies, 100.0, 2),
      ahead,
      _speed(table, row),
    ]
    if with_papers:
      cells += _papers_cells(network, row, row is best)
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def _papers_cells(network: str, row: Row, is_best: bool) -> list[str]:
  figure = papers.TABLE_1.get((network, row.optimizer))
  if figure is None or (row.optimizer == "sgd" and not is_best):
    return ["", "", ""]
  ahead = papers.TABLE_1[network, "alrao"].accuracy - figure.accuracy
  return [
    f"{figure.loss:.2f} ± {figure.loss_sd:.2f}",
    f"{figure.accuracy:.1f} ± {figure.accuracy_sd:.1f}",
    "" if row.optimizer == "alrao" else f"{ahead:+.1f}",
  ]


def _findings(table: Table) -> list[str]:
  best, alrao = table.best_sgd, table.alrao
  lines = []
  if best is not None:
    learn = sum(row.mean_accuracy > (table.threshold or 0) for row in table.sgd)
    lines.append(f"- {learn} of {len(table.sgd)} SGD rates learn.")
  if alrao is not None and best is not None:
    accuracy = alrao.mean_accuracy
    beat = sum(row.mean_accuracy > accuracy for row in table.sgd)
    lines[-1] += f" {beat} of {len(table.sgd)} beat Alrao."
    sweep = sum(row.runs[0].summary["seconds"] for row in table.sgd)
    one = float(np.median([run.summary["seconds"] for run in alrao.runs]))
    lines.append(
      f"- One run of Alrao took {one:,.0f} s; one of each SGD rate, {sweep:,.0f} s."
    )
  if alrao is not None:
    ahead_of = [
      row.label
      for row in table.rows
      if row.optimizer not in ("alrao", "sgd") or row is best
      if row.mean_accuracy > alrao.mean_accuracy
    ]
    behind = "; ".join(ahead_of) or "none"
    lines.append(f"- Methods with a higher mean accuracy than Alrao's: {behind}.")
  failed = [
    f"{row.label} ({count} of {len(row.runs)})"
    for row in table.rows
    if (count := sum(run.summary["ending"] == "failed" for run in row.runs))
  ]
  lines.append(
    f"- Failed with a loss that was not finite: {'; '.join(failed) or 'none'}."
  )
  return lines


def _table_2(runs: list[RunRecords]) -> list[str]:
  counts: dict[tuple, list[int | None]] = {}
  for run in runs:
    key = tuple(run.config[name] for name in TABLE_OPTIONS)
    row = counts.setdefault(key, [None, None])
    row[run.config["num_heads"] is not None] = run.summary["num_parameters"]
  lines = [
    "| network | ordinary | with Alrao's heads | papers: ordinary | papers: 10 heads |",
    "| --- | --- | --- | --- | --- |",
  ]
  for (network, width, norm), ours in sorted(counts.items()):
    known = papers.TABLE_2.get(network) if width == 1 and norm == "batch" else None
    cells = [f"{count:,}" if count else "" for count in [*ours, *(known or (0, 0))]]
    lines.append(
      f"| {results.table_title(network, width, norm)} | " + " | ".join(cells) + " |"
    )
  return lines


def _sources(runs: list[RunRecords]) -> list[str]:
  used = {run.config["optimizer"] for run in runs}
  return [
    f"- **{optimizer.label}**: {optimizer.source}"
    for name, optimizer in OPTIMIZERS.items()
    if name in used
  ]


def _num_learned(table: Table, row: Row) -> str:
  if table.threshold is None:
    return ""
  return str(sum(accuracy > table.threshold for accuracy in row.accuracies))


def _ahead(alrao: Row, row: Row) -> str:
  return f"{100 * (alrao.mean_accuracy - row.mean_accuracy):+.2f}"


def _speed(table: Table, row: Row) -> str:
  def median(rows: Sequence[Row]) -> float:
    runs = [run for row in rows for run in row.runs]
    return float(np.median([run.summary["images_per_second"] for run in runs]))

  return f"{median([row]) / median(table.sgd):.2f}" if table.sgd else ""


def _spread(values: list[float], scale: float, digits: int) -> str:
  if not values:
    return "none"
  scaled = scale * np.array(values)
  text = f"{scaled.mean():.{digits}f}"
  return text + (f" ± {scaled.std(ddof=1):.{digits}f}" if len(values) > 1 else "")
