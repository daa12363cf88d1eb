"""Deep Q-learning: buffer, targets, environments, and whole runs at tiny size."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import quiet, without_times

import alrao_jax
from benchmarks import records, training
from benchmarks.console import OptionError
from benchmarks.methods import METHODS
from benchmarks.suites.q_learning import QLearning, QOptions
from benchmarks.workloads import deep_q_learning, environments
from benchmarks.workloads.deep_q_learning import Policy, QWorkload
from benchmarks.workloads.environments import (
  PROTOCOLS,
  TORQUES,
  Environments,
  Episodes,
  MissingEnvironmentError,
  Transitions,
)


def _installed(env_id: str) -> bool:
  try:
    environments.make(env_id).close()
  except MissingEnvironmentError:
    return False
  return True


needs_gymnasium = pytest.mark.skipif(
  not _installed("Pendulum-v1"), reason="gymnasium is not installed"
)
needs_box2d = pytest.mark.skipif(
  not _installed("LunarLander-v3"), reason="gymnasium's Box2D is not installed"
)


@pytest.fixture(autouse=True)
def _standard_promotion():
  # Other libraries' optimizers are not written for strict promotion.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


# --- Replay buffer


def make_transitions(random, count) -> Transitions:
  return Transitions(
    random.normal(size=(count, 2)).astype(np.float32),
    random.integers(5, size=count).astype(np.int32),
    random.normal(size=count).astype(np.float32),
    random.normal(size=(count, 2)).astype(np.float32),
    random.random(count) < 0.5,
  )


def test_replay_holds_the_newest_transitions():
  random, kept = np.random.default_rng(0), []
  buffer = deep_q_learning.empty_replay(7, 2)
  for count in (4, 3, 3, 4, 3, 3):  # wraps at the end of one, and within others
    transitions = make_transitions(random, count)
    buffer = deep_q_learning.add_transitions(buffer, transitions)
    for i in range(count):
      kept.append(jax.tree.map(lambda x, i=i: x[i], transitions))
    kept = kept[-7:]
    held = min(7, int(buffer.num_added))
    ring = jax.tree.map(lambda x, held=held: np.asarray(x)[:held], buffer.ring)
    expected = jax.tree.map(lambda *xs: np.stack(xs), *kept)
    # The slow one is in order of age, the ring is not.
    order, expected_order = np.argsort(ring.rewards), np.argsort(expected.rewards)
    for found, wanted in zip(ring, expected, strict=True):
      np.testing.assert_array_equal(found[order], wanted[expected_order])


def test_replay_samples_all_that_is_held_and_nothing_else():
  buffer = deep_q_learning.empty_replay(100, 2)
  transitions = make_transitions(np.random.default_rng(0), 4)
  buffer = deep_q_learning.add_transitions(buffer, transitions)
  drawn = deep_q_learning.sample_transitions(buffer, jax.random.key(0), 1000)
  rows = {float(reward): i for i, reward in enumerate(transitions.rewards)}
  places = np.array([rows[float(reward)] for reward in drawn.rewards])
  for found, wanted in zip(drawn, transitions, strict=True):
    np.testing.assert_array_equal(found, wanted[places])
  # Each count is binomial, of mean 250 and standard deviation 13.7.
  assert np.all(np.abs(np.bincount(places, minlength=4) - 250) < 5 * 13.7)


# --- Targets and loss


def test_targets_by_hand():
  next_values = jnp.array([[1.0, 3.0], [-2.0, -5.0], [4.0, 0.0]])
  terminated = jnp.array([False, False, True])
  found = deep_q_learning.q_targets(
    jnp.array([1.0, 2.0, 3.0]), terminated, next_values, 0.5
  )
  np.testing.assert_array_equal(found, [1 + 0.5 * 3, 2 + 0.5 * -2, 3])


def test_plain_loss_has_the_gradient_of_scaled_squared_errors():
  values = jnp.array([[1.0, 2.0], [3.0, 4.0]])
  actions, targets = jnp.array([1, 0]), jnp.array([1.5, 5.0])

  def loss(values):
    return deep_q_learning.q_loss(values, actions, targets, jnp.zeros(0), 0.5)[0]

  expected = np.array([[0, 2.0 - 1.5], [3.0 - 5.0, 0]]) / 0.5**2 / 2
  np.testing.assert_allclose(jax.grad(loss)(values), expected, rtol=1e-6)


def test_one_head_has_the_loss_of_the_plain_network():
  random = np.random.default_rng(0)
  values = jnp.array(random.normal(size=(6, 3)), jnp.float32)
  actions = jnp.array(random.integers(3, size=6))
  targets = jnp.array(random.normal(size=6), jnp.float32)
  plain, _ = deep_q_learning.q_loss(values, actions, targets, jnp.zeros(0), 0.3)
  heads = alrao_jax.HeadOutputs(values[None], values[None])
  mixture, extra = deep_q_learning.q_loss(heads, actions, targets, jnp.zeros(1), 0.3)
  # Both sum a few float32 numbers of order 10.
  np.testing.assert_allclose(mixture, plain, rtol=1e-5)
  np.testing.assert_allclose(extra["head_log_likelihoods"], [-plain], rtol=1e-5)


def test_values_ignore_a_head_that_holds_only_what_the_prior_gives():
  network = deep_q_learning.QNetwork(num_actions=2, width=4, num_heads=3)
  observations = jnp.ones((1, 2))
  params = network.init(jax.random.key(0), observations)["params"]
  heads = params["output"]["alrao_heads"]
  kernel, bias = jnp.zeros_like(heads["kernel"]), heads["bias"]
  bias = bias.at[:].set(jnp.array([[1.0, 2.0], [3.0, 6.0], [1e20, -1e20]]))
  params["output"]["alrao_heads"] = {"kernel": kernel, "bias": bias}
  log_weights = jnp.log(jnp.array([0.4, 0.5999, 1e-4]))
  found = deep_q_learning.action_values(network, params, log_weights, observations)
  expected = (0.4 * np.array([1, 2]) + 0.5999 * np.array([3, 6])) / 0.9999
  np.testing.assert_allclose(found[0], expected, rtol=1e-5)


# --- Environments


@needs_gymnasium
def test_pendulum_actions_are_torques():
  from gymnasium import make

  assert TORQUES[0] == -2 and TORQUES[-1] == 2
  np.testing.assert_allclose(np.diff(TORQUES), 0.4, rtol=1e-6)
  discrete, continuous = environments.make("Pendulum-v1"), make("Pendulum-v1")
  for action, torque in enumerate(TORQUES):
    discrete.reset(seed=1)
    continuous.reset(seed=1)
    observation, reward, *_ = discrete.step(action)
    expected, expected_reward, *_ = continuous.step(np.array([torque]))
    np.testing.assert_array_equal(observation, expected)
    assert reward == expected_reward


@needs_gymnasium
def test_time_limit_is_no_termination_and_keeps_the_last_observation():
  pendulums = Environments("Pendulum-v1", 2)
  single = environments.make("Pendulum-v1")
  observations, (expected, _) = pendulums.reset([3, 4]), single.reset(seed=3)
  for _ in range(200):
    np.testing.assert_array_equal(observations[0], expected)
    expected, _, terminated, truncated, _ = single.step(4)
    transitions, observations = pendulums.step(observations, np.array([4, 0]))
    np.testing.assert_array_equal(transitions.next_observations[0], expected)
    assert not transitions.terminated.any()
  assert truncated and not terminated
  # The next episode has begun, and is not what the last step led to.
  assert not np.array_equal(observations[0], expected)


@needs_box2d
def test_crash_is_a_termination():
  landers = Environments("LunarLander-v3", 2)
  observations = landers.reset([0, 1])
  for _ in range(200):  # no engine: it falls within about a hundred steps
    transitions, observations = landers.step(observations, np.array([0, 0]))
    if transitions.terminated.any():
      break
  assert transitions.terminated.any()
  # The crash's reward came with the step that ended it.
  assert transitions.rewards[transitions.terminated].max() == -100


@needs_gymnasium
def test_episodes_do_not_depend_on_each_other():
  def policy(observations):
    return (10 * (observations[:, 2] > 0)).astype(int)

  together = Episodes("Pendulum-v1").play(policy, [5, 6, 7])
  alone = [Episodes("Pendulum-v1").play(policy, [seed])[0] for seed in (5, 6, 7)]
  np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("module", ["gymnasium", "Box2D"])
def test_missing_environment_says_what_to_install(module, monkeypatch):
  if module == "Box2D":
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d.lunar_lander", raising=False)
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d", raising=False)
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(MissingEnvironmentError, match=r"pip install .*gymnasium\[box2d"):
    QLearning().plan(QOptions(environment="lunar_lander"), "out")


# --- Training


TINY = PROTOCOLS["pendulum"]._replace(
  num_steps=48,
  num_envs=2,
  warm_up=16,
  capacity=40,
  batch_size=4,
  steps_per_update=1,
  target_period=3,
  width=8,
)


def make_workload(optimizer="sgd", **changes) -> QWorkload:
  return QWorkload(
    TINY._replace(**changes),
    METHODS[optimizer],
    num_heads=3,
    noise_scale=1.0,
    max_epochs=3,
    num_validation=1,
    num_test=2,
  )


def to_numpy(tree):
  return jax.tree.map(np.array, tree)


@pytest.mark.slow
@needs_gymnasium
def test_target_is_a_frozen_copy_of_parameters_and_log_weights():
  workload = make_workload("alrao", num_envs=1, num_steps=30)
  state = workload.init(0, None)
  frozen = to_numpy(state.target)
  epoch = workload.batches(0, 1)
  for i in range(7):
    one = epoch._replace(
      exploration=epoch.exploration[i : i + 1], keys=epoch.keys[i : i + 1]
    )
    state, _ = workload.step(state, (), one)
    now = to_numpy(workload.snapshot(state, 0, 1))
    assert isinstance(now, Policy)
    if (i + 1) % 3 == 0:
      frozen = now
    else:
      assert not np.array_equal(now.log_weights, frozen.log_weights)
    jax.tree.map(np.testing.assert_array_equal, to_numpy(state.target), frozen)


@needs_gymnasium
def test_exploration_falls_linearly_and_then_stays():
  workload = make_workload(exploration_fraction=0.5, final_exploration=0.2)
  shares = np.concatenate([workload.batches(0, i).exploration for i in (1, 2, 3)])
  # 24 steps of both environments; the twelfth is half of the run.
  expected = np.r_[1 - 0.8 * np.arange(12) / 12, np.full(12, 0.2)]
  np.testing.assert_allclose(shares, expected, rtol=1e-6)


@needs_gymnasium
def test_epochs_of_a_run_differ_and_seeds_do():
  workload = make_workload()
  seeds = [tuple(workload.batches(*of).env_seeds) for of in [(0, 1), (0, 2), (1, 1)]]
  keys = [workload.batches(*of).keys.tobytes() for of in [(0, 1), (0, 2), (1, 1)]]
  assert len(set(seeds)) == len(set(keys)) == 3


class Killed(Exception):
  pass


@pytest.mark.slow
@needs_gymnasium
def test_killed_run_ends_as_if_it_had_not_been(tmp_path):
  workload = make_workload()
  options = dict(config={"seed": 0}, seed=0, rate=1e-3, max_epochs=3, patience=3)
  whole = training.Plan(name="whole", out=tmp_path, **options)
  killed = dataclasses.replace(whole, name="killed")
  training.train(workload, whole, quiet())

  step, calls = workload.step, []

  def dying_step(*args):
    calls.append(args)
    if len(calls) == 3:
      raise Killed
    return step(*args)

  workload.step = dying_step
  with pytest.raises(Killed):
    training.train(workload, killed, quiet())
  workload.step = step
  training.train(workload, killed, quiet())
  expected, found = (
    [{**record, "name": ""} for record in without_times(records.read(plan.path))]
    for plan in (whole, killed)
  )
  assert found == expected
  assert len(found) == 4
  assert found[-1]["test_return"] == -found[-1]["test_loss"]


@needs_gymnasium
def test_options_are_refused_in_words_and_recorded(tmp_path):
  suite = QLearning()
  for options, word in [
    ({"optimizer": "sgd"}, "--rate"),
    ({"rate": 0.1}, "--rate"),
    ({"num_steps": 1000}, "--num-steps must be a multiple of 160"),
    ({"max_epochs": 7}, "--num-steps must be a multiple of 56"),
    ({"noise_scale": 0.0}, "--noise-scale"),
    ({"num_test": 0}, "--num-test"),
  ]:
    with pytest.raises(OptionError, match=word):
      suite.plan(QOptions(**options), tmp_path)
  plan = suite.plan(QOptions(num_steps=3200), tmp_path)
  assert plan.config["suite"] == "q_learning"
  assert plan.config["num_steps"] == 3200
  assert plan.config["discount"] == 0.98
  other = suite.plan(QOptions(num_steps=6400), tmp_path)
  assert other.name != plan.name
