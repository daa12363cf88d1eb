"""A flat dict of scalars for any logger: is it working?"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from ._readings import find_states, head_rates, posteriors, read_motion, read_trips
from ._state import find_state
from ._transform import ScaleByUnitRatesState
from ._units import HEADS_REGEX, UnitOptions


def scalars(
  opt_state: Any,
  params: Any = None,
  updates: Any = None,
  *,
  overrides: tuple = (),
  heads: str | None = HEADS_REGEX,
  unit_axis: Literal["last", "first"] = "last",
  granularity: Literal["per_unit", "per_weight"] = "per_unit",
) -> dict[str, jax.Array]:
  r"""Returns the numbers that tell whether Alrao is working, to be logged each step.

  Made for use inside the jitted step, ``metrics |= alrao.scalars(opt_state, params,
  updates)``: nothing waits for the device, keys depend on the arguments and on the
  optimizer alone, and no value is ever NaN.

  =============================  ====================================================
  ``alrao/head_0/weight``, ...   Posterior weight of each head, slowest first; they
                                 sum to 1.
  ``alrao/effective_heads``      Exponential of the posterior's entropy: 1, one head
                                 has it all, to ``num_heads``, all alike.
  ``alrao/log10_rate``           Posterior mean of the decimal logarithms of the
                                 heads' rates; only where ``opt_state`` holds one
                                 :func:`scale_by_unit_rates`, the heads'.
  ``alrao/heads_alive``          Number of heads that this update moves. Needs
                                 ``updates``, like the next two.
  ``alrao/heads_dead``           Number of heads that it does not.
  ``alrao/units_alive``          Share of the units that it moves.
  ``alrao/units_guarded``        Share of the units that it guards which a
                                 :func:`guard_units` stopped at least once; only with
                                 one.
  ``alrao/guard_trips``          How often it stopped any of them, in all.
  =============================  ====================================================

  A unit, or a head, is *alive* in a step whose update of it is finite and longer than
  its weights' norm times their dtype's relative precision (1.2e-7 for float32): what is
  shorter gets lost when it is added.

  **Is it working?** Yes, if ``effective_heads`` falls to a few, and ``log10_rate``
  comes to rest inside the interval. At an end of the interval, the interval wants to be
  moved that way. A few dead heads at the fast end are what the method expects; all of
  them dead, or a falling ``units_alive``, are not: a unit too fast has made the network
  overflow, or a layer has died. See ``alrao(guard=...)``, or lower
  ``max_learning_rate``. Many units of a network with ReLU are silent on some batches,
  and slow units are lost to half precision. Under :class:`optax.MultiSteps` all updates
  but each k-th are zero, and all heads and units dead in them: look only at steps where
  ``optimizer.has_updated(opt_state)``.

  **Parts.** Where a mask or a partition gives :func:`scale_by_unit_rates` a part of the
  parameters only, pass the part of all three. With ``optax.chain(optax.partition({"b":
  ..., "h": ...}, labels), track_heads())``, of which "h" is the layer ``out``::

    part = lambda tree: {"out": tree["out"]}
    state = (opt_state[0].inner_states["h"], opt_state[1])
    metrics |= alrao.scalars(state, part(params), part(updates))

  Args:
    opt_state: State of an optimizer that holds a :func:`track_heads`, a
      :func:`scale_by_unit_rates` or both, within any chain or wrapper, or the
      ``opt_state`` of an ``nnx.Optimizer``. With ``updates`` just one
      :func:`scale_by_unit_rates`.
    params: The parameters; needed with ``updates`` only, like all that follow.
    updates: What ``optimizer.update`` returned, a tree like ``params``.
    overrides: As given to the optimizer.
    heads: As given to the optimizer.
    unit_axis: As given to the optimizer.
    granularity: As given to the optimizer.

  Returns:
    Scalars by name. With ``names``, names of layers, the posteriors' keys begin with
    ``alrao/<name>/`` instead.

  Raises:
    ValueError: If ``opt_state`` holds no such state, several posteriors, or one for
      each of several seeds; if ``updates`` come without ``params``, or with a state
      that is of other parameters or holds several :func:`scale_by_unit_rates`.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"bias": jnp.zeros((2, 3))}}}
    >>> opt_state = alrao.alrao(jax.random.key(0)).init(params)
    >>> print({name: round(float(x), 2) for name, x in scalars(opt_state).items()})
    {'alrao/head_0/weight': 0.5, 'alrao/head_1/weight': 0.5,
     'alrao/effective_heads': 2.0, 'alrao/log10_rate': -2.0}
  """
  found = {}
  layers = posteriors("scalars()", opt_state)
  rates = find_states(opt_state, ScaleByUnitRatesState)
  if not layers and not rates:
    find_state(opt_state, ScaleByUnitRatesState, "scale_by_unit_rates")  # its error
  for name, log_weights in layers.items():
    prefix = "alrao/" if name is None else f"alrao/{name}/"
    weights = jnp.exp(log_weights)
    for head, weight in enumerate(weights):
      found[f"{prefix}head_{head}/weight"] = weight
    found[f"{prefix}effective_heads"] = effective_heads(log_weights)
    if len(rates) == 1:
      log10_rates = jnp.log10(head_rates(rates[0], len(weights))).astype(weights.dtype)
      found[f"{prefix}log10_rate"] = jnp.sum(weights * log10_rates)
  if updates is not None:
    if params is None:
      raise ValueError(
        "scalars(updates=...) needs params, to compare updates with: write "
        "scalars(opt_state, params, updates)."
      )
    options = UnitOptions(tuple(overrides), heads, False, unit_axis, granularity)
    motion = read_motion("scalars()", opt_state, params, updates, options)
    if motion.heads_alive.size:
      found["alrao/heads_alive"] = jnp.sum(motion.heads_alive)
      found["alrao/heads_dead"] = jnp.sum(~motion.heads_alive)
    if motion.alive.size:
      found["alrao/units_alive"] = _share(motion.alive)
  trips = read_trips(opt_state)
  if trips is not None:
    found["alrao/units_guarded"] = _share(trips > 0)
    found["alrao/guard_trips"] = jnp.sum(trips)
  return found


def effective_heads(log_weights: jax.Array) -> jax.Array:
  """The exponential of the entropy of the heads' weights, a scalar."""
  return jnp.exp(jnp.sum(jax.scipy.special.entr(jnp.exp(log_weights))))


def _share(which: jax.Array) -> jax.Array:
  """The share of True, 0 of none."""
  return jnp.sum(which.astype(jnp.float32)) / max(which.size, 1)
