"""The environments of the Q-learning benchmark, and the protocol for each."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.data import DataError

TORQUES = np.linspace(-2.0, 2.0, 11, dtype=np.float32)

INSTALL = 'pip install "gymnasium[box2d]" (if its wheel must be built: also swig)'


class MissingEnvironmentError(DataError):
  """An environment that is not installed; the text says what to install."""


class Transitions(NamedTuple):
  """Steps of environments, numpy arrays or on the device, one entry each on axis 0.

  Attributes:
    observations: Before the step, (n, observation_size), float32.
    actions: Index of the action, (n,), int32.
    rewards: As the environment gives them, (n,), float32.
    next_observations: After the step, (n, observation_size), float32.
    terminated: Whether the step ended the episode for good, (n,), bool. An episode cut
      at its time limit has not terminated: it would have gone on.
  """

  observations: Any
  actions: Any
  rewards: Any
  next_observations: Any
  terminated: Any


class Protocol(NamedTuple):
  """How deep Q-learning treats one environment.

  Attributes:
    env_id: Gymnasium's name.
    num_steps: Number of steps of the environment in a run, all copies together.
    num_envs: Number of copies that step together, each at each step of the vector.
    warm_up: Number of steps with random actions before the first update, in addition.
    discount: Of a reward one step later.
    exploration_fraction: Part of the run over which the share of random actions falls,
      linearly from 1 to `final_exploration`.
    final_exploration: The share from there on.
    capacity: Number of transitions that the replay buffer holds.
    batch_size: Number of transitions in an update.
    steps_per_update: Number of steps for each update; divides `num_envs`.
    target_period: Number of updates after which the target network becomes a copy.
    width: Number of units of each hidden layer.
    reward_scale: What rewards are multiplied by before the network sees them.
    chance: Mean return of random actions, measured over 1,000 episodes.
  """

  env_id: str
  num_steps: int
  num_envs: int
  warm_up: int
  discount: float
  exploration_fraction: float
  final_exploration: float
  capacity: int
  batch_size: int
  steps_per_update: int
  target_period: int
  width: int
  reward_scale: float
  chance: float


# Plain deep Q-learning, without double or duelling networks. What has no source was
# chosen by what Adam and SGD made of it. In both environments rewards count in tens:
# Adam then ends with temporal differences of about .2 and .3 (root mean square), so
# that the default noise scale, 1, is of their order.
PROTOCOLS: dict[str, Protocol] = {
  # Torques, discount and batch as in Hands-on Reinforcement Learning (Zhang, Shen, Yu;
  # hrl.boyuai.com), chapter on improved DQN; width and final exploration are the
  # defaults of Stable-Baselines3, the fraction that of RL Baselines3 Zoo (below).
  "pendulum": Protocol(
    env_id="Pendulum-v1",
    num_steps=40_000,
    num_envs=8,
    warm_up=1_600,
    discount=0.98,
    exploration_fraction=0.2,
    final_exploration=0.05,
    capacity=50_000,
    batch_size=64,
    steps_per_update=1,
    target_period=200,
    width=64,
    reward_scale=0.1,
    chance=-1222.0,
  ),
  # Discount and an update every fourth step as in Mnih et al., Human-level control
  # through deep reinforcement learning (Nature, 2015); exploration over a fifth of the
  # run as in RL Baselines3 Zoo (hyperparams/dqn.yml), then as by default in
  # Stable-Baselines3.
  "lunar_lander": Protocol(
    env_id="LunarLander-v3",
    num_steps=320_000,
    num_envs=8,
    warm_up=1_600,
    discount=0.99,
    exploration_fraction=0.2,
    final_exploration=0.05,
    capacity=200_000,
    batch_size=64,
    steps_per_update=4,
    target_period=250,
    width=128,
    reward_scale=0.1,
    chance=-181.0,
  ),
}


def make(env_id: str) -> Any:
  """Returns one environment, whose actions are the integers from 0.

  A torque becomes the choice of one of `TORQUES`.

  Args:
    env_id: Gymnasium's name.

  Raises:
    MissingEnvironmentError: Gymnasium, or what the environment needs, is missing.
  """
  with warnings.catch_warnings():
    # Box2D's import warns of its own making; as an error that would crash Python.
    warnings.simplefilter("ignore")
    try:
      import gymnasium
    except ImportError as error:
      raise MissingEnvironmentError(
        f"{env_id} needs gymnasium: write {INSTALL}."
      ) from error
    try:
      env = gymnasium.make(env_id, disable_env_checker=True)
    except gymnasium.error.Error as error:
      raise MissingEnvironmentError(
        f"{env_id} is not installed whole ({error}): write {INSTALL}."
      ) from error
  if isinstance(env.action_space, gymnasium.spaces.Discrete):
    return env
  return gymnasium.wrappers.TransformAction(
    env, lambda action: TORQUES[action, None], gymnasium.spaces.Discrete(len(TORQUES))
  )


class Environments:
  """Copies of an environment that step together, episode after episode.

  Attributes:
    observation_size: Number of entries of an observation.
    num_actions: Number of actions.
  """

  def __init__(self, env_id: str, num_envs: int):
    """Makes the copies.

    Args:
      env_id: Gymnasium's name.
      num_envs: Number of copies.

    Raises:
      MissingEnvironmentError: As of `make`.
    """
    first = make(env_id)  # tells what is missing

    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    self.observation_size: int = first.observation_space.shape[0]
    self.num_actions = int(first.action_space.n)
    # An ended episode gives its last observation and the first of the next at once.
    self._envs = SyncVectorEnv(
      [lambda: first, *(lambda: make(env_id) for _ in range(num_envs - 1))],
      autoreset_mode=AutoresetMode.SAME_STEP,
    )

  def reset(self, seeds: Sequence[int]) -> np.ndarray:
    """Starts all episodes anew.

    Args:
      seeds: One for each copy, of this episode and all that follow it.

    Returns:
      Observations, (num_envs, observation_size), float32.
    """
    observations, _ = self._envs.reset(seed=list(seeds))
    return observations

  def step(
    self, observations: np.ndarray, actions: np.ndarray
  ) -> tuple[Transitions, np.ndarray]:
    """Takes a step in each.

    Args:
      observations: Those that the last call returned.
      actions: (num_envs,), integers.

    Returns:
      The transitions, and the observations from which to go on: where an episode has
      ended, the first of the next.
    """
    after, rewards, terminated, truncated, info = self._envs.step(actions)
    reached = after
    if (ended := terminated | truncated).any():
      reached = after.copy()
      reached[ended] = np.stack(info["final_obs"][ended])
    transitions = Transitions(
      observations,
      actions,
      rewards.astype(np.float32),
      reached,
      terminated.copy(),  # the vector writes its next ones there
    )
    return transitions, after


class Episodes:
  """Single episodes, to measure a policy by."""

  def __init__(self, env_id: str):
    """Makes the episodes' environments when they are played.

    Args:
      env_id: Gymnasium's name.
    """
    self._env_id, self._envs = env_id, []

  def play(
    self, policy: Callable[[np.ndarray], np.ndarray], seeds: Sequence[int]
  ) -> np.ndarray:
    """Plays one episode a seed, all at once.

    Args:
      policy: Actions (n,) for observations (n, observation_size).
      seeds: Of the episodes.

    Returns:
      The return of each episode, the sum of its rewards, (n,).
    """
    while len(self._envs) < len(seeds):
      self._envs.append(make(self._env_id))
    observations = np.stack(
      [env.reset(seed=seed)[0] for env, seed in zip(self._envs, seeds, strict=False)]
    )
    returns, playing = np.zeros(len(seeds)), list(range(len(seeds)))
    while playing:
      actions, still = policy(observations), []
      for i in playing:
        observations[i], reward, *ended, _ = self._envs[i].step(actions[i])
        returns[i] += reward
        still += [] if any(ended) else [i]
      playing = still
    return returns
