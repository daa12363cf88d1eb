"""Checks of arguments, which know tracers, and imports of optional packages."""

import functools
import importlib
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def is_concrete(value: Any) -> bool:
  """Whether ``value`` is a number (or an array of numbers) with a known value.

  Args:
    value: Anything.

  Returns:
    False for tracers and for other types (``None``, text, functions).
  """
  return not isinstance(value, jax.core.Tracer) and _as_numbers(value) is not None


def check_positive(call: str, name: str, value: Any) -> None:
  """Refuses values that are zero, negative, infinite or NaN.

  Args:
    call: The call that the message names, such as ``"alrao()"``.
    name: The argument's name.
    value: A number, or an array; every entry must obey the rule.

  Raises:
    ValueError: If the value breaks the rule.
    TypeError: If the value is no number.
  """
  numbers = _numbers(call, name, value)
  if numbers is None:
    return
  if not np.all(numbers > 0):  # NaN compares false, so it is refused too
    raise ValueError(f"{_where(call, name)} must be positive, got {value}.")
  _check_finite(call, name, value, numbers)


def check_non_negative(call: str, name: str, value: Any) -> None:
  """Refuses values that are negative, infinite or NaN.

  Args:
    call: The call that the message names, such as ``"alrao()"``.
    name: The argument's name.
    value: A number, or an array; every entry must obey the rule.

  Raises:
    ValueError: If the value breaks the rule.
    TypeError: If the value is no number.
  """
  numbers = _numbers(call, name, value)
  if numbers is None:
    return
  if not np.all(numbers >= 0):
    raise ValueError(f"{_where(call, name)} must not be negative, got {value}.")
  _check_finite(call, name, value, numbers)


def check_interval(
  call: str,
  low: Any,
  high: Any,
  *,
  names: tuple[str, str] = ("min_learning_rate", "max_learning_rate"),
) -> None:
  """Refuses an interval that is not ``0 < low <= high``, in the range of float32.

  Args:
    call: The call that the message names, such as ``"alrao()"``.
    low: The lower bound.
    high: The upper bound; equal bounds are an interval too.
    names: What the two arguments are called.

  Raises:
    ValueError: If a bound breaks the rule, or the bounds are reversed.
    TypeError: If a bound is no number.
  """
  check_positive(call, names[0], low)
  check_positive(call, names[1], high)
  lows, highs = _numbers(call, names[0], low), _numbers(call, names[1], high)
  if lows is not None and highs is not None and np.any(lows > highs):
    raise ValueError(
      f"{_where(call, names[0])} must not be above {names[1]}, got {low} and {high}: "
      "write the lower bound first."
    )
  smallest, largest = np.finfo(np.float32).tiny, np.finfo(np.float32).max
  for name, value, numbers in ((names[0], low, lows), (names[1], high, highs)):
    if numbers is not None and not np.all((smallest <= numbers) & (numbers <= largest)):
      raise ValueError(
        f"{_where(call, name)} must be in the range of float32, {smallest:.1e} to "
        f"{largest:.1e}, got {value}."
      )


def check_probability(call: str, name: str, value: Any, *, open: bool = False) -> None:
  """Refuses values outside ``[0, 1]``, or outside ``(0, 1)`` if ``open``.

  Args:
    call: The call that the message names, such as ``"switch()"``.
    name: The argument's name.
    value: A number, or an array; every entry must obey the rule.
    open: Whether the two ends are refused.

  Raises:
    ValueError: If the value breaks the rule.
    TypeError: If the value is no number.
  """
  numbers = _numbers(call, name, value)
  if numbers is None:
    return
  if open:
    inside, interval = (numbers > 0) & (numbers < 1), "strictly between 0 and 1"
  else:
    inside, interval = (numbers >= 0) & (numbers <= 1), "between 0 and 1"
  if not np.all(inside):
    raise ValueError(f"{_where(call, name)} must be {interval}, got {value}.")


def check_count(call: str, name: str, value: Any) -> None:
  """Refuses what is not an integer of 1 or more, known before tracing.

  A count fixes shapes, so this check refuses tracers too, unlike the others.

  Args:
    call: The call that the message names, such as ``"MultiHead()"``.
    name: The argument's name.
    value: A Python or NumPy integer, no bool.

  Raises:
    ValueError: If the integer is below 1.
    TypeError: If the value is no integer, or a traced one.
  """
  where = _where(call, name)
  if isinstance(value, jax.core.Tracer):
    raise TypeError(
      f"{where} must be an integer known before tracing, got {value}: it fixes the "
      "shapes, so don't pass it through jit or inject_hyperparams."
    )
  try:
    count = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
  except TypeError:
    count = None
  if count is None:
    raise TypeError(f"{where} must be an integer, got {_shown(value)}.")
  if count < 1:
    raise ValueError(f"{where} must be at least 1, got {value}.")


def check_key(call: str, key: Any) -> None:
  """Refuses what is not one PRNG key: ``jax.random.key(0)`` or ``PRNGKey(0)``.

  Args:
    call: The call that the message names, such as ``"alrao()"``.
    key: A typed key of shape ``()``, or an old-style one: uint32, shape ``(2,)`` or
      ``(4,)``. Tracers of either pass.

  Raises:
    TypeError: If it is something else (a seed, an optimizer).
    ValueError: If it is an array of several keys.
  """
  where = _where(call, "key")
  write = f"write {call.removesuffix('()')}(jax.random.key(0), ...)"
  dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
  if dtype is None or shape is None:
    if isinstance(key, int) and not 0 <= key < 2**32:
      # Without x64, JAX takes the seed modulo 2**32 and says nothing.
      write += ", with a seed from 0 to 2**32 - 1"
    raise TypeError(f"{where} must be a PRNG key, got {_shown(key)}: {write}.")
  if jnp.issubdtype(dtype, jax.dtypes.prng_key):
    single = shape == ()
  elif dtype == np.uint32 and shape and shape[-1] in (2, 4):
    single = len(shape) == 1
  else:
    raise TypeError(
      f"{where} must be a PRNG key, got an array of {dtype} and shape {shape}: {write}."
    )
  if not single:
    raise ValueError(
      f"{where} must be one PRNG key, got an array of keys with shape {shape}: index "
      "it, or use jax.vmap over the keys."
    )


def _where(call: str, name: str) -> str:
  return f"{call.removesuffix('()')}({name}=...)"


def _shown(value: Any) -> str:
  """A value in an error message: short, with its type."""
  kind = type(value).__name__
  if isinstance(value, (bool, int, float, str)):
    return f"{value!r} of type {kind}"
  return f"a value of type {kind}"


def _as_numbers(value: Any) -> np.ndarray | None:
  """The value in float64, or None if it is no number and no array of numbers."""
  if value is None or isinstance(value, (str, bytes)) or callable(value):
    return None
  try:
    return np.asarray(value).astype(np.float64)
  except (TypeError, ValueError):
    return None


def _numbers(call: str, name: str, value: Any) -> np.ndarray | None:
  """The value to look at, or None for a tracer.

  Raises:
    TypeError: If the value is no number.
  """
  if isinstance(value, jax.core.Tracer):
    return None
  numbers = _as_numbers(value)
  if numbers is None:
    raise TypeError(f"{_where(call, name)} must be a number, got {_shown(value)}.")
  return numbers


def _check_finite(call: str, name: str, value: Any, numbers: np.ndarray) -> None:
  if not all(map(math.isfinite, numbers.flat)):
    raise ValueError(f"{_where(call, name)} must be finite, got {value}.")


def optional(call: str, module: str, instead: str) -> Any:
  """Imports a module of a package that alrao_jax doesn't depend on.

  Args:
    call: What needs it, for the error, such as ``"Report.plot()"``.
    module: The module, such as ``"rich.table"``.
    instead: What works without it, for the error.

  Returns:
    The module.

  Raises:
    ImportError: If the package is not installed.

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


# Removed keywords, and what to write instead.
_REMOVED = {
  "overrides": "write units=alrao_jax.UnitOptions(overrides=...)",
  "strict": "write units=alrao_jax.UnitOptions(strict=...)",
  "unit_axis": "write units=alrao_jax.UnitOptions(unit_axis=...)",
  "granularity": (
    "write units=alrao_jax.UnitOptions(overrides=(('', 'per_weight'),)), which gives "
    "every weight its own rate"
  ),
  "redraw": (
    "rates are drawn once; for the papers' control, initialise scale_by_unit_rates "
    "with a new key in every step"
  ),
  "names": (
    "leave it out: with several MultiHeads, posteriors and head_log_likelihoods go by "
    "their paths"
  ),
  "heads": (
    "leave it out: the heads' parameters are those below the key 'alrao_heads', as "
    "alrao_jax.linen.MultiHead and alrao_jax.nnx.MultiHead name them"
  ),
}

_P = ParamSpec("_P")
_R = TypeVar("_R")


def refuses_removed(function: Callable[_P, _R]) -> Callable[_P, _R]:
  """Decorates a function so that removed keywords raise, and say what to write.

  Example:
    >>> refuses_removed(lambda tree: tree)(tree=3)
    3
  """
  taken = inspect.signature(function).parameters

  @functools.wraps(function)
  def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
    refuse_removed(f"{function.__name__}()", kwargs, taken)
    return function(*args, **kwargs)

  return checked


def refuse_removed(call: str, given: Mapping[str, Any], taken: Any = ()) -> None:
  """Refuses removed keywords.

  Args:
    call: The call that the message names, such as ``"alrao()"``.
    given: The keywords that it got.
    taken: The names that it takes.

  Raises:
    TypeError: If there is a removed keyword; the message says what to write instead.
  """
  for name in given:
    if name in _REMOVED and name not in taken:
      raise TypeError(f"{_where(call, name)} was removed: {_REMOVED[name]}.")
