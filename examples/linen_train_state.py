"""Flax linen: a TrainState, your own chain, and numbers for a logger.

    python examples/linen_train_state.py

The chain has clipping and momentum, and Alrao's rates in the place of the learning
rate. It clips by the global norm per head: with one clip for all, the gradients of ten
output layers would decide how much of the body's gradient is left. The program reaches
a test accuracy of about 95 %.
"""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro

import alrao_jax as alrao
import digits
from alrao_jax.linen import MultiHead, TrainState, predict


class Classifier(nn.Module):
  """Two layers with LayerNorm, and ten copies of the output layer."""

  @nn.compact
  def __call__(self, images: jax.Array) -> alrao.HeadOutputs:
    """Returns :class:`HeadOutputs` of logits (batch, 10)."""
    hidden = images.reshape(len(images), -1)
    for _ in range(2):
      hidden = nn.relu(nn.LayerNorm()(nn.Dense(64)(hidden)))
    return MultiHead(nn.Dense(10), num_heads=10)(hidden)


def make_optimizer(key: jax.Array) -> optax.GradientTransformationExtraArgs:
  """Returns a chain; ``alrao.alrao(key, optax.trace(0.9))`` is one without the clip.

  Args:
    key: Determines the units' rates.
  """
  return optax.chain(
    alrao.drop_diverged(),
    alrao.per_head(optax.clip_by_global_norm(1.0)),
    optax.trace(0.9),
    alrao.scale_by_unit_rates(key),
    alrao.track_heads(),
  )


@jax.jit
def train_step(state: TrainState, batch: digits.Split):
  """Returns the next state, and a flat dict of numbers for a logger."""

  def loss_fn(params):
    heads = state.apply_fn({"params": params}, batch.images)
    log_weights = alrao.log_weights(state.opt_state)
    return alrao.classification_loss(heads, batch.labels, log_weights)

  (loss, info), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  state = state.apply_gradients(
    grads=grads, head_log_likelihoods=info.head_log_likelihoods
  )
  return state, {"loss": loss, **alrao.scalars(state.opt_state, state.params)}


@dataclasses.dataclass(frozen=True)
class Config:
  """Trains, and prints the numbers for a logger."""

  epochs: int = 20
  """Passes over the 1,297 training images."""
  seed: int = 0
  """Determines weights, batches and rates."""

  def __post_init__(self):
    digits.check_seed(self.seed)


def main(config: Config) -> float:
  """Trains; returns the test accuracy.

  Args:
    config: The options.
  """
  train, test = digits.load()
  model = Classifier()
  init_key, rates_key = jax.random.split(jax.random.key(config.seed))
  state = TrainState.create(
    apply_fn=model.apply,
    params=model.init(init_key, test.images)["params"],
    tx=make_optimizer(rates_key),
  )
  metrics = {}
  for batch in digits.batches(train, config.epochs, config.seed):
    state, metrics = train_step(state, batch)
  for name, value in metrics.items():
    print(f"{name:<40} {float(value):.4g}")
  log_probs = predict(
    model, {"params": state.params}, alrao.log_weights(state.opt_state), test.images
  )
  accuracy = float(np.mean(np.argmax(log_probs, axis=-1) == test.labels))
  print(f"test accuracy {accuracy:.3f}")
  return accuracy


if __name__ == "__main__":
  main(tyro.cli(Config))
