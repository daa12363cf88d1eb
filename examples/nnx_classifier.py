"""Flax nnx: a model with BatchNorm, nnx.Optimizer, then the ordinary model to serve.

    python examples/nnx_classifier.py

As it trains, :func:`collapse` removes the heads that the posterior gives no hope, so
that training goes on at the price of an ordinary network. At the end :func:`export`
turns the best head into the ordinary output layer of a model that knows nothing of
Alrao. The program reaches a test accuracy of about 99 %.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx

import alrao_jax as alrao
import alrao_jax.nnx
import digits


class Classifier(nnx.Module):
  """Three convolutions with BatchNorm, and an output layer or copies of it."""

  def __init__(self, num_heads: int | None, rngs: nnx.Rngs):
    """Makes the model.

    Args:
      num_heads: Number of copies of the output layer; None for an ordinary one.
      rngs: Random streams.
    """
    sizes = [1, 16, 32, 64]
    self.convs, self.norms = nnx.List(), nnx.List()
    for before, features in zip(sizes[:-1], sizes[1:], strict=True):
      stride = 1 if before == 1 else 2
      self.convs.append(
        nnx.Conv(before, features, (3, 3), strides=stride, use_bias=False, rngs=rngs)
      )
      self.norms.append(nnx.BatchNorm(features, momentum=0.9, rngs=rngs))

    def output(rngs: nnx.Rngs) -> nnx.Linear:
      return nnx.Linear(64, 10, rngs=rngs)

    self.output: Any = output(rngs)
    if num_heads is not None:
      self.output = alrao.nnx.MultiHead(output, num_heads=num_heads, rngs=rngs)

  def __call__(self, images: jax.Array) -> Any:
    """Maps images (batch, 8, 8, 1) to logits (batch, 10), of all heads or of one."""
    hidden = images
    for conv, norm in zip(self.convs, self.norms, strict=True):
      hidden = nnx.relu(norm(conv(hidden)))
    return self.output(hidden.mean(axis=(1, 2)))


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, batch: digits.Split):
  """Updates model and optimizer; returns the loss."""
  log_weights = alrao.log_weights(optimizer.opt_state)
  statistics = nnx.as_pure(nnx.state(model, nnx.BatchStat))

  def loss_fn(model):
    return alrao.classification_loss(model(batch.images), batch.labels, log_weights)

  (loss, info), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
  optimizer.update(model, grads, head_log_likelihoods=info.head_log_likelihoods)
  # A batch with NaN does no lasting harm: the running averages stay, too.
  nnx.update(model, alrao.keep_finite(nnx.state(model, nnx.BatchStat), statistics))
  return loss


@dataclasses.dataclass(frozen=True)
class Config:
  """Trains, drops unlikely heads, exports, and tests the ordinary model."""

  epochs: int = 20
  """Passes over the 1,297 training images."""
  seed: int = 0
  """Determines weights, batches and rates."""

  def __post_init__(self):
    digits.check_seed(self.seed)


def main(config: Config) -> float:
  """Trains; returns the exported model's test accuracy.

  Args:
    config: The options.
  """
  train, test = digits.load()
  init_key, rates_key = jax.random.split(jax.random.key(config.seed))
  model = Classifier(10, nnx.Rngs(init_key))
  transformation = alrao.alrao(rates_key)
  optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
  for step, batch in enumerate(digits.batches(train, config.epochs, config.seed), 1):
    train_step(model, optimizer, batch)
    if step % 50 == 0:  # most calls only look at the posterior
      alrao.nnx.collapse(model, optimizer, keep=alrao.hopeful())
  print(alrao.report(optimizer.opt_state, nnx.state(model, nnx.Param)))

  plain = alrao.nnx.export(model, optimizer.opt_state)
  plain.eval()
  accuracy = float(np.mean(np.argmax(plain(test.images), axis=-1) == test.labels))
  print(f"test accuracy of the ordinary model {accuracy:.3f}")
  return accuracy


if __name__ == "__main__":
  main(tyro.cli(Config))
