"""Schedule-free Alrao: a recipe for those who want neither rate nor schedule."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _checks, _rates, _units
from ._alrao import drop_diverged
from ._averaging import Averaging, switch
from ._guard import Guard, guard_units
from ._heads import TrackHeadsState, track_heads
from ._state import find_state
from ._transform import ScaleByUnitRatesState, scale_by_unit_rates


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
  heads: str = _units.HEADS_REGEX,
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
  quantiles = state.quantiles[: weights.size]
  ladder = jnp.log(state.head_distribution.quantile(quantiles))
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
