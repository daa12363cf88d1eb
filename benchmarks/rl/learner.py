"""What a deep Q-learner computes: acting, and an update; all of it jitted."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import alrao_jax
from benchmarks.optimizers import Optimizer, Setting
from benchmarks.rl import q_learning, replay
from benchmarks.rl.environments import Protocol
from benchmarks.rl.replay import Replay, Transitions

PyTree = Any


class Policy(NamedTuple):
  """All that the values of actions depend on.

  Attributes:
    params: Parameters of the network.
    log_weights: Alrao's posterior that belongs to them, (num_heads,), else (0,).
  """

  params: PyTree
  log_weights: jax.Array


class State(NamedTuple):
  """All that training changes.

  Attributes:
    params: Parameters of the network.
    target: The target network: parameters and log-weights of one moment.
    opt_state: State of the optimizer; with Alrao, rates and posterior too.
    num_updates: Number of updates done, int32.
    replay: The replay buffer.
  """

  params: PyTree
  target: Policy
  opt_state: optax.OptState
  num_updates: jax.Array
  replay: Replay


class Learner:
  """A Q-network, its optimizer, and the functions that use them.

  Attributes:
    num_parameters: Of the network.
  """

  def __init__(
    self,
    protocol: Protocol,
    optimizer: Optimizer,
    *,
    observation_size: int,
    num_actions: int,
    num_heads: int,
    noise_scale: float,
  ):
    """Makes the learner; nothing is compiled yet.

    Args:
      protocol: How to learn.
      optimizer: The optimizer.
      observation_size: Number of entries of an observation.
      num_actions: Number of actions.
      num_heads: Number of heads, if the optimizer needs them.
      noise_scale: Standard deviation of each head's Gaussian, in the unit of scaled
        rewards.
    """
    self._protocol, self._optimizer = protocol, optimizer
    self._noise_scale = noise_scale
    self._network = q_learning.QNetwork(
      num_actions, protocol.width, num_heads if optimizer.has_heads else None
    )
    self._observation = jnp.zeros((1, observation_size))
    shapes = jax.eval_shape(self._network.init, jax.random.key(0), self._observation)
    self.num_parameters = sum(
      math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"])
    )
    # Updates read key and rate from their state, so any will do here.
    self._update_fn = optax.with_extra_args_support(
      self._make_optimizer(jax.random.key(0), 1.0)
    ).update
    self.act = jax.jit(self._act)
    self.act_greedily = jax.jit(self._act_greedily)
    self.learn = jax.jit(self._learn, donate_argnums=0)

  def init(
    self, init_key: jax.Array, rates_key: jax.Array, rate: Any, buffer: Replay
  ) -> State:
    """Returns the state that training starts from, arrays of distinct buffers.

    Args:
      init_key: Determines the weights. Networks that differ only in their heads get
        the same body.
      rates_key: Determines Alrao's rates.
      rate: Learning rate, where the optimizer takes one.
      buffer: The replay buffer, with at least one transition.
    """
    params = self._network.init(init_key, self._observation)["params"]
    opt_state = self._make_optimizer(rates_key, rate).init(params)
    target = Policy(params, self._log_weights(opt_state))
    state = State(params, target, opt_state, jnp.int32(0), buffer)
    # A buffer can be donated only once, and the target is the network.
    return jax.device_put(jax.tree.map(np.array, state))

  def policy(self, state: State) -> Policy:
    """Returns what the values of actions depend on now.

    Args:
      state: The state.
    """
    return Policy(state.params, self._log_weights(state.opt_state))

  def _act(self, params, opt_state, observations, exploration, key) -> jax.Array:
    """Greedy actions, and random ones with probability `exploration`."""
    policy = Policy(params, self._log_weights(opt_state))
    greedy = self._act_greedily(policy, observations)
    whether_key, which_key = jax.random.split(jax.random.wrap_key_data(key))
    explores = jax.random.uniform(whether_key, greedy.shape) < exploration
    random = jax.random.randint(which_key, greedy.shape, 0, self._network.num_actions)
    return jnp.where(explores, random, greedy)

  def _act_greedily(self, policy: Policy, observations) -> jax.Array:
    return self._values(policy, observations).argmax(axis=-1).astype(jnp.int32)

  def _learn(self, state: State, transitions: Transitions, key):
    """Adds a step of all environments to the buffer, and does the updates due."""
    buffer = replay.add(state.replay, transitions)
    num_updates = len(transitions.actions) // self._protocol.steps_per_update
    keys = jax.random.split(jax.random.wrap_key_data(key), num_updates)
    trained, outputs = jax.lax.scan(
      lambda trained, key: self._update_once(trained, buffer, key), state[:-1], keys
    )
    return State(*trained, buffer), outputs

  def _update_once(self, trained, buffer: Replay, key):
    params, old_target, opt_state, num_updates = trained
    protocol, log_weights = self._protocol, self._log_weights(opt_state)
    batch = replay.sample(buffer, key, protocol.batch_size)
    wanted = q_learning.targets(
      protocol.reward_scale * batch.rewards,
      batch.terminated,
      self._values(old_target, batch.next_observations),
      protocol.discount,
    )

    def loss_fn(params):
      outputs = self._network.apply({"params": params}, batch.observations)
      return q_learning.loss(
        outputs, batch.actions, wanted, log_weights, self._noise_scale
      )

    (loss, extra), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = self._update_fn(grads, opt_state, params, **extra)
    params = optax.apply_updates(params, updates)
    num_updates += 1
    policy = Policy(params, self._log_weights(opt_state))
    target: Any = optax.periodic_update(
      policy, old_target, num_updates, protocol.target_period
    )
    outputs = {"loss": loss, "head_weights": jnp.exp(log_weights)}
    return (params, target, opt_state, num_updates), outputs

  def _values(self, policy: Policy, observations) -> jax.Array:
    return q_learning.values(self._network, *policy, observations)

  def _log_weights(self, opt_state: optax.OptState) -> jax.Array:
    if self._optimizer.has_heads:
      return alrao_jax.log_weights(opt_state)
    return jnp.zeros(0)

  def _make_optimizer(self, key: jax.Array, rate: Any):
    num_updates = self._protocol.num_steps // self._protocol.steps_per_update
    return self._optimizer.make(Setting(key, rate, num_updates, has_batch_norm=False))
