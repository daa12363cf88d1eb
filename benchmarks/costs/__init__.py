"""What Alrao costs: time, memory and compilation, beside plain SGD.

A cost is a module here; its name is the cost's, its `COST` a dataclass of options, or a
union of them. Its `table` makes Markdown of one of its records.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from benchmarks.records import Record


def names() -> list[str]:
  """Returns the names of the costs."""
  found = (module.name for module in pkgutil.iter_modules(__path__))
  return sorted(name for name in found if not name.startswith("_"))


def table(record: "Record") -> str:
  """Returns a measured cost as a Markdown table, with its conditions.

  Args:
    record: A cost's record; its ``"table"`` is the name of the cost.

  Raises:
    RecordError: No cost has that name, or the record lacks what its table shows.
  """
  from benchmarks.records import RecordError

  name = record.get("table")
  if name not in names():
    known = ", ".join(names())
    raise RecordError(f"a cost's table must be one of {known}, got {name!r}.")
  try:
    return importlib.import_module(f"{__name__}.{name}").table(record)
  except (LookupError, TypeError, ValueError) as error:
    case = record.get("case")
    raise RecordError(
      f"the record of {name}, {case}, lacks a part of its table ({error!r}); "
      f"`python -m benchmarks cost {name}` measures it anew."
    ) from error
