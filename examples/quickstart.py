"""Train a small convolutional network with no learning rate to choose.

    python examples/quickstart.py

Alrao, plain SGD at seven learning rates and Adam at its default train the same network
on scikit-learn's digits, images of 8x8 pixels that come inside its wheel. The program
prints a table, and writes ``results.json`` and ``quickstart.png`` into the output
folder.

A program of your own needs what ``Classifier`` and ``make_alrao_step`` show. The
numbers 1, 2 and 3 mark the lines that differ from an ordinary program.
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
import rich.progress
import tyro
from sklearn.datasets import load_digits

import alrao_jax as alrao
import quickstart_report
from alrao_jax.linen import MultiHead

SGD_RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # the papers'
ADAM_RATE = 1e-3  # Adam's default
SPLITS = {"train": 1000, "validation": 297, "test": 500}


@dataclasses.dataclass(frozen=True)
class Config:
  """Trains with Alrao, SGD at seven rates and Adam; writes a table and a picture."""

  epochs: int = 20
  """Passes over the 1,000 training images."""
  seeds: int = 3
  """Runs of each method: own initialisation, order of the images and rates of units."""
  batch_size: int = 32
  """Images in a step."""
  out: Path = Path("out/quickstart")
  """Folder for results.json and quickstart.png."""


# --- The network


class Backbone(nn.Module):
  """Three convolutions, each with BatchNorm: (batch, 8, 8, 1) to (batch, 64)."""

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Returns one feature vector an image."""
    hidden = images
    for features, stride in ((16, 1), (32, 2), (64, 2)):
      hidden = nn.Conv(features, (3, 3), stride, use_bias=False)(hidden)
      hidden = nn.BatchNorm(use_running_average=not train, momentum=0.9)(hidden)
      hidden = nn.relu(hidden)
    return hidden.mean((1, 2))


class Classifier(nn.Module):
  """The backbone and an output layer: ``num_heads`` copies of it for Alrao."""

  num_heads: int | None = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> Any:
    """Returns logits (batch, 10), or Alrao's :class:`HeadOutputs` of them."""
    features = Backbone()(images, train)
    if self.num_heads is None:
      return nn.Dense(10)(features)
    return MultiHead(nn.Dense(10), self.num_heads)(features)  # 1. wrap the output layer


class State(NamedTuple):
  """All that training changes, and all that a checkpoint would hold."""

  params: Any
  batch_stats: Any
  opt_state: optax.OptState


# --- One training step: with Alrao, and without


def make_alrao_step(model: nn.Module, optimizer: optax.GradientTransformationExtraArgs):
  """Returns a jitted (state, images, labels) -> (state, head weights)."""

  @jax.jit
  def step(state: State, images, labels):
    log_weights = alrao.log_weights(state.opt_state)

    def loss_fn(params):
      heads, updated = model.apply(
        {"params": params, "batch_stats": state.batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
      )
      # 3. the mixture's loss
      loss, info = alrao.classification_loss(heads, labels, log_weights)
      return loss, (info, updated["batch_stats"])

    grads, (info, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(
      grads,
      state.opt_state,
      state.params,
      head_log_likelihoods=info.head_log_likelihoods,
    )
    params = optax.apply_updates(state.params, updates)
    # A batch with NaN does no lasting harm here, either.
    batch_stats = alrao.keep_finite(batch_stats, state.batch_stats)
    return State(params, batch_stats, opt_state), jnp.exp(log_weights)

  return step


def make_plain_step(model: nn.Module, optimizer: optax.GradientTransformation):
  """Returns a jitted (state, images, labels) -> (state, None)."""

  @jax.jit
  def step(state: State, images, labels):
    def loss_fn(params):
      logits, updated = model.apply(
        {"params": params, "batch_stats": state.batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean(), updated["batch_stats"]

    grads, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(params, batch_stats, opt_state), None

  return step


# --- The methods, each compiled once: rates of SGD, of units and of heads are in the
#     optimizer's state and not in the program


class Method(NamedTuple):
  """A way to train: its optimizer, and the programs of its network."""

  name: str
  rate: float | None
  optimizer: Callable[[jax.Array], optax.GradientTransformation]  # from a key
  init: Callable  # (key, images) -> variables
  step: Callable  # (state, images, labels) -> (state, head weights)
  log_probs: Callable  # (state, images) -> (batch, 10)


def make_methods() -> list[Method]:
  """Returns Alrao, Adam, and SGD at each of ``SGD_RATES``."""
  with_heads, plain = Classifier(num_heads=10), Classifier()
  init_with_heads = jax.jit(partial(with_heads.init, train=False))
  init_plain = jax.jit(partial(plain.init, train=False))

  @jax.jit
  def alrao_log_probs(state: State, images):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    heads: Any = with_heads.apply(variables, images, train=False)
    return alrao.mixture_log_probs(heads, alrao.log_weights(state.opt_state))

  @jax.jit
  def plain_log_probs(state: State, images):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits: Any = plain.apply(variables, images, train=False)
    return jax.nn.log_softmax(logits)

  # 2. an optimizer with no learning rate. Its `init` draws the units' rates by the key;
  # `update`, and so the step, is the same for all keys.
  alrao_step = make_alrao_step(with_heads, alrao.alrao(jax.random.key(0)))
  adam = optax.adam(ADAM_RATE)
  adam_step = make_plain_step(plain, adam)
  sgd = optax.inject_hyperparams(optax.sgd)
  sgd_step = make_plain_step(plain, sgd(SGD_RATES[0]))

  def plain_method(name, rate, optimizer, step) -> Method:
    return Method(name, rate, lambda _: optimizer, init_plain, step, plain_log_probs)

  return [
    Method("Alrao", None, alrao.alrao, init_with_heads, alrao_step, alrao_log_probs),
    plain_method("Adam", ADAM_RATE, adam, adam_step),
    *(plain_method("SGD", rate, sgd(rate), sgd_step) for rate in SGD_RATES),
  ]


# --- Data, and one run


class Data(NamedTuple):
  """Images (1797, 8, 8, 1) in [0, 1] and labels (1797,), in the order of ``SPLITS``."""

  images: np.ndarray
  labels: np.ndarray


def load_data() -> Data:
  """Returns scikit-learn's digits, always in the same order."""
  digits: Any = load_digits()
  order = np.random.default_rng(0).permutation(len(digits.target))
  images = digits.images[order, :, :, None].astype(np.float32) / 16.0
  return Data(images, digits.target[order].astype(np.int32))


def evaluate(method: Method, state: State, data: Data) -> dict[str, float]:
  """Returns ``train_loss``, ``train_accuracy`` and so on for each split."""
  log_probs = np.asarray(method.log_probs(state, data.images))
  losses = -log_probs[np.arange(len(data.labels)), data.labels]
  correct = log_probs.argmax(-1) == data.labels
  scores, first = {}, 0
  for name, size in SPLITS.items():
    split = slice(first, first + size)
    scores[f"{name}_loss"] = float(losses[split].mean())
    scores[f"{name}_accuracy"] = float(correct[split].mean())
    first += size
  return scores


def train(
  method: Method,
  seed: int,
  config: Config,
  data: Data,
  on_epoch: Callable[[dict], None],
) -> dict[str, Any]:
  """Trains once; returns scores after each epoch, and Alrao's weights and rates."""
  start = time.perf_counter()
  init_key, rates_key = jax.random.split(jax.random.key(seed))
  order = np.random.default_rng(seed)
  images, labels = data.images[: SPLITS["train"]], data.labels[: SPLITS["train"]]

  variables = method.init(init_key, images[:1])
  opt_state = method.optimizer(rates_key).init(variables["params"])
  state = State(variables["params"], variables["batch_stats"], opt_state)

  curve, weights = [evaluate(method, state, data)], []
  for _ in range(config.epochs):
    shuffled = order.permutation(len(images))
    for first in range(0, len(images) - config.batch_size + 1, config.batch_size):
      batch = shuffled[first : first + config.batch_size]
      state, head_weights = method.step(state, images[batch], labels[batch])
      weights.append(head_weights)
    curve.append(evaluate(method, state, data))
    on_epoch(curve[-1])

  run = {"method": method.name, "rate": method.rate, "seed": seed, "curve": curve}
  if method.name == "Alrao":
    run["head_weights"] = np.asarray(jax.device_get(weights)).round(5).tolist()
    body, heads = split_rates(alrao.unit_rates(state.opt_state, state.params))
    run["unit_rates"], run["head_rates"] = body, heads
  run["seconds"] = time.perf_counter() - start
  return run


def split_rates(rates) -> tuple[list[float], list[float]]:
  """Returns the units' rates and the heads' from the tree of all weights' rates."""
  body, heads = set(), set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(rates):
    group = heads if "alrao_heads" in jax.tree_util.keystr(path) else body
    group.update(np.unique(leaf).tolist())  # a unit's weights all have one rate
  return sorted(body), sorted(heads)


def main(config: Config) -> dict[str, Any]:
  """Trains everything, prints the table, writes the files; returns the results."""
  if min(config.epochs, config.seeds, config.batch_size) < 1:
    sys.exit("--epochs, --seeds and --batch-size must be at least 1.")
  if config.batch_size > SPLITS["train"]:
    sys.exit(f"--batch-size must be at most {SPLITS['train']}, the training images.")
  config.out.mkdir(parents=True, exist_ok=True)
  start = time.perf_counter()
  data, methods, runs = load_data(), make_methods(), []
  progress = rich.progress.Progress(
    rich.progress.TextColumn("{task.description:<20}"),
    rich.progress.BarColumn(),
    rich.progress.TaskProgressColumn(),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TimeRemainingColumn(),
    rich.progress.TextColumn("{task.fields[scores]}"),
  )
  total = len(methods) * config.seeds * config.epochs
  with progress:
    task = progress.add_task("", total=total, scores="")

    def on_epoch(scores: dict) -> None:
      text = f"test loss {scores['test_loss']:.3f}"
      progress.update(task, advance=1, scores=text)

    for method in methods:
      name = method.name + (f" {method.rate:g}" if method.rate else "")
      for seed in range(config.seeds):
        progress.update(task, description=f"{name}, seed {seed}")
        runs.append(train(method, seed, config, data, on_epoch))

  seconds = time.perf_counter() - start
  results = quickstart_report.summarize(runs, config, seconds)
  quickstart_report.print_table(results)
  quickstart_report.write(results, config.out)
  return results


if __name__ == "__main__":
  main(tyro.cli(Config))
