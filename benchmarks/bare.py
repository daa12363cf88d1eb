"""The arithmetic of Alrao on one network, written down with nothing around it.

What the library's structure costs shows beside it. Here are no units to find (the rates
are computed once, not from their quantiles at every step), no layer to wrap, no check
that anything is finite, no chain of transformations. The product of the heads is in the
order that the library takes on a CPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import alrao_jax
from benchmarks.images import ImageProgram, State

PyTree = Any


class BareMLPProgram(ImageProgram):
  """Trains `benchmarks.models.mlp`, without normalisation, by Alrao on SGD."""

  def init(self, seed: int, rate: Any) -> State:
    """Returns the state that training starts from, the library's.

    In place of the optimizer's state: a rate for each unit, of shapes that broadcast
    with the parameters', and the averaging's state.

    Args:
      seed: As in `ImageProgram`.
      rate: None.
    """
    state = super().init(seed, rate)
    rates: Any = alrao_jax.unit_rates(state.opt_state, state.params)
    body = jax.tree.map(lambda x: x[:1] if x.ndim == 2 else x, rates["body"])
    heads = jax.tree.map(lambda x: x[:, :1], rates["output"])
    heads = jax.tree.map(lambda x: x[..., :1], heads)
    (num_heads,) = alrao_jax.log_weights(state.opt_state).shape
    switch = alrao_jax.switch().init(num_heads, jnp.float32)
    rates = {"body": body, "output": heads}
    return state._replace(opt_state=jax.tree.map(jnp.array, (rates, switch)))

  def _train_step(self, state: State, data: PyTree, batch: PyTree):
    inputs, targets = self._read(data, batch, train=True)
    opt_state: Any = state.opt_state
    rates, switch = opt_state
    averaging = alrao_jax.switch()
    log_weights = averaging.log_weights(switch)

    def loss_fn(params):
      x = inputs.reshape(len(inputs), -1)
      for layer in ("Dense_0", "Dense_1"):
        dense = params["body"][layer]
        x = jax.nn.relu(x @ dense["kernel"] + dense["bias"][None])
      heads = params["output"]["alrao_heads"]

      def log_probs(features, heads):
        logits = jnp.tensordot(heads["kernel"], features, axes=(1, 1))
        logits = logits.swapaxes(1, 2) + heads["bias"][:, None]
        return -jax.vmap(
          optax.softmax_cross_entropy_with_integer_labels, in_axes=(0, None)
        )(logits, targets)

      # The body descends the mixture's loss, each head its own.
      shared = log_probs(x, jax.lax.stop_gradient(heads))
      own = log_probs(jax.lax.stop_gradient(x), heads).mean(axis=1)
      mixture = jax.nn.logsumexp(shared + log_weights[:, None], axis=0).mean()
      return -mixture - own.sum(), (-mixture, own)

    grads, (loss, own) = jax.grad(loss_fn, has_aux=True)(state.params)
    params = jax.tree.map(lambda p, g, r: p - r * g, state.params, grads, rates)
    opt_state = (rates, averaging.update(switch, own))
    outputs = {"loss": loss, "head_weights": jnp.exp(log_weights)}
    return State(params, state.batch_stats, opt_state), outputs

  def _log_weights(self, state: State) -> jax.Array:
    opt_state: Any = state.opt_state
    return alrao_jax.switch().log_weights(opt_state[1])
