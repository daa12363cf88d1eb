"""Dtypes of states: at least float32, and the same before and after an update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alrao_jax as alrao
from alrao_jax._tree import find_state

N = 3
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def optax_may_promote():
  """optax's own arithmetic mixes floats with counters, and numbers of all types."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def make_params(dtype, num_heads=N):
  return {
    "body": {"kernel": jnp.ones((2, 2), dtype), "bias": jnp.ones(2, dtype)},
    "out": {"alrao_heads": {"kernel": jnp.ones((num_heads, 2, 2), dtype)}},
  }


def make_grads(params, size=0.1):
  return jax.tree.map(lambda x: jnp.full_like(x, size), params)


def types(tree):
  return jax.tree.map(lambda x: f"{x.dtype} {x.shape} weak {x.weak_type}", tree)


def assert_types_stay(optimizer, dtype):
  """Nothing is computed: the types of a state tell whether it compiles and scans."""
  params = make_params(dtype)

  def update(state):
    updates, state = optimizer.update(
      make_grads(params), state, params, head_log_likelihoods=jnp.zeros(N)
    )
    return state, updates

  state = jax.eval_shape(optimizer.init, params)
  new_state, updates = jax.eval_shape(update, state)
  assert types(new_state) == types(state)
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
  return state


NUMBERS = {
  "float": lambda x: x,
  "int": lambda x: int(x) or 1,
  "np.float64": np.float64,
  "np.float32": np.float32,
  "np.int64": lambda x: np.int64(int(x) or 1),
  "array": lambda x: jnp.asarray(x, jnp.float32),
  "weak array": jnp.asarray,
  "bfloat16 array": lambda x: jnp.asarray(x, jnp.bfloat16),
  "float64 array": lambda x: jnp.asarray(x, jnp.float64),
}
CALLABLES = {
  "schedule": lambda x: lambda _: x,
  "float64 schedule": lambda x: lambda _: jnp.asarray(x, jnp.float64),
  "optax schedule": lambda x: optax.linear_schedule(x, 0.0, 10),
}

# By factory: how numbers x of any type go into it. All may be 0.5, most 1.
FACTORIES = {
  "alrao": lambda x: alrao.alrao(KEY, None, x, x, weight_decay=x),
  "alrao schedule": lambda x: alrao.alrao(KEY, optax.trace(0.9), schedule=x),
  "alrao adam": lambda x: alrao.alrao(
    KEY, optax.scale_by_adam(), weight_decay=x, guard=alrao.guard(x, x)
  ),
  "schedule_free_alrao": lambda x: alrao.schedule_free_alrao(
    KEY, x, x, narrowest=x, power=x, b2=0 * x, eps=x, weight_decay=x
  ),
  "scale_by_unit_rates": lambda x: alrao.scale_by_unit_rates(
    KEY, x, x, single_head_learning_rate=x
  ),
  "log_uniform": lambda x: alrao.scale_by_unit_rates(
    KEY, distribution=alrao.log_uniform(x, x)
  ),
  "bernoulli": lambda x: alrao.scale_by_unit_rates(
    KEY, distribution=alrao.bernoulli(x, x)
  ),
  "guard_units": lambda x: alrao.guard_units(alrao.guard(x, x)),
  "per_head": lambda x: alrao.in_float32(alrao.per_head(optax.ema(x))),
  "in_float32": lambda x: alrao.in_float32(optax.trace(x)),
  "drop_diverged": lambda x: optax.chain(
    alrao.drop_diverged(), alrao.track_heads(alrao.fixed_share(0.1))
  ),
  "multi_steps": lambda x: optax.MultiSteps(alrao.alrao(KEY, None, x, x), 2),
}
TAKE_SCHEDULES = {
  "alrao": lambda x: alrao.alrao(KEY, weight_decay=x, schedule=x),
  "schedule_free_alrao": lambda x: alrao.schedule_free_alrao(KEY, weight_decay=x),
}
AVERAGINGS = {
  "switch": lambda x: alrao.switch(x, likelihood_scale=x),
  "bayes": lambda x: alrao.bayes(likelihood_scale=x),
  "fixed_share": lambda x: alrao.fixed_share(x, likelihood_scale=x),
}
dtypes = ["bfloat16", "float16", "float32", "float64"]


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("dtype", dtypes)
def test_no_number_changes_the_types_of_a_state(factory, dtype):
  with jax.enable_x64(True):
    for number in NUMBERS.values():
      state = assert_types_stay(FACTORIES[factory](number(0.5)), dtype)
      assert not any(x.weak_type for x in jax.tree.leaves(state))


@pytest.mark.parametrize("factory", TAKE_SCHEDULES)
@pytest.mark.parametrize("dtype", dtypes)
def test_no_schedule_changes_the_types_of_a_state(factory, dtype):
  with jax.enable_x64(True):
    for schedule in CALLABLES.values():
      assert_types_stay(TAKE_SCHEDULES[factory](schedule(0.5)), dtype)


@pytest.mark.parametrize("averaging", AVERAGINGS)
@pytest.mark.parametrize("dtype", dtypes)
def test_no_number_of_an_averaging_changes_the_types_of_a_state(averaging, dtype):
  with jax.enable_x64(True):
    for kind in ("float", "int", "np.float64", "np.float32", "np.int64"):
      number = NUMBERS[kind](0.5)
      assert_types_stay(alrao.track_heads(AVERAGINGS[averaging](number)), dtype)


INJECTED = {
  "alrao": lambda x: {"min_learning_rate": x, "max_learning_rate": x},
  "schedule_free_alrao": lambda x: {
    "b2": x if callable(x) else 0 * x,  # 1 is refused
    "eps": x,
    "narrowest": x,
    "power": x,
  },
  "scale_by_unit_rates": lambda x: {"min_learning_rate": x, "max_learning_rate": x},
}


@pytest.mark.parametrize("factory", INJECTED)
@pytest.mark.parametrize("dtype", dtypes)
def test_no_injected_number_changes_the_types_of_a_state(factory, dtype):
  inject = optax.inject_hyperparams(getattr(alrao, factory), static_args=("key",))
  numbers = {**NUMBERS, "schedule": lambda x: optax.linear_schedule(x, x / 2, 5)}
  del numbers["weak array"]  # which optax's own state holds as it is
  with jax.enable_x64(True):
    for number in numbers.values():
      assert_types_stay(inject(KEY, **INJECTED[factory](number(0.5))), dtype)


@pytest.mark.parametrize("factory", ["alrao adam", "schedule_free_alrao"])
def test_steps_with_numbers_of_other_types_compile_once_and_scan(factory):
  with jax.enable_x64(True):
    optimizer = FACTORIES[factory](np.float64(0.5))
    params = make_params(jnp.bfloat16)

    def step(carry, _):
      params, state = carry
      updates, state = optimizer.update(
        make_grads(params), state, params, head_log_likelihoods=jnp.zeros(N)
      )
      return (optax.apply_updates(params, updates), state), None

    carry = params, optimizer.init(params)
    jax.lax.scan(step, carry, length=2)
    step = jax.jit(step)
    for _ in range(3):
      carry, _ = step(carry, None)
    assert step._cache_size() == 1


def run(optimizer, dtype, gradients, **extra):
  """The updates of a few steps, in float32, and the last state."""
  params = make_params(dtype)
  update = jax.jit(
    lambda g, s: optimizer.update(
      make_grads(params, g), s, params, head_log_likelihoods=jnp.zeros(N), **extra
    )
  )
  state, results = optimizer.init(params), []
  for gradient in gradients:
    updates, state = update(jnp.asarray(gradient, dtype), state)
    results.append(jax.tree.map(lambda x: np.asarray(x, np.float32), updates))
  return results, state


def chain_of_ones_own(base):
  return optax.chain(
    alrao.drop_diverged(),
    alrao.in_float32(optax.chain(base, alrao.scale_by_unit_rates(KEY, 1e-3, 1e-1))),
    alrao.track_heads(),
  )


BASES = {
  "adam": optax.scale_by_adam,
  "rms": optax.scale_by_rms,
  "lion": optax.scale_by_lion,
  "momentum": lambda: optax.trace(0.9),
  "injected_adam": lambda: optax.inject_hyperparams(optax.scale_by_adam)(),
  "per_head": lambda: alrao.per_head(
    optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
  ),
  "masked": lambda: optax.masked(
    optax.scale_by_adam(), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
  ),
  "partition": lambda: optax.partition(
    {"a": optax.scale_by_adam(), "b": optax.trace(0.9)}, {"body": "a", "out": "b"}
  ),
  "multi_steps": lambda: optax.MultiSteps(
    optax.scale_by_adam(), 2
  ).gradient_transformation(),
}
OPTIMIZERS = {
  **{f"alrao {name}": (alrao.alrao, base) for name, base in BASES.items()},
  **{f"chain {name}": (chain_of_ones_own, base) for name, base in BASES.items()},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_updates_in_half_precision_are_those_of_float32_rounded(name, dtype):
  make, base = OPTIMIZERS[name]
  if make is alrao.alrao:
    make = functools.partial(make, KEY, min_learning_rate=1e-3, max_learning_rate=0.1)
    optimizer = make(base=base())
  else:
    optimizer = make(base())
  # A large one (its square overflows float16), then small ones (whose squares are 0).
  gradients = [0.25, 512.0, *[2.0**-10] * 4]
  found, state = run(optimizer, dtype, gradients)
  expected, expected_state = run(optimizer, jnp.float32, gradients)
  rtol, tiny = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).smallest_subnormal)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=tiny), found, expected
  )
  assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(
    lambda x: x.dtype, expected_state
  )


def test_a_dtype_of_ones_own_stays():
  base = optax.scale_by_adam(mu_dtype=jnp.bfloat16)
  state = alrao.alrao(KEY, base).init(make_params(jnp.float16))
  adam = find_state(state, optax.ScaleByAdamState, "adam")
  assert {x.dtype for x in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
  assert {x.dtype for x in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}


def test_float64_complex_and_integers_are_left_alone():
  with jax.enable_x64(True):
    params = {
      "wide": jnp.ones(2, jnp.float64),
      "complex": jnp.ones(2, jnp.complex64),
      "count": jnp.ones(2, jnp.int8),
      "half": jnp.ones(2, jnp.bfloat16),
    }
    tx = alrao.in_float32(optax.trace(1))
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
  seen = jax.tree.map(lambda x: str(x.dtype), state.trace)
  assert seen == {
    "wide": "float64",
    "complex": "complex64",
    "count": "int8",
    "half": "float32",
  }
  assert updates["half"].dtype == jnp.bfloat16
  assert updates["wide"].dtype == jnp.float64


def test_float32_costs_nothing():
  params = make_params(jnp.float32)
  tx = optax.chain(optax.scale_by_adam(), alrao.scale_by_unit_rates(KEY))
  wrapped = alrao.in_float32(tx)
  state = tx.init(params)
  programs = [
    str(jax.make_jaxpr(lambda *a, tx=tx: tx.update(*a))(params, state, params))
    for tx in (tx, wrapped)
  ]
  assert programs[0] == programs[1]


def test_extra_arguments_pass_through():
  tx = alrao.in_float32(optax.chain(alrao.track_heads(), optax.scale(2.0)))
  params = make_params(jnp.bfloat16)
  _, state = tx.update(
    params, tx.init(params), params, head_log_likelihoods=jnp.arange(3.0), other=1
  )
  assert alrao.log_weights(state)[2] > alrao.log_weights(state)[0]


def test_tree_map_params_finds_the_parameters():
  tx = alrao.in_float32(optax.scale_by_adam())
  params = make_params(jnp.bfloat16)
  specs = jax.tree.map(lambda x: x.ndim, params)
  found = optax.tree.map_params(
    tx, lambda _, spec: spec, tx.init(params), specs, transform_non_params=lambda _: -1
  )
  assert (found.mu, found.nu, found.count) == (specs, specs, -1)


def test_what_is_no_transformation_is_refused():
  with pytest.raises(TypeError, match=r"MultiSteps\(...\).gradient_transformation"):
    alrao.in_float32(optax.MultiSteps(optax.sgd(0.1), 2))  # pyright: ignore
