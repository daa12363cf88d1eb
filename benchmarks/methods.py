"""Every optimizer of the benchmarks: its name, its settings, and the rates it tries.

To add one, add an entry to `METHODS`; to let it take part in the arena, add its name to
`ARENA`.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import alrao_jax
from alrao_jax import alrao

PyTree = Any

SGD_RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # the papers'
SGD_HALF_DECADES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
ADAM_HALF_DECADES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


class Setting(NamedTuple):
  """What an optimizer may depend on.

  Attributes:
    key: Random key.
    rate: Learning rate, or what else the optimizer takes; None if it takes none.
    num_steps: Number of steps, if a run goes to its maximum of epochs.
    has_batch_norm: Whether the network has batch normalisation.
  """

  key: jax.Array
  rate: Any
  num_steps: int
  has_batch_norm: bool


class Method(NamedTuple):
  """An optimizer, and the rates that it tries.

  Attributes:
    name: Its name in records and on the command line.
    label: Its name in tables.
    source: Where its settings come from.
    make: Returns the transformation. Key and rate are in its state, so that one program
      runs all of them.
    rates: The learning rates that a sweep tries, or what else a study varies; empty if
      it takes none.
    has_heads: Whether the network needs Alrao's heads.
    averaged_params: Function of (opt_state, params) that returns the parameters to
      evaluate, where these are not those that train.
    num_heads: How many heads it has, where it has heads and no option says otherwise.
    keep: Which heads stay while it trains; None: all.
  """

  name: str
  label: str
  source: str
  make: Callable[[Setting], optax.GradientTransformation]
  rates: tuple[Any, ...] = ()
  has_heads: bool = False
  averaged_params: Callable[[optax.OptState, PyTree], PyTree] | None = None
  num_heads: int = 10
  keep: alrao_jax.Hopeful | None = None

  @property
  def takes_rate(self) -> bool:
    """Whether it has a learning rate to choose."""
    return bool(self.rates)

  def log_weights(self, opt_state: optax.OptState) -> jax.Array:
    """Returns the heads' posterior in logarithms, (num_heads,), else (0,).

    Args:
      opt_state: State of the transformation, alone or within others.
    """
    return alrao_jax.log_weights(opt_state) if self.has_heads else jnp.zeros(0)


class Heads:
  """The heads of a network in training, of which some leave if its method says so.

  A state is a NamedTuple that has ``opt_state``, ``params``, and maybe more fields with
  heads in them, such as ``batch_stats``.

  Attributes:
    may_leave: Whether the method lets heads leave.
  """

  def __init__(
    self, method: Method, optimizer: optax.GradientTransformation, params: PyTree
  ):
    """Counts the heads, if some may leave.

    Args:
      method: What trains the network.
      optimizer: What it makes, for any key and rate.
      params: Parameters with all heads, or their shapes.
    """
    self._optimizer, self._method = optimizer, method
    self.may_leave = method.keep is not None
    if self.may_leave:
      opt_state = jax.eval_shape(optimizer.init, params)
      (self._num_heads,) = method.log_weights(opt_state).shape

  def weights(self, opt_state: optax.OptState) -> jax.Array:
    """Returns the heads' posterior, (num_heads,), 0 for those that have left.

    Args:
      opt_state: State of the optimizer.
    """
    weights = jnp.exp(self._method.log_weights(opt_state))
    if not self.may_leave:
      return weights
    places = jnp.rint(_ladder(opt_state) * (self._num_heads - 1)).astype(jnp.int32)
    return jnp.zeros(self._num_heads, weights.dtype).at[places].set(weights)

  def left(self, state: Any) -> list[int]:
    """Returns the numbers of the heads that are left; none if none may leave.

    Args:
      state: The state.
    """
    if not self.may_leave:
      return []
    places = np.rint(np.asarray(_ladder(state.opt_state)) * (self._num_heads - 1))
    return places.astype(int).tolist()

  def dismiss(self, state: Any) -> Any:
    """Returns a state without the heads that may leave now.

    Args:
      state: The state.
    """
    if self._method.keep is None:
      return state
    kept = alrao_jax.best_heads(state.opt_state, self._method.keep)
    everyone = len(kept) == self._method.log_weights(state.opt_state).size
    return state if everyone else self._take(state, kept)

  def only(self, state: Any, left: Sequence[int]) -> Any:
    """Returns a state with only some heads of a state that has all.

    Args:
      state: The state.
      left: What `left` says of the state to return.
    """
    return self._take(state, left) if self.may_leave else state

  def _take(self, state: Any, kept: Sequence[int]) -> Any:
    opt_state, params = alrao_jax.collapse(
      self._optimizer, state.opt_state, state.params, kept
    )
    others = {
      name: alrao_jax.take_heads(field, kept)
      for name, field in state._asdict().items()
      if name not in ("opt_state", "params")
    }
    return state._replace(opt_state=opt_state, params=params, **others)


def _ladder(opt_state: optax.OptState) -> jax.Array:
  """The quantiles of the heads that are left."""
  is_rates = lambda node: isinstance(node, alrao_jax.ScaleByUnitRatesState)  # noqa: E731
  leaves = jax.tree.leaves(opt_state, is_leaf=is_rates)
  (ladder,) = (node.ladder for node in leaves if is_rates(node))
  return ladder


class PolynomialAveragingState(NamedTuple):
  """State of `with_polynomial_averaging`.

  Attributes:
    average: Like the parameters.
    count: Number of steps.
    inner: State of the optimizer.
  """

  average: PyTree
  count: jax.Array
  inner: optax.OptState


def with_polynomial_averaging(
  inner: optax.GradientTransformation, gamma: float = 8.0
) -> optax.GradientTransformation:
  r"""Keeps an average of the parameters in which later ones weigh more.

  .. math::
    \bar x_t = \left(1 - \frac{1 + \gamma}{t + \gamma}\right) \bar x_{t - 1}
      + \frac{1 + \gamma}{t + \gamma} x_t

  Args:
    inner: The optimizer, whose updates pass through. The average is in the state,
      `PolynomialAveragingState.average`.
    gamma: At least 0, where 0 gives every step the same weight.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> averaging = with_polynomial_averaging(optax.sgd(1.0), gamma=0.0)
    >>> params = jnp.zeros([])
    >>> state = averaging.init(params)
    >>> for _ in range(2):  # x = -1, then -2
    ...   updates, state = averaging.update(jnp.ones([]), state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> float(state.average)
    -1.5

  Reference:
    Shamir and Zhang, arXiv 1212.1824, in the form of Levy et al.'s and DoG's
    code.
  """

  def init_fn(params):
    return PolynomialAveragingState(
      params, jnp.zeros([], jnp.int32), inner.init(params)
    )

  def update_fn(updates, state, params: Any = None):
    updates, inner_state = inner.update(updates, state.inner, params)
    count = jnp.asarray(optax.safe_increment(state.count))
    weight = (1 + gamma) / (count.astype(jnp.float32) + gamma)
    average = jax.tree.map(
      lambda old, new: old + weight.astype(old.dtype) * (new - old),
      state.average,
      optax.apply_updates(params, updates),
    )
    return updates, PolynomialAveragingState(average, count, inner_state)

  return optax.GradientTransformation(init_fn, update_fn)


def _cosine(setting: Setting, start: float) -> optax.Schedule:
  return optax.cosine_decay_schedule(start, setting.num_steps)


def _tuned_sgd(setting: Setting) -> optax.GradientTransformation:
  return optax.chain(
    optax.add_decayed_weights(5e-4),
    optax.sgd(_cosine(setting, 0.1), momentum=0.9),
  )


def _dog(setting: Setting) -> optax.GradientTransformation:
  init_step = ("heuristic", 1e-4 if setting.has_batch_norm else 1e-6)
  return with_polynomial_averaging(optax.contrib.dog(init_step=init_step))


def _sgd(setting: Setting) -> optax.GradientTransformation:
  return optax.inject_hyperparams(optax.sgd)(setting.rate)


def _adam(setting: Setting) -> optax.GradientTransformation:
  return optax.inject_hyperparams(optax.adam)(setting.rate)


_ALL = (
  Method(
    "alrao",
    label="Alrao",
    source="arXiv 1810.01322, experiments: interval [1e-5, 10], 10 heads.",
    make=lambda setting: alrao(setting.key),
    has_heads=True,
  ),
  Method(
    "alrao_adam",
    label="Alrao on Adam",
    source="arXiv 1810.01322, appendix on Adam: interval [1e-6, 1]; Adam's betas.",
    make=lambda setting: alrao(setting.key, optax.scale_by_adam(), 1e-6, 1.0),
    has_heads=True,
  ),
  Method(
    "alrao_momentum",
    label="Alrao with momentum",
    source="Alrao's interval; momentum 0.9, as in the tuned recipe.",
    make=lambda setting: alrao(setting.key, optax.trace(0.9)),
    has_heads=True,
  ),
  Method(
    "alrao_cosine",
    label="Alrao with a schedule",
    source="Alrao's interval; all rates times a cosine from 1 to 0 over all epochs.",
    make=lambda setting: alrao(setting.key, schedule=_cosine(setting, 1.0)),
    has_heads=True,
  ),
  Method(
    "alrao_fast",
    label="Alrao, [1e-3, 100]",
    source="arXiv 1810.01322, first version, Penn Treebank: interval [1e-3, 100], 6 "
    "heads.",
    make=lambda setting: alrao(setting.key, None, 1e-3, 100.0),
    has_heads=True,
    num_heads=6,
  ),
  Method(
    "alrao_guard",
    label="Alrao, guarded",
    source="Alrao's interval; defaults of alrao_jax.guard.",
    make=lambda setting: alrao(setting.key, guard=alrao_jax.guard()),
    has_heads=True,
  ),
  Method(
    "schedule_free_alrao",
    label="Schedule-free Alrao",
    source="Defaults of alrao_jax.schedule_free_alrao, found on four other tasks "
    "(docs/recipe.md); evaluated at its averaged weights.",
    make=lambda setting: alrao_jax.schedule_free_alrao(setting.key),
    has_heads=True,
    averaged_params=alrao_jax.eval_params,
  ),
  Method(
    "alrao_hopeful",
    label="Alrao, heads leave",
    source="Alrao's interval; heads leave by the defaults of alrao_jax.hopeful.",
    make=lambda setting: alrao(setting.key),
    has_heads=True,
    keep=alrao_jax.hopeful(),
  ),
  Method(
    "schedule_free_alrao_hopeful",
    label="Schedule-free Alrao, heads leave",
    source="Schedule-free Alrao; heads leave by the defaults of alrao_jax.hopeful.",
    make=lambda setting: alrao_jax.schedule_free_alrao(setting.key),
    has_heads=True,
    averaged_params=alrao_jax.eval_params,
    keep=alrao_jax.hopeful(),
  ),
  Method(
    "sgd",
    label="SGD",
    source="arXiv 1810.01322, experiments: rates 1e-5, 1e-4, ..., 10, no momentum.",
    make=_sgd,
    rates=SGD_RATES,
  ),
  Method(
    "sgd_rates",
    label="SGD, best of 7 rates",
    source="No momentum; rates in half decades.",
    make=_sgd,
    rates=SGD_HALF_DECADES,
  ),
  Method(
    "sgd_momentum",
    label="SGD with momentum",
    source="SGD's rates; momentum 0.9.",
    make=lambda setting: optax.inject_hyperparams(optax.sgd, static_args="momentum")(
      setting.rate, momentum=0.9
    ),
    rates=SGD_RATES,
  ),
  Method(
    "adam",
    label="Adam",
    source="Kingma and Ba, arXiv 1412.6980, algorithm 1: rate 1e-3; as in the papers.",
    make=lambda setting: optax.adam(1e-3),
  ),
  Method(
    "adam_rates",
    label="Adam, best of 7 rates",
    source="Adam's betas; rates in half decades.",
    make=_adam,
    rates=ADAM_HALF_DECADES,
  ),
  Method(
    "adamw",
    label="AdamW",
    source="Adam's rate 1e-3; weight decay 1e-4, the default of optax.adamw.",
    make=lambda setting: optax.adamw(1e-3),
  ),
  Method(
    "adamw_rates",
    label="AdamW",
    source="SGD's rates; weight decay 1e-4, the default of optax.adamw.",
    make=lambda setting: optax.inject_hyperparams(optax.adamw)(setting.rate),
    rates=SGD_RATES,
  ),
  Method(
    "sgd_tuned",
    label="SGD, tuned recipe",
    source="Not free of tuning: rate .1, momentum .9, cosine to 0 over all epochs, "
    "weight decay 5e-4, a recipe tuned by many for CIFAR-10 "
    "(github.com/kuangliu/pytorch-cifar, main.py).",
    make=_tuned_sgd,
  ),
  Method(
    "prodigy",
    label="Prodigy",
    source="Defaults of optax.contrib.prodigy (arXiv 2306.06101), no schedule.",
    make=lambda setting: optax.contrib.prodigy(),
  ),
  Method(
    "dadapt_adamw",
    label="D-Adaptation AdamW",
    source="Defaults of optax.contrib.dadapt_adamw (arXiv 2301.07733), no schedule.",
    make=lambda setting: optax.contrib.dadapt_adamw(),
  ),
  Method(
    "schedule_free_adamw",
    label="Schedule-free AdamW",
    source="Defaults of optax.contrib.schedule_free_adamw (rate 0.0025, no warm-up; "
    "arXiv 2405.15682); evaluated at its averaged weights.",
    make=lambda setting: optax.contrib.schedule_free_adamw(),
    averaged_params=optax.contrib.schedule_free_eval_params,
  ),
  Method(
    "dowg",
    label="DoWG",
    source="Defaults of optax.contrib.dowg (arXiv 2305.16284).",
    make=lambda setting: optax.contrib.dowg(),
  ),
  Method(
    "dog",
    label="DoG",
    source="Defaults of optax.contrib.dog (arXiv 2302.12022), with the first step it "
    "suggests: 1e-4 with batch normalisation, else 1e-6; evaluated at averaged "
    "weights, polynomial with gamma 8, as its authors recommend.",
    make=_dog,
    averaged_params=lambda opt_state, params: opt_state.average,
  ),
  Method(
    "mechanize_adam",
    label="Mechanic on Adam",
    source="Defaults of optax.contrib.mechanize (arXiv 2306.00144) on optax.adam(1.0), "
    "the base rate of its documentation.",
    make=lambda setting: optax.contrib.mechanize(optax.adam(1.0)),
  ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}

# Those with nothing tuned for the data set, which Alrao stands beside.
PEERS = (
  "adamw",
  "prodigy",
  "dadapt_adamw",
  "schedule_free_adamw",
  "dowg",
  "dog",
  "mechanize_adam",
)

# The arena's: the recipe, Alrao, their peers, and two that are tuned.
ARENA = ("schedule_free_alrao", "alrao", *PEERS, "sgd_rates", "adam_rates")

# Those of the tables of images.
IMAGE_METHODS = (
  "alrao",
  "alrao_adam",
  "alrao_momentum",
  "alrao_cosine",
  "sgd",
  "adam",
  "adamw",
  "sgd_tuned",
  *PEERS[1:],
)

if TYPE_CHECKING:
  MethodName = str
else:
  MethodName = Literal[tuple(METHODS)]  # what the command line accepts


# What the studies vary, given as `rate`: one program, compiled once, trains all
# intervals, or all shares of units that learn.


def _inject(setting: Setting, base: Any, low: Any, high: Any, **options: Any):
  """Alrao with the bounds of its interval in its state."""
  inject = optax.inject_hyperparams(alrao, static_args=("key", "base"))
  bounds = {"min_learning_rate": low, "max_learning_rate": high}
  return inject(setting.key, base=base, **bounds, **options)


def _interval(base: optax.GradientTransformation | None = None, **options: Any):
  def make(setting: Setting) -> optax.GradientTransformation:
    return _inject(setting, base, *setting.rate, **options)

  return make


def _fraction(setting: Setting) -> optax.GradientTransformation:
  """Plain SGD of the output layer, and of a random fraction of the units below it."""
  rate, fraction = setting.rate

  def body(key, fraction):
    law = alrao_jax.bernoulli(rate, fraction)
    return alrao_jax.scale_by_unit_rates(key, distribution=law)

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


def averaging(law: alrao_jax.Averaging) -> Method:
  """Returns Alrao with another averaging of its heads.

  Args:
    law: The averaging.
  """
  return ALRAO._replace(
    source="the papers' interval and number of heads",
    make=lambda setting: alrao(setting.key, averaging=law),
  )


def guarded(guard: alrao_jax.Guard | None) -> Method:
  """Returns Alrao with the interval, a pair, as its `rate`, and with a guard.

  Args:
    guard: The guard; None for none.
  """
  return ALRAO._replace(make=_interval(guard=guard))


def upper(
  min_learning_rate: float, granularity: Literal["per_unit", "per_weight"]
) -> Method:
  """Returns Alrao with the upper bound of the interval as its `rate`.

  Args:
    min_learning_rate: The lower bound.
    granularity: What has a rate of its own.
  """

  def make(setting: Setting) -> optax.GradientTransformation:
    low, high = min_learning_rate, setting.rate
    overrides = (("", "per_weight"),) if granularity == "per_weight" else ()
    return _inject(setting, None, low, high, units=alrao_jax.UnitOptions(overrides))

  return ALRAO._replace(make=make)


class RedrawnState(NamedTuple):
  """State of `redrawn`.

  Attributes:
    key: Data of the key for the next draw.
    inner: State of Alrao, with the rates of the last step.
  """

  key: jax.Array
  inner: optax.OptState


def redrawn(key: jax.Array) -> optax.GradientTransformationExtraArgs:
  """Alrao whose units draw their rates anew at every step; the heads keep theirs.

  It amounts to SGD at the mean rate, the papers' control experiment.

  Args:
    key: Random key.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> heads = {"alrao_heads": {"kernel": jnp.ones((3, 4, 2))}}
    >>> params = {"dense": {"kernel": jnp.ones((5, 4))}, "out": heads}
    >>> optimizer = redrawn(jax.random.key(0))
    >>> state, kernels = optimizer.init(params), []
    >>> for _ in range(2):
    ...   updates, state = optimizer.update(
    ...     params, state, params, head_log_likelihoods=jnp.zeros(3))
    ...   kernels.append(updates["dense"]["kernel"])
    >>> bool((kernels[0] != kernels[1]).all())
    True
  """
  optimizer = alrao(key)

  def is_rates(node):
    return isinstance(node, alrao_jax.ScaleByUnitRatesState)

  def init(params):
    return RedrawnState(jnp.array(jax.random.key_data(key)), optimizer.init(params))

  def update(updates, state, params=None, **extra_args):
    now, later = jax.random.split(jax.random.wrap_key_data(state.key))
    drawn = alrao(now).init(updates if params is None else params)
    inner = jax.tree.map(
      lambda old, new: old._replace(quantiles=new.quantiles) if is_rates(old) else old,
      state.inner,
      drawn,
      is_leaf=is_rates,
    )
    updates, inner = optimizer.update(updates, inner, params, **extra_args)
    return updates, RedrawnState(jax.random.key_data(later), inner)

  return optax.GradientTransformationExtraArgs(init, update)


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


def with_unit_momentum(low: float, high: float) -> Method:
  """Returns Alrao with `unit_momentum`.

  Args:
    low: Least share of the newest update.
    high: Greatest.
  """

  def make(setting: Setting) -> optax.GradientTransformation:
    key = jax.random.fold_in(setting.key, 1)
    return alrao(setting.key, unit_momentum(key, low, high))

  return ALRAO._replace(make=make)


def _equal_heads(setting: Setting) -> optax.GradientTransformation:
  adam = METHODS["adam"].make(setting)
  return optax.chain(alrao_jax.drop_diverged(), adam, alrao_jax.track_heads())


def _units_at(rate: float):
  """All units at one rate, with Alrao's heads."""
  law = alrao_jax.log_uniform(rate, rate)
  return lambda setting: alrao(setting.key, distribution=law)


# Mean of a log-uniform rate on Alrao's interval.
MEAN_RATE = (10.0 - 1e-5) / math.log(10.0 / 1e-5)

SGD = METHODS["sgd"]
ALRAO = METHODS["alrao"]
# `rate` is the interval, a pair.
ALRAO_INTERVAL = ALRAO._replace(make=_interval())
ALRAO_MOMENTUM_INTERVAL = ALRAO._replace(make=_interval(optax.trace(0.9)))
ALRAO_ADAM_INTERVAL = ALRAO._replace(make=_interval(optax.scale_by_adam()))
ADAM = METHODS["adam"]._replace(make=_adam)
# `rate` is the rate and the fraction of the units that learn, a pair.
FRACTION = SGD._replace(make=_fraction)
ADAM_EQUAL_HEADS = ALRAO._replace(label="Adam", make=_equal_heads)
REDRAWN = ALRAO._replace(make=lambda setting: redrawn(setting.key))
UNITS_AT_MEAN_RATE = ALRAO._replace(make=_units_at(MEAN_RATE))


# --- With warm-up and cosine, for the search and the long suite. `rate` is a rate and a
#     weight decay, a pair.

WARM_UP = 0.05  # of all steps
ADAMW_RATES, ADAMW_DECAYS = (1e-3, 3e-3, 1e-2, 3e-2), (1e-2, 1e-1)


def _pairs(
  rates: tuple[float, ...], decays: tuple[float, ...]
) -> tuple[tuple[float, float], ...]:
  return tuple((rate, decay) for rate in rates for decay in decays)


def _warm_up(setting: Setting) -> int:
  return int(WARM_UP * setting.num_steps)


def _with_cosine(
  make: Callable[[Any, Any], optax.GradientTransformation],
) -> Callable[[Setting], optax.GradientTransformation]:
  """What a rate and a decay make, times a warm-up and a cosine to 0."""

  def made(setting: Setting) -> optax.GradientTransformation:
    shape = optax.warmup_cosine_decay_schedule(
      0.0, 1.0, _warm_up(setting), setting.num_steps
    )

    def scheduled(rate, decay):
      return optax.chain(make(rate, decay), optax.scale_by_schedule(shape))

    return optax.inject_hyperparams(scheduled)(*setting.rate)

  return made


ADAMW_COSINE = Method(
  "adamw_cosine",
  label="AdamW, warm-up and cosine",
  source="Adam's betas; warm-up over a twentieth of the steps, cosine to 0 at the end; "
  "best of 4 rates and 2 decays.",
  make=_with_cosine(lambda rate, decay: optax.adamw(rate, weight_decay=decay)),
  rates=_pairs(ADAMW_RATES, ADAMW_DECAYS),
)
SGD_COSINE = Method(
  "sgd_cosine",
  label="SGD with momentum, warm-up and cosine",
  source="Momentum .9, decay added to gradients; the same schedule; best of 4 rates "
  "and 2 decays.",
  make=_with_cosine(
    lambda rate, decay: optax.chain(
      optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9)
    )
  ),
  rates=_pairs((1e-2, 3e-2, 1e-1, 3e-1), (0.0, 5e-4)),
)
MUON_COSINE = Method(
  "muon_cosine",
  label="Muon and AdamW, warm-up and cosine",
  source="optax.contrib.muon for matrices, scaled to Adam's size of update "
  "(consistent_rms .2), AdamW for all else; the same schedule; best of AdamW's rates "
  "and decays.",
  make=_with_cosine(
    lambda rate, decay: optax.contrib.muon(
      rate, weight_decay=decay, adam_weight_decay=decay, consistent_rms=0.2
    )
  ),
  rates=_pairs(ADAMW_RATES, ADAMW_DECAYS),
)
PRODIGY_COSINE = Method(
  "prodigy_cosine",
  label="Prodigy with cosine",
  source="Defaults of optax.contrib.prodigy, cosine to 0 over all steps.",
  make=lambda setting: optax.contrib.prodigy(_cosine(setting, 1.0)),
)
SCHEDULE_FREE_WARM_UP = METHODS["schedule_free_adamw"]._replace(
  name="schedule_free_adamw_warm_up",
  label="Schedule-free AdamW with warm-up",
  source="Defaults of optax.contrib.schedule_free_adamw (rate 0.0025), warm-up over a "
  "twentieth of the steps.",
  make=lambda setting: optax.contrib.schedule_free_adamw(
    warmup_steps=_warm_up(setting)
  ),
)
