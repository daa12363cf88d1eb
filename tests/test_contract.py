"""One table of optimizers, run through optax's contract one property at a time."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alrao_jax as alrao
from alrao_jax._rates import find_rates
from alrao_jax._tree import find_state


@pytest.fixture(autouse=True)
def optax_may_promote(request):
  """Adam's bias correction and MultiSteps' mean mix floats with counters."""
  own_arithmetic = ("adam", "multi_steps", "injected_schedules", "injection")
  optax_promotes = any(word in request.node.name for word in own_arithmetic)
  with jax.numpy_dtype_promotion("standard" if optax_promotes else "strict"):
    yield


N = 4


def make_params(dtype=jnp.float32):
  shapes = {
    "conv": {"kernel": (3, 3, 2, 5), "bias": (5,)},
    "norm": {"scale": (5,), "bias": (5,)},
    "dense": {"kernel": (5, 7), "bias": (7,)},
    "out": {"alrao_heads": {"kernel": (N, 7, 3), "bias": (N, 3)}},
  }
  leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(
    treedef,
    [
      jax.random.normal(k, s, jnp.float32).astype(dtype)
      for k, s in zip(keys, leaves, strict=True)
    ],
  )


def make_grads(dtype=jnp.float32, scale=0.1):
  return jax.tree.map(
    lambda p: (scale * jnp.cos(3 * p.astype(jnp.float32))).astype(dtype), make_params()
  )


LOG_LIKELIHOODS = np.linspace(-3.0, -1.0, N).astype(np.float32)

OPTIMIZERS = {
  "sgd": lambda key: alrao.alrao(key),
  "momentum": lambda key: alrao.alrao(key, optax.trace(0.9)),
  "adam": lambda key: alrao.alrao(key, optax.scale_by_adam(), 1e-6, 1.0),
  "decay": lambda key: alrao.alrao(
    key, weight_decay=0.1, schedule=optax.linear_schedule(1.0, 0.0, 10)
  ),
  "per_weight": lambda key: alrao.alrao(
    key, units=alrao.UnitOptions(overrides=(("", "per_weight"),))
  ),
  "clipped": lambda key: alrao.alrao(
    key, alrao.per_head(optax.clip_by_global_norm(1.0)), averaging=alrao.bayes()
  ),
  "schedule_free": lambda key: alrao.schedule_free_alrao(key),
  "chain": lambda key: optax.chain(
    alrao.per_head(optax.clip_by_global_norm(1.0)),
    optax.trace(0.9),
    alrao.scale_by_unit_rates(key),
    alrao.track_heads(alrao.fixed_share(0.01)),
  ),
}

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make(name, key=None):
  return OPTIMIZERS[name](jax.random.key(0) if key is None else key)


def run(optimizer, steps=3, dtype=jnp.float32, **extra):
  params, grads = make_params(dtype), make_grads(dtype)

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(
      grads, state, params, head_log_likelihoods=jnp.asarray(LOG_LIKELIHOODS), **extra
    )
    return optax.apply_updates(params, updates), state

  state = jax.jit(optimizer.init)(params)
  for _ in range(steps):
    params, state = step(params, state)
  return params, state


def assert_trees_close(a, b, rtol=1e-5, roundings=0):
  """Equal up to `rtol`, or to float32's rounding of a leaf's largest entry."""

  def check(a, b):
    atol = 1e-37 + roundings * 2.0**-24 * float(np.abs(b).max(initial=0))
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)

  jax.tree.map(check, a, b)


@each_optimizer
def test_jitted_and_eager_steps_agree(name):
  optimizer = make(name)
  params, grads = make_params(), make_grads()
  state = optimizer.init(params)
  eager = optimizer.update(grads, state, params, head_log_likelihoods=LOG_LIKELIHOODS)
  jitted = jax.jit(optimizer.update)(
    grads, state, params, head_log_likelihoods=LOG_LIKELIHOODS
  )
  assert jax.tree.structure(eager) == jax.tree.structure(jitted)
  assert_trees_close(eager, jitted)


@each_optimizer
def test_init_under_jit_and_eval_shape_gives_the_same_state(name):
  optimizer = make(name)
  params = make_params()
  eager = optimizer.init(params)
  chex.assert_trees_all_equal(eager, jax.jit(optimizer.init)(params))
  shapes = jax.eval_shape(optimizer.init, params)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), eager) == jax.tree.map(
    lambda x: (x.shape, x.dtype), shapes
  )


def test_init_with_shapes_alone_gives_the_same_rates():
  params = make_params()
  shapes = jax.eval_shape(lambda: params)
  rates = alrao.scale_by_unit_rates(jax.random.key(0))
  chex.assert_trees_all_equal(rates.init(params), rates.init(shapes))


@each_optimizer
def test_one_compilation_serves_all_steps(name):
  chex.clear_trace_counter()  # counts by name, over all cases
  optimizer = make(name)

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(params, state, grads):
    updates, state = optimizer.update(
      grads, state, params, head_log_likelihoods=jnp.asarray(LOG_LIKELIHOODS)
    )
    return optax.apply_updates(params, updates), state

  params = make_params()
  state = optimizer.init(params)
  for _ in range(3):
    params, state = step(params, state, make_grads())


@each_optimizer
def test_scan_equals_a_loop(name):
  optimizer = make(name)

  def body(carry, _):
    params, state = carry
    updates, state = optimizer.update(
      make_grads(), state, params, head_log_likelihoods=jnp.asarray(LOG_LIKELIHOODS)
    )
    return (optax.apply_updates(params, updates), state), None

  params = make_params()
  scanned, _ = jax.lax.scan(body, (params, optimizer.init(params)), length=3)
  # XLA fuses the two loops in its own way each: some ten roundings in each of three
  # steps, which show where a parameter comes near zero.
  assert_trees_close(scanned, run(optimizer), roundings=30)


@each_optimizer
def test_vmap_over_keys_equals_one_key_at_a_time(name):
  params, grads = make_params(), make_grads()
  keys = jax.random.split(jax.random.key(5), 3)

  def step(key):
    optimizer = make(name, key)
    state = optimizer.init(params)
    return optimizer.update(
      grads, state, params, head_log_likelihoods=jnp.asarray(LOG_LIKELIHOODS)
    )

  batched = jax.jit(jax.vmap(step))(keys)
  for i, key in enumerate(keys):
    assert_trees_close(jax.tree.map(lambda x, i=i: x[i], batched), step(key))


@each_optimizer
def test_the_state_can_be_donated(name):
  optimizer = make(name)
  step = jax.jit(
    lambda grads, state, params: optimizer.update(
      grads, state, params, head_log_likelihoods=jnp.asarray(LOG_LIKELIHOODS)
    ),
    donate_argnums=1,
  )
  params, grads = make_params(), make_grads()
  expected = step(grads, optimizer.init(params), params)
  state = optimizer.init(params)
  posterior = find_state(state, alrao.TrackHeadsState, "").averaging
  rates = find_rates(state).quantiles
  result = step(grads, state, params)
  chex.assert_trees_all_equal(result, expected)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(posterior))
  assert rates.is_deleted()


INJECTED = optax.inject_hyperparams(alrao.alrao, static_args=("key",))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "injected", "named"])
def test_no_two_leaves_of_a_state_share_a_buffer(name):
  params = make_params()
  if name == "injected":
    state = INJECTED(jax.random.key(0)).init(params)
  elif name == "named":
    params = {**params, "second": params["out"]}
    optimizer = alrao.alrao(jax.random.key(0))
    state = optimizer.init(params)
  else:
    state = make(name).init(params)
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
  assert len(set(pointers)) == len(pointers)


@each_optimizer
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_of_updates_and_state_never_change(name, dtype):
  with jax.enable_x64(dtype == "float64"):
    dtype = jnp.dtype(dtype)
    optimizer = make(name)
    params, grads = make_params(dtype), make_grads(dtype)
    state = jax.eval_shape(optimizer.init, params)
    updates, new_state = jax.eval_shape(
      lambda *args: optimizer.update(*args, head_log_likelihoods=LOG_LIKELIHOODS),
      grads,
      state,
      params,
    )
    assert {u.dtype for u in jax.tree.leaves(updates)} == {dtype}
    of = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert of(state) == of(new_state)
    rates = find_rates(state).quantiles
    assert rates.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)


@each_optimizer
def test_unknown_extra_arguments_pass_through(name):
  chex.assert_trees_all_equal(run(make(name)), run(make(name), value=jnp.ones([])))


@each_optimizer
def test_missing_log_likelihoods_are_an_error_that_says_what_to_write(name):
  optimizer = make(name)
  params = make_params()
  with pytest.raises(TypeError, match="head_log_likelihoods=info.head_log_likelihoods"):
    optimizer.update(make_grads(), optimizer.init(params), params)


@each_optimizer
def test_tree_map_params_finds_the_parameters_of_the_state(name):
  optimizer = make(name)
  params = make_params()
  state = optimizer.init(params)
  changed = optax.tree.map_params(
    optimizer, lambda p: p + 1, state, transform_non_params=lambda x: x
  )
  assert jax.tree.structure(changed) == jax.tree.structure(state)
  quantiles = find_rates(changed).quantiles
  np.testing.assert_array_equal(quantiles, find_rates(state).quantiles)
  if name in ("momentum", "adam", "chain"):
    moved = [
      not np.array_equal(a, b)
      for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(state), strict=True)
    ]
    copies = 2 if name == "adam" else 1
    assert sum(moved) == copies * len(jax.tree.leaves(params))


@each_optimizer
def test_masked_layers_keep_the_draws_of_the_rest(name):
  params, grads = make_params(), make_grads()
  mask = {"conv": False, "norm": True, "dense": True, "out": True}
  masked = optax.masked(make(name), mask)
  updates, state = jax.jit(masked.update)(
    grads, masked.init(params), params, head_log_likelihoods=LOG_LIKELIHOODS
  )
  full = make(name)
  expected, _ = jax.jit(full.update)(
    grads, full.init(params), params, head_log_likelihoods=LOG_LIKELIHOODS
  )
  chex.assert_trees_all_equal(updates["conv"], grads["conv"])
  for layer in ("norm", "dense", "out"):
    if name not in ("clipped", "chain"):  # masking changes the body's norm
      assert_trees_close(updates[layer], expected[layer])
  assert alrao.log_weights(state).shape == (N,)


def test_partition_of_body_and_heads_keeps_all_draws():
  params, grads = make_params(), make_grads()
  key = jax.random.key(0)
  split = optax.partition(
    {
      "body": alrao.scale_by_unit_rates(key),
      "heads": optax.chain(
        optax.identity(), alrao.scale_by_unit_rates(key), alrao.track_heads()
      ),
    },
    {"conv": "body", "norm": "body", "dense": "body", "out": "heads"},
  )
  updates, state = split.update(
    grads, split.init(params), params, head_log_likelihoods=LOG_LIKELIHOODS
  )
  whole = alrao.alrao(key)
  expected, whole_state = whole.update(
    grads, whole.init(params), params, head_log_likelihoods=LOG_LIKELIHOODS
  )
  chex.assert_trees_all_equal(updates, expected)
  np.testing.assert_array_equal(
    alrao.log_weights(state), alrao.log_weights(whole_state)
  )


@each_optimizer
def test_multi_steps_accumulates_gradients_and_sees_the_posterior(name):
  params, grads = make_params(), make_grads()
  inner = make(name)
  multi = optax.MultiSteps(inner, every_k_schedule=2)
  state = multi.init(params)
  step = jax.jit(multi.update)
  for _ in range(2):
    updates, state = step(grads, state, params, head_log_likelihoods=LOG_LIKELIHOODS)
  expected, inner_state = jax.jit(inner.update)(
    grads, inner.init(params), params, head_log_likelihoods=LOG_LIKELIHOODS
  )
  assert_trees_close(updates, expected, rtol=1e-5)
  np.testing.assert_allclose(
    alrao.log_weights(state), alrao.log_weights(inner_state), rtol=1e-6
  )


def test_injected_bounds_are_read_and_changed_while_training():
  chex.clear_trace_counter()
  params, grads = make_params(), make_grads()
  optimizer = INJECTED(
    jax.random.key(0), optax.trace(0.9), 1e-5, max_learning_rate=10.0
  )
  state = optimizer.init(params)
  assert float(state.hyperparams["max_learning_rate"]) == 10.0
  step = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
  _, state = step(grads, state, params, head_log_likelihoods=LOG_LIKELIHOODS)
  before = alrao.unit_rates(state, params)
  state.hyperparams["max_learning_rate"] = jnp.float32(1e-5)
  _, state = step(grads, state, params, head_log_likelihoods=LOG_LIKELIHOODS)
  after = alrao.unit_rates(state, params)
  assert max(float(r.max()) for r in jax.tree.leaves(before)) > 0.1
  np.testing.assert_allclose(
    np.concatenate([np.ravel(r) for r in jax.tree.leaves(after)]), 1e-5, rtol=1e-6
  )


def test_injected_schedules_move_the_bounds():
  params, grads = make_params(), make_grads()
  optimizer = INJECTED(
    jax.random.key(0),
    min_learning_rate=1e-3,
    max_learning_rate=optax.linear_schedule(10.0, 1e-3, 2),
  )
  state = optimizer.init(params)
  for _ in range(3):
    _, state = optimizer.update(
      grads, state, params, head_log_likelihoods=LOG_LIKELIHOODS
    )
  rates = alrao.unit_rates(state, params)
  np.testing.assert_allclose(rates["dense"]["bias"], 1e-3, rtol=1e-5)


def test_injection_in_bfloat16_leaves_theta_and_the_state_alone():
  params = make_params(jnp.bfloat16)
  grads = make_grads(jnp.bfloat16)
  optimizer = INJECTED(jax.random.key(0))
  state = optimizer.init(params)
  _, new_state = optimizer.update(
    grads, state, params, head_log_likelihoods=LOG_LIKELIHOODS
  )
  plain = alrao.alrao(jax.random.key(0))
  _, expected = plain.update(
    grads, plain.init(params), params, head_log_likelihoods=LOG_LIKELIHOODS
  )
  np.testing.assert_array_equal(
    alrao.log_weights(new_state), alrao.log_weights(expected)
  )
  of = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
  assert of(state) == of(new_state)


def test_a_key_that_is_injected_works_too():
  params, key = make_params(), jax.random.key(0)
  optimizer = optax.inject_hyperparams(alrao.alrao)(key)
  state = optimizer.init(params)
  rates, expected = find_rates(state), find_rates(alrao.alrao(key).init(params))
  np.testing.assert_array_equal(rates.quantiles, expected.quantiles)


def test_numbers_that_are_arrays_leave_bfloat16_updates_alone():
  optimizer = alrao.alrao(
    jax.random.key(0), schedule=np.float64(0.5), weight_decay=np.float32(0.1)
  )
  params = make_params(jnp.bfloat16)
  updates, _ = optimizer.update(
    make_grads(jnp.bfloat16),
    optimizer.init(params),
    params,
    head_log_likelihoods=LOG_LIKELIHOODS,
  )
  assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


def test_log_weights_needs_exactly_one_posterior():
  params = make_params()
  with pytest.raises(ValueError, match="exactly one TrackHeadsState, got 0"):
    alrao.log_weights(optax.sgd(0.1).init(params))
  twice = optax.chain(alrao.track_heads(), alrao.track_heads())
  with pytest.raises(ValueError, match="exactly one TrackHeadsState, got 2"):
    alrao.log_weights(twice.init(params))
