"""The quick start's table, picture and results file."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.table


def summarize(runs: list[dict[str, Any]], config: Any, seconds: float) -> dict:
  """Returns the results: one row a method (mean and deviation), and the runs.

  Args:
    runs: What each training returned.
    config: The dataclass of options that they ran with.
    seconds: Time of all runs together.
  """
  scores_of: dict[tuple, list[dict[str, float]]] = {}
  for run in runs:
    # As in the papers, the epoch of least validation loss counts, for every method.
    best = min(run["curve"][1:], key=validation_loss)
    scores_of.setdefault((run["method"], run["rate"]), []).append(best)
  rows = []
  for (method, rate), scores in scores_of.items():
    row: dict[str, Any] = {"method": method, "rate": rate}
    for name in scores[0]:
      values = np.array([score[name] for score in scores])
      with np.errstate(invalid="ignore"):
        row[name] = float(values.mean())
        row[f"{name}_sd"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    rows.append(row)
  # The validation images choose SGD's rate too, not the test images.
  sgd = [row for row in rows if row["method"] == "SGD"]
  return {
    "environment": environment(),
    "config": {**dataclasses.asdict(config), "out": str(config.out)},
    "seconds": seconds,
    "best_sgd_rate": min(sgd, key=validation_loss)["rate"],
    "summary": rows,
    "runs": runs,
  }


def validation_loss(scores: dict[str, float]) -> float:
  """Returns the loss to choose by; a diverged run is never the best."""
  loss = scores["validation_loss"]
  return loss if math.isfinite(loss) else math.inf


def environment() -> dict[str, str]:
  """Returns what the numbers depend on besides the program."""
  packages = ("alrao-jax", "jax", "flax", "optax", "numpy", "scikit-learn")
  versions = {}
  for name in packages:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "not installed"
  return {
    "date": datetime.date.today().isoformat(),
    "command": " ".join(["python", *sys.argv]),
    "device": jax.devices()[0].device_kind,
    "cores": str(os.cpu_count()),
    "python": platform.python_version(),
    **versions,
  }


def print_table(results: dict[str, Any]) -> None:
  """Prints a row a method."""
  epochs, seeds = results["config"]["epochs"], results["config"]["seeds"]
  table = rich.table.Table(
    title=f"Digits: mean ± standard deviation of {seeds} seed{'s'[: seeds > 1]}, "
    f"{epochs} epoch{'s'[: epochs > 1]}",
    caption="Each run at its epoch of least validation loss.",
  )
  for column in ("method", "rate", "train loss", "test loss", "test accuracy"):
    justify = "left" if column == "method" else "right"
    table.add_column(column, justify=justify, no_wrap=True)

  def spread(name: str, scale: float = 1.0, digits: int = 3) -> str:
    mean, deviation = scale * row[name], scale * row[f"{name}_sd"]
    if not math.isfinite(mean):
      return "diverged"
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"

  for row in results["summary"]:
    best = row["method"] == "SGD" and row["rate"] == results["best_sgd_rate"]
    table.add_row(
      "SGD, best rate" if best else row["method"],
      "none" if row["rate"] is None else f"{row['rate']:g}",
      spread("train_loss"),
      spread("test_loss"),
      spread("test_accuracy", 100.0, 1) + " %",
      style="bold" if best or row["method"] == "Alrao" else None,
    )
  rich.console.Console().print(table)


def write(results: dict[str, Any], folder: Path) -> None:
  """Writes ``results.json`` and ``quickstart.png`` into an existing folder."""
  text = json.dumps(without_nan(results))
  write_whole(folder / "results.json", lambda path: path.write_text(text))
  picture = folder / "quickstart.png"
  write_whole(picture, lambda path: draw(results, path))
  print(f"{results['seconds']:.0f} s. Wrote {picture} and {folder / 'results.json'}.")


def write_whole(path: Path, write_to: Callable[[Path], Any]) -> None:
  """Writes to another file first, so that ``path`` is never half written."""
  part = path.with_name(f".part-{path.name}")
  write_to(part)
  part.replace(path)


def without_nan(value: Any) -> Any:
  """Returns nested dicts and lists, with None for numbers that JSON lacks."""
  if isinstance(value, dict):
    return {name: without_nan(item) for name, item in value.items()}
  if isinstance(value, list):
    return [without_nan(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


# --- The picture

# Colours that colour-blind readers can tell apart (Okabe and Ito); SGD in grey.
ALRAO, ADAM, GREY = "#D55E00", "#0072B2", "0.45"
STYLE: dict[Any, Any] = {
  "font.size": 9,
  "axes.titlesize": 10,
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "figure.constrained_layout.use": True,
  "figure.constrained_layout.w_pad": 0.1,
}


def draw(results: dict[str, Any], path: Path) -> None:
  """Draws learning curves, the heads' posterior and the units' rates to a file."""
  with plt.rc_context(STYLE):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 3.8))
    draw_curves(left, results)
    draw_posterior(middle, results)
    draw_unit_rates(right, results)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def draw_curves(axes: Any, results: dict[str, Any]) -> None:
  """Draws the test loss after each epoch, mean over seeds, of every method."""
  ends = []
  for row in results["summary"]:
    same = (row["method"], row["rate"])
    runs = [run for run in results["runs"] if (run["method"], run["rate"]) == same]
    mean = np.mean(
      [[scores["test_loss"] for scores in run["curve"]] for run in runs], axis=0
    )
    best = row["method"] == "SGD" and row["rate"] == results["best_sgd_rate"]
    color = {"Alrao": ALRAO, "Adam": ADAM}.get(row["method"], "0.2" if best else GREY)
    name = row["method"] if color in (ALRAO, ADAM) else f"SGD {row['rate']:g}"
    axes.plot(mean, color=color, lw=2.2 if color == ALRAO else 1.2 if best else 1.0)
    if math.isfinite(mean[-1]):
      ends.append((mean[-1], name + (" (best)" if best else ""), color))
  epochs = results["config"]["epochs"]
  top = max(run["curve"][0]["test_loss"] for run in results["runs"])
  axes.set(yscale="log", xlabel="epoch", ylabel="test loss", xlim=(0, epochs))
  axes.set_ylim(top=2 * top)  # what diverges may leave the picture
  axes.xaxis.get_major_locator().set_params(integer=True)
  axes.set_title("Learning curves, mean over seeds")
  label_ends(axes, ends)


def label_ends(axes: Any, ends: list[tuple[float, str, str]]) -> None:
  """Writes each curve's name next to its end, and separates close names."""
  ends = sorted(ends)
  low, high = np.log10(axes.get_ylim())
  heights = (np.log10([value for value, _, _ in ends]) - low) / (high - low)
  heights = np.minimum(heights, 1.0)
  for _ in range(200):  # push both neighbours apart equally
    for i in range(len(heights) - 1):
      lack = 0.052 - (heights[i + 1] - heights[i])
      if lack > 0:
        heights[i : i + 2] += -lack / 2, lack / 2
  for height, (_, name, color) in zip(heights, ends, strict=True):
    weight = "bold" if color == ALRAO else "normal"
    axes.annotate(
      name,
      (1.02, height),
      xycoords="axes fraction",
      va="center",
      color=color,
      fontsize=8,
      fontweight=weight,
    )


def draw_posterior(axes: Any, results: dict[str, Any]) -> None:
  """Draws each head's weight over the steps of the first seed (papers, Fig. 4)."""
  run = next(run for run in results["runs"] if run["method"] == "Alrao")
  weights = np.array(run["head_weights"])
  steps = np.arange(1, len(weights) + 1)
  colors = plt.get_cmap("viridis")(np.linspace(0.0, 0.92, weights.shape[1]))
  for head, rate in enumerate(run["head_rates"]):
    axes.plot(steps, weights[:, head], color=colors[head], lw=1.6, label=f"{rate:.2g}")
  axes.set(xscale="log", xlabel="step", ylabel="weight in the mixture")
  axes.set(ylim=(-0.02, 1.02), xlim=(1, max(2, len(steps))))
  axes.set_title("Which of the ten output layers is believed, one run")
  axes.legend(
    title="learning\nrate",
    loc="center left",
    bbox_to_anchor=(1.0, 0.5),
    frameon=False,
    fontsize=8,
    title_fontsize=8,
    handlelength=1.2,
    reverse=True,
  )


def draw_unit_rates(axes: Any, results: dict[str, Any]) -> None:
  """Draws how many units drew a rate in each half decade, over all seeds."""
  runs = [run for run in results["runs"] if run["method"] == "Alrao"]
  rates = np.concatenate([run["unit_rates"] for run in runs])
  edges = np.logspace(-5, 1, 13)
  axes.hist(rates, bins=list(edges), color=ALRAO, alpha=0.7, edgecolor="white", lw=0.8)
  expected = len(rates) / (len(edges) - 1)
  axes.axhline(expected, color="0.2", lw=1, ls="--", label="log-uniform, in the mean")
  axes.set(xscale="log", xlabel="learning rate", ylabel="units in each half decade")
  axes.set_ylim(top=1.25 * axes.get_ylim()[1])
  axes.legend(loc="upper right", frameon=False, fontsize=8)
  draws = f"{len(runs)} draws of the" if len(runs) > 1 else "the"
  axes.set_title(f"Rates of {draws} {len(rates) // len(runs)} units")
