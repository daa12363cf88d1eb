r"""Losses of a mixture of heads; their gradient also trains each head.

With head weights :math:`a_j` the model predicts :math:`p(y) = \sum_j a_j p_j(y)`
(arXiv 1810.01322, Algorithm 1).
"""

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import check_count, check_positive, check_probability, is_concrete
from ._judges import judge_mask
from ._multi_head import HeadOutputs, closure_convert, in_chunks, on_every_device


class MixtureInfo(NamedTuple):
  """What a loss reports next to its value. No gradient flows through it.

  Attributes:
    nll: Negative log-likelihood of the mixture, a scalar: the number to report.
      ``inf`` when all heads have diverged.
    head_log_likelihoods: Mean log-likelihood of each head, shape ``(num_heads,)``, over
      the judges if there is a mask of them: ``-inf`` for a diverged head, NaN for every
      other head if no example, or no judge, has a weight. The optimizer's ``update``
      takes it.
    healthy: Bool, shape ``(num_heads,)``. False for a diverged head: its mean
      log-likelihood, over all examples, is not finite.
    num_examples: The sum of the examples' weights, of the judges' alone if there is a
      mask of them, a scalar: the weight of this report in a mean with others.
  """

  nll: jax.Array
  head_log_likelihoods: jax.Array
  healthy: jax.Array
  num_examples: jax.Array


def mixture_loss(
  heads: HeadOutputs,
  log_prob: Callable[[Any], jax.Array],
  log_weights: jax.Array,
  *,
  weights: Any = None,
  judges: Any = None,
) -> tuple[jax.Array, MixtureInfo]:
  r"""Negative log-likelihood of the mixture; its gradient also trains each head.

  .. math::
    \text{nll} &= -\frac{\sum_b w_b \log \sum_j a_j\, p_j(y_b)}{\sum_b w_b} \\
    \text{loss} &= \text{nll} + \sum_j (\text{nll}_j - \text{constant}(\text{nll}_j))

  The first term reads ``heads.shared`` and trains the layers below the heads; each
  ``nll_j``, the loss of head ``j`` alone, reads ``heads.own`` and trains that head.
  Each summand of the sum over heads is zero, so the value is the mixture's, even if the
  loss of some head is 1e8.

  A head has *diverged* if its mean log-likelihood is not finite. It has no part in
  value and gradient, and the weights are renormalised over the others. If all heads
  have diverged, the loss is ``inf`` and its gradient zero.

  **Judges** do not train: value and gradient are means over the other examples, and
  ``head_log_likelihoods`` those of the judges. A batch without a judge is no
  observation, and the posterior stands; a head that diverges on any example is told.
  Judges pass through the network with the rest of their batch, so they have a part in
  the statistics of a batch normalisation.

  **Several batches in one step** are averaged with the weights ``info.num_examples``,
  without batches that observed nothing and those that a wrapper skips: under
  :class:`optax.MultiSteps` over the micro-batches so far, under :func:`jax.shard_map`
  by :func:`jax.lax.psum` over the devices::

    seen = jnp.isfinite(info.head_log_likelihoods).any()
    report = info.num_examples * info.head_log_likelihoods
    total += jnp.where(seen, report, 0)  # or psum(jnp.where(...), "data")
    count += jnp.where(seen, info.num_examples, 0)
    mean = total / count  # NaN of 0 / 0: nothing seen, as in a single report

  **Losses that are no likelihood** (hinge, contrastive) go in as ``log_prob = -loss``.
  The mixture is then a soft minimum over heads, ``-log sum_j a_j exp(-loss_j)``, and
  the switch takes ``exp(-loss)`` for a likelihood: the odds of head ``i`` against head
  ``j`` grow by ``exp(loss_j - loss_i)`` a step. The scale of such a loss is an inverse
  temperature; ``likelihood_scale`` of the averaging changes it for the switch alone.

  Args:
    heads: What :class:`~alrao_jax.linen.MultiHead` or :func:`multi_head` returned.
    log_prob: Log-likelihoods under one head, ``log_prob(outputs_j) -> array``, one
      entry an example, of any shape. What it closes over (a trained noise scale)
      receives only the gradient of the mixture's term.
    log_weights: Logs of the heads' weights, ``(num_heads,)``, as from
      ``log_weights(opt_state)``. The gradient treats them as constants.
    weights: Non-negative or bool, in the shape that ``log_prob`` returns: a mask for
      padding, or sample weights; 1 by default. Log-likelihoods of weight 0 never
      matter, not even NaN. But features must be finite there too, as in any model,
      since the gradient multiplies them by 0. If all weights are 0, the loss is 0 and
      the report NaN, which moves no posterior.
    judges: Bool mask of the examples that do not train and alone tell the posterior, as
      from :func:`judges`, in the shape that ``log_prob`` returns or of its first axes;
      none by default, and all examples do both.

  Returns:
    The loss, a scalar in at least float32, and :class:`MixtureInfo`.

  Raises:
    TypeError: If ``heads`` is not :class:`HeadOutputs`, or ``judges`` not bool.
    ValueError: If ``log_weights``, ``weights`` or ``judges`` have another shape.

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
  return routed_loss(call, heads, log_prob, log_weights, weights, judges)


def routed_loss(
  call: str,
  heads: HeadOutputs,
  log_prob: Callable[[Any], jax.Array],
  log_weights: Any,
  weights: Any = None,
  judges: Any = None,
  *,
  counted: jax.Array | None = None,
) -> tuple[jax.Array, MixtureInfo]:
  """:func:`mixture_loss`, divided by the sum of ``counted`` instead of ``weights``.

  ``counted`` has the examples' shape, which that of ``weights`` begins with.
  """

  def evaluate(outputs):  # (num_heads, *examples)
    values = jax.vmap(log_prob)(outputs)
    return values.astype(loss_dtype(call, values))

  # Otherwise the closed-over values would get the gradient of every head's own loss.
  converted, closed_over, *_ = closure_convert(evaluate, heads.shared)
  constant = jax.lax.stop_gradient
  values = converted(constant(closed_over), constant(heads.own))
  weights = example_weights(call, weights, values.shape[1:], values.dtype)
  counts = weights if counted is None else counted

  def total_of(counts):
    total = counts.sum()
    return total, jnp.where(total == 0, 1, total)

  def mean(values, weights, divisor):
    weighted = constant(weights)[None] * jnp.where(weights[None] != 0, values, 0)
    sums = weighted.sum(axis=tuple(range(1, values.ndim)))
    return on_every_device(sums) / constant(divisor)

  num_examples, divisor = total_of(counts)
  # Judges too: a head that is not finite on what trains must be found out.
  healthy = jnp.isfinite(mean(values, weights, divisor))
  if judges is not None:
    judges = judge_mask(call, judges, counts.shape)
    among = judges.reshape(judges.shape + (1,) * (weights.ndim - judges.ndim))
    num_examples, by_judges = total_of(jnp.where(judges, counts, 0))
    evidence = jnp.where(among, weights, 0)
    verdict = jnp.where(healthy, mean(values, evidence, by_judges), -jnp.inf)
    verdict = jnp.where(healthy & ~(evidence != 0).any(), jnp.nan, verdict)
    weights = jnp.where(among, 0, weights)
    divisor = total_of(jnp.where(judges, 0, counts))[1]
  used = weights[None] != 0
  # XLA computes the three evaluations, which only differ in their gradient, as one.
  heads = trained_where_finite(heads, healthy, values)
  own = mean(converted(constant(closed_over), heads.own), weights, divisor)
  own = jnp.where(healthy, own, 0)
  outputs = heads.shared
  if any(jnp.issubdtype(x.dtype, jnp.inexact) for x in closed_over):
    # A zero cotangent times an infinite output is NaN, which would reach the values
    # that log_prob closes over.
    outputs = with_finite_outputs(outputs, healthy, values)
  shared = jnp.where(used, converted(closed_over, outputs), 0)

  log_weights = constant(jnp.asarray(log_weights).astype(shared.dtype))
  present = healthy & (log_weights != -jnp.inf)
  log_a = jax.nn.log_softmax(jnp.where(present, log_weights, -jnp.inf))
  present, log_a = on_every_device(present), on_every_device(log_a)
  column = (-1,) + (1,) * weights.ndim
  joint = jnp.where(present.reshape(column), log_a.reshape(column) + shared, -jnp.inf)
  joint = jnp.where(present.any(), joint, 0)  # keeps the gradient of weights finite
  nll = -(weights * jax.nn.logsumexp(joint, axis=0)).sum() / divisor
  nll = jnp.where(present.any(), nll, jnp.inf)

  # Subtract head by head: a sum of up to 1e8 would round the nll away.
  loss = nll + (constant(own) - own).sum()
  if judges is None:
    verdict = jnp.where(used.any(), jnp.where(healthy, own, -jnp.inf), jnp.nan)
  return loss, constant(MixtureInfo(nll, verdict, healthy, num_examples))


def trained_where_finite(
  heads: HeadOutputs, healthy: jax.Array, values: jax.Array
) -> HeadOutputs:
  """Stops the gradient of outputs that make no finite log-likelihood.

  Their cotangent is zero (the head has diverged, or the example has no weight). Times
  an infinite derivative it would be NaN, which :func:`multi_head` would take for an
  overflow.

  Args:
    heads: The outputs.
    healthy: Shape ``(num_heads,)``; diverged heads get no gradient at all.
    values: What the outputs make, shape ``(num_heads, *examples)``. An array of outputs
      that begins with this shape gets no gradient where ``values`` are not finite.

  Returns:
    Equal outputs.
  """

  def gate(x):
    if not jnp.issubdtype(x.dtype, jnp.inexact):
      return x
    return jnp.where(_trusted(x, healthy, values), x, jax.lax.stop_gradient(x))

  return heads.map(gate)


def with_finite_outputs(outputs: Any, healthy: jax.Array, values: jax.Array) -> Any:
  """Replaces outputs that make no finite log-likelihood by a healthy head's.

  If that head has none either, it takes zeros. See :func:`trained_where_finite`.
  """

  def replace(x):
    trusted = _trusted(x, healthy, values)
    j = jnp.argmax(healthy)
    donor = jnp.where(trusted[j], x[j], 0)
    return jnp.where(trusted, x, donor[None])

  return jax.tree.map(replace, outputs)


def _trusted(x: jax.Array, healthy: jax.Array, values: jax.Array) -> jax.Array:
  """Which entries may make a finite log-likelihood, an array with x.ndim axes."""
  if x.shape[: values.ndim] == values.shape:
    healthy = healthy.reshape((-1,) + (1,) * (values.ndim - 1)) & jnp.isfinite(values)
  return healthy.reshape(healthy.shape + (1,) * (x.ndim - healthy.ndim))


def loss_dtype(call: str, x: jax.Array) -> Any:
  """The dtype of log-likelihoods: float32, or float64 for float64 outputs.

  Raises:
    TypeError: If the outputs are complex.
  """
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    raise TypeError(
      f"{call} needs real numbers, got {x.dtype}. Make the outputs of the heads real: "
      "heads.map(jnp.abs), or heads.map(lambda x: jnp.concatenate([x.real, x.imag], "
      "-1)), with targets alike."
    )
  return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def as_array(
  call: str, name: str, value: Any, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
  """The value as an array of that dtype.

  Raises:
    TypeError: If it is complex.
    ValueError: If it has another shape.
  """
  value = as_given(value)
  if np.iscomplexobj(value):
    raise TypeError(
      f"{call.removesuffix('()')}({name}=...) must be real, got {value.dtype}. Write "
      "jnp.concatenate([x.real, x.imag], -1), of the heads' outputs too."
    )
  if value.shape != shape:
    raise ValueError(
      f"{call.removesuffix('()')}({name}=...) must have shape {shape}, got "
      f"{value.shape}."
    )
  with np.errstate(over="ignore"):
    return jnp.asarray(value.astype(dtype))


def as_given(value: Any) -> Any:
  """JAX arrays as they are, others as NumPy arrays, which keep their 64 bits."""
  if isinstance(value, jax.Array) or hasattr(value, "__jax_array__"):
    return jnp.asarray(value)
  return np.asarray(value)


def example_weights(
  call: str, weights: Any, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
  """The weights as an array of that shape and dtype; ones by default."""
  if weights is None:
    return jnp.ones(shape, dtype)
  return as_array(call, "weights", weights, shape, dtype)


def check_heads(call: str, heads: Any, log_weights: Any) -> None:
  """Refuses other types than :class:`HeadOutputs`, and weights of other heads."""
  call = call.removesuffix("()")
  if not isinstance(heads, HeadOutputs):
    raise TypeError(
      f"{call}(heads=...) must be HeadOutputs, got {type(heads).__name__}: wrap the "
      "model's output layer in MultiHead."
    )
  heads.check_axis(f"{call}(heads=...)")
  if jnp.shape(log_weights) != (heads.num_heads,):
    raise ValueError(
      f"{call}(log_weights=...) must have shape {(heads.num_heads,)}, one entry a "
      f"head, got {jnp.shape(log_weights)}: write log_weights(opt_state), of an "
      "optimizer initialised with this model's parameters."
    )


def one_array(call: str, outputs: Any) -> jax.Array:
  """The heads' outputs, which must be a single array.

  Raises:
    TypeError: If they are a tree.
  """
  if not jax.tree_util.treedef_is_leaf(jax.tree.structure(outputs)):
    raise TypeError(
      f"{call} needs heads that return one array, got outputs of type "
      f"{type(outputs).__name__}: choose one, or write a loss with mixture_loss()."
    )
  return jnp.asarray(outputs)


def classification_loss(
  heads: HeadOutputs,
  labels: Any,
  log_weights: jax.Array,
  *,
  label_smoothing: Any = 0.0,
  ignore_label: int | None = None,
  weights: Any = None,
  judges: Any = None,
) -> tuple[jax.Array, MixtureInfo]:
  r"""Cross-entropy of a mixture of softmax classifiers.

  Soft targets and smoothed labels :math:`t_c` make each class a weighted observation:
  the loss is the mixture's cross-entropy, :math:`-\sum_c t_c \log \sum_j a_j p_j(c)`.

  **Classes are 0 to num_classes - 1.** Any other label makes the loss ``inf``, trains
  nothing and moves no posterior, and is an error if its value is known (outside of
  :func:`jax.jit`). Examples of weight 0 may have any label. (optax's losses count
  negative labels from the last class: -1, which often means "ignore", trains the last
  one.)

  Args:
    heads: Logits of shape ``(num_heads, ..., num_classes)``. A logit of ``-inf``
      excludes its class.
    labels: Integers of shape ``(...)``, of any integer dtype, or probabilities (one-hot
      or soft) of shape ``(..., num_classes)``, not negative.
    log_weights: Logs of the heads' weights, ``(num_heads,)``.
    label_smoothing: Share of each target spread evenly over the classes, in [0, 1]. It
      must be 0 if classes are excluded, since their share would cost an infinite loss.
    ignore_label: The integer label, such as -100 or 255, that gives an example weight
      0. None if there is no such label.
    weights: Weight of each example, of shape ``(...)``, as in :func:`mixture_loss`.
    judges: Which examples judge the heads and do not train, a bool mask of shape
      ``(...)`` or of its first axes (one entry a sequence); see :func:`judges` and
      :func:`mixture_loss`.

  Returns:
    The loss (mean over examples) and :class:`MixtureInfo`, as :func:`mixture_loss`.

  Raises:
    TypeError: If ``heads`` is not :class:`HeadOutputs` of one array, if labels of shape
      ``(...)`` are no integers, or if ``ignore_label`` is no integer.
    ValueError: If shapes differ, ``label_smoothing`` is outside [0, 1], a label is
      known to be no class, or ``ignore_label`` is given with probabilities.

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
  labels, dtype = as_given(labels), loss_dtype(call, logits)
  batch, num_classes = logits.shape[1:-1], logits.shape[-1]
  if labels.shape == batch:
    if not jnp.issubdtype(labels.dtype, jnp.integer):
      raise TypeError(
        f"classification_loss(labels=...) of shape {labels.shape} must be integers, "
        f"got {labels.dtype}: write labels.astype(int), or give one-hot labels."
      )
    if labels.dtype.itemsize < 4:
      labels = labels.astype(np.int32)  # num_classes may be beyond their own range
    ignored = _equals(labels, _checked_ignore_label(call, ignore_label))
    in_range = (labels >= 0) & (labels < num_classes)
    weights = _without(call, ignored, weights, batch, dtype)
    rule = f"must be classes, 0 to {num_classes - 1}"
    write = _IGNORE + (
      " To count classes from the end, as optax does, write labels % num_classes."
    )
    _check_known(call, labels, in_range | ignored, weights, rule, write)
    # Check before the cast, which may turn one label into another.
    one_hot = jax.nn.one_hot(labels.astype(np.int32), num_classes, dtype=bool)
    in_range = jnp.asarray(in_range)
    if is_concrete(label_smoothing) and label_smoothing == 0:

      def log_prob(logits):
        logits = logits.astype(dtype)
        # A masked sum fuses with the softmax, where a gather's gradient is a scatter.
        chosen = jnp.where(one_hot, logits, 0).sum(axis=-1)
        return jnp.where(in_range, chosen - jax.nn.logsumexp(logits, axis=-1), jnp.nan)

      return routed_loss(call, heads, log_prob, log_weights, weights, judges)
    targets = jnp.where(in_range[..., None], one_hot.astype(dtype), jnp.nan)
  elif labels.shape == logits.shape[1:]:
    if ignore_label is not None:
      raise ValueError(
        "classification_loss(ignore_label=...) is for integer labels, got "
        f"probabilities of shape {labels.shape}: write weights=, 0 to ignore."
      )
    targets = as_array(call, "labels", labels, labels.shape, dtype)
    rule = "must be probabilities, 0 or more"
    write = "Write weights=, 0 for examples to ignore."
    _check_known(call, labels, targets >= 0, weights, rule, write)
    targets = jnp.where(targets >= 0, targets, jnp.nan)
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
    judges,
    counted=weights,
  )


def _checked_ignore_label(call: str, ignore_label: Any) -> int | None:
  """The label as a Python integer.

  Raises:
    TypeError: If it is no integer, or not known.
  """
  if ignore_label is None:
    return None
  try:
    if not isinstance(ignore_label, (bool, np.bool_)):
      return operator.index(ignore_label)
  except TypeError:
    pass
  raise TypeError(
    f"{call[:-1]}ignore_label=...) must be an integer or None, got {ignore_label!r}."
  )


def _equals(labels: Any, ignore_label: int | None) -> Any:
  """Where the labels equal that one, which may be beyond their dtype's range."""
  info = jnp.iinfo(labels.dtype)
  if ignore_label is None or not info.min <= ignore_label <= info.max:
    return np.zeros(labels.shape, bool)
  return labels == np.asarray(ignore_label, labels.dtype)


def _without(call: str, ignored: Any, weights: Any, shape: Any, dtype: Any) -> Any:
  """The weights, 0 for ignored examples; unchanged if none is ignored."""
  if isinstance(ignored, np.ndarray) and not ignored.any():
    return weights
  weights = example_weights(call, weights, shape, dtype)
  return jnp.where(jnp.asarray(ignored), 0, weights)


_IGNORE = (
  "If it marks ignored examples, write ignore_label={0}, or weights= with 0 for those "
  "examples."
)


def _check_known(
  call: str, labels: Any, valid: Any, weights: Any, rule: str, write: str
) -> None:
  """Refuses labels that are not valid, if they and their weights are known."""

  def known(x):
    traced = isinstance(x, jax.core.Tracer)
    return not traced and getattr(x, "is_fully_addressable", True)  # by this host

  if not known(valid) or not known(weights):
    return
  labels, wrong = np.asarray(labels), ~np.asarray(valid)
  if weights is not None and np.shape(weights) == wrong.shape[: np.ndim(weights)]:
    used = np.asarray(weights) != 0
    wrong &= used.reshape(used.shape + (1,) * (wrong.ndim - used.ndim))
  if wrong.any():
    first = labels[wrong][0]
    raise ValueError(
      f"{call[:-1]}labels=...) {rule}, got {first}. {write.format(first)}"
    )


def binary_loss(
  heads: HeadOutputs,
  labels: Any,
  log_weights: jax.Array,
  *,
  ignore_label: float | None = None,
  weights: Any = None,
  judges: Any = None,
) -> tuple[jax.Array, MixtureInfo]:
  r"""Sigmoid cross-entropy of a mixture, for one or several yes-no labels an example.

  The labels of one example are one observation: a head's log-likelihood is the sum of
  its :math:`\log p_j(y_l)` over the labels, and the heads are mixed after that sum.

  Labels beyond 0 to 1 make the loss ``inf`` or are an error, as in
  :func:`classification_loss`. Examples of weight 0 may have any labels.

  Args:
    heads: Logits of shape ``(num_heads, ..., num_labels)``, or ``(num_heads, batch)``
      for one label an example (a sequence of them needs a last axis of length 1).
    labels: 0 or 1, of any dtype, in the shape of one head's logits. A label between
      them weighs the two log-probabilities of a head.
    log_weights: Logs of the heads' weights, ``(num_heads,)``.
    ignore_label: The number, such as -1, that marks a missing label. The sum over an
      example's labels leaves it out; an example with only missing labels has weight 0.
      None if there is no such label.
    weights: Weight of each example, in the labels' shape without the axis of labels, as
      in :func:`mixture_loss`.
    judges: Which examples judge the heads and do not train, a bool mask of that shape
      or of its first axes; see :func:`judges` and :func:`mixture_loss`.

  Returns:
    The loss (sum over labels, mean over examples) and :class:`MixtureInfo`, as
    :func:`mixture_loss`.

  Raises:
    TypeError: If ``heads`` is not :class:`HeadOutputs` of one array.
    ValueError: If shapes differ, or a label is known to be beyond 0 to 1.

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
  dtype = loss_dtype(call, logits)
  labels = as_array(call, "labels", labels, logits.shape[1:], dtype)
  ignored = np.zeros(labels.shape, bool)
  if ignore_label is not None:
    ignored = labels == jnp.asarray(ignore_label, dtype)
  examples = labels.shape[:-1] if labels.ndim > 1 else labels.shape
  none_left = ignored.all(axis=-1) if labels.ndim > 1 else ignored
  weights = _without(call, none_left, weights, examples, dtype)
  valid = (labels >= 0) & (labels <= 1)
  _check_known(call, labels, valid | ignored, weights, "must be 0 to 1", _IGNORE)
  ignored = jnp.asarray(ignored)

  def log_prob(logits):
    targets = jnp.where(ignored, 0, labels)  # a cotangent of 0 must meet what is finite
    losses = optax.losses.sigmoid_binary_cross_entropy(logits.astype(dtype), targets)
    losses = jnp.where(ignored, 0, jnp.where(valid, losses, jnp.nan))
    return -_sum_outputs(losses)

  return routed_loss(call, heads, log_prob, log_weights, weights, judges)


def regression_loss(
  heads: HeadOutputs,
  targets: Any,
  log_weights: jax.Array,
  *,
  noise_scale: Any = 1.0,
  weights: Any = None,
  judges: Any = None,
) -> tuple[jax.Array, MixtureInfo]:
  r"""Negative log-likelihood of a mixture of Gaussians.

  .. math::
    \log p_j(y) = -\sum_d \left( \frac{(y_d - \mu_{jd})^2}{2 \sigma^2} + \log \sigma +
    \tfrac12 \log 2 \pi \right)

  A head may return a pair ``(mean, log_scale)`` to learn its noise; then :math:`\sigma`
  is ``noise_scale * exp(log_scale)``.

  Args:
    heads: Means of shape ``(num_heads, ..., num_outputs)``, or ``(num_heads, batch)``
      for one output an example (a sequence needs a last axis of length 1); or a pair of
      means and log-scales. Within each head, the log-scales must broadcast to the shape
      of the means.
    targets: Targets, in the shape of one head's means.
    log_weights: Logs of the heads' weights, ``(num_heads,)``.
    noise_scale: Standard deviation of the noise in the targets' unit, positive; a
      number or an array that broadcasts to the targets' shape. A traced noise scale is
      a parameter of the mixture: it receives the gradient of ``nll``, once.
    weights: Weight of each example, in the targets' shape without the axis of outputs,
      as in :func:`mixture_loss`.
    judges: Which examples judge the heads and do not train, a bool mask of that shape
      or of its first axes; see :func:`judges` and :func:`mixture_loss`.

  Returns:
    The loss (sum over outputs, mean over examples) and :class:`MixtureInfo`, as
    :func:`mixture_loss`.

  Raises:
    TypeError: If ``heads`` is not :class:`HeadOutputs` of one array or a pair.
    ValueError: If shapes differ, or ``noise_scale`` is not positive.

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
  dtype = loss_dtype(call, means)
  targets = as_array(call, "targets", targets, means.shape[1:], dtype)
  check_positive(call, "noise_scale", noise_scale)
  if weights is not None:
    # NaN may mark missing targets, and NaN times 0 would still reach a learned noise.
    examples = targets.shape[:-1] if targets.ndim > 1 else targets.shape
    weights = example_weights(call, weights, examples, dtype)
    used = weights.reshape(examples + (1,) * (targets.ndim - len(examples))) != 0
    targets = jnp.where(used, targets, 0)
  log_noise = jnp.log(jnp.asarray(noise_scale, dtype))

  def log_prob(outputs):
    mean, log_scale = outputs if pair else (outputs, jnp.zeros((), dtype))
    log_scale = jnp.broadcast_to(log_scale.astype(dtype), targets.shape)
    log_scale = log_scale + jnp.broadcast_to(log_noise, targets.shape)
    z = (targets - mean.astype(dtype)) * jnp.exp(-log_scale)
    return -_sum_outputs(0.5 * z**2 + log_scale + 0.5 * math.log(2 * math.pi))

  return routed_loss(call, heads, log_prob, log_weights, weights, judges)


def _sum_outputs(x: jax.Array) -> jax.Array:
  """Sums over the last axis if it is not the batch's."""
  return x.sum(axis=-1) if x.ndim > 1 else x


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
  judges: Any = None,
) -> tuple[jax.Array, MixtureInfo]:
  """:func:`mixture_loss` without the outputs of all heads in memory at once.

  Heads and log-likelihoods are evaluated for ``chunk_size`` examples at a time, and
  again in the backward pass. Value, gradient and the diverged heads are those of
  :func:`mixture_loss` up to rounding; the price is one more evaluation of the heads.
  Each chunk decides by itself which heads have a part in the mixture (see
  :func:`multi_head`).

  ``log_prob`` must handle the labels. optax's losses count negative labels from the
  last class, and return NaN for labels that are too large. Give ignored labels weight
  0, ``weights=labels != -100``, and check the others.

  Args:
    evaluate: A function of the features of a chunk that returns :class:`HeadOutputs`.
      It calls :class:`~alrao_jax.linen.MultiHead` or :func:`multi_head`, and may close
      over the parameters. Examples must not depend on each other (as they do in a
      BatchNorm).
    features: What the heads receive, any pytree of arrays with the examples on axis 0.
      Flatten the positions of sequences.
    log_prob: Log-likelihoods under one head, ``log_prob(outputs_j, targets)``, one
      entry an example of the chunk. What it closes over (a trained noise scale)
      receives only the gradient of the mixture's term, as in :func:`mixture_loss`.
    targets: Any pytree of arrays with the examples on axis 0. They get no gradient.
    log_weights: Logs of the heads' weights, ``(num_heads,)``.
    chunk_size: Number of examples at a time, at least 1. The last chunk holds the rest.
    weights: Weight of each example, of shape ``(examples,)``, as in
      :func:`mixture_loss`.
    judges: Which examples judge the heads and do not train, a bool mask of shape
      ``(examples,)``; see :func:`judges` and :func:`mixture_loss`.

  Returns:
    The loss (mean over examples) and :class:`MixtureInfo`, as :func:`mixture_loss`.

  Raises:
    TypeError: If ``evaluate`` does not return :class:`HeadOutputs`, or ``chunk_size``
      is no int.
    ValueError: If ``chunk_size`` is below 1, the arrays disagree on the number of
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
    with in_chunks():
      heads = evaluate(features)
    check_heads(call, heads, log_weights)
    targets = jax.lax.stop_gradient(targets)

    def each_head(outputs):
      values = jax.vmap(lambda outputs: log_prob(outputs, targets))(outputs)
      return values.astype(loss_dtype(call, values))

    converted, closed_over, *_ = closure_convert(each_head, heads.shared)
    constant = jax.lax.stop_gradient
    values = converted(constant(closed_over), constant(heads.own))
    size = jax.tree.leaves(targets)[0].shape[0]
    if values.shape != (heads.num_heads, size):
      raise ValueError(
        f"chunked_mixture_loss(log_prob=...) must return shape {(size,)} for {size} "
        f"examples, got {values.shape[1:]}: one log-likelihood an example."
      )
    matters = values if used is None else jnp.where(used[None], values, 0)
    healthy = jnp.isfinite(matters).all(axis=1)
    heads = trained_where_finite(heads, healthy, values)
    own, outputs = converted(constant(closed_over), heads.own), heads.shared
    if any(jnp.issubdtype(x.dtype, jnp.inexact) for x in closed_over):
      outputs = with_finite_outputs(outputs, healthy, values)
    return converted(closed_over, outputs), own

  rest = count % chunk_size
  inputs = (features, targets, used)
  pieces = []
  if count > rest:
    split = jax.tree.map(
      lambda x: x[: count - rest].reshape(-1, chunk_size, *x.shape[1:]), inputs
    )
    # In a loop, XLA does not merge the first computation with the second.
    stacked = jax.lax.map(jax.checkpoint(chunk, prevent_cse=False), split)
    pieces.append(
      jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1), stacked)
    )
  if rest:
    last = jax.tree.map(lambda x: x[count - rest :], inputs)
    pieces.append(jax.checkpoint(chunk)(last))
  shared, own = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *pieces)
  heads = HeadOutputs(shared, own)
  return routed_loss(call, heads, lambda x: x, log_weights, weights, judges)


def _num_examples(features: PyTree, targets: PyTree) -> int:
  """The length of axis 0, which must be the same in all leaves."""
  leaves = jax.tree.leaves((features, targets))
  lengths = sorted({jnp.shape(x)[0] if jnp.ndim(x) else None for x in leaves}, key=str)
  if len(lengths) != 1 or not lengths[0] or not jax.tree.leaves(targets):
    raise ValueError(
      "chunked_mixture_loss(features=..., targets=...) must be arrays with the same "
      f"number of examples on axis 0, at least 1, got lengths {lengths}. Flatten the "
      "positions of sequences: features.reshape(-1, features.shape[-1])."
    )
  return lengths[0]
