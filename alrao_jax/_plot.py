"""The picture of a report."""

import math
import os
from typing import TYPE_CHECKING, Any

from ._optional import optional

if TYPE_CHECKING:
  from ._report import Report

# Okabe and Ito's colours, told apart by everybody.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "0.85"


def plot(report: "Report", path: str | os.PathLike[str]) -> None:
  """Draws a report into a file: its heads, its units, or both."""
  module = optional(
    "Report.plot()", "matplotlib.figure", "str(report) does without it."
  )
  columns = 2 if report.heads else 1
  # No pyplot: its global state, and the choice of a screen, are the user's.
  figure = module.Figure(figsize=(4.6 * columns, 3.4), layout="constrained")
  axes = figure.subplots(1, columns, squeeze=False)[0]
  if report.heads:
    _draw_heads(axes[0], report)
  _draw_units(axes[-1], report)
  for each in axes:
    each.set_xlabel("learning rate")
    each.spines[["top", "right"]].set_visible(False)
    each.tick_params(labelsize=8)
    each.legend(fontsize=8, frameon=False)
  figure.savefig(path, dpi=200)


def _draw_heads(axes: Any, report: "Report") -> None:
  """The posterior over the heads' rates, and the suggested rate."""
  places = [math.log10(head.rate) for head in report.heads]
  gap = min((abs(b - a) for a, b in zip(places, places[1:], strict=False)), default=1.0)
  axes.bar(
    places,
    [head.weight for head in report.heads],
    width=0.8 * (gap or 1.0),
    color=BLUE,
    label="posterior",
  )
  dead = [x for x, h in zip(places, report.heads, strict=True) if h.alive is False]
  if dead:
    # Above the axis, where a dead head's bar, of no height, would be.
    axes.plot(
      dead, [0.02] * len(dead), "x", color="black", markersize=5, label="dead head"
    )
  rate = report.learning_rate or report.heads[0].rate
  axes.axvline(
    math.log10(rate),
    color=ORANGE,
    linestyle="--",
    linewidth=1.5,
    label=f"suggested: {rate:.2g}",
  )
  axes.set_ylim(0, 1.05 * max(0.5, *(head.weight for head in report.heads)))
  axes.set_ylabel("posterior weight")
  axes.set_title("Heads", loc="left", fontsize=10, fontweight="bold")
  _decade_ticks(axes, min(places), max(places))  # rates may have been written in


def _draw_units(axes: Any, report: "Report") -> None:
  """Shares of units, of live ones and of the update, by decade."""
  decades = [decade for decade in report.decades if decade.low > 0]
  places = [math.log10(decade.low) + 0.5 for decade in decades]
  total = max(report.units, 1)
  knows = bool(decades) and decades[0].alive is not None
  left = [x - 0.21 for x in places] if knows else places
  width = 0.4 if knows else 0.8
  axes.bar(
    left,
    [decade.units / total for decade in decades],
    width=width,
    color=GREY,
    label="units" if not knows else "units, dead",
  )
  if knows:
    alive = [(decade.alive or 0) / total for decade in decades]
    axes.bar(left, alive, width=width, color=BLUE, label="units, alive")
    shares = [decade.share_of_squared_update or 0.0 for decade in decades]
    shares = [share if math.isfinite(share) else 0.0 for share in shares]
    axes.bar(
      [x + 0.21 for x in places],
      shares,
      width=width,
      color=ORANGE,
      label="share of squared update",
    )
  if report.units_guarded:
    guarded = [(decade.guarded or 0) / total for decade in decades]
    axes.bar(
      left,
      guarded,
      width=width,
      fill=False,
      edgecolor="black",
      hatch="////",
      linewidth=0.6,
      label="units, guarded",
    )
  axes.set_ylim(0, 1.15 * axes.get_ylim()[1])  # room for the legend
  axes.set_ylabel("share of all")
  axes.set_title("Units by rate", loc="left", fontsize=10, fontweight="bold")
  if places:
    _decade_ticks(axes, places[0] - 0.5, places[-1] + 0.5)


def _decade_ticks(axes: Any, first: float, last: float) -> None:
  """Labels the decades of an axis of decimal logarithms."""
  exponents = range(math.floor(first + 1e-3), math.ceil(last - 1e-3) + 1)
  step = math.ceil(len(exponents) / 9)
  axes.set_xticks(exponents[::step], [f"$10^{{{k}}}$" for k in exponents[::step]])
