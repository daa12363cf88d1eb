"""Rates: their distributions, the ladder of the heads, and who reads which entry.

Every unit of a network owns one *quantile* ``u`` in ``[0, 1)``, every head its own in
``[0, 1]``; a distribution of rates is its quantile function. All quantiles of a network
stand in one vector: the heads' ladder, then the groups of units in the order of names.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _checks
from ._units import UnitSpec


class LogUniform(NamedTuple):
  """Log-uniform rates; made by :func:`log_uniform`, which checks its arguments.

  Attributes:
    min_learning_rate: Positive scalar; the rate at quantile 0.
    max_learning_rate: At least ``min_learning_rate``; the rate at quantile 1.
  """

  min_learning_rate: Any
  max_learning_rate: Any

  def quantile(self, u: jax.Array) -> jax.Array:
    """The rate below which a share ``u`` of the rates lies."""
    lo, hi = self.min_learning_rate, self.max_learning_rate
    # With equal bounds this is lo to the last bit; in two halves, since hi / lo may
    # overflow where neither bound does.
    half = jnp.exp(u * (jnp.log(hi) - jnp.log(lo)) / 2)
    return lo * half * half

  def cdf(self, rate: jax.Array) -> jax.Array:
    """The quantile of ``rate``: the inverse of :meth:`quantile`."""
    lo, hi = self.min_learning_rate, self.max_learning_rate
    width = jnp.log(hi) - jnp.log(lo)
    width = jnp.where(width > 0, width, jnp.ones_like(width))
    return (jnp.log(rate) - jnp.log(lo)) / width


class Bernoulli(NamedTuple):
  """One rate or none; made by :func:`bernoulli`, which checks its arguments.

  Attributes:
    rate: Positive scalar.
    p: The probability of ``rate``, in ``[0, 1]``; else the rate is 0.
  """

  rate: Any
  p: Any

  def quantile(self, u: jax.Array) -> jax.Array:
    """``rate`` for a share ``p`` of the quantiles, 0 for the rest."""
    return jnp.where(u < 1 - self.p, jnp.zeros_like(u), self.rate)

  def cdf(self, rate: jax.Array) -> jax.Array:
    """A quantile that gives ``rate``, in the middle of its share."""
    return jnp.where(rate == 0, (1 - self.p) / 2, 1 - self.p / 2)


def log_uniform(
  min_learning_rate: float = 1e-5, max_learning_rate: float = 10.0
) -> LogUniform:
  r"""Rates whose logarithm is uniform over an interval, Alrao's own distribution.

  .. math:: \eta = \eta_{\min} (\eta_{\max} / \eta_{\min})^u, \qquad u \sim U[0, 1)

  A distribution is any ``NamedTuple`` of numbers with a method ``quantile(u)``, and
  ``cdf(rate)`` where rates are to be written back with :func:`with_unit_rates`. It is
  part of the optimizer's state, so its numbers are seen in every checkpoint.

  Args:
    min_learning_rate: Positive; the lower bound of the interval.
    max_learning_rate: At least ``min_learning_rate``; the upper bound.

  Returns:
    The distribution.

  Raises:
    ValueError: If not ``0 < min_learning_rate <= max_learning_rate < inf``.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> rates = alrao.log_uniform(1e-5, 10.0).quantile(jnp.array([0.0, 0.5]))
    >>> [f"{rate:.0e}" for rate in rates]
    ['1e-05', '1e-02']

  Reference:
    Blier, Wolinski, Ollivier, `Learning with Random Learning Rates
    <https://arxiv.org/abs/1810.01322>`_, Algorithm 1.
  """
  _checks.check_interval("log_uniform()", min_learning_rate, max_learning_rate)
  return LogUniform(min_learning_rate, max_learning_rate)


def bernoulli(rate: float, p: float) -> Bernoulli:
  """A fixed rate with probability ``p``, else 0: a random part of the units learns.

  Args:
    rate: Positive; the rate of the units that learn.
    p: Probability, in ``[0, 1]``, that a unit learns.

  Returns:
    The distribution, for ``distribution=`` of :func:`scale_by_unit_rates`.

  Raises:
    ValueError: If ``rate`` is not positive or ``p`` lies outside ``[0, 1]``.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> alrao.bernoulli(0.5, p=0.25).quantile(jnp.array([0.5, 0.9])).tolist()
    [0.0, 0.5]

  Reference:
    Blier, Wolinski, Ollivier, `Learning with Random Learning Rates
    <https://arxiv.org/abs/1810.01322>`_, appendix F.
  """
  _checks.check_positive("bernoulli()", "rate", rate)
  _checks.check_probability("bernoulli()", "p", p)
  return Bernoulli(rate, p)


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
  found = {s.path: s.shape[0] for s in specs.values() if s.kind == "head"}
  if len(set(found.values())) > 1:
    raise ValueError(
      "All heads of a model must agree on num_heads, the leading axis of their "
      f"parameters, got {found}. Write the same num_heads= in every MultiHead."
    )
  return next(iter(found.values()), 0)


def draw_quantiles(
  key: jax.Array, layout: Layout, dtype: Any, single_head_quantile: Any = 0.5
) -> jax.Array:
  """Draws the vector of quantiles: the ladder of the heads, then every unit's own.

  A unit's draw depends on ``key``, its group's name and its index in the group, and on
  nothing else: adding, widening or masking a layer leaves all other draws alone.

  Args:
    key: A JAX random key of any implementation.
    layout: What :func:`make_layout` returned.
    dtype: Of the result. Draws are made in float32 whatever it is.
    single_head_quantile: The quantile of the one head where there is just one; the
      papers' formula for the ladder is 0/0 there.

  Returns:
    Shape ``(layout.size,)``, values in ``[0, 1]``.
  """
  if layout.num_heads == 1:
    ladder = jnp.asarray(single_head_quantile, dtype).reshape(1)
  else:
    ladder = jnp.asarray(np.linspace(0.0, 1.0, layout.num_heads), dtype)
  if not layout.names:
    return ladder
  return jnp.concatenate([ladder, _draw_units(key, layout).astype(dtype)])


def threefry_words(key: jax.Array) -> jax.Array:
  """Returns two uint32 words, the data of a threefry key made from a key of any kind.

  Other generators draw differently under ``jax.vmap``, which would make the draw of
  one unit depend on the units beside it.
  """
  words = jax.random.key_data(key)
  made = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
  for word in words[2:]:  # an rbg key has four
    made = jax.random.fold_in(made, word)
  return jax.random.key_data(made)


@functools.partial(jax.jit, static_argnums=1)
def _draw_units(key, layout):
  key = jax.random.wrap_key_data(threefry_words(key), impl="threefry2x32")
  sizes = np.asarray(layout.sizes)
  hashes = np.asarray([_stable_hash(name) for name in layout.names], np.uint32)
  starts = (np.cumsum(sizes) - sizes).astype(np.uint32)
  total = int(sizes.sum())
  repeat = functools.partial(
    jnp.repeat, repeats=jnp.asarray(sizes), total_repeat_length=total
  )
  index = jnp.arange(total, dtype=jnp.uint32) - repeat(jnp.asarray(starts))

  def draw(name_hash, i):
    unit_key = jax.random.fold_in(jax.random.fold_in(key, name_hash), i)
    return jax.random.uniform(unit_key, dtype=jnp.float32)

  return jax.vmap(draw)(repeat(jnp.asarray(hashes)), index)


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
