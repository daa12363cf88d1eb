"""One spelling everywhere: units=, (opt_state, params), paths; and what was removed."""

import copy
import inspect
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alrao_jax as alrao
import alrao_jax.linen
from alrao_jax._rates import find_rates

KEY = jax.random.key(0)


def dense(inputs=3, units=4):
  return {"kernel": jnp.ones((inputs, units)), "bias": jnp.ones(units)}


def heads(num_heads=3):
  return {"alrao_heads": {"kernel": jnp.ones((num_heads, 4, 2))}}


def make_params():
  return {"dense": dense(), "out": heads()}


def two_heads():
  return {"actor": heads(), "net": {"critic": heads(), "body": dense()}}


# --- Units are one argument


UNITS = alrao.UnitOptions(overrides=(("dense/kernel", (0,)),))


@pytest.mark.parametrize(
  ("function", "most"),
  [
    (alrao.alrao, 13),
    (alrao.schedule_free_alrao, 14),
    (alrao.scale_by_unit_rates, 7),
    (alrao.guard_units, 2),
    (alrao.skip_broken_batches, 2),
    (alrao.report, 5),
    (alrao.scalars, 4),
    (alrao.unit_rates, 3),
    (alrao.with_unit_rates, 4),
    (alrao.describe_units, 2),
    (alrao.unit_specs, 2),
  ],
)
def test_units_are_one_argument(function, most):
  parameters = inspect.signature(function).parameters
  assert parameters["units"].default == alrao.UnitOptions()
  assert len(parameters) <= most


@pytest.mark.parametrize(
  "make",
  [
    lambda units: alrao.alrao(KEY, units=units, guard=alrao.guard()),
    lambda units: alrao.schedule_free_alrao(KEY, units=units, guard=alrao.guard()),
    lambda units: optax.chain(
      alrao.scale_by_unit_rates(KEY, units=units),
      alrao.guard_units(units=units),
      alrao.track_heads(),
    ),
  ],
  ids=["alrao", "schedule_free", "chain"],
)
def test_whoever_reads_units_takes_the_same_options(make):
  params = make_params()
  optimizer = make(UNITS)
  state = optimizer.init(params)
  updates, state = optimizer.update(
    params, state, params, head_log_likelihoods=jnp.zeros(3)
  )
  rates = alrao.unit_rates(state, params, units=UNITS)["dense"]["kernel"]
  assert len(np.unique(np.asarray(rates)[:, 0])) == 3
  assert len(np.unique(np.asarray(rates)[0])) == 1
  alrao.with_unit_rates(
    state, params, alrao.unit_rates(state, params, units=UNITS), units=UNITS
  )
  assert alrao.report(state, params, updates, units=UNITS).units == 3 + 4
  assert "alrao/units_moving" in alrao.scalars(state, params, updates, units=UNITS)
  for read in (alrao.unit_rates, alrao.report):
    with pytest.raises(ValueError, match="same units="):
      read(state, params)


def test_options_pass_inject_hyperparams():
  params = make_params()
  injected = optax.inject_hyperparams(alrao.alrao, static_args=("key",))
  optimizer = injected(KEY, units=UNITS, max_learning_rate=1.0)
  state: Any = optimizer.init(params)
  assert "units" not in state.hyperparams
  expected = alrao.alrao(KEY, max_learning_rate=1.0, units=UNITS).init(params)
  np.testing.assert_array_equal(
    find_rates(state).quantiles, find_rates(expected).quantiles
  )


def test_schedule_free_alrao_reads_units_on_the_first_axis():
  params = {"square": {"weight": jnp.ones((4, 4))}, "out": heads()}
  units = alrao.UnitOptions(unit_axis="first")
  state = alrao.schedule_free_alrao(KEY, units=units).init(params)
  rates = alrao.unit_rates(state, params, units=units)["square"]["weight"]
  assert len(np.unique(np.asarray(rates)[:, 0])) == 4


# --- What was removed says what to write


REMOVED = [
  (alrao.alrao, ("overrides", "strict", "unit_axis", "granularity", "redraw", "names")),
  (alrao.schedule_free_alrao, ("overrides", "strict", "names")),
  (
    alrao.scale_by_unit_rates,
    ("overrides", "heads", "strict", "unit_axis", "granularity", "redraw"),
  ),
  (
    alrao.guard_units,
    ("overrides", "heads", "strict", "unit_axis", "granularity"),
  ),
  (
    alrao.skip_broken_batches,
    ("overrides", "heads", "strict", "unit_axis", "granularity"),
  ),
  (alrao.drop_diverged, ("heads",)),
  (alrao.report, ("overrides", "heads", "unit_axis", "granularity")),
  (alrao.scalars, ("overrides", "heads", "unit_axis", "granularity")),
  (alrao.unit_rates, ("overrides", "heads", "unit_axis", "granularity")),
  (alrao.with_unit_rates, ("overrides", "heads", "unit_axis", "granularity")),
  (alrao.describe_units, ("overrides", "heads", "strict", "unit_axis", "granularity")),
  (alrao.UnitOptions, ("heads", "granularity")),
  (alrao.track_heads, ("heads", "names")),
  (alrao.per_head, ("heads",)),
  (alrao.collapse, ("heads",)),
  (alrao.take_heads, ("heads",)),
  (alrao.export, ("heads",)),
  (alrao.head_shardings, ("heads",)),
  (alrao.tree_head_shardings, ("heads",)),
  (alrao.linen.collapse, ("heads",)),
]


@pytest.mark.parametrize(
  ("function", "name"),
  [(function, name) for function, names in REMOVED for name in names],
)
def test_a_removed_keyword_says_what_to_write(function, name):
  pattern = rf"{function.__name__}\({name}=...\) was removed: .*(write|leave|draw)"
  with pytest.raises(TypeError, match=pattern):
    function(**{name: None})


@pytest.mark.parametrize("given", [None, "^out/", 1])
def test_heads_of_alrao_is_true_or_false(given):
  with pytest.raises(TypeError, match=r"alrao\(heads=...\) must be True.*heads=False"):
    alrao.alrao(KEY, heads=given)


def test_without_heads_alrao_tracks_none():
  params = {"dense": dense()}
  optimizer = alrao.alrao(KEY, heads=False)
  optimizer.update(params, optimizer.init(params), params)


@pytest.mark.parametrize("factory", [alrao.alrao, alrao.schedule_free_alrao])
def test_a_model_with_heads_is_not_said_to_have_none(factory):
  with pytest.raises(ValueError, match=r"heads=False\) .* got one at 'out'"):
    factory(KEY, heads=False).init(make_params())


def test_options_survive_pickle_and_copies():
  assert pickle.loads(pickle.dumps(UNITS)) == copy.deepcopy(UNITS) == UNITS


@pytest.mark.parametrize(
  "optimizer",
  [lambda: alrao.alrao(KEY), lambda: alrao.schedule_free_alrao(KEY)],
)
def test_a_model_without_heads_says_so(optimizer):
  with pytest.raises(ValueError, match=r"found no heads"):
    optimizer().init({"dense": dense()})


# --- (opt_state, params), everywhere


def test_what_takes_both_takes_the_state_first():
  for function in (
    alrao.collapse,
    alrao.export,
    alrao.eval_params,
    alrao.report,
    alrao.scalars,
    alrao.unit_rates,
    alrao.with_unit_rates,
  ):
    names = list(inspect.signature(function).parameters)
    assert names.index("opt_state") == names.index("params") - 1


def test_what_returns_both_returns_the_state_first():
  params, optimizer = make_params(), alrao.alrao(KEY)
  state = optimizer.init(params)
  new_state, new_params = alrao.collapse(optimizer, state, params, keep=2)
  assert jax.tree.structure(new_state) == jax.tree.structure(state)
  assert new_params["out"]["alrao_heads"]["kernel"].shape[0] == 2
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((1,), ("heads",), auto)
  of_state, of_params = alrao.head_shardings(optimizer, params, mesh)
  assert jax.tree.structure(of_state) == jax.tree.structure(state)
  assert jax.tree.structure(of_params) == jax.tree.structure(params)


@pytest.mark.parametrize(
  "call",
  [
    lambda o, s, p: alrao.collapse(o, p, s),
    lambda o, s, p: alrao.collapse(o, p, s, 1),
    lambda o, s, p: alrao.export(p, s),
    lambda o, s, p: alrao.eval_params(p, s),
    lambda o, s, p: alrao.report(p, s),
    lambda o, s, p: alrao.unit_rates(p, s),
    lambda o, s, p: alrao.with_unit_rates(p, s, p),
  ],
)
def test_state_and_parameters_swapped_are_recognised(call):
  params, optimizer = make_params(), alrao.schedule_free_alrao(KEY)
  with pytest.raises(
    TypeError, match=r"\(params=...\).*an optimizer's state.*opt_state"
  ):
    call(optimizer, optimizer.init(params), params)


# --- Several MultiHeads go by their paths


REPORTS = {
  "actor": jnp.array([-1.0, -2.0, -3.0]),
  "net/critic": jnp.array([-3.0, -1.0, -2.0]),
}


def tracked(reports=REPORTS, params=None):
  params = two_heads() if params is None else params
  optimizer = alrao.alrao(KEY, optax.trace(0.9))
  state = optimizer.init(params)
  _, state = optimizer.update(params, state, params, head_log_likelihoods=reports)
  return optimizer, state, params


def test_posteriors_go_by_the_paths_of_the_multi_heads():
  _, state, _ = tracked()
  for path, reported in REPORTS.items():
    alone = alrao.track_heads()
    params = {"out": heads()}
    _, expected = alone.update(
      params, alone.init(params), params, head_log_likelihoods=reported
    )
    np.testing.assert_array_equal(
      alrao.log_weights(state, path), alrao.log_weights(expected)
    )


def test_an_unambiguous_end_of_a_path_names_a_multi_head():
  reports = {"actor": REPORTS["actor"], "critic": REPORTS["net/critic"]}
  _, state, params = tracked(reports)
  _, expected, _ = tracked()
  np.testing.assert_array_equal(
    alrao.log_weights(state, "critic"), alrao.log_weights(expected, "net/critic")
  )
  assert alrao.report(state, params, name="critic").learning_rate is not None
  one = alrao.export(state, params, head={"critic": 0, "actor": 2})
  two = alrao.export(None, params, head={"net/critic": 0, "actor": 2})
  jax.tree.map(np.testing.assert_array_equal, one, two)
  assert one["net"]["critic"]["kernel"].shape == (4, 2)


def test_a_whole_path_beats_an_end():
  params = {"critic": heads(), "net": {"critic": heads()}}
  reports = {"critic": REPORTS["actor"], "net/critic": REPORTS["net/critic"]}
  _, state, _ = tracked(reports, params)
  one, other = (
    alrao.log_weights(state, "critic"),
    alrao.log_weights(state, "net/critic"),
  )
  assert jnp.argmax(one) == 0 and jnp.argmax(other) == 1


@pytest.mark.parametrize("name", [None, "critics", "ritic", "t"])
def test_a_name_that_is_no_end_of_a_path_is_an_error(name):
  _, state, _ = tracked()
  with pytest.raises(ValueError, match=r"log_weights\(name=...\).*\('actor', 'net/cri"):
    alrao.log_weights(state, name)


def test_an_ambiguous_end_is_an_error():
  params = {"a": {"out": heads()}, "b": {"out": heads()}}
  reports = {"a/out": REPORTS["actor"], "b/out": REPORTS["actor"]}
  _, state, _ = tracked(reports, params)
  with pytest.raises(ValueError, match=r"'out'.*fits.*\('a/out', 'b/out'\)"):
    alrao.log_weights(state, "out")
  with pytest.raises(ValueError, match="fits"):
    tracked({"out": REPORTS["actor"], "b/out": REPORTS["actor"]}, params)


@pytest.mark.parametrize(
  "reports",
  [
    REPORTS["actor"],
    {"actor": REPORTS["actor"]},
    {**REPORTS, "third": REPORTS["actor"]},
    {**REPORTS, "critic": REPORTS["actor"]},
  ],
)
def test_reports_must_name_each_multi_head_once(reports):
  with pytest.raises(ValueError, match=r"head_log_likelihoods=.*'actor', 'net/critic'"):
    tracked(reports)


def test_a_multi_head_at_the_root_is_named_alrao_heads():
  params = {"alrao_heads": {"kernel": jnp.ones((3, 4, 2))}, "critic": heads()}
  reports = {"alrao_heads": REPORTS["actor"], "critic": REPORTS["net/critic"]}
  _, state, _ = tracked(reports, params)
  assert jnp.argmax(alrao.log_weights(state, "alrao_heads")) == 0
  plain = alrao.export(state, params, head={"alrao_heads": 1, "critic": 2})
  assert plain["kernel"].shape == plain["critic"]["kernel"].shape == (4, 2)


def test_one_multi_head_has_no_name():
  optimizer, params = alrao.alrao(KEY), make_params()
  with pytest.raises(
    ValueError, match=r"one posterior.*write log_weights\(opt_state\)"
  ):
    alrao.log_weights(optimizer.init(params), "out")


# --- A tree without leaves


@pytest.mark.parametrize("params", [make_params(), two_heads()], ids=["one", "two"])
@pytest.mark.parametrize("wrap", [lambda tx: tx, optax.masked, optax.MultiSteps])
def test_tree_map_params_finds_the_momenta(params, wrap):
  inner = alrao.alrao(KEY, optax.trace(0.9))
  if wrap is optax.masked:
    optimizer = optax.masked(inner, lambda tree: jax.tree.map(lambda _: True, tree))
  elif wrap is optax.MultiSteps:
    optimizer = optax.MultiSteps(inner, 2).gradient_transformation()
  else:
    optimizer = inner
  state = optimizer.init(params)
  changed = optax.tree.map_params(
    optimizer, lambda p: p + 1, state, transform_non_params=lambda x: x
  )
  assert jax.tree.structure(changed) == jax.tree.structure(state)
  moved = [
    not np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(state), strict=True)
  ]
  copies = 2 if wrap is optax.MultiSteps else 1
  assert sum(moved) == copies * len(jax.tree.leaves(params))


# --- An averaging of one's own


def own_averaging(space):
  """Bayes in log space, or in probabilities, which nothing normalises when read."""
  if space == "log":
    return alrao.Averaging(
      init=lambda n, dtype=jnp.float32: jnp.full(n, -np.log(n), dtype),
      update=lambda state, seen: jax.nn.log_softmax(state + seen),
      log_weights=lambda state: state,
    )
  return alrao.Averaging(
    init=lambda n, dtype=jnp.float32: {"p": jnp.full(n, 1 / n, dtype)},
    update=lambda state, seen: {"p": jax.nn.softmax(jnp.log(state["p"]) + seen)},
    log_weights=lambda state: jnp.log(state["p"]),
  )


@pytest.mark.parametrize("space", ["log", "probabilities"])
def test_collapse_leaves_an_averaging_of_ones_own_summing_to_one(space):
  averaging = own_averaging(space)
  optimizer, params = alrao.alrao(KEY, averaging=averaging), make_params()
  _, state = optimizer.update(
    params, optimizer.init(params), params, head_log_likelihoods=REPORTS["actor"]
  )
  before = jnp.exp(alrao.log_weights(state))[jnp.array([0, 1])]
  state, params = alrao.collapse(optimizer, state, params, keep=2)
  held = alrao._tree.find_state(state, alrao.TrackHeadsState, "").averaging
  kept = jnp.exp(averaging.log_weights(held))
  np.testing.assert_allclose(kept, before / before.sum(), rtol=1e-6)
  np.testing.assert_allclose(jnp.exp(alrao.log_weights(state)), kept, rtol=1e-6)
  optimizer.update(params, state, params, head_log_likelihoods=jnp.zeros(2))


def test_a_state_that_knows_is_asked():
  class Counted(alrao._averaging.NamedTuple):
    log: jax.Array
    count: jax.Array

    @property
    def observations(self):
      return self.count

    def renormalised(self):
      return self._replace(log=jax.nn.log_softmax(self.log))

  averaging = alrao.Averaging(
    init=lambda n, dtype=jnp.float32: Counted(
      jnp.full(n, -np.log(n), dtype), jnp.zeros([], jnp.int32)
    ),
    update=lambda state, seen: Counted(
      jax.nn.log_softmax(state.log + seen), state.count + 1
    ),
    log_weights=lambda state: state.log,
  )
  optimizer, params = alrao.alrao(KEY, averaging=averaging), make_params()
  _, state = optimizer.update(
    params, optimizer.init(params), params, head_log_likelihoods=REPORTS["actor"]
  )
  assert alrao.report(state, params).observations == 1
  state, params = alrao.collapse(optimizer, state, params, keep=2)
  held = alrao._tree.find_state(state, alrao.TrackHeadsState, "").averaging
  assert int(held.count) == 1
  np.testing.assert_allclose(jnp.exp(held.log).sum(), 1, rtol=1e-6)


@pytest.mark.parametrize(
  ("averaging", "observations"),
  [(alrao.switch(), 2), (alrao.bayes(), None), (alrao.fixed_share(0.1), None)],
)
def test_a_report_asks_the_state_how_much_it_has_seen(averaging, observations):
  optimizer, params = alrao.alrao(KEY, averaging=averaging), make_params()
  state = optimizer.init(params)
  for _ in range(2):
    _, state = optimizer.update(
      params, state, params, head_log_likelihoods=REPORTS["actor"]
    )
  assert alrao.report(state, params).observations == observations
