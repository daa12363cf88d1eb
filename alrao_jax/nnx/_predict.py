"""Prediction with a flax.nnx model in one call."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from .._predict import Output, predict_from

PyTree = Any


def predict(
  model: nnx.Module,
  log_weights: PyTree,
  *args: Any,
  output: Output | Mapping[str, Output] = "log_probs",
  **kwargs: Any,
) -> PyTree:
  """Calls a model and returns the mixture's prediction: one call for serving.

  ``predict(model, log_weights, images)`` is what ``model(images)`` returns, with the
  mixture's prediction in place of every `HeadOutputs`. The model runs as after
  ``model.eval()`` and is not changed. All this needs beside the model are ``num_heads``
  numbers, no optimizer. To compile it: ``nnx.jit(predict)``, or ``jax.jit`` of a
  function that has the model from outside.

  Args:
    model: a module that returns `HeadOutputs`, or a container with one or several.
    log_weights: shape ``(num_heads,)``, from ``alrao_jax.log_weights(opt_state)``.
      For a model that returns several `HeadOutputs`, say in a dict, a mapping from the
      "/"-joined path of each in the result to its weights.
    *args: the model's inputs.
    output: ``"log_probs"`` (`mixture_log_probs`), ``"mean"`` (`mixture_mean`), a
      function ``(heads, log_weights) -> prediction``, or a mapping by path to these.
    **kwargs: passed on to the model.

  Returns:
    What the model returns, with predictions: log-probabilities ``(..., num_classes)``
    by default.

  Raises:
    ValueError: the model returns no `HeadOutputs`, or others than ``log_weights`` has.

  Example:
    >>> import jax.numpy as jnp, alrao_jax.nnx
    >>> from flax import nnx
    >>> model = alrao_jax.nnx.MultiHead(
    ...     lambda rngs: nnx.Linear(4, 3, rngs=rngs), num_heads=2, rngs=nnx.Rngs(0))
    >>> log_weights = jnp.log(jnp.array([0.9, 0.1]))
    >>> alrao_jax.nnx.predict(model, log_weights, jnp.ones((5, 4))).shape
    (5, 3)
  """
  model = nnx.view(
    model, deterministic=True, use_running_average=True, raise_if_not_found=False
  )
  model = nnx.clone(model)  # a view's Variables are the model's own
  return predict_from(model(*args, **kwargs), log_weights, output)
