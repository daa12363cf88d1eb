"""Which heads are best, and for how long one has been: when to collapse."""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from . import _checks
from ._heads import TrackHeadsState
from ._readings import posteriors
from ._state import find_state


def best_heads(opt_state: Any, keep: int = 1) -> tuple[int, ...]:
  """Returns the heads with the largest posterior weights, to be kept.

  Args:
    opt_state: State of an optimizer that holds one :func:`track_heads`, its values
      known: outside of ``jax.jit``.
    keep: How many, 1 to ``num_heads``.

  Returns:
    Their indices, ascending. Of heads with equal weights, the slower are better. For
    several MultiHeads, the best in the product of their posteriors.

  Raises:
    ValueError: ``keep`` is below 1 or above ``num_heads``; ``opt_state`` holds no
      posterior, or one for each of several seeds.
    TypeError: ``keep`` is no integer, or the posterior is traced.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"bias": jnp.ones((3, 2))}}}
    >>> tracker = alrao.track_heads()
    >>> _, state = tracker.update(params, tracker.init(params), params,
    ...                           head_log_likelihoods=jnp.array([-2.0, -1.0, -1.5]))
    >>> alrao.best_heads(state, keep=2)
    (1, 2)
  """
  _checks.check_count("best_heads()", "keep", keep)
  find_state(opt_state, TrackHeadsState, "track_heads")  # an error, if there is none
  each = list(posteriors("best_heads()", opt_state).values())
  if any(isinstance(weights, jax.core.Tracer) for weights in each):
    raise TypeError(
      "best_heads(opt_state) must know the posterior, got traced values: it fixes the "
      "shapes of what is kept. Call it (or collapse(..., keep=1)) outside of jax.jit, "
      "and give the indices to what is compiled."
    )
  joint = np.sum([np.asarray(weights, np.float64) for weights in each], axis=0)
  if keep > joint.size:
    raise ValueError(
      f"best_heads(keep=...) must be at most num_heads = {joint.size}, got {keep}."
    )
  return tuple(sorted(np.argsort(-joint, stable=True)[:keep].tolist()))


class Leader(NamedTuple):
  """Who leads and for how long; see :func:`follow_leader`.

  Attributes:
    head: int32 scalar, the head with the largest weight.
    steps: int32 scalar, for how many calls in a row it has had a weight of at least
      the threshold.
  """

  head: jax.Array
  steps: jax.Array


def follow_leader(
  log_weights: ArrayLike, last: Leader | None = None, *, threshold: float = 0.95
) -> Leader:
  """Counts for how many steps in a row one head has had almost all the weight.

  It tells when to :func:`collapse`, without a look at values in each step: call it
  in the compiled training step, carry its result, and look at it once in a while. Of
  the numbers here, ``threshold`` and 200 steps, neither is a recommendation: how sure
  to be, and for how long, is the task's::

    leader = alrao.follow_leader(alrao.log_weights(opt_state))     # before training
    leader = alrao.follow_leader(alrao.log_weights(opt_state), leader)  # in each step
    if leader.steps >= 200:                                        # after an epoch
      params, opt_state = alrao.collapse(optimizer, params, opt_state, keep=1)

  Args:
    log_weights: Shape ``(num_heads,)``, from :func:`log_weights`.
    last: What the last call returned; None before the first step.
    threshold: Weight, in ``[0, 1]``, that counts as almost all.

  Returns:
    The new :class:`Leader`.

  Raises:
    ValueError: ``threshold`` lies outside ``[0, 1]``; ``log_weights`` has another
      number of axes than one.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> leader = None
    >>> for weight in (0.5, 0.97, 0.99):
    ...   log_weights = jnp.log(jnp.array([1 - weight, weight]))
    ...   leader = alrao.follow_leader(log_weights, leader)
    >>> int(leader.head), int(leader.steps)
    (1, 2)
  """
  _checks.check_probability("follow_leader()", "threshold", threshold)
  weights = jnp.asarray(log_weights)
  if weights.ndim != 1:
    raise ValueError(
      "follow_leader(log_weights=...) must have shape (num_heads,), got "
      f"{weights.shape}. Of several MultiHeads, follow each by itself."
    )
  head = jnp.argmax(weights).astype(jnp.int32)
  steps = jnp.zeros([], jnp.int32)
  if last is not None:
    steps = jnp.where(head == last.head, last.steps, steps)
  leads = jnp.exp(weights[head]) >= threshold
  return Leader(head, jnp.where(leads, optax.safe_increment(steps), 0))
