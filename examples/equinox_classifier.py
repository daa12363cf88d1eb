"""Equinox, or any other framework: heads as a function of their parameters.

    pip install equinox && python examples/equinox_classifier.py

:func:`multi_head` takes one head as a pure function and the stacked parameters of all
heads. Alrao needs nothing else of a framework. It finds units from the shapes of
weights and biases. Equinox keeps a weight's outputs on its first axis. The bias shows
this, but not for a square weight, which needs an override. The program reaches a test
accuracy of about 96 %.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import numpy as np
import tyro

import alrao_jax as alrao
import digits

# Axis 0 of every weight is its layer's units.
UNITS = alrao.UnitOptions(overrides=((r"layers/\d+/weight$", (0,)),))


class Classifier(eqx.Module):
  """Two layers with LayerNorm, and ten copies of the output layer."""

  layers: list[eqx.nn.Linear]
  norms: list[eqx.nn.LayerNorm]
  alrao_heads: eqx.nn.Linear  # the optimizer knows this name; heads on axis 0

  def __init__(self, key: jax.Array, num_heads: int = 10):
    """Makes the model.

    Args:
      key: Random key of its weights.
      num_heads: Number of copies of the output layer.
    """
    first, second, heads = jax.random.split(key, 3)
    self.layers = [
      eqx.nn.Linear(64, 64, key=first),
      eqx.nn.Linear(64, 64, key=second),
    ]
    self.norms = [eqx.nn.LayerNorm(64) for _ in self.layers]
    self.alrao_heads = eqx.filter_vmap(lambda key: eqx.nn.Linear(64, 10, key=key))(
      jax.random.split(heads, num_heads)
    )

  def features(self, image: jax.Array) -> jax.Array:
    """Maps one image (8, 8, 1) to features (64,)."""
    hidden = image.reshape(-1)
    for layer, norm in zip(self.layers, self.norms, strict=True):
      hidden = jax.nn.relu(norm(layer(hidden)))
    return hidden

  def __call__(self, images: Any) -> alrao.HeadOutputs:
    """Maps images (batch, 8, 8, 1) to :class:`HeadOutputs` of logits (batch, 10)."""
    arrays, static = eqx.partition(self.alrao_heads, eqx.is_array)

    def head(arrays, features):
      return jax.vmap(eqx.combine(arrays, static))(features)

    return alrao.multi_head(head, arrays, jax.vmap(self.features)(images))


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
  init_key, rates_key = jax.random.split(jax.random.key(config.seed))
  model = Classifier(init_key)
  optimizer = alrao.alrao(rates_key, units=UNITS)
  opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

  @eqx.filter_jit
  def train_step(model, opt_state, batch):
    log_weights = alrao.log_weights(opt_state)

    def loss_fn(model):
      return alrao.classification_loss(model(batch.images), batch.labels, log_weights)

    grads, info = eqx.filter_grad(loss_fn, has_aux=True)(model)
    params: Any = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = optimizer.update(
      grads, opt_state, params, head_log_likelihoods=info.head_log_likelihoods
    )
    return eqx.apply_updates(model, updates), opt_state

  params: Any = eqx.filter(model, eqx.is_inexact_array)
  print(alrao.describe_units(params, units=UNITS))
  for batch in digits.batches(train, config.epochs, config.seed):
    model, opt_state = train_step(model, opt_state, batch)
  log_probs = alrao.mixture_log_probs(model(test.images), alrao.log_weights(opt_state))
  accuracy = float(np.mean(np.argmax(log_probs, axis=-1) == test.labels))
  print(f"test accuracy {accuracy:.3f}")
  return accuracy


if __name__ == "__main__":
  main(tyro.cli(Config))
