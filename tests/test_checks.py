import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alrao_jax import _checks

POSITIVE = _checks.check_positive
NON_NEGATIVE = _checks.check_non_negative
PROBABILITY = _checks.check_probability


@pytest.mark.parametrize("value", [1, 0.5, np.float32(2), np.array([1.0, 2.0]), True])
def test_numbers_are_concrete(value):
  assert _checks.is_concrete(value)
  assert _checks.is_concrete(jnp.asarray(value))


@pytest.mark.parametrize("value", [None, "1", b"1", len, object(), {"a": 1}])
def test_what_is_no_number_is_not_concrete(value):
  assert not _checks.is_concrete(value)


def test_tracers_are_not_concrete():
  seen = []
  jax.jit(lambda x: seen.append(_checks.is_concrete(x)))(1.0)
  jax.vmap(lambda x: seen.append(_checks.is_concrete(x)))(jnp.ones(2))
  assert seen == [False, False]


@pytest.mark.parametrize("value", [1, 1e-30, np.float32(3), jnp.array([1.0, 2.0])])
def test_positive_numbers_pass(value):
  _checks.check_positive("alrao()", "x", value)
  _checks.check_non_negative("alrao()", "x", value)


def test_zero_is_not_negative():
  _checks.check_non_negative("alrao()", "weight_decay", 0.0)


@pytest.mark.parametrize(
  ("check", "value", "message"),
  [
    (POSITIVE, -0.001, "alrao(x=...) must be positive, got -0.001."),
    (POSITIVE, 0, "alrao(x=...) must be positive, got 0."),
    (POSITIVE, math.nan, "alrao(x=...) must be positive, got nan."),
    (POSITIVE, math.inf, "alrao(x=...) must be finite, got inf."),
    (POSITIVE, np.array([1.0, -2.0]), "alrao(x=...) must be positive, got [ 1. -2.]."),
    (NON_NEGATIVE, -1, "alrao(x=...) must not be negative, got -1."),
    (NON_NEGATIVE, math.nan, "alrao(x=...) must not be negative, got nan."),
    (NON_NEGATIVE, math.inf, "alrao(x=...) must be finite, got inf."),
    (PROBABILITY, 1.5, "alrao(x=...) must be between 0 and 1, got 1.5."),
    (PROBABILITY, -0.1, "alrao(x=...) must be between 0 and 1, got -0.1."),
    (PROBABILITY, math.nan, "alrao(x=...) must be between 0 and 1, got nan."),
  ],
)
def test_values_that_break_the_rule_are_refused(check, value, message):
  with pytest.raises(ValueError) as error:
    check("alrao()", "x", value)
  assert str(error.value) == message


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_an_open_probability_refuses_its_ends(value):
  with pytest.raises(ValueError, match=r"must be strictly between 0 and 1, got"):
    _checks.check_probability("switch()", "theta", value, open=True)
  _checks.check_probability("switch()", "theta", 0.5, open=True)


def test_a_closed_probability_takes_its_ends():
  for value in (0, 0.0, 1, 1.0, np.array([0.0, 1.0])):
    _checks.check_probability("switch()", "theta", value)


@pytest.mark.parametrize("check", [POSITIVE, NON_NEGATIVE, PROBABILITY])
@pytest.mark.parametrize(
  ("value", "shown"),
  [
    (None, "a value of type NoneType"),
    ("0.1", "'0.1' of type str"),
    (optax.constant_schedule(0.1), "a value of type function"),
  ],
)
def test_what_is_no_number_is_refused(check, value, shown):
  with pytest.raises(TypeError) as error:
    check("alrao()", "x", value)
  assert str(error.value) == f"alrao(x=...) must be a number, got {shown}."


@pytest.mark.parametrize("low", [1e-5, 1, np.float32(0.5)])
def test_intervals_pass_also_of_one_rate(low):
  _checks.check_interval("alrao()", low, 10.0)
  _checks.check_interval("alrao()", low, low)


@pytest.mark.parametrize(
  ("low", "high", "message"),
  [
    (1.0, 0.1, "must not be above max_learning_rate, got 1.0 and 0.1: write the lower"),
    (0.0, 1.0, r"alrao\(min_learning_rate=...\) must be positive, got 0.0"),
    (-1.0, 1.0, r"alrao\(min_learning_rate=...\) must be positive, got -1.0"),
    (math.nan, 1.0, r"alrao\(min_learning_rate=...\) must be positive, got nan"),
    (1.0, math.nan, r"alrao\(max_learning_rate=...\) must be positive, got nan"),
    (1.0, math.inf, r"alrao\(max_learning_rate=...\) must be finite, got inf"),
  ],
)
def test_bad_intervals_are_refused(low, high, message):
  with pytest.raises(ValueError, match=message):
    _checks.check_interval("alrao()", low, high)


def test_an_interval_has_the_names_of_its_arguments():
  with pytest.raises(ValueError, match=r"log_uniform\(lo=...\) must not be above hi"):
    _checks.check_interval("log_uniform()", 2.0, 1.0, names=("lo", "hi"))


def test_checks_skip_tracers():
  @jax.jit
  def bad(x, p):
    _checks.check_positive("alrao()", "x", x)
    _checks.check_non_negative("alrao()", "x", x)
    _checks.check_probability("alrao()", "p", p)
    _checks.check_interval("alrao()", x, 1e-9)
    _checks.check_interval("alrao()", 1e9, p)
    return x

  bad(-1.0, 7.0)
  jax.vmap(bad)(-jnp.ones(2), jnp.full(2, 7.0))


def test_the_known_bound_is_checked_beside_a_traced_one():
  with pytest.raises(ValueError, match="max_learning_rate=...\\) must be positive"):
    jax.jit(lambda x: _checks.check_interval("alrao()", x, -1.0))(1.0)


@pytest.mark.parametrize("value", [1, 10, np.int64(3), np.uint8(3)])
def test_counts_pass(value):
  _checks.check_count("MultiHead()", "num_heads", value)


def test_counts_below_one_are_refused():
  for value in (0, -3):
    with pytest.raises(ValueError) as error:
      _checks.check_count("MultiHead()", "num_heads", value)
    message = f"MultiHead(num_heads=...) must be at least 1, got {value}."
    assert str(error.value) == message


@pytest.mark.parametrize("value", [True, np.True_, 2.0, "3", None, np.ones(2)])
def test_counts_that_are_no_integers_are_refused(value):
  with pytest.raises(TypeError, match=r"MultiHead\(num_heads=...\) must be an integer"):
    _checks.check_count("MultiHead()", "num_heads", value)


def test_a_traced_count_is_refused():
  with pytest.raises(TypeError, match="must be an integer known before tracing"):
    jax.jit(lambda n: _checks.check_count("MultiHead()", "num_heads", n))(3)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_pass_typed_raw_and_traced(implementation):
  key = jax.random.key(0, impl=implementation)
  raw = jax.random.key_data(key)
  for one in (key, raw, np.asarray(raw), jax.random.fold_in(key, 1)):
    _checks.check_key("alrao()", one)
    if not isinstance(one, np.ndarray):
      jax.jit(lambda k: _checks.check_key("alrao()", k))(one)
  jax.vmap(lambda k: _checks.check_key("alrao()", k))(jax.random.split(key, 3))


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (0, "must be a PRNG key, got 0 of type int"),
    (None, "must be a PRNG key, got a value of type NoneType"),
    (optax.sgd(0.1), "got a value of type GradientTransformation"),
    (np.float32(1), r"got an array of float32 and shape \(\)"),
    (np.zeros(2), r"got an array of float64 and shape \(2,\)"),
    (np.zeros(3, np.uint32), r"got an array of uint32 and shape \(3,\)"),
  ],
)
def test_what_is_no_key_is_refused(value, message):
  with pytest.raises(TypeError, match=message) as error:
    _checks.check_key("alrao()", value)
  assert str(error.value).startswith("alrao(key=...) ")
  assert "write alrao(jax.random.key(0), ...)" in str(error.value)


def test_several_keys_are_refused():
  keys = jax.random.split(jax.random.key(0), 3)
  for several in (keys, jax.random.key_data(keys)):
    with pytest.raises(ValueError, match="must be one PRNG key, got an array of keys"):
      _checks.check_key("alrao()", several)
