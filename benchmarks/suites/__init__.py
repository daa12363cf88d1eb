"""Workloads x methods x seeds: what runs, for how long, and how its tables look.

A suite is a module here; its name is the suite's, its `SUITE` the class.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from benchmarks.suites._suite import Suite
  from benchmarks.tables import TableKind


def names() -> list[str]:
  """Returns the names of the suites."""
  found = (module.name for module in pkgutil.iter_modules(__path__))
  return sorted(name for name in found if not name.startswith("_"))


def load(name: str) -> "type[Suite]":
  """Returns a suite.

  Args:
    name: One of `names`.
  """
  return importlib.import_module(f"{__name__}.{name}").SUITE


def kinds() -> "dict[str, TableKind]":
  """Returns how the tables of suites look, by name; the arena's are its own."""
  found = {name: load(name).kind for name in names()}
  return {name: kind for name, kind in found.items() if kind is not None}
