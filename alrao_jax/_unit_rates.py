"""Reads the rates out of an optimizer's state, to look at, and writes others in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _checks, _rates, _units
from ._state import find_state, replace_state
from ._transform import ScaleByUnitRatesState, check_layout, rate_vector


def unit_rates(opt_state: Any, params: Any, **options: Any) -> Any:
  """Returns the learning rate of every parameter entry, to look at.

  Args:
    opt_state: State of an optimizer that holds one :func:`scale_by_unit_rates`,
      within any chain or wrapper. Where a mask or a partition gives it a part of the
      parameters only, pass that part's state.
    params: The parameters that it was initialised with, or a tree of their shapes.
    **options: ``overrides``, ``heads``, ``unit_axis`` and ``granularity`` as they were
      given to the optimizer.

  Returns:
    A tree like ``params``, each leaf of its parameter's shape. A schedule that
    multiplies all rates is not part of them. With ``redraw`` they are those of the last
    update.

  Raises:
    ValueError: If ``opt_state`` holds no or several states with rates, or belongs to
      other parameters.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    >>> opt_state = alrao.scale_by_unit_rates(jax.random.key(0), 0.1, 0.1).init(params)
    >>> print(alrao.unit_rates(opt_state, params)["dense"]["bias"])
    [0.1 0.1]
  """
  state = find_rates(opt_state)
  specs = _units.unit_specs(params, _units.UnitOptions(**options))
  layout = _rates.make_layout(specs)
  check_layout("unit_rates()", state, layout, specs)
  vector = rate_vector(state, layout)

  def read(path, leaf):
    spec = specs[_units.path_of(path)]
    if spec.kind == "frozen":
      return jnp.zeros(leaf.shape, vector.dtype)
    return jnp.broadcast_to(_rates.rates_of_leaf(spec, vector, layout), leaf.shape)

  return jax.tree_util.tree_map_with_path(read, params)


def with_unit_rates(opt_state: Any, params: Any, rates: Any, **options: Any) -> Any:
  """Returns ``opt_state`` with the given learning rates in place of the drawn ones.

  Args:
    opt_state: As for :func:`unit_rates`.
    params: As for :func:`unit_rates`.
    rates: A tree like ``params``, each leaf of its parameter's shape, as
      :func:`unit_rates` returns; the entries of a unit must be equal. Log-uniform rates
      may lie outside their interval. (With ``redraw`` the next update draws others.)
    **options: As for :func:`unit_rates`.

  Returns:
    A new state; nothing but its quantiles differs.

  Raises:
    ValueError: As for :func:`unit_rates`; if ``rates`` is not a tree like ``params``,
      or holds rates that differ within a unit or that the distribution doesn't have.
    TypeError: If the distribution of the rates has no ``cdf``.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    >>> opt_state = alrao.scale_by_unit_rates(jax.random.key(0)).init(params)
    >>> halved = jax.tree.map(lambda r: r / 2, alrao.unit_rates(opt_state, params))
    >>> opt_state = alrao.with_unit_rates(opt_state, params, halved)
  """
  call = "with_unit_rates()"
  state = find_rates(opt_state)
  specs = _units.unit_specs(params, _units.UnitOptions(**options))
  layout = _rates.make_layout(specs)
  check_layout(call, state, layout, specs)
  if not hasattr(state.unit_distribution, "cdf"):
    raise TypeError(
      f"{call} needs the inverse of the rates' distribution: give "
      f"{type(state.unit_distribution).__name__} a method cdf(rate)."
    )
  values = dict(_units.flatten_with_paths(rates)[0])
  vector = state.quantiles
  for path, spec in specs.items():
    if path not in values or values[path].shape != spec.shape:
      raise ValueError(
        f"{call} needs rates of shape {spec.shape} for {path!r}, got "
        f"{values[path].shape if path in values else 'none'}."
      )
    if spec.kind != "frozen":
      is_head = spec.kind == "head"
      law = state.head_distribution if is_head else state.unit_distribution
      quantiles = law.cdf(jnp.asarray(values[path], vector.dtype))
      vector = _rates.write_leaf(spec, quantiles, vector, layout)
  written = rate_vector(state._replace(quantiles=vector), layout)
  _check_written(call, specs, values, written, layout)
  return replace_state(
    opt_state, ScaleByUnitRatesState, lambda old: old._replace(quantiles=vector)
  )


def find_rates(opt_state: Any) -> ScaleByUnitRatesState:
  """Finds the one state with rates, its leaves as plain arrays."""
  return find_state(opt_state, ScaleByUnitRatesState, "scale_by_unit_rates")


def _check_written(call, specs, values, vector, layout):
  """Refuses rates that the state can't hold: they would be silently others."""
  for path, spec in specs.items():
    if spec.kind == "frozen" or not _checks.is_concrete(values[path]):
      continue
    held = _rates.rates_of_leaf(spec, vector, layout)
    if not np.allclose(np.asarray(held), np.asarray(values[path]), rtol=1e-4, atol=0):
      raise ValueError(
        f"{call} can't give {path!r} these rates: entries of one unit must be equal, "
        "also across the parameters that share it, and rates must be ones that the "
        "distribution has (with equal bounds just one)."
      )
