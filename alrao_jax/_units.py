"""Which axes of a parameter index its units, and which parameters share a unit.

A *unit* (a feature, a channel, an LSTM cell) shares one learning rate between all its
incoming weights and its bias. Shapes go in, specs come out: no value of an array is
ever looked at. The rules are in :mod:`alrao_jax._rules`; overrides settle what shapes
can't tell.

Reference: Blier, Wolinski, Ollivier, `Learning with Random Learning Rates
<https://arxiv.org/abs/1810.01322>`_, Algorithm 1.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ._checks import refuse_removed, refuses_removed
from ._rules import (
  Shape,
  Shapes,
  Units,
  UnitSpec,
  match_overrides,
  override_text,
  parse_override,
  plain_paths,
  read,
)
from ._tree import check_parameter, check_tree, flatten_with_paths, head_name


@dataclass(frozen=True)
class UnitOptions:
  """How to read the units of a tree.

  Lists are taken for tuples. So options hash, and compare by value: they may be a
  static argument of ``jax.jit``.

  Attributes:
    overrides: Pairs ``(pattern, what)``; the first whose pattern is found in a
      parameter's path by ``re.search`` decides. ``what`` is a tuple of axes,
      :class:`Units`, ``"per_weight"``, ``"one_rate"`` or ``"frozen"``. Only
      ``"frozen"`` is for heads too. ``(("", "per_weight"),)`` gives each single weight
      its own rate, for studies: the papers' appendix E finds it inferior, and it costs
      one float a weight.
    strict: Whether a parameter that no rule knows is an error, and a tie that nothing
      settles, but that of a square ``kernel``, which Flax has last.
    unit_axis: ``"last"``, or ``"first"`` for trees with units on axis 0 (Equinox).

  Raises:
    TypeError: An override is no pair of a regular expression and axes.
    ValueError: An override's word or ``unit_axis`` is unknown, or a regular expression
      is malformed.

  Example:
    >>> from alrao_jax import UnitOptions
    >>> UnitOptions([["bias$", [0]]]) == UnitOptions((("bias$", (0,)),))
    True
  """

  overrides: Sequence[Any] = ()
  strict: bool = False
  unit_axis: Literal["last", "first"] = "last"

  def __new__(cls, *args: Any, **kwargs: Any):
    """Refuses fields that were taken out."""
    del args
    refuse_removed("UnitOptions()", kwargs, cls.__dataclass_fields__)
    return super().__new__(cls)

  def __post_init__(self):
    if isinstance(self.overrides, str) or not isinstance(self.overrides, Iterable):
      raise TypeError(
        "UnitOptions(overrides=...) must be pairs of a regular expression and axes, "
        f"such as [(r'dense/kernel$', (0,))], got {self.overrides!r}."
      )
    parsed = tuple(parse_override(override) for override in self.overrides)
    object.__setattr__(self, "overrides", parsed)  # frozen, but for its own making
    if self.unit_axis not in ("last", "first"):
      raise ValueError(
        f"UnitOptions(unit_axis=...) must be 'last' or 'first', got {self.unit_axis!r}."
      )
    if not isinstance(self.strict, bool):
      raise TypeError(
        f"UnitOptions(strict=...) must be True or False, got {self.strict!r}."
      )


def check_options(call: str, units: Any) -> None:
  """Refuses what is no :class:`UnitOptions`, such as overrides alone.

  Raises:
    TypeError: It is something else.
  """
  if not isinstance(units, UnitOptions):
    raise TypeError(
      f"{call.removesuffix('()')}(units=...) must be UnitOptions, got {units!r}. Write "
      "units=alrao_jax.UnitOptions(overrides=[(r'dense/kernel$', (0,))])."
    )


@refuses_removed
def unit_specs(params: Any, units: UnitOptions = UnitOptions()) -> dict[str, UnitSpec]:
  """Reads the units of every parameter from the shapes in a tree.

  What shapes can't tell, ``unit_overrides(model)`` of ``alrao_jax.linen`` and
  ``alrao_jax.nnx`` can. From shapes alone, layers without bias share rates between
  stacks (``vmap``, ``scan``), between places (``ConvLocal``) and along all feature axes
  but the last (``DenseGeneral``, ``Einsum``); a kernel with ``transpose_kernel`` that
  is square or has no bias, or of an einsum that swaps equal axes, is misread.

  Args:
    params: Pytree of arrays or ``jax.ShapeDtypeStruct``: a linen or haiku dict, an
      ``nnx.State``, boxed or pure, an Equinox module, any nested dict.
    units: How to read them.

  Returns:
    The :class:`UnitSpec` of each leaf by path, in the tree's order.

  Raises:
    TypeError: A leaf is no array of a floating or complex dtype, ``units`` no
      options.
    ValueError: An override matches nothing or doesn't fit; a bias fits no axes of its
      kernel, or several; gates don't divide; members of a group have different unit
      shapes; with ``strict``, no rule knows a leaf, or nothing settles a tie.

  Example:
    >>> import jax.numpy as jnp
    >>> specs = unit_specs({"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)})
    >>> specs["kernel"].axes, specs["kernel"].num_units
    ((1,), 5)
  """
  check_options("unit_specs()", units)
  return read_units(shapes_of(params), units)


def shapes_of(params: Any) -> tuple[tuple[str, Shape], ...]:
  """The path and the shape of every parameter, all that its units depend on.

  Raises:
    TypeError: A leaf is no array of a floating or complex dtype.
  """
  check_tree("describe_units()", params)
  return tuple((p, _shape_of(p, leaf)) for p, leaf in flatten_with_paths(params)[0])


def read_units(
  shapes: tuple[tuple[str, Shape], ...], options: UnitOptions
) -> dict[str, UnitSpec]:
  """:func:`unit_specs`, from what :func:`shapes_of` returned."""
  heads, body = {}, {}
  for path, shape in shapes:
    (body if head_name(path) is None else heads)[path] = shape
  given = match_overrides(body, heads, options.overrides)
  plain = plain_paths(body)
  tree = Shapes(
    {plain[path]: shape for path, shape in body.items()},
    heads,
    options.unit_axis,
    {plain.get(path, path): what for path, what in given.items()},
    names={short: path for path, short in plain.items()},
  )
  specs = {
    path: replace(read(tree, plain.get(path, path)), path=path) for path, _ in shapes
  }
  if options.strict:
    _check_nothing_assumed(specs)
  return _settle_groups(specs)


def _shape_of(path: str, leaf: Any) -> Shape:
  check_parameter(path, leaf)
  return tuple(leaf.shape)


def _check_nothing_assumed(specs: Mapping[str, UnitSpec]) -> None:
  assumed = [spec for spec in specs.values() if spec.assumed]
  tied = [spec for spec in specs.values() if spec.ties and not _is_usual(spec)]
  if tied and not assumed:
    spec = tied[0]
    raise ValueError(
      f"strict=True needs what settles every tie, got {spec.path!r} of shape "
      f"{spec.shape}, whose units could be on axes {_list([spec.axes, *spec.ties])}. "
      f"They are on those that the layer doesn't sum over: with those for AXES, "
      f"{override_text(spec.path, 'AXES')}."
    )
  if assumed:
    texts = [f"{spec.path!r} of shape {spec.shape}" for spec in assumed]
    raise ValueError(
      f"strict=True needs a rule for every parameter, got none for {', '.join(texts)}. "
      f"If the units are on axes {assumed[0].axes}, "
      f"{override_text(assumed[0].path, assumed[0].axes)}."
    )


def _is_usual(spec: UnitSpec) -> bool:
  """Whether a tie is that of a square ``kernel``, which linen and nnx have last."""
  last = spec.axes[-1:] == (len(spec.shape) - 1,)
  named = spec.path.rpartition("/")[2] == "kernel"
  return last and named and not spec.rule.endswith("siblings differ")


def _list(choices: Sequence[Shape]) -> str:
  return " or ".join(map(str, choices))


def _settle_groups(specs: dict[str, UnitSpec]) -> dict[str, UnitSpec]:
  """Gives a parameter its own group where its units differ from its group's.

  Kernels decide what the units of a layer are; without one, a layer's scale and bias
  share only if they agree. Cells and groups given by name must agree.
  """
  members: dict[str, list[UnitSpec]] = {}
  for spec in specs.values():
    if spec.kind not in ("head", "frozen"):
      members.setdefault(spec.group, []).append(spec)
  for group, found in members.items():
    shapes = {spec.unit_shape for spec in found}
    if len(shapes) == 1:
      continue
    flat = any(spec.flat for spec in found)
    top = max(spec.decides for spec in found)
    leaders = [spec for spec in found if spec.decides == top]
    if top == 2:
      for spec in leaders:
        if not _agree(spec, leaders[0], flat):
          raise ValueError(
            f"Members of a group must have units of one shape, got in the group "
            f"{group!r}: {spec.path!r} of shape {spec.shape} with units "
            f"{spec.unit_shape} and {leaders[0].path!r} of shape {leaders[0].shape} "
            f"with units {leaders[0].unit_shape}. To give one its own group, "
            f"{override_text(spec.path, Units(spec.axes, spec.path, spec.tiles))}."
          )
    for spec in found:
      if top == 0 or not _agree(spec, leaders[0], flat):
        specs[spec.path] = replace(spec, group=spec.path)
  return specs


def _agree(spec: UnitSpec, leader: UnitSpec, flat: bool) -> bool:
  """Whether two members of a group have the same units.

  Several axes of one may be a single axis of the other, in the same order.
  """
  shapes = spec.unit_shape, leader.unit_shape
  if not flat or shapes[0] == shapes[1]:
    return shapes[0] == shapes[1]
  single = any(sum(size != 1 for size in shape) <= 1 for shape in shapes)
  return single and spec.num_units == leader.num_units


@refuses_removed
def describe_units(params: Any, units: UnitOptions = UnitOptions()) -> str:
  """Describes the units of every parameter in a table, before any training.

  Args:
    params: Pytree of arrays or ``jax.ShapeDtypeStruct``, such as the parameters that
      the optimizer is given, or ``jax.eval_shape`` of their initialisation.
    units: How to read them.

  Returns:
    First a line for each parameter whose units are assumed, or tied with other axes,
    with the override that settles it. Then one for each parameter: its path, its shape,
    the axes that index its units (with the number of gates that repeat them, if there
    are several), the group that shares one vector of rates, the number of units, and
    the rule that decided. The last lines count the rates that are drawn, and what was
    assumed or tied.

  Raises:
    TypeError: As :func:`unit_specs`.
    ValueError: As :func:`unit_specs`.

  Example:
    >>> import jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.ones((3, 5)), "t": jnp.ones(())}}
    >>> print(describe_units(params))
    parameter     shape   unit axes  group    units  rule
    dense/kernel  (3, 5)  (1,)       dense        5  kernel without bias
    dense/t       ()      ()         dense/t      1  scalar
    6 rates for 16 parameters in 2 groups.
  """
  check_options("describe_units()", units)
  specs = list(unit_specs(params, units).values())
  header = ("parameter", "shape", "unit axes", "group", "units", "rule")
  lines = columns([header, *map(_row, specs)], right={4})
  drawn = [s for s in specs if s.kind not in ("frozen", "head")]
  groups = {s.group: s.num_units for s in drawn}
  weights = sum(math.prod(s.shape) for s in drawn)
  lines.append(
    f"{sum(groups.values())} rates for {weights} parameters in {len(groups)} groups."
  )
  assumed = [spec for spec in specs if spec.assumed]
  tied = [spec for spec in specs if spec.ties and not spec.assumed]
  if assumed or tied:
    lines.append(f"{len(assumed)} of {len(specs)} are assumed, {len(tied)} are ties.")
  return "\n".join([*_guesses(assumed, tied), *lines])


def _guesses(assumed: Sequence[UnitSpec], tied: Sequence[UnitSpec]) -> list[str]:
  """What is not known for sure, with the override that settles it."""
  # What has several axes that could be right is the most in doubt.
  assumed = sorted(assumed, key=lambda s: -sum(size != 1 for size in s.shape))
  lines = [
    f"Assumed, since no rule knows it: {s.path} of shape {s.shape}, units on axes "
    f"{s.axes}. To settle it, {override_text(s.path, s.axes)}."
    for s in assumed
  ]
  lines += [
    f"Tie: {s.path} of shape {s.shape}, units on axes {s.axes}, but {_list(s.ties)} "
    f"would fit as well. To settle it, {override_text(s.path, s.axes)}."
    for s in tied
  ]
  return lines


def _row(spec: UnitSpec) -> tuple[str, ...]:
  axes = str(spec.axes) + (f" x {spec.tiles} gates" if spec.tiles > 1 else "")
  units = "-" if spec.kind == "frozen" else str(spec.num_units)
  rule = spec.rule if spec.kind in ("unit", "head") else f"{spec.rule}: {spec.kind}"
  group = spec.group or ("-" if spec.kind in ("frozen", "head") else '""')
  return spec.path, str(spec.shape), axes, group, units, rule


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
