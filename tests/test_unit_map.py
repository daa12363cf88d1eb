"""UnitMap: vectors and trees, read by units."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alrao_jax as alrao
from alrao_jax import _unit_map
from alrao_jax._unit_map import unit_map
from alrao_jax._units import UnitOptions, read_units, shapes_of


def make_params(dtype=jnp.float32):
  shapes = {
    "cell": {
      "dense_i": {"kernel": (3, 8)},
      "dense_h": {"kernel": (2, 8), "bias": (8,)},
    },
    "conv": {"kernel": (3, 3, 2, 5), "bias": (5,)},
    "still": {"kernel": (2, 3)},
    "norm": {"scale": (5,), "bias": (5,)},
    "out": {"alrao_heads": {"kernel": (4, 5, 2), "bias": (4, 2)}},
  }
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
    shapes,
    is_leaf=lambda node: isinstance(node, tuple),
  )


OPTIONS = UnitOptions((("^still", "frozen"),))


def vectors(units):
  rng = np.random.default_rng(1)
  draw = lambda size: jnp.asarray(rng.uniform(1, 2, size), jnp.float32)  # noqa: E731
  return draw(units.num_units), draw(units.num_heads)


def test_groups_stand_end_to_end_by_name():
  units = unit_map(make_params(), OPTIONS)
  assert units.groups == {
    "cell": slice(0, 2),
    "conv": slice(2, 7),
    "norm": slice(7, 12),
  }
  assert (units.num_units, units.num_heads) == (12, 4)


def test_scale_multiplies_each_unit_and_each_head_by_its_factor():
  params = make_params()
  units = unit_map(params, OPTIONS)
  body, heads = vectors(units)
  scaled = units.scale(params, body, heads)
  params, body, heads = jax.tree.map(np.asarray, (params, body, heads))
  expected = {
    "cell": {
      "dense_i": {"kernel": params["cell"]["dense_i"]["kernel"] * np.tile(body[:2], 4)},
      "dense_h": {
        name: leaf * np.tile(body[:2], 4)
        for name, leaf in params["cell"]["dense_h"].items()
      },
    },
    "conv": jax.tree.map(lambda leaf: leaf * body[2:7], params["conv"]),
    "still": {"kernel": np.zeros((2, 3))},
    "norm": jax.tree.map(lambda leaf: leaf * body[7:], params["norm"]),
    "out": {
      "alrao_heads": {
        "kernel": params["out"]["alrao_heads"]["kernel"] * heads[:, None, None],
        "bias": params["out"]["alrao_heads"]["bias"] * heads[:, None],
      }
    },
  }
  jax.tree.map(np.testing.assert_array_equal, scaled, expected)


def test_without_factors_for_heads_they_stay_as_they_are():
  params = make_params()
  units = unit_map(params, OPTIONS)
  scaled = units.scale(params, vectors(units)[0])
  jax.tree.map(np.testing.assert_array_equal, scaled["out"], params["out"])


def test_gather_is_the_inverse_of_scaled_ones():
  params = make_params()
  units = unit_map(params, OPTIONS)
  body, heads = vectors(units)
  tree = units.scale(jax.tree.map(jnp.ones_like, params), body, heads)
  found = units.gather(tree, jnp.float32)
  jax.tree.map(np.testing.assert_array_equal, found, (body, heads))


def test_norms_sum_over_all_that_share_a_unit():
  params = make_params()
  units = unit_map(params, OPTIONS)
  body, heads = units.norms(params, jnp.float32)
  conv, out = params["conv"], params["out"]["alrao_heads"]
  expected = np.sqrt(np.sum(conv["kernel"] ** 2, (0, 1, 2)) + conv["bias"] ** 2)
  np.testing.assert_allclose(body[units.groups["conv"]], expected, rtol=1e-6)
  expected = np.sqrt(np.sum(out["kernel"] ** 2, (1, 2)) + np.sum(out["bias"] ** 2, 1))
  np.testing.assert_allclose(heads, expected, rtol=1e-6)


def test_what_is_not_kept_is_zero_even_where_it_is_not_finite():
  params = make_params()
  params["conv"]["kernel"] = jnp.full((3, 3, 2, 5), jnp.nan)
  units = unit_map(params, OPTIONS)
  kept = units.keep(params, jnp.arange(12) != 3)
  assert (kept["conv"]["kernel"][..., 1] == 0).all() and kept["conv"]["bias"][1] == 0
  assert jnp.isnan(kept["conv"]["kernel"][..., 0]).all()
  jax.tree.map(np.testing.assert_array_equal, kept["norm"], params["norm"])
  jax.tree.map(np.testing.assert_array_equal, kept["out"], params["out"])


def test_half_precision_is_multiplied_in_float32_and_rounded_once():
  params = make_params(jnp.bfloat16)
  units = unit_map(params, OPTIONS)
  body, heads = vectors(units)
  scaled = units.scale(params, body, heads)["norm"]["scale"]
  wide = params["norm"]["scale"].astype(jnp.float32) * body[7:]
  np.testing.assert_array_equal(scaled, wide.astype(jnp.bfloat16))


def test_updates_that_are_not_like_the_parameters_are_an_error():
  params = make_params()
  units = unit_map(params, OPTIONS)
  wrong = {**params, "norm": {"scale": jnp.ones(6), "bias": jnp.ones(5)}}
  with pytest.raises(ValueError, match=r"'norm/scale' of shape \(6,\) instead of \(5,"):
    units.scale(wrong, *vectors(units))
  with pytest.raises(ValueError, match=r"'other' of shape \(1,\) instead of none"):
    units.scale({"other": jnp.ones(1)}, *vectors(units))


def test_a_tree_is_read_once_for_the_same_shapes_and_options():
  params = make_params()
  units = unit_map(params, OPTIONS)
  shapes = jax.eval_shape(lambda: make_params(jnp.bfloat16))
  assert unit_map(shapes, UnitOptions([["^still", "frozen"]])) is units
  assert unit_map(params) is not units
  assert unit_map({**params, "more": jnp.ones(3)}, OPTIONS) is not units


def test_a_state_of_the_same_units_fits_whatever_the_number_of_heads():
  params = make_params()
  units = unit_map(params, OPTIONS)
  fewer = {**params, "out": jax.tree.map(lambda leaf: leaf[:2], params["out"])}
  collapsed = unit_map(fewer, OPTIONS)
  assert collapsed.fingerprint == units.fingerprint
  collapsed.check("call()", units.fingerprint, jnp.zeros(12), jnp.zeros(2))
  with pytest.raises(ValueError, match=r"call\(\) got a state of 12 units, made for"):
    collapsed.check("call()", units.fingerprint, jnp.zeros(12), jnp.zeros(4))


@pytest.mark.parametrize(
  "change",
  [
    lambda p: {**p, "nope": p["norm"]},
    lambda p: {**p, "norm": {"scale": jnp.ones(6), "bias": jnp.ones(6)}},
    lambda p: {k: v for k, v in p.items() if k != "out"},
    lambda p: {**{k: v for k, v in p.items() if k != "norm"}, "morn": p["norm"]},
    lambda p: {**{k: v for k, v in p.items() if k != "out"}, "end": p["out"]},
  ],
)
def test_the_fingerprint_tells_who_reads_what(change):
  params = make_params()
  units = unit_map(params, OPTIONS)
  assert unit_map(change(params), OPTIONS).fingerprint != units.fingerprint
  assert unit_map(params).fingerprint != units.fingerprint


def test_frozen_heads_count_as_heads_and_stand_still():
  params = make_params()
  units = unit_map(params, UnitOptions((("^out/", "frozen"),)))
  assert units.num_heads == 4 and not units.body.num_heads
  scaled = units.scale(params, *vectors(units))
  jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), scaled["out"])
  _, heads = units.norms(params, jnp.float32)
  np.testing.assert_array_equal(heads, np.zeros(4))
  (partly := dict(params["out"]["alrao_heads"])).pop("bias")
  some = UnitOptions((("^out/.*bias", "frozen"),))
  _, heads = unit_map(params, some).norms(params, jnp.float32)
  expected = np.linalg.norm(np.reshape(partly["kernel"], (4, -1)), axis=1)
  np.testing.assert_allclose(heads, expected, rtol=1e-6)


def test_the_body_is_the_same_with_and_without_heads():
  params = make_params()
  body = {name: leaf for name, leaf in params.items() if name != "out"}
  units, alone = unit_map(params, OPTIONS), unit_map(body, OPTIONS)
  assert units.body.fingerprint == alone.fingerprint
  assert units.body.num_heads == 0


def make_large():
  """Shapes of a network with 2,000 parameters."""

  def block():
    heads = {"kernel": (8, 2, 4), "bias": (2, 4)}
    return {
      "attention": {
        **{name: heads for name in ("query", "key", "value")},
        "out": {"kernel": (2, 4, 8), "bias": (8,)},
      },
      "norm": {"scale": (8,), "bias": (8,)},
      "mlp": {n: {"kernel": (8, 8), "bias": (8,)} for n in ("up", "gate", "down")},
      "conv": {"kernel": (3, 3, 8, 8), "bias": (8,)},
      "gate": {"kernel": (8, 8)},
      "scale": (8,),
    }

  return {f"block_{i}": block() for i in range(100)}


def as_arrays(shapes):
  make = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
  return jax.tree.map(make, shapes, is_leaf=lambda node: isinstance(node, tuple))


@pytest.mark.parametrize(
  "make", [make_large, lambda: [(4, 8), (8,)] * 1000], ids=["nested", "flat"]
)
def test_reading_2000_parameters_takes_less_than_0_3_seconds(make):
  shapes = shapes_of(as_arrays(make()))
  assert len(shapes) == 2000

  def seconds():
    start = time.process_time()  # of this process: the machine may be busy
    read_units(shapes, UnitOptions())
    return time.process_time() - start

  assert min(seconds() for _ in range(4)) < 0.3


def test_a_step_reads_the_units_once(monkeypatch):
  params, calls = as_arrays({"dense": {"kernel": (3, 4), "bias": (4,)}, "t": ()}), []
  count = lambda *args: calls.append(args) or read_units(*args)  # noqa: E731
  monkeypatch.setattr(_unit_map, "read_units", count)
  _unit_map._unit_map.cache_clear()
  optimizer = alrao.alrao(
    jax.random.key(0), optax.trace(0.9), guard=alrao.guard(), heads=False
  )

  def step(params):
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    return updates, alrao.scalars(state, params, updates)

  jax.eval_shape(step, params)
  assert len(calls) == 1


GUESSED = {"a": {"bases": (5, 4, 6)}, "dense": {"kernel": (8, 20), "bias": (20,)}}


def test_an_optimizer_warns_once_of_many_guesses():
  params = as_arrays(GUESSED)
  with pytest.warns(UserWarning, match=r"units of 40% .*'a/bases'.*describe_units"):
    jax.eval_shape(alrao.scale_by_unit_rates(jax.random.key(0)).init, params)
  # Once: what pytest makes an error would show.
  jax.eval_shape(alrao.guard_units().init, params)


def test_settled_or_few_guesses_are_silent():
  unit_map(as_arrays(GUESSED), UnitOptions(((r"^a/bases$", (1,)),)))
  unit_map(as_arrays({**GUESSED, "large": {"kernel": (50, 8), "bias": (8,)}}))
