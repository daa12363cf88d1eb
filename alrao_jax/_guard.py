"""A guard: units that explode are stopped and slowed, broken batches are skipped."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _checks, _tree
from ._tree import state_dtype
from ._unit_map import unit_map
from ._units import UnitOptions, check_options

# A broken batch's gradients are above this many times their recent largest. Those of
# ordinary batches differ by a factor of ten, those of inputs times 1e4 by 1e3 and more.
_SURGE = 100.0

# The share of a largest gradient that is left a step later: 460 steps leave 1 %.
_MEMORY = 0.99


class Guard(NamedTuple):
  """When a unit is stopped, and how; made by :func:`guard`, which checks arguments.

  Attributes:
    limit: The largest step of a unit, as a multiple of the norm of its weights.
    slowdown: The factor of a stopped unit's rate.
  """

  limit: float
  slowdown: float


def guard(limit: float = 1.0, slowdown: float = 0.1) -> Guard:
  r"""How :func:`guard_units` and ``alrao(..., guard=alrao.guard())`` guard the units.

  An update of a unit is too large if

  .. math:: \|\Delta w\| > \mathrm{limit} \cdot \max(\|w\|, 1)

  with the norms over all of the unit's weights and its bias. The 1 lets weights that
  start at 0 move; the norm of a Dense or Conv unit's weights is about 1 under Flax's
  default initialiser (``lecun_normal``), whatever its fan-in.
  ``python -m benchmarks study guard`` counts how many runs of a small convolutional
  network end finite and learn, with and without it.

  Args:
    limit: Positive. A step longer than the weights themselves is no longer a descent.
    slowdown: In ``[0, 1]``. 0 freezes a unit forever at its first trip.

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
      ``init``, without the heads.
    trips: How often each unit was stopped, and so slowed: int32, shape
      ``(max(num_units, 1),)``, with the groups of units in the order of their names.
      Heads have no entries. Without units the vector holds one unused 0, since not
      every checkpoint can hold an empty array.
  """

  fingerprint: jax.Array
  trips: jax.Array


@_checks.refuses_removed
def guard_units(
  settings: Guard | None = None, *, units: UnitOptions = UnitOptions()
) -> optax.GradientTransformationExtraArgs:
  r"""Stops the updates of units that are about to explode, and slows just those units.

  Use it for networks without normalisation and for wide intervals. There a unit that is
  far too fast makes all later activations overflow, and the gradient of the whole
  network becomes useless forever. The step before that is large but finite. The guard
  stops this step before it reaches the weights. Let :math:`k` be the number of times
  that a unit was stopped so far. Its update becomes

  .. math::
    \Delta w' = \mathrm{slowdown}^k \Delta w, \qquad
    \Delta w \leftarrow \begin{cases}
      \Delta w' & \text{if } \|\Delta w'\| \le \mathrm{limit} \max(\|w\|, 1) \\
      0 \text{ and } k \leftarrow k + 1 & \text{otherwise}
    \end{cases}

  So a unit that is too fast finds a slower rate that works. No rate rises again: one
  broken batch slows every unit that it hits for the rest of the training, and two such
  batches slow it by ``slowdown`` squared. :func:`skip_broken_batches` around the chain
  prevents that; ``alrao(..., guard=...)`` adds it. Finite weights stay finite. An
  update that holds NaN is dropped, but slows no unit, since it doesn't tell which one
  is at fault. Units that were never stopped get their updates unchanged to the last bit
  (in one compiled program, XLA may round their sum with the weights differently). So do
  heads: :func:`track_heads` handles diverged heads.

  Put it after :func:`scale_by_unit_rates`, and after everything else that makes updates
  larger, such as a schedule. Put :func:`drop_diverged` first, so that the state of a
  base stays finite too::

    alrao.skip_broken_batches(
      optax.chain(
        alrao.drop_diverged(),
        optax.trace(0.9),
        alrao.scale_by_unit_rates(key),
        alrao.guard_units(),
        alrao.track_heads(),
      )
    )

  In contrast, ``optax.apply_if_finite`` stops all units if one is not finite, and
  ``optax.adaptive_grad_clip`` shortens a unit's step but keeps its rate.

  Args:
    settings: What :func:`guard` returned; its defaults if None.
    units: How the units are read, as given to :func:`scale_by_unit_rates`.

  Returns:
    The transformation. Updates keep their sign and dtype; its ``update`` needs
    ``params``. Its state holds one int32 a unit.

  Raises:
    TypeError: If ``settings`` is no :class:`Guard`, ``units`` no :class:`UnitOptions`.
    ValueError: At ``update``, if ``params`` are missing or not those of ``init``; at
      ``init`` as :func:`unit_specs`.

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
  check_options("guard_units()", units)

  def init_fn(params):
    body = unit_map(params, units).body
    fingerprint = jnp.asarray(body.fingerprint, jnp.uint32)
    return GuardUnitsState(fingerprint, jnp.zeros([max(body.num_units, 1)], jnp.int32))

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    _tree.check_state("guard_units().update()", state, GuardUnitsState)
    if params is None:
      raise ValueError(
        "guard_units().update() needs params, to compare updates with: write "
        "optimizer.update(grads, opt_state, params)."
      )
    network = unit_map(params, units)
    network.body.check("guard_units().update()", state.fingerprint, state.trips)
    dtype = state_dtype(params)
    slower = jnp.asarray(settings.slowdown, dtype) ** state.trips.astype(dtype)
    updates = network.scale(updates, slower)
    length, _ = network.body.norms(updates, dtype)
    weights, _ = network.body.norms(params, dtype)
    fits = length <= settings.limit * jnp.maximum(weights, 1)
    # A bound on the entries of the sum of both, which must be finite.
    fits &= length + weights <= _largest(params)
    trips = state.trips + (~fits & ~jnp.isnan(length)).astype(jnp.int32)
    return network.keep(updates, fits), state._replace(trips=trips)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class SkipBrokenBatchesState(NamedTuple):
  """State of :func:`skip_broken_batches`.

  Attributes:
    fingerprint: A uint32 scalar that tells whether parameters are read as they were at
      ``init``.
    largest_heads: The recent largest norm of each head's gradient, shape
      ``(max(num_heads, 1),)``, float32 or float64; 0 for a head without any yet.
    largest_units: The same for each unit, shape ``(max(num_units, 1),)``, with the
      groups of units in the order of their names.
    suspect: Bool scalar, whether the last step's batch looked broken.
    skipped_steps: int32 scalar, the number of steps that were skipped.
    inner: State of the transformation within.
  """

  fingerprint: jax.Array
  largest_heads: jax.Array
  largest_units: jax.Array
  suspect: jax.Array
  skipped_steps: jax.Array
  inner: Any


@_checks.refuses_removed
def skip_broken_batches(
  inner: optax.GradientTransformation, *, units: UnitOptions = UnitOptions()
) -> optax.GradientTransformationExtraArgs:
  r"""Skips the step of a batch that upsets most units, such as one not normalised.

  One huge but finite batch does lasting harm: heads diverge, momenta and averages of
  squares keep its gradient for long, and :func:`guard_units` slows units that are not
  at fault. A batch looks broken if

  - more than half of the units with a gradient, or of the heads with one, have a
    gradient that is not finite or above 100 times their recent largest,
    :math:`r \leftarrow \max(\|g\|, 0.99 r)`; or
  - a :func:`guard_units` in ``inner`` stops more than half of the units.

  Then the step changes nothing, neither the parameters nor the state of ``inner``:
  momenta, counts, the heads' posterior and the guard's slowdowns stay as they were.
  This happens only once in a row. The next step is made, whatever its batch looks like:
  then the units are at fault, or the task has changed.

  Put it around the whole optimizer, with everything that keeps an average of
  parameters. ``alrao`` and ``schedule_free_alrao`` do so if they are given
  ``guard=alrao.guard()``.

  Args:
    inner: The optimizer. Its ``update`` gets all arguments.
    units: How the units are read, as given to :func:`scale_by_unit_rates`.

  Returns:
    The transformation. Updates keep their sign and dtype. Its state holds one number a
    unit, and the state of ``inner``.

  Raises:
    TypeError: If ``units`` is no :class:`UnitOptions`.
    ValueError: At ``init`` as :func:`unit_specs`; at ``update``, if the parameters are
      not those of ``init``.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp, optax
    >>> params = {"kernel": jnp.ones((3, 2))}
    >>> optimizer = alrao.skip_broken_batches(optax.sgd(0.1))
    >>> state = optimizer.init(params)
    >>> for size in (1.0, 1e9):
    ...   grads = {"kernel": jnp.full((3, 2), size)}
    ...   updates, state = optimizer.update(grads, state, params)
    >>> float(abs(updates["kernel"]).max()), int(state.skipped_steps)
    (0.0, 1)
  """
  inner = optax.with_extra_args_support(inner)
  call = "skip_broken_batches()"
  check_options(call, units)

  def init_fn(params):
    network, dtype = unit_map(params, units), state_dtype(params)
    return SkipBrokenBatchesState(
      fingerprint=jnp.asarray(network.fingerprint, jnp.uint32),
      largest_heads=jnp.zeros([max(network.num_heads, 1)], dtype),
      largest_units=jnp.zeros([max(network.num_units, 1)], dtype),
      suspect=jnp.zeros([], bool),
      skipped_steps=jnp.zeros([], jnp.int32),
      inner=inner.init(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    network = unit_map(updates if params is None else params, units)
    largest = (state.largest_units, state.largest_heads)
    network.check(f"{call}.update()", state.fingerprint, *largest)
    new_updates, new_inner = inner.update(updates, state.inner, params, **extra_args)
    dtype = state.largest_units.dtype
    lengths = network.norms(updates, dtype)
    broken = jnp.zeros([], bool)
    for length, most in zip(lengths, largest, strict=True):
      # Don't count what has no gradient: silent units, diverged heads, and the units
      # behind right answers where the softmax of a huge batch is 0 or 1.
      known = (most > 0) & (length != 0)
      surges = known & ~(length <= _SURGE * most)  # a comparison that is False for NaN
      broken |= 2 * jnp.sum(surges) > jnp.sum(known)
    stopped, guarded = _stopped(state.inner, new_inner)
    broken |= 2 * stopped > guarded
    skip = broken & ~state.suspect
    kept = functools.partial(jnp.where, skip)

    def grown(length, most):
      seen = jnp.where(jnp.isfinite(length), length, jnp.zeros_like(length))
      return kept(most, jnp.maximum(seen, jnp.asarray(_MEMORY, dtype) * most))

    of_units, of_heads = map(grown, lengths, largest)
    return (
      jax.tree.map(lambda u: kept(jnp.zeros_like(u), u), new_updates),
      SkipBrokenBatchesState(
        fingerprint=state.fingerprint,
        largest_heads=of_heads,
        largest_units=of_units,
        suspect=broken,
        skipped_steps=state.skipped_steps + skip.astype(jnp.int32),
        inner=jax.tree.map(kept, state.inner, new_inner),
      ),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _stopped(old: Any, new: Any) -> tuple[jax.Array | int, int]:
  """How many units the guards stopped in a step, and how many they guard."""
  pairs = zip(
    _tree.find_states(old, GuardUnitsState),
    _tree.find_states(new, GuardUnitsState),
    strict=True,
  )
  counts = [(jnp.sum(b.trips > a.trips), a.trips.size) for a, b in pairs]
  return sum(stopped for stopped, _ in counts), sum(size for _, size in counts)


def keep_finite(new: Any, old: Any) -> Any:
  """Keeps old statistics, feature by feature, where the new ones are not finite.

  Use it for what a forward pass averages over batches, as batch normalisation does. One
  batch with NaN or infinities leaves the parameters and the optimizer's state finite,
  and training goes on. But an average that was NaN once stays NaN, and so does every
  evaluation. Write, in linen and in nnx::

    batch_stats = alrao.keep_finite(updated["batch_stats"], batch_stats)

    before = nnx.as_pure(nnx.state(model, nnx.BatchStat))     # before the forward pass
    nnx.update(model, alrao.keep_finite(nnx.state(model, nnx.BatchStat), before))

  If an entry is not finite, the entries at its place stay as they were in all arrays of
  the same module and shape, so a feature keeps its mean together with its variance. All
  other features, and those of other heads, get their new statistics.

  Args:
    new: Statistics after the forward pass: any tree of arrays.
    old: Statistics before it, with the same paths and shapes.

  Returns:
    A tree like ``new`` with its boxes. Arrays of integers and random keys are those of
    ``new``.

  Raises:
    ValueError: If paths or shapes differ, or ``old`` holds the ``nnx.Variable``
      objects of ``new``, which have the new values already.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> old = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
    >>> new = {"mean": jnp.array([0.5, 1e30]), "var": jnp.array([2.0, jnp.inf])}
    >>> alrao.keep_finite(new, old)["mean"].tolist()
    [0.5, 0.0]
  """
  found, treedef = _tree.flatten_with_paths(new)
  before = dict(_tree.flatten_with_paths(old)[0])
  shapes = {path: jnp.shape(leaf) for path, leaf in found}
  if shapes != (others := {path: jnp.shape(leaf) for path, leaf in before.items()}):
    differ = sorted(path for path, _ in shapes.items() ^ others.items())
    raise ValueError(
      "keep_finite(new, old) must be two trees with the same paths and shapes, got "
      f"different ones for {', '.join(dict.fromkeys(differ))}."
    )
  is_variable = lambda node: hasattr(node, "get_value")  # noqa: E731
  variables = {id(x) for x in jax.tree.leaves(old, is_leaf=is_variable)}
  for node in filter(is_variable, jax.tree.leaves(new, is_leaf=is_variable)):
    if id(node) in variables:
      raise ValueError(
        "keep_finite(old=...) must hold the values from before the forward pass, got "
        "the model's own Variables, which have changed with it. Write before = "
        "nnx.as_pure(nnx.state(model, nnx.BatchStat)) before the pass."
      )

  broken: dict[Any, jax.Array] = {}
  module = {path: (path.rpartition("/")[0], shapes[path]) for path in shapes}
  for path, leaf in found:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      bad = ~jnp.isfinite(leaf)
      broken[module[path]] = broken.get(module[path], jnp.zeros_like(bad)) | bad

  def keep(path, leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
      return leaf
    return jnp.where(broken[module[path]], before[path].astype(leaf.dtype), leaf)

  return jax.tree.unflatten(treedef, [keep(path, leaf) for path, leaf in found])


def _largest(params: Any) -> float:
  """The largest number that every leaf's dtype can hold."""
  leaves = jax.tree.leaves(params)
  return min((float(jnp.finfo(leaf.dtype).max) for leaf in leaves), default=0.0)
