"""What deep Q-learning computes: values of actions, targets, and the loss."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import alrao_jax
from alrao_jax.linen import MultiHead

PyTree = Any


class QNetwork(nn.Module):
  """Two hidden layers with ReLU and a value for each action.

  Attributes:
    num_actions: Number of actions.
    width: Number of units of each hidden layer.
    num_heads: Number of copies of the output layer; None for an ordinary network.
  """

  num_actions: int
  width: int
  num_heads: int | None = None

  @nn.compact
  def __call__(self, observations: jax.Array) -> Any:
    """Returns the values of all actions, or `HeadOutputs` of them.

    Args:
      observations: (batch, observation_size).

    Returns:
      (batch, num_actions), or (num_heads, batch, num_actions).
    """
    hidden = nn.relu(nn.Dense(self.width, name="hidden_1")(observations))
    hidden = nn.relu(nn.Dense(self.width, name="hidden_2")(hidden))
    if self.num_heads is None:
      return nn.Dense(self.num_actions, name="output")(hidden)
    head = nn.Dense(self.num_actions)
    return MultiHead(head, self.num_heads, name="output")(hidden)


def values(
  network: QNetwork, params: PyTree, log_weights: jax.Array, observations: jax.Array
) -> jax.Array:
  """Returns the value of each action; with heads, their mixture's mean.

  The switch gives up on no head: one that diverged keeps about 1 / (num_heads * steps)
  of the weight, and values that may be enormous, yet finite. The mean is therefore of
  the heads that hold at least half an even share, which none gets without merit.

  Args:
    network: The network.
    params: Its parameters.
    log_weights: Of its heads, (num_heads,); not read without heads.
    observations: (batch, observation_size).

  Returns:
    (batch, num_actions).
  """
  outputs: Any = network.apply({"params": params}, observations)
  if network.num_heads is None:
    return outputs
  even_share = 1 / network.num_heads
  return alrao_jax.mixture_mean(outputs, log_weights, min_weight=even_share / 2)


def targets(
  rewards: jax.Array, terminated: jax.Array, next_values: jax.Array, discount: float
) -> jax.Array:
  r"""Returns what the values of the actions taken are regressed on.

  .. math::
    y = r + \gamma \max_a Q(s', a),

  without the second term where the episode terminated.

  Args:
    rewards: (batch,).
    terminated: (batch,), bool. False where the time limit cut an episode.
    next_values: Of the target network, (batch, num_actions).
    discount: The gamma, in [0, 1].

  Example:
    >>> next_values = jnp.array([[1.0, 2.0], [3.0, 0.0]])
    >>> targets(jnp.ones(2), jnp.array([False, True]), next_values, 0.5).tolist()
    [2.0, 1.0]

  Reference:
    Mnih et al., *Playing Atari with deep reinforcement learning*, arXiv 1312.5602,
    Algorithm 1.
  """
  best = next_values.max(axis=-1)
  return rewards + jnp.where(terminated, 0.0, discount * best)


def loss(
  outputs: Any,
  actions: jax.Array,
  targets: jax.Array,
  log_weights: jax.Array,
  noise_scale: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean negative log-likelihood of the targets, Gaussian around the actions' values.

  With heads it is Alrao's mixture of such Gaussians. Without, its gradient is that of
  half the squared error over the squared noise scale: SGD's rates and Alrao's mean the
  same.

  Args:
    outputs: Of the network.
    actions: Those taken, (batch,).
    targets: (batch,).
    log_weights: Of the heads, (num_heads,); not read without heads.
    noise_scale: The Gaussians' standard deviation, in the targets' unit.

  Returns:
    The loss, and what the optimizer's update takes beside gradients.
  """

  def taken(values: jax.Array) -> jax.Array:  # (..., batch, actions) to (..., batch)
    indices = jnp.broadcast_to(actions[:, None], (*values.shape[:-1], 1))
    return jnp.take_along_axis(values, indices, axis=-1)[..., 0]

  outputs = jax.tree.map(taken, outputs)
  if not isinstance(outputs, alrao_jax.HeadOutputs):
    log_probs = jax.scipy.stats.norm.logpdf(targets, outputs, noise_scale)
    return -log_probs.mean(), {}
  value, info = alrao_jax.regression_loss(
    outputs, targets, log_weights, noise_scale=noise_scale
  )
  return value, {"head_log_likelihoods": info.head_log_likelihoods}
