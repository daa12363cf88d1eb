r"""The likelihood of a mixture of heads, whose gradient also trains the heads.

With head weights :math:`a_j` the model predicts :math:`p(y) = \sum_j a_j p_j(y)`
(arXiv 1810.01322, Algorithm 1).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._closures import closure_convert
from ._routing import HeadOutputs


class MixtureInfo(NamedTuple):
  """What a loss reports beside its value. No gradient flows through it.

  Attributes:
    nll: negative log-likelihood of the mixture, a scalar: the number to report.
      ``inf`` when no head is alive.
    head_log_likelihoods: mean log-likelihood of each head, shape ``(num_heads,)``,
      ``-inf`` for heads that are out. The optimizer's ``update`` takes it.
    alive: whether a head's mean log-likelihood is finite, bool, ``(num_heads,)``.
  """

  nll: jax.Array
  head_log_likelihoods: jax.Array
  alive: jax.Array


def mixture_loss(
  heads: HeadOutputs,
  log_prob: Callable[[Any], jax.Array],
  log_weights: jax.Array,
  *,
  weights: Any = None,
) -> tuple[jax.Array, MixtureInfo]:
  r"""Negative log-likelihood of the mixture, whose gradient also trains the heads.

  .. math::
    \text{nll} &= -\frac{\sum_b w_b \log \sum_j a_j\, p_j(y_b)}{\sum_b w_b} \\
    \text{loss} &= \text{nll} + \sum_j (\text{nll}_j - \text{constant}(\text{nll}_j))

  The first term reads ``heads.shared`` and trains the layers below the heads; each
  ``nll_j``, the loss of head ``j`` alone, reads ``heads.own`` and trains that head.
  The sum over heads is zero, summand by summand: the value is the mixture's, even
  while the own loss of some head is 1e8.

  A head whose mean log-likelihood is not finite is *out*: it has no part in value and
  gradient, and the weights are renormalised over the others. With all heads out, the
  loss is ``inf`` and its gradient zero.

  **Losses that are no likelihood** (hinge, contrastive) go in as ``log_prob = -loss``.
  The mixture is then a soft minimum over heads, ``-log sum_j a_j exp(-loss_j)``, and
  the switch takes ``exp(-loss)`` for a likelihood: the odds of head ``i`` against head
  ``j`` grow by ``exp(loss_j - loss_i)`` a step. The scale of such a loss is an inverse
  temperature; ``likelihood_scale`` of the averaging changes it for the switch alone.

  Args:
    heads: what `MultiHead` or `multi_head` returned.
    log_prob: log-likelihoods under one head, ``log_prob(outputs_j) -> array``, one
      entry an example, of any shape. What it closes over (a trained noise scale)
      receives the gradient of the mixture's term alone.
    log_weights: logs of the heads' weights, ``(num_heads,)``, as from
      ``log_weights(opt_state)``. They are constants to the gradient.
    weights: non-negative or bool, of the shape that ``log_prob`` returns: a mask for
      padding, or sample weights. Log-likelihoods under weight 0 never matter, not even
      NaN; but features must be finite there too, as in any model, since the gradient
      multiplies them by 0. All weights 0 make a loss of 0. By default they are 1.

  Returns:
    The loss, a scalar in at least float32, and `MixtureInfo`.

  Raises:
    TypeError: ``heads`` is not `HeadOutputs`.
    ValueError: ``log_weights`` or ``weights`` have another shape.

  Example:
    >>> import jax.numpy as jnp
    >>> from alrao_jax import HeadOutputs, mixture_loss
    >>> outputs = jnp.array([[0.0, 0.0], [1.0, 1.0]])  # 2 heads, 2 examples
    >>> heads = HeadOutputs(shared=outputs, own=outputs)
    >>> loss, info = mixture_loss(heads, lambda x: -(x**2), jnp.log(jnp.full(2, 0.5)))
    >>> round(float(loss), 4), info.head_log_likelihoods.tolist()
    (0.3799, [0.0, -1.0])

  Reference:
    arXiv 1810.01322, Algorithm 1.
  """
  call = "mixture_loss()"
  check_heads(call, heads, log_weights)
  return routed_loss(call, heads, log_prob, log_weights, weights)


def routed_loss(
  call: str,
  heads: HeadOutputs,
  log_prob: Callable[[Any], jax.Array],
  log_weights: Any,
  weights: Any = None,
  total: jax.Array | None = None,
) -> tuple[jax.Array, MixtureInfo]:
  """`mixture_loss`, dividing by ``total`` instead of the sum of weights if given."""

  def evaluate(outputs):  # (num_heads, *examples)
    values = jax.vmap(log_prob)(outputs)
    return values.astype(loss_dtype(values))

  # What log_prob closes over would receive the gradient of every head's own loss too.
  converted, closed_over, *_ = closure_convert(evaluate, heads.shared)
  own = converted(jax.lax.stop_gradient(closed_over), heads.own)
  weights = example_weights(call, weights, own.shape[1:], own.dtype)
  used = weights[None] != 0
  own = jnp.where(used, own, 0)
  divisor = weights.sum() if total is None else total
  divisor = jnp.where(divisor == 0, 1, divisor)

  own_weights, own_divisor = jax.lax.stop_gradient((weights, divisor))
  own = (own_weights[None] * own).sum(axis=tuple(range(1, own.ndim))) / own_divisor
  alive = jnp.isfinite(own)
  own = jnp.where(alive, own, 0)

  outputs = heads.shared
  if any(jnp.issubdtype(x.dtype, jnp.inexact) for x in closed_over):
    # A zero cotangent times an infinite output is NaN, and would reach what log_prob
    # closes over. (Otherwise XLA computes the two evaluations as one.)
    outputs = with_finite_heads(outputs, alive)
  shared = jnp.where(used, converted(closed_over, outputs), 0)

  log_weights = jax.lax.stop_gradient(jnp.asarray(log_weights).astype(shared.dtype))
  present = alive & (log_weights != -jnp.inf)
  log_a = jax.nn.log_softmax(jnp.where(present, log_weights, -jnp.inf))
  column = (-1,) + (1,) * weights.ndim
  joint = jnp.where(present.reshape(column), log_a.reshape(column) + shared, -jnp.inf)
  joint = jnp.where(present.any(), joint, 0)  # keeps the gradient of weights finite
  nll = -(weights * jax.nn.logsumexp(joint, axis=0)).sum() / divisor
  nll = jnp.where(present.any(), nll, jnp.inf)

  # Equal values cancel head by head: their sum, up to 1e8, would round the nll away.
  loss = nll + (jax.lax.stop_gradient(own) - own).sum()
  info = MixtureInfo(nll, jnp.where(alive, own, -jnp.inf), alive)
  return loss, jax.lax.stop_gradient(info)


def with_finite_heads(outputs: Any, alive: jax.Array) -> Any:
  """Replaces the outputs of heads that are out by an alive head's, or by zeros."""

  def replace(x):
    donor = jnp.where(alive.any(), x[jnp.argmax(alive)], jnp.zeros_like(x[0]))
    return jnp.where(alive.reshape((-1,) + (1,) * (x.ndim - 1)), x, donor[None])

  return jax.tree.map(replace, outputs)


def loss_dtype(x: jax.Array) -> Any:
  """The dtype of log-likelihoods: float32, or float64 for float64 outputs."""
  return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def as_array(
  call: str, name: str, value: Any, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
  """The value as an array of that dtype.

  Raises:
    ValueError: It has another shape.
  """
  if jnp.shape(value) != shape:
    raise ValueError(
      f"{call.removesuffix('()')}({name}=...) must have shape {shape}, got "
      f"{jnp.shape(value)}."
    )
  return jnp.asarray(value).astype(dtype)


def example_weights(
  call: str, weights: Any, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
  """The weights as an array of that shape and dtype, by default ones."""
  if weights is None:
    return jnp.ones(shape, dtype)
  return as_array(call, "weights", weights, shape, dtype)


def check_heads(call: str, heads: Any, log_weights: Any) -> None:
  """Refuses what is not `HeadOutputs`, and weights of another number of heads."""
  call = call.removesuffix("()")
  if not isinstance(heads, HeadOutputs):
    raise TypeError(
      f"{call}(heads=...) must be HeadOutputs, got {type(heads).__name__}: wrap the "
      "model's output layer in MultiHead."
    )
  if jnp.shape(log_weights) != (heads.num_heads,):
    raise ValueError(
      f"{call}(log_weights=...) must have shape {(heads.num_heads,)}, one entry a "
      f"head, got {jnp.shape(log_weights)}: write log_weights(opt_state), of an "
      "optimizer initialised with this model's parameters."
    )


def one_array(call: str, outputs: Any) -> jax.Array:
  """Heads' outputs that must be a single array, not a tree of them.

  Raises:
    TypeError: They are a tree.
  """
  if not jax.tree_util.treedef_is_leaf(jax.tree.structure(outputs)):
    raise TypeError(
      f"{call} needs heads that return one array, got outputs of type "
      f"{type(outputs).__name__}: choose one, or write a loss with mixture_loss()."
    )
  return jnp.asarray(outputs)
