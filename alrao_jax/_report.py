"""Is it working? Numbers for a logger, and a report as data, table and picture."""

import dataclasses
import functools
import math
import os
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from . import _checks, _tree
from ._alrao import DropDivergedState
from ._checks import optional
from ._guard import GuardUnitsState, SkipBrokenBatchesState
from ._heads import check_one_seed, log_weights, posteriors, tracked_heads
from ._rates import ScaleByUnitRatesState, rates_of
from ._tree import find_state, find_states
from ._unit_map import UnitMap, unit_map
from ._units import UnitOptions, check_options, columns


class Motion(NamedTuple):
  """How one update moves the units, and the heads.

  Attributes:
    steps: Norm of each unit's update, shape ``(num_units,)``.
    moving: Whether the unit moves, bool, shape ``(num_units,)``.
    heads_moving: Whether the head moves, bool, shape ``(num_heads,)``.
  """

  steps: jax.Array
  moving: jax.Array
  heads_moving: jax.Array


def read_trips(opt_state: Any) -> jax.Array | None:
  """How often the guards stopped each of their units; None without a guard."""
  guards = find_states(opt_state, GuardUnitsState)
  return jnp.concatenate([state.trips for state in guards]) if guards else None


def read_counts(opt_state: Any) -> dict[str, jax.Array]:
  """In how many steps something went wrong, by name; only what is counted."""
  counts = {}
  for kind, names in (
    (DropDivergedState, ("nonfinite_body_steps", "nonfinite_head_steps")),
    (SkipBrokenBatchesState, ("skipped_steps",)),
  ):
    if states := find_states(opt_state, kind):
      for name in names:
        # The first of several counts most, since it cleans what the others see.
        each = [jnp.max(getattr(state, name)) for state in states]
        counts[name] = functools.reduce(jnp.maximum, each)
  return counts


def read_guarded(
  opt_state: Any, params: Any, options: UnitOptions
) -> np.ndarray | None:
  """Which units a guard stopped; None without a guard for exactly these units."""
  units = unit_map(params, options)
  for state in find_states(opt_state, GuardUnitsState):
    if int(state.fingerprint) == units.body.fingerprint:
      return np.asarray(state.trips)[: units.num_units] > 0
  return None


def read_rates(
  call: str, opt_state: Any, params: Any, options: UnitOptions
) -> tuple[jax.Array, jax.Array]:
  """The rates of the heads and of the units as drawn, two vectors.

  Raises:
    ValueError: If the state is of other parameters.
  """
  state, units = _read(call, opt_state, params, options)
  of_units, of_heads = rates_of(state)
  return of_heads[: units.num_heads], of_units[: units.num_units]


def read_motion(
  call: str, opt_state: Any, params: Any, updates: Any, options: UnitOptions
) -> Motion:
  """Reads how ``updates`` move the units.

  Raises:
    ValueError: If the state or ``updates`` are of other parameters.
  """
  state, units = _read(call, opt_state, params, options)
  shapes = {path: leaf.shape for path, leaf in _tree.flatten_with_paths(updates)[0]}
  for path, spec in units.specs.items():
    if shapes.get(path) != spec.shape:
      raise ValueError(
        f"{call[:-1]}updates=...) must be like params, with shape {spec.shape} for "
        f"{path!r}, got {shapes.get(path, 'none')}. Write the updates that "
        "optimizer.update returned, or the difference of two params."
      )
  dtype = state.quantiles.dtype
  lengths, weights = units.norms(updates, dtype), units.norms(params, dtype)
  # A smaller step is lost when it is added to the weights.
  moving = [
    jnp.isfinite(length) & (length > jnp.asarray(precision, dtype) * weight)
    for length, weight, precision in zip(
      lengths, weights, _precision(units, params), strict=True
    )
  ]
  body, heads = units.num_units, units.num_heads
  return Motion(lengths[0][:body], moving[0][:body], moving[1][:heads])


def _read(call, opt_state, params, options):
  """The state with the rates, and the units that it was made for."""
  check_options(call, options)
  if len(found := find_states(opt_state, ScaleByUnitRatesState)) > 1:
    raise ValueError(
      f"{call} needs one scale_by_unit_rates, got {len(found)}. Pass the part of one: "
      f"{call[:-1]}(opt_state[0].inner_states[label], opt_state[1]), part_of_params), "
      "if opt_state[0] is the partition's and opt_state[1] that of track_heads."
    )
  _tree.check_tree(call, params)
  state = find_state(opt_state, ScaleByUnitRatesState, "scale_by_unit_rates", call)
  check_one_seed(call, state.quantiles, "num_units")
  units = unit_map(params, options)
  units.check(call, state.fingerprint, state.quantiles, state.ladder)
  return state, units


def _precision(units: UnitMap, params) -> tuple[np.ndarray, np.ndarray]:
  """The relative precision of the weights of each unit, and of the heads."""
  leaves = dict(_tree.flatten_with_paths(params)[0])
  of_units = np.zeros(max(units.num_units, 1))
  of_heads = np.zeros(max(units.num_heads, 1))
  for path, spec in units.specs.items():
    precision = float(jnp.finfo(leaves[path].dtype).eps)
    if spec.kind != "frozen":
      read = of_heads if spec.kind == "head" else of_units[units.groups[spec.group]]
      np.maximum(read, precision, out=read)  # a view of the vector
  return of_units, of_heads


@_checks.refuses_removed
def scalars(
  opt_state: Any,
  params: Any = None,
  updates: Any = None,
  *,
  units: UnitOptions = UnitOptions(),
) -> dict[str, jax.Array]:
  r"""Returns numbers for a logger that tell whether Alrao is working.

  Use it inside the jitted step,
  ``metrics |= alrao.scalars(opt_state, params, updates)``. Nothing waits for the
  device, keys depend only on the arguments and the optimizer, and no value is ever NaN.

  =============================  ====================================================
  ``alrao/head_0/weight``, ...   Posterior weight of each head, slowest first; they
                                 sum to 1.
  ``alrao/effective_heads``      Exponential of the posterior's entropy, from 1 (one
                                 head has all the weight) to ``num_heads`` (equal
                                 weights).
  ``alrao/log10_rate``           Posterior mean of the decimal logarithms of the
                                 heads' rates; only if ``opt_state`` holds one
                                 :func:`scale_by_unit_rates`, that of the heads.
  ``alrao/heads_diverged``       Number of heads that had diverged in the last report.
  ``alrao/all_heads_diverged     In how many steps all heads had diverged; the network
  _steps``                       learns nothing in them.
  ``alrao/heads_moving``         Number of heads that this update moves. Needs
                                 ``updates``, like the next.
  ``alrao/units_moving``         Share of the units that it moves.
  ``alrao/nonfinite_body         In how many steps the gradient of the body held NaN or
  _steps``                       infinities; only with a :func:`drop_diverged`.
  ``alrao/nonfinite_head         The same for the heads' gradients.
  _steps``
  ``alrao/units_guarded``        Share of the guarded units that were stopped at least
                                 once; only with a :func:`guard_units`.
  ``alrao/guard_trips``          How often the guard stopped a unit, in total.
  ``alrao/skipped_steps``        Number of skipped steps; only with a
                                 :func:`skip_broken_batches`.
  =============================  ====================================================

  A unit, or a head, *moves* in a step if its update is finite and longer than the norm
  of its weights times their dtype's relative precision (1.2e-7 for float32), since a
  shorter update is lost in the addition. Otherwise it stands.

  **Is it working?** Yes, if ``effective_heads`` falls to a few, and ``log10_rate``
  settles inside the interval. If it settles at an end, move the interval that way. The
  method expects a few diverged heads at the fast end. It does not expect a growing
  ``all_heads_diverged_steps`` or a falling ``units_moving``: then a unit that is too
  fast has made the network overflow, or a whole layer stands. Write
  ``guard=alrao.guard()``, or lower ``max_learning_rate``. Note that many units of a
  network with ReLU are silent on some batches, and half precision loses the steps of
  slow units. Under :class:`optax.MultiSteps` only each k-th update is not zero: look
  only at steps where ``optimizer.has_updated(opt_state)``.

  **Parts.** If a mask or a partition gives :func:`scale_by_unit_rates` only a part of
  the parameters, pass that part of all three arguments. For
  ``optax.chain(optax.partition({"b": ..., "h": ...}, labels), track_heads())`` with "h"
  for the layer ``out``::

    part = lambda tree: {"out": tree["out"]}
    state = (opt_state[0].inner_states["h"], opt_state[1])
    metrics |= alrao.scalars(state, part(params), part(updates))

  Args:
    opt_state: State of an optimizer that holds a :func:`track_heads`, a
      :func:`scale_by_unit_rates` or both, within any chain or wrapper, or the
      ``opt_state`` of an ``nnx.Optimizer``. With ``updates`` it must hold exactly one
      :func:`scale_by_unit_rates`.
    params: The parameters; only needed with ``updates``.
    updates: What ``optimizer.update`` returned, a tree like ``params``.
    units: How the units are read, as given to the optimizer.

  Returns:
    Scalars by name. With several MultiHeads, the posteriors' keys begin with
    ``alrao/<path of the MultiHead>/`` instead.

  Raises:
    ValueError: If ``opt_state`` holds no such state, several posteriors, or one for
      each of several seeds; if ``updates`` come without ``params``, or with a state
      that is of other parameters or holds several :func:`scale_by_unit_rates`.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"bias": jnp.zeros((2, 3))}}}
    >>> opt_state = alrao.alrao(jax.random.key(0)).init(params)
    >>> print({name: round(float(x), 2) for name, x in scalars(opt_state).items()})
    {'alrao/head_0/weight': 0.5, 'alrao/head_1/weight': 0.5,
     'alrao/effective_heads': 2.0, 'alrao/log10_rate': -2.0, ...}
  """
  found = {}
  layers = posteriors("scalars()", opt_state)
  tracked = tracked_heads(opt_state)
  rates = find_states(opt_state, ScaleByUnitRatesState)
  if not layers and not rates:
    kind = ScaleByUnitRatesState  # none there: an error
    find_state(opt_state, kind, "scale_by_unit_rates", "scalars()")
  for name, each in layers.items():
    prefix = "alrao/" if name is None else f"alrao/{name}/"
    weights = jnp.exp(each)
    for head, weight in enumerate(weights):
      found[f"{prefix}head_{head}/weight"] = weight
    found[f"{prefix}effective_heads"] = effective_heads(each)
    if len(rates) == 1 and rates[0].ladder.shape == weights.shape:
      log10_rates = jnp.log10(rates_of(rates[0])[1]).astype(weights.dtype)
      found[f"{prefix}log10_rate"] = jnp.sum(weights * log10_rates)
    found[f"{prefix}heads_diverged"] = jnp.sum(tracked[name].diverged)
    found[f"{prefix}all_heads_diverged_steps"] = tracked[name].all_diverged_steps
  if updates is not None:
    if params is None:
      raise ValueError(
        "scalars(updates=...) needs params, to compare updates with: write "
        "scalars(opt_state, params, updates)."
      )
    motion = read_motion("scalars()", opt_state, params, updates, units)
    if motion.heads_moving.size:
      found["alrao/heads_moving"] = jnp.sum(motion.heads_moving)
    if motion.moving.size:
      found["alrao/units_moving"] = _share(motion.moving)
  for name, count in read_counts(opt_state).items():
    found[f"alrao/{name}"] = count
  trips = read_trips(opt_state)
  if trips is not None:
    found["alrao/units_guarded"] = _share(trips > 0)
    found["alrao/guard_trips"] = jnp.sum(trips)
  return found


def effective_heads(log_weights: jax.Array) -> jax.Array:
  """The exponential of the entropy of the heads' weights, a scalar."""
  return jnp.exp(jnp.sum(jax.scipy.special.entr(jnp.exp(log_weights))))


def _share(which: jax.Array) -> jax.Array:
  """The share of True, 0 of none."""
  return jnp.sum(which.astype(jnp.float32)) / max(which.size, 1)


@dataclasses.dataclass(frozen=True)
class HeadReport:
  """One head.

  Attributes:
    rate: Its learning rate.
    weight: Its posterior weight; the weights of all heads sum to 1. (The optimizer's
      state does not hold the heads' cumulative log-likelihoods.)
    healthy: Whether it had not diverged in the last report.
    moving: Whether the updates move it; None without updates.
  """

  rate: float
  weight: float
  healthy: bool
  moving: bool | None


@dataclasses.dataclass(frozen=True)
class DecadeReport:
  """The units with rates in one decade, ``low <= rate < high``.

  Attributes:
    low: The lower end, a power of ten; 0 for units with rate 0.
    high: The upper end; 0 for units with rate 0.
    units: Number of units.
    moving: Number of units that the updates move; None without updates.
    share_of_squared_update: Their share of the squared norm of all units' updates,
      heads left out; None without updates, NaN if these are not finite.
    guarded: Number of units that the guard stopped at least once; None without a guard,
      or if it guards only a part of the units.
  """

  low: float
  high: float
  units: int
  moving: int | None
  share_of_squared_update: float | None
  guarded: int | None


@dataclasses.dataclass(frozen=True)
class Report:
  """What :func:`report` found, as plain Python numbers.

  ``str(report)`` is a table in plain text, ``rich.print(report)`` one in colour,
  ``report.plot("report.png")`` a picture, ``dataclasses.asdict(report)`` a record.

  Attributes:
    heads: The heads, slowest first; empty for a model without heads.
    decades: The units by the decade of their rates as drawn, slowest first.
    learning_rate: Suggestion for a later run with one learning rate: the geometric
      mean of the heads' rates, weighted by their posterior. None without heads.
    effective_heads: Exponential of the posterior's entropy, 1 to the number of heads;
      None without heads.
    observations: Number of mini-batches that the posterior has seen; None if its
      averaging keeps no count.
    all_heads_diverged_steps: In how many steps all heads had diverged; None without
      heads.
    nonfinite_body_steps: In how many steps the body's gradient held NaN or infinities;
      None without a :func:`drop_diverged`.
    nonfinite_head_steps: The same of the heads' gradients.
    skipped_steps: How many steps a :func:`skip_broken_batches` skipped; None without
      one.
  """

  heads: tuple[HeadReport, ...]
  decades: tuple[DecadeReport, ...]
  learning_rate: float | None
  effective_heads: float | None
  observations: int | None
  all_heads_diverged_steps: int | None
  nonfinite_body_steps: int | None
  nonfinite_head_steps: int | None
  skipped_steps: int | None

  @property
  def units(self) -> int:
    """Number of units."""
    return sum(decade.units for decade in self.decades)

  @property
  def units_moving(self) -> int | None:
    """Number of units that the updates move, None without updates."""
    return _total(decade.moving for decade in self.decades)

  @property
  def units_guarded(self) -> int | None:
    """Number of units that the guard stopped at least once, None if not known."""
    return _total(decade.guarded for decade in self.decades)

  @property
  def heads_diverged(self) -> int | None:
    """Number of heads that have diverged, None without heads."""
    return _total(int(not head.healthy) for head in self.heads)

  @property
  def heads_moving(self) -> int | None:
    """Number of heads that the updates move, None without heads or updates."""
    return _total(None if h.moving is None else int(h.moving) for h in self.heads)

  def __str__(self) -> str:
    return text(self)

  def table(self) -> Any:
    """Returns the report as a ``rich`` renderable, which ``rich.print`` shows.

    Raises:
      ImportError: If ``rich`` is not installed; ``str(report)`` does without.
    """
    return table(self)

  def __rich__(self) -> Any:
    return self.table()

  def plot(self, path: str | os.PathLike[str]) -> None:
    """Draws the posterior over rates, and the units by the decade of their rates.

    Args:
      path: The file; its ending tells the format: ``.png``, ``.pdf``, ``.svg``.

    Raises:
      ImportError: If ``matplotlib`` is not installed.
    """
    plot(self, path)


@_checks.refuses_removed
def report(
  opt_state: Any,
  params: Any,
  updates: Any = None,
  *,
  name: str | None = None,
  units: UnitOptions = UnitOptions(),
) -> Report:
  r"""Reports which rates move the network, and which head wins.

  **The heads' posterior** over rates, and from it a suggested learning rate
  :math:`\prod_j \eta_j^{a_j}` for a later run with one rate. It is a heuristic: it
  compares the heads' rates only on the output layer, above a body with all rates at
  once. Use it as the middle of a search, not as its result.

  **The units**, by the decade of their rates: how many there are, how many move, and
  their share of the update. :func:`scalars` says when a unit or a head *moves*. One
  step's ``updates`` show one step; a unit with ReLU may be silent in it by chance, and
  a diverged head stands. To see which units have moved at all, pass the change of a
  whole epoch: ``jax.tree.map(jnp.subtract, params, params_before)``.

  **What went wrong**: in how many steps gradients were not finite, all heads had
  diverged, or a broken batch was skipped.

  :func:`scalars` says how to tell whether Alrao works. If the fastest decades stand or
  are guarded, lower ``max_learning_rate``.

  Args:
    opt_state: State of an optimizer that holds one :func:`scale_by_unit_rates`, and one
      :func:`track_heads` if the model has heads. If a mask or a partition gives
      :func:`scale_by_unit_rates` only a part of the parameters, pass that part, as for
      :func:`scalars`.
    params: The parameters.
    updates: A tree like ``params``, what ``optimizer.update`` returned or a difference
      of parameters. Without it the report does not say what moves.
    name: Which heads, if the model has several MultiHeads; see :func:`log_weights`.
    units: How the units are read, as given to the optimizer.

  Returns:
    The :class:`Report`.

  Raises:
    TypeError: If called while JAX traces; :func:`scalars` is for that.
    ValueError: As :func:`unit_rates` and :func:`log_weights`; if ``updates`` are of
      other parameters; if ``opt_state`` holds several seeds, or a posterior over heads
      that are not among ``params``.

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
  rates = read_rates(call, opt_state, params, units)
  ladder, rates = (np.asarray(each, np.float64) for each in rates)
  motion = None
  if updates is not None:
    motion = read_motion(call, opt_state, params, updates, units)
    motion = jax.device_get(motion)
  decades = _decades(rates, motion, read_guarded(opt_state, params, units))
  counts = {name: int(count) for name, count in read_counts(opt_state).items()}
  counted = {
    name: counts.get(name)
    for name in ("nonfinite_body_steps", "nonfinite_head_steps", "skipped_steps")
  }
  if not posteriors(call, opt_state):
    return Report((), decades, None, None, None, None, **counted)

  log_a = log_weights(opt_state, name)
  weights = np.exp(np.asarray(log_a, np.float64))
  if ladder.shape != weights.shape:
    raise ValueError(
      f"{call[:-1]}opt_state=...) has a posterior over {weights.size} heads, but rates "
      f"for {ladder.size} heads among params. Pass the state and the params of the "
      "scale_by_unit_rates with the heads' rates."
    )
  layers = tracked_heads(opt_state)
  if None not in layers:
    name = _tree.match_layer("report(name=...)", name, map(str, layers))
  tracked = layers[name]
  each = tuple(
    HeadReport(
      float(ladder[j]),
      float(weights[j]),
      not tracked.diverged[j],
      None if motion is None else bool(motion.heads_moving[j]),
    )
    for j in range(len(weights))
  )
  seen = getattr(tracked.averaging, "observations", None)
  return Report(
    each,
    decades,
    learning_rate=float(np.exp(weights @ np.log(ladder) / weights.sum())),
    effective_heads=float(effective_heads(log_a)),
    observations=None if seen is None else int(seen),
    all_heads_diverged_steps=int(tracked.all_diverged_steps),
    **counted,
  )


def _decades(rates, motion, guarded) -> tuple[DecadeReport, ...]:
  """Sorts the units by the decades of their rates, empty decades between included."""
  drawn = rates > 0
  # Rates are rounded: 1e-05 in float32 may be below 1e-05.
  exponents = np.floor(np.log10(np.where(drawn, rates, 1.0)) + 1e-6).astype(int)
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
      None if motion is None else int(motion.moving[which].sum()),
      share,
      None if guarded is None else int(guarded[which].sum()),
    )

  found = [] if drawn.all() else [decade(0.0, 0.0, ~drawn)]
  if drawn.any():
    first, last = exponents[drawn].min(), exponents[drawn].max()
    for k in range(first, last + 1):
      low, high = float(f"1e{k}"), float(f"1e{k + 1}")
      found.append(decade(low, high, drawn & (exponents == k)))
  return tuple(found)


def _total(counts) -> int | None:
  """The sum; None if a count is unknown, or if there is no count."""
  counts = list(counts)
  return None if not counts or None in counts else sum(counts)


Rows = list[tuple[str, ...]]


def text(report: "Report") -> str:
  """The report in plain text."""
  tables = [rows for rows in _rows(report) if rows[1:]]
  parts = ["\n".join(columns(rows, right=range(len(rows[0])))) for rows in tables]
  return "\n\n".join([*parts, _summary(report)])


def table(report: "Report") -> Any:
  """The report as a rich renderable, the best head in colour."""
  call, instead = "Report.table()", "str(report) does without it."
  console = optional(call, "rich.console", instead)
  tables = optional(call, "rich.table", instead)
  best = max((head.weight for head in report.heads), default=0.0)
  wins = [head.weight == best for head in report.heads]
  heads, units = _rows(report)
  parts = []
  for title, rows, bold in (
    ("Heads", heads, wins),
    ("Units", units, [False] * len(report.decades)),
  ):
    drawn = tables.Table(title=title, title_justify="left", title_style="bold")
    for name in rows[0]:
      drawn.add_column(name, justify="right")
    for row, is_best in zip(rows[1:], bold, strict=True):
      drawn.add_row(*row, style="bold green" if is_best else None)
    if bold:
      parts.append(drawn)
  return console.Group(*parts, _summary(report))


def _rows(report: "Report") -> tuple[Rows, Rows]:
  """The cells of the tables of heads and of units, with a first row of names."""
  heads = [("rate", "weight", "healthy", "moving")] + [
    (f"{h.rate:.2g}", f"{h.weight:.3f}", _cell(h.healthy), _cell(h.moving))
    for h in report.heads
  ]
  units = [("rates", "units", "moving", "share of squared update", "guarded")] + [
    (
      f"{d.low:.0e} to {d.high:.0e}" if d.low else "0",
      str(d.units),
      _cell(d.moving),
      "-" if d.share_of_squared_update is None else f"{d.share_of_squared_update:.1%}",
      _cell(d.guarded),
    )
    for d in report.decades
  ]
  return heads, units


def _summary(report: "Report") -> str:
  lines = []
  if report.heads:
    seen = "" if report.observations is None else f" after {report.observations} steps"
    lines.append(
      f"{report.effective_heads:.1f} of {len(report.heads)} heads in effect{seen}"
      + f", {report.heads_diverged} diverged."
    )
    lines.append(f"Suggested learning rate: {report.learning_rate:.2g} (a heuristic).")
  counts = [f"{report.units} units"]
  if report.units_moving is not None:
    counts.append(f"{report.units_moving} moving")
  if report.units_guarded is not None:
    counts.append(f"{report.units_guarded} guarded")
  lines.append(", ".join(counts) + ".")
  if report.nonfinite_body_steps or report.nonfinite_head_steps:
    lines.append(
      f"Gradients were not finite in {report.nonfinite_body_steps} steps of the body, "
      f"{report.nonfinite_head_steps} of the heads."
    )
  if report.skipped_steps:
    lines.append(f"{report.skipped_steps} steps skipped: their batches looked broken.")
  if report.all_heads_diverged_steps:
    lines.append(_all_diverged(report))
  return "\n".join(lines)


def _all_diverged(report: "Report") -> str:
  """What the report says about a run in which all heads had diverged for a while."""
  steps = f"{report.all_heads_diverged_steps} steps"
  if report.heads_diverged != len(report.heads):
    return f"All heads had diverged in {steps}."
  remedy = "lower max_learning_rate"
  if report.units_guarded is None:
    remedy = f"write guard=alrao_jax.guard(), or {remedy}"
  return (
    f"All heads have diverged, in {steps} so far: the network learns nothing any more. "
    f"Start again: {remedy}."
  )


def _cell(value: bool | int | None) -> str:
  if value is None:
    return "-"
  return ("no", "yes")[value] if isinstance(value, bool) else str(value)


# Okabe and Ito's colours, which everybody can tell apart.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "0.85"


def plot(report: "Report", path: str | os.PathLike[str]) -> None:
  """Draws a report into a file: its heads, its units, or both."""
  module = optional(
    "Report.plot()", "matplotlib.figure", "str(report) does without it."
  )
  columns = 2 if report.heads else 1
  # No pyplot: its global state, and the choice of a screen, are the user's.
  figure = module.Figure(figsize=(4.6 * columns, 3.4), layout="constrained")
  axes = figure.subplots(1, columns, squeeze=False)[0]
  if report.heads:
    _draw_heads(axes[0], report)
  _draw_units(axes[-1], report)
  for each in axes:
    each.set_xlabel("learning rate")
    each.spines[["top", "right"]].set_visible(False)
    each.tick_params(labelsize=8)
    each.legend(fontsize=8, frameon=False)
  figure.savefig(path, dpi=200)


def _draw_heads(axes: Any, report: "Report") -> None:
  """The posterior over the heads' rates, and the suggested rate."""
  places = [math.log10(head.rate) for head in report.heads]
  gap = min((abs(b - a) for a, b in zip(places, places[1:], strict=False)), default=1.0)
  axes.bar(
    places,
    [head.weight for head in report.heads],
    width=0.8 * (gap or 1.0),
    color=BLUE,
    label="posterior",
  )
  diverged = [x for x, h in zip(places, report.heads, strict=True) if not h.healthy]
  if diverged:
    # Just above the axis, since the bar of a diverged head has no height.
    axes.plot(
      diverged,
      [0.02] * len(diverged),
      "x",
      color="black",
      markersize=5,
      label="diverged head",
    )
  rate = report.learning_rate or report.heads[0].rate
  axes.axvline(
    math.log10(rate),
    color=ORANGE,
    linestyle="--",
    linewidth=1.5,
    label=f"suggested: {rate:.2g}",
  )
  axes.set_ylim(0, 1.05 * max(0.5, *(head.weight for head in report.heads)))
  axes.set_ylabel("posterior weight")
  axes.set_title("Heads", loc="left", fontsize=10, fontweight="bold")
  _decade_ticks(axes, min(places), max(places))  # rates may have been written in


def _draw_units(axes: Any, report: "Report") -> None:
  """Shares of units, of moving ones and of the update, by decade."""
  decades = [decade for decade in report.decades if decade.low > 0]
  places = [math.log10(decade.low) + 0.5 for decade in decades]
  total = max(report.units, 1)
  knows = bool(decades) and decades[0].moving is not None
  left = [x - 0.21 for x in places] if knows else places
  width = 0.4 if knows else 0.8
  axes.bar(
    left,
    [decade.units / total for decade in decades],
    width=width,
    color=GREY,
    label="units" if not knows else "units, standing",
  )
  if knows:
    moving = [(decade.moving or 0) / total for decade in decades]
    axes.bar(left, moving, width=width, color=BLUE, label="units, moving")
    shares = [decade.share_of_squared_update or 0.0 for decade in decades]
    shares = [share if math.isfinite(share) else 0.0 for share in shares]
    axes.bar(
      [x + 0.21 for x in places],
      shares,
      width=width,
      color=ORANGE,
      label="share of squared update",
    )
  if report.units_guarded:
    guarded = [(decade.guarded or 0) / total for decade in decades]
    axes.bar(
      left,
      guarded,
      width=width,
      fill=False,
      edgecolor="black",
      hatch="////",
      linewidth=0.6,
      label="units, guarded",
    )
  axes.set_ylim(0, 1.15 * axes.get_ylim()[1])  # room for the legend
  axes.set_ylabel("share of all")
  axes.set_title("Units by rate", loc="left", fontsize=10, fontweight="bold")
  if places:
    _decade_ticks(axes, places[0] - 0.5, places[-1] + 0.5)


def _decade_ticks(axes: Any, first: float, last: float) -> None:
  """Labels the decades of an axis of decimal logarithms."""
  exponents = range(math.floor(first + 1e-3), math.ceil(last - 1e-3) + 1)
  step = math.ceil(len(exponents) / 9)
  axes.set_xticks(exponents[::step], [f"$10^{{{k}}}$" for k in exponents[::step]])
