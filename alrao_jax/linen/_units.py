"""Units that the types of linen modules tell, where shapes alone can't."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from .._overrides import Known, einsum_kernel, overrides_from
from .._units import Override
from ._multi_head import MultiHead


def unit_overrides(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Override, ...]:
  """Overrides for units that the types of a model's modules tell, and shapes don't.

  They name the parameters of: ``nn.DenseGeneral`` with several features and
  ``nn.Einsum``, without bias or with permuted axes; ``nn.ConvLocal`` without bias;
  ``nn.ConvTranspose`` with ``transpose_kernel``, square or without bias; layers
  without bias, embeddings and other tables that are stacked by ``nn.vmap`` or
  ``nn.scan``. All else is left to the rules.

  Args:
    model: A module, unbound.
    *args: What ``model.init`` takes after the key; arrays or ``jax.ShapeDtypeStruct``,
      whose values are never used.
    **kwargs: Likewise, such as ``train=True`` or ``method``.

  Returns:
    The ``overrides`` of ``alrao_jax.alrao`` and of ``alrao_jax.describe_units``, to
    which others may be added: the first that matches wins.

  Example:
    >>> import flax.linen as nn, jax.numpy as jnp, alrao_jax.linen
    >>> model = nn.DenseGeneral(features=(2, 3), use_bias=False)
    >>> alrao_jax.linen.unit_overrides(model, jnp.ones((1, 5)))
    (('^kernel$', Units(axes=(1, 2), group=None, tiles=1)),)
  """
  known: dict[str, Known] = {}
  in_heads = False

  def look(next_fun, args, kwargs, context):
    nonlocal in_heads
    outside, in_heads = in_heads, in_heads or isinstance(context.module, MultiHead)
    outputs = next_fun(*args, **kwargs)
    if not in_heads and context.module.scope is not None:
      for path, parameter in _own_parameters(context.module, args, kwargs).items():
        known.setdefault(path, parameter)  # within a stack before around it
    in_heads = outside
    return outputs

  leaves, treedef = jax.tree.flatten((args, kwargs))
  arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

  def init(arrays):
    filled = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
    args, kwargs = jax.tree.unflatten(treedef, filled)
    return model.init(jax.random.key(0), *args, **kwargs)

  with nn.intercept_methods(look):
    variables = jax.eval_shape(init, arrays)
  return overrides_from(variables.get("params", {}), known)


def _own_parameters(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Known]:
  """What a module knows of the parameters that are its own."""
  known = {}
  for name, leaf in module.variables.get("params", {}).items():
    if not isinstance(leaf, Mapping):
      shape = nn.meta.unbox(leaf).shape
      is_kernel = name == "kernel"
      path = "/".join((*module.path, name))
      known[path] = _kernel(module, shape, args, kwargs) if is_kernel else Known(shape)
  return known


def _kernel(module: nn.Module, shape: tuple[int, ...], args, kwargs) -> Known:
  """What a module knows of its kernel; None for its axes where the rules know them."""
  axes = tuple(range(len(shape)))
  match module:
    case nn.DenseGeneral():
      batch, features = (
        1 if isinstance(value, int) else len(value)
        for value in (module.batch_dims, module.features)
      )
      return Known(shape, axes[:batch] + axes[-features:])
    case nn.ConvTranspose(transpose_kernel=True):
      return Known(shape, axes[-2:-1])
    case nn.ConvLocal():
      return Known(shape, axes[:-2] + axes[-1:])
    case nn.Einsum():
      equation = module.einsum_str or kwargs.get("einsum_str") or args[1]
      return einsum_kernel(shape, equation)
  return Known(shape)
