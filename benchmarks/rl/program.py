"""Deep Q-learning, as a program for `benchmarks.engine`."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.loops import REFRESH_SECONDS
from benchmarks.optimizers import Optimizer
from benchmarks.rl import replay
from benchmarks.rl.environments import Environments, Episodes, Protocol
from benchmarks.rl.learner import Learner, Policy, State
from benchmarks.rl.replay import Replay

PyTree = Any

# Of the first episode of each part; training draws its seeds from [0, 2 ** 32).
FIRST_SEED = {"validation": 1_000_000, "test": 3_000_000}


class Epoch(NamedTuple):
  """What is random or scheduled in an epoch of n steps of all environments.

  Attributes:
    env_seeds: Seeds of the environments, one for each.
    exploration: Share of random actions at each step, (n,), float32.
    keys: Data of random keys, for the actions and the updates, (n, 2, ...).
  """

  env_seeds: list[int]
  exploration: np.ndarray
  keys: np.ndarray


class DQNProgram:
  """Trains a Q-network with one optimizer; a `benchmarks.engine.Program`.

  A step of the engine is an update, an example is a step of an environment. Each epoch
  starts new episodes, so that the replay buffer is all that a checkpoint needs of the
  past.
  """

  examples = "steps"
  data = ()

  def __init__(
    self,
    protocol: Protocol,
    optimizer: Optimizer,
    *,
    num_heads: int,
    noise_scale: float,
    max_epochs: int,
    num_validation: int,
    num_test: int,
  ):
    """Makes the program; nothing is compiled yet.

    Args:
      protocol: How to treat which environment. Its number of steps is a multiple of
        that of environments times epochs.
      optimizer: The optimizer.
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
    self.survives_divergence = optimizer.has_heads
    self._num_episodes = {"validation": num_validation, "test": num_test}
    self._environments = Environments(protocol.env_id, protocol.num_envs)
    self._episodes = Episodes(protocol.env_id)
    self._learner = Learner(
      protocol,
      optimizer,
      observation_size=self._environments.observation_size,
      num_actions=self._environments.num_actions,
      num_heads=num_heads,
      noise_scale=noise_scale,
    )
    self.num_parameters = self._learner.num_parameters

  def init(self, seed: int, rate: Any) -> State:
    """Returns the state that training starts from, with some random steps to replay.

    Args:
      seed: Determines weights, episodes, random actions and Alrao's rates. Networks
        that differ only in their heads get the same body.
      rate: Learning rate, where the optimizer takes one.
    """
    init_key, rates_key, _ = _keys(seed)
    return self._learner.init(init_key, rates_key, rate, self._warm_up(seed))

  def batches(self, seed: int, epoch: int) -> Epoch:
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
    return Epoch(
      np.random.SeedSequence([seed, epoch]).generate_state(protocol.num_envs).tolist(),
      exploration.astype(np.float32),
      np.asarray(jax.random.key_data(keys)),
    )

  def step(
    self,
    state: State,
    data: PyTree,
    batches: Epoch,
    on_progress: Callable[[int, PyTree], None] | None = None,
  ) -> tuple[State, dict[str, np.ndarray]]:
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
      if on_progress is not None and time.perf_counter() - last > REFRESH_SECONDS:
        newest = jax.tree.map(lambda x: x[-1], jax.device_get(outputs))
        on_progress(len(collected) * self._updates, newest)
        last = time.perf_counter()
    collected = jax.device_get(collected)
    return state, jax.tree.map(lambda *xs: np.concatenate(xs), *collected)

  def snapshot(self, state: State, seed: int, epoch: int) -> Policy:
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
    buffer = replay.empty(capacity, self._environments.observation_size)
    return replay.add(buffer, transitions)


def _keys(seed: int) -> jax.Array:
  """Keys for the initial weights, Alrao's rates, and what follows."""
  return jax.random.split(jax.random.key(seed), 3)
