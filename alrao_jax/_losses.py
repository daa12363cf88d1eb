"""Ready-made losses: softmax, sigmoid and Gaussian heads."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._checks import check_positive, check_probability, is_concrete
from ._mixture import (
  MixtureInfo,
  as_array,
  check_heads,
  example_weights,
  loss_dtype,
  one_array,
  routed_loss,
)
from ._routing import HeadOutputs


def classification_loss(
  heads: HeadOutputs,
  labels: Any,
  log_weights: jax.Array,
  *,
  label_smoothing: Any = 0.0,
  weights: Any = None,
) -> tuple[jax.Array, MixtureInfo]:
  r"""Cross-entropy of a mixture of softmax classifiers.

  Soft targets and smoothed labels :math:`t_c` make each class a weighted observation:
  the loss is the mixture's cross-entropy, :math:`-\sum_c t_c \log \sum_j a_j p_j(c)`.

  Args:
    heads: logits of shape ``(num_heads, ..., num_classes)``. A logit of ``-inf``
      excludes its class.
    labels: integers of shape ``(...)``, of any integer dtype, or probabilities (one-hot
      or soft) of shape ``(..., num_classes)``. Integers out of range do as in
      `optax.losses.softmax_cross_entropy_with_integer_labels`: from ``-num_classes`` to
      -1 they count from the end, all others make NaN, which here puts every head out
      (loss ``inf``). Under weight 0 any label will do.
    log_weights: logs of the heads' weights, ``(num_heads,)``.
    label_smoothing: share of each target spread evenly over the classes, in [0, 1];
      0 where classes are excluded, whose share would cost an infinite loss.
    weights: weight of each example, of shape ``(...)``, as in `mixture_loss`.

  Returns:
    The loss (mean over examples) and `MixtureInfo`, as `mixture_loss`.

  Raises:
    TypeError: ``heads`` is not `HeadOutputs` of one array, or labels of the shape of
      integer labels are no integers.
    ValueError: shapes differ, or ``label_smoothing`` lies outside [0, 1].

  Example:
    >>> import jax.numpy as jnp
    >>> from alrao_jax import HeadOutputs, classification_loss
    >>> logits = jnp.zeros((10, 8, 4))  # 10 heads, 8 examples, 4 classes
    >>> heads = HeadOutputs(shared=logits, own=logits)
    >>> log_weights = jnp.log(jnp.full(10, 0.1))
    >>> loss, _ = classification_loss(heads, jnp.arange(8) % 4, log_weights)
    >>> round(float(jnp.exp(loss)), 4)
    4.0

  Reference:
    arXiv 1810.01322, Algorithm 1.
  """
  call = "classification_loss()"
  check_heads(call, heads, log_weights)
  logits = one_array(call, heads.shared)
  check_probability(call, "label_smoothing", label_smoothing)
  labels, dtype = jnp.asarray(labels), loss_dtype(logits)
  batch, num_classes = logits.shape[1:-1], logits.shape[-1]
  if labels.shape == batch:
    if not jnp.issubdtype(labels.dtype, jnp.integer):
      raise TypeError(
        f"classification_loss(labels=...) of shape {labels.shape} must be integers, "
        f"got {labels.dtype}: write labels.astype(int), or give one-hot labels."
      )
    labels = labels.astype(jnp.int32)
    labels = jnp.where(labels < 0, labels + num_classes, labels)
    in_range = (labels >= 0) & (labels < num_classes)
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=bool)
    if is_concrete(label_smoothing) and label_smoothing == 0:

      def log_prob(logits):
        logits = logits.astype(dtype)
        # A masked sum fuses with the softmax, where a gather's gradient is a scatter.
        chosen = jnp.where(one_hot, logits, 0).sum(axis=-1)
        return jnp.where(in_range, chosen - jax.nn.logsumexp(logits, axis=-1), jnp.nan)

      return routed_loss(call, heads, log_prob, log_weights, weights)
    targets = jnp.where(in_range[..., None], one_hot.astype(dtype), jnp.nan)
  elif labels.shape == logits.shape[1:]:
    targets = labels.astype(dtype)
  else:
    raise ValueError(
      f"classification_loss(labels=...) must have the shape of the examples, {batch}, "
      f"or of one head's logits, {logits.shape[1:]}, got {labels.shape}."
    )
  targets = optax.losses.smooth_labels(targets, jnp.asarray(label_smoothing, dtype))
  weights = example_weights(call, weights, batch, dtype)
  class_weights = jnp.where(weights[..., None] != 0, weights[..., None] * targets, 0)
  return routed_loss(
    call,
    heads,
    lambda logits: jax.nn.log_softmax(logits.astype(dtype)),
    log_weights,
    class_weights,
    total=weights.sum(),
  )


def binary_loss(
  heads: HeadOutputs,
  labels: Any,
  log_weights: jax.Array,
  *,
  weights: Any = None,
) -> tuple[jax.Array, MixtureInfo]:
  r"""Sigmoid cross-entropy of a mixture, for one or several yes-no labels an example.

  The labels of one example are one observation: a head's log-likelihood is the sum of
  its :math:`\log p_j(y_l)` over the labels, and the heads are mixed after that sum.

  Args:
    heads: logits of shape ``(num_heads, ..., num_labels)``, or ``(num_heads, batch)``
      for one label an example (a sequence of them needs a last axis of length 1).
    labels: 0 or 1, of any dtype, of the shape of one head's logits. In between, a label
      weighs the two log-probabilities of its head.
    log_weights: logs of the heads' weights, ``(num_heads,)``.
    weights: weight of each example, of the labels' shape without the axis of labels,
      as in `mixture_loss`.

  Returns:
    The loss (sum over labels, mean over examples) and `MixtureInfo`, as `mixture_loss`.

  Raises:
    TypeError: ``heads`` is not `HeadOutputs` of one array.
    ValueError: shapes differ.

  Example:
    >>> import jax.numpy as jnp
    >>> from alrao_jax import HeadOutputs, binary_loss
    >>> logits = jnp.zeros((10, 8, 3))  # 10 heads, 8 examples, 3 labels
    >>> heads = HeadOutputs(shared=logits, own=logits)
    >>> loss, _ = binary_loss(heads, jnp.ones((8, 3)), jnp.log(jnp.full(10, 0.1)))
    >>> round(float(jnp.exp(loss)), 4)
    8.0
  """
  call = "binary_loss()"
  check_heads(call, heads, log_weights)
  logits = one_array(call, heads.shared)
  dtype = loss_dtype(logits)
  labels = as_array(call, "labels", labels, logits.shape[1:], dtype)

  def log_prob(logits):
    losses = optax.losses.sigmoid_binary_cross_entropy(logits.astype(dtype), labels)
    return -_sum_outputs(losses)

  return routed_loss(call, heads, log_prob, log_weights, weights)


def regression_loss(
  heads: HeadOutputs,
  targets: Any,
  log_weights: jax.Array,
  *,
  noise_scale: Any = 1.0,
  weights: Any = None,
) -> tuple[jax.Array, MixtureInfo]:
  r"""Negative log-likelihood of a mixture of Gaussians.

  .. math::
    \log p_j(y) = -\sum_d \left( \frac{(y_d - \mu_{jd})^2}{2 \sigma^2} + \log \sigma +
    \tfrac12 \log 2 \pi \right)

  A head may return a pair ``(mean, log_scale)`` and so learn its noise; then
  :math:`\sigma` is ``noise_scale * exp(log_scale)``.

  Args:
    heads: means of shape ``(num_heads, ..., num_outputs)``, or ``(num_heads, batch)``
      for one output an example (a sequence needs a last axis of length 1); or a pair of
      means and log-scales, the latter of a shape that broadcasts to the mean's within
      each head.
    targets: of the shape of one head's means.
    log_weights: logs of the heads' weights, ``(num_heads,)``.
    noise_scale: standard deviation of the noise in the targets' unit, positive; a
      number or an array that broadcasts to the targets' shape. A traced one is a
      parameter of the mixture: it receives the gradient of ``nll``, once.
    weights: weight of each example, of the targets' shape without the axis of outputs,
      as in `mixture_loss`.

  Returns:
    The loss (sum over outputs, mean over examples) and `MixtureInfo`, as
    `mixture_loss`.

  Raises:
    TypeError: ``heads`` is not `HeadOutputs` of one array or a pair.
    ValueError: shapes differ, or ``noise_scale`` is not positive.

  Example:
    >>> import jax.numpy as jnp
    >>> from alrao_jax import HeadOutputs, regression_loss
    >>> means = jnp.zeros((10, 8, 1))  # 10 heads, 8 examples, 1 output
    >>> heads = HeadOutputs(shared=means, own=means)
    >>> log_weights = jnp.log(jnp.full(10, 0.1))
    >>> loss, _ = regression_loss(heads, jnp.zeros((8, 1)), log_weights)
    >>> round(float(loss), 4)  # log(2 pi) / 2
    0.9189
  """
  call = "regression_loss()"
  check_heads(call, heads, log_weights)
  pair = isinstance(heads.shared, tuple) and len(heads.shared) == 2
  means = one_array(call, heads.shared[0] if pair else heads.shared)
  dtype = loss_dtype(means)
  targets = as_array(call, "targets", targets, means.shape[1:], dtype)
  check_positive(call, "noise_scale", noise_scale)
  log_noise = jnp.log(jnp.asarray(noise_scale, dtype))

  def log_prob(outputs):
    mean, log_scale = outputs if pair else (outputs, jnp.zeros((), dtype))
    log_scale = jnp.broadcast_to(log_scale.astype(dtype), targets.shape)
    log_scale = log_scale + jnp.broadcast_to(log_noise, targets.shape)
    z = (targets - mean.astype(dtype)) * jnp.exp(-log_scale)
    return -_sum_outputs(0.5 * z**2 + log_scale + 0.5 * math.log(2 * math.pi))

  return routed_loss(call, heads, log_prob, log_weights, weights)


def _sum_outputs(x: jax.Array) -> jax.Array:
  """Sums over the last axis, unless that is the batch's."""
  return x.sum(axis=-1) if x.ndim > 1 else x
