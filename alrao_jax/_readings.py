"""What an optimizer's state tells of its heads and units: for scalars and report."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _rates, _units
from ._guard import GuardUnitsState
from ._heads import TrackHeadsState
from ._state import find_state, unbox
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


def find_states(opt_state: Any, kind: type) -> list[Any]:
  """All states of this type in ``opt_state``, their leaves as plain arrays."""
  nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
  return [unbox(node) for node in nodes if isinstance(node, kind)]


def posteriors(call: str, opt_state: Any) -> dict[str | None, jax.Array]:
  """The heads' log-weights by the names of their layers; None: the only layer's.

  Raises:
    ValueError: There are several posteriors, or one for each of several seeds.
  """
  if not find_states(opt_state, TrackHeadsState):
    return {}
  found = find_state(opt_state, TrackHeadsState, "track_heads").log_weights
  layers: dict[str | None, jax.Array] = (
    dict(found) if isinstance(found, Mapping) else {None: found}
  )
  for log_weights in layers.values():
    _check_one_seed(call, log_weights, "num_heads")
  return layers


def head_rates(state: ScaleByUnitRatesState, num_heads: int) -> jax.Array:
  """The rates of the heads, shape ``(num_heads,)``."""
  return jnp.broadcast_to(
    state.head_distribution.quantile(state.quantiles[:num_heads]), (num_heads,)
  )


def read_trips(opt_state: Any) -> jax.Array | None:
  """How often a guard stopped each unit that it guards, None without a guard."""
  guards = find_states(opt_state, GuardUnitsState)
  return jnp.concatenate([state.trips for state in guards]) if guards else None


def read_guarded(
  opt_state: Any, params: Any, options: _units.UnitOptions
) -> np.ndarray | None:
  """Which units a guard stopped, None without one for just these units."""
  specs = _units.unit_specs(params, options)
  body = {path: spec for path, spec in specs.items() if spec.kind != "head"}
  for state in find_states(opt_state, GuardUnitsState):
    if int(state.fingerprint) == _rates.fingerprint(body):
      return np.asarray(state.trips) > 0
  return None


def read_rates(
  call: str, opt_state: Any, params: Any, options: _units.UnitOptions
) -> tuple[jax.Array, jax.Array]:
  """The rates of the heads and of the units as drawn, two vectors.

  Raises:
    ValueError: The state is of other parameters.
  """
  state, _, layout = _read(call, opt_state, params, options)
  vector = rate_vector(state, layout)
  return vector[: layout.num_heads], vector[layout.num_heads :]


def read_motion(
  call: str, opt_state: Any, params: Any, updates: Any, options: _units.UnitOptions
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
  if len(found := find_states(opt_state, ScaleByUnitRatesState)) > 1:
    raise ValueError(
      f"{call} needs one scale_by_unit_rates, got {len(found)}. Pass the part of one: "
      f"{call[:-1]}(opt_state[0].inner_states[label], opt_state[1]), part_of_params), "
      "if opt_state[0] is the partition's and opt_state[1] that of track_heads."
    )
  state = find_state(opt_state, ScaleByUnitRatesState, "scale_by_unit_rates")
  _check_one_seed(call, state.quantiles, "num_heads + num_units")
  specs = _units.unit_specs(params, options)
  layout = _rates.make_layout(specs)
  check_layout(call, state, layout, specs)
  return state, specs, layout


def _check_one_seed(call, vector, length):
  """Refuses what a state has that was made under ``jax.vmap``."""
  if vector.ndim != 1:
    raise ValueError(
      f"{call} needs the state of one seed, with a vector of shape ({length},), got "
      f"shape {vector.shape}. Index one seed: jax.tree.map(lambda x: x[i], opt_state)."
    )


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
