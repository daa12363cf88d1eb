"""What the report's pictures show."""

import dataclasses
import math
from pathlib import Path

import numpy as np
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
  with monkeypatch.context() as patch:
    patch.setattr(figures.plt, "close", made.append)
    figures.draw(table, tmp_path / "new" / "picture.png")
  figures.plt.close(made[0])
  return made[0].axes


def with_runs(table: Table, change) -> Table:
  rows = [
    dataclasses.replace(row, runs=[change(run) for run in row.runs])
    for row in table.rows
  ]
  return dataclasses.replace(table, rows=rows)


def labels(axes) -> list[str]:
  return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_picture_is_written_and_nothing_else(tmp_path, monkeypatch):
  drawn(tables("tier_a")[0], tmp_path, monkeypatch)
  (path,) = (tmp_path / "new").iterdir()
  assert path.name == "picture.png"
  assert path.read_bytes().startswith(b"\x89PNG")


def test_curves_are_means_as_far_as_the_shortest_run_goes(tmp_path, monkeypatch):
  def shorten(run):
    return dataclasses.replace(run, epochs=run.epochs[: 3 + run.config["seed"]])

  table = with_runs(tables("tier_a")[0], shorten)
  axes = drawn(table, tmp_path, monkeypatch)[0]
  line = next(line for line in axes.lines if line.get_label() == "Alrao")
  assert table.alrao is not None
  losses = [
    [record["validation_loss"] for record in run.epochs[:3]] for run in table.alrao.runs
  ]
  assert line.get_marker() in ("", "None")
  assert line.get_xdata().tolist() == [1, 2, 3]
  np.testing.assert_allclose(line.get_ydata(), np.mean(losses, axis=0))


def test_a_single_epoch_is_a_point(tmp_path, monkeypatch):
  def shorten(run):
    return dataclasses.replace(run, epochs=run.epochs[:1])

  table = with_runs(tables("tier_a")[0], shorten)
  axes = drawn(table, tmp_path, monkeypatch)[0]
  assert len(axes.lines) == len(table.rows)
  assert {line.get_marker() for line in axes.lines} == {"o"}


@pytest.mark.parametrize("place", [0, 3])
def test_other_rates_have_one_label_whichever_is_best(place, tmp_path, monkeypatch):
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
  assert max(np.nanmax(line.get_ydata()) for line in axes.lines) > 1.5 * high
  assert axes.get_ylabel() == f"validation {table.task.curve.label}"
  assert high == pytest.approx(table.task.curve_limit * guess)
  assert low < min(np.nanmin(line.get_ydata()) for line in axes.lines)
