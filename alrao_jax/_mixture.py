r"""Likelihood and predictions of a mixture of heads.

With head weights :math:`a_j` the model predicts :math:`p(y) = \sum_j a_j p_j(y)`
(arXiv 1810.01322, section 3).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._routing import HeadOutputs, closure_convert


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
    arXiv 1810.01322, section 3 and Algorithm 1.
  """
  call = "mixture_loss()"
  check_heads(call, heads, log_weights)
  return routed_loss(call, heads, log_prob, log_weights, weights)


def mixture_log_probs(heads: HeadOutputs, log_weights: jax.Array) -> jax.Array:
  r"""Log-probabilities of a mixture of softmax classifiers.

  A head whose probabilities are NaN for an example is left out there, and the weights
  are renormalised over the others.

  Args:
    heads: logits of shape ``(num_heads, ..., num_classes)``.
    log_weights: logs of the heads' weights, ``(num_heads,)``.

  Returns:
    :math:`\log \sum_j a_j p_j(c)`, shape ``(..., num_classes)``, in at least float32;
    NaN where every head is NaN. Its gradient goes to the features, not to the heads.

  Raises:
    TypeError: ``heads`` is not `HeadOutputs` of one array.
    ValueError: ``log_weights`` have another shape.

  Example:
    >>> import jax.numpy as jnp
    >>> from alrao_jax import HeadOutputs, mixture_log_probs
    >>> logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))  # 2 heads, 2 classes
    >>> heads = HeadOutputs(shared=logits, own=logits)
    >>> log_probs = mixture_log_probs(heads, jnp.log(jnp.array([0.5, 0.5])))
    >>> [round(p, 3) for p in jnp.exp(log_probs).tolist()]
    [0.375, 0.625]
  """
  call = "mixture_log_probs()"
  check_heads(call, heads, log_weights)
  logits = one_array(call, heads.shared)
  log_probs = jax.nn.log_softmax(logits.astype(loss_dtype(logits)))
  good = ~jnp.isnan(log_probs).any(axis=-1, keepdims=True)
  log_a = _renormalised(log_weights, good, log_probs.dtype)
  terms = log_a + jnp.where(good, log_probs, 0)
  # Excluded classes (-inf in all heads) would make NaN in the gradient of logsumexp.
  possible = (terms != -jnp.inf).any(axis=0)
  log_probs = jax.nn.logsumexp(jnp.where(possible[None], terms, 0), axis=0)
  return jnp.where(possible, log_probs, -jnp.inf)


def mixture_mean(
  heads: HeadOutputs,
  log_weights: jax.Array,
  link: Callable[[Any], jax.Array] | None = None,
) -> jax.Array:
  r"""Mean prediction of a mixture, :math:`\sum_j a_j\, \text{link}(\text{outputs}_j)`.

  Entries that are not finite in a head are left out there, and the weights are
  renormalised over the others.

  Args:
    heads: outputs with leading axis ``num_heads``.
    log_weights: logs of the heads' weights, ``(num_heads,)``.
    link: what to average, a function of one head's outputs: `jax.nn.sigmoid` for the
      probabilities of yes-no labels, ``lambda outputs: outputs[0]`` for the means of
      heads that return ``(mean, log_scale)``. By default the outputs.

  Returns:
    The mean, of the shape of ``link``'s result, in at least float32; NaN where no head
    is finite. Its gradient goes to the features, not to the heads.

  Raises:
    TypeError: ``heads`` is not `HeadOutputs`, or what is averaged is not one array.
    ValueError: ``log_weights`` have another shape.

  Example:
    >>> import jax.numpy as jnp
    >>> from alrao_jax import HeadOutputs, mixture_mean
    >>> means = jnp.array([[1.0], [2.0], [jnp.nan]])  # 3 heads, 1 output
    >>> heads = HeadOutputs(shared=means, own=means)
    >>> mixture_mean(heads, jnp.log(jnp.array([0.2, 0.2, 0.6]))).tolist()
    [1.5]
  """
  call = "mixture_mean()"
  check_heads(call, heads, log_weights)
  values = heads.shared if link is None else jax.vmap(link)(heads.shared)
  values = one_array(call, values)
  values = values.astype(loss_dtype(values))
  good = jnp.isfinite(values)
  weights = jnp.exp(_renormalised(log_weights, good, values.dtype))
  return (weights * jnp.where(good, values, 0)).sum(axis=0)


def _renormalised(log_weights: Any, good: jax.Array, dtype: Any) -> jax.Array:
  """Log-weights of the good heads, which sum to one at each entry of ``good``."""
  log_weights = jax.lax.stop_gradient(jnp.asarray(log_weights).astype(dtype))
  column = log_weights.reshape((-1,) + (1,) * (good.ndim - 1))
  return jax.nn.log_softmax(jnp.where(good, column, -jnp.inf), axis=0)


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
  converted, closed_over = closure_convert(evaluate, heads.shared)
  shared = converted(closed_over, heads.shared)
  own = converted(jax.lax.stop_gradient(closed_over), heads.own)
  weights = example_weights(call, weights, shared.shape[1:], shared.dtype)
  used = weights[None] != 0
  shared, own = jnp.where(used, shared, 0), jnp.where(used, own, 0)
  divisor = weights.sum() if total is None else total
  divisor = jnp.where(divisor == 0, 1, divisor)

  own_weights, own_divisor = jax.lax.stop_gradient((weights, divisor))
  own = (own_weights[None] * own).sum(axis=tuple(range(1, own.ndim))) / own_divisor
  alive = jnp.isfinite(own)
  own = jnp.where(alive, own, 0)

  log_weights = jax.lax.stop_gradient(jnp.asarray(log_weights).astype(shared.dtype))
  present = alive & (log_weights != -jnp.inf)
  log_a = jax.nn.log_softmax(jnp.where(present, log_weights, -jnp.inf))
  column = (-1,) + (1,) * weights.ndim
  joint = jnp.where(present.reshape(column), log_a.reshape(column) + shared, -jnp.inf)
  nll = -(weights * jax.nn.logsumexp(joint, axis=0)).sum() / divisor
  nll = jnp.where(present.any(), nll, jnp.inf)

  # Equal values cancel head by head: their sum, up to 1e8, would round the nll away.
  loss = nll + (jax.lax.stop_gradient(own) - own).sum()
  info = MixtureInfo(nll, jnp.where(alive, own, -jnp.inf), alive)
  return loss, jax.lax.stop_gradient(info)


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
