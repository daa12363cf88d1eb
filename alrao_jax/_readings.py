"""What an optimizer's state tells of its heads and units: for scalars and report."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _rates, _units
from ._guard import GuardUnitsState
from ._heads import TrackHeadsState
from ._state import find_state
from ._transform import ScaleByUnitRatesState, check_layout, rate_vector
from ._unit_norms import unit_norms


class Motion(NamedTuple):
  """How one update moves the units, and the heads.

  Attributes:
    steps: Norm of each unit's update, shape ``(num_units,)``.
    alive: Whether the unit moves, bool, shape ``(num_units,)``.
    heads_alive: Whether the head moves, bool, shape ``(num_heads,)``.
  """

  steps: jax.Array
  alive: jax.Array
  heads_alive: jax.Array


def holds(opt_state: Any, kind: type) -> bool:
  """Whether a state of this type lies anywhere in ``opt_state``."""
  nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
  return any(isinstance(node, kind) for node in nodes)


def posteriors(opt_state: Any) -> dict[str | None, jax.Array]:
  """The heads' log-weights by the names of their layers; None: the only layer's."""
  if not holds(opt_state, TrackHeadsState):
    return {}
  found = find_state(opt_state, TrackHeadsState, "track_heads").log_weights
  return dict(found) if isinstance(found, Mapping) else {None: found}


def head_rates(opt_state: Any, num_heads: int) -> jax.Array:
  """The rates of the heads, shape ``(num_heads,)``."""
  state = find_state(opt_state, ScaleByUnitRatesState, "scale_by_unit_rates")
  return jnp.broadcast_to(
    state.head_distribution.quantile(state.quantiles[:num_heads]), (num_heads,)
  )


def read_trips(opt_state: Any) -> jax.Array | None:
  """How often the guard stopped each unit, None without a guard."""
  if not holds(opt_state, GuardUnitsState):
    return None
  return find_state(opt_state, GuardUnitsState, "guard_units").trips


def read_rates(
  call: str, opt_state: Any, params: Any, options: dict[str, Any]
) -> jax.Array:
  """The units' rates as drawn, shape ``(num_units,)``.

  Raises:
    ValueError: The state is of other parameters.
  """
  state, _, layout = _read(call, opt_state, params, options)
  return rate_vector(state, layout)[layout.num_heads :]


def read_motion(
  call: str, opt_state: Any, params: Any, updates: Any, options: dict[str, Any]
) -> Motion:
  """Reads how ``updates`` move the units.

  Raises:
    ValueError: The state or ``updates`` are of other parameters.
  """
  state, specs, layout = _read(call, opt_state, params, options)
  shapes = {path: leaf.shape for path, leaf in _units.flatten_with_paths(updates)[0]}
  for path, spec in specs.items():
    if shapes.get(path) != spec.shape:
      raise ValueError(
        f"{call[:-1]}updates=...) must be like params, with shape {spec.shape} for "
        f"{path!r}, got {shapes.get(path, 'none')}. Write the updates that "
        "optimizer.update returned, or the difference of two params."
      )
  dtype = state.quantiles.dtype
  steps = unit_norms(specs, layout, updates, dtype)
  weights = unit_norms(specs, layout, params, dtype)
  # A smaller step is lost when it is added to the weights.
  precision = jnp.asarray(_precision(specs, layout, params), dtype)
  alive = jnp.isfinite(steps) & (steps > precision * weights)
  heads = layout.num_heads
  return Motion(steps[heads:], alive[heads:], alive[:heads])


def _read(call, opt_state, params, options):
  """The state with the rates, and the units and the layout that it was made for."""
  state = find_state(opt_state, ScaleByUnitRatesState, "scale_by_unit_rates")
  specs = _units.unit_specs(params, _units.UnitOptions(**options))
  layout = _rates.make_layout(specs)
  check_layout(call, state, layout, specs)
  return state, specs, layout


def _precision(specs, layout, params) -> np.ndarray:
  """The relative precision of each unit's weights, shape ``(layout.size,)``."""
  leaves = dict(_units.flatten_with_paths(params)[0])
  heads, groups = 0.0, dict.fromkeys(layout.names, 0.0)
  for path, spec in specs.items():
    precision = float(jnp.finfo(leaves[path].dtype).eps)
    if spec.kind == "head":
      heads = max(heads, precision)
    elif spec.kind != "frozen":
      groups[spec.group] = max(groups[spec.group], precision)
  values = [heads, *groups.values()]
  return np.repeat(values, [layout.num_heads, *layout.sizes])
