"""The papers' figures and control experiments: arms, a table, a picture.

A study is a module here; its name is the study's, its `STUDY` a dataclass of options.
"""

import importlib
import pkgutil
from typing import Any


def names() -> list[str]:
  """Returns the names of the studies."""
  found = (module.name for module in pkgutil.iter_modules(__path__))
  return sorted(name for name in found if not name.startswith("_"))


def load(name: str) -> Any:
  """Returns a study with its default options, whose archive is committed.

  Args:
    name: One of `names`.
  """
  return importlib.import_module(f"{__name__}.{name}").STUDY()
