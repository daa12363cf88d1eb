"""The guard: which units it stops, what it leaves alone, and that all stays finite."""

import functools

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
from alrao_jax._guard import GuardUnitsState
from alrao_jax._tree import find_state
from alrao_jax._unit_map import unit_map

NUM_HEADS = 3
LOG_LIKELIHOODS = np.array([-3.0, -2.0, -1.0], np.float32)


def make_params(dtype=jnp.float32):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape).astype(dtype))

  return {
    "conv": {"kernel": draw(3, 3, 2, 5), "bias": draw(5)},
    "dense": {"kernel": draw(5, 4)},
    "out": {"alrao_heads": {"kernel": draw(NUM_HEADS, 4, 2)}},
  }


def trips_of(state):
  return find_state(state, GuardUnitsState, "guard_units").trips


def assert_trees_equal(a, b):
  def plain(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf

  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, *jax.tree.map(plain, (a, b)))


def train(guard, highest, steps, heads):
  """Trains a deep network on blobs; returns parameters, state and losses."""
  images, labels = blobs()
  model = MLP(4, heads)
  optimizer = alrao.alrao(
    jax.random.key(0), None, 1e-5, highest, guard=guard, heads=heads
  )

  def loss_fn(params, state):
    outputs = model.apply({"params": params}, images)
    if heads:
      return alrao.classification_loss(outputs, labels, alrao.log_weights(state))
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return losses.mean(), None

  def step(carry, _):
    params, state = carry
    (loss, info), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, state)
    extra = {"head_log_likelihoods": info.head_log_likelihoods} if heads else {}
    updates, state = optimizer.update(grads, state, params, **extra)
    return (optax.apply_updates(params, updates), state), loss

  @jax.jit
  def run(key):
    params = model.init(key, images)["params"]
    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)

  (params, state), losses = run(jax.random.key(3))
  return params, state, np.asarray(losses, np.float32)


class MLP(nn.Module):
  """Dense layers with ReLU and no normalisation."""

  depth: int
  heads: bool
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    for _ in range(self.depth):
      x = nn.relu(nn.Dense(32, dtype=self.dtype, param_dtype=self.dtype)(x))
    out = nn.Dense(3, dtype=self.dtype, param_dtype=self.dtype)
    if not self.heads:
      return out(x)
    return alrao_jax.linen.MultiHead(out, num_heads=10, name="out")(x)


def blobs(dtype=jnp.float32):
  """Three classes that a linear model nearly tells apart."""
  rng = np.random.default_rng(1)
  labels = rng.integers(3, size=60)
  images = rng.normal(size=(3, 8))[labels] + 0.3 * rng.normal(size=(60, 8))
  return jnp.asarray(images, dtype), jnp.asarray(labels)


# --- Left alone


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_well_behaved_run_is_left_alone_to_the_last_bit(dtype):
  images, labels = blobs(dtype)
  model = MLP(1, False, dtype)
  params = jax.jit(model.init)(jax.random.key(3), images)["params"]
  rates = alrao.scale_by_unit_rates(jax.random.key(0), 1e-5, 0.3)
  guarded = alrao.guard_units()

  @jax.jit
  def step(params):
    def loss_fn(params):
      logits = model.apply({"params": params}, images).astype(jnp.float32)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    return loss, rates.update(grads, rates_state, params)[0]

  rates_state, state, losses = rates.init(params), guarded.init(params), []
  guard = jax.jit(guarded.update)
  for _ in range(20):
    loss, updates = step(params)
    kept, state = guard(updates, state, params)
    assert_trees_equal(kept, updates)
    params = optax.apply_updates(params, kept)
    losses.append(loss)
  assert losses[-1] < 0.8 * losses[0]
  assert not state.trips.any()


def test_only_the_unit_with_a_huge_rate_is_touched():
  params = {"dense": make_params()["dense"]}
  grads = {"dense": {"kernel": 0.1 * jnp.cos(params["dense"]["kernel"])}}
  rates = alrao.scale_by_unit_rates(jax.random.key(0), 1e-5, 1e8)
  guarded = optax.chain(rates, alrao.guard_units())
  tree = {"dense": {"kernel": jnp.full((5, 4), 1e-2).at[:, 2].set(1e7)}}
  state = alrao.with_unit_rates(guarded.init(params), params, tree)
  expected, _ = jax.jit(rates.update)(grads, state[0], params)
  updates, state = jax.jit(guarded.update)(grads, state, params)
  kernel = np.array(expected["dense"]["kernel"])
  assert np.linalg.norm(kernel[:, 2]) > 1e3
  kernel[:, 2] = 0.0
  np.testing.assert_array_equal(updates["dense"]["kernel"], kernel)
  assert trips_of(state).tolist() == [0, 0, 1, 0]


def test_heads_are_left_to_the_posterior():
  params = make_params()
  updates = jax.tree.map(lambda p: 1e9 * p, params)
  guarded = alrao.guard_units()
  kept, state = jax.jit(guarded.update)(updates, guarded.init(params), params)
  assert_trees_equal(kept["out"], updates["out"])
  assert not any(leaf.any() for leaf in jax.tree.leaves((kept["conv"], kept["dense"])))
  assert trips_of(state).tolist() == [1] * 9


def test_weights_that_start_at_zero_can_leave_it():
  params = {"dense": {"kernel": jnp.zeros((4, 2))}}
  updates = {"dense": {"kernel": jnp.array([[0.4, 0.6]] * 4)}}  # norms 0.8 and 1.2
  guarded = alrao.guard_units()
  kept, _ = jax.jit(guarded.update)(updates, guarded.init(params), params)
  np.testing.assert_array_equal(kept["dense"]["kernel"], [[np.float32(0.4), 0]] * 4)


# --- Stopped and slowed


def reference(params, updates_of_steps, limit, slowdown):
  """Slow and obvious: two units, kernel columns and their bias entries."""
  kernel, bias = (np.array(params[k], np.float64) for k in ("kernel", "bias"))
  trips = [0, 0]
  for updates in updates_of_steps:
    for unit in range(2):
      old = np.append(kernel[:, unit], bias[unit])
      step = np.append(updates["kernel"][:, unit], updates["bias"][unit])
      step = step * slowdown ** trips[unit]
      if np.sqrt((step**2).sum()) <= limit * max(np.sqrt((old**2).sum()), 1.0):
        kernel[:, unit], bias[unit] = (old + step)[:-1], (old + step)[-1]
      else:
        trips[unit] += 1
  return {"kernel": kernel, "bias": bias}, trips


@pytest.mark.parametrize(("limit", "slowdown"), [(1.0, 0.1), (0.3, 0.5), (2.0, 0.0)])
def test_sixty_random_steps_equal_an_obvious_loop(limit, slowdown):
  rng = np.random.default_rng(2)
  params = {"kernel": rng.normal(size=(3, 2)), "bias": np.zeros(2)}
  steps = []
  for _ in range(60):
    size = 10 ** rng.uniform(-3, 2.0, size=2)  # of each unit
    steps.append({k: size * rng.normal(size=v.shape) for k, v in params.items()})
  expected, trips = reference(params, steps, limit, slowdown)
  assert min(trips) > 0 and (slowdown == 0 or max(trips) > 1)
  with jax.enable_x64(True):
    guarded = alrao.guard_units(alrao.guard(limit, slowdown))
    params = jax.tree.map(jnp.asarray, params)
    state, update = guarded.init(params), jax.jit(guarded.update)
    for step in steps:
      updates, state = update(jax.tree.map(jnp.asarray, step), state, params)
      params = optax.apply_updates(params, updates)
  assert state.trips.tolist() == trips
  # 60 sums, each rounded at 2e-16 of weights that are at most some hundreds.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), params, expected
  )


def test_a_frozen_unit_never_moves_again():
  params = {"kernel": jnp.ones((4, 2))}
  guarded = alrao.guard_units(alrao.guard(slowdown=0.0))
  state, update = guarded.init(params), jax.jit(guarded.update)
  for size in (100.0, 0.01, jnp.inf, jnp.nan, 0.01):
    updates = {"kernel": jnp.array([[0.01, size]] * 4)}
    updates, state = update(updates, state, params)
    assert updates["kernel"].tolist() == [[np.float32(0.01), 0.0]] * 4
  assert state.trips.tolist() == [0, 1]


def test_two_broken_batches_slow_a_unit_for_good():
  params = {"kernel": jnp.ones((4, 2))}
  guarded = alrao.guard_units()
  state, update = guarded.init(params), jax.jit(guarded.update)
  small = {"kernel": jnp.full((4, 2), 0.01)}
  for size in (1e3, 1e3):  # batches that hit the second unit
    spike = {"kernel": small["kernel"].at[:, 1].set(size)}
    _, state = update(spike, state, params)
  for _ in range(100):
    updates, state = update(small, state, params)
  factor = updates["kernel"] / small["kernel"]
  # 0.1 squared: a few roundings of float32.
  np.testing.assert_allclose(factor, [[1.0, 0.01]] * 4, rtol=5e-7)
  assert state.trips.tolist() == [0, 2]


def test_infinite_updates_slow_their_unit_and_nan_nobody():
  params = {"kernel": jnp.ones((4, 3))}
  row = jnp.array([0.1, jnp.inf, 0.2])
  updates = {"kernel": jnp.stack([row, row.at[2].set(jnp.nan), row, row])}
  guarded = alrao.guard_units()
  kept, state = jax.jit(guarded.update)(updates, guarded.init(params), params)
  assert kept["kernel"].tolist() == [[np.float32(0.1), 0.0, 0.0]] * 4
  assert state.trips.tolist() == [0, 1, 0]


@pytest.mark.parametrize("limit", [1.0, 1e6])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_whatever_comes_weights_stay_finite(dtype, limit):
  rng = np.random.default_rng(4)
  largest = float(jnp.finfo(dtype).max)
  sizes = 10 ** np.linspace(0, np.log10(largest) - 0.01, 40)  # of the units' weights
  params = {"kernel": jnp.asarray(np.broadcast_to(sizes, (6, 40)), dtype)}
  guarded = alrao.guard_units(alrao.guard(limit, 0.7))
  state, step, moved = guarded.init(params), jax.jit(guarded.update), 0
  for _ in range(40):
    signs = rng.choice([1.0, 1.0, -1.0], size=(6, 40))
    values = signs * np.minimum(sizes * 10 ** rng.uniform(-1, 3, size=40), largest)
    values[rng.random((6, 40)) < 0.002] = np.nan
    updates, state = step({"kernel": jnp.asarray(values, dtype)}, state, params)
    new_params = optax.apply_updates(params, updates)
    moved += int((new_params["kernel"] != params["kernel"]).sum())
    params = new_params
    assert jnp.isfinite(params["kernel"]).all()
  assert moved > 0 and state.trips[-1] > 0 and params["kernel"].dtype == dtype


def test_gates_of_a_cell_count_as_one_unit():
  rng = np.random.default_rng(5)
  shapes = {"dense_i": {"kernel": (3, 8)}, "dense_h": {"kernel": (2, 8), "bias": (8,)}}
  cell = jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
    shapes,
    is_leaf=lambda node: isinstance(node, tuple),
  )
  units = unit_map({"cell": cell})
  assert {spec.tiles for spec in units.specs.values()} == {4}
  norms, _ = units.norms({"cell": cell}, jnp.float32)
  rows = np.concatenate([np.reshape(leaf, (-1, 8)) for leaf in jax.tree.leaves(cell)])
  expected = [np.sqrt((rows[:, unit::2] ** 2).sum()) for unit in range(2)]
  np.testing.assert_allclose(norms, expected, rtol=8 * 1.2e-7)


# --- Composition


def run(optimizer, params, steps=4, scale=30.0):
  """Some steps with updates of which some are too large."""

  def step(carry, i):
    params, state = carry
    grads = jax.tree.map(
      lambda p: (scale * jnp.cos(7 * p.astype(jnp.float32) + i)).astype(p.dtype), params
    )
    updates, state = optimizer.update(
      grads, state, params, head_log_likelihoods=jnp.asarray(LOG_LIKELIHOODS)
    )
    return (optax.apply_updates(params, updates), state), None

  times = jnp.arange(steps, dtype=jnp.float32)
  return jax.lax.scan(step, (params, optimizer.init(params)), times)[0]


def make_optimizer(key):
  return alrao.alrao(key, guard=alrao.guard())


def test_scan_equals_a_loop_of_updates():
  optimizer, params = make_optimizer(jax.random.key(0)), make_params()
  update = jax.jit(optimizer.update)
  scanned, scanned_state = run(optimizer, params)
  state = optimizer.init(params)
  for i in range(4):
    grads = jax.tree.map(lambda p, i=i: 30.0 * jnp.cos(7 * p + float(i)), params)
    updates, state = update(
      grads, state, params, head_log_likelihoods=jnp.asarray(LOG_LIKELIHOODS)
    )
    params = optax.apply_updates(params, updates)
  assert 0 < int((trips_of(state) > 0).sum()) < 9
  np.testing.assert_array_equal(trips_of(state), trips_of(scanned_state))
  # Fused and separate sums differ by ulps, which four steps of cos(7 p) magnify.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3), scanned, params
  )


def test_vmap_over_keys_equals_one_key_at_a_time():
  params, keys = make_params(), jax.random.split(jax.random.key(5), 3)
  batched = jax.jit(jax.vmap(lambda key: run(make_optimizer(key), params)))(keys)
  trips = trips_of(batched[1])
  assert trips.shape == (3, 9) and len({tuple(row) for row in trips.tolist()}) > 1
  for i, key in enumerate(keys):
    one = run(make_optimizer(key), params)
    np.testing.assert_array_equal(trips[i], trips_of(one[1]))


def test_a_mask_guards_its_part_as_if_alone():
  params = make_params()
  body = {name: params[name] for name in ("conv", "dense")}
  updates = jax.tree.map(lambda p: 1e3 * p, params)
  mask = {"conv": True, "dense": False, "out": False}
  masked = optax.masked(alrao.guard_units(), mask)
  kept, state = masked.update(updates, masked.init(params), params)
  assert_trees_equal(kept["dense"], updates["dense"])
  assert not kept["conv"]["kernel"].any() and trips_of(state).shape == (5,)
  parts = optax.partition(
    {"a": alrao.guard_units(), "b": optax.set_to_zero()},
    {"conv": "a", "dense": "a", "out": "b"},
  )
  kept, state = parts.update(updates, parts.init(params), params)
  alone = alrao.guard_units()
  expected, _ = alone.update({n: updates[n] for n in body}, alone.init(body), body)
  assert_trees_equal({name: kept[name] for name in body}, expected)
  assert trips_of(state).tolist() == [1] * 9


def test_hyperparameters_may_be_injected_beside_a_guard():
  injected = optax.inject_hyperparams(alrao.alrao, static_args=("key",))
  params = make_params()
  with jax.numpy_dtype_promotion("standard"):
    optimizer = injected(jax.random.key(0), guard=alrao.guard())
    got, state = run(optimizer, params)
  expected, expected_state = run(make_optimizer(jax.random.key(0)), params)
  np.testing.assert_array_equal(trips_of(state), trips_of(expected_state))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3), got, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_never_change(dtype):
  with jax.enable_x64(dtype == "float64"):
    params = make_params(jnp.dtype(dtype))
    optimizer = make_optimizer(jax.random.key(0))
    before = jax.eval_shape(optimizer.init, params)
    new_params, state = jax.eval_shape(lambda p: run(optimizer, p), params)
  of = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
  assert of(new_params) == of(jax.eval_shape(lambda: params)) and of(state) == of(
    before
  )


def test_overrides_and_frozen_parameters_are_read_as_by_the_rates():
  params = make_params()
  overrides = (("^dense/", "frozen"), ("^conv/kernel", "one_rate"))
  optimizer = alrao.alrao(
    jax.random.key(0), units=alrao.UnitOptions(overrides=overrides), guard=alrao.guard()
  )
  got, state = run(optimizer, params)
  assert trips_of(state).shape == (1 + 5,)
  assert_trees_equal(got["dense"], params["dense"])


def test_map_params_finds_no_parameters_in_the_state():
  guarded, params = alrao.guard_units(), make_params()
  state = guarded.init(params)
  assert_trees_equal(optax.tree.map_params(guarded, lambda x: 1 / 0, state), state)


def test_an_nnx_optimizer_takes_it():
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  before = np.asarray(model.kernel[...])
  key = jax.random.key(0)
  tx = alrao.alrao(key, None, 1e5, 1e6, heads=False, guard=alrao.guard())
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  for trips in ([0, 0], [1, 1]):  # the batch is to blame first, the units then
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    np.testing.assert_array_equal(model.kernel[...], before)
    assert trips_of(optimizer.opt_state).tolist() == trips


# --- What it is for


@pytest.mark.parametrize("heads", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_network_that_overflows_without_it_learns_with_it(heads):
  _, _, lost = train(None, 1e3, 200, heads)
  params, state, losses = train(alrao.guard(), 1e3, 200, heads)
  stuck = ~np.isfinite(lost) | (lost > np.log(3) - 0.1)
  assert stuck[-20:].all()
  assert np.isfinite(losses).all()
  assert losses[-20:].max() < 0.5 * np.log(3)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
  assert 0 < int((trips_of(state) > 0).sum()) < trips_of(state).size


# --- Errors


def test_errors_say_what_to_write():
  params = make_params()
  guarded = alrao.guard_units()
  state = guarded.init(params)
  with pytest.raises(
    ValueError, match=r"needs params.*update\(grads, opt_state, params"
  ):
    guarded.update(params, state)
  with pytest.raises(ValueError, match="a state of 9 units, made for other .* with 4"):
    guarded.update({"dense": params["dense"]}, state, {"dense": params["dense"]})
  renamed = {**params, "last": params["dense"]}
  del renamed["dense"]
  with pytest.raises(ValueError, match="a state of 9 units, made for other .* with 9"):
    guarded.update(renamed, state, renamed)
  with pytest.raises(ValueError, match=r"guard\(limit=...\) must be positive, got 0"):
    alrao.guard(limit=0)
  with pytest.raises(ValueError, match=r"guard\(slowdown=...\) must be between"):
    alrao.guard(slowdown=2.0)
  with pytest.raises(TypeError, match=r"got True. Write guard_units\(alrao_jax.guard"):
    alrao.guard_units(True)  # pyright: ignore
  with pytest.raises(TypeError, match=r"Write alrao\(..., guard=alrao_jax.guard\(\)\)"):
    alrao.alrao(jax.random.key(0), guard=True)  # pyright: ignore


# Statistics of batches


class Normalised(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(8)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
    return alrao.linen.MultiHead(nn.Dense(3), num_heads=NUM_HEADS)(x)


class NnxNormalised(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
    self.out = alrao.nnx.MultiHead(
      lambda rngs: nnx.Linear(8, 3, rngs=rngs), num_heads=NUM_HEADS, rngs=rngs
    )

  def __call__(self, x):
    return self.out(nnx.relu(self.norm(self.dense(x))))


def batches(broken=None):
  """Ten batches and the one that is broken, or without that one."""
  images = np.random.default_rng(0).normal(size=(11, 8, 4)).astype(np.float32)
  labels = (images[..., 0] > 0).astype(np.int32) + (images[..., 1] > 0)
  for i, (x, y) in enumerate(zip(images, labels, strict=True)):
    if i != 5:
      yield x, y
    elif broken is not None:
      yield (x * broken).astype(np.float32), y


def train_normalised_linen(broken):
  model, optimizer = Normalised(), alrao.alrao(jax.random.key(1))
  variables = model.init(jax.random.key(0), np.zeros((8, 4), np.float32), True)
  params, batch_stats = variables["params"], variables["batch_stats"]
  opt_state = optimizer.init(params)

  @jax.jit
  def step(params, batch_stats, opt_state, images, labels):
    def loss_fn(params):
      variables = {"params": params, "batch_stats": batch_stats}
      heads, updated = model.apply(variables, images, True, mutable=["batch_stats"])
      weights = alrao.log_weights(opt_state)
      loss, info = alrao.classification_loss(heads, labels, weights)
      return loss, (info, updated)

    grads, (info, updated) = jax.grad(loss_fn, has_aux=True)(params)
    updates, new = optimizer.update(
      grads, opt_state, params, head_log_likelihoods=info.head_log_likelihoods
    )
    stats = alrao.keep_finite(updated["batch_stats"], batch_stats)
    return optax.apply_updates(params, updates), stats, new

  for batch in batches(broken):
    params, batch_stats, opt_state = step(params, batch_stats, opt_state, *batch)
  variables = {"params": params, "batch_stats": batch_stats}
  return model.apply(variables, np.ones((2, 4), np.float32), False).shared, batch_stats


def train_normalised_nnx(broken):
  model = NnxNormalised(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, alrao.alrao(jax.random.key(1)), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, images, labels):
    weights = alrao.log_weights(optimizer.opt_state)
    before = nnx.as_pure(nnx.state(model, nnx.BatchStat))

    def loss_fn(model):
      return alrao.classification_loss(model(images), labels, weights)

    grads, info = nnx.grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads, head_log_likelihoods=info.head_log_likelihoods)
    nnx.update(model, alrao.keep_finite(nnx.state(model, nnx.BatchStat), before))

  for batch in batches(broken):
    step(model, optimizer, *batch)
  stats = nnx.as_pure(nnx.state(model, nnx.BatchStat))
  model.eval()
  return model(np.ones((2, 4), np.float32)).shared, stats


@functools.cache
def without_broken(train_model):
  return train_model(None)


@pytest.mark.parametrize("train_model", [train_normalised_linen, train_normalised_nnx])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_batch_leaves_evaluation_as_if_it_had_not_been(train_model, broken):
  with_it, stats = train_model(broken)
  without, expected = without_broken(train_model)
  assert np.isfinite(with_it).all()
  np.testing.assert_array_equal(with_it, without)
  for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)


def test_statistics_stay_by_feature_with_all_that_the_module_has_of_it():
  old = {
    "a": {"mean": jnp.zeros(3), "var": jnp.ones(3), "count": jnp.int32(4)},
    "b": {"mean": jnp.zeros(3), "var": jnp.ones(3)},
  }
  new = {
    "a": {
      "mean": jnp.array([1e30, 0.5, 0.5]),
      "var": jnp.array([jnp.inf, 2.0, 2.0]),
      "count": jnp.int32(5),
    },
    "b": {"mean": jnp.array([0.5, 0.5, jnp.nan]), "var": jnp.array([2.0, 2.0, 2.0])},
  }
  kept = jax.jit(alrao.keep_finite)(new, old)
  expected = {
    "a": {"mean": [0.0, 0.5, 0.5], "var": [1.0, 2.0, 2.0], "count": 5},
    "b": {"mean": [0.5, 0.5, 0.0], "var": [2.0, 2.0, 1.0]},
  }
  assert jax.tree.map(np.ndarray.tolist, jax.tree.map(np.asarray, kept)) == expected


def test_a_diverged_head_keeps_its_own_statistics_alone():
  old = {"out": {"alrao_heads": {"mean": jnp.zeros((3, 2)), "var": jnp.ones((3, 2))}}}
  new = jax.tree.map(lambda x: x + 1, old)
  new["out"]["alrao_heads"]["mean"] = jnp.ones((3, 2)).at[1].set(jnp.nan)
  kept = alrao.keep_finite(new, old)["out"]["alrao_heads"]
  assert kept["mean"][:, 0].tolist() == [1.0, 0.0, 1.0]
  assert kept["var"][:, 1].tolist() == [2.0, 1.0, 2.0]


def test_finite_statistics_pass_to_the_last_bit_with_their_dtypes():
  new = {"mean": jnp.full(2, 0.1, jnp.bfloat16), "key": jax.random.key(1)}
  old = {"mean": jnp.zeros(2, jnp.bfloat16), "key": jax.random.key(0)}
  kept = alrao.keep_finite(new, old)
  assert kept["mean"].dtype == jnp.bfloat16
  assert_trees_equal(kept["mean"], new["mean"])
  assert (jax.random.key_data(kept["key"]) == jax.random.key_data(new["key"])).all()


def test_statistics_of_other_trees_are_refused():
  tree = {"mean": jnp.zeros(2)}
  for other in ({"mean": jnp.zeros(3)}, {}, {"var": jnp.zeros(2)}):
    with pytest.raises(ValueError, match="same paths and shapes, got .* mean"):
      alrao.keep_finite(tree, other)


def test_variables_that_changed_with_the_model_are_refused():
  model = NnxNormalised(nnx.Rngs(0))
  before = nnx.state(model, nnx.BatchStat)
  model(jnp.ones((5, 4)))
  with pytest.raises(ValueError, match=r"before = nnx.as_pure\(nnx.state\(model"):
    alrao.keep_finite(nnx.state(model, nnx.BatchStat), before)


# --- Broken batches


def gradients(params, size=1.0, step=0):
  """Gradients of one size for all, different from step to step."""
  return jax.tree.map(
    lambda p: (size * jnp.cos(3 * p.astype(jnp.float32) + step)).astype(p.dtype), params
  )


SKIPPING = {
  "sgd": lambda key: alrao.alrao(key, None, 1e-5, 0.1, guard=alrao.guard()),
  "momentum": lambda key: alrao.alrao(
    key, optax.trace(0.9), 1e-5, 0.1, weight_decay=0.1, guard=alrao.guard()
  ),
  "adam": lambda key: alrao.alrao(
    key,
    optax.scale_by_adam(),
    1e-6,
    0.1,
    schedule=optax.linear_schedule(1.0, 0.0, 100),
    guard=alrao.guard(),
  ),
  "noise": lambda key: alrao.alrao(
    key, optax.add_noise(0.1, 0.5, jax.random.key(1)), 1e-5, 0.1, guard=alrao.guard()
  ),
  "recipe": lambda key: alrao.schedule_free_alrao(key, guard=alrao.guard()),
}


class Driver:
  """An optimizer that is given gradients of a size, one step after the other."""

  def __init__(self, optimizer, params):
    self.params, self.state, self.steps = params, optimizer.init(params), 0
    self._update = compiled_update(optimizer)

  def step(self, size, report=LOG_LIKELIHOODS):
    self.steps += 1
    grads = gradients(self.params, size, self.steps)
    updates, self.state = self.try_update(grads, report)
    self.params = optax.apply_updates(self.params, updates)
    return updates

  def try_update(self, grads, report=LOG_LIKELIHOODS):
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
      return self._update(
        grads, self.state, self.params, head_log_likelihoods=jnp.asarray(report)
      )


compiled_update = functools.cache(lambda optimizer: jax.jit(optimizer.update))


@functools.cache
def skipping(name):
  return SKIPPING[name](jax.random.key(0))


@pytest.mark.parametrize("size", [1e3, 1e12, 1e30, np.inf, np.nan])
@pytest.mark.parametrize("name", SKIPPING)
def test_a_broken_batch_leaves_no_trace(name, size):
  driver = Driver(skipping(name), make_params())
  for _ in range(5):
    driver.step(0.1)
  before = driver.state
  updates = driver.step(0.1 * size, -1e6 * np.ones(NUM_HEADS, np.float32))
  assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
  after = driver.state
  assert_trees_equal(after.inner, before.inner)
  for field in ("largest_heads", "largest_units"):
    rise = getattr(after, field) / getattr(before, field)
    assert ((rise > 0.98) & (rise < 10.01)).all()
  assert (int(before.skipped_steps), int(after.skipped_steps)) == (0, 1)
  # The next step is made as ever.
  updates = driver.step(0.1)
  assert any(leaf.any() for leaf in jax.tree.leaves(updates))
  assert int(driver.state.skipped_steps) == 1 and not trips_of(driver.state).any()


def test_in_a_second_such_step_running_the_units_are_to_blame():
  driver = Driver(skipping("sgd"), make_params())
  trips = []
  for size in (0.1, 0.1, 1e9, 1e9, 1e9, 0.1, 0.1):
    driver.step(size)
    trips.append(int(trips_of(driver.state).sum()))
  assert trips == [0, 0, 0, 9, 18, 18, 18]
  assert int(driver.state.skipped_steps) == 1


@pytest.mark.parametrize("every", [2, 4, 50])
def test_a_large_batch_that_comes_back_is_not_skipped_for_good(every):
  optimizer = alrao.skip_broken_batches(optax.sgd(1e-3))
  params = {"kernel": jnp.ones((3, 2))}
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for step in range(6 * every):
    size = 1.0 if step % every == every - 1 else 1e-3
    _, state = update({"kernel": jnp.full((3, 2), size)}, state, params)
  assert int(state.skipped_steps) <= 2


def test_broken_batches_far_apart_are_each_skipped():
  driver = Driver(skipping("momentum"), make_params())
  for size in (0.1, 0.1, 1e6, 0.1, 1e9, 0.1, 1e4):
    driver.step(size)
  assert int(driver.state.skipped_steps) == 3 and not trips_of(driver.state).any()


def test_half_of_the_units_are_no_batch():
  params = {"dense": {"kernel": jnp.ones((3, 4))}}
  optimizer = alrao.alrao(
    jax.random.key(0), None, 0.1, 0.1, heads=False, guard=alrao.guard()
  )
  fine = {"dense": {"kernel": jnp.full((3, 4), 0.1)}}
  for units, skipped in ((2, 0), (3, 1)):
    state = optimizer.init(params)
    _, state = optimizer.update(fine, state, params)
    broken = {"dense": {"kernel": fine["dense"]["kernel"].at[:, :units].set(1e6)}}
    updates, state = optimizer.update(broken, state, params)
    assert int(state.skipped_steps) == skipped
    assert trips_of(state).tolist() == [1 - skipped] * 2 + [0, 0]
    assert bool(updates["dense"]["kernel"][:, 3].any()) == (not skipped)


def test_units_and_heads_without_a_gradient_have_no_say():
  """A huge batch saturates the softmax: right answers give no gradient at all."""
  driver = Driver(skipping("adam"), make_params())
  for _ in range(3):
    driver.step(0.1)
  zeros = jax.tree.map(jnp.zeros_like, driver.params)
  kernel = zeros["out"]["alrao_heads"]["kernel"].at[1].set(1e4)
  for broken in (
    {**zeros, "dense": {"kernel": zeros["dense"]["kernel"].at[:, 0].set(1e4)}},
    {**zeros, "out": {"alrao_heads": {"kernel": kernel}}},
  ):
    updates, state = driver.try_update(broken)
    assert int(state.skipped_steps) == 1
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))


def test_who_wakes_up_is_no_broken_batch():
  """An output layer that starts at 0 gives the body no gradient in the first step."""
  params = make_params()
  optimizer = skipping("sgd")
  state = optimizer.init(params)
  grads = gradients(params)
  first = {**jax.tree.map(jnp.zeros_like, grads), "out": grads["out"]}
  for step in (first, grads):
    _, state = compiled_update(optimizer)(
      step, state, params, head_log_likelihoods=jnp.asarray(LOG_LIKELIHOODS)
    )
  assert int(state.skipped_steps) == 0


def test_a_chain_of_ones_own_skips_what_alrao_skips():
  params, key = make_params(), jax.random.key(0)
  own = alrao.skip_broken_batches(
    optax.chain(
      alrao.drop_diverged(),
      optax.partition(
        {
          "a": optax.chain(
            alrao.scale_by_unit_rates(key, 1e-5, 0.1), alrao.guard_units()
          ),
          "b": alrao.scale_by_unit_rates(key, 1e-5, 0.1),
        },
        {"conv": "a", "dense": "a", "out": "b"},
      ),
      alrao.track_heads(),
    )
  )
  ours = SKIPPING["sgd"](key)
  drivers = [Driver(optimizer, params) for optimizer in (own, ours)]
  for size in (0.1, 1e5, 0.1, 1e9, 1e9, 0.1):
    for driver in drivers:
      driver.step(size)
  assert_trees_equal(drivers[0].params, drivers[1].params)
  assert int(drivers[0].state.skipped_steps) == 2
  np.testing.assert_array_equal(*(trips_of(driver.state) for driver in drivers))


def broken_run(kind, make, scale, steps=60):
  """The losses of 8 runs a while after one broken batch, and without that batch."""
  images, labels = blobs()
  targets = 0.5 * images[:, :1] - images[:, 1:2] ** 2
  model = MLP(2, True) if kind == "inputs" else Regressor()

  def loss_fn(params, log_weights, images, labels, targets):
    heads = model.apply({"params": params}, images)
    if kind == "inputs":
      return alrao.classification_loss(heads, labels, log_weights)
    return alrao.regression_loss(heads, targets, log_weights)

  def one(key, scale):
    optimizer = make(key)
    params = model.init(jax.random.fold_in(key, 1), images)["params"]
    batches = jax.random.randint(
      jax.random.fold_in(key, 2), (steps + 101, 16), 0, len(images)
    )

    def step(carry, index, by=1.0):
      params, state = carry
      inputs, outputs = (by, 1.0) if kind == "inputs" else (1.0, by)
      batch = images[index] * inputs, labels[index], targets[index] * outputs
      log_weights = alrao.log_weights(state)
      grads, info = jax.grad(loss_fn, has_aux=True)(params, log_weights, *batch)
      updates, state = optimizer.update(
        grads, state, params, head_log_likelihoods=info.head_log_likelihoods
      )
      return optax.apply_updates(params, updates), state

    def train(carry, indices):
      return jax.lax.scan(lambda c, i: (step(c, i), None), carry, indices)[0]

    start = train((params, optimizer.init(params)), batches[:steps])
    losses = []
    for carry in (start, step(start, batches[steps], scale)):
      params, state = train(carry, batches[steps + 1 :])
      if make is SKIPPING["recipe"]:
        params = alrao.eval_params(state, params)
      log_weights = alrao.log_weights(state)
      losses.append(loss_fn(params, log_weights, images, labels, targets)[0])
    return jnp.stack(losses)

  keys = jax.random.split(jax.random.key(11), 8)
  with jax.numpy_dtype_promotion("standard"):
    return jax.jit(jax.vmap(one, (0, None)))(keys, scale).T


class Regressor(nn.Module):
  """Two hidden layers, one output."""

  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = nn.relu(nn.Dense(32)(x))
    return alrao_jax.linen.MultiHead(nn.Dense(1), num_heads=10, name="out")(x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["inputs", "targets"])
@pytest.mark.parametrize("name", ["sgd", "adam", "recipe"])
def test_a_hundred_steps_after_a_broken_batch_the_loss_is_that_without_it(name, kind):
  for scale in (1e4, 1e8, 1e12, 1e16) if kind == "inputs" else (1e10,):
    without, with_it = broken_run(kind, SKIPPING[name], scale)
    assert np.isfinite(without).all()
    assert (with_it / without).max() <= 1.02, scale


# --- Checkpoints


@pytest.mark.parametrize("part", ["all", "body", "heads", "nothing"])
def test_no_leaf_of_a_state_is_empty_and_orbax_restores_it(part, tmp_path):
  orbax = pytest.importorskip("orbax.checkpoint")
  params = make_params()
  if part == "body":
    del params["out"]
  if part == "heads":
    params = {"out": params["out"]}
  optimizer = alrao.alrao(
    jax.random.key(0),
    optax.scale_by_adam(),
    guard=alrao.guard(),
    heads=part != "body",
  )
  if part == "nothing":  # all is another transformation's
    params = {"a": jnp.ones(2)}
    optimizer = optax.chain(
      optax.masked(alrao.drop_diverged(), {"a": False}),
      optax.masked(alrao.guard_units(), {"a": False}),
      optax.masked(alrao.skip_broken_batches(optax.sgd(0.1)), {"a": False}),
    )
  state = optimizer.init(params)
  assert all(leaf.size for leaf in jax.tree.leaves(state))
  with jax.numpy_dtype_promotion("standard"):
    report = (
      {}
      if part in ("body", "nothing")
      else {"head_log_likelihoods": jnp.asarray(LOG_LIKELIHOODS)}
    )
    _, state = jax.jit(optimizer.update)(gradients(params), state, params, **report)
  with orbax.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "state", optimizer.init(params))
  assert_trees_equal(restored, state)


@pytest.mark.parametrize(
  "make", [alrao.drop_diverged, lambda: alrao.skip_broken_batches(optax.sgd(0.1))]
)
def test_a_state_restored_as_plain_dicts_is_named(make):
  optimizer, params = make(), {"kernel": jnp.ones((3, 2))}
  raw = optimizer.init(params)._asdict()
  with pytest.raises(TypeError, match="restored without a target"):
    optimizer.update(params, raw, params)
