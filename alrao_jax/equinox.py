"""The units that the types of an Equinox model's modules tell."""

from typing import Any

import jax

from ._rules import Known, Override, overrides_from
from ._tree import body_shapes, is_a, path_of

# The last axes of a layer's weight, without those that filter_vmap has added, and
# those of them that index its units.
_MATRICES = {"Linear": (2, (0,)), "Embedding": (2, (1,))}


_CONVOLUTIONS = ("Conv", "ConvTranspose")


_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm")


def unit_overrides(model: Any) -> tuple[Override, ...]:
  """Overrides for units that the types of a model's modules tell, and shapes don't.

  They name the parameters of layers without bias, embeddings and norms that are stacked
  by ``eqx.filter_vmap``, and of those whose shapes could be another layer's. All else
  is left to the rules.

  Args:
    model: A module; ``eqx.filter_eval_shape(Model, key)`` will do.

  Returns:
    The overrides for ``alrao_jax.UnitOptions(overrides, unit_axis="first")``, to which
    others may be added: the first that matches wins.

  Example:
    >>> import alrao_jax.equinox
    >>> import equinox as eqx
    >>> import jax
    >>> make = lambda key: eqx.nn.Linear(8, 8, use_bias=False, key=key)
    >>> model = eqx.filter_vmap(make)(jax.random.split(jax.random.key(0), 6))
    >>> alrao_jax.equinox.unit_overrides(model)
    (('^weight$', Units(axes=(0, 1), group=None, tiles=1)),)
  """
  known: dict[str, Known] = {}
  layers = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_layer)[0]
  for keys, layer in layers:
    if _is_layer(layer):
      for name, parameter in _own_parameters(layer).items():
        known["/".join(filter(None, (path_of(keys), name)))] = parameter
  floats = jax.tree.map(lambda leaf: leaf if _is_floating(leaf) else None, model)
  return overrides_from(body_shapes(floats), known, unit_axis="first")


def _is_layer(node: Any) -> bool:
  """Whether a node of a model is a layer of Equinox with parameters of its own."""
  names = (*_MATRICES, *_CONVOLUTIONS, *_NORMS)
  return any(is_a(node, "equinox", name) for name in names)


def _is_floating(leaf: Any) -> bool:
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and jax.numpy.issubdtype(dtype, jax.numpy.inexact)


def _own_parameters(layer: Any) -> dict[str, Known]:
  """What a layer of Equinox knows of its parameters."""
  weight, bias = (getattr(layer, name, None) for name in ("weight", "bias"))
  if any(is_a(layer, "equinox", name) for name in _CONVOLUTIONS):
    rank, axes = layer.num_spatial_dims + 2, (0,)
    inner = {"weight": (weight, rank, axes), "bias": (bias, rank - 1, (0,))}
  elif name := next((n for n in _MATRICES if is_a(layer, "equinox", n)), None):
    rank, axes = _MATRICES[name]
    inner = {"weight": (weight, rank, axes), "bias": (bias, 1, (0,))}
  else:
    rank = len(getattr(layer, "shape", (0,)))
    axes = tuple(range(rank))
    inner = {"weight": (weight, rank, axes), "bias": (bias, rank, axes)}
  return {
    name: Known(tuple(array.shape[array.ndim - rank :]), axes)
    for name, (array, rank, axes) in inner.items()
    if array is not None and hasattr(array, "shape")  # not a wrapper of a weight
  }
