"""What the search for the next recipe tries: today's, and at most 24 changes of it.

Written down before the search began. Public arguments of `schedule_free_alrao` make
most candidates; `variant` makes the others from public parts, and goes when the search
is over.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import alrao_jax
from alrao_jax import LogUniform, ScheduleFreeAlraoState
from benchmarks.methods import Method

LOW, HIGH, NARROWEST = 1e-4, 1e-1, 0.1  # today's


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A change of today's recipe.

  Attributes:
    name: Its name in records.
    idea: What it changes, in words.
    make: Function of a key that returns the optimizer.
    one_in: Of how many training examples one judges; None: there are no judges.
  """

  name: str
  idea: str
  make: Callable[[jax.Array], optax.GradientTransformation]
  one_in: int | None = None

  @property
  def method(self) -> Method:
    """The candidate as a method of the benchmarks."""
    return Method(
      self.name,
      label=self.idea,
      source="docs/recipe.md, the search for the next recipe.",
      make=lambda setting: self.make(setting.key),
      has_heads=True,
      averaged_params=alrao_jax.eval_params,
    )


# --- Variants that public arguments don't make


class GatherByTimeState(NamedTuple):
  """State of `gather`: number of steps, and of `scale_by_unit_rates`."""

  count: jax.Array
  rates: Any


class LikedState(NamedTuple):
  """State of `variant`, beside that of schedule-free Alrao.

  Attributes:
    loss: Running mean of the loss that the posterior is told.
    least: The least that it was.
    total: Sum of the weights in the average.
  """

  loss: jax.Array
  least: jax.Array
  total: jax.Array


def gather(
  key: jax.Array, widest: Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformationExtraArgs:
  """Units' rates that draw together by the posterior, and by time at the latest.

  Args:
    key: Draws the rates.
    widest: The largest share of the interval's width, by the number of steps.
  """
  interval = LogUniform(LOW, HIGH)

  def scale_by(law):
    return alrao_jax.scale_by_unit_rates(key, LOW, HIGH, distribution=law)

  def init_fn(params):
    return GatherByTimeState(jnp.zeros([], jnp.int32), scale_by(interval).init(params))

  def update_fn(updates, state, params=None, *, head_log_weights=None, **extra):
    del extra
    weights = jnp.exp(jnp.asarray(head_log_weights))
    ladder = state.rates.ladder
    middle = jnp.sum(weights * ladder)
    spread = jnp.sqrt(jnp.sum(weights * jnp.square(ladder - middle)))
    share = jnp.minimum(spread * jnp.sqrt(12.0), widest(state.count))
    inward = 1 - jnp.clip(share, NARROWEST, 1.0)
    ratio = HIGH / LOW
    law = LogUniform(
      LOW * ratio ** (inward * middle), HIGH * ratio ** (-inward * (1 - middle))
    )
    updates, rates = scale_by(law).update(updates, state.rates, params)
    return updates, GatherByTimeState(state.count + 1, rates)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def variant(
  key: jax.Array,
  *,
  base: optax.GradientTransformation | None = None,
  widest: Callable[[jax.Array], jax.Array] = lambda count: jnp.ones([]),
  interpolation: float = 0.8,
  likes: float | None = None,
  likelihood_scale: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
  """Schedule-free Alrao with other parts.

  Args:
    key: Draws the rates.
    base: What to do with gradients before the rates; by default today's.
    widest: As in `gather`.
    interpolation: As in `schedule_free_alrao`.
    likes: If given, a step's weight in the average falls by ``exp(-likes * d)``, where
      ``d`` is how far the loss that the posterior is told is above its least.
    likelihood_scale: Of the posterior.
  """
  averaging = alrao_jax.switch(likelihood_scale=likelihood_scale)
  chain = optax.chain(
    alrao_jax.drop_diverged(),
    squares() if base is None else base,
    gather(key, widest),
    alrao_jax.track_heads(averaging),
  )

  def init_fn(params):
    zero, most = jnp.zeros([]), jnp.full([], jnp.inf)
    inner = (chain.init(params), LikedState(most, most, zero))
    average = jax.tree.map(jnp.copy, params)
    return ScheduleFreeAlraoState(average, None, jnp.zeros([], jnp.int32), inner)

  def update_fn(updates, state, params=None, *, head_log_likelihoods=None, **extra):
    del extra
    inner, liked = state.inner
    log_weights = alrao_jax.log_weights(inner)
    steps, inner = chain.update(
      updates,
      inner,
      params,
      head_log_likelihoods=head_log_likelihoods,
      head_log_weights=log_weights,
    )
    count = state.count + 1
    t = count.astype(jnp.float32)
    told = -jax.nn.logsumexp(log_weights + jnp.asarray(head_log_likelihoods))
    window = jnp.clip(t / 10, 20.0, None)  # the mean forgets as training goes on
    follow = jnp.where(jnp.isinf(liked.loss), told, liked.loss)
    loss = jnp.where(jnp.isfinite(told), follow + (told - follow) / window, liked.loss)
    # After a warm-up: the first batches tell little.
    least = jnp.where(t < 100, loss, jnp.minimum(liked.least, loss))
    weight = t * (t + 1)  # the share of schedule_free_alrao's power 2, in sums
    if likes is not None:
      weight *= jnp.exp(-likes * jnp.where(jnp.isfinite(loss), loss - least, 0.0))
    total = liked.total + weight
    share = weight / total

    def away(step, y, x):
      return (y - x) / (1 - interpolation) + step

    def towards(step, y, x):
      return x + share * away(step, y, x)

    def move(step, y, x):
      far = away(step, y, x)
      return (1 - interpolation) * step + interpolation * share * far

    trees = (steps, params, state.average)
    moves, average = jax.tree.map(move, *trees), jax.tree.map(towards, *trees)
    inner = (inner, LikedState(loss, least, total))
    return moves, ScheduleFreeAlraoState(average, None, count, inner)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def squares() -> optax.GradientTransformation:
  """Returns today's base: the root of average squares."""
  return optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True)


class UnitSquaresState(NamedTuple):
  """State of `unit_squares`: number of steps, and average squares."""

  count: jax.Array
  nu: Any


def unit_squares(b2: float = 0.999) -> optax.GradientTransformation:
  """Returns a base with one average square a unit, and one a head's unit.

  Args:
    b2: Decay of the average.
  """

  def mean_squares(grads):
    specs = alrao_jax.unit_specs(grads)

    def mean(path, g):
      spec = specs["/".join(str(getattr(key, "key", key)) for key in path)]
      kept = (0, g.ndim - 1) if spec.of_heads else spec.axes
      axes = tuple(axis for axis in range(g.ndim) if axis not in kept)
      return jnp.mean(jnp.square(g), axis=axes, keepdims=True)

    return jax.tree_util.tree_map_with_path(mean, grads)

  def init_fn(params):
    zeros = jax.tree.map(jnp.zeros_like, mean_squares(params))
    return UnitSquaresState(jnp.zeros([], jnp.int32), zeros)

  def update_fn(updates, state, params=None):
    del params
    count = state.count + 1
    nu = jax.tree.map(
      lambda old, new: b2 * old + (1 - b2) * new, state.nu, mean_squares(updates)
    )
    scale = 1 - b2 ** count.astype(jnp.float32)
    updates = jax.tree.map(lambda g, v: g / (jnp.sqrt(v / scale) + 1e-8), updates, nu)
    return updates, UnitSquaresState(count, nu)

  return optax.GradientTransformation(init_fn, update_fn)


def muon() -> optax.GradientTransformation:
  """Returns Muon for the body's matrices, today's base for all else.

  An orthogonal matrix is scaled to entries of root mean square .2, about Adam's.
  """

  def kind(path, leaf):
    keys = [str(getattr(key, "key", key)) for key in path]
    is_matrix = leaf.ndim == 2 and keys[-1] == "kernel"
    return "matrix" if is_matrix and "alrao_heads" not in keys else "other"

  def rescale(updates, state, params=None):
    del params
    scaled = jax.tree.map(lambda u: 0.2 * max(u.shape) ** 0.5 * u, updates)
    return scaled, state

  def dimensions(params):
    # Without them optax 0.2.8 fails, though None should stand for all matrices.
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)

  matrices = optax.chain(
    optax.contrib.scale_by_muon(weight_dimension_numbers=dimensions),
    optax.GradientTransformation(lambda params: optax.EmptyState(), rescale),
  )
  return optax.partition(
    {"matrix": matrices, "other": squares()},
    lambda params: jax.tree_util.tree_map_with_path(kind, params),
  )


def _by_time(count: jax.Array) -> jax.Array:
  return jax.lax.rsqrt(1 + count / 100)


def _forgetting(count: jax.Array) -> jax.Array:
  """A decay whose time scale grows with training."""
  return jnp.minimum(1.0, 100 / (1 + count))


def _today(**options: Any) -> Callable[[jax.Array], optax.GradientTransformation]:
  """Today's recipe with other arguments."""
  scale = options.pop("likelihood_scale", 1.0)
  averaging = alrao_jax.switch(likelihood_scale=scale)
  return lambda key: alrao_jax.schedule_free_alrao(key, averaging=averaging, **options)


def _variant(**options: Any) -> Callable[[jax.Array], optax.GradientTransformation]:
  return lambda key: variant(key, **options)


TODAY = Candidate("today", "today's recipe", _today())
TENFOLD = {"likelihood_scale": 10.0}
GROWING: dict[str, Any] = {"weight_decay": _forgetting}

CANDIDATES = (
  # Who tells the posterior, and how loudly.
  Candidate("judges_4", "one in 4 judges, evidence x 10", _today(**TENFOLD), 4),
  Candidate("judges_8", "one in 8 judges, evidence x 10", _today(**TENFOLD), 8),
  Candidate("judges_16", "one in 16 judges, evidence x 10", _today(**TENFOLD), 16),
  Candidate("judges_32", "one in 32 judges, evidence x 10", _today(**TENFOLD), 32),
  Candidate("judges_16_plain", "one in 16 judges", _today(), 16),
  Candidate("evidence", "evidence x 10, no judges", _today(**TENFOLD)),
  # Decay by the unit's rate.
  Candidate("decay_0.1", "decay .1", _today(weight_decay=0.1)),
  Candidate("decay_0.3", "decay .3", _today(weight_decay=0.3)),
  Candidate("decay_1", "decay 1", _today(weight_decay=1.0)),
  Candidate("decay_growing", "decay min(1, 100 / t)", _today(**GROWING)),
  Candidate(
    "judges_16_decay",
    "one in 16 judges, x 10; decay .3",
    _today(weight_decay=0.3, **TENFOLD),
    16,
  ),
  Candidate(
    "judges_16_growing",
    "one in 16 judges, x 10; decay min(1, 100 / t)",
    _today(**GROWING, **TENFOLD),
    16,
  ),
  # What is averaged.
  Candidate("plain_average", "interpolation 0", _today(interpolation=0.0)),
  Candidate(
    "judges_16_plain_average",
    "one in 16 judges, x 10; interpolation 0",
    _today(interpolation=0.0, **TENFOLD),
    16,
  ),
  Candidate(
    "judges_16_liked",
    "one in 16 judges, x 10; steps weigh exp(-10 (judges' loss - its least))",
    _variant(likes=10.0, **TENFOLD),
    16,
  ),
  # The base.
  Candidate(
    "momentum",
    "Adam with its momentum .9; interpolation 0",
    _variant(base=optax.scale_by_adam(), interpolation=0.0),
  ),
  Candidate("muon", "Muon for the body's matrices", _variant(base=muon())),
  Candidate("unit_squares", "one square a unit", _variant(base=unit_squares())),
  # Rates.
  Candidate("upper", "upper bound 1e-2", _today(max_learning_rate=1e-2)),
  Candidate(
    "by_time", "width at most 1 / sqrt(1 + t / 100)", _variant(widest=_by_time)
  ),
  Candidate(
    "judges_16_upper",
    "one in 16 judges, x 10; upper bound 1e-2",
    _today(max_learning_rate=1e-2, **TENFOLD),
    16,
  ),
  Candidate(
    "judges_16_by_time",
    "one in 16 judges, x 10; width at most 1 / sqrt(1 + t / 100)",
    _variant(widest=_by_time, **TENFOLD),
    16,
  ),
  Candidate(
    "judges_16_muon",
    "one in 16 judges, x 10; Muon",
    _variant(base=muon(), **TENFOLD),
    16,
  ),
  Candidate(
    "judges_8_all",
    "one in 8 judges, x 10; decay min(1, 100 / t); interpolation 0",
    _today(interpolation=0.0, **GROWING, **TENFOLD),
    8,
  ),
)
