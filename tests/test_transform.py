"""What the transformations do to updates: exact special cases, guards and errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alrao_jax as alrao


@pytest.fixture(autouse=True)
def optax_may_promote(request):
  """Adam's bias correction raises a float to an integer power."""
  adam = "adam" in request.node.name
  with jax.numpy_dtype_promotion("standard" if adam else "strict"):
    yield


def params_with_heads(num_heads=4):
  return {
    "dense": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)},
    "out": {
      "alrao_heads": {
        "kernel": jnp.ones((num_heads, 5, 2)),
        "bias": jnp.ones((num_heads, 2)),
      }
    },
  }


def gradients(params, key=1):
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(key), len(leaves))
  draws = [jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(treedef, draws)


def assert_trees_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.3])
def test_equal_bounds_are_sgd_to_the_last_bit(rate):
  params = params_with_heads()
  ours = alrao.scale_by_unit_rates(jax.random.key(0), rate, rate)
  sgd = optax.sgd(rate)
  grads = gradients(params)
  updates, _ = ours.update(grads, ours.init(params), params)
  expected, _ = sgd.update(grads, sgd.init(params), params)
  assert_trees_equal(updates, expected)


def test_updates_are_minus_rate_times_gradient():
  params = params_with_heads()
  optimizer = alrao.scale_by_unit_rates(jax.random.key(0))
  state = optimizer.init(params)
  grads = gradients(params)
  updates, _ = optimizer.update(grads, state, params)
  rates = alrao.unit_rates(state, params)
  assert_trees_equal(updates, jax.tree.map(lambda r, g: -r * g, rates, grads))


def test_flip_sign_off_leaves_the_sign():
  params = params_with_heads()
  grads = gradients(params)
  down = alrao.scale_by_unit_rates(jax.random.key(0))
  up = alrao.scale_by_unit_rates(jax.random.key(0), flip_sign=False)
  assert_trees_equal(
    down.update(grads, down.init(params))[0],
    jax.tree.map(jnp.negative, up.update(grads, up.init(params))[0]),
  )


def test_frozen_parameters_get_no_update():
  params = params_with_heads()
  optimizer = alrao.scale_by_unit_rates(
    jax.random.key(0), units=alrao.UnitOptions(overrides=(("^dense/", "frozen"),))
  )
  updates, _ = optimizer.update(gradients(params), optimizer.init(params), params)
  assert_trees_equal(updates["dense"], jax.tree.map(jnp.zeros_like, params["dense"]))
  assert all(np.all(u != 0) for u in jax.tree.leaves(updates["out"]))


def two_branches(num_heads=4):
  def branch():
    return {
      "dense": {"kernel": jnp.ones((5, 8)), "bias": jnp.zeros(8)},
      "out": {"alrao_heads": {"kernel": jnp.ones((num_heads, 8, 3))}},
    }

  return {"a": branch(), "b": branch()}


def momentum_and_decay(**options):
  return alrao.alrao(
    jax.random.key(0),
    optax.trace(0.9),
    weight_decay=0.1,
    **options,
  )


FREEZING = {
  "momentum": momentum_and_decay,
  "guard": lambda **options: momentum_and_decay(guard=alrao.guard(), **options),
  "schedule_free": lambda **options: alrao.schedule_free_alrao(
    jax.random.key(0), weight_decay=0.1, **options
  ),
  "multi_steps": lambda **options: optax.MultiSteps(momentum_and_decay(**options), 2),
}
HEADS_REPORTS = {
  "a/out": jnp.array([-1.0, -2.0, -3.0, -4.0]),
  "b/out": jnp.array([-2.0, -1.0, -3.0, -4.0]),
}


@pytest.mark.parametrize("pattern", ["^a/", "alrao_heads", "^a/out/", "kernel"])
@pytest.mark.parametrize("name", FREEZING)
def test_nothing_below_a_frozen_path_moves_heads_included(name, pattern):
  params = start = two_branches()
  optimizer = FREEZING[name](units=alrao.UnitOptions(((pattern, "frozen"),)))
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  with jax.numpy_dtype_promotion("standard"):
    for step in range(4):
      grads = gradients(params, step)
      updates, state = update(grads, state, params, head_log_likelihoods=HEADS_REPORTS)
      params = optax.apply_updates(params, updates)
  averaged = alrao.eval_params(state, params) if name == "schedule_free" else params
  for tree in (params, averaged):
    for (keys, now), then in zip(
      jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(start), strict=True
    ):
      path = "/".join(key.key for key in keys)
      frozen = re.search(pattern, path) is not None
      assert bool((now == then).all()) == frozen, path
  # The posterior over frozen heads still learns who predicts best.
  assert int(jnp.argmax(alrao.log_weights(state, "a/out"))) == 0
  assert int(jnp.argmax(alrao.log_weights(state, "b/out"))) == 1


def test_frozen_heads_are_counted_collapsed_exported_and_split():
  params = two_branches()
  optimizer = momentum_and_decay(
    units=alrao.UnitOptions(((".", "frozen"),)), guard=alrao.guard()
  )
  state = optimizer.init(params)
  rates = alrao.unit_rates(
    state, params, units=alrao.UnitOptions(overrides=((".", "frozen"),))
  )
  assert not any(leaf.any() for leaf in jax.tree.leaves(rates))
  alrao.with_unit_rates(
    state, params, rates, units=alrao.UnitOptions(overrides=((".", "frozen"),))
  )
  mesh = jax.make_mesh((1,), ("heads",), (jax.sharding.AxisType.Auto,))
  _, split = alrao.head_shardings(optimizer, params, mesh)
  assert split["a"]["out"]["alrao_heads"]["kernel"].spec == jax.P("heads")
  clipped = alrao.per_head(optax.clip_by_global_norm(1.0))
  updates, _ = clipped.update(params, clipped.init(params), params)
  kernel = updates["a"]["out"]["alrao_heads"]["kernel"]
  np.testing.assert_allclose(jnp.square(kernel).sum((1, 2)), 0.5, rtol=1e-6)
  grads = gradients(params)
  _, state = optimizer.update(grads, state, params, head_log_likelihoods=HEADS_REPORTS)
  got = alrao.scalars(
    state,
    params,
    jax.tree.map(jnp.zeros_like, params),
    units=alrao.UnitOptions(overrides=((".", "frozen"),)),
  )
  assert got["alrao/a/out/heads_diverged"] == 0
  state, params = alrao.collapse(optimizer, state, params, keep=(1, 2))
  updates, state = optimizer.update(
    gradients(params),
    state,
    params,
    head_log_likelihoods={name: report[1:3] for name, report in HEADS_REPORTS.items()},
  )
  assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
  single = alrao.export(None, params, head=1)
  assert single["a"]["out"]["kernel"].shape == (8, 3)


def test_gates_of_a_cell_share_one_vector_of_rates():
  hidden = 4
  params = {
    "lstm": {
      f"{side}{gate}": {"kernel": jnp.ones((hidden, hidden)), "bias": jnp.ones(hidden)}
      for side in "ih"
      for gate in "ifgo"
    }
  }
  state = alrao.scale_by_unit_rates(jax.random.key(0)).init(params)
  assert state.quantiles.shape == (hidden,)
  vectors = {
    tuple(np.asarray(gate["bias"]).tolist())
    for gate in alrao.unit_rates(state, params)["lstm"].values()
  }
  assert len(vectors) == 1


def test_alrao_equals_the_chain_of_its_parts():
  params = params_with_heads()
  key, grads = jax.random.key(0), gradients(params)
  ours = alrao.alrao(key, optax.trace(0.9), weight_decay=0.01, schedule=0.5)
  parts = optax.chain(
    alrao.drop_diverged(),
    optax.trace(0.9),
    optax.add_decayed_weights(0.01),
    alrao.scale_by_unit_rates(key),
    optax.scale(0.5),
    alrao.track_heads(),
  )
  results = []
  for optimizer in (ours, parts):
    state = optimizer.init(params)
    for _ in range(2):
      updates, state = optimizer.update(
        grads, state, params, head_log_likelihoods=-jnp.arange(4.0)
      )
    results.append((updates, alrao.log_weights(state)))
  assert_trees_equal(*results)


def test_a_schedule_multiplies_all_rates():
  params = params_with_heads()
  schedule = lambda count: 1.0 / (1.0 + jnp.float32(count))  # noqa: E731
  scheduled = alrao.alrao(jax.random.key(0), schedule=schedule)
  plain = alrao.alrao(jax.random.key(0))
  grads, ll = gradients(params), jnp.zeros(4)
  state, plain_state = scheduled.init(params), plain.init(params)
  for count in range(3):
    updates, state = scheduled.update(grads, state, params, head_log_likelihoods=ll)
    expected, plain_state = plain.update(
      grads, plain_state, params, head_log_likelihoods=ll
    )
    jax.tree.map(
      lambda u, e, c=count: np.testing.assert_allclose(u, e / (1.0 + c), rtol=1e-6),
      updates,
      expected,
    )


def test_without_heads_every_layer_draws_and_nothing_is_tracked():
  params = {"dense": params_with_heads()["dense"]}
  optimizer = alrao.alrao(jax.random.key(0), heads=False)
  updates, state = optimizer.update(gradients(params), optimizer.init(params), params)
  assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
  with pytest.raises(ValueError, match="exactly one TrackHeadsState"):
    alrao.log_weights(state)


def test_a_model_without_heads_is_an_error():
  params = {"dense": params_with_heads()["dense"]}
  with pytest.raises(ValueError, match=r"alrao\(\.\.\., heads=False\)"):
    alrao.alrao(jax.random.key(0)).init(params)


def test_diverged_heads_get_no_update_even_from_momentum():
  params = params_with_heads()
  optimizer = alrao.alrao(jax.random.key(0), optax.trace(0.9))
  state = optimizer.init(params)
  grads = gradients(params)
  _, state = optimizer.update(grads, state, params, head_log_likelihoods=jnp.zeros(4))
  zero = jax.tree.map(jnp.zeros_like, grads)
  # Nothing was seen of the third, which says nothing against it.
  seen = jnp.array([0.0, -jnp.inf, jnp.nan, 0.0])
  updates, state = optimizer.update(zero, state, params, head_log_likelihoods=seen)
  kernel = updates["out"]["alrao_heads"]["kernel"]
  assert (kernel[1] == 0).all() and all((kernel[j] != 0).all() for j in (0, 2, 3))
  assert np.isfinite(alrao.log_weights(state)).all()


def test_updates_that_would_overflow_their_parameter_are_dropped():
  params = {**params_with_heads(), "huge": {"bias": jnp.full(2, 3e38)}}
  grads = jax.tree.map(jnp.ones_like, params)
  grads["huge"]["bias"] = jnp.array([-3e38, 1.0])
  optimizer = alrao.alrao(
    jax.random.key(0), min_learning_rate=1.0, max_learning_rate=1.0
  )
  updates, _ = optimizer.update(
    grads, optimizer.init(params), params, head_log_likelihoods=jnp.zeros(4)
  )
  assert updates["huge"]["bias"].tolist() == [0.0, -1.0]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_gradients_that_are_not_finite_never_reach_the_state_of_adam(bad):
  params = params_with_heads()
  grads = gradients(params)
  grads["dense"]["kernel"] = grads["dense"]["kernel"].at[0, 0].set(bad)
  optimizer = alrao.alrao(jax.random.key(0), optax.scale_by_adam())
  updates, state = optimizer.update(
    grads, optimizer.init(params), params, head_log_likelihoods=jnp.zeros(4)
  )
  for leaf in jax.tree.leaves((updates, state)):
    assert np.isfinite(leaf).all()
  assert updates["dense"]["kernel"][0, 0] == 0


def test_per_head_clips_each_head_and_the_body_by_themselves():
  params = params_with_heads()
  grads = gradients(params)
  grads["out"]["alrao_heads"]["kernel"] *= jnp.array([1e-3, 1.0, 1e3, 1e6])[
    :, None, None
  ]
  clip = optax.clip_by_global_norm(1.0)
  ours = alrao.per_head(clip)
  updates, _ = ours.update(grads, ours.init(params), params)
  expected, _ = clip.update({"dense": grads["dense"]}, clip.init(params))
  assert_trees_equal(updates["dense"], expected["dense"])
  for j in range(4):
    head = jax.tree.map(lambda g, j=j: g[j], grads["out"])
    expected, _ = clip.update(head, clip.init(head))
    jax.tree.map(
      lambda u, e, j=j: np.testing.assert_allclose(u[j], e, rtol=1e-6),
      updates["out"],
      expected,
    )


def test_per_head_of_adam_changes_nothing_as_it_is_elementwise():
  params = params_with_heads()
  adam = optax.scale_by_adam()
  ours = alrao.per_head(adam)
  state, plain = ours.init(params), adam.init(params)
  for key in range(3):
    grads = gradients(params, key)
    updates, state = ours.update(grads, state, params)
    expected, plain = adam.update(grads, plain, params)
    jax.tree.map(
      lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-6), updates, expected
    )


def test_per_head_without_heads_is_the_transformation_itself():
  params = {"dense": params_with_heads()["dense"]}
  clip = optax.clip_by_global_norm(0.1)
  ours = alrao.per_head(clip)
  grads = gradients(params)
  assert_trees_equal(
    ours.update(grads, ours.init(params), params)[0],
    clip.update(grads, clip.init(params))[0],
  )


def two_tasks():
  heads = lambda: params_with_heads()["out"]  # noqa: E731
  return {"actor": heads(), "net": {"critic": heads()}}


def test_several_multi_heads_keep_a_posterior_each():
  params = two_tasks()
  optimizer = alrao.alrao(jax.random.key(0))
  state = optimizer.init(params)
  ll = {"actor": jnp.array([0.0, -1, -2, -jnp.inf]), "critic": -jnp.arange(4.0)[::-1]}
  updates, state = optimizer.update(
    gradients(params), state, params, head_log_likelihoods=ll
  )
  alone = alrao.track_heads()
  for name in ("actor", "critic"):
    tree = {"out": params["actor"]}
    _, single = alone.update(
      tree, alone.init(tree), tree, head_log_likelihoods=ll[name]
    )
    np.testing.assert_array_equal(
      alrao.log_weights(state, name), alrao.log_weights(single)
    )
  assert (updates["actor"]["alrao_heads"]["kernel"][3] == 0).all()
  assert (updates["net"]["critic"]["alrao_heads"]["kernel"] != 0).all()
  mapped = optax.tree.map_params(optimizer, lambda p: p, state)
  assert jax.tree.structure(mapped) == jax.tree.structure(state)


def test_posteriors_are_asked_for_by_path():
  params = two_tasks()
  optimizer = alrao.alrao(jax.random.key(0))
  state = optimizer.init(params)
  with pytest.raises(ValueError, match=r"one MultiHead of \('actor', 'net/critic'\)"):
    alrao.log_weights(state)
  with pytest.raises(ValueError, match="must be a mapping"):
    optimizer.update(params, state, params, head_log_likelihoods=jnp.zeros(4))
  with pytest.raises(ValueError, match="a state with one posterior"):
    single = alrao.alrao(jax.random.key(0))
    alrao.log_weights(single.init(params_with_heads()), "actor")


def test_log_likelihoods_of_another_number_of_heads_are_an_error():
  params = params_with_heads(4)
  optimizer = alrao.alrao(jax.random.key(0))
  with pytest.raises(ValueError, match=r"must have shape \(4,\).*got \(5,\)"):
    optimizer.update(
      params, optimizer.init(params), params, head_log_likelihoods=jnp.zeros(5)
    )


@pytest.mark.parametrize("factory", [alrao.alrao, alrao.scale_by_unit_rates])
@pytest.mark.parametrize(
  "bounds", [(1.0, 0.1), (0.0, 1.0), (-1e-3, 1.0), (float("nan"), 1.0), (0.1, jnp.inf)]
)
def test_bounds_are_checked(factory, bounds):
  with pytest.raises(ValueError, match=rf"{factory.__name__}\("):
    factory(jax.random.key(0), min_learning_rate=bounds[0], max_learning_rate=bounds[1])


@pytest.mark.parametrize("factory", [alrao.alrao, alrao.scale_by_unit_rates])
@pytest.mark.parametrize("key", [0, 1e-3, optax.adam(1e-3), None])
def test_what_is_no_key_is_an_error(factory, key):
  with pytest.raises(TypeError, match="jax.random.key"):
    factory(key)


@pytest.mark.parametrize(
  "base",
  [
    optax.adam(1e-3),
    optax.sgd(0.1),
    optax.sgd(0.1, momentum=0.9),
    optax.lion(1e-4),
    optax.adam(optax.linear_schedule(0.0, 1e-3, 10)),
  ],
)
def test_a_base_with_a_learning_rate_is_an_error(base):
  with pytest.raises(ValueError, match="must not have a learning rate of its own"):
    alrao.alrao(jax.random.key(0), base)


@pytest.mark.parametrize(
  "base",
  [
    optax.trace(0.9),
    optax.scale_by_adam(),
    optax.chain(optax.clip(1.0), optax.scale_by_rms()),
    optax.scale_by_lion(),
    alrao.per_head(optax.clip_by_global_norm(1.0)),
    optax.add_noise(10.0, 0.5, 3),
  ],
)
def test_a_base_without_a_learning_rate_is_welcome(base):
  alrao.alrao(jax.random.key(0), base)


def test_a_base_that_is_no_transformation_is_an_error():
  with pytest.raises(TypeError, match="optax gradient transformation"):
    alrao.alrao(jax.random.key(0), optax.scale_by_adam)


def test_a_distribution_without_quantile_function_is_an_error():
  with pytest.raises(TypeError, match="method quantile"):
    alrao.alrao(jax.random.key(0), distribution=lambda u: u)


def test_an_averaging_that_is_none_is_an_error():
  with pytest.raises(TypeError, match="alrao_jax.switch"):
    alrao.track_heads(alrao.switch)


def test_integer_parameters_are_an_error_that_names_them():
  params = {**params_with_heads(), "table": {"kernel": jnp.ones((2, 2), jnp.int32)}}
  with pytest.raises(TypeError, match="table/kernel"):
    alrao.alrao(jax.random.key(0)).init(params)


def test_an_override_that_matches_nothing_is_an_error():
  with pytest.raises(ValueError, match="must match the path of a parameter"):
    alrao.alrao(
      jax.random.key(0), units=alrao.UnitOptions(overrides=(("typo", "frozen"),))
    ).init(params_with_heads())


@pytest.mark.parametrize(
  "options",
  [
    {"distribution": alrao.bernoulli(0.5, 0.5)},
    {"units": alrao.UnitOptions(unit_axis="first")},
    {"units": alrao.UnitOptions(overrides=(("", "per_weight"),))},
    {"units": alrao.UnitOptions(overrides=(("bias", "one_rate"),))},
  ],
  ids=["distribution", "unit_axis", "per_weight", "overrides"],
)
def test_alrao_hands_its_options_to_the_rates(options):
  params = {"square": {"kernel": jnp.ones((4, 4))}, **params_with_heads()}
  grads, key = gradients(params), jax.random.key(0)
  whole, rates = alrao.alrao(key, **options), alrao.scale_by_unit_rates(key, **options)
  updates, _ = whole.update(
    grads, whole.init(params), params, head_log_likelihoods=jnp.zeros(4)
  )
  assert_trees_equal(updates, rates.update(grads, rates.init(params), params)[0])
  plain = alrao.scale_by_unit_rates(key)
  other, _ = plain.update(grads, plain.init(params), params)
  same = jax.tree.map(np.array_equal, updates, other)
  assert not all(jax.tree.leaves(same))


def test_alrao_hands_on_strictness_the_single_head_and_the_mask():
  key, params = jax.random.key(0), params_with_heads(1)
  with pytest.raises(ValueError, match="strict=True"):
    alrao.alrao(key, units=alrao.UnitOptions(strict=True)).init(
      {**params, "mystery": jnp.ones((2, 2))}
    )
  state = alrao.alrao(key, single_head_learning_rate=0.3).init(params)
  kernel = alrao.unit_rates(state, params)["out"]["alrao_heads"]["kernel"]
  np.testing.assert_allclose(kernel, 0.3, rtol=1e-5)
  masked = alrao.alrao(
    key, weight_decay=0.1, weight_decay_mask={"dense": True, "out": False}
  )
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = masked.update(
    zero, masked.init(params), params, head_log_likelihoods=jnp.zeros(1)
  )
  assert all((u != 0).all() for u in jax.tree.leaves(updates["dense"]))
  assert all((u == 0).all() for u in jax.tree.leaves(updates["out"]))


def test_bfloat16_updates_are_the_float32_products_rounded_once():
  params = params_with_heads()
  grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients(params))
  optimizer = alrao.scale_by_unit_rates(jax.random.key(0))
  updates, state = optimizer.update(grads, optimizer.init(params), params)
  expected = jax.tree.map(
    lambda g, r: (-r * g.astype(jnp.float32)).astype(jnp.bfloat16),
    grads,
    alrao.unit_rates(state, params),
  )
  assert_trees_equal(updates, expected)


def test_per_head_hands_extra_arguments_on():
  def update(updates, state, params=None, *, factor):
    return jax.tree.map(lambda u: factor * u, updates), state

  inner = optax.GradientTransformationExtraArgs(lambda _: (), update)
  params = params_with_heads()
  ours = alrao.per_head(inner)
  updates, _ = ours.update(params, ours.init(params), params, factor=3.0)
  assert_trees_equal(updates, jax.tree.map(lambda p: 3.0 * p, params))


def test_per_head_refuses_heads_of_different_number():
  params = {"a": params_with_heads(3), "b": params_with_heads(4)}
  with pytest.raises(ValueError, match="agree on num_heads"):
    alrao.per_head(optax.clip_by_global_norm(1.0)).init(params)


def test_updates_of_another_shape_are_an_error_that_names_them():
  params = {"dense": params_with_heads()["dense"]}
  optimizer = alrao.scale_by_unit_rates(jax.random.key(0))
  state = optimizer.init(params)
  with pytest.raises(ValueError, match="'dense/other' of shape"):
    optimizer.update({"dense": {"other": jnp.ones(2)}}, state, params)


def test_a_gradient_whose_square_overflows_is_dropped():
  grads = {"a": jnp.array([1e17, 1e20, -jnp.inf, jnp.nan])}
  dropping = alrao.drop_diverged()
  updates, _ = dropping.update(grads, dropping.init(grads))
  np.testing.assert_array_equal(updates["a"], jnp.array([1e17, 0.0, 0.0, 0.0]))


def test_linen_and_nnx_are_attributes_of_the_package():
  assert alrao.linen.MultiHead.__module__.startswith("alrao_jax.linen")
  assert alrao.nnx.MultiHead.__module__.startswith("alrao_jax.nnx")
  with pytest.raises(AttributeError, match="haiku"):
    alrao.haiku  # noqa: B018
