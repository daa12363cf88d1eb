"""Reports which rates live, and which head wins."""

import dataclasses
import os
from typing import Any, Literal

import jax
import jax.core
import numpy as np

from . import _plot, _tables
from ._averaging import SwitchState
from ._describe import describe_units as describe_units
from ._heads import TrackHeadsState, log_weights
from ._readings import posteriors, read_guarded, read_motion, read_rates
from ._scalars import effective_heads
from ._state import find_state
from ._units import HEADS_REGEX, UnitOptions


@dataclasses.dataclass(frozen=True)
class HeadReport:
  """One head.

  Attributes:
    rate: Its learning rate.
    weight: Its posterior weight; those of all heads sum to 1. (The heads' cumulative
      log-likelihoods are not part of the optimizer's state.)
    alive: Whether the updates move it; None without updates.
  """

  rate: float
  weight: float
  alive: bool | None


@dataclasses.dataclass(frozen=True)
class DecadeReport:
  """The units with rates in one decade, ``low <= rate < high``.

  Attributes:
    low: The lower end, a power of ten; 0 for units with rate 0.
    high: The upper end; 0 for units with rate 0.
    units: Number of units.
    alive: Number of units that the updates move; None without updates.
    share_of_squared_update: Their share of the squared norm of all units' updates,
      heads left out; None without updates, NaN if these are not finite.
    guarded: Number of units that the guard stopped at least once; None without one, or
      where it guards a part of the units only.
  """

  low: float
  high: float
  units: int
  alive: int | None
  share_of_squared_update: float | None
  guarded: int | None


@dataclasses.dataclass(frozen=True)
class Report:
  """What :func:`report` found, as plain Python numbers.

  ``str(report)`` is a table in plain text, ``rich.print(report)`` one in colour,
  ``report.plot("report.png")`` a picture, ``dataclasses.asdict(report)`` a record.

  Attributes:
    heads: The heads, slowest first; empty for a model without.
    decades: The units by the decade of their rates as drawn, slowest first.
    learning_rate: Suggestion for a later run with one learning rate: the geometric
      mean of the heads' rates, weighted by their posterior. None without heads.
    effective_heads: Exponential of the posterior's entropy, 1 to the number of heads;
      None without heads.
    observations: Number of mini-batches that the posterior has seen; None where its
      averaging keeps no count.
  """

  heads: tuple[HeadReport, ...]
  decades: tuple[DecadeReport, ...]
  learning_rate: float | None
  effective_heads: float | None
  observations: int | None

  @property
  def units(self) -> int:
    """Number of units."""
    return sum(decade.units for decade in self.decades)

  @property
  def units_alive(self) -> int | None:
    """Number of units that the updates move, None without updates."""
    return _total(decade.alive for decade in self.decades)

  @property
  def units_guarded(self) -> int | None:
    """Number of units that the guard stopped at least once, None if not known."""
    return _total(decade.guarded for decade in self.decades)

  @property
  def dead_heads(self) -> int | None:
    """Number of heads that the updates do not move, None without updates."""
    return _total(None if h.alive is None else int(not h.alive) for h in self.heads)

  def __str__(self) -> str:
    return _tables.text(self)

  def table(self) -> Any:
    """Returns the report as a ``rich`` renderable, which ``rich.print`` shows.

    Raises:
      ImportError: ``rich`` is not installed; ``str(report)`` does without.
    """
    return _tables.table(self)

  def __rich__(self) -> Any:
    return self.table()

  def plot(self, path: str | os.PathLike[str]) -> None:
    """Draws the posterior over rates, and where in the interval the units live.

    Args:
      path: The file; its ending tells the format: ``.png``, ``.pdf``, ``.svg``.

    Raises:
      ImportError: ``matplotlib`` is not installed.
    """
    _plot.plot(self, path)


def report(
  opt_state: Any,
  params: Any,
  updates: Any = None,
  *,
  name: str | None = None,
  overrides: tuple = (),
  heads: str | None = HEADS_REGEX,
  unit_axis: Literal["last", "first"] = "last",
  granularity: Literal["per_unit", "per_weight"] = "per_unit",
) -> Report:
  r"""Reports which rates live and which head wins.

  **The heads' posterior** over rates, and from it a suggested learning rate
  :math:`\prod_j \eta_j^{a_j}` for a later run with one rate. It is a heuristic: the
  heads' rates were compared on the output layer alone, above a body that has all rates
  at once. Take it for the middle of a search, not for its end.

  **The units**, by the decade of their rates: how many there are, how many are alive,
  and how much of the update is theirs. A unit, or a head, is *alive* if the update of
  it is finite and longer than its weights' norm times their dtype's relative precision:
  what is shorter gets lost when it is added. One step's ``updates`` show one step, in
  which a unit with ReLU may be silent by chance, and a head is dead where its loss was
  not finite. To see who has moved at all, pass what a whole epoch has changed:
  ``jax.tree.map(jnp.subtract, params, params_before)``.

  Whether it works is said under :func:`scalars`. If the fastest decades are dead or
  guarded, the interval reaches further than this network bears.

  Args:
    opt_state: State of an optimizer that holds one :func:`scale_by_unit_rates`, and
      one :func:`track_heads` where the model has heads. Where a mask or a partition
      gives :func:`scale_by_unit_rates` a part of the parameters only, pass the part, as
      for :func:`scalars`.
    params: The parameters.
    updates: A tree like ``params``, what ``optimizer.update`` returned or a difference
      of parameters; without it nothing is said about who is alive.
    name: Which heads, where the optimizer was given ``names``.
    overrides: As given to the optimizer.
    heads: As given to the optimizer.
    unit_axis: As given to the optimizer.
    granularity: As given to the optimizer.

  Returns:
    The :class:`Report`.

  Raises:
    TypeError: If called while JAX traces; :func:`scalars` is for that.
    ValueError: As :func:`unit_rates` and :func:`log_weights`; if ``updates`` are of
      other parameters; if ``opt_state`` is one of several seeds, or has a posterior
      over heads that are not among ``params``.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.ones((3, 20))},
    ...           "out": {"alrao_heads": {"bias": jnp.zeros((2, 5))}}}
    >>> found = report(alrao.alrao(jax.random.key(0)).init(params), params)
    >>> found.units, len(found.decades), round(found.learning_rate, 3)
    (20, 6, 0.01)
  """
  call = "report()"
  leaves = jax.tree.leaves((opt_state, params, updates))
  if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
    raise TypeError(
      f"{call} looks at values, which are not known while JAX traces. Call it outside "
      "jit, or write alrao_jax.scalars(...) inside."
    )
  options = UnitOptions(tuple(overrides), heads, False, unit_axis, granularity)
  rates = read_rates(call, opt_state, params, options)
  ladder, rates = (np.asarray(each, np.float64) for each in rates)
  motion = None
  if updates is not None:
    motion = read_motion(call, opt_state, params, updates, options)
    motion = jax.device_get(motion)
  decades = _decades(rates, motion, read_guarded(opt_state, params, options))
  if not posteriors(call, opt_state):
    return Report((), decades, None, None, None)

  log_a = log_weights(opt_state, name)
  weights = np.exp(np.asarray(log_a, np.float64))
  if ladder.shape != weights.shape:
    raise ValueError(
      f"{call[:-1]}opt_state=...) has a posterior over {weights.size} heads, but rates "
      f"for {ladder.size} heads among params. Pass the state and the params of that "
      "scale_by_unit_rates that holds the heads' rates."
    )
  each = tuple(
    HeadReport(
      float(ladder[j]),
      float(weights[j]),
      None if motion is None else bool(motion.heads_alive[j]),
    )
    for j in range(len(weights))
  )
  averaging = find_state(opt_state, TrackHeadsState, "track_heads").averaging
  averaging = averaging if name is None else averaging[name]
  return Report(
    each,
    decades,
    learning_rate=float(np.exp(weights @ np.log(ladder) / weights.sum())),
    effective_heads=float(effective_heads(log_a)),
    # Only switch counts, and begins at 1.
    observations=(
      int(averaging.count) - 1 if isinstance(averaging, SwitchState) else None
    ),
  )


def _decades(rates, motion, guarded) -> tuple[DecadeReport, ...]:
  """Sorts the units by the decades of their rates, empty decades between included."""
  moving = rates > 0
  # Rates are rounded: 1e-05 in float32 may lie below 1e-05.
  exponents = np.floor(np.log10(np.where(moving, rates, 1.0)) + 1e-6).astype(int)
  squares = None if motion is None else np.square(motion.steps.astype(np.float64))
  total = None if squares is None else squares.sum()

  def decade(low, high, which):
    share = None
    if squares is not None:
      with np.errstate(invalid="ignore"):
        share = float(squares[which].sum() / total) if total else 0.0
    return DecadeReport(
      low,
      high,
      int(which.sum()),
      None if motion is None else int(motion.alive[which].sum()),
      share,
      None if guarded is None else int(guarded[which].sum()),
    )

  found = [] if moving.all() else [decade(0.0, 0.0, ~moving)]
  if moving.any():
    first, last = exponents[moving].min(), exponents[moving].max()
    for k in range(first, last + 1):
      low, high = float(f"1e{k}"), float(f"1e{k + 1}")
      found.append(decade(low, high, moving & (exponents == k)))
  return tuple(found)


def _total(counts) -> int | None:
  """The sum, None if a count is not known or there is none."""
  counts = list(counts)
  return None if not counts or None in counts else sum(counts)
