"""The report's pictures: learning curves and head posterior of one table."""

import itertools
import math
import os
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.results import Row, Table
from benchmarks.tasks import Measure


def draw(table: Table, path: Path) -> None:
  """Draws a table's learning curves, and Alrao's posterior where it has run.

  Args:
    table: The table.
    path: The PNG file; its folder is made if need be.
  """
  alrao = table.alrao
  parts = ("train", "validation") if table.task.train_curves else ("validation",)
  columns = len(parts) + (alrao is not None)
  figure, axes = plt.subplots(
    1, columns, figsize=(6.5 * columns, 4), layout="constrained", squeeze=False
  )
  for axis, part in zip(axes[0], parts, strict=False):
    _curves(axis, table, part)
  if alrao is not None:
    _posterior(axes[0, -1], alrao)
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as aside:
    part = Path(aside) / path.name
    figure.savefig(part, dpi=100)
    os.replace(part, path)
  plt.close(figure)


def _curves(axes, table: Table, part: str) -> None:
  """A measure by epoch, mean over the seeds.

  SGD's other rates are grey, or in shades of blue where they are to be told apart.
  """
  measure, told_apart = table.task.curve, table.task.train_curves
  best = table.best_sgd
  others = [row for row in table.sgd if row is not best]
  colors = itertools.cycle(plt.get_cmap("tab20")(np.r_[0:20:2, 1:20:2]))
  shades = plt.get_cmap("Blues")(np.linspace(0.3, 0.9, max(1, len(others))))
  for row in table.rows:
    curve = _mean_curve(row, measure, part)
    marker = "o" if len(curve[0]) == 1 else ""  # a single point has no line
    if row in others and told_apart:
      shade = shades[others.index(row)]
      axes.plot(*curve, marker, color=shade, linewidth=1, label=row.label, zorder=1)
    elif row in others:
      label = "SGD, other rates" if row is others[0] else None
      axes.plot(*curve, marker, color="0.8", linewidth=1, label=label, zorder=1)
    else:
      width = 2.5 if row.optimizer == "alrao" else 1.3
      color = "black" if row is best else next(colors)
      style = {"linewidth": width, "color": color}
      axes.plot(*curve, marker, **style, label=row.label, zorder=2)
  values = np.concatenate([_mean_curve(row, measure, part)[1] for row in table.rows])
  if table.task.curve_limit is not None and np.isfinite(values).any():
    # What diverges, or stays at chance, shall not hide the others.
    low = np.nanmin(values)
    chance = table.rows[0].runs[0].config["chance"]  # a score
    guess = chance if measure == table.task.score else -math.log(chance)
    axes.set_ylim(0.9 * low, max(table.task.curve_limit * guess, 1.1 * low))
  axes.xaxis.get_major_locator().set_params(integer=True)
  title = f"{part} {measure.label}"
  axes.set(xlabel="epoch", ylabel=title, title="Learning curves")
  axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _mean_curve(row: Row, measure: Measure, part: str) -> tuple[np.ndarray, np.ndarray]:
  """Epochs and the measure's mean, as far as the shortest run goes."""
  length = min(len(run.epochs) for run in row.runs)
  name = f"{part}_{measure.name}"
  values = [
    [np.nan if record[name] is None else record[name] for record in run.epochs[:length]]
    for run in row.runs
  ]
  return np.arange(1, length + 1), measure.scale * np.mean(values, axis=0)


def _posterior(axes, row: Row) -> None:
  """Weight of each head over the steps of the first run."""
  run = row.runs[0]
  per_epoch = run.epochs[0]["steps"][-1] + 1
  steps = [
    (record["epoch"] - 1) * per_epoch + step
    for record in run.epochs
    for step in record["steps"]
  ]
  weights = np.array([w for record in run.epochs for w in record["head_weights"]])
  colors = plt.get_cmap("viridis")(np.linspace(0, 0.95, weights.shape[1]))
  for head, color in enumerate(colors):
    axes.plot(steps, weights[:, head], color=color, label=f"head {head + 1}")
  axes.set(
    xlabel="step",
    ylabel="posterior weight",
    title=f"Alrao's heads, slowest to fastest (seed {run.config['seed']})",
    ylim=(-0.02, 1.02),
  )
  axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
