"""Scalars and reports: every number recomputed by hand from a small state."""

import dataclasses
import functools
import io
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import alrao_jax as alrao
import alrao_jax.linen
import alrao_jax.nnx
from alrao_jax._averaging import SwitchState
from alrao_jax._heads import TrackHeadsState
from alrao_jax._tree import find_state

N = 4
KEY = jax.random.key(0)
LOG_LIKELIHOODS = np.array([-3.0, -1.0, -2.0, -np.inf], np.float32)
LADDER = [1e-5, 1e-3, 1e-1, 1e1]


def make_params(dtype=jnp.float32):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape).astype(dtype))

  return {
    "dense": {"kernel": draw(3, 12), "bias": draw(12)},
    "out": {"alrao_heads": {"kernel": draw(N, 12, 2), "bias": draw(N, 2)}},
  }


def one_step(optimizer, params, log_likelihoods=LOG_LIKELIHOODS, scale=0.1):
  """The state after a step, and its updates."""
  grads = jax.tree.map(lambda p: (scale * jnp.cos(p)).astype(p.dtype), params)

  @jax.jit
  def step(params):
    state = optimizer.init(params)
    return optimizer.update(grads, state, params, head_log_likelihoods=log_likelihoods)

  updates, state = step(params)
  return state, updates


@functools.cache
def example():
  """Parameters; a state after one step, with a guard; updates, units 0 to 2 silent."""
  params = make_params()
  optimizer = alrao.alrao(KEY, guard=alrao.guard(limit=0.5))
  # The second step's report differs from the first's, so that few numbers are alike.
  state, updates = one_step(optimizer, params, scale=10.0)
  updates["dense"] = jax.tree.map(lambda u: u.at[..., :3].set(0.0), updates["dense"])
  return params, state, updates


def posterior(state):
  return np.exp(np.asarray(alrao.log_weights(state), np.float64))


# --- Scalars


def test_scalars_of_the_heads_are_the_formulas():
  _, state, _ = example()
  weights = posterior(state)
  entropy = -sum(w * math.log(w) for w in weights)
  expected = {f"alrao/head_{j}/weight": weights[j] for j in range(N)} | {
    "alrao/effective_heads": math.exp(entropy),
    "alrao/log10_rate": sum(
      w * k for w, k in zip(weights, (-5, -3, -1, 1), strict=True)
    ),
  }
  got = alrao.scalars(state)
  for name, value in expected.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_scalars_of_the_units_are_counts():
  params, state, updates = example()
  rates = np.asarray(alrao.unit_rates(state, params)["dense"]["bias"])
  grads = 10.0 * np.cos(np.vstack([params["dense"]["kernel"], params["dense"]["bias"]]))
  weights = np.vstack([params["dense"]["kernel"], params["dense"]["bias"]])
  steps = rates * np.linalg.norm(grads, axis=0)
  guarded = steps > 0.5 * np.maximum(np.linalg.norm(weights, axis=0), 1)
  moving = ~guarded & (np.arange(12) > 2)
  assert 0 < guarded.sum() < 12 and guarded[3:].any()
  got = {name: float(x) for name, x in alrao.scalars(state, params, updates).items()}
  assert got["alrao/units_guarded"] == pytest.approx(guarded.sum() / 12)
  assert got["alrao/guard_trips"] == guarded.sum()
  assert got["alrao/units_moving"] == pytest.approx(moving.sum() / 12)
  assert (got["alrao/heads_moving"], got["alrao/heads_diverged"]) == (3, 1)


def test_a_step_lost_to_rounding_is_no_motion():
  for dtype, moving in ((jnp.float32, 1.0), (jnp.bfloat16, 0.0)):
    params = {"dense": {"kernel": jnp.ones((4, 2), dtype)}}
    updates = {"dense": {"kernel": jnp.full((4, 2), 1e-5, dtype)}}
    state = alrao.scale_by_unit_rates(KEY).init(params)
    assert alrao.scalars(state, params, updates) == {"alrao/units_moving": moving}
    moved = optax.apply_updates(params, updates)
    assert bool((moved["dense"]["kernel"] != 1).all()) == bool(moving)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 0.0])
def test_a_unit_without_a_finite_step_stands(bad):
  params = make_params()
  state, updates = one_step(alrao.alrao(KEY, None, 0.1, 1.0), params)
  updates["dense"]["kernel"] = updates["dense"]["kernel"].at[:, 5].set(bad)
  updates["dense"]["bias"] = updates["dense"]["bias"].at[5].set(bad)
  got = alrao.scalars(state, params, updates)["alrao/units_moving"]
  np.testing.assert_allclose(got, 11 / 12, rtol=1e-6)


def test_scalars_are_arrays_under_jit_and_their_names_never_change():
  params, state, updates = example()
  optimizer = alrao.alrao(KEY, guard=alrao.guard(limit=0.5))

  @jax.jit
  def step(state):
    _, state = optimizer.update(
      updates, state, params, head_log_likelihoods=jnp.asarray(LOG_LIKELIHOODS)
    )
    metrics = {"loss": jnp.zeros(())}
    metrics |= alrao.scalars(state, params, updates)
    return state, metrics

  before = alrao.scalars(optimizer.init(params), params, updates)
  state, metrics = step(state)
  assert set(metrics) == {"loss", *before}
  for name, value in metrics.items():
    assert value.shape == () and jnp.isfinite(value), name
  eager = alrao.scalars(state, params, updates)
  for name, value in eager.items():
    np.testing.assert_allclose(value, metrics[name], rtol=1e-6)


def test_scalars_keep_finite_where_a_weight_is_zero():
  state, _ = one_step(alrao.alrao(KEY, averaging=alrao.bayes()), make_params())
  got = alrao.scalars(state)
  assert got["alrao/head_3/weight"] == 0
  assert all(jnp.isfinite(value) for value in got.values())


def test_scalars_are_vmapped_over_keys():
  params = make_params()
  keys = jax.random.split(KEY, 3)

  def some(key):
    state = alrao.alrao(key).init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    return alrao.scalars(state, params, grads)

  got = jax.vmap(some)(keys)
  assert {value.shape for value in got.values()} == {(3,)}


def test_each_layer_of_heads_has_its_own_scalars():
  params = make_params()
  params["second"] = params["out"]
  optimizer = alrao.alrao(KEY)
  other = LOG_LIKELIHOODS[::-1].copy()
  reports = {"out": LOG_LIKELIHOODS, "second": other}
  state, updates = one_step(optimizer, params, reports)
  got = alrao.scalars(state, params, updates)
  assert "alrao/effective_heads" not in got
  np.testing.assert_allclose(
    got["alrao/second/head_0/weight"], got["alrao/out/head_3/weight"], rtol=1e-6
  )
  second = alrao.report(state, params, name="second")
  np.testing.assert_allclose(
    second.heads[2].weight, got["alrao/second/head_2/weight"], rtol=1e-6
  )


WRAPPERS = {
  "chain": lambda tx: optax.chain(optax.identity(), tx),
  "masked": lambda tx: optax.masked(tx, True),
  "partition": lambda tx: optax.partition({"a": tx}, "a"),
  "multi_steps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_states_are_found_within_wrappers(name):
  params, state, updates = example()
  optimizer = alrao.alrao(KEY, guard=alrao.guard(limit=0.5))
  with jax.numpy_dtype_promotion("standard"):
    wrapped, _ = one_step(WRAPPERS[name](optimizer), params, scale=10.0)
  expected = alrao.scalars(state, params, updates)
  got = alrao.scalars(wrapped, params, updates)
  assert set(got) == set(expected)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, expected)


def test_injected_bounds_are_read():
  injected = optax.inject_hyperparams(alrao.alrao, static_args=("key",))
  params = make_params()
  optimizer = injected(KEY, None, 1e-3, 1e3, guard=alrao.guard())
  state = optimizer.init(params)
  got = alrao.scalars(state)
  np.testing.assert_allclose(got["alrao/log10_rate"], 0.0, atol=1e-5)
  assert got["alrao/guard_trips"] == 0
  np.testing.assert_allclose(alrao.report(state, params).learning_rate, 1.0, rtol=1e-5)


def test_linen_and_nnx_models_are_reported_alike():
  head = nn.Dense(2)
  model = alrao_jax.linen.MultiHead(head, num_heads=N)
  params = jax.jit(model.init)(KEY, jnp.ones((1, 3)))["params"]
  linen = alrao.report(alrao.alrao(KEY).init(params), params)

  module = alrao_jax.nnx.MultiHead(
    lambda rngs: nnx.Linear(3, 2, rngs=rngs), num_heads=N, rngs=nnx.Rngs(0)
  )
  optimizer = nnx.Optimizer(module, alrao.alrao(KEY), wrt=nnx.Param)
  state = nnx.state(module, nnx.Param)
  assert alrao.report(optimizer.opt_state, state) == linen
  updates = jax.tree.map(jnp.ones_like, state)
  got = alrao.scalars(optimizer.opt_state, state, updates)
  assert got["alrao/heads_moving"] == N


def test_only_updates_that_multi_steps_has_made_tell_who_moves():
  params = make_params()
  tx = optax.MultiSteps(alrao.alrao(KEY, None, 0.1, 1.0), 2)
  grads = jax.tree.map(jnp.cos, params)
  state, moving = tx.init(params), []
  with jax.numpy_dtype_promotion("standard"):
    for _ in range(4):
      updates, state = jax.jit(tx.update)(
        grads, state, params, head_log_likelihoods=jnp.asarray(LOG_LIKELIHOODS)
      )
      got = alrao.scalars(state, params, updates)
      moving.append((bool(tx.has_updated(state)), float(got["alrao/units_moving"])))
  assert moving == [(False, 0.0), (True, 1.0)] * 2


def test_a_posterior_alone_has_scalars():
  tracker = alrao.track_heads()
  assert set(alrao.scalars(tracker.init(make_params()))) == {
    *(f"alrao/head_{j}/weight" for j in range(N)),
    "alrao/effective_heads",
    "alrao/heads_diverged",
    "alrao/all_heads_diverged_steps",
  }


@functools.cache
def two_parts():
  """Body and heads each with rates of their own: parameters, state and updates."""
  params = make_params()
  optimizer = optax.chain(
    optax.partition(
      {
        "body": optax.chain(alrao.scale_by_unit_rates(KEY, 0.1), alrao.guard_units()),
        "head": alrao.scale_by_unit_rates(KEY, 1e-4, 1.0),
      },
      {"dense": "body", "out": "head"},
    ),
    alrao.track_heads(),
  )
  return params, *one_step(optimizer, params)


def test_parts_with_rates_of_their_own_have_scalars_of_the_whole_and_of_each():
  params, state, updates = two_parts()
  whole = alrao.scalars(state)
  assert "alrao/effective_heads" in whole and "alrao/log10_rate" not in whole
  part = lambda tree: {"out": tree["out"]}  # noqa: E731
  head = (state[0].inner_states["head"], state[1])
  got = alrao.scalars(head, part(params), part(updates))
  np.testing.assert_allclose(
    got["alrao/log10_rate"],
    posterior(state) @ np.linspace(-4, 0, N),
    rtol=1e-5,
  )
  assert got["alrao/heads_moving"] == 3 and "alrao/units_moving" not in got
  body = alrao.scalars(
    state[0].inner_states["body"],
    {"dense": params["dense"]},
    {"dense": updates["dense"]},
  )
  assert set(body) == {
    "alrao/units_moving",
    "alrao/units_guarded",
    "alrao/guard_trips",
  }


def test_parts_with_rates_of_their_own_are_reported_one_by_one(tmp_path):
  pytest.importorskip("matplotlib")
  params, state, updates = two_parts()
  part = lambda tree: {"out": tree["out"]}  # noqa: E731
  head, body = (state[0].inner_states[name] for name in ("head", "body"))
  found = alrao.report((head, state[1]), part(params), part(updates))
  np.testing.assert_allclose(
    [h.rate for h in found.heads], np.geomspace(1e-4, 1, N), rtol=1e-5
  )
  assert found.decades == () and "0 units" in str(found)
  found.plot(tmp_path / "report.png")
  dense = {"dense": params["dense"]}
  assert alrao.report(body, dense).units == 12
  with pytest.raises(
    ValueError, match=r"report\(\) needs one .*, got 2. Pass the part"
  ):
    alrao.report(state, params)
  with pytest.raises(ValueError, match="over 4 heads, but rates for 0 heads"):
    alrao.report((body, state[1]), dense)


# --- What went wrong


def test_steps_that_went_wrong_are_counted_by_what():
  params = make_params()
  optimizer = alrao.alrao(KEY, None, 0.1, 0.1, guard=alrao.guard())
  update, state = jax.jit(optimizer.update), optimizer.init(params)
  fine = jax.tree.map(lambda p: 0.1 * jnp.cos(p), params)
  body = jax.tree.map(jnp.copy, fine)
  body["dense"]["bias"] = body["dense"]["bias"].at[3].set(jnp.nan)
  head = jax.tree.map(jnp.copy, fine)
  head["out"]["alrao_heads"]["bias"] = (
    fine["out"]["alrao_heads"]["bias"].at[0].set(jnp.inf)
  )
  huge = jax.tree.map(lambda g: 1e12 * g, fine)
  good, none = jnp.asarray(LOG_LIKELIHOODS), jnp.full(N, -jnp.inf)
  for grads, seen in (
    (fine, good),
    (body, good),
    (head, good),
    (body, good),
    (fine, none),
    (huge, good),
  ):
    _, state = update(grads, state, params, head_log_likelihoods=seen)
  got = alrao.scalars(state)
  expected = {
    "nonfinite_body_steps": 2,
    "nonfinite_head_steps": 1,
    "all_heads_diverged_steps": 1,
    "skipped_steps": 1,
    "guard_trips": 0,
  }
  for name, value in expected.items():
    assert got[f"alrao/{name}"] == value, name
    assert got[f"alrao/{name}"].dtype == jnp.int32
  found = alrao.report(state, params)
  assert {name: getattr(found, name) for name in list(expected)[:4]} == dict(
    list(expected.items())[:4]
  )
  text = str(found)
  assert "not finite in 2 steps of the body, 1 of the heads" in text
  assert "1 steps skipped" in text


@pytest.mark.parametrize("guard", [None, alrao.guard()])
def test_a_run_without_a_healthy_head_says_so_and_names_the_guard(guard):
  params = make_params()
  optimizer = alrao.schedule_free_alrao(KEY, guard=guard)
  update, state = jax.jit(optimizer.update), optimizer.init(params)
  for _ in range(3):
    _, state = update(params, state, params, head_log_likelihoods=jnp.full(N, -jnp.inf))
  got = alrao.scalars(state)
  assert got["alrao/heads_diverged"] == N
  assert got["alrao/all_heads_diverged_steps"] == 3
  text = str(alrao.report(state, params))
  assert "All heads have diverged, in 3 steps so far" in text
  assert ("guard=alrao_jax.guard()" in text) == (guard is None)
  _, state = update(
    params, state, params, head_log_likelihoods=jnp.asarray(LOG_LIKELIHOODS)
  )
  assert "All heads had diverged in 3 steps." in str(alrao.report(state, params))


def test_each_layer_of_heads_counts_its_own_divergence():
  params = make_params()
  params["second"] = params["out"]
  optimizer = alrao.alrao(KEY)
  reports = {"out": LOG_LIKELIHOODS, "second": np.full(N, -np.inf, np.float32)}
  state, updates = one_step(optimizer, params, reports)
  got = alrao.scalars(state, params, updates)
  assert (got["alrao/out/heads_diverged"], got["alrao/second/heads_diverged"]) == (1, N)
  assert got["alrao/out/all_heads_diverged_steps"] == 0
  assert got["alrao/second/all_heads_diverged_steps"] == 1
  assert alrao.report(state, params, name="second").heads_diverged == N


# --- The report


@pytest.mark.parametrize(
  "averaging", [alrao.switch(), alrao.bayes(), alrao.fixed_share(0.01)]
)
def test_every_averaging_is_reported_with_its_count_if_it_has_one(averaging):
  params = make_params()
  state, updates = one_step(alrao.alrao(KEY, averaging=averaging), params)
  found = alrao.report(state, params, updates)
  counts = isinstance(find_state(state, TrackHeadsState, "").averaging, SwitchState)
  assert found.observations == (1 if counts else None)
  assert ("after 1 steps" in str(found)) == counts
  np.testing.assert_allclose([h.weight for h in found.heads], posterior(state))


@pytest.mark.parametrize("keep", [(3, 1), (2,)])
def test_kept_heads_are_reported_slowest_first(keep, tmp_path):
  pytest.importorskip("matplotlib")
  params, state, _ = example()
  optimizer = alrao.alrao(KEY, guard=alrao.guard(limit=0.5))
  state, params = alrao.collapse(optimizer, state, params, keep)
  found = alrao.report(state, params)
  expected = [LADDER[head] for head in sorted(keep)]
  np.testing.assert_allclose([h.rate for h in found.heads], expected, rtol=1e-5)
  assert f"of {len(keep)} heads in effect" in str(found)
  found.plot(tmp_path / "report.png")
  assert (tmp_path / "report.png").stat().st_size > 0


def test_heads_with_rates_written_in_are_drawn_in_any_order(tmp_path):
  pytest.importorskip("matplotlib")
  params, state, _ = example()
  rates = alrao.unit_rates(state, params)
  rates["out"] = jax.tree.map(lambda r: r[::-1], rates["out"])
  state = alrao.with_unit_rates(state, params, rates)
  alrao.report(state, params).plot(tmp_path / "report.png")
  assert (tmp_path / "report.png").stat().st_size > 0


def test_a_guard_of_a_part_is_left_out_of_the_report():
  params = make_params()
  params["more"] = params["dense"]
  part = {"dense": False, "more": True, "out": False}
  optimizer = optax.chain(
    alrao.scale_by_unit_rates(KEY),
    optax.masked(alrao.guard_units(), part),
    alrao.track_heads(),
  )
  state, updates = one_step(optimizer, params, scale=1e6)
  found = alrao.report(state, params, updates)
  assert found.units == 24 and found.units_guarded is None
  # Of the 12 units that it guards; the slowest rate makes steps of 1e-5 * 1e6.
  assert alrao.scalars(state)["alrao/units_guarded"] == 1.0


def test_the_report_of_the_heads_is_the_formulas():
  params, state, updates = example()
  found = alrao.report(state, params, updates)
  weights = posterior(state)
  assert found.learning_rate == pytest.approx(
    math.prod(rate**w for rate, w in zip(LADDER, weights, strict=True)), rel=1e-5
  )
  assert found.effective_heads == pytest.approx(
    math.prod(w**-w for w in weights), rel=1e-5
  )
  assert found.observations == 1 and found.heads_diverged == 1
  for head, rate, weight in zip(found.heads, LADDER, weights, strict=True):
    assert head.rate == pytest.approx(rate, rel=1e-5)
    assert head.weight == pytest.approx(weight, rel=1e-6)
  assert [head.moving for head in found.heads] == [True, True, True, False]
  assert [head.healthy for head in found.heads] == [True, True, True, False]


def test_the_report_of_the_units_is_a_histogram():
  params, state, updates = example()
  found = alrao.report(state, params, updates)
  rates = np.asarray(alrao.unit_rates(state, params)["dense"]["bias"])
  entries = np.vstack([updates["dense"]["kernel"], updates["dense"]["bias"]])
  squares = (entries.astype(np.float64) ** 2).sum(axis=0)
  edges = [decade.low for decade in found.decades] + [found.decades[-1].high]
  np.testing.assert_allclose(np.diff(np.log10(edges)), 1.0)
  counts, _ = np.histogram(rates, edges)
  sums, _ = np.histogram(rates, edges, weights=squares)
  moving, _ = np.histogram(rates[squares > 0], edges)
  assert [decade.units for decade in found.decades] == counts.tolist()
  assert [decade.moving for decade in found.decades] == moving.tolist()
  shares = [decade.share_of_squared_update for decade in found.decades]
  np.testing.assert_allclose(shares, sums / squares.sum(), rtol=1e-5)
  trips = alrao.scalars(state)["alrao/guard_trips"]
  assert found.units_guarded == trips > 0
  assert found.units == 12 and found.units_moving == moving.sum()


def test_equal_bounds_at_a_power_of_ten_are_one_decade():
  params = make_params()
  found = alrao.report(alrao.alrao(KEY, None, 1e-5, 1e-5).init(params), params)
  assert [(d.low, d.high, d.units) for d in found.decades] == [(1e-5, 1e-4, 12)]
  assert found.learning_rate == pytest.approx(1e-5, rel=1e-5)


def test_units_without_a_rate_have_a_line_of_their_own():
  params = make_params()
  rates = alrao.bernoulli(0.5, p=0.5)
  state = alrao.alrao(KEY, distribution=rates).init(params)
  found = alrao.report(state, params)
  zero = int((alrao.unit_rates(state, params)["dense"]["bias"] == 0).sum())
  assert [(d.low, d.units) for d in found.decades] == [(0.0, zero), (0.1, 12 - zero)]


def test_a_model_without_heads_has_a_report_of_its_units():
  params = {"dense": make_params()["dense"]}
  state = alrao.alrao(KEY, heads=False).init(params)
  found = alrao.report(state, params)
  assert (found.heads, found.learning_rate, found.heads_diverged) == ((), None, None)
  assert found.units == 12 and "heads" not in str(found)
  assert set(alrao.scalars(state)) == {
    "alrao/nonfinite_body_steps",
    "alrao/nonfinite_head_steps",
  }


def test_without_updates_nothing_is_said_about_who_moves():
  params, state, _ = example()
  found = alrao.report(state, params)
  assert found.units_moving is None and found.heads_moving is None
  assert {decade.share_of_squared_update for decade in found.decades} == {None}
  assert "moving." not in str(found) and "1 diverged" in str(found)


def test_a_report_is_plain_data():
  params, state, updates = example()
  found = alrao.report(state, params, updates)
  copied = json.loads(json.dumps(dataclasses.asdict(found)))
  assert copied["heads"][1]["weight"] == found.heads[1].weight
  with pytest.raises(dataclasses.FrozenInstanceError):
    found.learning_rate = 1.0  # pyright: ignore


def test_the_text_and_the_rich_table_say_the_same():
  rich = pytest.importorskip("rich.console")
  params, state, updates = example()
  found = alrao.report(state, params, updates)
  console = rich.Console(width=100, record=True, file=io.StringIO())
  console.print(found)
  drawn = console.export_text()
  cells = str(found).split()
  assert f"{found.learning_rate:.2g}" in cells
  for line in str(found).splitlines():
    for cell in line.split("  "):
      assert cell.strip() in drawn
  assert "1 diverged" in drawn and f"{found.units_guarded} guarded" in drawn


@pytest.mark.parametrize("with_updates", [False, True])
@pytest.mark.parametrize("heads", [False, True])
def test_the_picture_is_drawn_without_pyplot(tmp_path, with_updates, heads):
  pytest.importorskip("matplotlib")
  params, state, updates = example()
  found = alrao.report(state, params, updates if with_updates else None)
  if not heads:
    found = dataclasses.replace(found, heads=(), learning_rate=None)
  loaded = "matplotlib.pyplot" in sys.modules
  found.plot(tmp_path / "report.png")
  assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
  assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_a_missing_package_is_named_with_the_way_out(monkeypatch, tmp_path):
  params, state, _ = example()
  found = alrao.report(state, params)
  for module in ("rich.console", "matplotlib.figure"):
    monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(
    ImportError, match=r"pip install rich; str\(report\) does without"
  ):
    found.table()
  with pytest.raises(ImportError, match=r"Report.plot\(\) needs matplotlib"):
    found.plot(tmp_path / "report.png")
  assert "Suggested learning rate" in str(found)


# --- Errors


def test_a_state_of_several_seeds_is_an_error():
  params = make_params()
  optimizer = alrao.alrao(KEY)
  states = jax.vmap(lambda key: alrao.alrao(key).init(params))(jax.random.split(KEY, 3))
  for call in (
    alrao.scalars,
    alrao.best_heads,
    lambda state: alrao.report(state, params),
    lambda state: alrao.collapse(optimizer, state, params),
  ):
    with pytest.raises(
      ValueError, match=r"\(num_(heads|units),\), got .*Index one seed: jax"
    ):
      call(states)
  one = jax.tree.map(lambda x: x[1], states)
  assert alrao.best_heads(one) == (0,) and alrao.report(one, params).units == 12


def test_errors_say_what_to_write():
  params, state, updates = example()
  with pytest.raises(ValueError, match=r"write scalars\(opt_state, params, updates\)"):
    alrao.scalars(state, updates=updates)
  with pytest.raises(ValueError, match=r"like params, with shape .12,.*got none"):
    alrao.scalars(state, params, {"out": params["out"]})
  with pytest.raises(ValueError, match="exactly one ScaleByUnitRatesState, got 0"):
    alrao.scalars(optax.adam(1e-3).init(params))
  with pytest.raises(ValueError, match="made for other parameters"):
    alrao.report(state, {"dense": params["dense"]})
  with pytest.raises(TypeError, match=r"write alrao_jax.scalars\(...\) inside"):
    jax.jit(lambda state: alrao.report(state, params).learning_rate)(state)
