"""A flat dict of scalars for any logger: is it working?"""

from typing import Any

import jax
import jax.numpy as jnp

from ._readings import head_rates, posteriors, read_motion, read_trips
from ._state import find_state
from ._transform import ScaleByUnitRatesState


def scalars(
  opt_state: Any, params: Any = None, updates: Any = None, **options: Any
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
                                 heads' rates.
  ``alrao/heads_alive``          Number of heads that this update moves. Needs
                                 ``updates``, like the next two.
  ``alrao/heads_dead``           Number of heads that it does not.
  ``alrao/units_alive``          Share of the units that it moves.
  ``alrao/units_guarded``        Share of the units that a :func:`guard_units`
                                 stopped at least once; only with one.
  ``alrao/guard_trips``          How often it stopped any of them, in all.
  =============================  ====================================================

  A unit, or a head, is *alive* in a step whose update of it is finite and longer than
  its weights' norm times their dtype's relative precision (1.2e-7 for float32): what is
  shorter gets lost when it is added.

  **Is it working?** Yes, if within some hundred steps ``effective_heads`` falls to
  about 1 to 3, and ``log10_rate`` comes to rest inside the interval. At an end of the
  interval, the interval wants to be moved that way. A few dead heads at the fast end
  are what the method expects; all of them dead, or a falling ``units_alive``, are
  not: a unit too fast has made the network overflow, or a layer has died. See
  ``alrao(guard=...)``, or lower ``max_learning_rate``. Many units of a network with
  ReLU are silent on some batches, and slow units are lost to half precision.

  Args:
    opt_state: State of an optimizer that holds one :func:`track_heads`, one
      :func:`scale_by_unit_rates` or both, within any chain or wrapper, or the
      ``opt_state`` of an ``nnx.Optimizer``.
    params: The parameters. Where a mask or a partition gives
      :func:`scale_by_unit_rates` a part of the parameters only, pass the part.
    updates: What ``optimizer.update`` returned, a tree like ``params``.
    **options: ``overrides``, ``heads``, ``unit_axis`` and ``granularity`` as they were
      given to the optimizer; needed with ``updates`` only.

  Returns:
    Scalars by name. With ``names``, names of layers, the posteriors' keys begin with
    ``alrao/<name>/`` instead.

  Raises:
    ValueError: If ``opt_state`` holds no such state or several, or belongs to other
      parameters; if ``updates`` come without ``params``.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"bias": jnp.zeros((2, 3))}}}
    >>> opt_state = alrao.alrao(jax.random.key(0)).init(params)
    >>> print({name: round(float(x), 2) for name, x in scalars(opt_state).items()})
    {'alrao/head_0/weight': 0.5, 'alrao/head_1/weight': 0.5,
     'alrao/effective_heads': 2.0, 'alrao/log10_rate': -2.0}
  """
  found = {}
  layers = posteriors(opt_state)
  if not layers:  # an error, if there is nothing at all
    find_state(opt_state, ScaleByUnitRatesState, "scale_by_unit_rates")
  for name, log_weights in layers.items():
    prefix = "alrao/" if name is None else f"alrao/{name}/"
    weights = jnp.exp(log_weights)
    for head, weight in enumerate(weights):
      found[f"{prefix}head_{head}/weight"] = weight
    found[f"{prefix}effective_heads"] = effective_heads(log_weights)
    rates = jnp.log10(head_rates(opt_state, len(weights))).astype(weights.dtype)
    found[f"{prefix}log10_rate"] = jnp.sum(weights * rates)
  if updates is not None:
    if params is None:
      raise ValueError(
        "scalars(updates=...) needs params, to compare updates with: write "
        "scalars(opt_state, params, updates)."
      )
    motion = read_motion("scalars()", opt_state, params, updates, options)
    if layers:
      found["alrao/heads_alive"] = jnp.sum(motion.heads_alive)
      found["alrao/heads_dead"] = jnp.sum(~motion.heads_alive)
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
