"""Every optimizer of the benchmarks steps, and keeps key and rate in its state."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.methods import (
  METHODS,
  PEERS,
  MethodName,
  Setting,
  with_polynomial_averaging,
)


@pytest.fixture(autouse=True)
def _standard_promotion():
  # Other libraries' optimizers are not written for strict promotion.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def make(name, seed=0, rate=0.1):
  optimizer = METHODS[name]
  setting = Setting(jax.random.key(seed), rate, num_steps=10, has_batch_norm=True)
  return optax.with_extra_args_support(optimizer.make(setting))


def steps(name, make_state, num_steps=2):
  """Descends a quadratic with the update of one instance and the state of another."""
  optimizer = make(name)
  kernel = jnp.ones((3, 4))
  params = {"body": {"kernel": kernel}, "output": {"kernel": kernel}}
  extra = {}
  if METHODS[name].has_heads:
    params["output"] = {"alrao_heads": {"kernel": jnp.ones((2, 3, 4))}}
    extra = {"head_log_likelihoods": jnp.array([-1.0, -2.0])}
  state = jax.tree.map(np.array, make_state.init(params))

  def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(params, state, params, **extra)
    params = optax.apply_updates(params, updates)
    return (params, state), params["body"]["kernel"]

  # A scan insists that all dtypes stay what they are.
  (params, state), kernels = jax.jit(
    lambda carry: jax.lax.scan(step, carry, length=num_steps)
  )((params, state))
  return kernels, params, state


def test_names_are_those_of_the_command_line():
  assert tuple(METHODS) == typing.get_args(MethodName)
  assert set(PEERS) <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_optimizer_takes_two_steps_downhill(name):
  (first, second), params, state = steps(name, make(name))
  assert (first <= 1).all()  # later steps may come from beyond the minimum
  assert np.isfinite(second).all()
  assert (second != 1).any()
  average = METHODS[name].averaged_params
  if average is not None:
    assert jax.tree.structure(average(state, params)) == jax.tree.structure(params)


def test_rate_and_key_are_in_the_state():
  slow, fast = (steps("sgd", make("sgd", rate=rate))[0][-1] for rate in (0.1, 0.5))
  np.testing.assert_allclose(slow, 0.9**2, rtol=1e-6)
  np.testing.assert_allclose(fast, 0.5**2, rtol=1e-6)
  one, other = (steps("alrao", make("alrao", seed=seed))[0][-1] for seed in (0, 1))
  assert not np.array_equal(one, other)


def test_polynomial_averaging_equals_the_weighted_mean():
  # With gamma 1, the weight of step t is proportional to t: (1 - 2 / (t + 1)) ...
  averaging = with_polynomial_averaging(optax.sgd(1.0), gamma=1.0)
  params = jnp.zeros(2)
  state = averaging.init(params)
  seen = []
  for step in range(1, 5):
    updates, state = averaging.update(jnp.full(2, float(step)), state, params)
    params = optax.apply_updates(params, updates)
    seen.append(np.asarray(params))
  expected = np.average(seen, axis=0, weights=[1, 2, 3, 4])
  np.testing.assert_allclose(state.average, expected, rtol=1e-6)
