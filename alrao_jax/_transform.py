"""The optax transformation that gives every unit its own learning rate."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _checks, _rates, _units
from ._state import find_state, replace_state, state_dtype


class ScaleByUnitRatesState(NamedTuple):
  """State of :func:`scale_by_unit_rates`.

  Attributes:
    count: Updates made, an int32 scalar; what ``redraw=True`` derives its keys from.
    quantiles: Shape ``(num_heads + num_units,)``, one float for each unit of the
      whole network: the heads' ladder, then the groups of units by name.
    unit_distribution: The distribution of the units' rates, a NamedTuple of scalars
      with the values of the last update.
    head_distribution: The same for the ladder of the heads.
  """

  count: jax.Array
  quantiles: jax.Array
  unit_distribution: Any
  head_distribution: _rates.LogUniform


def scale_by_unit_rates(
  key: jax.Array,
  min_learning_rate: float = 1e-5,
  max_learning_rate: float = 10.0,
  *,
  distribution: Any = None,
  overrides: tuple = (),
  heads: str | None = _units.HEADS_REGEX,
  strict: bool = False,
  unit_axis: Literal["last", "first"] = "last",
  granularity: Literal["per_unit", "per_weight"] = "per_unit",
  redraw: bool = False,
  single_head_learning_rate: float | None = None,
  flip_sign: bool = True,
) -> optax.GradientTransformationExtraArgs:
  r"""Scales updates by random learning rates, one for each unit of the network.

  Stands exactly where :func:`optax.scale_by_learning_rate` stands. Each unit (feature,
  channel, LSTM cell) draws its rate once, at ``init``, log-uniformly from
  :math:`[\eta_{\min}, \eta_{\max}]`; all of the unit's incoming weights and its bias
  share it:

  .. math:: u_t = -\eta_{\mathrm{unit}} \, g_t

  Head ``j`` of a :class:`~alrao_jax.linen.MultiHead` is not drawn but has the rate
  :math:`\eta_{\min} (\eta_{\max} / \eta_{\min})^{(j - 1) / (N - 1)}`.

  Args:
    key: JAX random key. A unit's draw depends on it, on the name of the unit's layer
      and on the unit's index, on nothing else.
    min_learning_rate: Positive; the lower bound of the interval.
    max_learning_rate: At least ``min_learning_rate``; the upper bound.
    distribution: Distribution of the units' rates (not of the heads'), such as
      :func:`bernoulli`; log-uniform over the interval by default.
    overrides: Pairs ``(pattern, what)`` that correct how units are found; see
      :func:`unit_specs`.
    heads: Regular expression for the paths of the heads' parameters, which have the
      heads on axis 0. ``None``: the model has none.
    strict: Whether a parameter whose units had to be guessed is an error.
    unit_axis: Where kernels keep their units: ``"last"`` (Flax, Haiku) or ``"first"``
      (Equinox).
    granularity: ``"per_weight"`` gives every single weight its own rate, for studies:
      the papers' appendix E finds it inferior, and it costs one float a weight.
    redraw: Whether rates are drawn anew at every step, the papers' control experiment
      (it amounts to SGD at the mean rate).
    single_head_learning_rate: The rate of the head where ``num_heads`` is 1; the
      geometric middle of the interval by default.
    flip_sign: Whether updates are negated, as for gradient descent.

  Returns:
    The transformation. Its updates keep the dtype of the gradients.

  Raises:
    TypeError: If ``key`` is no random key, or at ``init`` for integer parameters.
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
    <https://arxiv.org/abs/1810.01322>`_, section 2 and algorithm 1.
  """
  call = "scale_by_unit_rates()"
  _checks.check_key(call, key)
  _checks.check_interval(call, min_learning_rate, max_learning_rate)
  if single_head_learning_rate is not None:
    _checks.check_positive(call, "single_head_learning_rate", single_head_learning_rate)
  if distribution is not None and not hasattr(distribution, "quantile"):
    raise TypeError(
      f"{call[:-1]}distribution=...) must be a NamedTuple with a method quantile(u), "
      "such as alrao_jax.log_uniform(1e-5, 10.0) or alrao_jax.bernoulli(0.1, p=0.5), "
      f"got {distribution!r}."
    )
  options = _units.UnitOptions(tuple(overrides), heads, strict, unit_axis, granularity)

  def distributions(dtype):
    interval = _rates.LogUniform(min_learning_rate, max_learning_rate)
    units = interval if distribution is None else distribution
    cast = lambda number: jnp.asarray(number, dtype)  # noqa: E731
    return jax.tree.map(cast, units), jax.tree.map(cast, interval)

  def draw(key, layout, dtype, interval):
    middle = 0.5
    if single_head_learning_rate is not None:
      middle = interval.cdf(jnp.asarray(single_head_learning_rate, dtype))
    return _rates.draw_quantiles(key, layout, dtype, middle)

  def init_fn(params):
    layout = _rates.make_layout(_units.unit_specs(params, options))
    dtype = state_dtype(params)
    units, interval = distributions(dtype)
    return ScaleByUnitRatesState(
      count=jnp.zeros([], jnp.int32),
      quantiles=draw(key, layout, dtype, interval),
      unit_distribution=units,
      head_distribution=interval,
    )

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    # With parameters at hand a missing gradient can't change who reads which entry.
    specs = _units.unit_specs(updates if params is None else params, options)
    layout = _rates.make_layout(specs)
    _check_layout(call, state.quantiles, layout)
    dtype = state.quantiles.dtype
    units, interval = distributions(dtype)
    quantiles = state.quantiles
    if redraw:
      quantiles = draw(jax.random.fold_in(key, state.count), layout, dtype, interval)
    state = ScaleByUnitRatesState(
      count=optax.safe_increment(state.count),
      quantiles=quantiles,
      unit_distribution=units,
      head_distribution=interval,
    )
    vector = _rate_vector(state, layout)
    vector = -vector if flip_sign else vector

    def scale(path, update):
      spec = specs[_units.path_of(path)]
      if spec.kind == "frozen":
        return jnp.zeros_like(update)
      rates = _rates.rates_of_leaf(spec, vector, layout)
      # Half precision would round the rates: multiply in float32, round once.
      wide = update.dtype if update.dtype.itemsize >= 4 else jnp.float32
      return (update.astype(wide) * rates.astype(wide)).astype(update.dtype)

    return jax.tree_util.tree_map_with_path(scale, updates), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def unit_rates(opt_state: Any, params: Any, **options: Any) -> Any:
  """Returns the learning rate of every parameter entry, to look at.

  Args:
    opt_state: State of an optimizer that holds one :func:`scale_by_unit_rates`,
      within any chain or wrapper.
    params: The parameters, or a tree of their shapes.
    **options: ``overrides``, ``heads``, ``unit_axis`` and ``granularity`` as they were
      given to the optimizer.

  Returns:
    A tree like ``params``, each leaf of its parameter's shape. A schedule that
    multiplies all rates is not part of them.

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
  state = _find_rates(opt_state)
  specs = _units.unit_specs(params, _units.UnitOptions(**options))
  layout = _rates.make_layout(specs)
  _check_layout("unit_rates()", state.quantiles, layout)
  vector = _rate_vector(state, layout)

  def read(path, leaf):
    spec = specs[_units.path_of(path)]
    if spec.kind == "frozen":
      return jnp.zeros(leaf.shape, vector.dtype)
    return jnp.broadcast_to(_rates.rates_of_leaf(spec, vector, layout), leaf.shape)

  return jax.tree_util.tree_map_with_path(read, params)


def with_unit_rates(opt_state: Any, params: Any, rates: Any, **options: Any) -> Any:
  """Returns ``opt_state`` with the given learning rates in place of the drawn ones.

  Args:
    opt_state: As for :func:`unit_rates`.
    params: As for :func:`unit_rates`.
    rates: A tree like ``params``, each leaf of its parameter's shape, as
      :func:`unit_rates` returns; the entries of a unit must be equal, and the first
      one is read. Rates may lie outside the interval.
    **options: As for :func:`unit_rates`.

  Returns:
    A new state; nothing but its quantiles differs.

  Raises:
    ValueError: As for :func:`unit_rates`; if ``rates`` is not a tree like ``params``.
    TypeError: If the distribution of the rates has no ``cdf``.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    >>> opt_state = alrao.scale_by_unit_rates(jax.random.key(0)).init(params)
    >>> halved = jax.tree.map(lambda r: r / 2, alrao.unit_rates(opt_state, params))
    >>> opt_state = alrao.with_unit_rates(opt_state, params, halved)
  """
  call = "with_unit_rates()"
  state = _find_rates(opt_state)
  specs = _units.unit_specs(params, _units.UnitOptions(**options))
  layout = _rates.make_layout(specs)
  _check_layout(call, state.quantiles, layout)
  if not hasattr(state.unit_distribution, "cdf"):
    raise TypeError(
      f"{call} needs the inverse of the rates' distribution: give "
      f"{type(state.unit_distribution).__name__} a method cdf(rate)."
    )
  values = dict(_units.flatten_with_paths(rates)[0])
  vector = state.quantiles
  for path, spec in specs.items():
    if path not in values or values[path].shape != spec.shape:
      raise ValueError(
        f"{call} needs rates of shape {spec.shape} for {path!r}, got "
        f"{values[path].shape if path in values else 'none'}."
      )
    if spec.kind != "frozen":
      is_head = spec.kind == "head"
      law = state.head_distribution if is_head else state.unit_distribution
      quantiles = law.cdf(jnp.asarray(values[path], vector.dtype))
      vector = _rates.write_leaf(spec, quantiles, vector, layout)
  return replace_state(
    opt_state, ScaleByUnitRatesState, lambda old: old._replace(quantiles=vector)
  )


def _find_rates(opt_state):
  return find_state(opt_state, ScaleByUnitRatesState, "scale_by_unit_rates")


def _rate_vector(state, layout):
  ladder = state.head_distribution.quantile(state.quantiles[: layout.num_heads])
  units = state.unit_distribution.quantile(state.quantiles[layout.num_heads :])
  return jnp.concatenate([ladder, units])


def _check_layout(call, quantiles, layout):
  if quantiles.shape != (layout.size,):
    raise ValueError(
      f"{call} got a state with {quantiles.size} rates for parameters with "
      f"{layout.size} units. Call init with these parameters, and the same overrides="
      ", heads=, unit_axis= and granularity=."
    )
