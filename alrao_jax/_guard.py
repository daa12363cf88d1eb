"""A guard for units that explode: their update is dropped, their rate lowered."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _checks, _tree
from ._tree import state_dtype
from ._unit_map import unit_map
from ._units import UnitOptions


class Guard(NamedTuple):
  """When a unit is stopped, and how; made by :func:`guard`, which checks arguments.

  Attributes:
    limit: The largest step of a unit, as a multiple of the norm of its weights.
    slowdown: What a stopped unit's rate is multiplied by.
  """

  limit: float
  slowdown: float


def guard(limit: float = 1.0, slowdown: float = 0.1) -> Guard:
  r"""How :func:`guard_units` and ``alrao(..., guard=alrao.guard())`` guard the units.

  An update of a unit is too large where

  .. math:: \|\Delta w\| > \mathrm{limit} \cdot \max(\|w\|, 1)

  with the norms over all of the unit's weights and its bias. The 1 gives weights that
  start at 0 room to leave it; the norm of a Dense or Conv unit's weights is about 1
  under Flax's default initialiser (``lecun_normal``), whatever its fan-in.
  ``python -m benchmarks.studies guard`` counts how many runs of a small convolutional
  network end finite and learn, with and without it.

  Args:
    limit: Positive. A step longer than the weights themselves is no descent any more.
    slowdown: In ``[0, 1]``. 0 freezes a unit for good at its first trip.

  Returns:
    The settings.

  Raises:
    ValueError: If ``limit`` is not positive, or ``slowdown`` not in ``[0, 1]``.

  Example:
    >>> import alrao_jax as alrao, jax
    >>> optimizer = alrao.alrao(
    ...   jax.random.key(0), max_learning_rate=1e3, guard=alrao.guard())
  """
  _checks.check_positive("guard()", "limit", limit)
  _checks.check_probability("guard()", "slowdown", slowdown)
  return Guard(limit, slowdown)


class GuardUnitsState(NamedTuple):
  """State of :func:`guard_units`.

  Attributes:
    fingerprint: A uint32 scalar that tells whether parameters are read as they were at
      ``init``, heads left out.
    trips: How often each unit was stopped, and so slowed: int32, shape
      ``(max(num_units, 1),)``, the groups of units by name. Heads have none.
  """

  fingerprint: jax.Array
  trips: jax.Array


def guard_units(
  settings: Guard | None = None,
  *,
  overrides: tuple = (),
  heads: str | None = _tree.HEADS_REGEX,
  strict: bool = False,
  unit_axis: Literal["last", "first"] = "last",
  granularity: Literal["per_unit", "per_weight"] = "per_unit",
) -> optax.GradientTransformationExtraArgs:
  r"""Stops the updates of units that are about to explode, and slows just those units.

  For networks without normalisation and for wide intervals, where a unit that is far
  too fast makes the activations of all that follow overflow, hence the gradient of the
  whole network useless, for good. The step before that one is large but finite: it is
  the one that is caught here, before it reaches the weights. With
  :math:`k` the number of times that a unit was stopped so far, its update becomes

  .. math::
    \Delta w' = \mathrm{slowdown}^k \Delta w, \qquad
    \Delta w \leftarrow \begin{cases}
      \Delta w' & \text{if } \|\Delta w'\| \le \mathrm{limit} \max(\|w\|, 1) \\
      0 \text{ and } k \leftarrow k + 1 & \text{otherwise}
    \end{cases}

  So a unit that is too fast finds a rate at which it is not. That is for good: no rate
  rises again, so one broken batch slows every unit that it hits for the rest of the
  training, and two such batches slow it by ``slowdown`` squared. Weights that were
  finite stay so. An update that holds NaN is dropped, but slows nobody, since it
  doesn't tell who is to blame. The updates of units that were never stopped are left
  alone to the last bit (compiled into one program, XLA may round their sum with the
  weights otherwise), and so are heads: a diverged head is :func:`track_heads`' to leave
  out.

  Stands after :func:`scale_by_unit_rates`, and after all else that makes updates
  larger, such as a schedule; :func:`drop_diverged` stands first, so that the state of a
  base stays finite too. ``optax.apply_if_finite`` stops all units where one is not
  finite; ``optax.adaptive_grad_clip`` shortens a unit's step where this one lowers its
  rate.

  Args:
    settings: What :func:`guard` returned; its defaults without.
    overrides: As given to :func:`scale_by_unit_rates`, as for all that follow.
    heads: See :func:`scale_by_unit_rates`.
    strict: See :func:`scale_by_unit_rates`.
    unit_axis: See :func:`scale_by_unit_rates`.
    granularity: See :func:`scale_by_unit_rates`.

  Returns:
    The transformation. Updates keep their sign and dtype; its ``update`` needs
    ``params``. Its state holds one int32 a unit.

  Raises:
    TypeError: If ``settings`` is no :class:`Guard`.
    ValueError: At ``update``, without ``params``, or with others than those of
      ``init``; at ``init`` as :func:`unit_specs`.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> weights = {"kernel": jnp.ones((4, 2))}
    >>> updates = {"kernel": jnp.array([[0.1, 100.0]] * 4)}
    >>> guarded = alrao.guard_units()
    >>> updates, state = guarded.update(updates, guarded.init(weights), weights)
    >>> print(updates["kernel"][0], state.trips)
    [0.1 0. ] [0 1]
  """
  settings = guard() if settings is None else settings
  if not isinstance(settings, Guard):
    raise TypeError(
      "guard_units(settings=...) must be what alrao_jax.guard(...) returns, got "
      f"{settings!r}. Write guard_units(alrao_jax.guard(limit=1.0))."
    )
  options = UnitOptions(overrides, strict, unit_axis, heads, granularity)

  def init_fn(params):
    units = unit_map(params, options).body
    fingerprint = jnp.asarray(units.fingerprint, jnp.uint32)
    return GuardUnitsState(fingerprint, jnp.zeros([max(units.num_units, 1)], jnp.int32))

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        "guard_units().update() needs params, to compare updates with: write "
        "optimizer.update(grads, opt_state, params)."
      )
    units = unit_map(params, options)
    units.body.check("guard_units().update()", state.fingerprint, state.trips)
    dtype = state_dtype(params)
    slower = jnp.asarray(settings.slowdown, dtype) ** state.trips.astype(dtype)
    updates = units.scale(updates, slower)
    length, _ = units.body.norms(updates, dtype)
    weights, _ = units.body.norms(params, dtype)
    fits = length <= settings.limit * jnp.maximum(weights, 1)
    # What no entry of the sum of both can exceed, so that it is finite.
    fits &= length + weights <= _largest(params)
    trips = state.trips + (~fits & ~jnp.isnan(length)).astype(jnp.int32)
    return units.keep(updates, fits), state._replace(trips=trips)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _largest(params: Any) -> float:
  """The largest number that every leaf's dtype can hold."""
  leaves = jax.tree.leaves(params)
  return min((float(jnp.finfo(leaf.dtype).max) for leaf in leaves), default=0.0)
