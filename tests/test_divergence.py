"""Heads that diverge: training goes on with the others, and nothing turns NaN.

Half of the ladder's rates are too fast for most problems, so a diverged head is an
everyday matter. Here heads are broken in the midst of training, so that momenta are
warm, and a whole user's step runs on for a while.
"""

import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alrao_jax as alrao
import alrao_jax.linen

NUM_HEADS = 4
NUM_CLASSES = 3
STEPS = 12


class MLPHead(nn.Module):
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(8, dtype=self.dtype, param_dtype=self.dtype)(x))
    return nn.Dense(NUM_CLASSES, dtype=self.dtype, param_dtype=self.dtype)(x)


class NormHead(nn.Module):
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm(dtype=self.dtype, param_dtype=self.dtype)(x)
    return nn.Dense(NUM_CLASSES, dtype=self.dtype, param_dtype=self.dtype)(x)


def _dense_head(dtype):
  return nn.Dense(NUM_CLASSES, dtype=dtype, param_dtype=dtype)


def _regression_head(dtype):
  return nn.Dense(1, dtype=dtype, param_dtype=dtype)


HEADS = {"dense": _dense_head, "mlp": MLPHead, "norm": NormHead}
BASES = {
  "sgd": (None, 1e-4, 1.0),
  "momentum": (optax.trace(0.9), 1e-5, 0.1),
  "adam": (optax.scale_by_adam(), 1e-5, 0.1),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
DAMAGES = (np.inf, np.nan, 1e6, 1e12, 1e19, 1e25)  # factors
# Each kind compiles for some seconds: every base and every head is among the fast ones,
# all pairs of them in slow runs.
FAST = {("sgd", "mlp"), ("momentum", "norm"), ("adam", "dense")}
KINDS = [
  pytest.param(
    head,
    base,
    dtype,
    marks=() if dtype == "float32" and (base, head) in FAST else pytest.mark.slow,
  )
  for head, base, dtype in itertools.product(HEADS, BASES, DTYPES)
]
# Which of four heads break.
VICTIMS = {"one": (2,), "all_but_one": (0, 2, 3), "all": (0, 1, 2, 3)}


class Model(nn.Module):
  head: str
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(16, dtype=self.dtype, param_dtype=self.dtype, name="body")(x)
    head = (HEADS | {"regression": _regression_head})[self.head](self.dtype)
    layer = alrao_jax.linen.MultiHead(head, num_heads=NUM_HEADS, name="out")
    return layer(nn.tanh(x))


class Step(NamedTuple):
  """What is looked at after each step."""

  params: dict
  opt_state: tuple
  loss: jax.Array
  info: alrao.MixtureInfo
  grads: dict


@pytest.fixture(autouse=True)
def standard_promotion():
  # Optax's Adam and Flax's LayerNorm themselves mix types.
  with jax.numpy_dtype_promotion("standard"):
    yield


def _setup(head, base, dtype):
  """A warm start, and a function that trains for STEPS."""
  rng = np.random.default_rng(0)
  labels = jnp.asarray(rng.integers(NUM_CLASSES, size=32))
  centres = 2.0 * rng.normal(size=(NUM_CLASSES, 5))
  images = centres[np.asarray(labels)] + 0.5 * rng.normal(size=(32, 5))
  images = jnp.asarray(images, DTYPES[dtype])
  model = Model(head, DTYPES[dtype])
  params = jax.jit(model.init)(jax.random.key(1), images)["params"]
  base, low, high = BASES[base]
  optimizer = alrao.alrao(jax.random.key(2), base, low, high)

  def loss_fn(params, log_weights):
    heads = model.apply({"params": params}, images)
    return alrao.classification_loss(heads, labels, log_weights)

  train = _trainer(loss_fn, optimizer, STEPS)
  warm = train((params, jax.jit(optimizer.init)(params)))
  warm = jax.tree.map(lambda leaf: np.asarray(leaf[-1]), warm)
  return (warm.params, warm.opt_state), train


def _trainer(loss_fn, optimizer, num_steps):
  """A function from parameters and state to what happens in so many steps."""

  def step(carry, _):
    params, opt_state = carry
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, info), grads = value_and_grad(params, alrao.log_weights(opt_state))
    updates, opt_state = optimizer.update(
      grads, opt_state, params, head_log_likelihoods=info.head_log_likelihoods
    )
    params = optax.apply_updates(params, updates)
    return (params, opt_state), Step(params, opt_state, loss, info, grads)

  return jax.jit(lambda carry: jax.lax.scan(step, carry, length=num_steps)[1])


def _break(params, broken, factor):
  def damage(leaf):
    leaf = np.array(leaf)
    wide = leaf[broken].astype(np.float32)
    # Also where an initial bias is 0.
    wide = wide * factor if np.isfinite(factor) else np.full_like(wide, factor)
    leaf[broken] = wide.astype(leaf.dtype)
    return leaf

  return params | {"out": jax.tree.map(damage, params["out"])}


def _assert_finite(tree, what):
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    finite = np.isfinite(leaf.astype(np.float32))
    assert finite.all(), f"{what}{jax.tree_util.keystr(path)}: {leaf}"


def _tracked(opt_state):
  """What the optimizer knows of the heads."""
  is_tracked = lambda node: isinstance(node, alrao.TrackHeadsState)  # noqa: E731
  (state,) = filter(is_tracked, jax.tree.leaves(opt_state, is_leaf=is_tracked))
  return state


def _with_start(start, rest):
  """States before and after each step, on one axis."""
  join = lambda one, more: np.concatenate([np.asarray(one)[None], more])  # noqa: E731
  return jax.tree.map(join, start, rest)


def _check(start, run):
  """What holds of any run, whatever happens to its heads."""
  _assert_finite(run.grads, "gradient")
  _assert_finite(run.opt_state, "optimizer state")
  _assert_finite(run.params["body"], "parameters")
  tracked = _tracked(run.opt_state)
  weights = np.exp(tracked.log_weights.astype(np.float64))
  np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
  healthy = run.info.healthy
  np.testing.assert_array_equal(healthy, np.isfinite(run.info.head_log_likelihoods))

  # All heads diverged: an infinite loss, and nothing changes in the switch, no count.
  all_diverged = ~healthy.any(1)
  np.testing.assert_array_equal(run.loss == np.inf, all_diverged)
  assert np.isfinite(run.loss[~all_diverged]).all()
  tracked = _with_start(_tracked(start[1]), tracked)
  for leaf in jax.tree.leaves((tracked.log_weights, tracked.averaging)):
    np.testing.assert_array_equal(leaf[1:][all_diverged], leaf[:-1][all_diverged])
  # But it is told.
  np.testing.assert_array_equal(tracked.diverged[1:], ~healthy)
  np.testing.assert_array_equal(np.diff(tracked.all_diverged_steps), all_diverged)

  # A diverged head stands still: momentum must not carry it on.
  for leaf in jax.tree.leaves(_with_start(start[0]["out"], run.params["out"])):
    leaf = leaf.astype(np.float32)  # bfloat16's NaN are not equal to NumPy
    np.testing.assert_array_equal(leaf[1:][~healthy], leaf[:-1][~healthy])


@pytest.mark.parametrize(("head", "base", "dtype"), KINDS)
def test_broken_heads_do_not_stop_the_others(head, base, dtype):
  (warm, opt_state), train = _setup(head, base, dtype)
  for victims, factor in itertools.product(VICTIMS.values(), DAMAGES):
    broken = np.isin(np.arange(NUM_HEADS), victims)
    start = _break(warm, broken, factor), opt_state
    run = jax.tree.map(np.asarray, train(start))
    _check(start, run)
    if np.isfinite(factor):
      _assert_finite(run.params["out"], f"{victims} times {factor}: parameters")
    else:
      np.testing.assert_array_equal(run.info.healthy, np.tile(~broken, (STEPS, 1)))
      good = jax.tree.map(lambda leaf, ok=~broken: leaf[:, ok], run.params["out"])
      _assert_finite(good, f"{victims} {factor}: parameters")
    # Steps are small, so the best survivor improves, whatever the others do. Unless a
    # head with huge weights hit the body: while it counts, its gradient is as huge.
    shaken = max(np.abs(leaf).max() for leaf in jax.tree.leaves(run.grads["body"])) > 10
    if not broken.all() and not (shaken and np.isfinite(factor)):
      scores = run.info.head_log_likelihoods[:, ~broken]
      assert (scores[-1] - scores[0]).max() > 0, f"{victims} times {factor}"


@pytest.mark.parametrize("base", [None, optax.trace(0.9)], ids=["sgd", "momentum"])
def test_heads_that_diverge_by_themselves_do_not_stop_the_others(base):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(32, 5)), jnp.float32)
  y = jnp.sin(x.sum(1, keepdims=True))
  model = Model("regression", jnp.float32)
  params = model.init(jax.random.key(1), x)["params"]
  # The heads' rates are 1e-4, 0.1, 100 and 1e5. For squared errors of 16 features in
  # [-1, 1] and a bias, rates below 2/17 can't diverge; the last two must.
  optimizer = alrao.alrao(
    jax.random.key(2), base, 1e-4, 1e5, distribution=alrao.log_uniform(1e-3, 1e-1)
  )

  def loss_fn(params, log_weights):
    heads = model.apply({"params": params}, x)
    return alrao.regression_loss(heads, y, log_weights)

  start = params, optimizer.init(params)
  train = _trainer(loss_fn, optimizer, num_steps=100)
  run = jax.tree.map(np.asarray, train(start))
  _check(start, run)
  _assert_finite(run.params["out"], "parameters")
  # The two fastest end diverged, not at once; the others learn.
  assert run.info.healthy[0].all()
  np.testing.assert_array_equal(run.info.healthy[-1], [True, True, False, False])
  assert run.loss[-1] < run.loss[0] - 0.1


# --- Reports of what was not seen

AVERAGINGS = {
  "switch": alrao.switch(),
  "bayes": alrao.bayes(),
  "fixed_share": alrao.fixed_share(0.1),
}
NOTHING, DIVERGED = np.full(NUM_HEADS, np.nan), np.full(NUM_HEADS, -np.inf)
SEEN = np.log([0.3, 0.4, 0.5, 0.35])


def naive():
  """An averaging of one's own that knows of no NaN: the softmax of all that it saw."""
  return alrao.Averaging(
    init=lambda n, dtype=jnp.float32: {
      "sums": jnp.zeros(n, dtype),
      "calls": jnp.ones(()),
    },
    update=lambda state, seen: {
      "sums": state["sums"] + seen,
      "calls": state["calls"] + 1,
    },
    log_weights=lambda state: jax.nn.log_softmax(state["sums"]),
  )


AVERAGINGS["own"] = naive()


def _observer(averaging=alrao.switch()):
  params = {"out": {"alrao_heads": {"bias": jnp.ones((NUM_HEADS, 3))}}}
  tracker = alrao.track_heads(averaging)

  @jax.jit
  def observe(state, seen):
    grads = jax.tree.map(jnp.ones_like, params)
    return tracker.update(grads, state, params, head_log_likelihoods=seen)

  return tracker.init(params), lambda state, seen: observe(
    state, jnp.asarray(seen, jnp.float32)
  )


def _posterior(state):
  return jax.tree.leaves((state.log_weights, state.averaging))


@pytest.mark.parametrize("nothing", [NOTHING, DIVERGED], ids=["unseen", "diverged"])
@pytest.mark.parametrize("name", AVERAGINGS)
def test_what_is_no_observation_moves_no_posterior(name, nothing):
  state, observe = _observer(AVERAGINGS[name])
  _, state = observe(state, SEEN)
  updates, after = observe(state, nothing)
  for old, new in zip(_posterior(state), _posterior(after), strict=True):
    np.testing.assert_array_equal(old, new)
  # Who is not seen may be trained, as by weight decay; who diverged may not.
  is_unseen = nothing is NOTHING
  np.testing.assert_array_equal(updates["out"]["alrao_heads"]["bias"], is_unseen)
  assert after.diverged.tolist() == [not is_unseen] * NUM_HEADS
  assert int(after.all_diverged_steps) == (not is_unseen)


@pytest.mark.parametrize("name", AVERAGINGS)
def test_a_task_with_few_labels_finds_its_best_head(name):
  state, observe = _observer(AVERAGINGS[name])
  alone = state
  for step in range(200):
    seen = step % 10 == 0
    _, state = observe(state, SEEN if seen else NOTHING)
    if seen:
      _, alone = observe(alone, SEEN)
  np.testing.assert_array_equal(state.log_weights, alone.log_weights)
  assert int(jnp.argmax(state.log_weights)) == 2


@pytest.mark.parametrize("name", AVERAGINGS)
def test_a_head_of_which_nothing_was_seen_is_trained_and_breaks_nothing(name):
  state, observe = _observer(AVERAGINGS[name])
  _, state = observe(state, SEEN)
  updates, state = observe(state, [np.nan, -1.0, -np.inf, -2.0])
  expected = np.array([1.0, 1.0, 0.0, 1.0])[:, None] * np.ones((1, 3))
  np.testing.assert_array_equal(updates["out"]["alrao_heads"]["bias"], expected)
  assert state.diverged.tolist() == [False, False, True, False]
  weights = np.exp(np.asarray(state.log_weights, np.float64))
  np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-5)
  if name == "own":  # it can't learn from such a report, so it learns nothing
    np.testing.assert_allclose(weights, np.exp(SEEN) / np.exp(SEEN).sum(), rtol=1e-5)
  else:
    assert weights[0] > 0.15 and weights[1] > weights[3]


def _micro_steps(optimizer, params, batches):
  """MultiSteps as its documentation says: reports weigh by their examples."""
  state = optimizer.init(params)
  total, count = jnp.zeros(NUM_HEADS), jnp.zeros(())
  for size, report, gradient in batches:
    report = jnp.asarray(report, jnp.float32)
    n = jnp.where(jnp.isfinite(report).any(), float(size), 0.0)
    total += jnp.where(n > 0, n * report, 0.0)
    count += n
    grads = jax.tree.map(lambda p, g=gradient: jnp.full_like(p, g), params)
    updates, state = optimizer.update(
      grads, state, params, head_log_likelihoods=total / count
    )
    params = optax.apply_updates(params, updates)
    total, count = jax.tree.map(
      lambda x, s=state: jnp.where(optimizer.has_updated(s), 0.0, x), (total, count)
    )
  return params, alrao.log_weights(state)


def test_multi_steps_makes_the_same_step_without_what_it_skips():
  params = {
    "dense": {"kernel": jnp.ones((3, 4))},
    "out": {"alrao_heads": {"kernel": jnp.ones((NUM_HEADS, 4, 3))}},
  }
  optimizer = optax.MultiSteps(
    alrao.alrao(jax.random.key(0), None, 1e-3, 0.1),
    2,
    should_skip_update_fn=optax.skip_not_finite,
  )
  good, other = (8, SEEN, 0.5), (4, SEEN[::-1].copy(), 1.5)
  bad = (8, DIVERGED, np.nan)
  found = _micro_steps(optimizer, params, [good, bad, other])
  expected = _micro_steps(optimizer, params, [good, other])
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert all((leaf != 1).any() for leaf in jax.tree.leaves(found[0]))
  whole, observe = _observer()
  _, whole = observe(whole, (8 * SEEN + 4 * SEEN[::-1]) / 12)
  np.testing.assert_allclose(found[1], whole.log_weights, rtol=1e-6)


def test_devices_that_saw_nothing_do_not_count():
  state, observe = _observer()

  def report(seen, n):
    total = jax.lax.psum(jnp.where(n > 0, n * seen, 0.0), "data")
    return total / jax.lax.psum(n, "data")

  reports = jnp.asarray([SEEN, NOTHING, SEEN[::-1]], jnp.float32)
  counts = jnp.array([8.0, 0.0, 4.0])
  seen = jax.vmap(report, axis_name="data")(reports, counts)
  np.testing.assert_allclose(seen[1], (8 * SEEN + 4 * SEEN[::-1]) / 12, rtol=1e-6)
  empty = jax.vmap(report, axis_name="data")(reports[1:2], counts[1:2])[0]
  _, after = observe(state, empty)
  np.testing.assert_array_equal(after.log_weights, state.log_weights)
