"""Orbax checkpoints, and an interval that changes during training.

    python examples/checkpointing.py --out out/checkpointing

Rates, posterior and counters are all in the optimizer's state, so params and opt_state
are the whole checkpoint. If you kill the program and run it again with the same
options, it goes on after the last epoch, bit for bit. :func:`optax.inject_hyperparams`
makes the bounds of the interval entries of the state: after half of the epochs the
program lowers the upper bound, and so every unit's rate, without another compilation.
It reaches a test accuracy of about 97 %.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro

import alrao_jax as alrao
import digits
from alrao_jax.linen import MultiHead, predict


class Classifier(nn.Module):
  """Two layers with LayerNorm, and ten copies of the output layer."""

  @nn.compact
  def __call__(self, images: jax.Array) -> alrao.HeadOutputs:
    """Returns :class:`HeadOutputs` of logits (batch, 10)."""
    hidden = images.reshape(len(images), -1)
    for _ in range(2):
      hidden = nn.relu(nn.LayerNorm()(nn.Dense(64)(hidden)))
    return MultiHead(nn.Dense(10), num_heads=10)(hidden)


class State(NamedTuple):
  """All that training changes."""

  params: Any
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class Config:
  """Trains from the last checkpoint on, and tests."""

  epochs: int = 20
  """Passes over the 1,297 training images, those of earlier runs included."""
  seed: int = 0
  """Determines weights, batches and rates."""
  out: Path = Path("out/checkpointing")
  """Folder of the checkpoints, one an epoch; it keeps the last two."""

  def __post_init__(self):
    digits.check_seed(self.seed)


def main(config: Config) -> tuple[float, State]:
  """Trains; returns the test accuracy and the last state.

  Args:
    config: The options.
  """
  train, test = digits.load()
  model = Classifier()
  init_key, rates_key = jax.random.split(jax.random.key(config.seed))
  params = model.init(init_key, test.images[:1])["params"]
  make = optax.inject_hyperparams(alrao.alrao, static_args="key")
  optimizer = make(rates_key, min_learning_rate=1e-5, max_learning_rate=10.0)
  state = State(params, optimizer.init(params))

  @jax.jit
  def train_step(state, batch):
    log_weights = alrao.log_weights(state.opt_state)

    def loss_fn(params):
      heads: Any = model.apply({"params": params}, batch.images)
      return alrao.classification_loss(heads, batch.labels, log_weights)

    grads, info = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(
      grads,
      state.opt_state,
      state.params,
      head_log_likelihoods=info.head_log_likelihoods,
    )
    return State(optax.apply_updates(state.params, updates), opt_state)

  options = ocp.CheckpointManagerOptions(max_to_keep=2)
  with ocp.CheckpointManager(config.out.absolute(), options=options) as manager:
    epoch = manager.latest_step() or 0
    if epoch:
      state = manager.restore(epoch, args=ocp.args.StandardRestore(state))
      print(f"went on after epoch {epoch}")
    while epoch < config.epochs:
      epoch += 1
      bounds = state.opt_state.hyperparams
      if epoch == config.epochs // 2 + 1:
        before = float(bounds["max_learning_rate"])
        # With a dtype: a weakly typed number would compile the step again.
        bounds["max_learning_rate"] = jnp.asarray(1.0, jnp.float32)
        print(f"epoch {epoch}: upper bound {before:g} -> 1")
      for batch in digits.batches(train, 1, seed=(config.seed, epoch)):
        state = train_step(state, batch)
      manager.save(epoch, args=ocp.args.StandardSave(state))
  log_probs = predict(
    model, {"params": state.params}, alrao.log_weights(state.opt_state), test.images
  )
  accuracy = float(np.mean(np.argmax(log_probs, axis=-1) == test.labels))
  print(f"test accuracy {accuracy:.3f}")
  return accuracy, state


if __name__ == "__main__":
  main(tyro.cli(Config))
