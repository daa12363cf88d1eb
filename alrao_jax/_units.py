"""Which axes of a parameter index its units, and which parameters share a unit.

A *unit* (a feature, a channel, an LSTM cell) shares one learning rate between all its
incoming weights and its bias. A bias has exactly one entry a unit, so the shape of a
kernel's sibling bias tells the kernel's unit axes; a few more rules settle the rest,
and overrides settle what shapes can't tell. Shapes go in, specs come out: no value of
an array is ever looked at.

Reference: Blier, Wolinski, Ollivier, `Learning with Random Learning Rates
<https://arxiv.org/abs/1810.01322>`_, Algorithm 1.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from ._checks import check_parameter, check_tree
from ._rules import Override, Rules, Shape, Units, match_overrides, override_text
from ._tree import HEADS_REGEX, flatten_with_paths, head_name


class UnitOptions(NamedTuple):
  """How to read the units of a tree; static and hashable.

  Attributes:
    overrides: Pairs ``(pattern, what)``; the first whose pattern is found in a
      parameter's path by ``re.search`` decides. ``what`` is a tuple of axes,
      :class:`Units`, ``"per_weight"``, ``"one_rate"`` or ``"frozen"``. Only
      ``"frozen"`` is for heads too.
    heads: Regular expression for the paths of the heads' parameters; None: no heads.
    strict: Whether a parameter that no rule knows is an error.
    unit_axis: ``"last"``, or ``"first"`` for trees with units on axis 0 (Equinox).
    granularity: ``"per_unit"``, or ``"per_weight"``: a rate for each weight.
  """

  overrides: tuple[Override, ...] = ()
  heads: str | None = HEADS_REGEX
  strict: bool = False
  unit_axis: str = "last"
  granularity: str = "per_unit"


@dataclass(frozen=True)
class UnitSpec:
  """The units of one parameter.

  Attributes:
    path: The parameter's path.
    shape: Its shape.
    kind: ``"unit"``, ``"per_weight"``, ``"one_rate"``, ``"frozen"`` (never updated, be
      it a head's or not) or ``"head"`` (the heads' rates are not drawn).
    axes: The axes that index the units, sorted; ``()`` for one rate.
    group: Parameters of the same group share one vector of rates; "" for frozen ones
      and heads, and for a layer at the root of the tree.
    tiles: How many times the units are repeated along the last of ``axes``.
    assumed: Whether no rule knew the parameter.
    rule: The rule that decided, in words.
    of_heads: Whether axis 0 indexes the heads: of heads that train and of frozen ones.
  """

  path: str
  shape: Shape
  kind: Literal["unit", "per_weight", "one_rate", "frozen", "head"]
  axes: Shape
  group: str
  tiles: int = 1
  assumed: bool = False
  rule: str = ""
  of_heads: bool = False

  @property
  def unit_shape(self) -> Shape:
    """The shape of the units: the parameter's along ``axes``, without tiles."""
    sizes = [self.shape[axis] for axis in self.axes]
    return (*sizes[:-1], sizes[-1] // self.tiles) if sizes else ()

  @property
  def num_units(self) -> int:
    """The number of units."""
    return math.prod(self.unit_shape)


def unit_specs(
  params: Any, options: UnitOptions = UnitOptions()
) -> dict[str, UnitSpec]:
  """Reads the units of every parameter from the shapes in a tree.

  What shapes can't tell, ``unit_overrides(model)`` of ``alrao_jax.linen`` and
  ``alrao_jax.nnx`` can. From shapes alone, layers without bias share rates between
  stacks (``vmap``, ``scan``), between places (``ConvLocal``) and along all feature axes
  but the last (``DenseGeneral``, ``Einsum``); a kernel with ``transpose_kernel`` that
  is square or has no bias, or of an einsum that swaps equal axes, is misread.

  Args:
    params: Pytree of arrays or ``jax.ShapeDtypeStruct``: a linen or haiku dict, an
      ``nnx.State``, boxed or pure, an Equinox module, any nested dict.
    options: See :class:`UnitOptions`.

  Returns:
    The :class:`UnitSpec` of each leaf by path, in the tree's order.

  Raises:
    TypeError: A leaf is no array of a floating dtype; an override is malformed.
    ValueError: An override matches nothing or doesn't fit; a bias fits no axes of its
      kernel, or several; gates don't divide; members of a group have different unit
      shapes; with ``strict``, no rule knows a leaf.

  Example:
    >>> import jax.numpy as jnp
    >>> specs = unit_specs({"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)})
    >>> specs["kernel"].axes, specs["kernel"].num_units
    ((1,), 5)
  """
  check_tree("describe_units()", params)
  _check_options(options)
  leaves = flatten_with_paths(params)[0]
  shapes = {path: _shape_of(path, leaf) for path, leaf in leaves}
  heads = {path for path in shapes if head_name(path, options.heads) is not None}
  body = {path: shape for path, shape in shapes.items() if path not in heads}
  given = match_overrides(body, heads, options.overrides)
  rules = Rules(body, options.unit_axis, given)
  specs, ranks = {}, {}
  for path, shape in shapes.items():
    what = given.get(path)
    if path in heads:
      specs[path] = _head(path, shape, frozen=what == "frozen")
    elif isinstance(what, str):
      specs[path] = _by_word(path, shape, what, "override")
    elif options.granularity == "per_weight":
      specs[path] = _by_word(path, shape, "per_weight", "granularity")
    elif what is not None:
      specs[path] = _by_units(path, shape, what, rules.group(path))
      ranks[path] = min(rules.rank(path), 1) if what.group is None else 2
    else:
      axes, rule, tiles, assumed = rules.read(path)
      group = rules.group(path)
      specs[path] = UnitSpec(path, shape, "unit", axes, group, tiles, assumed, rule)
      ranks[path] = rules.rank(path)
  if options.strict:
    _check_nothing_assumed(specs)
  return _settle_groups(specs, ranks)


def _check_options(options: UnitOptions) -> None:
  for name, allowed in (
    ("unit_axis", ("last", "first")),
    ("granularity", ("per_unit", "per_weight")),
  ):
    if (value := getattr(options, name)) not in allowed:
      raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")


def _shape_of(path: str, leaf: Any) -> Shape:
  check_parameter(path, leaf)
  return tuple(leaf.shape)


def _head(path: str, shape: Shape, frozen: bool) -> UnitSpec:
  if not shape:
    raise ValueError(
      f"Parameters of heads must have the heads on axis 0, got {path!r}, of shape ()."
    )
  kind, rule = ("frozen", "override") if frozen else ("head", "head")
  return UnitSpec(path, shape, kind, (0,), "", rule=rule, of_heads=True)


def _by_word(path: str, shape: Shape, word: Any, rule: str) -> UnitSpec:
  axes = tuple(range(len(shape))) if word == "per_weight" else ()
  return UnitSpec(path, shape, word, axes, "" if word == "frozen" else path, rule=rule)


def _by_units(path: str, shape: Shape, units: Units, group: str) -> UnitSpec:
  rank = len(shape)
  axes = tuple(sorted(axis + rank if axis < 0 else axis for axis in units.axes))
  if len(set(axes)) < len(axes) or any(not 0 <= axis < rank for axis in axes):
    raise ValueError(
      f"overrides must name different axes of {path!r}, which has shape {shape}, got "
      f"{units.axes}."
    )
  if units.tiles < 1 or (
    units.tiles > 1 and (not axes or shape[axes[-1]] % units.tiles)
  ):
    raise ValueError(
      f"overrides must give a number of tiles that divides the last unit axis of "
      f"{path!r}, which has shape {shape}, got {units}."
    )
  group = group if units.group is None else units.group
  return UnitSpec(path, shape, "unit", axes, group, units.tiles, rule="override")


def _check_nothing_assumed(specs: Mapping[str, UnitSpec]) -> None:
  assumed = [spec for spec in specs.values() if spec.assumed]
  if assumed:
    texts = [f"{spec.path!r} of shape {spec.shape}" for spec in assumed]
    raise ValueError(
      f"strict=True needs a rule for every parameter, got none for {', '.join(texts)}. "
      f"If the units are on axes {assumed[0].axes}, "
      f"{override_text(assumed[0].path, assumed[0].axes)}."
    )


def _settle_groups(
  specs: dict[str, UnitSpec], ranks: Mapping[str, int]
) -> dict[str, UnitSpec]:
  """Gives a parameter its own group where its units differ from its group's.

  Kernels decide what the units of a layer are; without one, a layer's scale and bias
  share only if they agree. Cells and groups given by name must agree.
  """
  members: dict[str, list[UnitSpec]] = {}
  for path in ranks:
    members.setdefault(specs[path].group, []).append(specs[path])
  for group, found in members.items():
    shapes = {spec.unit_shape for spec in found}
    if len(shapes) == 1:
      continue
    top = max(ranks[spec.path] for spec in found)
    leaders = [spec for spec in found if ranks[spec.path] == top]
    if top == 2:
      for spec in leaders:
        if spec.unit_shape != leaders[0].unit_shape:
          raise ValueError(
            f"Members of a group must have units of one shape, got in the group "
            f"{group!r}: {spec.path!r} of shape {spec.shape} with units "
            f"{spec.unit_shape} and {leaders[0].path!r} of shape {leaders[0].shape} "
            f"with units {leaders[0].unit_shape}. To give one its own group, "
            f"{override_text(spec.path, Units(spec.axes, spec.path, spec.tiles))}."
          )
    for spec in found:
      if top == 0 or spec.unit_shape != leaders[0].unit_shape:
        specs[spec.path] = replace(spec, group=spec.path)
  return specs


def describe_units(params: Any, **options: Any) -> str:
  """Describes the units of every parameter in a table, before any training.

  Args:
    params: Pytree of arrays or ``jax.ShapeDtypeStruct``, such as the parameters that
      the optimizer is given, or ``jax.eval_shape`` of their initialisation.
    **options: Those of :class:`UnitOptions`: ``overrides``, ``heads``, ``strict``,
      ``unit_axis``, ``granularity``.

  Returns:
    A line for each parameter: its path, its shape, the axes that index its units (with
    the number of gates that repeat them, if there are several), the group that shares
    one vector of rates, the number of units, and the rule that decided. The last lines
    count the rates that are drawn and name what was assumed.

  Raises:
    TypeError: An option is unknown, or a leaf is no array of a floating dtype.
    ValueError: As :func:`unit_specs` does.

  Example:
    >>> import jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.ones((3, 5)), "t": jnp.ones(())}}
    >>> print(describe_units(params))
    parameter     shape   unit axes  group    units  rule
    dense/kernel  (3, 5)  (1,)       dense        5  kernel without bias
    dense/t       ()      ()         dense/t      1  scalar
    6 rates for 16 parameters in 2 groups.
  """
  specs = list(unit_specs(params, UnitOptions(**options)).values())
  header = ("parameter", "shape", "unit axes", "group", "units", "rule")
  lines = columns([header, *map(_row, specs)], right={4})
  drawn = [s for s in specs if s.kind not in ("frozen", "head")]
  groups = {s.group: s.num_units for s in drawn}
  weights = sum(math.prod(s.shape) for s in drawn)
  lines.append(
    f"{sum(groups.values())} rates for {weights} parameters in {len(groups)} groups."
  )
  assumed = [s.path for s in specs if s.assumed]
  if assumed:
    lines.append(f"Assumed, for want of a rule: {', '.join(assumed)}.")
  return "\n".join(lines)


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
