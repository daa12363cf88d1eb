"""The methods that only studies use: what they vary is read from their state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alrao_jax
from benchmarks import methods
from benchmarks.methods import Setting

KEY = jax.random.key(3)
ONE_HEAD = {
  "body": {"Dense_0": {"kernel": jnp.ones((5, 200)), "bias": jnp.ones(200)}},
  "output": {"kernel": jnp.ones((200, 3)), "bias": jnp.ones(3)},
}
PARAMS = {
  "body": {"Dense_0": {"kernel": jnp.ones((5, 6)), "bias": jnp.ones(6)}},
  "output": {"alrao_heads": {"kernel": jnp.ones((4, 6, 3))}},
}
LOG_LIKELIHOODS = {"head_log_likelihoods": jnp.zeros(4)}


def setting(rate=None):
  return Setting(KEY, rate, num_steps=10, has_batch_norm=True)


def gradients(step):
  keys = jax.random.split(jax.random.key(step), len(jax.tree.leaves(PARAMS)))
  leaves, treedef = jax.tree.flatten(PARAMS)
  drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(treedef, drawn)


def assert_close(actual, expected):
  # A few roundings of float32, of numbers of about 1.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
    actual,
    expected,
  )


def updates_of(optimizer, rate, params, made_with=None, **extra):
  """One update, by a transformation that was made for another rate."""
  state = optimizer.make(setting(rate)).init(params)
  other = optimizer.make(Setting(jax.random.key(0), made_with or rate, 10, True))
  update = optax.with_extra_args_support(other).update
  return update(params, state, params, **extra)[0]


def test_interval_is_read_from_the_state():
  params = {
    "body": ONE_HEAD["body"],
    "output": {"alrao_heads": {"kernel": jnp.ones((4, 200, 3))}},
  }
  extra = {"head_log_likelihoods": jnp.zeros(4)}
  plain = alrao_jax.alrao(KEY, None, 1e-4, 1e-1)
  expected, _ = plain.update(params, plain.init(params), params, **extra)
  actual = updates_of(
    methods.ALRAO_INTERVAL, (1e-4, 1e-1), params, made_with=(1e-9, 1e7), **extra
  )
  for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    # The bounds' logarithms are rounded to float32 once more: 1e-7 of about 10.
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_fraction_of_all_units_is_sgd():
  actual = updates_of(methods.FRACTION, (0.1, 1.0), ONE_HEAD, made_with=(0.1, 0.5))
  expected = jax.tree.map(lambda g: -0.1 * g, ONE_HEAD)
  for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_fraction_freezes_whole_units_and_never_the_output_layer():
  actual = updates_of(methods.FRACTION, (0.1, 0.3), ONE_HEAD, made_with=(0.1, 1.0))
  layer = actual["body"]["Dense_0"]
  learns = layer["bias"] != 0
  np.testing.assert_array_equal(layer["kernel"] != 0, np.broadcast_to(learns, (5, 200)))
  # 200 draws at .3: standard deviation 6.5; five of them.
  assert abs(int(learns.sum()) - 60) < 33
  assert jnp.all(actual["output"]["kernel"] != 0)


def test_unit_momentum_is_a_running_mean_with_each_units_own_share():
  momentum = methods.unit_momentum(KEY, 1e-2, 1.0)
  state = momentum.init(PARAMS)
  shares = alrao_jax.unit_rates(state.shares, PARAMS)
  kernel, bias = (shares["body"]["Dense_0"][name] for name in ("kernel", "bias"))
  np.testing.assert_array_equal(kernel, np.broadcast_to(bias, (5, 6)))
  assert len(np.unique(bias)) == 6 and 0.01 <= bias.min() < bias.max() < 1
  mean = jax.tree.map(jnp.zeros_like, PARAMS)
  for step in range(3):
    grads = gradients(step)
    mean = jax.tree.map(lambda m, s, g: (1 - s) * m + s * g, mean, shares, grads)
    updates, state = momentum.update(grads, state, PARAMS)
    assert_close(updates, mean)


def test_heads_and_units_of_share_one_have_no_momentum():
  momentum = methods.unit_momentum(KEY, 1.0, 1.0)
  state = momentum.init(PARAMS)
  for step in range(2):
    updates, state = momentum.update(gradients(step), state, PARAMS)
    assert_close(updates, gradients(step))
  heads = methods.unit_momentum(KEY, 1e-3, 1e-3)
  updates, _ = heads.update(gradients(0), heads.init(PARAMS), PARAMS)
  assert_close(updates["output"], gradients(0)["output"])
  assert_close(updates["body"], jax.tree.map(lambda g: 1e-3 * g, gradients(0)["body"]))


def test_momentum_and_rates_are_drawn_apart():
  made = methods.with_unit_momentum(1e-5, 10.0).make(setting())
  states = [
    state
    for state in jax.tree.leaves(
      made.init(PARAMS),
      is_leaf=lambda node: isinstance(node, alrao_jax.ScaleByUnitRatesState),
    )
    if isinstance(state, alrao_jax.ScaleByUnitRatesState)
  ]
  one, other = (np.asarray(state.quantiles) for state in states)
  assert np.abs(one - other).min() > 0


def test_mean_rate_is_that_of_the_interval():
  quantiles = jnp.asarray((np.arange(100_000) + 0.5) / 100_000, jnp.float32)
  mean = alrao_jax.log_uniform().quantile(quantiles).mean()
  # Float32's exponentials of up to 14, and its sum in pairs: about 1e-5.
  np.testing.assert_allclose(methods.MEAN_RATE, mean, rtol=1e-4)


def test_units_at_the_mean_rate_leave_the_heads_their_ladder():
  optimizer = methods.UNITS_AT_MEAN_RATE.make(setting())
  rates = alrao_jax.unit_rates(optimizer.init(PARAMS), PARAMS)
  np.testing.assert_allclose(rates["body"]["Dense_0"]["bias"], methods.MEAN_RATE, 1e-6)
  ladder = rates["output"]["alrao_heads"]["kernel"][:, 0, 0]
  np.testing.assert_allclose(ladder, [1e-5, 1e-3, 1e-1, 10.0], rtol=1e-5)


def test_redrawn_rates_differ_from_step_to_step():
  optimizer = methods.REDRAWN.make(setting())
  update = optax.with_extra_args_support(optimizer).update
  state, updates = optimizer.init(PARAMS), []
  for _ in range(2):
    found, state = update(gradients(0), state, PARAMS, **LOG_LIKELIHOODS)
    updates.append(found)
  assert (
    updates[0]["body"]["Dense_0"]["bias"] != updates[1]["body"]["Dense_0"]["bias"]
  ).all()
  assert_close(updates[0]["output"], updates[1]["output"])


def test_equal_heads_all_learn_as_adam_does():
  optimizer = methods.ADAM_EQUAL_HEADS.make(setting())
  update = optax.with_extra_args_support(optimizer).update
  with jax.numpy_dtype_promotion("standard"):  # Adam's own arithmetic needs it
    actual, _ = update(gradients(0), optimizer.init(PARAMS), PARAMS, **LOG_LIKELIHOODS)
    adam = optax.adam(1e-3)
    expected, _ = adam.update(gradients(0), adam.init(PARAMS), PARAMS)
  assert_close(actual, expected)


@pytest.mark.parametrize("granularity", ["per_unit", "per_weight"])
def test_upper_bound_is_read_from_the_state(granularity):
  optimizer = methods.upper(1e-3, granularity)
  state = optimizer.make(setting(10.0)).init(PARAMS)
  update = optax.with_extra_args_support(optimizer.make(setting(0.1))).update
  ones = jax.tree.map(jnp.ones_like, PARAMS)
  updates, _ = update(ones, state, PARAMS, **LOG_LIKELIHOODS)
  ladder = -updates["output"]["alrao_heads"]["kernel"][:, 0, 0]
  np.testing.assert_allclose(ladder[jnp.array([0, -1])], [1e-3, 10.0], rtol=1e-5)
  kernel = updates["body"]["Dense_0"]["kernel"]
  rates_of_a_unit = 1 if granularity == "per_unit" else 5
  assert all(len(np.unique(column)) == rates_of_a_unit for column in kernel.T)


def test_guard_of_the_study_stops_what_is_too_fast():
  optimizer = methods.guarded(alrao_jax.guard()).make(setting((10.0, 100.0)))
  update = optax.with_extra_args_support(optimizer).update
  ones = jax.tree.map(jnp.ones_like, PARAMS)
  state = optimizer.init(PARAMS)
  for trips in (0, 6):  # the first batch is skipped, in the second the units are slowed
    updates, state = update(ones, state, PARAMS, **LOG_LIKELIHOODS)
    assert not updates["body"]["Dense_0"]["kernel"].any()
    assert alrao_jax.scalars(state)["alrao/guard_trips"] == trips
