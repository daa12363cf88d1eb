"""Overrides of the rules, by the user or by the types of a model's modules."""

import operator
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ._cells import Shape
from ._paths import flatten_with_paths, head_name
from ._rules import Reading, Rules

_WORDS = ("per_weight", "one_rate", "frozen")


class Units(NamedTuple):
  """A parameter's units, as an override gives them.

  Attributes:
    axes: The axes that index the units, negative ones counted from the end; ``()``
      for one rate.
    group: Parameters of the same group share one vector of rates. None: that of the
      parameter's layer.
    tiles: How many times (gates) the units are repeated along the last of ``axes``.
  """

  axes: tuple[int, ...]
  group: str | None = None
  tiles: int = 1


Override = tuple[str, tuple[int, ...] | Units | str]


def match_overrides(
  shapes: Mapping[str, Shape], heads: Collection[str], overrides: Sequence[Any]
) -> dict[str, str | Units]:
  """Finds what the overrides say.

  Args:
    shapes: The shapes of the parameters that may be overridden, by path.
    heads: The paths of those that may not.
    overrides: Those of :class:`UnitOptions`.

  Returns:
    What the first override says whose pattern is found in the path, for each path
    that has one.

  Raises:
    TypeError: An override is no pair of a regular expression and axes.
    ValueError: An override's word is unknown, or its pattern is found nowhere.
  """
  given: dict[str, str | Units] = {}
  for override in overrides:
    pattern, what = _parse_override(override)
    matched = [path for path in shapes if pattern.search(path)]
    if not matched and (shapes or heads):
      of_heads = any(pattern.search(path) for path in heads)
      raise ValueError(
        f"overrides=[({pattern.pattern!r}, ...)] must match the path of a parameter, "
        f"got {'only heads' if of_heads else 'no match'} among {_some(shapes)}."
      )
    for path in matched:
      given.setdefault(path, what)
  return given


def _parse_override(override: Any) -> tuple[re.Pattern[str], str | Units]:
  try:
    pattern, what = override
    pattern = re.compile(pattern)
    if not isinstance(what, str):
      units = what if isinstance(what, Units) else Units(what)
      what = units._replace(axes=tuple(operator.index(axis) for axis in units.axes))
  except re.error as error:
    raise ValueError(
      f"overrides must hold regular expressions, got {override[0]!r}: {error}."
    ) from error
  except (TypeError, ValueError) as error:
    raise TypeError(
      "overrides must hold pairs of a regular expression and axes, such as "
      f"[(r'dense/kernel$', (0,))], got {override!r}."
    ) from error
  if isinstance(what, str) and what not in _WORDS:
    raise ValueError(
      f"overrides must say axes, Units or one of {_WORDS}, got {what!r}."
    )
  return pattern, what


def _some(paths: Collection[str]) -> str:
  """The first few paths, to be shown in an error."""
  names = [repr(path) for path in list(paths)[:5]]
  return ", ".join(names) + (", ..." if len(paths) > 5 else "")


class Known(NamedTuple):
  """What a module knows of one of its parameters.

  Attributes:
    shape: Its shape without the axes that vmap and scan have added.
    axes: Those of its axes that index units; None: by the rules.
    apart: Whether the module's bias has these axes in another order.
  """

  shape: Shape
  axes: Shape | None = None
  apart: bool = False


def overrides_from(params: Any, known: Mapping[str, Known]) -> tuple[Override, ...]:
  """The overrides for those parameters whose shapes would tell something else.

  Args:
    params: The parameters, arrays or ``jax.ShapeDtypeStruct``.
    known: What the model's modules know of them, by path.

  Returns:
    Overrides for :class:`UnitOptions`, the fewest that are needed.
  """
  shapes = {
    path: tuple(leaf.shape)
    for path, leaf in flatten_with_paths(params)[0]
    if head_name(path) is None
  }
  inner = {
    path: known[path].shape if path in known else shapes[path] for path in shapes
  }
  given = {path for path in shapes if path in known and known[path].axes is not None}
  rules, inner_rules = Rules(shapes, "last", set(known)), Rules(inner, "last", given)
  overrides = []
  for path in shapes:
    if path in known:
      units = _units_of(path, shapes[path], known[path], _read(inner_rules, path))
      plain = _read(rules, path)
      if units and (not plain or units != Units(plain.axes, None, plain.tiles)):
        overrides.append((f"^{re.escape(path)}$", units))
  return tuple(overrides)


def _read(rules: Rules, path: str) -> Reading | None:
  """What the rules say, None for nothing or an error, for which overrides are."""
  try:
    reading = rules.read(path)
  except ValueError:
    return None
  return None if reading.assumed else reading


def _units_of(
  path: str, shape: Shape, known: Known, reading: Reading | None
) -> Units | None:
  """The units of a parameter with all its axes, None where they stay unknown."""
  stack = _stack_axes(shape, known.shape)
  if stack is None or (known.axes is None and reading is None):
    return None
  own = [axis for axis in range(len(shape)) if axis not in stack]
  axes, tiles = known.axes, 1
  if axes is None:
    assert reading is not None
    axes, tiles = reading.axes, reading.tiles
  units = [own[axis] for axis in axes]
  # Tiles run along the last unit axis: share across stacks that come after it.
  stack = [axis for axis in stack if tiles == 1 or axis < units[-1]]
  group = path if known.apart else None
  return Units(tuple(sorted([*stack, *units])), group, tiles)


def _stack_axes(shape: Shape, inner: Shape) -> Shape | None:
  """The axes that stacking has added, leading ones where it could have been several."""
  added, rest = [], list(inner)
  for axis in reversed(range(len(shape))):
    if rest and shape[axis] == rest[-1]:
      rest.pop()
    else:
      added.append(axis)
  return tuple(reversed(added)) if not rest else None


def einsum_kernel(shape: Shape, equation: str) -> Known:
  """What an einsum layer knows of its kernel: the units are the axes that stay.

  Args:
    shape: The kernel's shape.
    equation: That of the einsum, with the kernel as its second operand.

  Example:
    >>> einsum_kernel((4, 5, 6), "ab,bcd->adc")
    Known(shape=(4, 5, 6), axes=(1, 2), apart=True)
  """
  operands, result = equation.replace(" ", "").split("->")
  letters = operands.split(",")[1]
  if len(letters) != len(shape) or "." in letters:
    return Known(shape)
  axes = tuple(axis for axis, letter in enumerate(letters) if letter in result)
  places = [result.index(letters[axis]) for axis in axes]
  return Known(shape, axes, apart=places != sorted(places))
