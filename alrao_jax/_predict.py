"""Predictions of the mixture of heads."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ._losses import check_heads, loss_dtype, one_array, trained_where_finite
from ._multi_head import HeadOutputs
from ._tree import path_of


def mixture_log_probs(heads: HeadOutputs, log_weights: jax.Array) -> jax.Array:
  r"""Log-probabilities of a mixture of softmax classifiers.

  If a head has NaN probabilities for an example, the mixture leaves it out for that
  example, and the weights are renormalised over the others.

  Args:
    heads: Logits of shape ``(num_heads, ..., num_classes)``.
    log_weights: Logs of the heads' weights, ``(num_heads,)``.

  Returns:
    :math:`\log \sum_j a_j p_j(c)`, shape ``(..., num_classes)``, in at least float32;
    NaN where every head is NaN. Its gradient goes to the features, not to the heads.

  Raises:
    TypeError: If ``heads`` is not :class:`HeadOutputs` of one array.
    ValueError: If ``log_weights`` have another shape.

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
  logits = logits.astype(loss_dtype(call, logits))
  good = (logits < jnp.inf).all(axis=-1, keepdims=True)  # false for NaN, too
  good &= (logits > -jnp.inf).any(axis=-1, keepdims=True)
  log_probs = jax.nn.log_softmax(jnp.where(good, logits, 0))
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
  *,
  min_weight: float = 0.0,
) -> jax.Array:
  r"""Mean prediction of a mixture, :math:`\sum_j a_j\, \text{link}(\text{outputs}_j)`.

  If an entry of a head is not finite, the mean leaves the head out for that entry, and
  the weights are renormalised over the others.

  Unlike a mixture's probabilities, a mean has no bound. The switch leaves every head a
  weight of a millionth, and a head that has grown to 1e9 ruins the mean with it. For
  outputs without bounds, such as those of regression, give ``min_weight=0.05`` or the
  like.

  Args:
    heads: Outputs with leading axis ``num_heads``.
    log_weights: Logs of the heads' weights, ``(num_heads,)``.
    link: What to average, a function of one head's outputs: :func:`jax.nn.sigmoid` for
      the probabilities of yes-no labels, ``lambda outputs: outputs[0]`` for the means
      of heads that return ``(mean, log_scale)``. By default the outputs.
    min_weight: Heads of a smaller weight are left out. At least 0 and at most
      ``1 / num_heads``, so that one head always remains.

  Returns:
    The mean, in the shape of ``link``'s result and at least float32; NaN where no head
    is finite. Its gradient goes to the features, not to the heads.

  Raises:
    TypeError: If ``heads`` is not :class:`HeadOutputs`, or what is averaged is not one
      array.
    ValueError: If ``log_weights`` have another shape, or ``min_weight`` is out of
      range.

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
  if not 0 <= min_weight <= 1 / heads.num_heads:
    raise ValueError(
      f"{call[:-1]}min_weight=...) must be from 0 to 1 / num_heads = "
      f"{1 / heads.num_heads:g}, got {min_weight}."
    )
  if min_weight:
    log_weights = jnp.asarray(log_weights)
    # Apart from rounding, the heaviest has at least 1 / num_heads.
    believed = log_weights >= math.log(min_weight)
    believed |= log_weights == log_weights.max()
    log_weights = jnp.where(believed, log_weights, -jnp.inf)

  def evaluate(heads):
    values = heads.shared if link is None else jax.vmap(link)(heads.shared)
    values = one_array(call, values)
    return values.astype(loss_dtype(call, values))

  values = jax.lax.stop_gradient(evaluate(heads))
  good = jnp.isfinite(values)
  # Otherwise a NaN derivative of the link would meet a cotangent of zero.
  heads = trained_where_finite(heads, jnp.ones(heads.num_heads, bool), values)
  values = evaluate(heads)
  weights = jnp.exp(_renormalised(log_weights, good, values.dtype))
  return (weights * jnp.where(good, values, 0)).sum(axis=0)


def _renormalised(log_weights: Any, good: jax.Array, dtype: Any) -> jax.Array:
  """Log-weights of the good heads, which sum to one at each entry of ``good``."""
  log_weights = jax.lax.stop_gradient(jnp.asarray(log_weights).astype(dtype))
  column = log_weights.reshape((-1,) + (1,) * (good.ndim - 1))
  return jax.nn.log_softmax(jnp.where(good, column, -jnp.inf), axis=0)


PyTree = Any


Predict = Callable[[HeadOutputs, jax.Array], PyTree]


Output = Literal["log_probs", "mean"] | Predict


_OUTPUTS = {"log_probs": mixture_log_probs, "mean": mixture_mean}


def predict_from(
  outputs: PyTree,
  log_weights: PyTree,
  output: Output | Mapping[str, Output] = "log_probs",
) -> PyTree:
  """Replaces every :class:`HeadOutputs` in a model's outputs by a prediction.

  Args:
    outputs: What the model returned, any pytree.
    log_weights: Shape ``(num_heads,)``. Where ``outputs`` holds several
      :class:`HeadOutputs`, a mapping from the "/"-joined path of each in ``outputs`` to
      its weights; nested containers shaped like ``outputs`` do as well.
    output: ``"log_probs"`` (:func:`mixture_log_probs`), ``"mean"``
      (:func:`mixture_mean`), a function ``(heads, log_weights) -> prediction``, or, if
      several differ, a mapping like ``log_weights``.

  Returns:
    ``outputs`` with predictions.

  Raises:
    ValueError: If ``outputs`` holds no :class:`HeadOutputs`, several for one
      ``log_weights``, or others than ``log_weights`` names; if ``output`` is an unknown
      name.
    TypeError: If ``output`` is neither a name nor a function.
  """
  found, treedef = jax.tree_util.tree_flatten_with_path(outputs, is_leaf=_is_heads)
  found = [(path_of(path), leaf) for path, leaf in found]
  paths = [path for path, leaf in found if _is_heads(leaf)]
  if not paths:
    raise ValueError(
      "predict() needs a model that returns HeadOutputs, got none. Wrap the output "
      "layer in MultiHead and return what it returns."
    )
  weights = _by_path("log_weights", log_weights, paths)
  functions = {path: output for path in paths}
  if isinstance(output, Mapping):
    functions = _by_path("output", output, paths)
  leaves = [
    _function(functions[path])(leaf, weights[path]) if _is_heads(leaf) else leaf
    for path, leaf in found
  ]
  return jax.tree.unflatten(treedef, leaves)


def _is_heads(x: Any) -> bool:
  return isinstance(x, HeadOutputs)


def _by_path(name: str, given: PyTree, paths: list[str]) -> dict[str, Any]:
  flat = jax.tree_util.tree_flatten_with_path(given)[0]
  by_path = {path_of(path): leaf for path, leaf in flat}
  if list(by_path) == [""] and len(paths) == 1:
    return {paths[0]: by_path[""]}
  if set(by_path) != set(paths):
    example = ", ".join(f"{path!r}: ..." for path in paths)
    raise ValueError(
      f"predict({name}=...) must have one entry for each HeadOutputs that the model "
      f"returns, got {sorted(by_path) if by_path.keys() != {''} else 'one for all'}. "
      f"Write {name}={{{example}}}; alrao_jax.log_weights(opt_state, name) has the "
      "weights of one MultiHead."
    )
  return by_path


def _function(output: Any) -> Predict:
  if callable(output):
    return output
  if not isinstance(output, str):
    raise TypeError(
      f"predict(output=...) must be one of {sorted(_OUTPUTS)} or a function "
      f"(heads, log_weights) -> prediction, got {type(output).__name__}."
    )
  if output not in _OUTPUTS:
    raise ValueError(
      f"predict(output=...) must be one of {sorted(_OUTPUTS)} or a function, got "
      f"{output!r}."
    )
  return _OUTPUTS[output]
