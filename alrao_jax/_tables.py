"""Tables for people, in plain text and by rich."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ._optional import optional

if TYPE_CHECKING:
  from ._report import Report

Rows = list[tuple[str, ...]]


def text(report: "Report") -> str:
  """The report in plain text."""
  tables = [rows for rows in _rows(report) if rows[1:]]
  parts = ["\n".join(columns(rows, right=range(len(rows[0])))) for rows in tables]
  return "\n\n".join([*parts, _summary(report)])


def table(report: "Report") -> Any:
  """The report as a rich renderable, the best head in colour."""
  call, instead = "Report.table()", "str(report) does without it."
  console = optional(call, "rich.console", instead)
  tables = optional(call, "rich.table", instead)
  best = max((head.weight for head in report.heads), default=0.0)
  wins = [head.weight == best for head in report.heads]
  heads, units = _rows(report)
  parts = []
  for title, rows, bold in (
    ("Heads", heads, wins),
    ("Units", units, [False] * len(report.decades)),
  ):
    drawn = tables.Table(title=title, title_justify="left", title_style="bold")
    for name in rows[0]:
      drawn.add_column(name, justify="right")
    for row, is_best in zip(rows[1:], bold, strict=True):
      drawn.add_row(*row, style="bold green" if is_best else None)
    if bold:
      parts.append(drawn)
  return console.Group(*parts, _summary(report))


def _rows(report: "Report") -> tuple[Rows, Rows]:
  """The cells of the tables of heads and of units, a line of names first."""
  heads = [("rate", "weight", "alive")] + [
    (f"{h.rate:.2g}", f"{h.weight:.3f}", _cell(h.alive)) for h in report.heads
  ]
  units = [("rates", "units", "alive", "share of squared update", "guarded")] + [
    (
      f"{d.low:.0e} to {d.high:.0e}" if d.low else "0",
      str(d.units),
      _cell(d.alive),
      "-" if d.share_of_squared_update is None else f"{d.share_of_squared_update:.1%}",
      _cell(d.guarded),
    )
    for d in report.decades
  ]
  return heads, units


def _summary(report: "Report") -> str:
  lines = []
  if report.heads:
    seen = "" if report.observations is None else f" after {report.observations} steps"
    lines.append(
      f"{report.effective_heads:.1f} of {len(report.heads)} heads in effect{seen}"
      + ("." if report.dead_heads is None else f", {report.dead_heads} dead.")
    )
    lines.append(f"Suggested learning rate: {report.learning_rate:.2g} (a heuristic).")
  counts = [f"{report.units} units"]
  if report.units_alive is not None:
    counts.append(f"{report.units_alive} alive")
  if report.units_guarded is not None:
    counts.append(f"{report.units_guarded} guarded")
  return "\n".join([*lines, ", ".join(counts) + "."])


def _cell(value: bool | int | None) -> str:
  if value is None:
    return "-"
  return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def columns(rows: Sequence[Sequence[str]], right: Collection[int]) -> list[str]:
  """Aligns rows, some columns to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = [
      cell.rjust(width) if i in right else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  return lines
