"""Training and serving with flax.linen: a train state, and prediction in one call."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import optax
from flax.training import train_state

from .._predict import Output, predict_from

PyTree = Any


def predict(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  log_weights: PyTree,
  *args: Any,
  output: Output | Mapping[str, Output] = "log_probs",
  **kwargs: Any,
) -> PyTree:
  """Applies a model and returns the mixture's prediction: one call for serving.

  ``predict(model, variables, log_weights, images)`` is ``model.apply(variables,
  images)`` with the mixture's prediction in place of every `HeadOutputs`. All it needs
  are the variables and ``num_heads`` numbers, no optimizer. To compile it:
  ``jax.jit(functools.partial(predict, model))``.

  Args:
    model: a module that returns `HeadOutputs`, or a container with one or several.
    variables: its variables, such as ``{"params": params}``.
    log_weights: shape ``(num_heads,)``, from ``alrao_jax.log_weights(opt_state)``.
      For a model that returns several `HeadOutputs`, say in a dict, a mapping from the
      "/"-joined path of each in the result to its weights.
    *args: the model's inputs.
    output: ``"log_probs"`` (`mixture_log_probs`), ``"mean"`` (`mixture_mean`), a
      function ``(heads, log_weights) -> prediction``, or a mapping by path to these.
    **kwargs: passed on to ``model.apply``, such as ``train=False`` or ``rngs``.

  Returns:
    What the model returns, with predictions: log-probabilities ``(..., num_classes)``
    by default.

  Raises:
    ValueError: the model returns no `HeadOutputs`, or others than ``log_weights`` has.

  Example:
    >>> import jax, jax.numpy as jnp, flax.linen as nn, alrao_jax.linen
    >>> model = alrao_jax.linen.MultiHead(nn.Dense(3), num_heads=2)
    >>> variables = model.init(jax.random.key(0), jnp.ones((5, 4)))
    >>> log_weights = jnp.log(jnp.array([0.9, 0.1]))
    >>> alrao_jax.linen.predict(model, variables, log_weights, jnp.ones((5, 4))).shape
    (5, 3)
  """
  outputs = model.apply(variables, *args, **kwargs)
  return predict_from(outputs, log_weights, output)


class TrainState(train_state.TrainState):
  """Flax's ``TrainState`` for optimizers that need more than gradients.

  Flax's own drops what an optimizer takes beside gradients and parameters. This one
  hands over ``head_log_likelihoods``; all else is as in Flax.

  Example:
    >>> import jax, jax.numpy as jnp, flax.linen as nn, alrao_jax as alrao
    >>> import alrao_jax.linen
    >>> model = alrao_jax.linen.MultiHead(nn.Dense(3), num_heads=2)
    >>> params = model.init(jax.random.key(0), jnp.ones((5, 4)))["params"]
    >>> state = alrao_jax.linen.TrainState.create(
    ...     apply_fn=model.apply, params=params, tx=alrao.alrao(jax.random.key(1)))
    >>> int(state.apply_gradients(
    ...     grads=params, head_log_likelihoods=jnp.array([-1.0, -2.0])).step)
    1
  """

  def apply_gradients(
    self,
    *,
    grads: PyTree,
    head_log_likelihoods: PyTree = None,
    extra_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
  ) -> "TrainState":
    """Updates ``step``, ``params``, ``opt_state``, and the fields in ``kwargs``.

    Args:
      grads: gradients, a tree like ``params``.
      head_log_likelihoods: ``info.head_log_likelihoods`` as the loss returned it, shape
        ``(num_heads,)``; a mapping by name for several MultiHeads.
      extra_args: what else ``tx.update`` takes by keyword, such as ``{"value": loss}``.
      **kwargs: fields to replace, such as ``batch_stats``.

    Returns:
      The new state.

    Raises:
      TypeError: ``tx`` takes no extra arguments.
    """
    extra = dict(extra_args or {})
    if head_log_likelihoods is not None:
      extra["head_log_likelihoods"] = head_log_likelihoods
    if not extra:
      return super().apply_gradients(grads=grads, **kwargs)
    if not isinstance(self.tx, optax.GradientTransformationExtraArgs):
      raise TypeError(
        f"TrainState.apply_gradients() got {sorted(extra)}, which this tx can't take. "
        "Write tx=alrao_jax.alrao(key), or a chain with alrao_jax.track_heads(); "
        "wrappers that take no extra arguments, such as optax.lookahead, go inside."
      )
    tx = optax.GradientTransformation(
      self.tx.init, functools.partial(self.tx.update, **extra)
    )
    # What Flax does around the update (say for fp8 statistics) is left to Flax.
    return super(TrainState, self.replace(tx=tx)).apply_gradients(
      grads=grads, **{"tx": self.tx, **kwargs}
    )
