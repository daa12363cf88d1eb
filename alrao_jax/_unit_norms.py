"""Sums over each unit's entries: how large its weights are, or its update."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from . import _rates, _units


def unit_norms(
  specs: Mapping[str, _units.UnitSpec], layout: _rates.Layout, tree: Any, dtype: Any
) -> jax.Array:
  """Returns the Euclidean norm of each unit's entries, over all leaves that share it.

  Args:
    specs: The units of the leaves; those of others are ignored.
    layout: What :func:`make_layout` returned for ``specs``.
    tree: Parameters, or updates like them.
    dtype: Of the sums and of the result. A norm whose square overflows is ``inf``.

  Returns:
    Shape ``(layout.size,)``, in the layout's order: heads first, then units.
  """
  leaves = dict(_units.flatten_with_paths(tree)[0])
  heads = jnp.zeros([layout.num_heads], dtype)
  groups = {
    name: jnp.zeros([size], dtype)
    for name, size in zip(layout.names, layout.sizes, strict=True)
  }
  for path, spec in specs.items():
    if spec.kind == "frozen":
      continue
    others = tuple(axis for axis in range(len(spec.shape)) if axis not in spec.axes)
    squares = jnp.sum(jnp.square(leaves[path].astype(dtype)), axis=others)
    if spec.kind == "head":
      heads += squares
      continue
    if spec.tiles > 1:  # gates of one cell are the same units, one after the other
      squares = squares.reshape((*spec.unit_shape[:-1], spec.tiles, -1)).sum(axis=-2)
    groups[spec.group] += squares.reshape(-1)
  return jnp.sqrt(jnp.concatenate([heads, *groups.values()]))
