"""Schedule-free Alrao: the steps, the average, and rates that follow the posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alrao_jax as alrao
from alrao_jax._tree import find_state

N = 4
KEY = jax.random.key(0)


def make_params():
  generator = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)  # noqa: E731
  return {
    "hidden": {"kernel": normal(3, 6), "bias": normal(6)},
    "out": {"alrao_heads": {"kernel": normal(N, 6, 2), "bias": normal(N, 2)}},
  }


def gradient(params, step):
  return jax.tree.map(lambda p: p + 0.3 * jnp.sin(7 * p + step), params)


# The last head but one predicts best by far.
LOG_LIKELIHOODS = jnp.array([-3.0, -2.0, -0.5, -2.5])


def train(optimizer, steps, log_likelihoods=LOG_LIKELIHOODS, on_step=None):
  params = make_params()
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for step in range(steps):
    before = state
    updates, state = update(
      gradient(params, step), state, params, head_log_likelihoods=log_likelihoods
    )
    params = optax.apply_updates(params, updates)
    if on_step is not None:
      on_step(before, state, params)
  return params, state


def bounds(state):
  return find_state(state, alrao.ScaleByUnitRatesState, "").unit_distribution


def test_equal_bounds_are_schedule_free_rmsprop():
  rate = 0.01
  params, state = train(
    alrao.schedule_free_alrao(KEY, rate, rate, interpolation=0.9, power=0.0), 20
  )
  base = optax.chain(
    optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True),
    optax.scale(-rate),
  )
  plain = optax.contrib.schedule_free(base, learning_rate=1.0, b1=0.9)
  expected = make_params()
  with jax.numpy_dtype_promotion("standard"):  # within optax's own arithmetic
    plain_state, update = plain.init(expected), jax.jit(plain.update)
    for step in range(20):
      updates, plain_state = update(gradient(expected, step), plain_state, expected)
      expected = optax.apply_updates(expected, updates)
    averaged = optax.contrib.schedule_free_eval_params(plain_state, expected)
  # z is recovered from y and x: a rounding of 6e-8 counts tenfold, at each step.
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=20 * 10 * 6e-8 * 4)  # noqa: E731
  jax.tree.map(close, params, expected)
  jax.tree.map(close, alrao.eval_params(state, params), averaged)


def test_without_interpolation_the_average_weighs_iterates_by_the_power_of_time():
  iterates = []
  params, state = train(
    alrao.schedule_free_alrao(KEY, interpolation=0.0, power=1.0),
    10,
    on_step=lambda before, after, params: iterates.append(params),
  )
  # Power 1: x_t += 2 / (t + 1) (z_t - x_{t-1}) makes weights t, for t from 1.
  time = np.arange(1.0, 11.0)
  mean = jax.tree.map(
    lambda *leaves: np.tensordot(time / time.sum(), np.stack(leaves), 1), *iterates
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    alrao.eval_params(state, params),
    mean,
  )


def test_rates_start_as_alraos_under_the_equal_posterior():
  params, state = train(alrao.schedule_free_alrao(KEY, 1e-4, 1.0), 1)
  drawn = alrao.unit_rates(alrao.alrao(KEY, None, 1e-4, 1.0).init(params), params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    alrao.unit_rates(state, params),
    drawn,
  )


def test_units_gather_by_the_posterior_before_each_step():
  low, high, narrowest = 1e-4, 1.0, 0.4
  ladder = np.linspace(np.log(low), np.log(high), N)
  whole = (np.log(high) - np.log(low)) / np.sqrt(12)  # of a uniform law
  shares = []

  def check(before, after, _):
    weights = np.exp(np.asarray(alrao.log_weights(before), np.float64))
    middle = np.sum(weights * ladder)
    spread = np.sqrt(np.sum(weights * (ladder - middle) ** 2))
    shares.append(np.clip(spread / whole, narrowest, 1.0))
    expected = middle + shares[-1] * (np.log([low, high]) - middle)
    np.testing.assert_allclose(np.log(np.array(bounds(after))), expected, atol=1e-4)

  optimizer = alrao.schedule_free_alrao(KEY, low, high, narrowest=narrowest)
  train(optimizer, 30, on_step=check)
  assert shares[0] == 1.0
  assert shares[-1] == narrowest
  assert any(narrowest < share < 1 for share in shares)


def test_a_certain_posterior_and_no_least_width_give_all_units_its_heads_rate():
  optimizer = alrao.schedule_free_alrao(
    KEY, 1e-4, 1.0, narrowest=0.0, averaging=alrao.bayes(likelihood_scale=100.0)
  )
  params, state = train(optimizer, 3)
  rates = alrao.unit_rates(state, params)
  ladder = np.geomspace(1e-4, 1.0, N)
  np.testing.assert_allclose(rates["hidden"]["kernel"], ladder[2], rtol=1e-4)
  heads = rates["out"]["alrao_heads"]["bias"][:, 0]
  np.testing.assert_allclose(heads, ladder, rtol=1e-5)


def test_width_one_leaves_the_rates_alone():
  _, state = train(alrao.schedule_free_alrao(KEY, 1e-4, 1.0, narrowest=1.0), 10)
  np.testing.assert_allclose(np.array(bounds(state)), [1e-4, 1.0], rtol=1e-5)


def test_units_follow_the_mean_of_several_posteriors():
  params = make_params()
  params["second"] = params["out"]
  optimizer = alrao.schedule_free_alrao(KEY, 1e-4, 1.0, narrowest=0.0)
  update = jax.jit(optimizer.update)
  state = optimizer.init(params)
  opposed = {"out": LOG_LIKELIHOODS, "second": LOG_LIKELIHOODS[::-1]}
  for _ in range(30):
    _, state = update(params, state, params, head_log_likelihoods=opposed)
  # One posterior is the other's mirror image, so the middle is the interval's.
  ends = np.log(np.array(bounds(state)))
  np.testing.assert_allclose(ends.mean(), np.log(1e-2), atol=1e-3)
  assert np.log(1e-4) < ends[0] < ends[1] < 0


def test_export_gives_the_winning_heads_average():
  params, state = train(alrao.schedule_free_alrao(KEY), 30)
  averages = alrao.eval_params(state, params)
  exported = alrao.export(state, averages)
  heads = averages["out"]["alrao_heads"]
  np.testing.assert_array_equal(exported["out"]["kernel"], heads["kernel"][2])
  assert not np.array_equal(heads["kernel"], params["out"]["alrao_heads"]["kernel"])


def test_training_goes_on_after_collapse_as_the_kept_head_would():
  optimizer = alrao.schedule_free_alrao(KEY, narrowest=1.0)
  params, state = train(optimizer, 30)
  few_state, few = alrao.collapse(optimizer, state, params, keep=1)
  update = jax.jit(
    lambda params, state, observed: optimizer.update(
      gradient(params, 0), state, params, head_log_likelihoods=observed
    )
  )
  whole, whole_state = update(params, state, LOG_LIKELIHOODS)
  kept, kept_state = update(few, few_state, LOG_LIKELIHOODS[2:3])
  kept_head = lambda tree: tree["out"]["alrao_heads"]["kernel"][0]  # noqa: E731
  whole_head = lambda tree: tree["out"]["alrao_heads"]["kernel"][2]  # noqa: E731
  np.testing.assert_array_equal(kept_head(kept), whole_head(whole))
  np.testing.assert_array_equal(
    kept_head(alrao.eval_params(kept_state, few)),
    whole_head(alrao.eval_params(whole_state, params)),
  )


def test_a_single_head_has_no_spread_to_divide_by():
  optimizer = alrao.schedule_free_alrao(KEY)
  params, state = train(optimizer, 30)
  state, few = alrao.collapse(optimizer, state, params, keep=1)
  update = jax.jit(optimizer.update)
  _, state = update(few, state, few, head_log_likelihoods=jnp.zeros(1))
  assert np.isfinite(np.array(bounds(state))).all()


def test_equal_ends_are_kept_to_the_last_bit():
  _, state = train(alrao.schedule_free_alrao(KEY, 0.01, 0.01), 5)
  np.testing.assert_allclose(np.array(bounds(state)), 0.01, rtol=1e-6)


def test_a_diverged_head_leaves_the_average_finite():
  out = LOG_LIKELIHOODS.at[3].set(-jnp.inf)
  params, state = train(alrao.schedule_free_alrao(KEY), 10, out)
  leaves = jax.tree.leaves((alrao.eval_params(state, params), bounds(state)))
  assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_eval_params_are_found_inside_wrappers():
  params = make_params()
  optimizer = optax.MultiSteps(
    optax.chain(
      alrao.per_head(optax.clip_by_global_norm(1.0)), alrao.schedule_free_alrao(KEY)
    ),
    2,
  )
  state = optimizer.init(params)
  jax.tree.map(np.testing.assert_array_equal, alrao.eval_params(state, params), params)


HALF = [jnp.bfloat16, jnp.float16]
one_weight = lambda dtype: {  # noqa: E731
  "body": {"kernel": jnp.ones((1, 1), dtype)},
  "out": {"alrao_heads": {"kernel": jnp.ones((N, 1, 1), dtype)}},
}


def descend(optimizer, params, gradient, steps):
  """Steps with one gradient for all entries."""
  grads = jax.tree.map(lambda p: jnp.full_like(p, gradient), params)

  @jax.jit
  def run(params, state):
    def step(_, carry):
      params, state = carry
      updates, state = optimizer.update(
        grads, state, params, head_log_likelihoods=jnp.zeros(N)
      )
      return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, steps, step, (params, state))

  return run(params, optimizer.init(params))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_keeps_the_small_steps(dtype):
  optimizer = alrao.schedule_free_alrao(KEY, 1e-4, 1e-4)
  expected, expected_state = descend(optimizer, one_weight(jnp.float32), 0.1, 3000)
  params, state = descend(optimizer, one_weight(dtype), 0.1, 3000)
  assert expected["body"]["kernel"] < 0.8
  wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
  # The average to 1 %, the parameters to their own rounding.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0.01),
    wide(alrao.eval_params(state, params)),
    alrao.eval_params(expected_state, expected),
  )
  rtol = float(jnp.finfo(dtype).eps)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), wide(params), expected
  )


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_holds_two_copies_in_float32(dtype):
  state = alrao.schedule_free_alrao(KEY).init(one_weight(dtype))
  for tree in (state.average, state.z):
    assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
  wide = alrao.schedule_free_alrao(KEY).init(one_weight(jnp.float32))
  assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(wide)) + 2


def test_float16_stays_in_its_range():
  optimizer = alrao.schedule_free_alrao(KEY, 1e3, 1e3)
  params, state = descend(optimizer, one_weight(jnp.float16), 1.0, 300)
  averages = alrao.eval_params(state, params)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, averages, state)))
  assert abs(averages["body"]["kernel"]) > 1e4


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_goes_on_after_collapse_and_inside_multi_steps(dtype):
  optimizer = optax.MultiSteps(alrao.schedule_free_alrao(KEY, 1e-3, 1e-3), 2)
  with jax.numpy_dtype_promotion("standard"):  # MultiSteps' own mean
    params, state = descend(optimizer, one_weight(dtype), 0.1, 100)
    state, params = alrao.collapse(optimizer, state, params, (1,))
    grads = jax.tree.map(lambda p: jnp.full_like(p, 0.1), params)
    before = alrao.eval_params(state, params)["body"]["kernel"]
    step = jax.jit(optimizer.update)
    for _ in range(60):
      updates, state = step(grads, state, params, head_log_likelihoods=jnp.zeros(1))
      params = optax.apply_updates(params, updates)
  assert alrao.eval_params(state, params)["body"]["kernel"] < before
  assert types_of(state) == types_of(jax.eval_shape(optimizer.init, params))


def types_of(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_decay_that_half_precision_rounds_to_one_still_averages():
  make = optax.inject_hyperparams(alrao.schedule_free_alrao, static_args=("key",))
  with jax.numpy_dtype_promotion("standard"):
    params, state = descend(make(KEY, 1e-3, 1e-3), one_weight(jnp.bfloat16), 0.1, 100)
  expected, _ = descend(
    alrao.schedule_free_alrao(KEY, 1e-3, 1e-3), one_weight(jnp.float32), 0.1, 100
  )
  np.testing.assert_allclose(
    params["body"]["kernel"].astype(jnp.float32), expected["body"]["kernel"], rtol=0.01
  )


def test_eval_params_outlive_the_state_and_the_parameters():
  optimizer = alrao.schedule_free_alrao(KEY)
  params = make_params()
  state = optimizer.init(params)
  evaluated = alrao.eval_params(state, params)
  step = jax.jit(
    lambda p, s: optimizer.update(p, s, p, head_log_likelihoods=LOG_LIKELIHOODS),
    donate_argnums=(0, 1),
  )
  expected = jax.tree.map(np.array, params)
  step(params, state)
  jax.tree.map(np.testing.assert_array_equal, evaluated, expected)


def is_trained(params):
  return {name: name == "out" for name in params}


@pytest.mark.parametrize("kind", ["partition", "masked"])
def test_eval_params_are_the_parameters_where_nothing_is_trained(kind):
  inner, params = alrao.schedule_free_alrao(KEY), make_params()
  if kind == "partition":
    labels = {"hidden": "frozen", "out": "trained"}
    optimizer = optax.partition(
      {"trained": inner, "frozen": optax.set_to_zero()}, labels
    )
  else:
    optimizer = optax.masked(inner, is_trained(params))
  state = optimizer.init(params)
  updates, state = jax.jit(optimizer.update)(
    gradient(params, 0), state, params, head_log_likelihoods=LOG_LIKELIHOODS
  )
  moved = jax.tree.map(lambda p: p + 1, params)
  averages = alrao.eval_params(state, moved)
  jax.tree.map(np.testing.assert_array_equal, averages["hidden"], moved["hidden"])
  assert not np.array_equal(
    averages["out"]["alrao_heads"]["bias"], moved["out"]["alrao_heads"]["bias"]
  )


def test_eval_params_of_linens_variables_leave_batch_statistics_alone():
  params, state = train(alrao.schedule_free_alrao(KEY), 3)
  variables = {"params": params, "batch_stats": {"hidden": {"mean": jnp.ones(6)}}}
  found = alrao.eval_params(state, variables)
  jax.tree.map(
    np.testing.assert_array_equal, found["params"], alrao.eval_params(state, params)
  )
  np.testing.assert_array_equal(found["batch_stats"]["hidden"]["mean"], np.ones(6))


def test_eval_params_of_other_parameters_say_what_to_pass():
  params, state = train(alrao.schedule_free_alrao(KEY), 1)
  with pytest.raises(ValueError, match="nothing of shape .3, 6. at 'hidden/kernel'"):
    alrao.eval_params(state, {**params, "hidden": {"bias": jnp.ones(6)}})
  with pytest.raises(ValueError, match="Pass the parameters that the optimizer's"):
    alrao.eval_params(state, {"model": params})


def test_without_heads_the_rates_stay_and_no_log_likelihoods_are_needed():
  params = {"hidden": make_params()["hidden"]}
  optimizer = alrao.schedule_free_alrao(KEY, 1e-3, 1e-1, heads=False)
  state = optimizer.init(params)
  rates = alrao.unit_rates(state, params)
  updates, state = jax.jit(optimizer.update)(params, state, params)
  jax.tree.map(np.testing.assert_array_equal, alrao.unit_rates(state, params), rates)
  # The first step is that of normalised gradients: z moves by the rate, and x too.
  jax.tree.map(
    lambda u, r, p: np.testing.assert_allclose(u, -r * np.sign(p), rtol=1e-4),
    updates,
    rates,
    params,
  )


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    ({"interpolation": 1.0}, "interpolation=...) must be less than 1"),
    ({"interpolation": -0.1}, "interpolation"),
    ({"narrowest": 1.5}, "narrowest"),
    ({"power": -1.0}, "power"),
    ({"min_learning_rate": 0.0}, "min_learning_rate"),
  ],
)
def test_arguments_out_of_range_are_named(arguments, text):
  with pytest.raises(ValueError, match=text.replace("(", r"\(").replace(")", r"\)")):
    alrao.schedule_free_alrao(KEY, **arguments)


def test_update_without_params_says_what_to_write():
  optimizer = alrao.schedule_free_alrao(KEY)
  params = make_params()
  with pytest.raises(TypeError, match="optimizer.update"):
    optimizer.update(
      params, optimizer.init(params), head_log_likelihoods=LOG_LIKELIHOODS
    )


def test_eval_params_of_another_optimizer_are_an_error():
  params = make_params()
  with pytest.raises(ValueError, match="schedule_free_alrao"):
    alrao.eval_params(alrao.alrao(KEY).init(params), params)


@pytest.mark.parametrize("dtype", [jnp.float32, *HALF])
def test_specs_of_parameters_map_onto_the_state(dtype):
  optimizer, params = alrao.schedule_free_alrao(KEY), one_weight(dtype)
  state = optimizer.init(params)
  specs = jax.tree.map(lambda _: "spec", params)
  mapped = optax.tree.map_params(
    optimizer, lambda _, spec: spec, state, specs, transform_non_params=lambda _: None
  )
  assert mapped.average == specs


def test_a_decay_of_one_is_refused():
  with pytest.raises(ValueError, match=r"b2=\.\.\.\) must be less than 1, got 1"):
    alrao.schedule_free_alrao(KEY, b2=1.0)


@pytest.mark.parametrize(
  ("optimizer", "each"), [(alrao.alrao(KEY), 1), (alrao.schedule_free_alrao(KEY), 3)]
)
def test_each_further_parameter_costs_few_kernels_and_no_copy(optimizer, each):
  """The parameter; schedule-free also the averages of squares and of parameters."""

  def step(params, state, grads):
    updates, state = optimizer.update(
      grads, state, params, head_log_likelihoods=jnp.zeros(3)
    )
    return optax.apply_updates(params, updates), state

  def count(num_layers):
    layers = {f"layer_{i}": {"kernel": jnp.ones((4, 4))} for i in range(num_layers)}
    params = layers | {"out": {"alrao_heads": {"kernel": jnp.ones((3, 4, 2))}}}
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
      params, optimizer.init(params), params
    )
    text = lowered.compile().as_text()
    return np.array([text.count(" fusion("), text.count(" copy(")])

  np.testing.assert_array_equal(count(3) - count(1), [2 * each, 0])
