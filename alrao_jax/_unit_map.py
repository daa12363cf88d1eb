"""Which entry of the rates each unit of an array reads."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _tree, _units
from ._units import UnitSpec


class Layout(NamedTuple):
  """Where the quantiles stand in the vector: static and hashable.

  Attributes:
    num_heads: Length of the heads' ladder, which stands first; 0 without heads.
    names: Names of the groups, sorted.
    sizes: Units of each group.
    offsets: Position of each group's first unit.
  """

  num_heads: int
  names: tuple[str, ...]
  sizes: tuple[int, ...]
  offsets: tuple[int, ...]

  @property
  def size(self) -> int:
    """Length of the whole vector."""
    return self.num_heads + sum(self.sizes)


def make_layout(specs: Mapping[str, UnitSpec]) -> Layout:
  """Returns the layout of the quantiles for the leaves in ``specs``.

  Raises:
    ValueError: If the heads' leaves disagree on the number of heads.
  """
  num_heads = count_heads(specs)
  # A group's members have equal unit shapes: unit_specs has made sure of it.
  sizes = {s.group: s.num_units for s in specs.values() if s.kind in _DRAWN}
  names = tuple(sorted(sizes))
  ordered = tuple(sizes[name] for name in names)
  ends = np.cumsum((num_heads, *ordered)).tolist()
  return Layout(num_heads, names, ordered, tuple(ends[:-1]))


_DRAWN = ("unit", "per_weight", "one_rate")


def count_heads(specs: Mapping[str, UnitSpec]) -> int:
  """Returns the common leading axis of the heads' leaves, 0 if there are none."""
  found = {s.path: s.shape[0] for s in specs.values() if s.of_heads}
  if len(set(found.values())) > 1:
    raise ValueError(
      "All heads of a model must agree on num_heads, the leading axis of their "
      f"parameters, got {found}. Write the same num_heads= in every MultiHead."
    )
  return next(iter(found.values()), 0)


def _stable_hash(name: str) -> int:
  # Python's own hash() changes from process to process.
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def fingerprint(specs: Mapping[str, UnitSpec]) -> int:
  """A 32-bit hash of who reads which entry: of all paths, shapes, axes and groups."""
  readers = [
    (path, specs[path].kind, specs[path].shape, specs[path].axes, specs[path].group)
    for path in sorted(specs)
  ]
  return _stable_hash(repr(readers))


def rates_of_leaf(spec: UnitSpec, vector: jax.Array, layout: Layout) -> jax.Array:
  """Reads a leaf's rates from the network's vector, in a shape that broadcasts.

  Args:
    spec: Which units the leaf has; not frozen.
    vector: Shape ``(layout.size,)``.
    layout: What :func:`make_layout` returned.

  Returns:
    As many axes as the leaf, length 1 along all that index no units.
  """
  if spec.kind == "head":
    units = vector[: layout.num_heads]
  else:
    position = layout.names.index(spec.group)
    offset = layout.offsets[position]
    units = vector[offset : offset + layout.sizes[position]].reshape(spec.unit_shape)
    if spec.tiles > 1:
      units = jnp.tile(units, (1,) * (units.ndim - 1) + (spec.tiles,))
  shape = [size if i in spec.axes else 1 for i, size in enumerate(spec.shape)]
  return units.reshape(shape)


def write_leaf(
  spec: UnitSpec, values: jax.Array, vector: jax.Array, layout: Layout
) -> jax.Array:
  """Writes a leaf's per-entry ``values`` into the vector; see :func:`rates_of_leaf`.

  The first entry of each unit is taken: all entries of a unit share one value.
  """
  index = tuple(slice(None) if i in spec.axes else 0 for i in range(len(spec.shape)))
  units = values[index]
  if spec.kind == "head":
    return vector.at[: layout.num_heads].set(units)
  position = layout.names.index(spec.group)
  offset = layout.offsets[position]
  units = units[..., : spec.unit_shape[-1]] if spec.tiles > 1 else units
  return vector.at[offset : offset + layout.sizes[position]].set(units.reshape(-1))


def unit_norms(
  specs: Mapping[str, _units.UnitSpec], layout: Layout, tree: Any, dtype: Any
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
  leaves = dict(_tree.flatten_with_paths(tree)[0])
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
