"""What the report's pictures show."""

import dataclasses
import math
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="pictures need the extra 'bench'")

from benchmarks import figures
from benchmarks.results import Table, by_size, load

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def tables(folder: str) -> list[Table]:
  """The tables of one folder of committed records."""
  return [table for size in by_size(load([RESULTS / folder])) for table in size]


def drawn(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
  """The axes of a table's picture."""
  made = []
  monkeypatch.setattr(figures.plt, "close", made.append)
  path = tmp_path / "new" / "picture.png"
  figures.draw(table, path)
  monkeypatch.undo()
  axes = made[0].axes
  figures.plt.close(made[0])
  assert path.read_bytes().startswith(b"\x89PNG")
  assert list(path.parent.iterdir()) == [path]
  return axes


def with_runs(table: Table, change) -> Table:
  rows = [
    dataclasses.replace(row, runs=[change(run) for run in row.runs])
    for row in table.rows
  ]
  return dataclasses.replace(table, rows=rows)


def labels(axes) -> list[str]:
  return [text.get_text() for text in axes.get_legend().get_texts()]


def test_curves_are_means_by_epoch(tmp_path, monkeypatch):
  table = tables("tier_a")[0]
  axes = drawn(table, tmp_path, monkeypatch)[0]
  line = next(line for line in axes.lines if line.get_label() == "Alrao")
  assert table.alrao is not None
  runs = table.alrao.runs
  assert line.get_marker() in ("", "None")
  assert line.get_xdata().tolist() == list(range(1, len(runs[0].epochs) + 1))
  first = [run.epochs[0]["validation_loss"] for run in runs]
  assert line.get_ydata()[0] == pytest.approx(sum(first) / len(first))


def test_a_single_epoch_is_a_point(tmp_path, monkeypatch):
  def shorten(run):
    return dataclasses.replace(run, epochs=run.epochs[:1])

  table = with_runs(tables("tier_a")[0], shorten)
  axes = drawn(table, tmp_path, monkeypatch)[0]
  assert len(axes.lines) == len(table.rows)
  assert {line.get_marker() for line in axes.lines} == {"o"}


@pytest.mark.parametrize("place", [0, 3])
def test_other_rates_have_one_label_whichever_is_best(place, tmp_path, monkeypatch):
  """The first of them too, which names them all where it is not the best."""
  table = tables("tier_a")[0]
  best = table.sgd[place]

  def change(run):
    loss = (
      0.1 if (run.config["optimizer"], run.config["rate"]) == ("sgd", best.rate) else 9
    )
    return dataclasses.replace(run, summary={**run.summary, "validation_loss": loss})

  table = with_runs(table, change)
  assert table.best_sgd is not None
  assert table.best_sgd.rate == best.rate
  found = labels(drawn(table, tmp_path, monkeypatch)[0])
  assert found.count("SGD, other rates") == 1
  assert sum(label.startswith("SGD") for label in found) == 2


def test_what_diverges_does_not_hide_the_others(tmp_path, monkeypatch):
  """Text is cut off a little above the loss of a uniform guess."""
  table = tables("ptb_chars")[0]
  guess = table.rows[0].runs[0].config["chance"]
  assert guess == pytest.approx(math.log2(50))
  axes = drawn(table, tmp_path, monkeypatch)[0]
  low, high = axes.get_ylim()
  assert axes.get_ylabel() == f"validation {table.task.curve.label}"
  assert high == pytest.approx(table.task.curve_limit * guess)
  assert low < min(line.get_ydata().min() for line in axes.lines)
