"""Learning rates: distributions, the heads' ladder, the units' draws.

Every unit of a network has one *quantile* ``u`` in ``[0, 1)``, and every head has one
in ``[0, 1]``. A distribution of rates is its quantile function. The state holds two
vectors: the heads' ladder, and the quantiles of all units.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks, _tree
from ._tree import find_state, flatten_with_paths, replace_state, state_dtype
from ._unit_map import UnitMap, stable_hash, unit_map
from ._units import UnitOptions, check_options


class LogUniform(NamedTuple):
  """Log-uniform rates; :func:`log_uniform` makes them and checks the arguments.

  Attributes:
    min_learning_rate: Positive scalar; the rate at quantile 0.
    max_learning_rate: At least ``min_learning_rate``; the rate at quantile 1.
  """

  min_learning_rate: Any
  max_learning_rate: Any

  def quantile(self, u: jax.Array) -> jax.Array:
    """The rate at quantile ``u``: a share ``u`` of all rates is below it."""
    lo, hi = self.min_learning_rate, self.max_learning_rate
    # With equal bounds this is lo to the last bit. In two halves, since hi / lo may
    # overflow although neither bound does.
    half = jnp.exp(u * (jnp.log(hi) - jnp.log(lo)) / 2)
    return lo * half * half

  def cdf(self, rate: jax.Array) -> jax.Array:
    """The quantile of ``rate``: the inverse of :meth:`quantile`."""
    lo, hi = self.min_learning_rate, self.max_learning_rate
    width = jnp.log(hi) - jnp.log(lo)
    width = jnp.where(width > 0, width, jnp.ones_like(width))
    return (jnp.log(rate) - jnp.log(lo)) / width


class Bernoulli(NamedTuple):
  """One rate or 0; :func:`bernoulli` makes it and checks the arguments.

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
  r"""Log-uniform rates over an interval, Alrao's own distribution.

  .. math:: \eta = \eta_{\min} (\eta_{\max} / \eta_{\min})^u, \qquad u \sim U[0, 1)

  A distribution is any ``NamedTuple`` of numbers with a method ``quantile(u)``;
  :func:`with_unit_rates` also needs ``cdf(rate)``. It is part of the optimizer's state,
  so every checkpoint shows its numbers.

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
  """A fixed rate with probability ``p``, else 0: a random part of the units moves.

  Args:
    rate: Positive; the rate of the units that move.
    p: Probability, in ``[0, 1]``, that a unit moves.

  Returns:
    The distribution, for ``distribution=`` of :func:`scale_by_unit_rates`.

  Raises:
    ValueError: If ``rate`` is not positive or ``p`` is outside ``[0, 1]``.

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


def ladder_quantiles(num_heads: int, dtype: Any, single: Any = 0.5) -> jax.Array:
  """The quantiles of the heads: evenly spaced, 0 for the slowest and 1 for the fastest.

  Args:
    num_heads: Number of heads; 0 for a vector with one unused entry.
    dtype: Dtype of the result.
    single: The quantile of a single head, for which the papers' formula is 0/0.

  Returns:
    Shape ``(max(num_heads, 1),)``.
  """
  if num_heads == 1:
    return jnp.asarray(single, dtype).reshape(1)
  return jnp.asarray(np.linspace(0.0, 1.0, max(num_heads, 1)), dtype)


def unit_quantiles(key: jax.Array, units: UnitMap, dtype: Any) -> jax.Array:
  """Draws the quantile of every unit.

  A unit's draw depends only on ``key``, its group's name and its index in the group:
  adding, widening or masking a layer changes no other draw.

  Args:
    key: A JAX random key of any implementation.
    units: The units.
    dtype: Dtype of the result. Draws are always made in float32.

  Returns:
    Shape ``(max(num_units, 1),)``, values in ``[0, 1)``.
  """
  if not units.num_units:
    return jnp.zeros([1], dtype)  # nobody reads it
  sizes = tuple(where.stop - where.start for where in units.groups.values())
  return _draw_units(key, tuple(units.groups), sizes).astype(dtype)


def threefry_words(key: jax.Array) -> jax.Array:
  """Returns two uint32 words, the data of a threefry key made from a key of any kind.

  Other generators draw differently under ``jax.vmap``, which would make the draw of
  one unit depend on the units next to it.
  """
  words = jax.random.key_data(key)
  made = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
  for word in words[2:]:  # an rbg key has four
    made = jax.random.fold_in(made, word)
  return jax.random.key_data(made)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw_units(key, names, sizes):
  key = jax.random.wrap_key_data(threefry_words(key), impl="threefry2x32")
  sizes = np.asarray(sizes)
  hashes = np.asarray([stable_hash(name) for name in names], np.uint32)
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


class ScaleByUnitRatesState(NamedTuple):
  """State of :func:`scale_by_unit_rates`.

  Attributes:
    fingerprint: A uint32 scalar that tells whether parameters are read as they were at
      ``init``.
    ladder: Shape ``(max(num_heads, 1),)``, the quantile of each head, slowest first.
      Without heads it holds one unused 0.
    quantiles: Shape ``(max(num_units, 1),)``, the quantile of each unit of the whole
      network, with the groups of units in the order of their names.
    unit_distribution: The distribution of the units' rates, a NamedTuple of scalars
      with the values of the last update.
    head_distribution: The same for the ladder of the heads.
  """

  fingerprint: jax.Array
  ladder: jax.Array
  quantiles: jax.Array
  unit_distribution: Any
  head_distribution: LogUniform


@_checks.refuses_removed
def scale_by_unit_rates(
  key: jax.Array,
  min_learning_rate: float = 1e-5,
  max_learning_rate: float = 10.0,
  *,
  distribution: Any = None,
  units: UnitOptions = UnitOptions(),
  single_head_learning_rate: float | None = None,
  flip_sign: bool = True,
) -> optax.GradientTransformationExtraArgs:
  r"""Scales updates by random learning rates, one for each unit of the network.

  Use it in the place of :func:`optax.scale_by_learning_rate`. Each unit (feature,
  channel, LSTM cell) draws its rate once, at ``init``, log-uniformly from
  :math:`[\eta_{\min}, \eta_{\max}]`; all of the unit's incoming weights and its bias
  share it:

  .. math:: u_t = -\eta_{\mathrm{unit}} \, g_t

  Head ``j`` of a :class:`~alrao_jax.linen.MultiHead` draws no rate. Its rate is
  :math:`\eta_{\min} (\eta_{\max} / \eta_{\min})^{(j - 1) / (N - 1)}`.

  Args:
    key: JAX random key. A unit's draw depends only on it, on the name of the unit's
      layer and on the unit's index.
    min_learning_rate: Positive; the lower bound of the interval.
    max_learning_rate: At least ``min_learning_rate``; the upper bound.
    distribution: Distribution of the units' rates (not of the heads'), such as
      :func:`bernoulli`; log-uniform over the interval by default.
    units: How the units are read: overrides, strictness, and where kernels keep their
      units. Pass the same options to every function that reads units.
    single_head_learning_rate: The rate of the head if ``num_heads`` is 1, within the
      interval; the geometric middle of the interval by default.
    flip_sign: Whether updates are negated, as for gradient descent.

  Returns:
    The transformation. Its updates are negated if ``flip_sign`` is True, and keep the
    dtype of the gradients.

  Raises:
    TypeError: If ``key`` is no random key, ``units`` no :class:`UnitOptions`, or at
      ``init`` for parameters of integers.
    ValueError: If not ``0 < min_learning_rate <= max_learning_rate < inf``; at
      ``init`` for overrides that match nothing and layers whose units are ambiguous.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp, optax
    >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    >>> optimizer = optax.chain(
    ...   optax.trace(0.9), alrao.scale_by_unit_rates(jax.random.key(0)))
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> bool((updates["dense"]["kernel"][0] == updates["dense"]["bias"]).all())
    True

  Reference:
    Blier, Wolinski, Ollivier, `Learning with Random Learning Rates
    <https://arxiv.org/abs/1810.01322>`_, Algorithm 1.
  """
  call = "scale_by_unit_rates()"
  _checks.check_key(call, key)
  _checks.check_interval(call, min_learning_rate, max_learning_rate)
  if single_head_learning_rate is not None:
    lone, name = single_head_learning_rate, "single_head_learning_rate"
    _checks.check_interval(
      call, min_learning_rate, lone, names=("min_learning_rate", name)
    )
    _checks.check_interval(
      call, lone, max_learning_rate, names=(name, "max_learning_rate")
    )
  if distribution is not None and not (
    isinstance(distribution, tuple) and hasattr(distribution, "quantile")
  ):
    raise TypeError(
      f"{call[:-1]}distribution=...) must be a NamedTuple with a method quantile(u), "
      "such as alrao_jax.log_uniform(1e-5, 10.0) or alrao_jax.bernoulli(0.1, p=0.5), "
      f"got {distribution!r}."
    )
  check_options(call, units)

  def distributions(dtype):
    interval = LogUniform(min_learning_rate, max_learning_rate)
    law = interval if distribution is None else distribution
    # Copies: a donated state must not hold one buffer twice.
    cast = lambda number: jnp.array(number, dtype)  # noqa: E731
    return jax.tree.map(cast, law), jax.tree.map(cast, interval)

  def init_fn(params):
    network = unit_map(params, units)
    dtype = state_dtype(params)
    law, interval = distributions(dtype)
    middle = 0.5
    if single_head_learning_rate is not None:
      middle = interval.cdf(jnp.asarray(single_head_learning_rate, dtype))
    return ScaleByUnitRatesState(
      fingerprint=jnp.asarray(network.fingerprint, jnp.uint32),
      ladder=ladder_quantiles(network.num_heads, dtype, middle),
      quantiles=unit_quantiles(key, network, dtype),
      unit_distribution=law,
      head_distribution=interval,
    )

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    _tree.check_state(call + ".update()", state, ScaleByUnitRatesState)
    network = unit_map(updates if params is None else params, units)
    network.check(call, state.fingerprint, state.quantiles, state.ladder)
    dtype = state.quantiles.dtype
    law, interval = distributions(dtype)
    state = state._replace(unit_distribution=law, head_distribution=interval)
    rates = rates_of(state)
    if flip_sign:
      rates = [-rate for rate in rates]
    return network.scale(updates, *rates), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def rates_of(state: ScaleByUnitRatesState) -> tuple[jax.Array, jax.Array]:
  """The rates of the units, and those of the heads: two vectors."""

  def read(distribution, quantiles):
    return jnp.broadcast_to(distribution.quantile(quantiles), quantiles.shape)

  units = read(state.unit_distribution, state.quantiles)
  return units, read(state.head_distribution, state.ladder)


@_checks.refuses_removed
def unit_rates(
  opt_state: Any, params: Any, *, units: UnitOptions = UnitOptions()
) -> Any:
  """Returns the learning rate of every parameter entry, to look at.

  Args:
    opt_state: State of an optimizer that holds one :func:`scale_by_unit_rates`, within
      any chain or wrapper. If a mask or a partition gives it only a part of the
      parameters, pass that part's state.
    params: The parameters that the state was initialised with, or a tree of their
      shapes.
    units: How the units are read, as given to the optimizer.

  Returns:
    A tree like ``params``, each leaf in its parameter's shape. The rates don't include
    a schedule that multiplies them. They are those of the last update: the interval
    belongs to the optimizer, so a state that is restored for another interval, or after
    a change of injected bounds, shows the old rates until its next update.

  Raises:
    ValueError: If ``opt_state`` holds no or several states with rates, or belongs to
      other parameters.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    >>> opt_state = alrao.scale_by_unit_rates(jax.random.key(0), 0.1, 0.1).init(params)
    >>> print(alrao.unit_rates(opt_state, params)["dense"]["bias"])
    [0.1 0.1]
  """
  state, network = _read("unit_rates()", opt_state, params, units)
  return _as_tree(state, network, params)


def _read(
  call: str, opt_state: Any, params: Any, units: UnitOptions
) -> tuple[ScaleByUnitRatesState, UnitMap]:
  """The state with the rates, and the units that it was made for."""
  check_options(call, units)
  _tree.check_tree(call, params)
  state, network = find_rates(opt_state, call), unit_map(params, units)
  network.check(call, state.fingerprint, state.quantiles, state.ladder)
  return state, network


def _as_tree(state: ScaleByUnitRatesState, units: UnitMap, params: Any) -> Any:
  """The rates of every parameter's entries."""
  dtype = state.quantiles.dtype
  ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, dtype), params)
  return units.scale(ones, *rates_of(state))


@_checks.refuses_removed
def with_unit_rates(
  opt_state: Any, params: Any, rates: Any, *, units: UnitOptions = UnitOptions()
) -> Any:
  """Returns ``opt_state`` with the given learning rates in place of the drawn ones.

  Args:
    opt_state: As for :func:`unit_rates`.
    params: As for :func:`unit_rates`.
    rates: A tree like ``params``, each leaf in its parameter's shape, as
      :func:`unit_rates` returns. The entries of a unit must be equal. Log-uniform rates
      may be outside their interval. (An update with a new interval scales them to it.)
    units: As for :func:`unit_rates`.

  Returns:
    A new state; only its quantiles differ.

  Raises:
    ValueError: As for :func:`unit_rates`; if ``rates`` is not a tree like ``params``,
      or holds rates that differ within a unit or that the distribution doesn't have.
    TypeError: If the distribution of the rates has no ``cdf``, or rates are complex.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    >>> opt_state = alrao.scale_by_unit_rates(jax.random.key(0)).init(params)
    >>> halved = jax.tree.map(lambda r: r / 2, alrao.unit_rates(opt_state, params))
    >>> opt_state = alrao.with_unit_rates(opt_state, params, halved)
  """
  call = "with_unit_rates()"
  state, network = _read(call, opt_state, params, units)
  if not hasattr(state.unit_distribution, "cdf"):
    raise TypeError(
      f"{call} needs the inverse of the rates' distribution: give "
      f"{type(state.unit_distribution).__name__} a method cdf(rate)."
    )
  values = dict(flatten_with_paths(rates)[0])
  for path, spec in network.specs.items():
    if path not in values or values[path].shape != spec.shape:
      raise ValueError(
        f"{call} needs rates of shape {spec.shape} for {path!r}, got "
        f"{values[path].shape if path in values else 'none'}."
      )
    if jnp.issubdtype(values[path].dtype, jnp.complexfloating):
      raise TypeError(
        f"{call} needs real rates, also for complex parameters, got "
        f"{values[path].dtype} for {path!r}."
      )
  of_units, of_heads = network.gather(rates, state.quantiles.dtype)
  new = state
  if network.num_units:
    new = new._replace(quantiles=state.unit_distribution.cdf(of_units))
  if any(spec.kind == "head" for spec in network.specs.values()):  # and not all frozen
    new = new._replace(ladder=state.head_distribution.cdf(of_heads))
  held = dict(flatten_with_paths(_as_tree(new, network, params))[0])
  _check_written(call, network, values, held)
  return replace_state(
    opt_state,
    ScaleByUnitRatesState,
    lambda old: old._replace(ladder=new.ladder, quantiles=new.quantiles),
  )


def find_rates(opt_state: Any, call: str = "unit_rates()") -> ScaleByUnitRatesState:
  """Finds the one state with rates, its leaves as plain arrays."""
  return find_state(opt_state, ScaleByUnitRatesState, "scale_by_unit_rates", call)


def _check_written(call, units, wanted, held):
  """Refuses rates that the state can't hold, instead of changing them silently."""
  for path, spec in units.specs.items():
    if spec.kind == "frozen" or not _checks.is_concrete(wanted[path]):
      continue
    if not np.allclose(np.asarray(held[path]), wanted[path], rtol=1e-4, atol=0):
      raise ValueError(
        f"{call} can't give {path!r} these rates: entries of one unit must be equal, "
        "also across the parameters that share it, and rates must be ones that the "
        "distribution has (with equal bounds just one)."
      )
