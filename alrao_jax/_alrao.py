"""The papers' Alrao and schedule-free Alrao, as chains of the library's parts."""

import contextlib
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks, _tree
from ._averaging import Averaging, switch
from ._guard import Guard, guard_units, skip_broken_batches
from ._heads import TrackHeadsState, track_heads
from ._rates import LogUniform, ScaleByUnitRatesState, scale_by_unit_rates
from ._tree import by_parts, find_state, find_states
from ._units import UnitOptions, check_options


@_checks.refuses_removed
def alrao(
  key: jax.Array,
  base: optax.GradientTransformation | None = None,
  min_learning_rate: float = 1e-5,
  max_learning_rate: float = 10.0,
  *,
  schedule: optax.ScalarOrSchedule | None = None,
  weight_decay: optax.ScalarOrSchedule | None = None,
  weight_decay_mask: Any = None,
  averaging: Averaging = switch(),
  distribution: Any = None,
  units: UnitOptions = UnitOptions(),
  heads: bool = True,
  single_head_learning_rate: float | None = None,
  guard: Guard | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""All learning rates at once: an optimizer with no learning rate to choose.

  Every unit of the network trains with a rate of its own, drawn log-uniformly from a
  wide interval. The output layer has ``num_heads`` copies (a
  :class:`~alrao_jax.linen.MultiHead`), each with a fixed rate. The optimizer keeps a
  posterior :math:`a` over them, which weighs their predictions. It is a chain of public
  parts, which you may rebuild as you like::

    optax.chain(
      alrao.drop_diverged(),
      alrao.in_float32(optax.chain(
        base,                                          # optax.identity(): plain SGD
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        alrao.scale_by_unit_rates(key, min_learning_rate, max_learning_rate),
        optax.scale_by_schedule(schedule))),
      alrao.guard_units(guard),
      alrao.track_heads(averaging))

  With a ``guard``, :func:`skip_broken_batches` wraps this chain.

  The papers use the interval ``[1e-5, 10]`` (the default) for plain SGD, and
  ``[1e-6, 1]`` for ``optax.scale_by_adam()``. A base with momentum 0.9 makes steps 10
  times as large, as everywhere. The papers find Alrao less reliable on Adam than on
  SGD.

  Args:
    key: JAX random key that draws the rates. With :func:`optax.inject_hyperparams`,
      declare it a constant, or it becomes part of the state:
      ``optax.inject_hyperparams(alrao.alrao, static_args=("key",))(key)``.
    base: What to do with gradients before the rates: ``optax.trace(0.9)`` for momentum,
      ``optax.scale_by_adam()``, a chain, ...; plain SGD by default. It must have no
      learning rate of its own. Put a part that mixes the entries of its tree (a global
      norm) into :func:`per_head`. The base sees half precision as float32, so its
      averages are float32 too.
    min_learning_rate: Positive; the lower bound of the interval.
    max_learning_rate: At least ``min_learning_rate``; the upper bound.
    schedule: A number, or a function of the step count, that multiplies all rates.
    weight_decay: Decoupled as in :func:`optax.adamw`: a unit's weights shrink by its
      own rate times ``weight_decay``. For the coupled kind put
      ``optax.add_decayed_weights`` first in ``base``. A number or a schedule.
    weight_decay_mask: The ``mask`` of :func:`optax.add_decayed_weights`.
    averaging: How the posteriors learn, one for each MultiHead; see
      :func:`track_heads`.
    distribution: See :func:`scale_by_unit_rates`.
    units: How the units are read; see :class:`UnitOptions`.
    heads: ``False`` says that the model has an ordinary output layer and no MultiHead.
      Its units then draw rates like all others, and ``update`` takes no
      ``head_log_likelihoods``.
    single_head_learning_rate: See :func:`scale_by_unit_rates`.
    guard: ``alrao.guard()`` stops and slows units that are about to explode, in
      networks without normalisation and for wide intervals, and skips broken batches;
      see :func:`guard_units` and :func:`skip_broken_batches`.

  Returns:
    The optimizer; its updates descend. ``update(grads, opt_state, params,
    head_log_likelihoods=...)`` needs the log-likelihoods that the losses of this
    library return in their :class:`MixtureInfo`. For complex parameters, conjugate what
    :func:`jax.grad` returns, as for optax: ``jax.tree.map(jnp.conj, grads)``.

  Raises:
    TypeError: If ``key`` is no random key, ``base`` no gradient transformation, or
      ``guard`` no :class:`Guard`.
    ValueError: If not ``0 < min_learning_rate <= max_learning_rate < inf``; if
      ``base`` has a learning rate already; at ``init``, if the model has no MultiHead,
      or if parameters are complex and ``base`` loses the phase of gradients.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp, optax
    >>> params = {"hidden": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
    ...           "out": {"alrao_heads": {"kernel": jnp.ones((10, 3, 2))}}}
    >>> optimizer = alrao.alrao(jax.random.key(0))
    >>> updates, opt_state = optimizer.update(
    ...   params, optimizer.init(params), params, head_log_likelihoods=jnp.zeros(10))

  Reference:
    Blier, Wolinski, Ollivier, `Learning with Random Learning Rates
    <https://arxiv.org/abs/1810.01322>`_, Algorithm 1.
  """
  _checks.check_key("alrao()", key)
  _checks.check_interval("alrao()", min_learning_rate, max_learning_rate)
  if guard is not None and not isinstance(guard, Guard):
    raise TypeError(
      f"alrao(guard=...) must be what alrao_jax.guard(...) returns, got {guard!r}. "
      "Write alrao(..., guard=alrao_jax.guard())."
    )
  base = optax.identity() if base is None else base
  _check_base(base)
  check_options("alrao()", units)
  _check_flag("alrao()", heads)
  wide = [base]
  if weight_decay is not None:
    wide.append(_add_decayed_weights("alrao()", weight_decay, weight_decay_mask))
  wide.append(
    scale_by_unit_rates(
      key,
      min_learning_rate,
      max_learning_rate,
      distribution=distribution,
      units=units,
      single_head_learning_rate=single_head_learning_rate,
    )
  )
  if schedule is not None:
    if callable(schedule):
      wide.append(optax.scale_by_schedule(schedule))
    else:
      _checks.check_non_negative("alrao()", "schedule", schedule)
      wide.append(optax.scale_by_schedule(lambda _: schedule))  # keeps the dtype
  # The next parts must see the parameters' own dtype, to know what it can't hold.
  parts = [drop_diverged(), in_float32(optax.chain(*wide))]
  if guard is not None:
    parts.append(guard_units(guard, units=units))
  if heads:
    parts.append(track_heads(averaging))
  tx = optax.chain(*parts)
  if guard is not None:
    tx = skip_broken_batches(tx, units=units)
  if not heads:
    tx = _without_heads("alrao()", tx)
  tx = _tree.checked("alrao()", tx, ScaleByUnitRatesState)

  def init_fn(params):
    if _has_complex(params):
      _check_phase(base)
    return tx.init(params)

  return optax.GradientTransformationExtraArgs(init_fn, tx.update)


def _check_flag(call, heads):
  if not isinstance(heads, bool):
    raise TypeError(
      f"{call[:-1]}heads=...) must be True or False, got {heads!r}: write heads=False "
      "for a model without MultiHead. The heads' parameters are those below the key "
      "'alrao_heads'."
    )


def _without_heads(call, tx):
  """The optimizer of a model without MultiHead; its ``init`` refuses one."""

  def init_fn(params):
    if layers := _tree.layers_of(call, params):
      raise ValueError(
        f"{call[:-1]}heads=False) is for a model without MultiHead, got one at "
        f"{next(iter(layers))!r}: leave heads= out."
      )
    return tx.init(params)

  return optax.GradientTransformationExtraArgs(init_fn, tx.update)


class DropDivergedState(NamedTuple):
  """State of :func:`drop_diverged`.

  Attributes:
    nonfinite_body_steps: int32 scalar, the number of steps with NaN or an infinity in
      the gradient of a body parameter.
    nonfinite_head_steps: The same for the heads' parameters.
      (:class:`~alrao_jax.linen.MultiHead` keeps the gradient of a head without a part
      in the mixture finite.)
  """

  nonfinite_body_steps: jax.Array
  nonfinite_head_steps: jax.Array


@_checks.refuses_removed
def drop_diverged() -> optax.GradientTransformation:
  """Zeroes gradient entries that a base's state would keep forever, and counts steps.

  These are NaN, infinities, and entries beyond 1e18, whose squares overflow float32:
  Adam would sum them and never move that weight again. This is the first part of
  :func:`alrao`, and should be the first part of your own chain: the gradient of a head
  with a part in the mixture may be non-finite, so that loss scaling sees it.
  :func:`scalars` shows in how many steps the gradient was not finite.

  Returns:
    The transformation. Updates keep their sign. Steps are counted for the body and for
    the heads.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> grads = jnp.array([1.0, jnp.nan, 1e20])
    >>> dropping = alrao.drop_diverged()
    >>> updates, state = dropping.update(grads, dropping.init(grads))
    >>> print(updates, state.nonfinite_body_steps)
    [1. 0. 0.] 1
  """

  def drop(g):
    return jnp.where(_is_usable(g), g, jnp.zeros_like(g))

  def init_fn(params):
    del params
    return DropDivergedState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

  def update_fn(updates, state, params=None):
    del params
    _tree.check_state("drop_diverged().update()", state, DropDivergedState)
    leaves: dict[bool, list[jax.Array]] = {False: [], True: []}
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
      leaves[_tree.head_name(_tree.path_of(path)) is not None].append(leaf)

    def count(steps, of):
      return jnp.where(_holds_nonfinite(of), optax.safe_increment(steps), steps)

    state = DropDivergedState(
      count(state.nonfinite_body_steps, leaves[False]),
      count(state.nonfinite_head_steps, leaves[True]),
    )
    return jax.tree.map(drop, updates), state

  return optax.GradientTransformation(init_fn, update_fn)


def _is_usable(g: jax.Array) -> jax.Array:
  """Which entries are finite, and have a square in float32."""
  return jnp.abs(g) <= min(1e18, float(jnp.finfo(g.dtype).max))


_SMALL = 4096  # entries


def _holds_nonfinite(leaves: list[jax.Array]) -> jax.Array:
  """Whether there is a NaN or an infinity in any leaf, a bool scalar.

  A sum of zeros is NaN if there is. XLA makes it one kernel, also on a CPU, where
  ``isfinite(...).all()`` takes three, twice the time and six times the compilation.
  Small leaves of one shape are added up first: they share that kernel, and keep their
  sharding. (Large ones would have to wait for each other in memory.)
  """
  sums: dict[Any, jax.Array] = {}
  for i, leaf in enumerate(leaves):
    group = (leaf.shape, leaf.dtype) if leaf.size <= _SMALL else i
    zeros = leaf - leaf
    sums[group] = sums[group] + zeros if group in sums else zeros
  totals = [jnp.isnan(zeros.sum()) for zeros in sums.values()]
  return functools.reduce(operator.or_, totals, jnp.zeros([], bool))


def in_float32(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Shows a transformation half-precision gradients and parameters as float32.

  A base keeps its averages in the dtype of the parameters. In bfloat16 a decay of 0.999
  is 1, so an average of squares never falls; in float16 the square of 300 is infinite
  and an epsilon of 1e-8 is 0. :func:`alrao` wraps its base in this function; in your
  own chain, wrap everything from the base to the rates. Leave out what must know the
  parameters' own dtype: :func:`drop_diverged`, :func:`guard_units` and
  :func:`track_heads`. :func:`schedule_free_alrao` does all of this itself.

  Args:
    tx: The transformation, which may take extra arguments. Its own dtype options still
      hold, such as ``optax.scale_by_adam(mu_dtype=jnp.bfloat16)``.

  Returns:
    The transformation. Its state is that of ``tx`` for float32 parameters; its updates
    have the dtypes of the gradients. Leaves of float32, float64, complex or integer
    dtype pass unchanged; with complex ones, ``tx`` may promote dtypes.

  Raises:
    TypeError: If ``tx`` is no gradient transformation.

  Example:
    >>> import alrao_jax as alrao, jax, optax
    >>> optimizer = optax.chain(
    ...   alrao.drop_diverged(),
    ...   alrao.in_float32(optax.chain(
    ...     optax.scale_by_adam(), alrao.scale_by_unit_rates(jax.random.key(0)))),
    ...   alrao.track_heads())
  """
  if not isinstance(tx, optax.GradientTransformation):
    raise TypeError(
      "in_float32(tx) must be an optax gradient transformation, such as "
      f"optax.scale_by_adam(), got {tx!r}. For optax.MultiSteps, write "
      "in_float32(optax.MultiSteps(...).gradient_transformation())."
    )
  tx = optax.with_extra_args_support(tx)

  def init_fn(params):
    return tx.init(_widened(params))

  def update_fn(updates, state, params=None, **extra_args):
    # optax's averages of squares of complex gradients need implicit promotion, which
    # users may have forbidden.
    promotes = jax.numpy_dtype_promotion("standard")
    with promotes if _has_complex(updates) else contextlib.nullcontext():
      new_updates, new_state = tx.update(
        _widened(updates), state, _widened(params), **extra_args
      )
    return _with_dtypes_of(updates, new_updates), _with_dtypes_of(state, new_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_half(leaf):
  dtype = getattr(leaf, "dtype", np.dtype(object))
  return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4


def _has_complex(tree):
  dtypes = [leaf.dtype for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
  return any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes)


def _widened(tree):
  """The tree, with half precision as float32."""

  def widen(leaf):
    if not _is_half(leaf):
      return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf.update(dtype=jnp.float32)
    return leaf.astype(jnp.float32)

  return jax.tree.map(widen, tree)


def _with_dtypes_of(like, tree):
  """The tree in the dtypes of another one; integers stay as they are."""

  def cast(leaf, target):
    dtypes = [getattr(x, "dtype", np.dtype(object)) for x in (leaf, target)]
    for kind in (jnp.floating, jnp.complexfloating):
      if all(jnp.issubdtype(dtype, kind) for dtype in dtypes):
        return leaf.astype(target.dtype)
    return leaf

  return jax.tree.map(cast, tree, like)


def _add_decayed_weights(call: str, weight_decay: optax.ScalarOrSchedule, mask: Any):
  """:func:`optax.add_decayed_weights` for a number or a schedule of any dtype."""
  number: Any = weight_decay
  if not callable(weight_decay):
    _checks.check_non_negative(call, "weight_decay", weight_decay)
    number = float(weight_decay) if _checks.is_concrete(weight_decay) else weight_decay
  decay: Any = optax.add_decayed_weights(number, mask)

  def update_fn(updates, state, params=None):
    # An array of another dtype would promote the updates.
    with jax.numpy_dtype_promotion("standard"):
      new_updates, state = decay.update(updates, state, params)
    return _with_dtypes_of(updates, new_updates), state

  return optax.GradientTransformation(decay.init, update_fn)


def _check_base(base):
  if not isinstance(base, optax.GradientTransformation):
    raise TypeError(
      "alrao(base=...) must be an optax gradient transformation, such as "
      f"optax.trace(0.9) or optax.scale_by_adam(), got {base!r}."
    )

  # A learning rate flips the sign of the gradient. A step from each side of zero shows
  # it; a base that adds noise can't flip both.
  def turns(gradient: float) -> bool:
    tree = {"probe": jnp.full([], gradient)}
    updates: Any = base.update(tree, base.init(tree), tree)[0]
    # The sign bit: a warm-up's first learning rate is 0, and its update -0.
    return bool(np.signbit(updates["probe"]) != (gradient < 0))

  try:
    # Adam's own arithmetic needs implicit promotion, which users may have forbidden.
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
      turned = turns(1.0) and turns(-1.0)
  except Exception:  # noqa: BLE001 (a base may need other trees or further arguments)
    return
  if turned:
    raise ValueError(
      "alrao(base=...) must not have a learning rate of its own: its updates already "
      "descend. Write the part without it, such as optax.scale_by_adam() for "
      "optax.adam(1e-3), or optax.trace(0.9) for optax.sgd(1e-1, momentum=0.9)."
    )


def _check_phase(base):
  """Refuses a base that turns complex gradients."""
  try:
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
      # Gradients and parameters are both imaginary, so updates should be.
      imaginary = {"probe": jnp.full([2], 1j, jnp.complex64)}
      updates, state = imaginary, base.init(imaginary)
      for _ in range(3):  # some averages start at zero
        updates, state = base.update(imaginary, state, imaginary)
      update = np.abs(np.asarray(updates["probe"]))
      real = np.abs(np.real(updates["probe"]))
  except Exception:  # noqa: BLE001 (a base may need other trees or further arguments)
    return
  if (2 * real > update).all() and update.any():  # some noise is no turn
    raise ValueError(
      "alrao(base=...) must keep the phase of complex gradients, got a base that moves "
      "a complex parameter along the real axis for an imaginary gradient, as "
      "optax.scale_by_adadelta() does. Write another base, such as "
      "optax.scale_by_adam(), or make a parameter each of the real and the imaginary "
      "part."
    )


class GatherUnitsState(NamedTuple):
  """State of the units' rates in :func:`schedule_free_alrao`.

  Attributes:
    collapsed: A bool scalar: whether heads were removed since the last update. If so,
      the next update leaves the units' bounds where they are.
    interval: Shape ``(2,)``, both ends of the optimizer's interval at the last
      collapse, or at ``init`` if there was none.
    bounds: Shape ``(2,)``, the bounds of the units' rates at that time.
    drawn: Shape ``(2,)``, how far the posterior had moved both ends of the interval
      inward at that time, as shares of its width; 0 at ``init``.
    rates: State of :func:`scale_by_unit_rates`, with the units' present bounds.
  """

  collapsed: jax.Array
  interval: jax.Array
  bounds: jax.Array
  drawn: jax.Array
  rates: ScaleByUnitRatesState


class ScheduleFreeAlraoState(NamedTuple):
  """State of :func:`schedule_free_alrao`.

  Attributes:
    average: What :func:`eval_params` returns, a tree like the parameters in float32 or
      wider.
    z: The sum of all steps, a tree of the same kind, if a parameter is in half
      precision: rounded parameters don't tell it. A change of the parameters that is no
      step, such as a projection, leaves it alone. Else None.
    count: int32 scalar, the number of steps.
    inner: State of the chain whose steps are averaged.
  """

  average: Any
  z: Any
  count: jax.Array
  inner: Any


@_checks.refuses_removed
def schedule_free_alrao(
  key: jax.Array,
  min_learning_rate: float = 1e-4,
  max_learning_rate: float = 1e-1,
  *,
  narrowest: float = 0.1,
  interpolation: float = 0.8,
  power: float = 2.0,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: optax.ScalarOrSchedule | None = None,
  weight_decay_mask: Any = None,
  averaging: Averaging = switch(),
  units: UnitOptions = UnitOptions(),
  heads: bool = True,
  guard: Guard | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Alrao with a normalised base, rates that draw together, and averaged parameters.

  The model, with its :class:`~alrao_jax.linen.MultiHead`, and the training step are
  those of :func:`alrao`. Evaluate and export ``alrao.eval_params(opt_state, params)``
  instead of ``params``. It differs from the papers in three ways:

  - Gradients are divided by the root of their average squares, as in Adam, so that one
    interval suits most networks.
  - The heads' posterior tells which rates are good. The units' rates draw together
    around them. Let :math:`\mu` and :math:`\sigma` be the mean and the deviation of the
    heads' log-rates under the posterior, and :math:`\sigma_0` the deviation over the
    whole interval:

    .. math::
      \log \eta \leftarrow \mu + c\, (\log \eta - \mu), \qquad
      c = \operatorname{clip}(\sigma / \sigma_0, \text{narrowest}, 1)

    The heads keep their ladder, so the units' rates can follow the posterior. A
    :func:`collapse` leaves the rates where they are. With several heads left they
    follow the posterior from there; with one head they stay.
  - Schedule-free averaging: :math:`z` sums the steps, its average :math:`x` is what you
    evaluate, and gradients are taken between both, at the parameters :math:`y`. Let
    :math:`\beta` be the ``interpolation`` and :math:`\gamma` the ``power``:

    .. math::
      x_t = x_{t-1} + \tfrac{1 + \gamma}{t + \gamma} (z_t - x_{t-1}), \qquad
      y_t = (1 - \beta) z_t + \beta x_t

    No schedule needs to know when the training ends.

  The running statistics of batch normalisation are those of :math:`y`. Recompute them
  for :math:`x` with :func:`alrao_jax.linen.recompute_batch_stats`, or that of nnx.

  Args:
    key: JAX random key that draws the rates.
    min_learning_rate: Positive; the lower bound of the interval.
    max_learning_rate: At least ``min_learning_rate``; the upper bound.
    narrowest: Least width of the units' interval, as a share of the width at the start,
      in ``[0, 1]``. 1 leaves the rates as drawn.
    interpolation: In ``[0, 1)``; 0 takes gradients at :math:`z`, plain averaging.
    power: At least 0. In the average, the weight of step t grows as t to this power; 0
      is the mean of all steps.
    b2: In ``[0, 1)``; decay of the average of squared gradients.
    eps: At least 0; added to its root.
    weight_decay: See :func:`alrao`.
    weight_decay_mask: See :func:`alrao`.
    averaging: See :func:`alrao`. The units follow the mean of several posteriors.
      ``alrao.switch(likelihood_scale=10.0)`` takes each step's evidence tenfold.
    units: See :func:`alrao`.
    heads: See :func:`alrao`. With ``False`` the units' rates stay as drawn, since there
      is no posterior to follow.
    guard: See :func:`alrao`.

  Returns:
    The optimizer; its updates descend. ``update`` takes the same arguments as that of
    :func:`alrao`, with complex gradients conjugated. The state holds one average of
    the parameters, one of squares, and Alrao's state, all in float32 or wider.
    Parameters in half precision would lose the small steps of an average. For these
    the state also holds :math:`z`, one more copy, and the parameters are :math:`y`
    rounded.

  Raises:
    TypeError: If ``key`` is no random key; at ``update``, without ``params`` or
      ``head_log_likelihoods``.
    ValueError: If an argument is out of its range; at ``init``, if the model has no
      MultiHead.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"hidden": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
    ...           "out": {"alrao_heads": {"kernel": jnp.ones((10, 3, 2))}}}
    >>> optimizer = alrao.schedule_free_alrao(jax.random.key(0))
    >>> updates, opt_state = optimizer.update(
    ...   params, optimizer.init(params), params, head_log_likelihoods=jnp.zeros(10))
    >>> params_for_eval = alrao.eval_params(opt_state, params)

  References:
    Blier, Wolinski, Ollivier, `Learning with Random Learning Rates
    <https://arxiv.org/abs/1810.01322>`_, Algorithm 1;
    Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_.
  """
  call = "schedule_free_alrao()"
  _checks.check_key(call, key)
  _checks.check_interval(call, min_learning_rate, max_learning_rate)
  _checks.check_probability(call, "narrowest", narrowest)
  _checks.check_probability(call, "interpolation", interpolation)
  _checks.check_non_negative(call, "power", power)
  _checks.check_probability(call, "b2", b2)
  _checks.check_non_negative(call, "eps", eps)
  for name, value in (("interpolation", interpolation), ("b2", b2)):
    rounded = name == "b2" and _is_half(value)  # 0.999, to the nearest bfloat16
    if _checks.is_concrete(value) and float(value) == 1 and not rounded:
      raise ValueError(f"{call[:-1]}{name}=...) must be less than 1, got 1.")
  check_options(call, units)
  _check_flag(call, heads)
  parts: list[Any] = [_drop_and_normalise(b2, eps)]
  if weight_decay is not None:
    parts.append(_add_decayed_weights(call, weight_decay, weight_decay_mask))
  interval = LogUniform(min_learning_rate, max_learning_rate)
  parts.append(_scale_by_gathered_rates(key, interval, narrowest, units))
  if guard is not None:
    parts.append(guard_units(guard, units=units))
  if heads:
    parts.append(track_heads(averaging))
  chain = optax.chain(*parts)

  def init_fn(params):
    wide = _widened(params)
    # Copies: a donated state must not hold the parameters' buffers.
    average, z = jax.tree.map(jnp.copy, wide), None
    arrays = [leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")]
    if not arrays:  # of optax.tree.map_params: a leaf in place of what depends on them
      z = jnp.zeros([])
    elif any(map(_is_half, arrays)):
      z = jax.tree.map(jnp.copy, wide)
    count = jnp.zeros([], jnp.int32)
    return ScheduleFreeAlraoState(average, z, count, chain.init(wide))

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise TypeError(
        f"{call} averages parameters, got none. Write optimizer.update(grads, "
        "opt_state, params, head_log_likelihoods=...)."
      )
    if heads:
      (tracked,) = find_states(state.inner, TrackHeadsState)
      extra_args["head_log_weights"] = tracked.log_weights
    wide = _widened(params)
    steps, inner = chain.update(_widened(updates), state.inner, wide, **extra_args)
    count = jnp.asarray(optax.safe_increment(state.count))
    follow = _follow if state.z is None else _follow_rounded
    moves, average, z = follow(
      state.average, state.z, steps, params, count, interpolation, power
    )
    new_state = ScheduleFreeAlraoState(average, z, count, inner)
    return _with_dtypes_of(updates, moves), new_state

  tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
  if guard is not None:
    tx = skip_broken_batches(tx, units=units)
  if not heads:
    tx = _without_heads(call, tx)
  return _tree.checked(call, tx, ScheduleFreeAlraoState)


def _share(count, power, dtype):
  """The share of its distance to the new z that the average moves."""
  gamma = jnp.asarray(power, dtype)
  return (1 + gamma) / (count.astype(dtype) + gamma)


def _follow(average, z, steps, params, count, interpolation, power):
  """Returns how the parameters y move with the steps of z, and the new average x."""

  def move(step, y, x):
    # z is not kept, since y and x tell it: z - x = (y - x) / (1 - beta).
    beta, share = jnp.asarray(interpolation, y.dtype), _share(count, power, y.dtype)
    return (1 - beta) * step + beta * share * ((y - x) / (1 - beta) + step)

  def towards(moved, y, x):
    # From the new y alone, so that XLA updates both in place, in a kernel each: a share
    # s of the way to the new z is s / (1 - beta + beta s) of that to the new y.
    beta, share = jnp.asarray(interpolation, y.dtype), _share(count, power, y.dtype)
    return x + share / (1 - beta + beta * share) * (y + moved - x)

  def each(fn, *trees):
    return jax.tree.map(functools.partial(by_parts, fn), *trees)

  moves = each(move, steps, params, average)
  return moves, each(towards, moves, params, average), z


def _follow_rounded(average, z, steps, params, count, interpolation, power):
  """The same for half-precision parameters, which are y rounded: z is kept."""

  def step_z(z, step, y):
    # If z fits into the parameters' dtype, so do x and y, which are between.
    stepped = z + step
    return jnp.where(jnp.abs(stepped) <= float(jnp.finfo(y.dtype).max), stepped, z)

  def towards(x, z):
    return x + _share(count, power, x.dtype) * (z - x)

  def move(x, z, old_x, old_z, y):
    beta = jnp.asarray(interpolation, x.dtype)
    before, after = ((1 - beta) * b + beta * a for a, b in ((old_x, old_z), (x, z)))
    wide = y.astype(x.dtype)
    # Add what rounding lost of the last moves: at most half of the distance to the next
    # number, and a little, or a tie would round back. Another change of y, such as a
    # projection, is taken back only as slowly.
    lost = before - wide
    side = jnp.where(lost < 0, -jnp.inf, jnp.inf).astype(y.dtype)
    reach = 0.51 * jnp.abs(jnp.nextafter(y, side).astype(x.dtype) - wide)
    return after - before + jnp.clip(lost, -reach, reach)

  def each(fn, *trees):
    return jax.tree.map(functools.partial(by_parts, fn), *trees)

  new_z = each(step_z, z, steps, params)
  new_average = each(towards, average, new_z)
  moves = each(move, new_average, new_z, average, z, params)
  return moves, new_average, new_z


def eval_params(opt_state: Any, params: Any) -> Any:
  """Returns the parameters to evaluate or export: the average, not those that train.

  Args:
    opt_state: State of :func:`schedule_free_alrao`, within any chain or wrapper, or an
      ``nnx.Optimizer``'s.
    params: The parameters as they train, or a tree that holds them: linen's variables,
      an ``nnx.State``, a whole model of nnx or Equinox.

  Returns:
    A tree like ``params`` with its boxes (for a model, a model). It has the averaged
    parameters, in the dtypes of ``params``, and copies of what the optimizer does not
    train (frozen parts, batch statistics). All its arrays are new, so a step may donate
    the arguments.

  Raises:
    ValueError: If ``opt_state`` holds no such state, or more than one; if ``params``
      lacks a parameter that the optimizer trains.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"kernel": jnp.ones((10, 3, 2))}}}
    >>> opt_state = alrao.schedule_free_alrao(jax.random.key(0)).init(params)
    >>> alrao.eval_params(opt_state, params)["out"]["alrao_heads"]["kernel"].shape
    (10, 3, 2)
  """
  _tree.check_tree("eval_params()", params, models=True)
  averages = averages_by_path("eval_params()", opt_state, params)
  given = dict(_tree.flatten_with_paths(params)[0])
  # A layer in two places of a model is trained under one of the two paths.
  shared = {id(given[path]): average for path, average in averages.items()}

  def read(path, leaf):
    average = averages.get(_tree.path_of(path), shared.get(id(leaf)))
    if average is not None:
      return jnp.array(average, leaf.dtype)
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf

  return jax.tree_util.tree_map_with_path(read, params)


def averages_by_path(call: str, opt_state: Any, params: Any) -> dict[str, Any]:
  """The averages in a state of :func:`schedule_free_alrao`, by the paths of ``params``.

  Raises:
    ValueError: As :func:`eval_params`.
  """
  kind = ScheduleFreeAlraoState
  find_state(opt_state, kind, "schedule_free_alrao", call)  # an error, if there is none
  nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
  # Keep the state's boxes: they may hold part of a path.
  (average,) = (node.average for node in nodes if isinstance(node, kind))
  held = dict(_tree.flatten_with_paths(average)[0])
  given = {
    path: getattr(leaf, "shape", None)
    for path, leaf in _tree.flatten_with_paths(params)[0]
  }
  lacking = {}
  for prefix in ("", "params/"):  # linen's variables hold the parameters below a key
    found = {prefix + path: leaf for path, leaf in held.items()}
    fits = [given.get(path) == leaf.shape for path, leaf in found.items()]
    if all(fits):
      return found
    lacking[prefix] = [path for path, fit in zip(held, fits, strict=True) if not fit]
  path = min(lacking.values(), key=len)[0]
  raise ValueError(
    f"{call[:-1]}params=...) must hold all that the optimizer trains, got nothing of "
    f"shape {held[path].shape} at {path!r}. Pass the parameters that the optimizer's "
    "update is given, or what holds them: linen's variables, an nnx.State, the model."
  )


def _drop_and_normalise(b2: Any, eps: Any):
  """:func:`drop_diverged`, then Adam without its average of gradients.

  The interpolation replaces that average. This is a chain of both with
  ``optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)``, and has its
  state. Here the gradients that are dropped need no array of their own: each use of a
  gradient has its own mask, which XLA fuses.
  """
  if _is_half(b2):
    # optax.inject_hyperparams rounds numbers to the parameters' dtype. In bfloat16 it
    # rounds 0.999 to 1, which averages nothing. Take the middle of what rounds to 1.
    below_one = 1 - float(jnp.finfo(b2.dtype).epsneg) / 4
    b2 = jnp.minimum(jnp.asarray(b2, jnp.float32), below_one)
  dropping = drop_diverged()
  normalising: Any = optax.scale_by_rms(b2, eps, bias_correction=True)

  def init_fn(params):
    # |g|^2 is real.
    return dropping.init(params), normalising.init(jax.tree.map(squared, params))

  def squared(leaf):
    if not _has_complex(leaf):
      return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf.update(dtype=jnp.finfo(leaf.dtype).dtype)
    return jnp.real(leaf)

  def update_fn(updates, state, params=None):
    dropped, averages = state
    _, dropped = dropping.update(updates, dropped, params)
    count = optax.safe_increment(averages.count)

    def average(g, nu):
      square = jnp.where(_is_usable(g), jnp.square(jnp.abs(g)), 0)
      return (1 - b2) * square + b2 * nu

    def normalised(g, nu):
      step = 1 / (jnp.sqrt(nu / (1 - b2**count)) + eps) * g
      return jnp.where(_is_usable(g), step, 0)

    # Injected numbers need implicit promotion, which users may have forbidden.
    with jax.numpy_dtype_promotion("standard"):
      nu = jax.tree.map(average, updates, averages.nu)
      nu = _with_dtypes_of(averages.nu, nu)
      steps = jax.tree.map(normalised, updates, nu)
    state = dropped, averages._replace(count=count, nu=nu)
    return _with_dtypes_of(updates, steps), state

  return optax.GradientTransformation(init_fn, update_fn)


def _scale_by_gathered_rates(key, interval, narrowest, units):
  """:func:`scale_by_unit_rates` whose units gather around what the posterior finds."""

  def scale_by(law):
    return scale_by_unit_rates(key, *interval, distribution=law, units=units)

  def init_fn(params):
    rates: Any = scale_by(interval).init(params)
    return GatherUnitsState(
      collapsed=jnp.zeros([], bool),
      interval=jnp.stack(rates.head_distribution),
      bounds=jnp.stack(rates.unit_distribution),
      drawn=jnp.zeros([2], rates.quantiles.dtype),
      rates=rates,
    )

  def update_fn(updates, state, params=None, *, head_log_weights=None, **extra_args):
    del extra_args
    rates = state.rates
    drawn = _drawn(narrowest, rates.ladder, head_log_weights)
    now = map(jnp.stack, (rates.head_distribution, rates.unit_distribution, drawn))
    kept = (state.interval, state.bounds, state.drawn)
    was_interval, bounds, was_drawn = jax.tree.map(
      functools.partial(jnp.where, state.collapsed), (*now,), kept
    )
    never = jnp.zeros_like(state.collapsed)
    state = GatherUnitsState(never, was_interval, bounds, was_drawn, rates)
    law = _gathered(interval, narrowest, state, drawn)
    updates, rates = scale_by(law).update(updates, rates, params)
    return updates, state._replace(rates=rates)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _drawn(narrowest, ladder, head_log_weights):
  """How far a posterior moves the ends of the interval inward, as shares of its width.

  A mean ``mu`` of the heads' quantiles and a share ``c`` turn the interval ``[0, 1]``
  into ``[(1 - c) mu, 1 - (1 - c) (1 - mu)]``.
  """
  # The posterior, or the mean of several.
  posteriors = [jnp.exp(one) for one in jax.tree.leaves(head_log_weights)]
  if not posteriors or posteriors[0].size == 1:
    return (jnp.zeros([], ladder.dtype),) * 2  # it tells nothing
  weights = sum(posteriors[1:], posteriors[0]) / len(posteriors)
  weights = weights.astype(ladder.dtype)
  middle = jnp.sum(weights * ladder)
  spread = jnp.sqrt(jnp.sum(weights * jnp.square(ladder - middle)))
  # Over the deviation of the whole interval, on which rates are log-uniform.
  share = jnp.clip(spread * math.sqrt(12), jnp.asarray(narrowest, ladder.dtype), 1.0)
  return (1 - share) * middle, (1 - share) * (1 - middle)


def _gathered(interval, narrowest, state: GatherUnitsState, drawn):
  """The bounds of the units' rates after the posterior's moves since the collapse."""
  # Scalars, which XLA computes in fewer kernels than vectors of two.
  dtype = state.bounds.dtype
  lowest, highest = (jnp.asarray(end, dtype) for end in interval)
  width = jnp.log(highest) - jnp.log(lowest)

  def moved(i, end, inward):
    # Factors of exactly 1 if neither posterior nor interval moved. In two halves, since
    # the whole factor may overflow although no bound does.
    half = jnp.exp(inward * (drawn[i] - state.drawn[i]) * width / 2)
    return state.bounds[i] * (end / state.interval[i]) * half * half

  low, high = moved(0, lowest, 1), moved(1, highest, -1)
  # After a collapse to distant heads, a posterior may contract by more than the units'
  # width. The tolerance is for rounding.
  least = jnp.asarray(narrowest, dtype) * (1 - 1e-4) * width
  lack = jnp.maximum(least - (jnp.log(high) - jnp.log(low)), 0)
  apart = jnp.exp(lack / 2)
  return LogUniform(
    jnp.clip(low / apart, lowest, highest), jnp.clip(high * apart, lowest, highest)
  )
