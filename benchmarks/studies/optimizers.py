"""Optimizers of the studies, with what a study varies as their `rate`.

So one program, compiled once, trains all intervals, or all shares of units that learn.
"""

import jax
import optax

import alrao_jax
from benchmarks.optimizers import OPTIMIZERS, Optimizer, Setting


def _interval(base: optax.GradientTransformation | None):
  def make(setting: Setting) -> optax.GradientTransformation:
    low, high = setting.rate
    inject = optax.inject_hyperparams(alrao_jax.alrao, static_args=("key", "base"))
    return inject(setting.key, base=base, min_learning_rate=low, max_learning_rate=high)

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


SGD = OPTIMIZERS["sgd"]
ALRAO = OPTIMIZERS["alrao"]
# `rate` is the interval, a pair.
ALRAO_INTERVAL = ALRAO._replace(make=_interval(None))
ALRAO_ADAM_INTERVAL = ALRAO._replace(make=_interval(optax.scale_by_adam()))
ADAM = OPTIMIZERS["adam"]._replace(make=_adam)
# `rate` is the rate and the fraction of the units that learn, a pair.
FRACTION = SGD._replace(make=_fraction)
