"""The regression example's table and picture."""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.table

from regression_data import Problem

# Colours that colour-blind readers can tell apart (Okabe and Ito).
COLORS = {"Alrao": "#D55E00", "Adam": "#0072B2", "SGD": "0.25"}
STYLE: dict[Any, Any] = {
  "font.size": 9,
  "axes.titlesize": 10,
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "figure.constrained_layout.use": True,
}


class Row(NamedTuple):
  """A line of the table: a method at one rate, with one entry a seed.

  Attributes:
    problem: What it was trained on.
    method: The ``regression.Method``.
    rate: Its rate, if it has one.
    validation_loss: The least of all epochs; inf if none is finite, (seeds,).
    test_loss: In that epoch, (seeds,).
    explained: Share of the test targets' variance that the mean explains, (seeds,).
    run: The whole ``regression.Run``, with the first axis (seeds,).
  """

  problem: Problem
  method: Any
  rate: float
  validation_loss: np.ndarray
  test_loss: np.ndarray
  explained: np.ndarray
  run: Any


def make_row(problem: Problem, method: Any, rate: float, run: Any) -> Row:
  """Returns the line for the runs of all seeds at one rate."""
  losses = np.where(np.isfinite(run.validation_loss), run.validation_loss, np.inf)
  best = losses.argmin(axis=-1)[:, None]
  targets = problem.targets["test"]
  errors = targets - run.prediction.mean[:, : len(targets)]
  return Row(
    problem,
    method,
    rate,
    np.take_along_axis(losses, best, axis=-1)[:, 0],
    np.take_along_axis(run.test_loss, best, axis=-1)[:, 0],
    1.0 - np.square(errors).mean(axis=-1) / targets.var(),
    run,
  )


def best_rows(rows: list[Row], problem: str) -> list[Row]:
  """Returns each method's best row of a problem, by validation loss."""
  best: dict[str, Row] = {}
  for row in rows:
    if row.problem.name == problem:
      known = best.setdefault(row.method.name, row)
      if row.validation_loss.mean() < known.validation_loss.mean():
        best[row.method.name] = row
  return list(best.values())


def label(row: Row) -> str:
  """Returns a method's name, with the rate that it was given."""
  return f"SGD, rate {row.rate:g}" if row.method.name == "SGD" else row.method.name


def print_table(rows: list[Row], config: Any) -> None:
  """Prints a line for each problem, method and rate."""
  noise = "learned" if config.learn_noise else "fixed"
  table = rich.table.Table(
    title=f"Regression, {noise} noise: mean ± standard deviation of {config.seeds} "
    f"seed{'s'[: config.seeds > 1]}",
    caption="Each run at its epoch of least validation loss, of at most "
    f"{config.epochs}. Losses are in nats.",
  )
  for column in ("problem", "method", "rate", "test loss", "variance explained"):
    justify = "left" if column in ("problem", "method") else "right"
    table.add_column(column, justify=justify, no_wrap=True)
  for problem in dict.fromkeys(row.problem.name for row in rows):
    best = best_rows(rows, problem)
    for row in (row for row in rows if row.problem.name == problem):
      is_best = any(row is other for other in best)
      diverged = not np.isfinite(row.validation_loss).all()
      name = row.method.name
      table.add_row(
        problem,
        "SGD, best rate" if name == "SGD" and is_best else name,
        f"{row.rate:g}" if name == "SGD" else "none" if name == "Alrao" else "default",
        "diverged" if diverged else _spread(row.test_loss, 1.0, 3),
        "" if diverged else _spread(row.explained, 100.0, 1) + " %",
        style="bold" if is_best else None,
      )
    table.add_section()
  rich.console.Console().print(table)


def _spread(values: np.ndarray, scale: float, digits: int) -> str:
  deviation = values.std(ddof=1) if len(values) > 1 else 0.0
  return f"{scale * values.mean():.{digits}f} ± {scale * deviation:.{digits}f}"


def draw(rows: list[Row], targets: np.ndarray, path: Path) -> None:
  """Draws what the first seeds predict, the losses, and Alrao's posterior.

  Args:
    rows: Of all problems, methods and rates.
    targets: Where densities were computed.
    path: The PNG file.
  """
  part = path.with_name(f".part-{path.name}")
  with plt.rc_context(STYLE):
    figure, axes = plt.subplots(2, 3, figsize=(12.5, 7.2))
    sine, diabetes = best_rows(rows, "sine"), best_rows(rows, "diabetes")
    for axis, row in zip(axes[0], sine, strict=True):
      draw_mixture(axis, row, targets)
    draw_patients(axes[1, 0], diabetes[0])
    draw_losses(axes[1, 1], sine)
    draw_posterior(axes[1, 2], sine[0])
    figure.savefig(part, dpi=130)
    plt.close(figure)
  part.replace(path)


def draw_mixture(axis: Any, row: Row, targets: np.ndarray) -> None:
  """Draws a predictive density (shaded by its root), its mean and its deviation."""
  problem, color = row.problem, COLORS[row.method.name]
  x = problem.grid[:, 0]
  mean, deviation, density = (
    values[0, len(problem.targets["test"]) :] for values in row.run.prediction
  )
  axis.pcolormesh(
    x, targets, np.sqrt(density.T), cmap="Greys", vmin=0.0, vmax=2.2, rasterized=True
  )
  axis.plot(x, mean, color=color, lw=2.0, label="mean")
  for sign in (-1.0, 1.0):
    name = "mean ± standard deviation" if sign > 0 else None
    axis.plot(x, mean + sign * deviation, color=color, lw=1.0, ls="--", label=name)
  axis.plot(
    problem.inputs["test"][:, 0],
    problem.targets["test"],
    "o",
    ms=3,
    color="#009E73",
    mec="white",
    mew=0.4,
    label="test points",
  )
  edges = problem.inputs["train"]
  for edge in (edges.min(), edges.max()):
    axis.axvline(edge, color="0.5", lw=0.8, ls=":")
  axis.set(xlim=(x[0], x[-1]), ylim=(-3.0, 2.6), xlabel="input", ylabel="target")
  axis.set_title(f"{label(row)}: test loss {row.test_loss[0]:.2f}")
  axis.legend(loc="lower left", fontsize=7, framealpha=0.9)


def draw_patients(axis: Any, row: Row) -> None:
  """Draws test targets against their predicted means, with deviations."""
  targets = row.problem.targets["test"]
  count = len(targets)
  mean, deviation = (values[0, :count] for values in row.run.prediction[:2])
  color = COLORS[row.method.name]
  axis.errorbar(
    mean,
    targets,
    xerr=deviation,
    fmt="o",
    ms=3.5,
    color=color,
    ecolor="#F0C3A5",
    lw=0.9,
  )
  ends = [float(targets.min()) - 0.2, float(targets.max()) + 0.2]
  axis.plot(ends, ends, color="0.5", lw=1, ls=":")
  within = np.mean(np.abs(targets - mean) < deviation)
  axis.set(xlabel="predicted mean ± standard deviation", ylabel="target")
  axis.set_title(f"{row.method.name}, diabetes: {within:.0%} within one deviation")


def draw_losses(axis: Any, rows: list[Row]) -> None:
  """Draws the test loss after each epoch, mean over seeds, until one diverges."""
  for row in rows:
    name = row.method.name
    with np.errstate(invalid="ignore"):
      mean = row.run.test_loss.mean(axis=0)
    epochs = np.arange(1, len(mean) + 1)
    axis.plot(
      epochs,
      mean,
      color=COLORS[name],
      lw=2.2 if name == "Alrao" else 1.2,
      label=label(row) + ("" if np.isfinite(mean).all() else ", until one diverges"),
    )
  finite = [row.run.test_loss[np.isfinite(row.run.test_loss)] for row in rows]
  low = min(values.min() for values in finite)
  axis.set(xlabel="epoch", ylabel="test loss", ylim=(low - 0.1, 1.6))
  axis.set_title("Sine: learning curves, mean of seeds")
  axis.legend(frameon=False, fontsize=8)


def draw_posterior(axis: Any, row: Row) -> None:
  """Draws the weight of each head after each epoch of the first seed."""
  weights = row.run.head_weights[0]
  rates = np.logspace(-5, 1, weights.shape[1])
  colors = plt.get_cmap("viridis")(np.linspace(0.0, 0.92, len(rates)))
  epochs = np.arange(1, len(weights) + 1)
  for head, rate in enumerate(rates):
    axis.plot(epochs, weights[:, head], color=colors[head], lw=1.6, label=f"{rate:.2g}")
  axis.set(
    xscale="log", xlabel="epoch", ylabel="weight in the mixture", ylim=(-0.02, 1.02)
  )
  axis.set_title("Sine: which output layer is believed, one run")
  axis.legend(
    title="learning\nrate",
    loc="center left",
    bbox_to_anchor=(1.0, 0.5),
    frameon=False,
    fontsize=8,
    title_fontsize=8,
    handlelength=1.2,
    reverse=True,
  )
