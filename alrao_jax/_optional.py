"""Packages that only some functions need, imported when these are called."""

import importlib
from typing import Any


def optional(call: str, module: str, instead: str) -> Any:
  """Imports a module of a package that alrao_jax doesn't depend on.

  Args:
    call: What needs it, for the error, such as ``"Report.plot()"``.
    module: The module, ``"rich.table"``.
    instead: What does without it, for the error.

  Returns:
    The module.

  Raises:
    ImportError: The package is not installed.

  Example:
    >>> optional("median()", "statistics", "sorted() does without.").median([3, 1, 2])
    2
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.partition(".")[0]
    raise ImportError(
      f"{call} needs {package}, which can't be imported ({error}). Write pip install "
      f"{package}; {instead}"
    ) from error
