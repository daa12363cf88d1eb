import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alrao_jax import _averaging
from alrao_jax._averaging import bayes, fixed_share, switch

METHODS = {
  "switch": switch(),
  "bayes": bayes(),
  "fixed_share": fixed_share(0.01),
}
METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
# Few, but the same at each run and on each machine.
REPEATABLE = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@functools.partial(jax.jit, static_argnums=0)
def _scan(method, state, log_likelihoods):
  def body(state, row):
    state = method.update(state, row)
    return state, (state, method.log_weights(state))

  return jax.lax.scan(body, state, log_likelihoods)[1]


def _weights(method, state):
  return np.exp(np.asarray(method.log_weights(state), np.float64))


def _same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


# --- the slow references, written from the priors ----------------------------------


def _switch_prior(theta, num_steps):
  """Every switch sequence, told apart up to time `num_steps`, with its probability.

  A sequence is a list of (time, head), the first at time 0: "head from the
  observation after this time on". Its number of blocks is geometric (after each block
  begins, another will follow with probability theta); the times are drawn from
  pi_T(t) = 1/(t(t+1)), given that each comes after the one before; heads are uniform,
  and their probability is left to the caller. `settled` says that no block follows;
  else the next begins after `num_steps`.
  """

  def pi_time(t):
    return 1.0 / (t * (t + 1.0))

  def tail(t):  # sum of pi_time over all times after t
    return 1.0 / (t + 1.0)

  for num_switches in range(num_steps + 1):
    for switches in itertools.combinations(range(1, num_steps + 1), num_switches):
      times = (0, *switches)
      prior = 1.0
      for before, time in itertools.pairwise(times):
        prior *= theta * pi_time(time) / tail(before)
      yield times, True, prior * (1.0 - theta)
      yield times, False, prior * theta * tail(num_steps) / tail(times[-1])


def _switch_by_enumeration(theta, log_likelihoods):
  """Posterior of (head now, settled or not) after all the observations."""
  num_steps, num_heads = log_likelihoods.shape
  terms = {(head, done): [] for head in range(num_heads) for done in (False, True)}
  for times, settled, prior in _switch_prior(theta, num_steps):
    blocks = [
      log_likelihoods[start:end].sum(0)
      for start, end in itertools.pairwise((*times, num_steps))
    ]
    for heads in itertools.product(range(num_heads), repeat=len(times)):
      log_likelihood = sum(
        block[head] for block, head in zip(blocks, heads, strict=True)
      )
      weight = prior * num_heads ** -len(times) * math.exp(log_likelihood)
      terms[heads[-1], settled].append(weight)
  sums = {key: math.fsum(values) for key, values in terms.items()}
  total = math.fsum(sums.values())
  unsettled = np.array([sums[head, False] for head in range(num_heads)]) / total
  settled = np.array([sums[head, True] for head in range(num_heads)]) / total
  return unsettled, settled


def _fixed_share_by_enumeration(rate, log_likelihoods):
  """Posterior of the next observation's head, over all paths of heads."""
  num_steps, num_heads = log_likelihoods.shape
  weights = [[] for _ in range(num_heads)]
  for path in itertools.product(range(num_heads), repeat=num_steps + 1):
    weight = 1.0 / num_heads
    for before, head in itertools.pairwise(path):
      weight *= rate / num_heads + (1.0 - rate) * (before == head)
    weight *= math.exp(sum(log_likelihoods[t, path[t]] for t in range(num_steps)))
    weights[path[-1]].append(weight)
  sums = np.array([math.fsum(values) for values in weights])
  return sums / sums.sum()


def _random_log_likelihoods(num_steps, num_heads, scale=1.0):
  rng = np.random.default_rng(1000 * num_steps + num_heads)
  return scale * rng.normal(size=(num_steps, num_heads))


# --- exactness ----------------------------------------------------------------------


@pytest.mark.parametrize("theta", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 7])
def test_the_switch_prior_sums_to_one(theta, num_steps):
  total = math.fsum(prior for _, _, prior in _switch_prior(theta, num_steps))
  assert total == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("theta", [0.0, 0.3, 0.9, 0.999, 0.9999, 1.0])
@pytest.mark.parametrize("num_heads", [2, 3])
def test_switch_equals_enumeration_of_all_switch_sequences(x64, num_heads, theta):
  log_likelihoods = _random_log_likelihoods(7, num_heads)
  method = switch(theta)
  state = method.init(num_heads, jnp.float64)
  for t in range(8):
    unsettled, settled = _switch_by_enumeration(theta, log_likelihoods[:t])
    np.testing.assert_allclose(np.exp(state.alpha), unsettled, rtol=1e-12)
    np.testing.assert_allclose(np.exp(state.beta), settled, rtol=1e-12)
    weights = _weights(method, state)
    np.testing.assert_allclose(weights, unsettled + settled, rtol=1e-12)
    assert int(state.count) == t + 1
    if t < 7:
      state = method.update(state, log_likelihoods[t])


@pytest.mark.parametrize("scale", [0.1, 20.0])
def test_switch_equals_enumeration_where_heads_hardly_or_greatly_differ(x64, scale):
  log_likelihoods = _random_log_likelihoods(6, 3, scale)
  method = switch(0.9)
  state = method.init(3, jnp.float64)
  state = jax.tree.map(lambda leaf: leaf[-1], _scan(method, state, log_likelihoods)[0])
  unsettled, settled = _switch_by_enumeration(0.9, log_likelihoods)
  np.testing.assert_allclose(np.exp(state.alpha), unsettled, rtol=1e-12)
  np.testing.assert_allclose(np.exp(state.beta), settled, rtol=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.7, 1.0])
@pytest.mark.parametrize("num_heads", [2, 3])
def test_fixed_share_equals_enumeration_of_all_paths(x64, num_heads, rate):
  log_likelihoods = _random_log_likelihoods(6, num_heads)
  method = fixed_share(rate)
  state = method.init(num_heads, jnp.float64)
  for t in range(7):
    expected = _fixed_share_by_enumeration(rate, log_likelihoods[:t])
    np.testing.assert_allclose(_weights(method, state), expected, rtol=1e-12)
    if t < 6:
      state = method.update(state, log_likelihoods[t])


def test_bayes_is_the_product_of_likelihoods(x64):
  log_likelihoods = _random_log_likelihoods(40, 5)
  _, log_weights = _scan(bayes(), bayes().init(5, jnp.float64), log_likelihoods)
  likelihoods = np.exp(log_likelihoods.cumsum(0))
  expected = likelihoods / likelihoods.sum(1, keepdims=True)
  np.testing.assert_allclose(np.exp(log_weights), expected, rtol=1e-12)


@pytest.mark.parametrize("method", [switch(0.0), fixed_share(0.0)])
def test_no_switching_is_bayes(x64, method):
  log_likelihoods = _random_log_likelihoods(40, 5)
  log_likelihoods[10, 2] = -np.inf
  _, expected = _scan(bayes(), bayes().init(5, jnp.float64), log_likelihoods)
  _, log_weights = _scan(method, method.init(5, jnp.float64), log_likelihoods)
  np.testing.assert_allclose(np.exp(log_weights), np.exp(expected), rtol=1e-12)


def test_sharing_everything_keeps_equal_weights():
  method = fixed_share(1.0)
  state = method.update(method.init(4), jnp.array([3.0, 0.0, -jnp.inf, -5.0]))
  np.testing.assert_allclose(_weights(method, state), 0.25, rtol=1e-6)


@METHOD
def test_weights_before_any_observation_are_equal(method):
  weights = _weights(method, method.init(10))
  np.testing.assert_allclose(weights, 0.1, rtol=1e-6)


@METHOD
def test_one_head_always_has_weight_one(method):
  state = method.init(1)
  for value in (-1.7, 3.0, -jnp.inf, -1e30, 0.0):
    assert method.log_weights(state).tolist() == [0.0]
    state = method.update(state, jnp.array([value]))
  assert method.log_weights(state).tolist() == [0.0]


@pytest.mark.parametrize("factory", [switch, bayes, lambda **k: fixed_share(0.1, **k)])
def test_likelihood_scale_multiplies_the_log_likelihoods(x64, factory):
  log_likelihoods = _random_log_likelihoods(20, 4)
  scaled, plain = factory(likelihood_scale=32.0), factory()
  _, got = _scan(scaled, scaled.init(4, jnp.float64), log_likelihoods)
  _, want = _scan(plain, plain.init(4, jnp.float64), 32.0 * log_likelihoods)
  np.testing.assert_allclose(np.exp(got), np.exp(want), rtol=1e-12)


def test_default_theta_is_the_papers():
  _same(switch().init(5), switch(0.999).init(5))


# --- heads that are out --------------------------------------------------------------


@METHOD
@pytest.mark.parametrize("out", [-np.inf, np.inf, np.nan])
def test_all_heads_out_leaves_everything_alone(method, out):
  state = method.update(method.init(3), jnp.array([0.5, -1.0, 2.0]))
  _same(method.update(state, jnp.full((3,), out)), state)


@METHOD
def test_an_impossible_observation_raises_no_nan_on_the_way(method):
  with jax.debug_nans(True):
    state = method.init(2)
    _same(method.update(state, jnp.full((2,), -jnp.inf)), state)


def test_survivors_without_weight_leave_everything_alone():
  # Under Bayes a head that was out has weight 0 for good; if the others then go too,
  # nothing is left to weigh.
  for method in (bayes(), switch(0.0), fixed_share(0.0)):
    state = method.update(method.init(2), jnp.array([-jnp.inf, 0.0]))
    _same(method.update(state, jnp.array([0.0, -jnp.inf])), state)


@pytest.mark.parametrize("out", [-np.inf, np.inf])
def test_a_head_that_was_out_may_come_back(x64, out):
  method = switch()
  state = method.init(3, jnp.float64)
  state = method.update(state, jnp.array([-1.0, out, -1.0]))
  # Out: all that it has is its part of the mass that switches, half of alpha's share.
  pool = 0.999 / 2
  assert _weights(method, state)[1] == pytest.approx(pool / 3, rel=1e-12)
  for _ in range(20):
    state = method.update(state, jnp.array([-5.0, -1.0, -5.0]))
  assert _weights(method, state)[1] > 0.9


@pytest.mark.parametrize(
  "method", [bayes(), bayes(likelihood_scale=32.0), switch(0.0), fixed_share(0.0)]
)
def test_a_head_of_which_nothing_was_seen_keeps_its_weight(x64, method):
  state = method.init(4, jnp.float64)
  state = method.update(state, jnp.array([-1.0, -1.2, -1.1, -1.3]))
  before = _weights(method, state)
  seen = np.array([-2.0, np.nan, -2.3, np.nan])
  after = _weights(method, method.update(state, jnp.asarray(seen)))
  np.testing.assert_allclose(after[[1, 3]], before[[1, 3]], rtol=1e-12)
  # The others share their weight by Bayes' rule.
  scale = 32.0 if method.update.args[-1] == 32.0 else 1.0
  expected = before[[0, 2]] * np.exp(scale * seen[[0, 2]])
  expected *= before[[0, 2]].sum() / expected.sum()
  np.testing.assert_allclose(after[[0, 2]], expected, rtol=1e-12)


@METHOD
def test_a_head_of_which_nothing_was_seen_counts_as_the_mixture_of_the_others(method):
  state = method.update(method.init(3), jnp.array([-1.0, -2.0, -3.0]))
  weights = _weights(method, state)[:2]
  mixture = np.log(weights @ np.exp([-1.0, -1.5]) / weights.sum())
  unseen = method.update(state, jnp.array([-1.0, -1.5, jnp.nan]))
  filled = method.update(state, jnp.array([-1.0, -1.5, mixture]))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), unseen, filled)


@METHOD
def test_where_the_heads_that_were_seen_are_out_nothing_changes(method):
  state = method.update(method.init(3), jnp.array([-1.0, -2.0, -3.0]))
  _same(method.update(state, jnp.array([-jnp.inf, jnp.nan, jnp.nan])), state)


@pytest.mark.parametrize("method", [switch(), fixed_share(0.01)])
def test_out_is_the_limit_of_very_unlikely(x64, method):
  state = method.update(method.init(3, jnp.float64), jnp.array([0.1, 0.2, 0.3]))
  out = method.update(state, jnp.array([0.4, -jnp.inf, -0.4]))
  unlikely = method.update(state, jnp.array([0.4, -1e4, -0.4]))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-14), out, unlikely)


# --- numbers -------------------------------------------------------------------------


@METHOD
def test_10000_steps_at_large_scale_stay_finite_and_normalised_in_float32(method):
  log_likelihoods = _random_log_likelihoods(10_000, 10, 100.0).astype(np.float32)
  states, log_weights = _scan(method, method.init(10), log_likelihoods)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states))
  assert log_weights.dtype == np.float32
  sums = np.exp(np.asarray(log_weights, np.float64)).sum(1)
  # Rounding of each log-weight near 0, where the weight is: one unit in the last place.
  np.testing.assert_allclose(sums, 1.0, atol=10 * np.finfo(np.float32).eps)


def test_float32_follows_float64_over_10000_steps(x64):
  log_likelihoods = _random_log_likelihoods(10_000, 10, 0.3).astype(np.float32)
  method = switch()
  _, narrow = _scan(method, method.init(10, jnp.float32), log_likelihoods)
  wide = log_likelihoods.astype(np.float64)
  states, wide = _scan(method, method.init(10, jnp.float64), wide)
  # The update is a positive linear map of the weights, which never spreads two sets of
  # log-weights apart; so errors add up at worst, about six roundings a step, of numbers
  # as large as the largest log-weight.
  largest = max(np.abs(states.alpha).max(), np.abs(states.beta).max())
  steps = np.arange(1, 10_001)[:, None]
  bound = 6 * steps * largest * np.finfo(np.float32).eps / 2
  assert (np.abs(np.asarray(narrow, np.float64) - wide) <= bound).all()


@METHOD
@pytest.mark.parametrize("values", [[3e38, -3e38, 3e38], [-3e38, -3.1e38, -3e38]])
def test_log_likelihoods_as_large_as_float32_do_not_overflow(method, values):
  state = method.update(method.init(3), jnp.array(values, jnp.float32))
  weights = _weights(method, state)
  assert weights[0] == pytest.approx(weights[2], rel=1e-6)
  assert weights[0] > weights[1] and weights.sum() == pytest.approx(1.0, rel=1e-6)


def test_large_log_likelihoods_keep_the_weights_digits():
  # Only differences count: near 2**20 float32 has steps of 1/8.
  values = jnp.array([0.0, -0.5, -1.25])
  method = switch()
  small = method.update(method.init(3), values)
  _same(method.update(method.init(3), values + 2.0**20), small)


def test_the_count_saturates():
  largest = np.iinfo(np.int32).max
  state = switch().init(3)._replace(count=jnp.array(largest, jnp.int32))
  state = switch().update(state, jnp.array([0.0, 1.0, 2.0]))
  assert int(state.count) == largest and state.count.dtype == jnp.int32
  assert np.isfinite(state.alpha).all() and np.isfinite(state.beta).all()


@METHOD
@pytest.mark.parametrize("state_type", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("type_", ["float32", "float64", "bfloat16", "float16"])
def test_state_types_never_change(x64, method, state_type, type_):
  state = method.init(3, jnp.dtype(state_type))
  values = jnp.array([-1.0, -2.0, -jnp.inf], jnp.dtype(type_))
  new = method.update(state, values)
  types = [[leaf.dtype for leaf in jax.tree.leaves(tree)] for tree in (state, new)]
  assert types[0] == types[1]
  wide = jnp.float64 if state_type == "float64" else jnp.float32
  assert method.log_weights(new).dtype == wide


@METHOD
def test_float64_without_x64_is_float32(method):
  assert method.log_weights(method.init(3, np.float64)).dtype == jnp.float32


@REPEATABLE
@given(
  data=hnp.arrays(np.float32, (6, 4), elements=st.floats(-30, 30, width=32)),
  order=st.permutations(range(4)),
)
def test_the_order_of_the_heads_does_not_matter(data, order):
  for method in METHODS.values():
    _, log_weights = _scan(method, method.init(4), data)
    _, permuted = _scan(method, method.init(4), data[:, order])
    # Sums are taken in another order.
    np.testing.assert_allclose(permuted, log_weights[:, order], rtol=2e-5, atol=1e-5)


@REPEATABLE
@given(
  data=hnp.arrays(np.int16, (6, 4), elements=st.integers(-30, 30)),
  shift=hnp.arrays(np.int16, (6, 1), elements=st.integers(-1000, 1000)),
)
def test_only_differences_of_log_likelihoods_matter(data, shift):
  # Integers, so that the shift itself is exact in float32.
  moved = (data + shift).astype(np.float32)
  for method in METHODS.values():
    _same(
      _scan(method, method.init(4), moved),
      _scan(method, method.init(4), data.astype(np.float32)),
    )


@REPEATABLE
@given(data=hnp.arrays(np.float32, (6, 4), elements=st.floats(width=32)))
def test_whatever_is_observed_the_weights_are_normalised(data):
  for method in METHODS.values():
    states, log_weights = _scan(method, method.init(4), data)
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(states))
    sums = np.exp(np.asarray(log_weights, np.float64)).sum(1)
    np.testing.assert_allclose(sums, 1.0, atol=1e-6)


# --- jax -----------------------------------------------------------------------------


@METHOD
def test_scan_equals_a_loop(method):
  log_likelihoods = _random_log_likelihoods(12, 3).astype(np.float32)
  _, log_weights = _scan(method, method.init(3), log_likelihoods)
  state, loop = method.init(3), []
  for row in log_likelihoods:
    state = method.update(state, row)
    loop.append(method.log_weights(state))
  np.testing.assert_allclose(log_weights, np.stack(loop), rtol=1e-5, atol=1e-6)


@METHOD
def test_vmap_equals_one_by_one(method):
  log_likelihoods = _random_log_likelihoods(5, 3).astype(np.float32)
  states = jax.vmap(lambda _: method.init(3))(jnp.arange(5))
  states = jax.vmap(method.update)(states, log_likelihoods)
  log_weights = jax.vmap(method.log_weights)(states)
  for row, got in zip(log_likelihoods, log_weights, strict=True):
    want = method.log_weights(method.update(method.init(3), row))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@METHOD
def test_an_averaging_is_a_constant_to_inject_hyperparams(method):
  seen = []

  def factory(learning_rate, averaging):
    seen.append(averaging)
    return optax.scale(learning_rate)

  optimizer = optax.inject_hyperparams(factory)(learning_rate=0.1, averaging=method)
  state = optimizer.init(jnp.ones(2, jnp.bfloat16))
  assert set(state.hyperparams) == {"learning_rate"}
  assert all(one is method for one in seen) and seen


@METHOD
def test_an_averaging_shows_its_numbers_and_pickles(method):
  import pickle

  copy = pickle.loads(pickle.dumps(method))
  _same(
    copy.update(copy.init(2), [0.0, 1.0]), method.update(method.init(2), [0.0, 1.0])
  )
  assert "0.999" in repr(switch())


# --- bad input -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
@pytest.mark.parametrize(
  ("factory", "call"), [(switch, r"switch\(theta"), (fixed_share, r"fixed_share\(rate")]
)
def test_probabilities_outside_0_1_are_refused(factory, call, value):
  with pytest.raises(
    ValueError, match=rf"{call}=\.\.\.\) must be between 0 and 1, got"
  ):
    factory(value)


@pytest.mark.parametrize(
  "factory", [switch, bayes, functools.partial(fixed_share, 0.1)]
)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_likelihood_scales_that_are_not_positive_are_refused(factory, value):
  with pytest.raises(ValueError, match=r"likelihood_scale=\.\.\.\) must be"):
    factory(likelihood_scale=value)


@pytest.mark.parametrize("value", ["0.9", None, True, jnp.float32(0.9)])
def test_a_theta_that_is_no_python_number_is_refused(value):
  with pytest.raises(
    TypeError, match=r"switch\(theta=\.\.\.\) must be a Python number"
  ):
    switch(value)


def test_a_traced_theta_is_refused():
  with pytest.raises(TypeError, match="fixed when the program is traced"):
    jax.jit(lambda theta: switch(theta).init(2))(0.9)


@METHOD
def test_log_likelihoods_of_another_shape_are_refused(method):
  state = method.init(3)
  for shape in [(), (1,), (4,), (3, 32)]:
    with pytest.raises(ValueError, match=r"must have shape \(3,\), one mean log-like"):
      method.update(state, jnp.zeros(shape))


@METHOD
def test_no_heads_are_refused(method):
  with pytest.raises(ValueError, match="must be at least 1, got 0"):
    method.init(0)
  with pytest.raises(TypeError, match="must be an integer"):
    method.init(2.5)


def test_the_states_are_the_documented_ones():
  assert isinstance(switch().init(2), _averaging.SwitchState)
  assert isinstance(bayes().init(2), _averaging.BayesState)
  assert isinstance(fixed_share(0.1).init(2), _averaging.FixedShareState)


@pytest.mark.parametrize(
  "averaging", [switch(), switch(0.0), bayes(), fixed_share(0.1)]
)
def test_a_state_that_lost_heads_sums_to_one(averaging):
  state = averaging.update(averaging.init(4), jnp.array([-1.0, -2.0, -3.0, -0.5]))
  before = averaging.log_weights(state)[:2]
  lost = jax.tree.map(lambda leaf: leaf[:2] if leaf.ndim else leaf, state)
  kept = lost.renormalised()
  leaves = [leaf for leaf in jax.tree.leaves(kept) if leaf.ndim]
  assert abs(float(jax.nn.logsumexp(jnp.concatenate(leaves)))) < 1e-6
  weights = averaging.log_weights(kept)
  np.testing.assert_allclose(weights, jax.nn.log_softmax(before), atol=1e-6)
  none = jax.tree.map(lambda x: jnp.full_like(x, -jnp.inf) if x.ndim else x, lost)
  uniform = averaging.log_weights(none.renormalised())
  np.testing.assert_allclose(uniform, jnp.log(jnp.full(2, 0.5)), atol=1e-6)
