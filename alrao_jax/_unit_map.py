"""UnitMap: the place of each unit of a network in a vector."""

import functools
import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from . import _checks
from ._rules import Shape, UnitSpec, override_text
from ._tree import by_parts, count_heads, flatten_with_paths, parts_of, path_of
from ._units import UnitOptions, read_units, shapes_of


@dataclass(frozen=True, eq=False)
class UnitMap:
  """The units of a network, and their places in a vector.

  One vector of shape ``(max(num_units, 1),)`` holds a number for each unit (its
  quantile, its rate, how often it was stopped), with the groups of units in the order
  of their names. Another one, of shape ``(max(num_heads, 1),)``, holds a number for
  each head. No vector is empty: without units, or without heads, it has one unused
  entry.

  :func:`unit_map` makes it. Whatever needs units asks it, and slices no vector by hand.

  Attributes:
    specs: The units of each parameter by path.
    groups: The place of each group in the vector of units, by name, in order.
    num_heads: Number of heads, 0 without heads.
    num_units: Number of units of the body, which draw their rates.
  """

  specs: Mapping[str, UnitSpec]
  groups: Mapping[str, slice]
  num_heads: int
  num_units: int

  @functools.cached_property
  def fingerprint(self) -> int:
    """A 32-bit hash of the entry of each parameter, for any number of heads."""
    readers = [
      (s.path, s.kind, s.shape[s.of_heads :], s.axes, s.group, s.tiles)
      for s in sorted(self.specs.values(), key=lambda spec: spec.path)
    ]
    return stable_hash(repr(readers))

  @functools.cached_property
  def body(self) -> "UnitMap":
    """The map without the heads, with the same vector of units."""
    specs = {path: s for path, s in self.specs.items() if not s.of_heads}
    return replace(self, specs=specs, num_heads=0)

  def check(self, call: str, fingerprint: Any, units: Any, heads: Any = None) -> None:
    """Refuses a state that was made for other parameters, or with other options.

    Args:
      call: The call that the error names.
      fingerprint: The state's :attr:`fingerprint`, from its ``init``. A traced one is
        not compared.
      units: A vector of the state, with one entry a unit.
      heads: A vector of the state with one entry a head, if it has one.

    Raises:
      ValueError: If the state is of other parameters.
    """
    same = units.shape == (max(self.num_units, 1),)
    same = same and (heads is None or heads.shape == (max(self.num_heads, 1),))
    if same and _checks.is_concrete(fingerprint):
      same = int(fingerprint) == self.fingerprint
    if not same:
      raise ValueError(
        f"{call} got a state of {units.size} units, made for other parameters than "
        f"these with {self.num_units}, or with other options. Call init with these "
        "parameters, or pass those of init, with the same units= (for optax.masked and "
        "optax.partition: the part's own state with the part's own parameters)."
      )

  def scale(
    self, updates: Any, units: jax.Array, heads: jax.Array | None = None
  ) -> Any:
    """Multiplies the part of each unit and of each head by its own factor.

    Args:
      updates: A tree like the parameters.
      units: The units' factors.
      heads: The heads' factors. None leaves the heads as they are.

    Returns:
      The tree, in its dtypes: half precision is multiplied in float32 and rounded once,
      of complex numbers each part is multiplied. Frozen parameters get zeros.

    Raises:
      ValueError: If the tree is not like the parameters.
    """

    def scale(spec, update):
      factors = self._of_leaf(spec, units, heads)

      def multiply(part):
        # Half precision would round the factors.
        wide = part.dtype if part.dtype.itemsize >= 4 else jnp.float32
        return (part.astype(wide) * factors.astype(wide)).astype(part.dtype)

      return by_parts(multiply, update)

    return self._map(scale, updates, heads is not None)

  def keep(self, updates: Any, units: jax.Array) -> Any:
    """Zeroes the parts of units that are not kept, also NaN and infinities.

    Args:
      updates: A tree like the parameters.
      units: Which units are kept, bool.

    Returns:
      The tree, with its heads unchanged.

    Raises:
      ValueError: If the tree is not like the parameters.
    """

    def keep(spec, update):
      kept = self._of_leaf(spec, units, None)
      return jnp.where(kept, update, jnp.zeros_like(update))

    return self._map(keep, updates, False)

  def gather(self, tree: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Reads vectors from a tree with equal entries within each unit and each head.

    It is the inverse of :meth:`scale` on a tree of ones. It takes the first entry of a
    unit in the last of its parameters.

    Args:
      tree: A tree of real arrays, in the shapes of the parameters.
      dtype: Dtype of the result.

    Returns:
      The vector of units and that of heads; unused entries are 0.
    """

    def first(spec, leaf):
      index = tuple(slice(None) if i in spec.axes else 0 for i in range(leaf.ndim))
      entries = leaf[index].astype(dtype)
      return entries[..., : spec.unit_shape[-1]] if spec.tiles > 1 else entries

    return self._vectors(tree, dtype, first, lambda _, last: last)

  def norms(self, tree: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the Euclidean norm of each unit and head over all its entries.

    A complex entry counts by its magnitude.

    Args:
      tree: Parameters, or updates like them.
      dtype: Dtype of the sums and the result. A norm is ``inf`` if its square
        overflows.

    Returns:
      The vector of units and that of heads; unused entries are 0.
    """

    def squares(spec, leaf):
      others = tuple(axis for axis in range(leaf.ndim) if axis not in spec.axes)
      squares = [jnp.square(part.astype(dtype)) for part in parts_of(leaf)]
      sums = jnp.sum(sum(squares[1:], squares[0]), axis=others)
      if spec.tiles == 1:
        return sums
      # Gates of one cell are the same units, one after the other.
      return sums.reshape((*spec.unit_shape[:-1], spec.tiles, -1)).sum(axis=-2)

    units, heads = self._vectors(tree, dtype, squares, jnp.add)
    return jnp.sqrt(units), jnp.sqrt(heads)

  def _of_leaf(self, spec, units, heads) -> jax.Array:
    """A parameter's entries of the vectors, in a shape that broadcasts to it."""
    if spec.kind == "head":
      entries = heads
    else:
      entries = units[self.groups[spec.group]].reshape(spec.unit_shape)
      if spec.tiles > 1:
        entries = jnp.tile(entries, (1,) * (entries.ndim - 1) + (spec.tiles,))
    shape = [size if i in spec.axes else 1 for i, size in enumerate(spec.shape)]
    return entries.reshape(shape)

  def _map(self, change, updates, with_heads) -> Any:
    """Changes every leaf (the heads' only if asked); frozen ones become zeros."""

    def visit(keys, update):
      spec = self.specs.get(path_of(keys))
      if spec is None or spec.shape != update.shape:
        raise ValueError(
          "update() needs updates like the parameters, got "
          f"{path_of(keys)!r} of shape {update.shape} instead of "
          f"{'none' if spec is None else spec.shape}."
        )
      if spec.of_heads and not with_heads:
        return update
      if spec.kind == "frozen":
        return jnp.zeros_like(update)
      return change(spec, update)

    return jax.tree_util.tree_map_with_path(visit, updates)

  def _vectors(self, tree, dtype, read, merge) -> tuple[jax.Array, jax.Array]:
    """Reads both vectors from all leaves, and merges the leaves of a group."""
    leaves = dict(flatten_with_paths(tree)[0])
    found: dict[str | None, jax.Array] = {}  # None: the heads, which are no group
    for path, spec in self.specs.items():
      if spec.kind != "frozen":
        entries = read(spec, leaves[path]).reshape(-1)
        group = None if spec.kind == "head" else spec.group
        found[group] = merge(found[group], entries) if group in found else entries
    heads = found.get(None, jnp.zeros([max(self.num_heads, 1)], dtype))
    units = [found[name] for name in self.groups] or [jnp.zeros([1], dtype)]
    return jnp.concatenate(units), heads


def unit_map(params: Any, options: UnitOptions = UnitOptions()) -> UnitMap:
  """Reads the units of a tree, only once for the same paths and shapes.

  Args:
    params: The parameters, arrays or ``jax.ShapeDtypeStruct``, or a tree like them.
    options: How to read them.

  Returns:
    The :class:`UnitMap`; the same object for the same paths, shapes and options. When
    it is first made, it warns if the units of more than a quarter of the parameters
    are assumed among several axes.

  Raises:
    TypeError: As :func:`unit_specs`.
    ValueError: As :func:`unit_specs`; if the heads disagree on their number.

  Example:
    >>> import jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    >>> units = unit_map(params)
    >>> print(units.scale(params, jnp.array([0.5, 2.0]))["dense"]["kernel"][0])
    [0.5 2. ]
  """
  return _unit_map(shapes_of(params), options)


@functools.lru_cache(maxsize=64)
def _unit_map(shapes: tuple[tuple[str, Shape], ...], options: UnitOptions) -> UnitMap:
  specs = read_units(shapes, options)
  _warn_of_guesses(specs)
  arrays = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes}
  # A group's members have equal unit shapes: read_units has made sure of it.
  drawn = [s for s in specs.values() if s.kind not in ("head", "frozen")]
  sizes = {s.group: s.num_units for s in drawn}
  groups, end = {}, 0
  for name in sorted(sizes):
    groups[name] = slice(end, end + sizes[name])
    end += sizes[name]
  return UnitMap(specs, groups, count_heads("init()", arrays), end)


# Models that are mostly known have up to 14 % of their parameters assumed, others 40 %
# and more: the layers and models of tests/published_cases.py.
_MANY = 0.25


def _warn_of_guesses(specs: Mapping[str, UnitSpec]) -> None:
  """Warns if the units of many parameters are guesses among several axes."""
  sizes = {path: math.prod(s.shape) for path, s in specs.items() if not s.of_heads}
  assumed = [p for p in sizes if specs[p].assumed and _num_axes(specs[p]) > 1]
  share = sum(sizes[path] for path in assumed) / max(sum(sizes.values()), 1)
  if share > _MANY:
    first = specs[max(assumed, key=lambda path: sizes[path])]
    warnings.warn(
      f"The units of {share:.0%} of the parameters are assumed: no rule knows "
      f"{first.path!r} of shape {first.shape} and the like. Look at "
      "print(alrao_jax.describe_units(params)). With the right axes for AXES, "
      f"{override_text(first.path, 'AXES')}.",
      stacklevel=2,
    )


def _num_axes(spec: UnitSpec) -> int:
  """The number of axes that could index units."""
  return sum(size != 1 for size in spec.shape)


def stable_hash(name: str) -> int:
  """A 32-bit hash that is the same in every process, unlike Python's own."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
