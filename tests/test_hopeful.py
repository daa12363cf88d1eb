"""The rule by which heads leave while the network trains."""

import itertools
import os
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import alrao_jax as alrao
import alrao_jax.linen
import alrao_jax.nnx

N = 5
KEY = jax.random.key(0)
LOG_LIKELIHOODS = jnp.array([-9.0, -2.0, -0.5, -1.0, -9.0])


def state_of(*weights):
  """A state with these posteriors, of MultiHeads "0", "1", ... if there are several."""
  rows = [jnp.log(jnp.asarray(row)) for row in weights]
  posterior = {str(i): row for i, row in enumerate(rows)} if len(rows) > 1 else rows[0]
  return alrao.TrackHeadsState(posterior, None, None, None)


def draw(generator, num_heads):
  """A posterior that leaves some heads little hope."""
  weights = np.exp(generator.normal(scale=3, size=num_heads)).astype(np.float32)
  return weights / weights.sum()


def allowed(rule, size, num_heads):
  used = [other for other in rule.sizes if size <= other < num_heads]
  return rule.risk * len(used) / len(rule.sizes)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_fewest_heads_stay_whose_loss_the_risk_allows(num_layers):
  generator = np.random.default_rng(0)
  counts = set()
  for _ in range(100):
    rule = alrao.hopeful(generator.uniform(0.01, 0.5), sizes=(3, 2, 1))
    rows = [draw(generator, N) for _ in range(num_layers)]
    kept = alrao.best_heads(state_of(*rows), rule)
    weights = np.sum(rows, axis=0, dtype=np.float64)
    thrown = {
      some: weights.sum() - weights[list(some)].sum()
      for size in rule.sizes
      for some in itertools.combinations(range(N), size)
      if weights.sum() - weights[list(some)].sum() <= allowed(rule, size, N)
    }
    fewest = min(map(len, thrown), default=N)
    best = {some: loss for some, loss in thrown.items() if len(some) == fewest}
    assert kept == min(best, key=lambda some: best[some], default=tuple(range(N)))
    counts.add(len(kept))
  assert counts == {1, 2, 3, N}


def test_all_removals_together_throw_away_at_most_the_risk():
  generator = np.random.default_rng(1)
  most = 0.0
  for _ in range(100):
    rule = alrao.hopeful(0.3, sizes=(5, 2, 1))
    num_heads, total = 10, 0.0
    for _ in range(20):
      weights = draw(generator, num_heads)
      kept = alrao.best_heads(state_of(weights), rule)
      total += 1.0 - weights.astype(np.float64)[list(kept)].sum()
      num_heads = len(kept)
    assert total <= rule.risk + 1e-6  # weights in float32
    most = max(most, total)
  assert most > 0.6 * rule.risk  # the bound is no idle one


@pytest.mark.parametrize("num_heads", [2, 10])
def test_the_prior_keeps_heads_at_first(num_heads):
  averaging, rule = alrao.switch(theta=1.0), alrao.hopeful(0.07)  # no ties
  observed = jnp.where(jnp.arange(num_heads) == 1, 0.0, -jnp.inf)
  update = jax.jit(averaging.update)
  state, left = averaging.init(num_heads), None
  for t in range(1, 40):
    state = update(state, observed)
    kept = alrao.best_heads(state_of(np.exp(averaging.log_weights(state))), rule)
    if left is None and len(kept) < num_heads:
      left, weights = t, np.exp(averaging.log_weights(state))
  # Each loser has 1 / (N (t + 1)), whatever the data say.
  np.testing.assert_allclose(weights[0], 1 / (num_heads * (left + 1)), rtol=1e-5)
  bound = allowed(rule, 1, num_heads)
  losers = (num_heads - 1) / num_heads
  assert left == next(t for t in range(1, 40) if losers / (t + 1) <= bound)


@pytest.mark.parametrize(
  "averaging", [alrao.switch(0.9), alrao.bayes(), alrao.fixed_share(0.1)]
)
def test_the_posterior_goes_on_as_if_lost_heads_had_diverged_for_good(averaging):
  tracker, kept = alrao.track_heads(averaging), np.array([1, 3])
  params = {"out": {"alrao_heads": {"bias": jnp.zeros((N, 2))}}}
  update = jax.jit(tracker.update)
  rows = np.random.default_rng(2).normal(size=(6, N)).astype(np.float32)
  whole = tracker.init(params)
  for row in rows[:3]:
    _, whole = update(params, whole, head_log_likelihoods=row)
  state, fewer = alrao.collapse(tracker, whole, params, kept)
  for row in rows[3:]:
    _, state = update(fewer, state, head_log_likelihoods=row[kept])
    lost = np.full(N, -np.inf, np.float32)
    lost[kept] = row[kept]
    _, whole = update(params, whole, head_log_likelihoods=lost)
    expected = jax.nn.log_softmax(alrao.log_weights(whole)[kept])
    # Some ten roundings of numbers below 8.
    np.testing.assert_allclose(alrao.log_weights(state), expected, atol=1e-5)


def make_params(num_heads=N):
  return {
    "dense": {"kernel": jnp.ones((4, 7)), "bias": jnp.ones(7)},
    "out": {"alrao_heads": {"kernel": jnp.arange(num_heads * 14.0).reshape(-1, 7, 2)}},
  }


def trained(optimizer, params, observed=LOG_LIKELIHOODS):
  update = jax.jit(optimizer.update)
  opt_state = jax.jit(optimizer.init)(params)
  for _ in range(3):
    grads = jax.tree.map(jnp.cos, params)
    updates, opt_state = update(grads, opt_state, params, head_log_likelihoods=observed)
    params = optax.apply_updates(params, updates)
  return opt_state, params


def test_nothing_happens_without_a_hopeless_head():
  optimizer = alrao.alrao(KEY)
  opt_state, params = trained(optimizer, make_params(), jnp.zeros(N))
  kept = alrao.collapse(optimizer, opt_state, params, alrao.hopeful())
  assert kept[0] is opt_state and kept[1] is params
  one = alrao.collapse(optimizer, opt_state, params, 1)
  kept = alrao.collapse(optimizer, *one, alrao.hopeful())
  assert kept[0] is one[0] and kept[1] is one[1]


def test_the_rule_removes_what_its_indices_remove():
  optimizer = alrao.schedule_free_alrao(KEY, averaging=alrao.bayes())
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())  # it keeps z
  opt_state, params = trained(optimizer, half)
  rule = alrao.hopeful(0.1, sizes=(2,))
  assert alrao.best_heads(opt_state, rule) == (2, 3)
  fewer = alrao.collapse(optimizer, opt_state, params, rule)
  chex.assert_trees_all_equal(
    fewer, alrao.collapse(optimizer, opt_state, params, (2, 3))
  )
  # And everything that is not the posterior is sliced, nothing more.
  for name in ("average", "z"):
    found = getattr(fewer[0], name)["out"]["alrao_heads"]["kernel"]
    held = getattr(opt_state, name)["out"]["alrao_heads"]["kernel"]
    np.testing.assert_array_equal(found, held[2:4])
    chex.assert_trees_all_equal(
      getattr(fewer[0], name)["dense"], getattr(opt_state, name)["dense"]
    )
  squares = (fewer[0].inner[0][1].nu, opt_state.inner[0][1].nu)
  found, held = (tree["out"]["alrao_heads"]["kernel"] for tree in squares)
  np.testing.assert_array_equal(found, held[2:4])
  found, held = fewer[0].inner[1].rates, opt_state.inner[1].rates
  chex.assert_trees_all_equal(found, held._replace(ladder=held.ladder[2:4]))


def test_traced_values_are_refused_with_what_to_do():
  optimizer = alrao.alrao(KEY)
  opt_state, params = trained(optimizer, make_params())
  collapse = jax.jit(lambda s, p: alrao.collapse(optimizer, s, p, alrao.hopeful()))
  with pytest.raises(
    TypeError, match=r"between two steps, outside of jax\.jit"
  ) as told:
    collapse(opt_state, params)
  assert "\n" not in str(told.value)


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    head = alrao.linen.MultiHead(nn.Dense(2, use_bias=False), N, name="out")
    return head(nn.Dense(7, name="dense")(x))


def test_a_train_state_loses_hopeless_heads():
  tx = alrao.alrao(KEY, averaging=alrao.bayes())
  params = make_params()
  state = alrao.linen.TrainState.create(apply_fn=Net().apply, params=params, tx=tx)
  assert alrao.linen.collapse(state, alrao.hopeful()) is state
  state = state.apply_gradients(grads=params, head_log_likelihoods=9 * LOG_LIKELIHOODS)
  state = alrao.linen.collapse(state, alrao.hopeful(sizes=(2,)))
  assert state.apply_fn({"params": state.params}, jnp.ones((3, 4))).num_heads == 2


def test_an_nnx_model_loses_hopeless_heads():
  model = alrao.nnx.MultiHead(
    lambda rngs: nnx.Linear(4, 3, rngs=rngs), num_heads=N, rngs=nnx.Rngs(0)
  )
  tx = alrao.alrao(KEY, averaging=alrao.bayes())
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  kernel = model.alrao_heads.kernel[...]
  alrao.nnx.collapse(model, optimizer, alrao.hopeful())
  assert model.alrao_heads.kernel[...] is kernel
  grads = nnx.state(model, nnx.Param)
  optimizer.update(model, grads, head_log_likelihoods=9 * LOG_LIKELIHOODS)
  alrao.nnx.collapse(model, optimizer, alrao.hopeful(sizes=(2,)))
  assert model.num_heads == 2 and model(jnp.ones((3, 4))).num_heads == 2


SPLIT = """
import jax, jax.numpy as jnp, numpy as np
import alrao_jax as alrao

auto = jax.sharding.AxisType.Auto
mesh = jax.make_mesh((2, 2), ("data", "heads"), (auto, auto))
optimizer = alrao.alrao(jax.random.key(0), averaging=alrao.bayes())
params = {"out": {"alrao_heads": {"kernel": jnp.arange(24.0).reshape(4, 3, 2)}}}
_, state = jax.jit(optimizer.update)(
  params, optimizer.init(params), params,
  head_log_likelihoods=jnp.array([-90.0, -1.0, -2.0, -30.0]))
split = jax.device_put((state, params), alrao.head_shardings(optimizer, params, mesh))
for sizes in ((2,), (3,), (1,)):
  rule = alrao.hopeful(0.5, sizes=sizes)
  whole = alrao.collapse(optimizer, state, params, rule)
  fewer = alrao.collapse(optimizer, *split, rule)
  jax.tree.map(np.testing.assert_array_equal, fewer, whole)
  kernel = fewer[1]["out"]["alrao_heads"]["kernel"]
  assert kernel.shape[0] == sizes[0] and kernel.sharding.is_fully_replicated
  try:
    alrao.head_shardings(optimizer, fewer[1], mesh)
  except ValueError as error:
    assert f"must split {sizes[0]} heads evenly" in str(error)
  else:
    assert sizes == (2,)
"""


@pytest.mark.slow
def test_heads_that_are_split_over_devices_leave_too():
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
  environment = {**os.environ, **flags, "JAX_PLATFORMS": "cpu"}
  subprocess.run([sys.executable, "-c", SPLIT], env=environment, check=True)


@pytest.mark.parametrize(
  ("arguments", "error", "message"),
  [
    ({"risk": 0.0}, ValueError, r"hopeful\(risk=...\) must be strictly between"),
    ({"risk": "low"}, TypeError, r"hopeful\(risk=...\) must be a number"),
    ({"sizes": ()}, ValueError, r"hopeful\(sizes=...\) must be numbers of heads"),
    ({"sizes": 2}, ValueError, r"hopeful\(sizes=...\) must be numbers of heads"),
    ({"sizes": (2, 0)}, ValueError, r"hopeful\(sizes=...\) must be at least 1, got 0"),
    ({"sizes": (2.5,)}, TypeError, r"hopeful\(sizes=...\) must be an integer"),
  ],
)
def test_wrong_arguments_are_errors(arguments, error, message):
  with pytest.raises(error, match=message):
    alrao.hopeful(**arguments)


def test_a_state_may_be_on_other_devices_than_the_rest():
  optimizer = alrao.track_heads()
  params = {"alrao_heads": {"bias": jnp.zeros((3, 2))}}
  opt_state = optimizer.init(params)
  elsewhere = jax.device_put(params, jax.devices()[1])
  _, fewer = alrao.collapse(optimizer, opt_state, elsewhere, keep=(0, 2))
  assert fewer["alrao_heads"]["bias"].shape == (2, 2)
  opt_state = opt_state._replace(
    log_weights=jax.device_put(opt_state.log_weights, jax.devices()[1])
  )
  fewer, _ = alrao.collapse(optimizer, opt_state, params, keep=(0, 2))
  assert fewer.log_weights.shape == (2,)
