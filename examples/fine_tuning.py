"""Fine-tuning: what fast units do to pretrained weights, and how to spare them.

    python examples/fine_tuning.py

An ordinary network learns the digits 0 to 4. From its checkpoint, other networks learn
the digits 5 to 9 from 100 images, each with Alrao on another interval. The body starts
from the checkpoint, the heads start fresh. The table shows the accuracy, how far the
body's weights have moved, and how well the old output layer still reads the old digits
from the new features: units with large rates forget. With seeds 0 and 1, the papers'
interval, [1e-5, 10], leaves .20 and .36 of accuracy on the old digits. An upper bound
of 1 leaves .91 and .96, and learns the new digits as well (.96, .95 against .92, .96).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import rich.table
import tyro

import alrao_jax as alrao
import digits
from alrao_jax.linen import MultiHead, predict

INTERVALS = ((1e-5, 10.0), (1e-5, 1.0), (1e-5, 1e-1), (1e-5, 1e-2))


class Classifier(nn.Module):
  """Three layers with LayerNorm, and an output layer or copies of it."""

  num_heads: int | None = None

  @nn.compact
  def __call__(self, images: jax.Array) -> Any:
    """Returns logits (batch, 5), or :class:`HeadOutputs` of them."""
    hidden = images.reshape(len(images), -1)
    for _ in range(3):
      hidden = nn.relu(nn.LayerNorm()(nn.Dense(64)(hidden)))
    if self.num_heads is None:
      return nn.Dense(5, name="output")(hidden)
    return MultiHead(nn.Dense(5), self.num_heads, name="output")(hidden)


def pretrain(split: digits.Split, epochs: int, seed: int) -> Any:
  """Returns an ordinary network's parameters, trained by Adam.

  Args:
    split: The digits 0 to 4.
    epochs: Number of passes over them.
    seed: Determines weights and batches.
  """
  model, optimizer = Classifier(), optax.adam(1e-3)
  params = model.init(jax.random.key(seed), split.images[:1])["params"]
  opt_state = optimizer.init(params)

  @jax.jit
  def train_step(params, opt_state, batch):
    def loss_fn(params):
      logits: Any = model.apply({"params": params}, batch.images)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
      return losses.mean()

    updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  for batch in digits.batches(split, epochs, seed):
    params, opt_state = train_step(params, opt_state, batch)
  return params


def fine_tune(
  pretrained: Any,
  split: digits.Split,
  interval: tuple[float, float],
  epochs: int,
  seed: int,
) -> tuple[Any, jax.Array]:
  """Returns the parameters and the heads' log-weights after fine-tuning.

  Args:
    pretrained: Parameters of the ordinary network.
    split: The new digits, as labels 0 to 4.
    interval: Bounds of the rates.
    epochs: Number of passes over the new digits.
    seed: Determines heads, rates and batches.
  """
  model = Classifier(num_heads=10)
  heads_key, rates_key = jax.random.split(jax.random.key(seed))
  fresh = model.init(heads_key, split.images[:1])["params"]
  # The new digits get new heads; without `keep`, all heads would be the old layer.
  params = alrao.load_pretrained(fresh, pretrained, keep=["^output/"])
  optimizer = alrao.alrao(rates_key, None, *interval)
  opt_state = optimizer.init(params)

  @jax.jit
  def train_step(params, opt_state, batch):
    log_weights = alrao.log_weights(opt_state)

    def loss_fn(params):
      heads: Any = model.apply({"params": params}, batch.images)
      return alrao.classification_loss(heads, batch.labels, log_weights)

    grads, info = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(
      grads, opt_state, params, head_log_likelihoods=info.head_log_likelihoods
    )
    return optax.apply_updates(params, updates), opt_state

  for batch in digits.batches(split, epochs, seed, size=20):
    params, opt_state = train_step(params, opt_state, batch)
  return params, alrao.log_weights(opt_state)


def select(split: digits.Split, first: int, count: int | None = None) -> digits.Split:
  """Returns the images of five digits, labelled from 0.

  Args:
    split: Images of all digits.
    first: The least of the five.
    count: How many of the images; None for all.
  """
  chosen = (split.labels >= first) & (split.labels < first + 5)
  return digits.Split(
    split.images[chosen][:count], split.labels[chosen][:count] - first
  )


def moved(before: Any, after: Any) -> float:
  """Returns how far weights have moved, relative to their norm.

  Args:
    before: Parameters.
    after: Parameters of the same layers.
  """
  pairs = [
    (old, new)
    for name, layer in before.items()
    if name != "output"
    for old, new in zip(
      jax.tree.leaves(layer), jax.tree.leaves(after[name]), strict=True
    )
  ]
  change = sum(float(jnp.sum((new - old) ** 2)) for old, new in pairs)
  return (change / sum(float(jnp.sum(old**2)) for old, _ in pairs)) ** 0.5


@dataclasses.dataclass(frozen=True)
class Config:
  """Pretrains once, fine-tunes on every interval, and prints a table."""

  epochs: int = 30
  """Passes over the images, of pretraining and of fine-tuning."""
  num_images: int = 100
  """Number of the new digits' images to train on."""
  seed: int = 0
  """Determines weights, batches and rates."""

  def __post_init__(self):
    digits.check_seed(self.seed)


def main(config: Config) -> list[dict[str, float]]:
  """Runs everything; returns the rows of the table.

  Args:
    config: The options.
  """
  train, test = digits.load()
  old_test, new_test = select(test, 0), select(test, 5)
  pretrained = pretrain(select(train, 0), config.epochs, config.seed)
  plain, model, rows = Classifier(), Classifier(num_heads=10), []
  for interval in INTERVALS:
    params, log_weights = fine_tune(
      pretrained,
      select(train, 5, config.num_images),
      interval,
      config.epochs,
      config.seed,
    )
    log_probs = predict(model, {"params": params}, log_weights, new_test.images)
    old: Any = plain.apply(
      {"params": {**params, "output": pretrained["output"]}}, old_test.images
    )
    rows.append(
      {
        "max_learning_rate": interval[1],
        "accuracy": float(np.mean(np.argmax(log_probs, -1) == new_test.labels)),
        "moved": moved(pretrained, params),
        "old_accuracy": float(np.mean(np.argmax(old, -1) == old_test.labels)),
      }
    )
  table = rich.table.Table(
    "interval", "new digits, test", "body's weights moved by", "old digits, test"
  )
  for row in rows:
    table.add_row(
      f"[1e-05, {row['max_learning_rate']:g}]",
      f"{row['accuracy']:.3f}",
      f"{row['moved']:.3f}",
      f"{row['old_accuracy']:.3f}",
    )
  rich.print(table)
  return rows


if __name__ == "__main__":
  main(tyro.cli(Config))
