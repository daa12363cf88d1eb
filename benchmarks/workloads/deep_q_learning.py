"""Deep Q-learning: a replay buffer, the values of actions, and training on them."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import alrao_jax
from alrao_jax.linen import MultiHead
from benchmarks import training
from benchmarks.methods import Method, Setting
from benchmarks.training import Workload, num_entries
from benchmarks.workloads.environments import (
  Environments,
  Episodes,
  Protocol,
  Transitions,
)

PyTree = Any

# Of the first episode of each part; training draws its seeds from [0, 2 ** 32).
FIRST_SEED = {"validation": 1_000_000, "test": 3_000_000}


class Replay(NamedTuple):
  """The newest transitions.

  Attributes:
    ring: As many as it can hold; the first `num_added` of them until it is full.
    num_added: Number of transitions added so far, int32.
  """

  ring: Transitions
  num_added: jax.Array


def empty_replay(capacity: int, observation_size: int) -> Replay:
  """Returns a buffer without transitions.

  Args:
    capacity: Number of transitions that it can hold.
    observation_size: Number of entries of an observation.

  Example:
    >>> empty_replay(100, 3).ring.observations.shape
    (100, 3)
  """
  ring = Transitions(
    observations=jnp.zeros((capacity, observation_size)),
    actions=jnp.zeros(capacity, jnp.int32),
    rewards=jnp.zeros(capacity),
    next_observations=jnp.zeros((capacity, observation_size)),
    terminated=jnp.zeros(capacity, bool),
  )
  return Replay(ring, jnp.zeros([], jnp.int32))


def add_transitions(replay: Replay, transitions: Transitions) -> Replay:
  """Returns the buffer with more transitions, in place of the oldest once it is full.

  Args:
    replay: The buffer.
    transitions: At most as many as it can hold.
  """
  capacity, num_new = len(replay.ring.actions), len(transitions.actions)
  places = (replay.num_added + jnp.arange(num_new, dtype=jnp.int32)) % capacity
  ring = jax.tree.map(
    lambda old, new: old.at[places].set(new), replay.ring, transitions
  )
  return Replay(ring, replay.num_added + num_new)


def sample_transitions(replay: Replay, key: jax.Array, batch_size: int) -> Transitions:
  """Returns transitions drawn uniformly, with replacement.

  Args:
    replay: A buffer that holds at least one.
    key: Random key.
    batch_size: Number of transitions to draw.
  """
  held = jnp.minimum(replay.num_added, len(replay.ring.actions))
  drawn = jax.random.randint(key, (batch_size,), 0, held)
  return jax.tree.map(lambda entries: entries[drawn], replay.ring)


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


def action_values(
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


def q_targets(
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
    >>> q_targets(jnp.ones(2), jnp.array([False, True]), next_values, 0.5).tolist()
    [2.0, 1.0]

  Reference:
    Mnih et al., *Playing Atari with deep reinforcement learning*, arXiv 1312.5602,
    Algorithm 1.
  """
  best = next_values.max(axis=-1)
  return rewards + jnp.where(terminated, 0.0, discount * best)


def q_loss(
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

  if not isinstance(outputs, alrao_jax.HeadOutputs):
    log_probs = jax.scipy.stats.norm.logpdf(targets, taken(outputs), noise_scale)
    return -log_probs.mean(), {}
  value, info = alrao_jax.regression_loss(
    outputs.map(taken), targets, log_weights, noise_scale=noise_scale
  )
  return value, {"head_log_likelihoods": info.head_log_likelihoods}


class Policy(NamedTuple):
  """All that the values of actions depend on.

  Attributes:
    params: Parameters of the network.
    log_weights: Alrao's posterior that belongs to them, (num_heads,), else (0,).
  """

  params: PyTree
  log_weights: jax.Array


class QState(NamedTuple):
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


class QLearner:
  """A Q-network, its optimizer, and the functions that use them.

  Attributes:
    num_parameters: Of the network.
  """

  def __init__(
    self,
    protocol: Protocol,
    method: Method,
    *,
    observation_size: int,
    num_actions: int,
    num_heads: int,
    noise_scale: float,
  ):
    """Makes the learner; nothing is compiled yet.

    Args:
      protocol: How to learn.
      method: The optimizer.
      observation_size: Number of entries of an observation.
      num_actions: Number of actions.
      num_heads: Number of heads, if the optimizer needs them.
      noise_scale: Standard deviation of each head's Gaussian, in the unit of scaled
        rewards.
    """
    self._protocol, self._method = protocol, method
    self._noise_scale = noise_scale
    self._network = QNetwork(
      num_actions, protocol.width, num_heads if method.has_heads else None
    )
    self._observation = jnp.zeros((1, observation_size))
    shapes = jax.eval_shape(self._network.init, jax.random.key(0), self._observation)
    self.num_parameters = num_entries(shapes["params"])
    # Updates read key and rate from their state, so any will do here.
    self._update_fn = optax.with_extra_args_support(
      self._make_optimizer(jax.random.key(0), 1.0)
    ).update
    self.act = jax.jit(self._act)
    self.act_greedily = jax.jit(self._act_greedily)
    self.learn = jax.jit(self._learn, donate_argnums=0)

  def init(
    self, init_key: jax.Array, rates_key: jax.Array, rate: Any, buffer: Replay
  ) -> QState:
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
    state = QState(params, target, opt_state, jnp.int32(0), buffer)
    # A buffer can be donated only once, and the target is the network.
    return jax.device_put(jax.tree.map(np.array, state))

  def policy(self, state: QState) -> Policy:
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

  def _learn(self, state: QState, transitions: Transitions, key):
    """Adds a step of all environments to the buffer, and does the updates due."""
    buffer = add_transitions(state.replay, transitions)
    num_updates = len(transitions.actions) // self._protocol.steps_per_update
    keys = jax.random.split(jax.random.wrap_key_data(key), num_updates)
    trained, outputs = jax.lax.scan(
      lambda trained, key: self._update_once(trained, buffer, key), state[:-1], keys
    )
    return QState(*trained, buffer), outputs

  def _update_once(self, trained, buffer: Replay, key):
    params, old_target, opt_state, num_updates = trained
    protocol, log_weights = self._protocol, self._log_weights(opt_state)
    batch = sample_transitions(buffer, key, protocol.batch_size)
    wanted = q_targets(
      protocol.reward_scale * batch.rewards,
      batch.terminated,
      self._values(old_target, batch.next_observations),
      protocol.discount,
    )

    def loss_fn(params):
      outputs = self._network.apply({"params": params}, batch.observations)
      return q_loss(outputs, batch.actions, wanted, log_weights, self._noise_scale)

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
    return action_values(self._network, *policy, observations)

  def _log_weights(self, opt_state: optax.OptState) -> jax.Array:
    return self._method.log_weights(opt_state)

  def _make_optimizer(self, key: jax.Array, rate: Any):
    num_updates = self._protocol.num_steps // self._protocol.steps_per_update
    return self._method.make(Setting(key, rate, num_updates, has_batch_norm=False))


class QEpoch(NamedTuple):
  """What is random or scheduled in an epoch of n steps of all environments.

  Attributes:
    env_seeds: Seeds of the environments, one for each.
    exploration: Share of random actions at each step, (n,), float32.
    keys: Data of random keys, for the actions and the updates, (n, 2, ...).
  """

  env_seeds: list[int]
  exploration: np.ndarray
  keys: np.ndarray


class QWorkload(Workload):
  """Trains a Q-network with one method.

  A step is an update, an example is a step of an environment. Each epoch
  starts new episodes, so that the replay buffer is all that a checkpoint needs of the
  past.
  """

  examples = "steps"
  data = ()

  def __init__(
    self,
    protocol: Protocol,
    method: Method,
    *,
    num_heads: int,
    noise_scale: float,
    max_epochs: int,
    num_validation: int,
    num_test: int,
  ):
    """Makes the workload; nothing is compiled yet.

    Args:
      protocol: How to treat which environment. Its number of steps is a multiple of
        that of environments times epochs.
      method: The optimizer.
      num_heads: Number of heads, if the optimizer needs them.
      noise_scale: Standard deviation of each head's Gaussian, in units of scaled
        returns.
      max_epochs: Number of epochs into which the steps are divided.
      num_validation: Number of episodes that validate.
      num_test: Number of episodes that test.

    Raises:
      MissingEnvironmentError: The environment is not installed.
    """
    self._protocol = protocol
    self.examples_per_epoch = protocol.num_steps // max_epochs
    self.steps_per_epoch = self.examples_per_epoch // protocol.steps_per_update
    self._updates = protocol.num_envs // protocol.steps_per_update
    self.survives_divergence = method.has_heads
    self._num_episodes = {"validation": num_validation, "test": num_test}
    self._environments = Environments(protocol.env_id, protocol.num_envs)
    self._episodes = Episodes(protocol.env_id)
    self._learner = QLearner(
      protocol,
      method,
      observation_size=self._environments.observation_size,
      num_actions=self._environments.num_actions,
      num_heads=num_heads,
      noise_scale=noise_scale,
    )
    self.num_parameters = self._learner.num_parameters

  def init(self, seed: int, rate: Any) -> QState:
    """Returns the state that training starts from, with some random steps to replay.

    Args:
      seed: Determines weights, episodes, random actions and Alrao's rates. Networks
        that differ only in their heads get the same body.
      rate: Learning rate, where the optimizer takes one.
    """
    init_key, rates_key, _ = _keys(seed)
    return self._learner.init(init_key, rates_key, rate, self._warm_up(seed))

  def batches(self, seed: int, epoch: int) -> QEpoch:
    """Returns what is random or scheduled in an epoch.

    Args:
      seed: Seed of the run.
      epoch: Number of the epoch; 0 for the steps before training.
    """
    protocol = self._protocol
    done = (epoch - 1) * self.examples_per_epoch
    steps = np.arange(done, done + self.examples_per_epoch, protocol.num_envs)
    exploration = np.interp(
      steps,
      [0, protocol.exploration_fraction * protocol.num_steps],
      [1.0, protocol.final_exploration],
    )
    keys = jax.random.split(jax.random.fold_in(_keys(seed)[2], epoch), (len(steps), 2))
    return QEpoch(
      np.random.SeedSequence([seed, epoch]).generate_state(protocol.num_envs).tolist(),
      exploration.astype(np.float32),
      np.asarray(jax.random.key_data(keys)),
    )

  def step(
    self,
    state: QState,
    data: PyTree,
    batches: QEpoch,
    on_progress: Callable[[int, PyTree], None] | None = None,
  ) -> tuple[QState, dict[str, np.ndarray]]:
    """Steps and learns for an epoch.

    Args:
      state: Not to be used afterwards.
      data: Nothing.
      batches: The epoch.
      on_progress: Called now and then with the number of updates done and the outputs
        of the last.

    Returns:
      The next state, and ``loss`` and ``head_weights`` of each update.
    """
    del data
    observations = self._environments.reset(batches.env_seeds)
    collected, last = [], time.perf_counter()
    for exploration, keys in zip(batches.exploration, batches.keys, strict=True):
      actions = self._learner.act(
        state.params, state.opt_state, observations, exploration, keys[0]
      )
      transitions, observations = self._environments.step(
        observations, np.asarray(actions)
      )
      state, outputs = self._learner.learn(state, transitions, keys[1])
      collected.append(outputs)
      if (
        on_progress is not None
        and time.perf_counter() - last > training.REFRESH_SECONDS
      ):
        newest = jax.tree.map(lambda x: x[-1], jax.device_get(outputs))
        on_progress(len(collected) * self._updates, newest)
        last = time.perf_counter()
    collected = jax.device_get(collected)
    return state, jax.tree.map(lambda *xs: np.concatenate(xs), *collected)

  def snapshot(self, state: QState, seed: int, epoch: int) -> Policy:
    """Returns what the values of actions depend on.

    Args:
      state: The state after `epoch`.
      seed: Seed of the run.
      epoch: Number of the epoch; 0 before training.
    """
    del seed, epoch
    return self._learner.policy(state)

  def evaluate(self, snapshot: Policy, part: str) -> dict[str, float]:
    """Returns the mean ``return`` of greedy episodes, and as ``loss`` its negative.

    Args:
      snapshot: What is greedy.
      part: ``"validation"`` or ``"test"``, whose episodes are always the same.
    """
    policy = jax.device_put(snapshot)
    first = FIRST_SEED[part]
    returns = self._episodes.play(
      lambda observations: np.asarray(self._learner.act_greedily(policy, observations)),
      range(first, first + self._num_episodes[part]),
    )
    return {"loss": float(-returns.mean()), "return": float(returns.mean())}

  def _warm_up(self, seed: int) -> Replay:
    """A replay buffer with steps of random actions."""
    protocol, epoch = self._protocol, self.batches(seed, 0)
    # There are never more transitions than a run has.
    capacity = min(protocol.capacity, protocol.warm_up + protocol.num_steps)
    random = np.random.default_rng(epoch.env_seeds)
    observations = self._environments.reset(epoch.env_seeds)
    collected = []
    for _ in range(protocol.warm_up // protocol.num_envs):
      actions = random.integers(self._environments.num_actions, size=protocol.num_envs)
      transitions, observations = self._environments.step(
        observations, actions.astype(np.int32)
      )
      collected.append(transitions)
    transitions = jax.tree.map(lambda *xs: np.concatenate(xs), *collected)
    buffer = empty_replay(capacity, self._environments.observation_size)
    return add_transitions(buffer, transitions)


def _keys(seed: int) -> jax.Array:
  """Keys for the initial weights, Alrao's rates, and what follows."""
  return jax.random.split(jax.random.key(seed), 3)
