"""Optimizers of the studies, with what a study varies as their `rate`.

So one program, compiled once, trains all intervals, or all shares of units that learn.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import optax

import alrao_jax
from benchmarks.optimizers import OPTIMIZERS, Optimizer, Setting


def _inject(setting: Setting, base: Any, low: Any, high: Any, **options: Any):
  """Alrao with the bounds of its interval in its state."""
  inject = optax.inject_hyperparams(alrao_jax.alrao, static_args=("key", "base"))
  bounds = {"min_learning_rate": low, "max_learning_rate": high}
  return inject(setting.key, base=base, **bounds, **options)


def _interval(base: optax.GradientTransformation | None = None, **options: Any):
  def make(setting: Setting) -> optax.GradientTransformation:
    return _inject(setting, base, *setting.rate, **options)

  return make


def _adam(setting: Setting) -> optax.GradientTransformation:
  return optax.inject_hyperparams(optax.adam)(setting.rate)


def _fraction(setting: Setting) -> optax.GradientTransformation:
  """Plain SGD of the output layer, and of a random fraction of the units below it."""
  rate, fraction = setting.rate

  def body(key, fraction):
    law = alrao_jax.bernoulli(rate, fraction)
    return alrao_jax.scale_by_unit_rates(key, distribution=law, heads=None)

  return optax.partition(
    {
      "body": optax.inject_hyperparams(body, static_args="key")(
        setting.key, fraction=fraction
      ),
      "output": optax.sgd(rate),
    },
    lambda params: {
      name: jax.tree.map(lambda _, name=name: name, part)
      for name, part in params.items()
    },
  )


def averaging(law: alrao_jax.Averaging) -> Optimizer:
  """Returns Alrao with another averaging of its heads.

  Args:
    law: The averaging.
  """
  return Optimizer(
    label="Alrao",
    source="the papers' interval and number of heads",
    make=lambda setting: alrao_jax.alrao(setting.key, averaging=law),
    has_heads=True,
  )


def guarded(guard: alrao_jax.Guard | None) -> Optimizer:
  """Returns Alrao with the interval, a pair, as its `rate`, and with a guard.

  Args:
    guard: The guard; None for none.
  """
  return ALRAO._replace(make=_interval(guard=guard))


def upper(
  min_learning_rate: float, granularity: Literal["per_unit", "per_weight"]
) -> Optimizer:
  """Returns Alrao with the upper bound of the interval as its `rate`.

  Args:
    min_learning_rate: The lower bound.
    granularity: What has a rate of its own.
  """

  def make(setting: Setting) -> optax.GradientTransformation:
    low, high = min_learning_rate, setting.rate
    return _inject(setting, None, low, high, granularity=granularity)

  return ALRAO._replace(make=make)


class UnitMomentumState(NamedTuple):
  """State of `unit_momentum`.

  Attributes:
    mean: Running mean of the updates, like the parameters.
    shares: State of the units' shares.
  """

  mean: Any
  shares: Any


def unit_momentum(
  key: jax.Array, low: float = 1e-3, high: float = 1.0
) -> optax.GradientTransformation:
  r"""Running means of the gradients in which every unit draws its own decay.

  .. math:: m_t = m_{t - 1} + (1 - \beta) (g_t - m_{t - 1})

  A unit's share :math:`1 - \beta` is drawn once, log-uniformly from an interval, as
  Alrao draws its rates. The mean, not the sum, of the past updates keeps apart what the
  decay does and what a larger rate would do. Heads are without momentum.

  Args:
    key: JAX random key, another one than that of the rates.
    low: Positive; least share, of the longest memory.
    high: At most 1, which is no memory.

  Returns:
    A transformation of gradients into their running means, of the same sign: what
    follows it, such as Alrao's rates, makes a descent of them.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((2, 3))}
    >>> momentum = unit_momentum(jax.random.key(0), 0.25, 0.25)
    >>> updates, _ = momentum.update(params, momentum.init(params), params)
    >>> print(updates["kernel"][0])
    [0.25 0.25 0.25]
  """
  shares = alrao_jax.scale_by_unit_rates(
    key,
    1.0,  # the heads' share
    1.0,
    distribution=alrao_jax.log_uniform(low, high),
    flip_sign=False,
  )

  def init(params):
    return UnitMomentumState(optax.tree.zeros_like(params), shares.init(params))

  def update(updates, state, params=None):
    change = optax.tree.sub(updates, state.mean)
    change, shares_state = shares.update(change, state.shares, params)
    mean = optax.tree.add(state.mean, change)
    return mean, UnitMomentumState(mean, shares_state)

  return optax.GradientTransformation(init, update)


def with_unit_momentum(low: float, high: float) -> Optimizer:
  """Returns Alrao with `unit_momentum`.

  Args:
    low: Least share of the newest update.
    high: Greatest.
  """

  def make(setting: Setting) -> optax.GradientTransformation:
    key = jax.random.fold_in(setting.key, 1)
    return alrao_jax.alrao(setting.key, unit_momentum(key, low, high))

  return ALRAO._replace(make=make)


def _equal_heads(setting: Setting) -> optax.GradientTransformation:
  adam = OPTIMIZERS["adam"].make(setting)
  return optax.chain(alrao_jax.drop_diverged(), adam, alrao_jax.track_heads())


def _units_at(rate: float):
  """All units at one rate, with Alrao's heads."""
  law = alrao_jax.log_uniform(rate, rate)
  return lambda setting: alrao_jax.alrao(setting.key, distribution=law)


# Mean of a log-uniform rate on Alrao's interval.
MEAN_RATE = (10.0 - 1e-5) / math.log(10.0 / 1e-5)

SGD = OPTIMIZERS["sgd"]
ALRAO = OPTIMIZERS["alrao"]
# `rate` is the interval, a pair.
ALRAO_INTERVAL = ALRAO._replace(make=_interval())
ALRAO_MOMENTUM_INTERVAL = ALRAO._replace(make=_interval(optax.trace(0.9)))
ALRAO_ADAM_INTERVAL = ALRAO._replace(make=_interval(optax.scale_by_adam()))
ADAM = OPTIMIZERS["adam"]._replace(make=_adam)
# `rate` is the rate and the fraction of the units that learn, a pair.
FRACTION = SGD._replace(make=_fraction)
ADAM_EQUAL_HEADS = ALRAO._replace(label="Adam", make=_equal_heads)
REDRAWN = ALRAO._replace(make=lambda setting: alrao_jax.alrao(setting.key, redraw=True))
UNITS_AT_MEAN_RATE = ALRAO._replace(make=_units_at(MEAN_RATE))
