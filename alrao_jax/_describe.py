"""Describes how the units of a model were read, before any training."""

import math
from typing import Any

from ._tables import columns
from ._units import UnitOptions, UnitSpec, unit_specs


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
