"""What Alrao costs: steps of Alrao beside steps of plain SGD, in one process.

    python -m benchmarks.overhead run --cases mlp small_cnn
    python -m benchmarks.overhead report

Every contender trains the same network on the same batch. Contenders take turns, round
by round, in an order drawn anew, so that whatever else the machine does meets them all;
what is reported is the median over the rounds of a contender's time over SGD's.
Compilation is timed in such turns, too; reported are the median of its seconds and that
of their ratio to SGD's in the same turn. Beside them stands the floor, the larger of
the ratios of arithmetic operations and of bytes in memory that XLA counts in the
compiled programs.
"""

import dataclasses
import datetime
import json
from pathlib import Path

import jax
import rich.console
import rich.markdown

from benchmarks import commands, large_output, many_seeds, records, torch_steps
from benchmarks.competitors import measure
from benchmarks.overhead_cases import CASES
from benchmarks.planning import OptionError
from benchmarks.records import RecordError

START, END = "<!-- measured: start -->", "<!-- measured: end -->"


@dataclasses.dataclass(frozen=True)
class Run:
  """Measure, and write what was measured."""

  cases: tuple[str, ...] = ("mlp", "small_cnn")
  """Which networks; see CASES in benchmarks/overhead_cases.py."""
  rounds: int = 50
  """Number of turns that each contender has."""
  compilations: int = 5
  """How often each contender's step is compiled, in turns as well. The first turn may
  pay for what a process does only once: a median needs three."""
  out: Path = Path("benchmarks/overhead")
  """Folder for one JSON file a network."""

  def __call__(self) -> None:
    """Measures and prints."""
    unknown = set(self.cases) - set(CASES)
    if unknown:
      raise OptionError(f"--cases knows {', '.join(CASES)}, not {sorted(unknown)}.")
    for name in ("rounds", "compilations"):
      if getattr(self, name) < 1:
        got = getattr(self, name)
        raise OptionError(f"--{name} must be at least 1, got {got}.")
    # A program read from the cache would not have been compiled in the time it took.
    jax.config.update("jax_enable_compilation_cache", False)
    console = rich.console.Console()
    for name in self.cases:
      rows = measure(CASES[name], self.rounds, self.compilations, console)
      found = {
        "kind": "overhead",
        "case": name,
        "title": CASES[name].network.title,
        "rounds": self.rounds,
        "steps": CASES[name].steps,
        "compilations": self.compilations,
        "date": datetime.date.today().isoformat(),
        "environment": records.environment(),
        "rows": rows,
      }
      records.write_text(self.out / f"{name}.json", json.dumps(found, indent=1) + "\n")
      console.print(rich.markdown.Markdown(table(found)))


@dataclasses.dataclass(frozen=True)
class Report:
  """Write the measured tables into OVERHEAD.md, in place of those there.

  Those of `benchmarks.many_seeds`, `large_output` and `torch_steps` too.
  """

  results: Path = Path("benchmarks/overhead")
  """Folder of the JSON files."""
  out: Path = Path("benchmarks/OVERHEAD.md")
  """The page; what stands outside of its two marks is kept."""

  def __call__(self) -> None:
    """Writes the page."""
    paths = sorted(self.results.glob("*.json"))
    if not paths:
      raise RecordError(f"no JSON files in {self.results}; `run` makes them.")
    measured = [json.loads(path.read_text()) for path in paths]
    order = {kind: place for place, kind in enumerate(TABLES)}
    measured.sort(key=lambda found: order[found["kind"]])
    tables = "\n\n".join(TABLES[found["kind"]](found) for found in measured)
    text = self.out.read_text() if self.out.exists() else f"{START}\n{END}\n"
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    records.write_text(self.out, f"{before}{START}\n\n{tables}\n\n{END}{after}")
    print(self.out)


def table(found: records.Record) -> str:
  """Returns a network's measurements as a Markdown table with its conditions.

  Args:
    found: What `Run` writes.
  """
  header = [
    "contender",
    "time / SGD's",
    "quartiles",
    "floor",
    "time / floor",
    "ms a step",
    "rates / parameters",
    "peak memory / (SGD's + 2 x more parameters)",
    "peak memory / (SGD's + 2 x more parameters and outputs)",
    "compile, s",
    "compile / SGD's",
  ]
  lines = [
    f"### {found['title']}",
    "",
    "| " + " | ".join(header) + " |",
    "|" + " --- |" * len(header),
  ]
  for row in found["rows"]:
    low, high = row["ratio_quartiles"]
    rates = row["rates_bytes"] / row["parameter_bytes"]
    cells = [
      row["label"],
      f"{row['ratio']:.3f}",
      f"{low:.3f} to {high:.3f}",
      f"{row['floor']:.3f}",
      f"{row['ratio'] / row['floor']:.3f}",
      f"{row['milliseconds']:.2f}",
      f"{rates:.4f}" if rates else "",
      f"{row['peak_ratio']:.3f}",
      f"{row['peak_ratio_with_outputs']:.3f}",
      f"{row['compile_seconds']:.1f}",
      f"{row['compile_ratio']:.2f}",
    ]
    lines.append("| " + " | ".join(cells) + " |")
  compilations = f"{found['compilations']} compilations"
  return "\n".join([*lines, "", f"{compilations}; {records.conditions(found)}"])


# By the kind of a JSON file.
TABLES = {
  "overhead": table,
  "many_seeds": many_seeds.table,
  "large_output": large_output.table,
  "torch_steps": torch_steps.table,
}


if __name__ == "__main__":
  commands.main(Run | Report, __doc__)
