"""The likelihood of a mixture, whose heads are evaluated a few examples at a time.

With a large vocabulary the outputs of all heads, ``num_heads * batch * vocabulary``
numbers, are most of a training step's memory. Log-likelihoods, one number a head and
example, are all that the mixture needs of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._checks import check_count
from ._closures import closure_convert
from ._mixture import (
  MixtureInfo,
  check_heads,
  example_weights,
  loss_dtype,
  routed_loss,
  with_finite_heads,
)
from ._routing import HeadOutputs

PyTree = Any


def chunked_mixture_loss(
  evaluate: Callable[[Any], HeadOutputs],
  features: PyTree,
  log_prob: Callable[[Any, Any], jax.Array],
  targets: PyTree,
  log_weights: jax.Array,
  *,
  chunk_size: int,
  weights: Any = None,
) -> tuple[jax.Array, MixtureInfo]:
  """`mixture_loss` without the outputs of all heads in memory at once.

  Heads and log-likelihoods are evaluated for ``chunk_size`` examples at a time, and
  again in the backward pass. Value and gradient are those of `mixture_loss` up to
  rounding, which heads are out included; the price is one more evaluation of the heads.

  Args:
    evaluate: the heads, a function of the features of a chunk that returns
      `HeadOutputs`: what calls `MultiHead` or `multi_head`. It may close over the
      parameters. Examples must not depend on each other (as in a BatchNorm).
    features: what the heads receive, any pytree of arrays with the examples on axis 0:
      of a sequence, all positions flattened.
    log_prob: log-likelihoods under one head, ``log_prob(outputs_j, targets)``, one
      entry an example of the chunk. What it closes over (a trained noise scale)
      receives the gradient of the mixture's term alone, as in `mixture_loss`.
    targets: any pytree of arrays with the examples on axis 0, without gradient.
    log_weights: logs of the heads' weights, ``(num_heads,)``.
    chunk_size: number of examples at a time, at least 1. The last chunk takes the rest.
    weights: weight of each example, of shape ``(examples,)``, as in `mixture_loss`.

  Returns:
    The loss (mean over examples) and `MixtureInfo`, as `mixture_loss`.

  Raises:
    TypeError: ``evaluate`` does not return `HeadOutputs`, or ``chunk_size`` is no int.
    ValueError: ``chunk_size`` is below 1, the arrays disagree on the number of
      examples, or shapes are not as said.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from alrao_jax import multi_head
    >>> kernels = jnp.zeros((10, 3, 5000))  # 10 heads, 3 features, 5,000 words
    >>> loss, _ = chunked_mixture_loss(
    ...   lambda x: multi_head(lambda k, x: x @ k, kernels, x), jnp.ones((6, 3)),
    ...   lambda x, y: -optax.losses.softmax_cross_entropy_with_integer_labels(x, y),
    ...   jnp.arange(6), jnp.log(jnp.full(10, 0.1)), chunk_size=2)
    >>> round(float(jnp.exp(loss)))
    5000

  Reference:
    arXiv 1810.01322, Algorithm 1.
  """
  call = "chunked_mixture_loss()"
  check_count(call, "chunk_size", chunk_size)
  count = _num_examples(features, targets)
  used = None
  if weights is not None:
    used = example_weights(call, weights, (count,), jnp.float32) != 0

  def chunk(inputs):
    features, targets, used = inputs
    heads = evaluate(features)
    check_heads(call, heads, log_weights)
    targets = jax.lax.stop_gradient(targets)

    def each_head(outputs):
      values = jax.vmap(lambda outputs: log_prob(outputs, targets))(outputs)
      return values.astype(loss_dtype(values))

    converted, closed_over, *_ = closure_convert(each_head, heads.shared)
    own = converted(jax.lax.stop_gradient(closed_over), heads.own)
    size = jax.tree.leaves(targets)[0].shape[0]
    if own.shape != (heads.num_heads, size):
      raise ValueError(
        f"chunked_mixture_loss(log_prob=...) must return shape {(size,)} for {size} "
        f"examples, got {own.shape[1:]}: one log-likelihood an example."
      )
    outputs = heads.shared
    if any(jnp.issubdtype(x.dtype, jnp.inexact) for x in closed_over):
      matters = own if used is None else jnp.where(used[None], own, 0)
      outputs = with_finite_heads(outputs, jnp.isfinite(matters).all(axis=1))
    return HeadOutputs(shared=converted(closed_over, outputs), own=own)

  rest = count % chunk_size
  inputs = (features, targets, used)
  pieces = []
  if count > rest:
    split = jax.tree.map(
      lambda x: x[: count - rest].reshape(-1, chunk_size, *x.shape[1:]), inputs
    )
    # Within a loop nothing merges what is computed with what is computed again.
    stacked = jax.lax.map(jax.checkpoint(chunk, prevent_cse=False), split)
    pieces.append(
      jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1), stacked)
    )
  if rest:
    last = jax.tree.map(lambda x: x[count - rest :], inputs)
    pieces.append(jax.checkpoint(chunk)(last))
  heads = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *pieces)
  return routed_loss(call, heads, lambda x: x, log_weights, weights)


def _num_examples(features: PyTree, targets: PyTree) -> int:
  """The length of axis 0, the same in all leaves, of which `targets` has some."""
  leaves = jax.tree.leaves((features, targets))
  lengths = sorted({jnp.shape(x)[0] if jnp.ndim(x) else None for x in leaves}, key=str)
  if len(lengths) != 1 or not lengths[0] or not jax.tree.leaves(targets):
    raise ValueError(
      "chunked_mixture_loss(features=..., targets=...) must be arrays with the same "
      f"number of examples on axis 0, at least 1, got lengths {lengths}. Flatten the "
      "positions of sequences: features.reshape(-1, features.shape[-1])."
    )
  return lengths[0]
