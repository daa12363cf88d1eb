"""Predict numbers, and how far off they may be, with no learning rate to choose.

    python examples/regression.py

Two problems: a noisy sine, and scikit-learn's diabetes data, which come inside its
wheel. A network predicts a mean, and the noise around it (not with
``--no-learn-noise``). Alrao, Adam at its default rate and plain SGD at seven rates
train the same network. The program prints a table, and writes ``regression.png`` into
the output folder.

The numbers 1, 2 and 3 mark the lines that differ from an ordinary program.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import alrao_jax as alrao
import regression_report
from alrao_jax.linen import MultiHead
from regression_data import Problem, load_patients, make_sine

SGD_RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # the papers'
ADAM_RATE = 1e-3  # Adam's default
BATCH_SIZE = 16
TARGETS = np.linspace(-3.0, 3.0, 241)  # where densities are computed


@dataclasses.dataclass(frozen=True)
class Config:
  """Trains with Alrao, Adam and SGD at seven rates; writes a table and a picture."""

  epochs: int = 100
  """Passes over the training examples."""
  seeds: int = 5
  """Runs of each method: own initialisation, order of the examples, rates of units."""
  learn_noise: bool = True
  """Learn the noise at each input; otherwise it has each problem's fixed scale."""
  out: Path = Path("out/regression")
  """Folder for regression.png."""


# --- The network


class Gaussian(nn.Module):
  """An output layer: a mean, or a pair of mean and log-scale of the noise."""

  learn_noise: bool

  @nn.compact
  def __call__(self, features: jax.Array) -> Any:
    """Returns (batch,), or two of them."""
    if not self.learn_noise:
      return nn.Dense(1)(features)[..., 0]
    outputs = nn.Dense(2)(features)
    return outputs[..., 0], outputs[..., 1]


class Regressor(nn.Module):
  """Two hidden layers and the output layer: ``num_heads`` copies of it for Alrao."""

  learn_noise: bool
  num_heads: int | None = None

  @nn.compact
  def __call__(self, inputs: jax.Array) -> Any:
    """Returns one head's outputs, or Alrao's :class:`HeadOutputs`."""
    hidden = inputs
    for _ in range(2):
      hidden = nn.tanh(nn.Dense(64)(hidden))
    head = Gaussian(self.learn_noise)
    if self.num_heads is None:
      return head(hidden)
    return MultiHead(head, self.num_heads)(hidden)  # 1. wrap the output layer


class Method(NamedTuple):
  """A way to train; all its rates are tried, and the best is chosen."""

  name: str
  make_optimizer: Callable[[jax.Array, Any], Any]  # from key and rate
  rates: tuple[float, ...] = (0.0,)
  num_heads: int | None = None

  def model(self, config: Config) -> Regressor:
    """Returns the network that it trains."""
    return Regressor(config.learn_noise, self.num_heads)

  def log_weights(self, opt_state: Any) -> jax.Array:
    """Returns Alrao's posterior over heads, nothing for other methods."""
    return alrao.log_weights(opt_state) if self.num_heads else jnp.zeros(0)


METHODS = (
  Method("Alrao", lambda key, _: alrao.alrao(key), num_heads=10),  # 2. no rate
  Method("Adam", lambda key, _: optax.adam(ADAM_RATE)),
  Method("SGD", lambda key, rate: optax.inject_hyperparams(optax.sgd)(rate), SGD_RATES),
)


def negative_log_likelihood(
  outputs: Any, targets: jax.Array, log_weights: jax.Array, noise_scale: float
) -> tuple[jax.Array, dict[str, Any]]:
  """Returns the mean over a batch, and the extra arguments of ``update``."""
  if isinstance(outputs, alrao.HeadOutputs):
    # 3. the mixture's loss
    loss, info = alrao.regression_loss(
      outputs, targets, log_weights, noise_scale=noise_scale
    )
    return loss, {"head_log_likelihoods": info.head_log_likelihoods}
  mean, log_scale = outputs if isinstance(outputs, tuple) else (outputs, 0.0)
  scale = noise_scale * jnp.exp(log_scale)
  return -jax.scipy.stats.norm.logpdf(targets, mean, scale).mean(), {}


# --- What is predicted


class Prediction(NamedTuple):
  """A distribution of the target at each of n inputs.

  Attributes:
    mean: (n,).
    deviation: Standard deviation; of noise and of the heads' disagreement, (n,).
    density: At each of ``TARGETS``, (n, len(TARGETS)).
  """

  mean: Any
  deviation: Any
  density: Any


def predict(outputs: Any, log_weights: jax.Array, noise_scale: float) -> Prediction:
  """Returns the distribution that the network's outputs stand for."""

  def moments(outputs: Any) -> tuple[jax.Array, ...]:
    """Mean, mean square and density of one Gaussian."""
    mean, log_scale = outputs if isinstance(outputs, tuple) else (outputs, 0.0)
    scale = jnp.broadcast_to(noise_scale * jnp.exp(log_scale), mean.shape)
    values = jnp.array(TARGETS, mean.dtype)[None, :]
    density = jax.scipy.stats.norm.pdf(values, mean[:, None], scale[:, None])
    return mean, mean**2 + scale**2, density

  if isinstance(outputs, alrao.HeadOutputs):
    # The switch leaves every head a weight of a millionth, and a head with a mean of a
    # billion would ruin the sum. Use only heads with at least half an even share, which
    # only good heads get.
    least = 0.5 / len(log_weights)
    # The moments of a mixture are the means of its heads' moments.
    mean, square, density = (
      alrao.mixture_mean(
        outputs, log_weights, lambda head, i=i: moments(head)[i], min_weight=least
      )
      for i in range(3)
    )
  else:
    mean, square, density = moments(outputs)
  return Prediction(mean, jnp.sqrt(jnp.maximum(square - mean**2, 0.0)), density)


# --- Training


class Run(NamedTuple):
  """What a training gives.

  Attributes:
    validation_loss: After each epoch, (epochs,).
    test_loss: After each epoch, (epochs,).
    head_weights: After each epoch, (epochs, num_heads).
    prediction: For the test inputs and those of the grid behind them, after the epoch
      of least validation loss.
  """

  validation_loss: Any
  test_loss: Any
  head_weights: Any
  prediction: Prediction


def train(method: Method, problem: Problem, config: Config) -> Run:
  """Trains all seeds and rates at once; the results' first axes are (seed, rate)."""
  model, noise_scale = method.model(config), problem.noise_scale
  if config.learn_noise:
    noise_scale = 1.0  # to start from
  inputs, targets = jax.device_put((problem.inputs, problem.targets))
  queries = np.concatenate([problem.inputs["test"], problem.grid])
  # Rates are in the optimizer's state, so one `update` serves all keys and rates.
  update = optax.with_extra_args_support(
    method.make_optimizer(jax.random.key(0), 1.0)
  ).update

  def outputs_of(params, inputs) -> Any:
    return model.apply({"params": params}, inputs)

  def loss_of(params, log_weights, inputs, targets):
    outputs = outputs_of(params, inputs)
    return negative_log_likelihood(outputs, targets, log_weights, noise_scale)

  def step(carry, batch):
    params, opt_state = carry
    grads, extra = jax.grad(loss_of, has_aux=True)(
      params,
      method.log_weights(opt_state),
      inputs["train"][batch],
      targets["train"][batch],
    )
    updates, opt_state = update(grads, opt_state, params, **extra)
    return (optax.apply_updates(params, updates), opt_state), None

  def epoch(carry, batches):
    params, opt_state, best, least = carry
    (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), batches)
    log_weights = method.log_weights(opt_state)
    validation_loss, test_loss = (
      loss_of(params, log_weights, inputs[name], targets[name])[0]
      for name in ("validation", "test")
    )
    better = validation_loss < least  # never, if it is NaN
    best = jax.tree.map(partial(jnp.where, better), (params, log_weights), best)
    least = jnp.where(better, validation_loss, least)
    results = validation_loss, test_loss, jnp.exp(log_weights)
    return (params, opt_state, best, least), results

  def run(params, rates_key, rate, batches) -> Run:
    opt_state = method.make_optimizer(rates_key, rate).init(params)
    best = params, method.log_weights(opt_state)
    carry = params, opt_state, best, jnp.inf
    (*_, (params, log_weights), _), results = jax.lax.scan(epoch, carry, batches)
    outputs = outputs_of(params, queries)
    return Run(*results, predict(outputs, log_weights, noise_scale))

  init_keys, rates_keys = jax.random.split(jax.random.key(0), (2, config.seeds))
  inits = [model.init(key, inputs["train"][:1])["params"] for key in init_keys]
  params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inits)
  num_train, order = len(problem.targets["train"]), np.random.default_rng(0)
  shuffled = [
    [order.permutation(num_train) for _ in range(config.epochs)]
    for _ in range(config.seeds)
  ]
  used = num_train // BATCH_SIZE * BATCH_SIZE
  batches = np.array(shuffled)[..., :used]
  batches = batches.reshape(config.seeds, config.epochs, -1, BATCH_SIZE)
  over_rates = jax.vmap(run, in_axes=(None, None, 0, None))
  over_seeds = jax.jit(jax.vmap(over_rates, in_axes=(0, 0, None, 0)))
  return jax.device_get(
    over_seeds(params, rates_keys, jnp.array(method.rates), batches)
  )


def main(config: Config) -> list[regression_report.Row]:
  """Trains everything, prints the table and draws the picture; returns the rows."""
  if min(config.epochs, config.seeds) < 1:
    sys.exit("--epochs and --seeds must be at least 1.")
  config.out.mkdir(parents=True, exist_ok=True)
  start, rows = time.perf_counter(), []
  for problem in (make_sine(), load_patients()):
    for method in METHODS:
      print(f"{problem.name}: training with {method.name}", flush=True)
      runs = train(method, problem, config)
      for i, rate in enumerate(method.rates):
        run = jax.tree.map(lambda leaf, i=i: leaf[:, i], runs)
        rows.append(regression_report.make_row(problem, method, rate, run))
  regression_report.print_table(rows, config)
  path = config.out / "regression.png"
  regression_report.draw(rows, TARGETS, path)
  print(f"{time.perf_counter() - start:.0f} s. Wrote {path}.")
  return rows


if __name__ == "__main__":
  main(tyro.cli(Config))
