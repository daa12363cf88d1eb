"""What the commands for costs share."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax

from benchmarks import costs, records, tables
from benchmarks.console import OptionError, refuse, writing_to
from benchmarks.records import Record


@dataclasses.dataclass(frozen=True)
class Cost:
  """Measures, and writes what was measured."""

  name: ClassVar[str]
  """The cost's name."""
  out: Path = Path("out/costs")
  """Folder for a file of each measurement; `collect costs` adds these to the archive
  that the published tables are made of."""

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: Options that make no measurement.
    """

  def measure(self) -> Iterator[tuple[str, Record]]:
    """Yields each measurement: the name of what is measured, and the numbers."""
    raise NotImplementedError

  def __call__(self) -> None:
    """Measures, writes and prints.

    Raises:
      OptionError: Options that make no measurement.
      OutputError: The folder can't be written.
    """
    self.check()
    with writing_to(self.out):
      for case, found in self.measure():
        record = make_record(self.name, case, found)
        records.write(self.out / f"{self.name}-{record['case']}.jsonl", [record])
        print(f"{costs.table(record)}\n")


def make_record(name: str, case: str, found: Record) -> Record:
  """Returns a measurement made now, as it is written.

  Args:
    name: Name of the cost.
    case: What was measured. On an accelerator the backend's name is added, so that no
      archive puts the measurement in the place of a CPU's.
    found: The numbers; its ``"environment"``, if any, is added to the process's.
  """
  backend = jax.default_backend()
  case = case if backend == "cpu" else f"{case}-{backend}"
  now = records.now()
  environment = {**now["environment"], **found.get("environment", {})}
  record = {"kind": "cost", "table": name, "case": case, **found, **now}
  return {**record, "environment": environment}


def check_known(name: str, given: Iterable[str], known: Collection[str]) -> None:
  """Checks names given as an option.

  Args:
    name: Name of the option.
    given: The names.
    known: Those there are.

  Raises:
    OptionError: There are others.
  """
  unknown = sorted(set(given) - set(known))
  if unknown:
    raise OptionError(f"--{name} knows {', '.join(known)}, not {unknown}.")


def check_positive(**options: int | Sequence[int]) -> None:
  """Checks options that count something.

  Args:
    **options: A number, or several, by the option's name.

  Raises:
    OptionError: One is less than 1, or there is none.
  """
  for name, value in options.items():
    values: Any = [value] if isinstance(value, int) else value
    if min(values, default=0) < 1:
      refuse(name, "must be at least 1", value)


def render(
  title: str, header: Sequence[str], rows: Iterable[Sequence[str]], conditions: str
) -> str:
  """Returns a table as Markdown.

  Args:
    title: Its heading.
    header: Heading of each column.
    rows: Cells of each row.
    conditions: Under what it was measured, as a sentence.
  """
  lines = [f"### {title}", "", *tables.markdown(header, rows), "", conditions]
  return "\n".join(lines)
