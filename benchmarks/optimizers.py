"""The optimizers of the benchmarks, by name, each with where its settings come from."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import alrao_jax
from alrao_jax import alrao

PyTree = Any

OptimizerName = Literal[
  "alrao",
  "alrao_adam",
  "alrao_momentum",
  "alrao_cosine",
  "alrao_fast",
  "alrao_guard",
  "schedule_free_alrao",
  "sgd",
  "sgd_momentum",
  "adam",
  "adamw",
  "adamw_rates",
  "sgd_tuned",
  "prodigy",
  "dadapt_adamw",
  "schedule_free_adamw",
  "dowg",
  "dog",
  "mechanize_adam",
]

SGD_RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # the papers'


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


class Optimizer(NamedTuple):
  """An optimizer of the benchmarks.

  Attributes:
    label: Its name in tables.
    source: Where its settings come from.
    make: Returns the transformation. Key and rate are in its state, so that one program
      runs all of them.
    takes_rate: Whether it has a learning rate to choose.
    has_heads: Whether the network needs Alrao's heads.
    averaged_params: Function of (opt_state, params) that returns the parameters to
      evaluate, where these are not those that train.
    num_heads: How many heads it has, where it has heads and no option says otherwise.
  """

  label: str
  source: str
  make: Callable[[Setting], optax.GradientTransformation]
  takes_rate: bool = False
  has_heads: bool = False
  averaged_params: Callable[[optax.OptState, PyTree], PyTree] | None = None
  num_heads: int = 10


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


OPTIMIZERS: dict[str, Optimizer] = {
  "alrao": Optimizer(
    label="Alrao",
    source="arXiv 1810.01322, experiments: interval [1e-5, 10], 10 heads.",
    make=lambda setting: alrao(setting.key),
    has_heads=True,
  ),
  "alrao_adam": Optimizer(
    label="Alrao on Adam",
    source="arXiv 1810.01322, appendix on Adam: interval [1e-6, 1]; Adam's betas.",
    make=lambda setting: alrao(setting.key, optax.scale_by_adam(), 1e-6, 1.0),
    has_heads=True,
  ),
  "alrao_momentum": Optimizer(
    label="Alrao with momentum",
    source="Alrao's interval; momentum 0.9, as in the tuned recipe.",
    make=lambda setting: alrao(setting.key, optax.trace(0.9)),
    has_heads=True,
  ),
  "alrao_cosine": Optimizer(
    label="Alrao with a schedule",
    source="Alrao's interval; all rates times a cosine from 1 to 0 over all epochs.",
    make=lambda setting: alrao(setting.key, schedule=_cosine(setting, 1.0)),
    has_heads=True,
  ),
  "alrao_fast": Optimizer(
    label="Alrao, [1e-3, 100]",
    source="arXiv 1810.01322, first version, Penn Treebank: interval [1e-3, 100], 6 "
    "heads.",
    make=lambda setting: alrao(setting.key, None, 1e-3, 100.0),
    has_heads=True,
    num_heads=6,
  ),
  "alrao_guard": Optimizer(
    label="Alrao, guarded",
    source="Alrao's interval; defaults of alrao_jax.guard.",
    make=lambda setting: alrao(setting.key, guard=alrao_jax.guard()),
    has_heads=True,
  ),
  "schedule_free_alrao": Optimizer(
    label="Schedule-free Alrao",
    source="Defaults of alrao_jax.schedule_free_alrao, found on four other tasks "
    "(docs/recipe.md); evaluated at its averaged weights.",
    make=lambda setting: alrao_jax.schedule_free_alrao(setting.key),
    has_heads=True,
    averaged_params=alrao_jax.eval_params,
  ),
  "sgd": Optimizer(
    label="SGD",
    source="arXiv 1810.01322, experiments: rates 1e-5, 1e-4, ..., 10, no momentum.",
    make=lambda setting: optax.inject_hyperparams(optax.sgd)(setting.rate),
    takes_rate=True,
  ),
  "sgd_momentum": Optimizer(
    label="SGD with momentum",
    source="SGD's rates; momentum 0.9.",
    make=lambda setting: optax.inject_hyperparams(optax.sgd, static_args="momentum")(
      setting.rate, momentum=0.9
    ),
    takes_rate=True,
  ),
  "adam": Optimizer(
    label="Adam",
    source="Kingma and Ba, arXiv 1412.6980, algorithm 1: rate 1e-3; as in the papers.",
    make=lambda setting: optax.adam(1e-3),
  ),
  "adamw": Optimizer(
    label="AdamW",
    source="Adam's rate 1e-3; weight decay 1e-4, the default of optax.adamw.",
    make=lambda setting: optax.adamw(1e-3),
  ),
  "adamw_rates": Optimizer(
    label="AdamW",
    source="SGD's rates; weight decay 1e-4, the default of optax.adamw.",
    make=lambda setting: optax.inject_hyperparams(optax.adamw)(setting.rate),
    takes_rate=True,
  ),
  "sgd_tuned": Optimizer(
    label="SGD, tuned recipe",
    source="Not free of tuning: rate .1, momentum .9, cosine to 0 over all epochs, "
    "weight decay 5e-4, a recipe tuned by many for CIFAR-10 "
    "(github.com/kuangliu/pytorch-cifar, main.py).",
    make=_tuned_sgd,
  ),
  "prodigy": Optimizer(
    label="Prodigy",
    source="Defaults of optax.contrib.prodigy (arXiv 2306.06101), no schedule.",
    make=lambda setting: optax.contrib.prodigy(),
  ),
  "dadapt_adamw": Optimizer(
    label="D-Adaptation AdamW",
    source="Defaults of optax.contrib.dadapt_adamw (arXiv 2301.07733), no schedule.",
    make=lambda setting: optax.contrib.dadapt_adamw(),
  ),
  "schedule_free_adamw": Optimizer(
    label="Schedule-free AdamW",
    source="Defaults of optax.contrib.schedule_free_adamw (rate 0.0025, no warm-up; "
    "arXiv 2405.15682); evaluated at its averaged weights.",
    make=lambda setting: optax.contrib.schedule_free_adamw(),
    averaged_params=optax.contrib.schedule_free_eval_params,
  ),
  "dowg": Optimizer(
    label="DoWG",
    source="Defaults of optax.contrib.dowg (arXiv 2305.16284).",
    make=lambda setting: optax.contrib.dowg(),
  ),
  "dog": Optimizer(
    label="DoG",
    source="Defaults of optax.contrib.dog (arXiv 2302.12022), with the first step it "
    "suggests: 1e-4 with batch normalisation, else 1e-6; evaluated at averaged "
    "weights, polynomial with gamma 8, as its authors recommend.",
    make=_dog,
    averaged_params=lambda opt_state, params: opt_state.average,
  ),
  "mechanize_adam": Optimizer(
    label="Mechanic on Adam",
    source="Defaults of optax.contrib.mechanize (arXiv 2306.00144) on optax.adam(1.0), "
    "the base rate of its documentation.",
    make=lambda setting: optax.contrib.mechanize(optax.adam(1.0)),
  ),
}

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

# Those of the tables of images; the others are for other tables.
_OTHER = (
  "alrao_fast",
  "alrao_guard",
  "schedule_free_alrao",
  "sgd_momentum",
  "adamw_rates",
)
IMAGE_OPTIMIZERS = tuple(name for name in OPTIMIZERS if name not in _OTHER)
