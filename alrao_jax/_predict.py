"""The mixture's prediction in place of every HeadOutputs that a model returns."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from ._paths import path_of
from ._predictions import mixture_log_probs, mixture_mean
from ._routing import HeadOutputs

PyTree = Any
Predict = Callable[[HeadOutputs, jax.Array], PyTree]
Output = Literal["log_probs", "mean"] | Predict

_OUTPUTS = {"log_probs": mixture_log_probs, "mean": mixture_mean}


def predict_from(
  outputs: PyTree,
  log_weights: PyTree,
  output: Output | Mapping[str, Output] = "log_probs",
) -> PyTree:
  """Replaces every `HeadOutputs` in a model's outputs by the mixture's prediction.

  Args:
    outputs: what the model returned, any pytree.
    log_weights: shape ``(num_heads,)``. Where ``outputs`` holds several `HeadOutputs`,
      a mapping from the "/"-joined path of each in ``outputs`` to its weights; nested
      containers shaped like ``outputs`` do as well.
    output: ``"log_probs"`` (`mixture_log_probs`), ``"mean"`` (`mixture_mean`), a
      function ``(heads, log_weights) -> prediction``, or a mapping like
      ``log_weights`` where the several differ.

  Returns:
    ``outputs`` with predictions.

  Raises:
    ValueError: ``outputs`` holds no `HeadOutputs`, several but one ``log_weights``, or
      others than ``log_weights`` names; ``output`` is an unknown name.
    TypeError: ``output`` is neither a name nor a function.
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
