"""bfloat16 arithmetic, float32 parameters, and activations computed twice.

    python examples/mixed_precision.py

This saves memory and time on accelerators. Blocks compute in bfloat16 and are
rematerialised (``nn.remat``, linen's :func:`jax.checkpoint`): only their inputs are
kept for the backward pass. Parameters, Alrao's rates and the heads' posterior are
float32. The heads are float32 too, since the posterior adds up their log-likelihoods.
The program reaches a test accuracy of about 98 %.

float16 needs loss scaling: write Flax's ``DynamicScale().value_and_grad`` instead of
:func:`jax.value_and_grad`, and keep the old parameters and optimizer state if it calls
a step not finite. It sees an overflow of every head that has a part in the mixture.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import alrao_jax as alrao
import digits
from alrao_jax.linen import MultiHead, predict


class Block(nn.Module):
  """A residual block: two convolutions, each with GroupNorm."""

  features: int

  @nn.compact
  def __call__(self, hidden: jax.Array) -> jax.Array:
    """Maps (batch, height, width, features) to the same shape, bfloat16."""
    change = hidden
    for _ in range(2):
      change = nn.Conv(self.features, (3, 3), dtype=jnp.bfloat16)(nn.relu(change))
      change = nn.GroupNorm(8, dtype=jnp.bfloat16)(change)
    return hidden + change


class Classifier(nn.Module):
  """A stem, two blocks, and ten copies of the output layer."""

  @nn.compact
  def __call__(self, images: jax.Array) -> alrao.HeadOutputs:
    """Maps images (batch, 8, 8, 1) to float32 logits (batch, 10) of all heads."""
    hidden = nn.Conv(32, (3, 3), 2, dtype=jnp.bfloat16)(images.astype(jnp.bfloat16))
    hidden = nn.GroupNorm(8, dtype=jnp.bfloat16)(hidden)
    for _ in range(2):
      hidden = nn.remat(Block)(32)(hidden)
    features = hidden.reshape(len(hidden), -1).astype(jnp.float32)
    return MultiHead(nn.Dense(10), num_heads=10)(features)


@dataclasses.dataclass(frozen=True)
class Config:
  """Trains and tests."""

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
  params = model.init(init_key, test.images[:1])["params"]
  optimizer = alrao.alrao(rates_key)
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

  for batch in digits.batches(train, config.epochs, config.seed):
    params, opt_state = train_step(params, opt_state, batch)
  log_probs = predict(
    model, {"params": params}, alrao.log_weights(opt_state), test.images
  )
  accuracy = float(np.mean(np.argmax(log_probs, axis=-1) == test.labels))
  print(f"test accuracy {accuracy:.3f}")
  return accuracy


if __name__ == "__main__":
  main(tyro.cli(Config))
