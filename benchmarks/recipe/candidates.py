"""One family of optimizers, whose numbers the search chooses.

Alrao's chain with three things around it that the papers have not: an average of the
parameters, rates that draw together around what the heads' posterior finds, and rates
that fall as training goes on.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import alrao_jax
from benchmarks.optimizers import Optimizer, Setting

PyTree = Any
EPSILON = 1e-8  # as in Adam


@dataclasses.dataclass(frozen=True)
class Candidate:
  r"""The family's numbers.

  Attributes:
    power: 1 divides the units' gradients by the root of their average squares, as Adam
      does; 0, as SGD, does not.
    head_power: The same for the heads'.
    low: Lower bound of the units' rates.
    high: Upper bound of the units' rates.
    head_low: Lower bound of the heads' ladder.
    head_high: Upper bound of the heads' ladder.
    b1: Decay of the average of gradients.
    b2: Decay of the average of squares.
    beta: Gradients are taken at :math:`y = (1 - \beta) z + \beta x`, with the average
      :math:`x` of what the base's steps reach, :math:`z`; 0 is plain averaging, .9
      schedule-free training.
    gamma: Weights of the average grow as :math:`t^\gamma`.
    share: Least share of the newest parameters in the average: 1 averages nothing, .01
      averages over the last hundred.
    narrowest: Least width of the units' interval, as a share of the first.
    by_posterior: 1: the interval is as wide as the posterior of the heads is; 0: not.
    narrow_after: Steps after which the interval narrows as :math:`t^{-1/2}`.
    offset: Rate of the units at which the interval closes in, in the posterior's.
    likelihood_scale: The switch's.
    cool_after: Steps after which all rates fall as :math:`t^{-1/2}`.
    weight_decay: In a unit's rates.
  """

  power: float = 1.0
  head_power: float = 1.0
  low: float = 1e-5
  high: float = 1e-1
  head_low: float = 1e-5
  head_high: float = 1e-1
  b1: float = 0.9
  b2: float = 0.999
  beta: float = 0.0
  gamma: float = 0.0
  share: float = 0.01
  narrowest: float = 1.0
  by_posterior: float = 0.0
  narrow_after: float = 1e9
  offset: float = 1.0
  likelihood_scale: float = 1.0
  cool_after: float = 1e9
  weight_decay: float = 0.0

  def numbers(self) -> dict[str, float]:
    """All of it by name: what one compiled program can vary."""
    return {name: float(value) for name, value in dataclasses.asdict(self).items()}


# What alrao_jax.schedule_free_alrao is by default.
OFFERED = Candidate(
  low=1e-4,
  high=1e-1,
  head_low=1e-4,
  head_high=1e-1,
  b1=0.0,
  beta=0.8,
  gamma=2.0,
  share=0.0,
  narrowest=0.1,
  by_posterior=1.0,
)


def _make(setting: Setting) -> optax.GradientTransformationExtraArgs:
  inject = optax.inject_hyperparams(_build, static_args=("key",))
  return inject(setting.key, **setting.rate)


# The family, with `Candidate.numbers` as its rate.
FAMILY = Optimizer(
  label="candidate",
  source="the search for a recipe",
  make=_make,
  has_heads=True,
  averaged_params=lambda opt_state, params: opt_state.inner_state.average,
)


class AveragedState(NamedTuple):
  """The average of parameters, the number of steps, and the base's state."""

  average: PyTree
  count: jax.Array
  inner: optax.OptState


def _build(
  key,
  power,
  head_power,
  low,
  high,
  head_low,
  head_high,
  b1,
  b2,
  beta,
  gamma,
  share,
  narrowest,
  by_posterior,
  narrow_after,
  offset,
  likelihood_scale,
  cool_after,
  weight_decay,
):
  def chain(units):
    return optax.chain(
      alrao_jax.drop_diverged(),
      _direction(power, head_power, b1, b2),
      optax.add_decayed_weights(weight_decay),
      alrao_jax.scale_by_unit_rates(key, head_low, head_high, distribution=units),
      alrao_jax.track_heads(),
    )

  def init(params):
    copy = jax.tree.map(jnp.copy, params)
    inner = chain(alrao_jax.LogUniform(low, high)).init(params)
    return AveragedState(copy, jnp.zeros([], jnp.int32), inner)

  def update(updates, state, params=None, *, head_log_likelihoods=None, **extra):
    t = state.count.astype(jnp.float32) + 1
    rates = _find(state.inner, alrao_jax.ScaleByUnitRatesState)
    log_weights = alrao_jax.log_weights(state.inner)
    ladder = rates.head_distribution.quantile(rates.ladder)
    weights, logs = jnp.exp(log_weights), jnp.log(ladder)
    middle = jnp.sum(weights * logs)
    spread = jnp.sqrt(jnp.sum(weights * jnp.square(logs - middle)))
    whole = (jnp.log(head_high) - jnp.log(head_low)) / math.sqrt(12)  # log-uniform's
    width = jnp.where(by_posterior > 0, spread / whole, 1.0)
    width = width / jnp.sqrt(1 + t / narrow_after)
    width = jnp.clip(width, narrowest, 1.0)
    middle = middle + jnp.log(offset)
    ends = [jnp.exp(middle + width * (jnp.log(end) - middle)) for end in (low, high)]
    updates, inner = chain(alrao_jax.LogUniform(*ends)).update(
      updates,
      state.inner,
      params,
      head_log_likelihoods=likelihood_scale * head_log_likelihoods,
      **extra,
    )
    slower = 1 / jnp.sqrt(1 + t / cool_after)
    share_now = jnp.clip((1 + gamma) / (t + gamma), share, 1.0)

    def move(update, y, x):
      z = (y - beta * x) / (1 - beta) + slower * update
      x = x + share_now * (z - x)
      return (1 - beta) * z + beta * x - y, x

    moved = jax.tree.map(move, updates, params, state.average)
    updates, average = jax.tree.transpose(
      jax.tree.structure(params), jax.tree.structure((0, 0)), moved
    )
    return updates, AveragedState(average, state.count + 1, inner)

  return optax.GradientTransformationExtraArgs(init, update)


class DirectionState(NamedTuple):
  """Averages of gradients and of their squares, and the number of steps."""

  mean: PyTree
  square: PyTree
  count: jax.Array


def _direction(power, head_power, b1, b2):
  """Adam, with the root of squares to a power of the body's and of the heads' own."""

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return DirectionState(
      zeros, jax.tree.map(jnp.copy, zeros), jnp.zeros([], jnp.int32)
    )

  def update(updates, state, params=None):
    del params
    average = lambda decay: lambda old, new: decay * old + (1 - decay) * new  # noqa: E731
    mean = jax.tree.map(average(b1), state.mean, updates)
    square = jax.tree.map(average(b2), state.square, jax.tree.map(jnp.square, updates))
    count = state.count + 1
    unbias1, unbias2 = 1 - b1**count, 1 - b2**count

    def direct(path, m, v):
      in_head = "alrao_heads" in jax.tree_util.keystr(path)
      root = jnp.sqrt(v / unbias2) + EPSILON
      return m / unbias1 / root ** (head_power if in_head else power)

    direction = jax.tree_util.tree_map_with_path(direct, mean, square)
    return direction, DirectionState(mean, square, count)

  return optax.GradientTransformation(init, update)


def _find(opt_state, kind):
  is_kind = lambda node: isinstance(node, kind)  # noqa: E731
  found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_kind) if is_kind(x)]
  return found[0]
