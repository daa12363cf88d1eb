"""Distributions of rates, the ladder of the heads, and the stability of the draws."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alrao_jax as alrao
from alrao_jax import _rates
from alrao_jax._unit_map import unit_map


def dense(units, inputs=3):
  return {"kernel": jnp.ones((inputs, units)), "bias": jnp.ones(units)}


def heads(num_heads):
  return {"alrao_heads": {"kernel": jnp.ones((num_heads, 3, 2))}}


def draw(params, key=None, **options):
  key = jax.random.key(0) if key is None else key
  return alrao.unit_rates(
    alrao.scale_by_unit_rates(key, **options).init(params), params
  )


PER_WEIGHT = alrao.UnitOptions(overrides=(("", "per_weight"),))


def quantiles(num_units, key):
  units = unit_map({"layer": {"bias": jnp.ones(num_units)}})
  return np.asarray(_rates.unit_quantiles(key, units, jnp.float32))


def reference_quantile(key, group, index):
  """The draw of one unit, as the documentation says it."""
  name_hash = int(hashlib.sha256(group.encode()).hexdigest()[:8], 16)
  key = jax.random.fold_in(jax.random.fold_in(key, name_hash), index)
  return jax.random.uniform(key, dtype=jnp.float32)


def test_log_uniform_is_uniform_in_the_logarithm():
  n = 20_000
  rates = alrao.log_uniform(1e-5, 10.0).quantile(quantiles(n, jax.random.key(3)))
  share = (np.log(np.asarray(rates, np.float64)) - np.log(1e-5)) / np.log(1e6)
  # The Kolmogorov statistic exceeds 5 / (2 sqrt n) with probability 2 exp(-12.5).
  ordered = np.sort(share)
  assert np.abs(ordered - (np.arange(n) + 0.5) / n).max() < 2.5 / np.sqrt(n)
  assert rates.min() >= 1e-5 * (1 - 1e-6) and rates.max() <= 10.0 * (1 + 1e-6)


def test_bernoulli_learns_with_probability_p():
  n, p = 20_000, 0.3
  rates = alrao.bernoulli(0.5, p).quantile(quantiles(n, jax.random.key(4)))
  assert set(np.unique(rates).tolist()) == {0.0, 0.5}
  assert abs((rates > 0).mean() - p) < 5 * np.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_bernoulli_at_its_ends_is_certain(p):
  u = jnp.asarray(quantiles(1000, jax.random.key(5)))
  assert (alrao.bernoulli(0.5, p).quantile(u) == 0.5 * p).all()


@pytest.mark.parametrize(
  "law", [alrao.log_uniform(1e-4, 2.0), alrao.bernoulli(0.5, 0.3)]
)
def test_cdf_inverts_quantile(law):
  u = jnp.asarray(quantiles(1000, jax.random.key(6)))
  rates = law.quantile(u)
  np.testing.assert_allclose(law.quantile(law.cdf(rates)), rates, rtol=1e-5)


def test_equal_bounds_give_the_bound_to_the_last_bit():
  for rate in (1e-5, 0.1, 0.3, 7.0):
    rates = draw({"a": dense(50)}, min_learning_rate=rate, max_learning_rate=rate)
    assert (np.asarray(rates["a"]["bias"]) == np.float32(rate)).all()


@pytest.mark.parametrize("num_heads", [2, 5, 10])
def test_the_ladder_is_log_even_with_the_bounds_at_its_ends(num_heads):
  rates = draw({"out": heads(num_heads)}, min_learning_rate=1e-5)["out"]
  ladder = np.asarray(rates["alrao_heads"]["kernel"][:, 0, 0], np.float64)
  j = np.arange(num_heads)
  expected = np.exp(np.log(1e-5) + j / (num_heads - 1) * np.log(10 / 1e-5))
  np.testing.assert_allclose(ladder, expected, rtol=5e-6)


def test_a_single_head_has_the_geometric_middle_or_the_rate_asked_for():
  params = {"out": heads(1)}
  kernel = draw(params)["out"]["alrao_heads"]["kernel"]
  np.testing.assert_allclose(kernel, np.sqrt(1e-5 * 10), rtol=1e-5)
  kernel = draw(params, single_head_learning_rate=0.3)["out"]["alrao_heads"]["kernel"]
  np.testing.assert_allclose(kernel, 0.3, rtol=1e-5)


def test_draws_do_not_depend_on_the_rest_of_the_network():
  small = {"b": dense(4), "c": dense(5)}
  large = {"a": dense(7), "b": dense(4), "bb": dense(2), "c": dense(9)}
  before, after = draw(small), draw({**large, "out": heads(3)})
  np.testing.assert_array_equal(before["b"]["kernel"], after["b"]["kernel"])
  np.testing.assert_array_equal(before["c"]["bias"], after["c"]["bias"][:5])


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_draws_are_stable_for_every_kind_of_key(impl):
  key = jax.random.key(7, impl=impl)
  small, large = draw({"b": dense(4)}, key), draw({"a": dense(3), "b": dense(6)}, key)
  np.testing.assert_array_equal(small["b"]["bias"], large["b"]["bias"][:4])


def test_raw_and_typed_keys_draw_alike():
  raw = jax.random.key_data(jax.random.key(8))
  params = {"a": dense(6)}
  np.testing.assert_array_equal(
    draw(params, raw)["a"]["bias"], draw(params, jax.random.key(8))["a"]["bias"]
  )


def test_keys_and_layers_draw_independently():
  params = {"a": dense(2000), "b": dense(2000)}
  one, other = draw(params, jax.random.key(1)), draw(params, jax.random.key(2))
  log = lambda tree, name: np.log(np.asarray(tree[name]["bias"], np.float64))  # noqa: E731
  for x, y in (
    (log(one, "a"), log(one, "b")),
    (log(one, "a"), log(other, "a")),
    (log(one, "a")[1:], log(one, "a")[:-1]),
  ):
    assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(len(x))


def test_all_incoming_weights_of_a_unit_share_its_rate():
  rates = draw({"a": dense(6, inputs=5)})["a"]
  for row in np.asarray(rates["kernel"]):
    np.testing.assert_array_equal(row, rates["bias"])
  assert len(np.unique(rates["bias"])) == 6


def test_per_weight_draws_every_entry():
  params = {"a": dense(6), "out": heads(3)}
  key = jax.random.key(0)
  state = alrao.scale_by_unit_rates(key, units=PER_WEIGHT).init(params)
  assert (state.ladder.shape, state.quantiles.shape) == ((3,), (3 * 6 + 6,))
  rates = alrao.unit_rates(state, params, units=PER_WEIGHT)
  assert len(np.unique(rates["a"]["kernel"])) == 18
  assert len(np.unique(rates["out"]["alrao_heads"]["kernel"])) == 3
  # Each weight is a unit of a group of its parameter's name.
  expected = [reference_quantile(key, "a/bias", i) for i in range(6)]
  expected += [reference_quantile(key, "a/kernel", i) for i in range(18)]
  np.testing.assert_array_equal(state.quantiles, np.stack(expected))


def test_the_state_holds_one_float_a_unit():
  params = {"conv": {"kernel": jnp.ones((3, 3, 2, 8))}, "a": dense(6)}
  state = alrao.scale_by_unit_rates(jax.random.key(0)).init(params)
  assert state.quantiles.shape == (8 + 6,)
  other = sum(leaf.size for leaf in jax.tree.leaves(state)) - state.quantiles.size
  assert other == 6  # a fingerprint, two pairs of bounds, an unused ladder


def test_any_named_tuple_with_a_quantile_function_is_a_distribution():
  class Square(_rates.NamedTuple):
    top: float

    def quantile(self, u):
      return self.top * u * u

  params = {"a": dense(40)}
  state = alrao.scale_by_unit_rates(jax.random.key(0), distribution=Square(2.0)).init(
    params
  )
  u = state.quantiles
  rates = alrao.unit_rates(state, params)["a"]["bias"]
  np.testing.assert_allclose(rates, 2 * u**2, rtol=1e-6)
  with pytest.raises(TypeError, match=r"give Square a method cdf\(rate\)"):
    alrao.with_unit_rates(state, params, alrao.unit_rates(state, params))


def test_written_rates_are_read_back():
  params = {"a": dense(6), "out": heads(4)}
  state = alrao.alrao(jax.random.key(0)).init(params)
  wanted = jax.tree.map(
    lambda r: r * 1.7,
    alrao.unit_rates(alrao.alrao(jax.random.key(9)).init(params), params),
  )
  state = alrao.with_unit_rates(state, params, wanted)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    alrao.unit_rates(state, params),
    wanted,
  )


def test_rates_of_other_parameters_are_an_error():
  state = alrao.scale_by_unit_rates(jax.random.key(0)).init({"a": dense(6)})
  with pytest.raises(ValueError, match="6 units, made for other parameters"):
    alrao.unit_rates(state, {"a": dense(7)})
  with pytest.raises(ValueError, match="needs rates of shape"):
    alrao.with_unit_rates(state, {"a": dense(6)}, {"a": {"bias": jnp.ones(6)}})


def test_heads_that_disagree_on_their_number_are_an_error():
  params = {"one": heads(3), "two": heads(4)}
  with pytest.raises(ValueError, match="agree on num_heads"):
    alrao.scale_by_unit_rates(jax.random.key(0)).init(params)


def test_every_draw_is_that_of_its_group_and_index():
  params = {
    "b": dense(2),
    "cell": {"dense_i": dense(12), "dense_h": dense(12, inputs=3)},
    "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    "a": dense(3),
    "t": jnp.ones(()),
    "out": heads(4),
  }
  key = jax.random.key(11)
  state = alrao.scale_by_unit_rates(key).init(params)
  sizes = {"a": 3, "b": 2, "cell": 3, "norm": 4, "t": 1}  # by name
  expected = [
    reference_quantile(key, name, i)
    for name, size in sizes.items()
    for i in range(size)
  ]
  np.testing.assert_array_equal(state.quantiles, np.stack(expected))
  np.testing.assert_array_equal(state.ladder, np.linspace(0, 1, 4, dtype=np.float32))


@pytest.mark.parametrize("params", [{}, {"a": dense(3)}, {"out": heads(3)}])
def test_no_vector_of_the_state_is_empty(params):
  optimizer = optax.chain(alrao.scale_by_unit_rates(jax.random.key(0)))
  (state,) = optimizer.init(params)
  assert state.ladder.shape == (3 if "out" in params else 1,)
  assert state.quantiles.shape == (3 if "a" in params else 1,)
  if "out" not in params:
    np.testing.assert_array_equal(state.ladder, [0])
  if "a" not in params:
    np.testing.assert_array_equal(state.quantiles, [0])
  rates = alrao.unit_rates(state, params)
  written = alrao.with_unit_rates(state, params, rates)
  assert jax.tree.structure(written) == jax.tree.structure(state)
  guard = alrao.guard_units()
  assert all(leaf.size for leaf in jax.tree.leaves(guard.init(params)))
  guard.update(params, guard.init(params), params)


def test_a_state_without_heads_is_not_that_of_one_head():
  state = alrao.scale_by_unit_rates(jax.random.key(0)).init({"a": dense(3)})
  with pytest.raises(ValueError, match="made for other parameters"):
    alrao.unit_rates(state, {"a": dense(3), "out": heads(1)})


def test_a_renamed_layer_is_an_error_and_not_a_permutation():
  params = {"a": dense(2), "b": dense(2)}
  state = alrao.scale_by_unit_rates(jax.random.key(0)).init(params)
  with pytest.raises(ValueError, match="made for other parameters"):
    alrao.unit_rates(state, {"z": params["a"], "b": params["b"]})


def test_an_option_that_was_forgotten_is_an_error():
  params = {"a": {"kernel": jnp.ones((4, 4))}}
  units = alrao.UnitOptions(overrides=(("kernel", (0,)),))
  state = alrao.scale_by_unit_rates(jax.random.key(0), units=units).init(params)
  with pytest.raises(ValueError, match="same units="):
    alrao.unit_rates(state, params)
  rates = alrao.unit_rates(state, params, units=units)["a"]["kernel"]
  assert len(np.unique(np.asarray(rates)[:, 0])) == 4


@pytest.mark.parametrize(
  ("law", "bounds", "rates"),
  [
    (None, (0.1, 0.1), 0.05),
    (None, (1e-5, 10.0), -1.0),
    (alrao.bernoulli(0.5, 0.5), (1e-5, 10.0), 0.1),
    (None, (1e-5, 10.0), jnp.arange(1.0, 4.0)[:, None]),
  ],
)
def test_rates_that_can_not_be_held_are_an_error(law, bounds, rates):
  params = {"a": {"kernel": jnp.ones((3, 2))}}
  optimizer = alrao.scale_by_unit_rates(jax.random.key(0), *bounds, distribution=law)
  wanted = {"a": {"kernel": jnp.broadcast_to(jnp.asarray(rates), (3, 2))}}
  with pytest.raises(ValueError, match="can't give 'a/kernel' these rates"):
    alrao.with_unit_rates(optimizer.init(params), params, wanted)


def test_fused_gates_repeat_the_vector_and_are_read_back():
  params = {"cell": {"dense_i": dense(12), "dense_h": dense(12, inputs=3)}}
  state = alrao.scale_by_unit_rates(jax.random.key(0)).init(params)
  assert state.quantiles.shape == (3,)
  rates = alrao.unit_rates(state, params)
  bias = np.asarray(rates["cell"]["dense_i"]["bias"])
  np.testing.assert_array_equal(bias, np.concatenate([bias[:3]] * 4))
  other = alrao.scale_by_unit_rates(jax.random.key(1)).init(params)
  written = alrao.with_unit_rates(other, params, rates)
  np.testing.assert_allclose(written.quantiles, state.quantiles, rtol=1e-4)


def test_the_ladder_is_log_even_whatever_the_units_draw_from():
  params = {"a": dense(6), "out": heads(3)}
  law = alrao.bernoulli(0.5, 0.3)
  state = alrao.scale_by_unit_rates(jax.random.key(0), distribution=law).init(params)
  rates = alrao.unit_rates(state, params)
  ladder = rates["out"]["alrao_heads"]["kernel"][:, 0, 0]
  np.testing.assert_allclose(ladder, [1e-5, 1e-2, 10.0], rtol=1e-5)
  written = alrao.with_unit_rates(state, params, rates)
  again = alrao.unit_rates(written, params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), again, rates)


def test_frozen_parameters_have_rate_zero():
  params, units = {"a": dense(6)}, alrao.UnitOptions((("^a/", "frozen"),))
  state = alrao.scale_by_unit_rates(jax.random.key(0), units=units).init(params)
  assert (alrao.unit_rates(state, params, units=units)["a"]["kernel"] == 0).all()


def test_the_widest_interval_of_float32_has_finite_rates():
  rates = draw(
    {"a": dense(50), "out": heads(5)}, min_learning_rate=1e-37, max_learning_rate=3e38
  )
  ladder = rates["out"]["alrao_heads"]["kernel"][:, 0, 0]
  np.testing.assert_allclose(ladder[jnp.array([0, 4])], [1e-37, 3e38], rtol=2e-5)
  assert np.isfinite(rates["a"]["bias"]).all()


@pytest.mark.parametrize("bounds", [(1e-40, 1.0), (1.0, 1e39)])
def test_bounds_beyond_float32_are_an_error(bounds):
  with pytest.raises(ValueError, match="range of float32"):
    alrao.scale_by_unit_rates(jax.random.key(0), *bounds)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_batched_keys_draw_as_one_by_one(impl):
  params = {"a": dense(4)}
  keys = jax.random.split(jax.random.key(0, impl=impl), 3)
  init = lambda key: alrao.scale_by_unit_rates(key).init(params).quantiles  # noqa: E731
  np.testing.assert_array_equal(
    jax.vmap(init)(keys), np.stack([init(key) for key in keys])
  )


def test_a_single_head_outside_the_interval_is_an_error():
  with pytest.raises(ValueError, match="single_head_learning_rate"):
    alrao.scale_by_unit_rates(
      jax.random.key(0), 0.1, 0.1, single_head_learning_rate=1.0
    )
