"""Alrao, the papers' and schedule-free, as chains of the library's parts."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks, _rates, _tree
from ._averaging import Averaging, switch
from ._guard import Guard, guard_units
from ._heads import TrackHeadsState, track_heads
from ._rates import ScaleByUnitRatesState, scale_by_unit_rates
from ._tree import find_state


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
  names: tuple[str, ...] | None = None,
  distribution: Any = None,
  overrides: tuple = (),
  heads: str | None = _tree.HEADS_REGEX,
  strict: bool = False,
  unit_axis: Literal["last", "first"] = "last",
  granularity: Literal["per_unit", "per_weight"] = "per_unit",
  redraw: bool = False,
  single_head_learning_rate: float | None = None,
  guard: Guard | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""All learning rates at once: an optimizer with no learning rate to choose.

  Every unit of the network trains with a rate of its own, drawn log-uniformly from a
  wide interval. The output layer stands in ``num_heads`` copies (a
  :class:`~alrao_jax.linen.MultiHead`), each with a fixed rate, whose predictions are
  averaged with the posterior :math:`a` that this optimizer keeps. A chain of public
  parts, to be rebuilt at will::

    optax.chain(
      alrao.drop_diverged(),
      base,                                            # optax.identity(): plain SGD
      optax.add_decayed_weights(weight_decay, weight_decay_mask),
      alrao.scale_by_unit_rates(key, min_learning_rate, max_learning_rate),
      optax.scale_by_schedule(schedule),
      alrao.guard_units(guard),
      alrao.track_heads(averaging))

  Which interval goes with which base: ``[1e-5, 10]`` (the default) for plain SGD, and
  ``[1e-6, 1]`` for ``optax.scale_by_adam()``, both the papers'. A base with momentum
  0.9 multiplies the size of steps by 10, as everywhere. The papers find Alrao less
  reliable on Adam than on SGD.

  Args:
    key: JAX random key, from which the rates are drawn. With
      :func:`optax.inject_hyperparams` name it a constant, or it becomes part of the
      state: ``optax.inject_hyperparams(alrao.alrao, static_args=("key",))(key)``.
    base: What to do with gradients before the rates: ``optax.trace(0.9)`` for
      momentum, ``optax.scale_by_adam()``, a chain, ...; plain SGD by default. A
      ``scale_by_*`` part, without a learning rate of its own. A part that mixes the
      entries of its tree (a global norm) belongs into :func:`per_head`.
    min_learning_rate: Positive; the lower bound of the interval.
    max_learning_rate: At least ``min_learning_rate``; the upper bound.
    schedule: A number, or a function of the step count, that multiplies all rates.
    weight_decay: Decoupled as in :func:`optax.adamw`: a unit's weights shrink by its
      own rate times ``weight_decay``. For the coupled kind put
      ``optax.add_decayed_weights`` first in ``base``. A number or a schedule.
    weight_decay_mask: The ``mask`` of :func:`optax.add_decayed_weights`.
    averaging: How the posterior learns: :func:`switch`, :func:`bayes` or
      :func:`fixed_share`.
    names: Names of the MultiHeads, where the model has several; see
      :func:`track_heads`.
    distribution: See :func:`scale_by_unit_rates`, as for all that follow.
    overrides: See :func:`scale_by_unit_rates`.
    heads: Regular expression for the paths of the heads' parameters. ``None``: the
      model has an ordinary output layer, whose units draw rates like all others, and
      ``update`` takes no ``head_log_likelihoods``.
    strict: See :func:`scale_by_unit_rates`.
    unit_axis: See :func:`scale_by_unit_rates`.
    granularity: See :func:`scale_by_unit_rates`.
    redraw: See :func:`scale_by_unit_rates`.
    single_head_learning_rate: See :func:`scale_by_unit_rates`.
    guard: ``alrao.guard()`` stops and slows units that are about to explode, in
      networks without normalisation and for wide intervals; see :func:`guard_units`.

  Returns:
    The optimizer; its updates descend. ``update(grads, opt_state, params,
    head_log_likelihoods=...)`` needs the log-likelihoods that the losses of this
    library return in their :class:`MixtureInfo`.

  Raises:
    TypeError: If ``key`` is no random key, ``base`` no gradient transformation, or
      ``guard`` no :class:`Guard`.
    ValueError: If not ``0 < min_learning_rate <= max_learning_rate < inf``; if
      ``base`` has a learning rate already; at ``init``, if the model has no MultiHead.

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
  parts = [drop_diverged(), base]
  if weight_decay is not None:
    if not callable(weight_decay):
      _checks.check_non_negative("alrao()", "weight_decay", weight_decay)
      if _checks.is_concrete(weight_decay):
        weight_decay = float(weight_decay)  # an array would promote the updates
    parts.append(optax.add_decayed_weights(weight_decay, weight_decay_mask))
  parts.append(
    scale_by_unit_rates(
      key,
      min_learning_rate,
      max_learning_rate,
      distribution=distribution,
      overrides=overrides,
      heads=heads,
      strict=strict,
      unit_axis=unit_axis,
      granularity=granularity,
      redraw=redraw,
      single_head_learning_rate=single_head_learning_rate,
    )
  )
  if schedule is not None:
    if callable(schedule):
      parts.append(optax.scale_by_schedule(schedule))
    else:
      _checks.check_non_negative("alrao()", "schedule", schedule)
      parts.append(optax.scale_by_schedule(lambda _: schedule))  # keeps the dtype
  if guard is not None:
    parts.append(
      guard_units(
        guard,
        overrides=overrides,
        heads=heads,
        strict=strict,
        unit_axis=unit_axis,
        granularity=granularity,
      )
    )
  if heads is not None:
    parts.append(track_heads(averaging, heads=heads, names=names))
  return optax.chain(*parts)


def drop_diverged() -> optax.GradientTransformation:
  """Zeroes gradient entries that a base's state would keep for good.

  NaN and infinities of a diverged unit, and entries beyond 1e18, whose squares
  overflow float32: Adam would sum them and never move that weight again. The first
  part of :func:`alrao`; the first of a chain of one's own, too.

  Returns:
    The transformation. Updates keep their sign.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> print(alrao.drop_diverged().update(jnp.array([1.0, jnp.nan, 1e20]), ())[0])
    [1. 0. 0.]
  """

  def drop(g):
    largest = min(1e18, float(jnp.finfo(g.dtype).max))
    return jnp.where(jnp.abs(g) <= largest, g, jnp.zeros_like(g))

  return optax.stateless(lambda updates, _: jax.tree.map(drop, updates))


def _check_base(base):
  if not isinstance(base, optax.GradientTransformation):
    raise TypeError(
      "alrao(base=...) must be an optax gradient transformation, such as "
      f"optax.trace(0.9) or optax.scale_by_adam(), got {base!r}."
    )

  # A learning rate turns the gradient's sign: a step from each side of zero tells, and
  # a base that adds noise can't turn both.
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


class ScheduleFreeAlraoState(NamedTuple):
  """State of :func:`schedule_free_alrao`.

  Attributes:
    average: Like the parameters: what :func:`eval_params` returns.
    count: int32 scalar, the number of steps.
    inner: State of the chain whose steps are averaged.
  """

  average: Any
  count: jax.Array
  inner: Any


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
  names: tuple[str, ...] | None = None,
  overrides: tuple = (),
  heads: str = _tree.HEADS_REGEX,
  strict: bool = False,
  guard: Guard | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Alrao with a normalised base, rates that draw together, and averaged parameters.

  The model is that of :func:`alrao`, with its :class:`~alrao_jax.linen.MultiHead`, and
  so is the training step; evaluate and export ``alrao.eval_params(opt_state, params)``
  in the place of ``params``. Three things are not the papers':

  - Gradients are divided by the root of their average squares, as in Adam, so that one
    interval suits most networks.
  - The heads' posterior tells which rates are good. The units' rates draw together
    around them: with :math:`\mu` and :math:`\sigma` mean and deviation of the heads'
    log-rates under the posterior, and :math:`\sigma_0` that of the whole interval,

    .. math::
      \log \eta \leftarrow \mu + c\, (\log \eta - \mu), \qquad
      c = \operatorname{clip}(\sigma / \sigma_0, \text{narrowest}, 1)

    The heads keep their ladder. So the rates follow where the posterior moves to.
  - Schedule-free averaging: steps are summed into :math:`z`, whose average :math:`x` is
    what is evaluated, and gradients are taken in between, at the parameters :math:`y`.
    With :math:`\beta` the ``interpolation`` and :math:`\gamma` the ``power``,

    .. math::
      x_t = x_{t-1} + \tfrac{1 + \gamma}{t + \gamma} (z_t - x_{t-1}), \qquad
      y_t = (1 - \beta) z_t + \beta x_t

    No schedule needs to know when the training ends.

  Where the model has batch normalisation, its running statistics are those of
  :math:`y`: recompute them for :math:`x` by a few forward passes in training mode.

  Args:
    key: JAX random key, from which the rates are drawn.
    min_learning_rate: Positive; the lower bound of the interval.
    max_learning_rate: At least ``min_learning_rate``; the upper bound.
    narrowest: Least width of the units' interval as a share of the first, in
      ``[0, 1]``. 1 leaves the rates alone.
    interpolation: In ``[0, 1)``; 0 takes gradients at :math:`z`, plain averaging.
    power: At least 0. In the average, the weight of step t grows as t to this power; 0
      is the mean of all steps.
    b2: In ``[0, 1]``; decay of the average of squared gradients.
    eps: At least 0; added to its root.
    weight_decay: As in :func:`alrao`, for all that follow.
    weight_decay_mask: See :func:`alrao`.
    averaging: See :func:`alrao`.
    names: See :func:`alrao`. The units follow the mean of the posteriors.
    overrides: See :func:`alrao`.
    heads: See :func:`alrao`.
    strict: See :func:`alrao`.
    guard: See :func:`alrao`.

  Returns:
    The optimizer; its updates descend. ``update(grads, opt_state, params,
    head_log_likelihoods=...)``, as :func:`alrao`. State: one average of the parameters
    (keep them in float32 or wider: half precision would lose its small steps), one of
    squares, and Alrao's.

  Raises:
    TypeError: If ``key`` is no random key; at ``update``, without ``params`` or
      ``head_log_likelihoods``.
    ValueError: If an argument is out of its range; at ``init``, without heads.

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
  if _checks.is_concrete(interpolation) and interpolation == 1:
    raise ValueError(f"{call[:-1]}interpolation=...) must be less than 1, got 1.")
  reading = {"overrides": overrides, "heads": heads, "strict": strict}
  parts = [drop_diverged(), _scale_by_root_mean_square(b2, eps)]
  if weight_decay is not None:
    parts.append(optax.add_decayed_weights(weight_decay, weight_decay_mask))
  interval = _rates.LogUniform(min_learning_rate, max_learning_rate)
  parts.append(_scale_by_gathered_rates(key, interval, narrowest, reading))
  if guard is not None:
    parts.append(guard_units(guard, **reading))
  parts.append(track_heads(averaging, heads=heads, names=names))
  chain = optax.chain(*parts)

  def init_fn(params):
    # A copy: a donated state must not hold the parameters' buffers.
    average = jax.tree.map(jnp.copy, params)
    return ScheduleFreeAlraoState(average, jnp.zeros([], jnp.int32), chain.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise TypeError(
        f"{call} averages parameters, got none. Write optimizer.update(grads, "
        "opt_state, params, head_log_likelihoods=...)."
      )
    posterior = find_state(state.inner, TrackHeadsState, "track_heads").log_weights
    steps, inner = chain.update(
      updates, state.inner, params, head_log_weights=posterior, **extra_args
    )
    count = jnp.asarray(optax.safe_increment(state.count))

    def towards(step, y, x):
      """How far the new z is from the old x, and the share of it that x takes."""
      # z is not kept, since y and x tell it: z - x = (y - x) / (1 - beta).
      away = (y - x) / (1 - jnp.asarray(interpolation, y.dtype)) + step
      gamma = jnp.asarray(power, y.dtype)
      return away, (1 + gamma) / (count.astype(y.dtype) + gamma)

    def move(step, y, x):
      beta = jnp.asarray(interpolation, y.dtype)
      away, share = towards(step, y, x)
      return (1 - beta) * step + beta * share * away

    def average(step, y, x):
      away, share = towards(step, y, x)
      return x + share * away

    trees = (steps, params, state.average)
    return jax.tree.map(move, *trees), ScheduleFreeAlraoState(
      jax.tree.map(average, *trees), count, inner
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def eval_params(opt_state: Any, params: Any) -> Any:
  """Returns the parameters to evaluate or export: the average, not those that train.

  Args:
    opt_state: State of :func:`schedule_free_alrao`, within any chain or wrapper, or an
      ``nnx.Optimizer``'s.
    params: The parameters as they train.

  Returns:
    A tree like ``params``, boxes kept: the averaged parameters, in the dtypes of
    ``params``.

  Raises:
    ValueError: If ``opt_state`` holds no such state, or more than one.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"kernel": jnp.ones((10, 3, 2))}}}
    >>> opt_state = alrao.schedule_free_alrao(jax.random.key(0)).init(params)
    >>> alrao.eval_params(opt_state, params)["out"]["alrao_heads"]["kernel"].shape
    (10, 3, 2)
  """
  state = find_state(opt_state, ScheduleFreeAlraoState, "schedule_free_alrao")
  leaves, treedef = jax.tree.flatten(params)
  averages = jax.tree.leaves(state.average)
  return jax.tree.unflatten(
    treedef, [x.astype(p.dtype) for x, p in zip(averages, leaves, strict=True)]
  )


def _scale_by_root_mean_square(b2, eps):
  """Adam without its average of gradients, whose place the interpolation takes."""
  adam = optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)

  def update_fn(updates, state, params=None):
    # Its bias correction needs implicit promotion, which users may have forbidden.
    with jax.numpy_dtype_promotion("standard"):
      return adam.update(updates, state, params)

  return optax.GradientTransformation(adam.init, update_fn)


def _scale_by_gathered_rates(key, interval, narrowest, reading):
  """`scale_by_unit_rates` whose units gather around what the posterior finds."""

  def scale_by(units):
    return scale_by_unit_rates(key, *interval, distribution=units, **reading)

  def update_fn(updates, state, params=None, *, head_log_weights=None, **extra_args):
    del extra_args
    units = _gathered(interval, narrowest, state, head_log_weights)
    return scale_by(units).update(updates, state, params)

  return optax.GradientTransformationExtraArgs(scale_by(interval).init, update_fn)


def _gathered(interval, narrowest, state: ScaleByUnitRatesState, head_log_weights):
  """The units' interval under a posterior, or under the mean of several."""
  posteriors = [jnp.exp(one) for one in jax.tree.leaves(head_log_weights)]
  weights = sum(posteriors[1:], posteriors[0]) / len(posteriors)
  ladder = jnp.log(state.head_distribution.quantile(state.ladder))
  weights = weights.astype(ladder.dtype)
  middle = jnp.sum(weights * ladder)
  spread = jnp.sqrt(jnp.sum(weights * jnp.square(ladder - middle)))
  low, high = (jnp.log(jnp.asarray(end, ladder.dtype)) for end in interval)
  # The deviation of the whole interval, over which rates are log-uniform. Equal ends
  # have none, and nowhere to draw together to.
  whole = jnp.maximum((high - low) / math.sqrt(12), jnp.finfo(ladder.dtype).tiny)
  share = jnp.clip(spread / whole, jnp.asarray(narrowest, ladder.dtype), 1.0)
  ends = [jnp.exp(middle + share * (end - middle)) for end in (low, high)]
  return _rates.LogUniform(*ends)
