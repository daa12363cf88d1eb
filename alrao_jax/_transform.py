"""The optax transformation that gives every unit its own learning rate."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _checks, _rates, _units
from ._state import state_dtype


class ScaleByUnitRatesState(NamedTuple):
  """State of :func:`scale_by_unit_rates`.

  Attributes:
    fingerprint: A uint32 scalar that tells whether parameters are read as they were at
      ``init``.
    key: With ``redraw=True`` the data of the key for the next draw, two uint32; else
      ``()``.
    quantiles: Shape ``(num_heads + num_units,)``, one float for each unit of the
      whole network: the heads' ladder, then the groups of units by name.
    unit_distribution: The distribution of the units' rates, a NamedTuple of scalars
      with the values of the last update.
    head_distribution: The same for the ladder of the heads.
  """

  fingerprint: jax.Array
  key: Any
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
    single_head_learning_rate: The rate of the head where ``num_heads`` is 1, within the
      interval; its geometric middle by default.
    flip_sign: Whether updates are negated, as for gradient descent.

  Returns:
    The transformation. Its updates are negated unless ``flip_sign`` is off, and keep
    the dtype of the gradients.

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
  options = _units.UnitOptions(tuple(overrides), heads, strict, unit_axis, granularity)

  def distributions(dtype):
    interval = _rates.LogUniform(min_learning_rate, max_learning_rate)
    units = interval if distribution is None else distribution
    # Copies: a donated state must not hold one buffer twice.
    cast = lambda number: jnp.array(number, dtype)  # noqa: E731
    return jax.tree.map(cast, units), jax.tree.map(cast, interval)

  def draw(key, layout, dtype, interval):
    middle = 0.5
    if single_head_learning_rate is not None:
      middle = interval.cdf(jnp.asarray(single_head_learning_rate, dtype))
    return _rates.draw_quantiles(key, layout, dtype, middle)

  def init_fn(params):
    specs = _units.unit_specs(params, options)
    layout = _rates.make_layout(specs)
    dtype = state_dtype(params)
    units, interval = distributions(dtype)
    return ScaleByUnitRatesState(
      fingerprint=jnp.asarray(_rates.fingerprint(specs), jnp.uint32),
      # Copied: the caller's key must outlive a donated state.
      key=jnp.array(_rates.threefry_words(key)) if redraw else (),
      quantiles=draw(key, layout, dtype, interval),
      unit_distribution=units,
      head_distribution=interval,
    )

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    specs = _units.unit_specs(updates if params is None else params, options)
    layout = _rates.make_layout(specs)
    check_layout(call, state, layout, specs)
    dtype = state.quantiles.dtype
    units, interval = distributions(dtype)
    state = state._replace(unit_distribution=units, head_distribution=interval)
    if redraw:
      old = jax.random.wrap_key_data(state.key, impl="threefry2x32")
      new, now = jax.random.split(old)
      # The ladder of the heads stays: it is not drawn, and may be a collapsed one.
      ladder = state.quantiles[: layout.num_heads]
      drawn = draw(now, layout, dtype, interval)[layout.num_heads :]
      state = state._replace(
        key=jax.random.key_data(new), quantiles=jnp.concatenate([ladder, drawn])
      )
    ladder, units = _rates_of_parts(state, layout)
    # Apart: where devices hold a head each, XLA splits the ladder over them, and would
    # split whatever vector it is a slice of, hence the body's updates, as well.
    units = jnp.concatenate([jnp.zeros_like(ladder), units])
    if flip_sign:
      ladder, units = -ladder, -units

    def scale(path, update):
      spec = specs.get(_units.path_of(path))
      if spec is None or spec.shape != update.shape:
        raise ValueError(
          f"{call}.update() needs updates like the parameters, got "
          f"{_units.path_of(path)!r} of shape {update.shape}."
        )
      if spec.kind == "frozen":
        return jnp.zeros_like(update)
      vector = ladder if spec.kind == "head" else units
      rates = _rates.rates_of_leaf(spec, vector, layout)
      # Half precision would round the rates: multiply in float32, round once.
      wide = update.dtype if update.dtype.itemsize >= 4 else jnp.float32
      return (update.astype(wide) * rates.astype(wide)).astype(update.dtype)

    return jax.tree_util.tree_map_with_path(scale, updates), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def rate_vector(state: ScaleByUnitRatesState, layout: _rates.Layout) -> jax.Array:
  """The rates of all heads and units, shape ``(layout.size,)``."""
  return jnp.concatenate(_rates_of_parts(state, layout))


def _rates_of_parts(
  state: ScaleByUnitRatesState, layout: _rates.Layout
) -> tuple[jax.Array, jax.Array]:
  """The rates of the heads, and those of the units."""

  def read(distribution, quantiles):
    return jnp.broadcast_to(distribution.quantile(quantiles), quantiles.shape)

  ladder = read(state.head_distribution, state.quantiles[: layout.num_heads])
  units = read(state.unit_distribution, state.quantiles[layout.num_heads :])
  return ladder, units


def check_layout(
  call: str,
  state: ScaleByUnitRatesState,
  layout: _rates.Layout,
  specs: Mapping[str, _units.UnitSpec],
) -> None:
  """Refuses parameters that are not those, or not read as those, of the state."""
  same = state.quantiles.shape == (layout.size,)
  if same and _checks.is_concrete(state.fingerprint):
    same = int(state.fingerprint) == _rates.fingerprint(specs)
  if not same:
    raise ValueError(
      f"{call} got a state with {state.quantiles.size} rates, made for other "
      f"parameters than these with {layout.size} units. Call init with these "
      "parameters, or pass those of init, with the same overrides=, heads=, "
      "unit_axis= and granularity= (for optax.masked and optax.partition: the part's "
      "own state with the part's own parameters)."
    )
