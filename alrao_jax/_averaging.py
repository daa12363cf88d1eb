r"""How the heads' predictions are weighted: switch, Bayes, fixed share.

An averaging method keeps a posterior over the heads. It learns by Bayes' rule, not by
gradient, from how well each head predicted each mini-batch. It knows nothing of
networks: log-likelihoods in, log-weights out.
"""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from ._checks import check_count, check_positive, check_probability


class Averaging(NamedTuple):
  """A method of model averaging: three pure functions. You may write your own.

  Attributes:
    init: ``init(num_heads, dtype=jnp.float32) -> state``, with equal weights for all
      heads. Types narrower than float32 are widened to it.
    update: ``update(state, head_log_likelihoods) -> state``, after one observation.
      ``head_log_likelihoods`` has shape ``(N,)``: how well each head predicted this
      mini-batch, in nats an example, measured before the step's update. A head at
      ``-inf`` or ``+inf`` has diverged, and gets no weight from this observation. A
      head at NaN was not observed: it counts as the mixture of the others, so Bayes'
      rule leaves its weight alone. An observation that leaves no weight at all is
      ignored. The state's shapes and types never change. (For any method,
      :func:`track_heads` ignores an observation without a finite number, and one that
      would make log-weights NaN.)
    log_weights: ``log_weights(state) -> (N,)``, the normalised log-weights with which
      to predict the next observation.

  A state may also have two things, as those of this library do:

  - a method ``renormalised() -> state``, for :func:`collapse`. It makes the weights sum
    to 1 again after every array has lost the entries of the same heads. Without it, a
    state with weights that still sum to 1 stays, log-weights are shifted, and any other
    state is made new from the kept heads' weights. If the first number of heads counts
    later, keep it in the state, as :class:`SwitchState` does;
  - an attribute ``observations``, for :func:`report`: how many mini-batches it has
    seen.
  """

  init: Callable[..., Any]
  update: Callable[[Any, ArrayLike], Any]
  log_weights: Callable[[Any], jax.Array]


class SwitchState(NamedTuple):
  """State of :func:`switch`.

  Attributes:
    alpha: Shape ``(N,)``, log-weight of "head j now, and may still switch".
    beta: Shape ``(N,)``, log-weight of "head j from now on, forever".
    count: int32 scalar, the time ``t``: 1 before the first observation.
    log_share: Scalar, ``-log N``: log-probability that a switch goes to head j. Fewer
      heads after :func:`collapse` keep it, see there.
  """

  alpha: jax.Array
  beta: jax.Array
  count: jax.Array
  log_share: jax.Array

  @property
  def observations(self) -> jax.Array:
    """How many observations the state has seen."""
    return self.count - 1

  def renormalised(self) -> "SwitchState":
    """The state whose weights sum to 1; equal weights if there is no weight at all."""
    both = jnp.stack([self.alpha, self.beta])
    total = jax.nn.logsumexp(both)
    # Without any weight, put it all into beta, as where nothing switches (theta 0).
    uniform = jnp.full_like(self.beta, -math.log(self.beta.size))
    empty = jnp.stack([jnp.full_like(self.alpha, -jnp.inf), uniform])
    alpha, beta = jnp.where(jnp.isfinite(total), both - total, empty)
    return self._replace(alpha=alpha, beta=beta)


class BayesState(NamedTuple):
  """State of :func:`bayes`: ``log_weights``, shape ``(N,)``."""

  log_weights: jax.Array

  def renormalised(self) -> "BayesState":
    """The state whose weights sum to 1; equal weights if there is no weight at all."""
    return self._replace(log_weights=log_normalised(self.log_weights))


class FixedShareState(NamedTuple):
  """State of :func:`fixed_share`.

  Attributes:
    log_weights: Shape ``(N,)``.
    log_share: Scalar, ``-log N``, as in :class:`SwitchState`.
  """

  log_weights: jax.Array
  log_share: jax.Array

  def renormalised(self) -> "FixedShareState":
    """The state whose weights sum to 1; equal weights if there is no weight at all."""
    return self._replace(log_weights=log_normalised(self.log_weights))


def log_normalised(log_weights: jax.Array) -> jax.Array:
  """Log-weights that sum to 1, equal ones if there is no weight at all.

  Example:
    >>> import jax.numpy as jnp
    >>> jnp.exp(log_normalised(jnp.log(jnp.array([0.1, 0.3])))).round(2).tolist()
    [0.25, 0.75]
  """
  total = jax.nn.logsumexp(log_weights)
  uniform = jnp.full_like(log_weights, -math.log(log_weights.size))
  return jnp.where(jnp.isfinite(total), log_weights - total, uniform)


def renormalised(averaging: Averaging, state: Any) -> Any:
  """A state that has lost heads, with weights that sum to 1.

  Args:
    averaging: The method that the state belongs to.
    state: Its state, which has no method ``renormalised()``. Its arrays lack the
      entries of the lost heads.

  Returns:
    The state as it is if its weights sum to 1, a shifted one if that is enough, else a
    new one that has observed the weights of the heads.
  """
  log_weights = averaging.log_weights(state)
  total = jax.nn.logsumexp(log_weights)

  def shift(leaf):
    of_heads = jnp.shape(leaf)[:1] == log_weights.shape
    floats = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf - total.astype(leaf.dtype) if of_heads and floats else leaf

  fresh = averaging.init(log_weights.size, log_weights.dtype)
  fresh = averaging.update(fresh, log_normalised(log_weights))
  for candidate in (jax.tree.map(shift, state), state):
    sums = jnp.abs(jax.nn.logsumexp(averaging.log_weights(candidate))) < 1e-5
    fresh = jax.tree.map(functools.partial(jnp.where, sums), candidate, fresh)
  return fresh


def switch(theta: float = 0.999, *, likelihood_scale: float = 1.0) -> Averaging:
  r"""The switch distribution: a posterior over *sequences* of heads.

  Which head predicts best changes while the network trains, so the prior is over
  sequences: hold head :math:`k_1` until time :math:`t_2`, then :math:`k_2` until
  :math:`t_3`, and so on. Heads are drawn uniformly (a head may follow itself), times
  from :math:`\pi_T(t) = 1/(t(t+1))` given that they come after the one before, and
  after each switch the sequence may switch again with probability :math:`\theta`
  (``theta``), or stays forever. The posterior is exact and costs two numbers a head:
  :math:`\alpha_j`, the weight of the sequences now at head j that may still switch, and
  :math:`\beta_j`, the weight of those that will not. With :math:`\ell_j` the
  ``head_log_likelihoods`` at time t:

  .. math::
    m &= \tfrac{1}{t+1} \textstyle\sum_j \alpha_j e^{\ell_j} \\
    \alpha_j &\leftarrow \tfrac{t}{t+1} \alpha_j e^{\ell_j} + \theta m / N \\
    \beta_j &\leftarrow \beta_j e^{\ell_j} + (1 - \theta) m / N

  and both are divided by their total. The weights are :math:`a_j = \alpha_j + \beta_j`.
  No weight stays at 0 forever (if ``theta`` is not 0), so a head that had diverged may
  come back. Everything is computed in logarithms.

  Args:
    theta: Probability of a further switch, a Python number in ``[0, 1]``. 0 is
      :func:`bayes`; 0.999 is the papers' value.
    likelihood_scale: Positive factor of the log-likelihoods. 1 takes a mini-batch's
      mean as one observation, as the papers' experiments do; the batch size takes each
      example as one.

  Returns:
    An :class:`Averaging` with :class:`SwitchState`.

  Raises:
    ValueError: If ``theta`` is outside ``[0, 1]``, or ``likelihood_scale`` is not
      positive.
    TypeError: If either is no Python number (they are fixed when the program is
      traced).

  Example:
    >>> import jax.numpy as jnp
    >>> averaging = switch()
    >>> state = averaging.init(3)
    >>> for _ in range(20):
    ...   state = averaging.update(state, jnp.array([-2.0, -1.0, -jnp.inf]))
    >>> print(jnp.exp(averaging.log_weights(state)).round(2))
    [0.03 0.96 0.02]

  Reference:
    Blier, Wolinski, Ollivier (2018), arXiv:1810.01322, appendix A;
    van Erven, Grünwald, de Rooij (2012), "Catching up faster by switching sooner",
    Journal of the Royal Statistical Society B 74, 361-417.
  """
  theta = _static("switch()", "theta", theta)
  check_probability("switch()", "theta", theta)
  scale = _static("switch()", "likelihood_scale", likelihood_scale)
  check_positive("switch()", "likelihood_scale", scale)
  return Averaging(
    init=functools.partial(_init_switch, theta),
    update=functools.partial(_update_switch, theta, scale),
    log_weights=_switch_log_weights,
  )


def bayes(*, likelihood_scale: float = 1.0) -> Averaging:
  r"""Plain Bayesian averaging: one head is the right one throughout.

  Each observation multiplies the weights, :math:`a_j \propto a_j e^{\ell_j}`. This is
  ``switch(theta=0)``. A head that diverged once keeps weight 0.

  Args:
    likelihood_scale: Positive factor of the log-likelihoods, see :func:`switch`.

  Returns:
    An :class:`Averaging` with :class:`BayesState`. Raises as :func:`switch`.

  Example:
    >>> import jax.numpy as jnp
    >>> averaging = bayes()
    >>> state = averaging.update(averaging.init(2), jnp.log(jnp.array([0.6, 0.2])))
    >>> print(jnp.exp(averaging.log_weights(state)).round(2))
    [0.75 0.25]
  """
  scale = _static("bayes()", "likelihood_scale", likelihood_scale)
  check_positive("bayes()", "likelihood_scale", scale)
  return Averaging(
    init=_init_bayes,
    update=functools.partial(_update_share, "bayes().update()", 0.0, scale),
    log_weights=_share_log_weights,
  )


def fixed_share(rate: float, *, likelihood_scale: float = 1.0) -> Averaging:
  r"""Fixed share: at each step, the head changes with one fixed probability.

  After Bayes' rule every head gives up the fraction ``rate`` of its weight, and all
  heads share it equally: :math:`a_j \leftarrow (1 - r) a_j + r / N`. It is the
  posterior over sequences of heads in which each step draws a new head, uniformly (the
  old one included), with probability ``rate``. (In the original the fraction is shared
  among the *other* heads: ``rate`` here is N / (N - 1) times the one there.)

  Args:
    rate: Probability of drawing a new head at a step, a Python number in ``[0, 1]``.
      0 is :func:`bayes`, 1 keeps equal weights.
    likelihood_scale: Positive factor of the log-likelihoods, see :func:`switch`.

  Returns:
    An :class:`Averaging` with :class:`FixedShareState`. Raises as :func:`switch`.

  Example:
    >>> import jax.numpy as jnp
    >>> averaging = fixed_share(0.1)
    >>> state = averaging.update(averaging.init(2), jnp.log(jnp.array([0.6, 0.2])))
    >>> print(jnp.exp(averaging.log_weights(state)).round(3))
    [0.725 0.275]

  Reference:
    Herbster, Warmuth (1998), "Tracking the best expert", Machine Learning 32, 151-178.
  """
  rate = _static("fixed_share()", "rate", rate)
  check_probability("fixed_share()", "rate", rate)
  scale = _static("fixed_share()", "likelihood_scale", likelihood_scale)
  check_positive("fixed_share()", "likelihood_scale", scale)
  return Averaging(
    init=_init_share,
    update=functools.partial(_update_share, "fixed_share().update()", rate, scale),
    log_weights=_share_log_weights,
  )


def _init_switch(
  theta: float, num_heads: int, dtype: DTypeLike = jnp.float32
) -> SwitchState:
  uniform = _uniform("switch().init()", num_heads, dtype)
  alpha, beta = uniform + _log(theta), uniform + _log(1.0 - theta)
  return SwitchState(alpha, beta, jnp.ones([], jnp.int32), _log_share(uniform))


def _update_switch(
  theta: float, scale: float, state: SwitchState, head_log_likelihoods: ArrayLike
) -> SwitchState:
  call = "switch().update()"
  weights = jnp.logaddexp(state.alpha, state.beta)
  log_likelihoods = _observation(call, scale, weights, head_log_likelihoods)
  t = state.count.astype(state.alpha.dtype)
  # Bayes' rule on all 2N entries.
  alpha = state.alpha + log_likelihoods
  beta = state.beta + log_likelihoods
  # The masses that may still switch, and will not. Switching keeps their sum, but for
  # the shares of heads that have left; `log_weights` normalises.
  mass, rest = jax.nn.logsumexp(jnp.stack([alpha, beta]), axis=1)
  total = jnp.logaddexp(mass, rest)
  # The mass that switches now: P(T = t | T >= t) = 1/(t + 1) under pi_T.
  pool = mass - jnp.log1p(t) + state.log_share
  # t/(t + 1) of alpha stays where it is; log1p keeps its digits at large t.
  alpha = jnp.logaddexp(alpha - jnp.log1p(1.0 / t), pool + _log(theta))
  beta = jnp.logaddexp(beta, pool + _log(1.0 - theta))
  count = jnp.asarray(optax.safe_increment(state.count))
  alpha, beta = alpha - _or_zero(total), beta - _or_zero(total)
  new = SwitchState(alpha, beta, count, state.log_share)
  return _unless_impossible(total, new, state)


def _switch_log_weights(state: SwitchState) -> jax.Array:
  return _normalised(jnp.logaddexp(state.alpha, state.beta))


def _init_bayes(num_heads: int, dtype: DTypeLike = jnp.float32) -> BayesState:
  return BayesState(_uniform("bayes().init()", num_heads, dtype))


def _init_share(num_heads: int, dtype: DTypeLike = jnp.float32) -> FixedShareState:
  uniform = _uniform("fixed_share().init()", num_heads, dtype)
  return FixedShareState(uniform, _log_share(uniform))


def _update_share(
  call: str, rate: float, scale: float, state: Any, head_log_likelihoods: ArrayLike
) -> Any:
  # Bayes' rule, then the share (none if the rate is 0).
  weights = state.log_weights
  weights = weights + _observation(call, scale, weights, head_log_likelihoods)
  total = jax.nn.logsumexp(weights)
  weights = weights - _or_zero(total)
  if rate > 0:
    share = _log(rate) + state.log_share
    weights = jnp.logaddexp(weights + _log(1.0 - rate), share)
  new = state._replace(log_weights=_normalised(weights))
  return _unless_impossible(total, new, state)


def _share_log_weights(state: BayesState | FixedShareState) -> jax.Array:
  return _normalised(state.log_weights)


def _log_share(uniform: jax.Array) -> jax.Array:
  return jnp.full([], -math.log(uniform.size), uniform.dtype)


def _log(probability: float) -> float:
  return math.log(probability) if probability > 0 else -math.inf


def _static(call: str, name: str, value: Any) -> float:
  """A Python float, which no wrapper traces or casts to the parameters' dtype."""
  if isinstance(value, numbers.Real) and not isinstance(value, bool):
    return float(value)
  raise TypeError(
    f"{call.removesuffix('()')}({name}=...) must be a Python number, got {value!r} of "
    f"type {type(value).__name__}: it is fixed when the program is traced."
  )


def _uniform(call: str, num_heads: int, dtype: DTypeLike) -> jax.Array:
  check_count(call, "num_heads", num_heads)
  dtype = jax.dtypes.canonicalize_dtype(dtype)
  dtype = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32
  return jnp.full((num_heads,), -math.log(num_heads), dtype)


def _observation(
  call: str, scale: float, weights: jax.Array, head_log_likelihoods: ArrayLike
) -> jax.Array:
  """Scaled log-likelihoods minus the best head's; ``-inf`` for diverged heads.

  A head that was not observed gets the likelihood of the mixture of the others.
  """
  # Only differences count. Subtracting the best first keeps the weights' digits when
  # the log-likelihoods are large, and can overflow only to the -inf of a diverged head.
  values = jnp.asarray(head_log_likelihoods)
  if values.shape != weights.shape:
    raise ValueError(
      f"{call.removesuffix('()')}(head_log_likelihoods=...) must have shape "
      f"{weights.shape}, one mean log-likelihood a head, got {values.shape}."
    )
  values = values.astype(weights.dtype)
  unseen, finite = jnp.isnan(values), jnp.isfinite(values)
  # Two numbers of one reduction: the best, and 0 if any head was seen.
  rows = jnp.stack(
    [jnp.where(finite, values, -jnp.inf), jnp.where(unseen, -jnp.inf, 0)]
  )
  best, seen = rows.max(axis=1)
  scaled = jnp.where(finite, scale * (_or_zero(values) - _or_zero(best)), -jnp.inf)
  # The mixture of the others, and 0 where these have no weight at all.
  weights = jnp.where(unseen, -jnp.inf, weights)
  mass, others = jax.nn.logsumexp(jnp.stack([weights, weights + scaled]), axis=1)
  none_has_weight = (mass == -jnp.inf) & (seen == 0)
  others = jnp.where(none_has_weight, 0.0, others - _or_zero(mass))
  return jnp.where(unseen, others, scaled)


def _or_zero(values: jax.Array) -> jax.Array:
  return jnp.where(jnp.isfinite(values), values, 0.0)


def _unless_impossible(total: jax.Array, new: Any, old: Any) -> Any:
  """The old state if the observation left no weight to any head, else the new one."""
  return jax.tree.map(functools.partial(jnp.where, jnp.isfinite(total)), new, old)


def _normalised(log_weights: jax.Array) -> jax.Array:
  # Also makes the weight of a single head exactly 1.
  return log_weights - _or_zero(jax.nn.logsumexp(log_weights))
