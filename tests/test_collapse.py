"""Collapse: kept heads go on as they were, and the others are gone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alrao_jax as alrao
from alrao_jax._heads import TrackHeadsState
from alrao_jax._rates import find_rates
from alrao_jax._tree import find_state


@pytest.fixture(autouse=True)
def optax_may_promote(request):
  """Adam's bias correction and MultiSteps' mean mix floats with counters."""
  names = ("adam", "multi_steps", "injected", "counters")
  promotes = any(word in request.node.name for word in names)
  with jax.numpy_dtype_promotion("standard" if promotes else "strict"):
    yield


N = 5
KEY = jax.random.key(0)
KEPT = (1, 3)
LOG_LIKELIHOODS = np.array([-1.5, -0.4, -1.2, -0.7, -2.0], np.float32)


def make_params(num_heads=N):
  shapes = {
    "dense": {"kernel": (4, 7), "bias": (7,)},
    "norm": {"bias": (7,), "scale": (7,)},
    "out": {"alrao_heads": {"kernel": (num_heads, 7, 3), "bias": (num_heads, 3)}},
  }
  leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(
    treedef, [jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
  )


def is_head(path, _):
  return "head" if "alrao_heads" in jax.tree_util.keystr(path) else "body"


def heads_alone(params):
  return jax.tree_util.tree_map_with_path(is_head, params)


def body_frozen(params):
  return jax.tree.map(lambda label: label == "head", heads_alone(params))


OPTIMIZERS = {
  "sgd": lambda: alrao.alrao(KEY),
  "momentum": lambda: alrao.alrao(KEY, optax.trace(0.9)),
  "adam": lambda: alrao.alrao(KEY, optax.scale_by_adam(), 1e-6, 1.0),
  "overrides": lambda: alrao.alrao(
    KEY, units=alrao.UnitOptions(overrides=(("dense/kernel", (0,)),))
  ),
  "clipped_adam": lambda: alrao.alrao(
    KEY,
    alrao.per_head(optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())),
  ),
  "multi_steps": lambda: optax.MultiSteps(alrao.alrao(KEY, optax.trace(0.9)), 2),
  "masked": lambda: optax.chain(
    optax.masked(optax.trace(0.9), body_frozen),
    alrao.alrao(KEY, averaging=alrao.fixed_share(0.01)),
  ),
  "frozen_body": lambda: optax.partition(
    {"head": alrao.alrao(KEY, averaging=alrao.bayes()), "body": optax.set_to_zero()},
    heads_alone,
  ),
  "partition": lambda: optax.chain(
    optax.partition(
      {
        "body": optax.chain(optax.trace(0.9), alrao.scale_by_unit_rates(KEY)),
        "head": alrao.scale_by_unit_rates(KEY, 1e-4, 1.0),
      },
      heads_alone,
    ),
    alrao.track_heads(),
  ),
  "guarded": lambda: alrao.alrao(KEY, optax.trace(0.9), guard=alrao.guard(0.01)),
  "injected": lambda: optax.inject_hyperparams(alrao.alrao, static_args=("key",))(KEY),
}

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make_step(optimizer):
  @jax.jit
  def step(params, opt_state):
    grads = jax.tree.map(lambda p: jnp.cos(3 * p), params)
    observed = jnp.asarray(LOG_LIKELIHOODS)
    num_heads = params["out"]["alrao_heads"]["bias"].shape[0]
    observed = observed if num_heads == N else observed[np.array(KEPT)]
    updates, opt_state = optimizer.update(
      grads, opt_state, params, head_log_likelihoods=observed
    )
    return optax.apply_updates(params, updates), opt_state

  return step


def run(step, params, opt_state, steps=3):
  for _ in range(steps):
    params, opt_state = step(params, opt_state)
  return params, opt_state


@functools.cache
def compiled(name):
  optimizer = OPTIMIZERS[name]()
  return optimizer, make_step(optimizer)


@functools.cache
def trained(name):
  optimizer, step = compiled(name)
  params = make_params()
  return optimizer, *run(step, params, jax.jit(optimizer.init)(params))


@functools.cache
def collapsed(name):
  optimizer, params, opt_state = trained(name)
  opt_state, params = alrao.collapse(optimizer, opt_state, params, KEPT)
  return params, opt_state


def shapes_of(tree):
  return jax.tree.map(lambda x: (jnp.shape(x), x.dtype), tree)


@each_optimizer
def test_collapsed_state_is_of_the_form_of_a_fresh_one(name):
  optimizer, _, _ = trained(name)
  params, opt_state = collapsed(name)
  fresh = jax.eval_shape(optimizer.init, params)
  assert jax.tree.structure(opt_state) == jax.tree.structure(fresh)
  assert shapes_of(opt_state) == shapes_of(fresh)


@each_optimizer
def test_kept_heads_and_body_train_on_as_if_none_had_gone(name):
  _, params, opt_state = trained(name)
  _, step = compiled(name)
  whole, _ = run(step, params, opt_state)
  fewer, _ = run(step, *collapsed(name))
  # Every operation on a head is the same, in the same order: to the last bit.
  chex.assert_trees_all_equal(fewer, alrao.take_heads(whole, KEPT))


@each_optimizer
def test_keeping_all_heads_changes_nothing(name):
  optimizer, params, opt_state = trained(name)
  kept = alrao.collapse(optimizer, opt_state, params, keep=N)
  chex.assert_trees_all_equal(kept, (opt_state, params))


@each_optimizer
def test_kept_weights_stay_proportional_and_sum_to_one(name):
  _, _, opt_state = trained(name)
  before = alrao.log_weights(opt_state)[np.array(KEPT)]
  _, opt_state = collapsed(name)
  after = alrao.log_weights(opt_state)
  # A subtraction each, of numbers below 8: 2 ulp of 4.
  np.testing.assert_allclose(after[0] - after[1], before[0] - before[1], atol=1e-6)
  np.testing.assert_allclose(jnp.exp(after).sum(), 1, atol=1e-6)


@each_optimizer
def test_training_goes_on_with_one_further_compilation(name):
  trained(name)
  _, step = compiled(name)
  run(step, *collapsed(name))
  assert step._cache_size() == 2


@each_optimizer
def test_collapse_by_indices_compiles(name):
  optimizer, params, opt_state = trained(name)
  eager = collapsed(name)
  jitted = jax.jit(lambda p, s: alrao.collapse(optimizer, s, p, KEPT)[::-1])(
    params, opt_state
  )
  assert jax.tree.structure(jitted) == jax.tree.structure(eager)
  # The weights' normalisation alone is arithmetic: a few ulp of numbers below 8.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6), jitted, eager
  )


@pytest.mark.parametrize("keep", [1, 2, (4,), (2, 0, 4)])
def test_rates_of_kept_heads_and_of_the_body_stay(keep):
  optimizer, params, opt_state = trained("momentum")
  kept = alrao.best_heads(opt_state, keep) if isinstance(keep, int) else keep
  before = find_rates(opt_state)
  rates = alrao.take_heads(alrao.unit_rates(opt_state, params), kept)
  opt_state, params = alrao.collapse(optimizer, opt_state, params, keep)
  after = find_rates(opt_state)
  np.testing.assert_array_equal(after.ladder, before.ladder[np.array(sorted(kept))])
  np.testing.assert_array_equal(after.quantiles, before.quantiles)
  assert_rates_close(alrao.unit_rates(opt_state, params), rates)


def assert_rates_close(found, expected):
  # Of equal quantiles; but exp of shorter vectors may round otherwise, 4 ulp.
  rtol = 4 * np.finfo(np.float32).eps
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), found, expected
  )


def test_indices_in_any_order_keep_the_ladder_ascending():
  optimizer, params, opt_state = trained("momentum")
  shuffled = alrao.collapse(optimizer, opt_state, params, KEPT[::-1])
  chex.assert_trees_all_equal(shuffled[::-1], collapsed("momentum"))


def test_the_guard_goes_on_as_it_was():
  _, _, opt_state = trained("guarded")
  before = find_state(opt_state, alrao.GuardUnitsState, "guard_units")
  after = find_state(collapsed("guarded")[1], alrao.GuardUnitsState, "guard_units")
  assert before.trips.any()
  chex.assert_trees_all_equal(after, before)


def test_a_number_keeps_the_best_heads_in_their_order():
  optimizer, params, opt_state = trained("sgd")
  _, kept = alrao.collapse(optimizer, opt_state, params, keep=2)
  assert alrao.best_heads(opt_state, 2) == (1, 3)  # by LOG_LIKELIHOODS
  chex.assert_trees_all_equal(kept, alrao.take_heads(params, (1, 3)))


def test_momenta_are_sliced_like_their_parameters():
  optimizer, params, opt_state = trained("momentum")
  collapsed, _ = alrao.collapse(optimizer, opt_state, params, KEPT)
  trace = find_state(opt_state, optax.TraceState, "trace").trace
  found = find_state(collapsed, optax.TraceState, "trace").trace
  chex.assert_trees_all_equal(found, alrao.take_heads(trace, KEPT))


def test_per_head_counters_are_sliced():
  optimizer, params, opt_state = trained("clipped_adam")
  opt_state, _ = alrao.collapse(optimizer, opt_state, params, KEPT)
  counts = find_state(opt_state, alrao.PerHeadState, "per_head").heads[1].count
  np.testing.assert_array_equal(counts, [3, 3])


def test_switch_keeps_the_odds_of_all_its_entries():
  optimizer, params, opt_state = trained("sgd")
  before = find_state(opt_state, alrao.SwitchState, "track_heads")
  opt_state, _ = alrao.collapse(optimizer, opt_state, params, KEPT)
  after = find_state(opt_state, alrao.SwitchState, "track_heads")
  entries = lambda s, i: np.concatenate([s.alpha[i], s.beta[i]])  # noqa: E731
  old, new = entries(before, np.array(KEPT)), entries(after, np.array([0, 1]))
  # One constant was subtracted from all; 2 ulp of numbers below 16.
  np.testing.assert_allclose(new - new[0], old - old[0], atol=2e-6)
  np.testing.assert_allclose(np.exp(new).sum(), 1, atol=1e-6)
  assert int(after.count) == int(before.count)


@pytest.mark.parametrize("averaging", [alrao.bayes(), alrao.switch(theta=0.0)])
def test_heads_without_weight_share_alike(averaging):
  optimizer = alrao.track_heads(averaging)
  params = make_params()
  out = jnp.where(jnp.arange(N) < 3, -1.0, -jnp.inf)
  _, opt_state = jax.jit(optimizer.update)(
    params, jax.jit(optimizer.init)(params), params, head_log_likelihoods=out
  )
  opt_state, params = alrao.collapse(optimizer, opt_state, params, (3, 4))
  np.testing.assert_allclose(jnp.exp(alrao.log_weights(opt_state)), 0.5, rtol=1e-6)
  _, opt_state = jax.jit(optimizer.update)(
    params, opt_state, params, head_log_likelihoods=jnp.log(jnp.array([0.6, 0.2]))
  )
  np.testing.assert_allclose(
    jnp.exp(alrao.log_weights(opt_state)), [0.75, 0.25], rtol=1e-6
  )


def test_one_head_has_weight_one_and_keeps_it():
  optimizer, params, opt_state = trained("sgd")
  opt_state, params = alrao.collapse(optimizer, opt_state, params)
  assert alrao.log_weights(opt_state).tolist() == [0.0]
  _, opt_state = jax.jit(optimizer.update)(
    params, opt_state, params, head_log_likelihoods=jnp.array([-3.0])
  )
  assert alrao.log_weights(opt_state).tolist() == [0.0]


def test_collapse_twice_is_collapse_once():
  optimizer, params, opt_state = trained("momentum")
  once = alrao.collapse(optimizer, opt_state, params, (3,))
  twice = alrao.collapse(optimizer, opt_state, params, KEPT)
  twice = alrao.collapse(optimizer, *twice, (KEPT.index(3),))
  chex.assert_trees_all_equal(once[1], twice[1])
  # Two normalisations instead of one; a single head's are both exact.
  assert alrao.log_weights(twice[0]).tolist() == alrao.log_weights(once[0]).tolist()


# Of equal heads, of a clear winner and of two heads far apart.
OBSERVED = ([0.0] * N, [-3.0, -2.5, 0.0, -2.0, -3.0], [0.0, -9.0, -9.0, -9.0, -0.1])


def observe(optimizer, params, opt_state, observed, steps=1):
  """Steps that see these log-likelihoods; the parameters stay."""
  return observing(optimizer)(params, opt_state, observed, steps)


@functools.cache
def observing(optimizer):
  @jax.jit
  def run(params, opt_state, observed, steps):
    grads = jax.tree.map(jnp.ones_like, params)
    step = lambda _, state: optimizer.update(  # noqa: E731
      grads, state, params, head_log_likelihoods=observed
    )[1]
    return jax.lax.fori_loop(0, steps, step, opt_state)

  return run


@functools.cache
def recipe():
  return alrao.schedule_free_alrao(KEY)


def body_rates(opt_state, params):
  rates = alrao.unit_rates(find_rates(opt_state), params)
  return np.concatenate([np.ravel(rates["dense"]["bias"]), rates["norm"]["scale"]])


def saved_and_restored(tree):
  """Through bytes, as checkpoints go."""
  leaves, treedef = jax.tree.flatten(tree)
  leaves = [np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape) for x in leaves]
  return jax.tree.unflatten(treedef, [jnp.asarray(x) for x in leaves])


@pytest.mark.parametrize("observed", OBSERVED, ids=["equal", "winner", "apart"])
def test_collapse_moves_no_rate_that_follows_the_posterior(observed):
  optimizer = recipe()
  params = make_params()
  opt_state = observe(
    optimizer, params, optimizer.init(params), jnp.array(observed), steps=20
  )
  rates = body_rates(opt_state, params)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=0)
  for keep in (1, 2, (0, 4), 4):
    fewer_state, fewer = alrao.collapse(optimizer, opt_state, params, keep)
    close(body_rates(fewer_state, fewer), rates)
    fewer_state = saved_and_restored(fewer_state)
    num_heads = fewer["out"]["alrao_heads"]["bias"].shape[0]
    equal = jnp.zeros(num_heads)
    fewer_state = observe(optimizer, fewer, fewer_state, equal)
    close(body_rates(fewer_state, fewer), rates)
    if keep == 4:  # a second time, right after
      fewer_state, fewer = alrao.collapse(optimizer, fewer_state, fewer, 2)
      fewer_state = observe(optimizer, fewer, fewer_state, jnp.zeros(2))
      close(body_rates(fewer_state, fewer), rates)


def test_with_one_head_rates_stand_and_with_several_they_follow():
  optimizer = recipe()
  params = make_params()
  observed = jnp.array(OBSERVED[1])
  opt_state = observe(optimizer, params, optimizer.init(params), observed, steps=20)
  rates = body_rates(opt_state, params)
  state, one = alrao.collapse(optimizer, opt_state, params, 1)
  state = observe(optimizer, one, state, jnp.zeros(1), steps=30)
  np.testing.assert_allclose(body_rates(state, one), rates, rtol=1e-6)
  state, few = alrao.collapse(optimizer, opt_state, params, (2, 3, 4))
  state = observe(optimizer, few, state, jnp.array([-3.0, -3.0, 0.0]), steps=30)
  # Quantiles 1/2 to 1: half of the interval's three decades, less what is left of it.
  moved = np.log10(body_rates(state, few) / rates)
  assert (moved > 1.0).all() and (moved < 1.5).all()


def test_rates_stay_in_their_interval_and_order_after_any_collapse():
  optimizer = alrao.schedule_free_alrao(KEY, 1e-4, 1e-1, narrowest=0.2)
  params = make_params()
  opt_state = observe(
    optimizer, params, optimizer.init(params), jnp.array(OBSERVED[1]), steps=20
  )
  state, few = alrao.collapse(optimizer, opt_state, params, (0, 4))  # as far as can be
  for observed in ([0.0, -5.0], [-5.0, 0.0]):
    state = observe(optimizer, few, state, jnp.array(observed), steps=20)
    low, high = find_rates(state).unit_distribution
    assert 1e-4 <= low * (1 + 1e-6) < high <= 1e-1 * (1 + 1e-6)
    # A fifth of three decades at least, to rounding.
    assert np.log10(high / low) > 0.6 * (1 - 1e-3)


def test_injected_bounds_move_rates_after_a_collapse_too():
  make = optax.inject_hyperparams(alrao.schedule_free_alrao, static_args=("key",))
  optimizer = make(KEY, 1e-4, max_learning_rate=1e-1)
  params = make_params()
  opt_state = observe(
    optimizer, params, optimizer.init(params), jnp.array(OBSERVED[1]), steps=5
  )
  state, one = alrao.collapse(optimizer, opt_state, params, 1)
  before = find_rates(state).unit_distribution
  state.hyperparams["max_learning_rate"] = jnp.asarray(0.05, jnp.float32)
  state = observe(optimizer, one, state, jnp.zeros(1))
  after = find_rates(state).unit_distribution
  np.testing.assert_allclose(after.max_learning_rate, before.max_learning_rate / 2)
  np.testing.assert_allclose(after.min_learning_rate, before.min_learning_rate)


@functools.cache
def two_layers():
  layer = {"alrao_heads": {"kernel": jnp.ones((N, 7, 3))}}
  optimizer = alrao.alrao(KEY)
  params = {"policy": layer, "value": jax.tree.map(jnp.copy, layer)}
  observed = {
    "policy": jnp.array([-1.0, -0.5, -0.6, -3.0, -3.0]),
    "value": jnp.array([-3.0, -3.0, -0.6, -0.5, -1.0]),
  }
  _, opt_state = jax.jit(optimizer.update)(
    params, jax.jit(optimizer.init)(params), params, head_log_likelihoods=observed
  )
  return optimizer, params, opt_state


def test_several_layers_keep_the_heads_that_are_best_together():
  optimizer, params, opt_state = two_layers()
  assert alrao.best_heads(opt_state) == (2,)  # -1.2 in all; 1 and 3 have -3.5
  before = alrao.unit_rates(opt_state, params)
  opt_state, params = alrao.collapse(optimizer, opt_state, params)
  assert_rates_close(
    alrao.unit_rates(opt_state, params), alrao.take_heads(before, (2,))
  )
  for name in ("policy", "value"):
    assert alrao.log_weights(opt_state, name).tolist() == [0.0]
  jax.jit(optimizer.update)(
    params,
    opt_state,
    params,
    head_log_likelihoods={"policy": jnp.zeros(1), "value": jnp.zeros(1)},
  )


def test_each_layers_weights_are_renormalised():
  optimizer, params, opt_state = two_layers()
  collapsed, _ = alrao.collapse(optimizer, opt_state, params, (1, 2))
  for name in ("policy", "value"):
    before = alrao.log_weights(opt_state, name)[1:3]
    np.testing.assert_allclose(
      alrao.log_weights(collapsed, name), jax.nn.log_softmax(before), atol=1e-6
    )


def test_averaging_of_ones_own_is_sliced():
  averaging = alrao.Averaging(
    init=lambda n, dtype=jnp.float32: {"sum": jnp.zeros(n, dtype)},
    update=lambda state, observed: {"sum": state["sum"] + observed},
    log_weights=lambda state: jax.nn.log_softmax(state["sum"]),
  )
  optimizer = alrao.track_heads(averaging)
  params = make_params()
  _, opt_state = jax.jit(optimizer.update)(
    params,
    jax.jit(optimizer.init)(params),
    params,
    head_log_likelihoods=jnp.asarray(LOG_LIKELIHOODS),
  )
  opt_state, _ = alrao.collapse(optimizer, opt_state, params, KEPT)
  state = find_state(opt_state, TrackHeadsState, "track_heads")
  np.testing.assert_array_equal(state.averaging["sum"], LOG_LIKELIHOODS[np.array(KEPT)])
  np.testing.assert_allclose(jnp.exp(state.log_weights).sum(), 1, atol=1e-6)


def test_vmap_over_seeds():
  optimizer, params, opt_state = trained("sgd")
  stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)  # noqa: E731
  collapse = lambda p, s: alrao.collapse(optimizer, s, p, KEPT)  # noqa: E731
  both = jax.vmap(collapse)(stack(params), stack(opt_state))
  chex.assert_trees_all_equal(
    jax.tree.map(lambda x: x[1], both[1]), collapse(params, opt_state)[1]
  )


@pytest.mark.parametrize(
  ("keep", "error", "message"),
  [
    (N + 1, ValueError, r"keep=...\) must be at most num_heads = 5, got 6"),
    (0, ValueError, r"keep=...\) must be at least 1, got 0"),
    (1.0, TypeError, r"keep=...\) must be an integer"),
    ("best", TypeError, r"keep=...\) must be an integer"),
    ((), ValueError, r"different indices from 0 to 4, got \(\)"),
    ((1, 1), ValueError, r"different indices from 0 to 4, got \(1, 1\)"),
    ((-1,), ValueError, r"different indices from 0 to 4, got \(-1,\)"),
    ((0, 5), ValueError, r"different indices from 0 to 4, got \(0, 5\)"),
    ((0.5,), TypeError, "indices of heads, known before tracing"),
  ],
)
def test_wrong_keep_is_an_error(keep, error, message):
  optimizer, params, opt_state = trained("sgd")
  with pytest.raises(error, match=message):
    alrao.collapse(optimizer, opt_state, params, keep)


def test_the_best_heads_must_be_known():
  optimizer, params, opt_state = trained("sgd")
  with pytest.raises(TypeError, match="outside of jax.jit"):
    jax.jit(lambda p, s: alrao.collapse(optimizer, s, p, 1))(params, opt_state)
  with pytest.raises(TypeError, match="known before tracing"):
    jax.jit(lambda k: alrao.collapse(optimizer, opt_state, params, k))(jnp.array([1]))
  with pytest.raises(TypeError, match="known before tracing"):
    jax.jit(lambda k: alrao.collapse(optimizer, opt_state, params, k))(1)


def test_parameters_without_heads_are_an_error():
  optimizer = alrao.alrao(KEY, heads=False)
  params = {"dense": make_params()["dense"]}
  with pytest.raises(ValueError, match="must have heads, got no path"):
    alrao.collapse(optimizer, jax.jit(optimizer.init)(params), params)


def test_a_state_of_other_parameters_is_an_error():
  optimizer, params, opt_state = trained("momentum")
  wider = {**params, "dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
  with pytest.raises(ValueError, match=r"got '1/0/trace/dense/bias' of shape \(7,\)"):
    alrao.collapse(optimizer, opt_state, wider)
  renamed = {**params, "norm": params["dense"], "dense": params["norm"]}
  with pytest.raises(ValueError, match="must be the optimizer's state"):
    alrao.collapse(optimizer, opt_state, renamed)
  deeper = {**params, "more": {"bias": jnp.ones(3)}}
  with pytest.raises(ValueError, match="which has .* arrays, got"):
    alrao.collapse(optimizer, opt_state, deeper)
  sgd = alrao.alrao(KEY)
  swapped = {"norm": params["norm"], "other": params["dense"], "out": params["out"]}
  with pytest.raises(ValueError, match="of other names"):
    alrao.collapse(sgd, jax.jit(sgd.init)(params), swapped)


def test_collapsed_parameters_with_the_old_state_are_an_error():
  optimizer, params, opt_state = trained("sgd")
  _, fewer = alrao.collapse(optimizer, opt_state, params, KEPT)
  with pytest.raises(ValueError, match="must be the optimizer's state"):
    alrao.collapse(optimizer, opt_state, fewer)


def test_a_state_that_mixes_the_heads_is_an_error():
  optimizer = optax.chain(
    optax.flatten(optax.trace(0.9)), alrao.scale_by_unit_rates(KEY), alrao.track_heads()
  )
  params = make_params()
  with pytest.raises(ValueError, match="mixes them, got '0/trace'.*per_head"):
    alrao.collapse(optimizer, jax.jit(optimizer.init)(params), params)


def test_take_heads_leaves_all_else_alone():
  tree = {"a": {"mean": np.arange(3)}, "out": {"alrao_heads": {"mean": np.arange(3)}}}
  taken = alrao.take_heads(tree, (2, 0))
  assert taken["a"] is not None and taken["a"]["mean"] is tree["a"]["mean"]
  assert taken["out"]["alrao_heads"]["mean"].tolist() == [0, 2]


def test_take_heads_refuses_arrays_without_these_heads():
  with pytest.raises(ValueError, match=r"kept=...\) must be different indices"):
    alrao.take_heads({"alrao_heads": jnp.ones(2)}, (2,))
  with pytest.raises(ValueError, match="scalar at 'alrao_heads'"):
    alrao.take_heads({"alrao_heads": jnp.ones(())}, (0,))


def test_of_equal_heads_the_slower_are_best():
  optimizer = alrao.alrao(KEY)
  assert alrao.best_heads(optimizer.init(make_params()), 3) == (0, 1, 2)


def test_best_heads_refuses_more_than_there_are():
  optimizer = alrao.alrao(KEY)
  with pytest.raises(ValueError, match="at most num_heads = 5, got 6"):
    alrao.best_heads(optimizer.init(make_params()), 6)


def slow_leader(weights, threshold):
  """Counts steps as the docstring has it, in plain Python."""
  head, steps, result = None, 0, []
  for row in weights:
    best = int(np.argmax(row))
    steps = (steps + 1 if best == head else 1) if row[best] >= threshold else 0
    head = best
    result.append((head, steps))
  return result


def test_the_leader_is_followed_as_plain_python_does():
  weights = np.random.default_rng(0).dirichlet(np.full(3, 0.05), 400)
  weights = np.repeat(weights, 2, axis=0).astype(np.float32)

  def step(leader, row):
    leader = alrao.follow_leader(jnp.log(row), leader, threshold=0.9)
    return leader, leader

  start = alrao.follow_leader(jnp.log(jnp.full(3, 1 / 3)), threshold=0.9)
  _, leaders = jax.lax.scan(step, start, jnp.asarray(weights))
  expected = slow_leader(weights, 0.9)
  assert max(steps for _, steps in expected) > 3
  assert list(zip(leaders.head.tolist(), leaders.steps.tolist(), strict=True)) == (
    expected
  )


def test_the_leader_of_one_head_has_led_from_the_first_step():
  leader = alrao.follow_leader(jnp.zeros(1))
  assert (int(leader.head), int(leader.steps)) == (0, 1)


@pytest.mark.parametrize("threshold", [-0.1, 1.5])
def test_thresholds_are_probabilities(threshold):
  with pytest.raises(ValueError, match="between 0 and 1"):
    alrao.follow_leader(jnp.zeros(1), threshold=threshold)


def test_a_mapping_has_no_single_leader():
  with pytest.raises(ValueError, match=r"shape \(num_heads,\), got \(2, 3\)"):
    alrao.follow_leader(jnp.zeros((2, 3)))
