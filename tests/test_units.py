import dataclasses
import functools
import pathlib
import re
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import alrao_jax.equinox
import alrao_jax.keras
import alrao_jax.linen
import alrao_jax.nnx
from alrao_jax._rules import RULES, Units, rule_name
from alrao_jax._tree import flatten_with_paths, head_name, path_of
from alrao_jax._units import UnitOptions, describe_units, unit_specs

KEY = jax.random.key(0)


def shapes(**leaves):
  """A nested dict of shapes from paths, "__" for "/"."""
  tree = {}
  for path, shape in leaves.items():
    *nodes, name = path.split("__")
    node = tree
    for key in nodes:
      node = node.setdefault(key, {})
    node[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
  return tree


def specs(params, **options):
  return unit_specs(params, units=UnitOptions(**options))


def axes(params, **options):
  return {path: spec.axes for path, spec in specs(params, **options).items()}


def groups(params, **options):
  return {path: spec.group for path, spec in specs(params, **options).items()}


# --- the rules


@pytest.mark.parametrize(
  ("kernel", "bias", "expected"),
  [
    ((3, 5), (5,), (1,)),
    ((5, 3), (5,), (0,)),  # transposed
    ((5, 5), (5,), (1,)),  # tie: last
    ((3, 3, 8, 4), (4,), (3,)),
    ((3, 3, 4, 8), (4,), (2,)),  # transposed convolution
    ((4, 4, 4, 4), (4,), (3,)),
    ((7, 2, 3), (2, 3), (1, 2)),
    ((6, 5, 3), (6, 3), (0, 2)),  # stacked
    ((3, 3, 3, 4, 8), (3, 8), (0, 4)),  # stacked as often as the kernel is long
    ((3, 5, 5), (3, 5), (0, 2)),  # stacked squares
    ((6, 6, 36, 8), (6, 6, 8), (0, 1, 3)),  # unshared convolution
    ((2, 3, 3, 5, 4), (2, 5), (0, 3)),  # stacked transposed convolution
    ((1, 4, 1, 5), (1, 5), (2, 3)),  # an axis of length 1 indexes nothing
    ((5,), (), ()),  # one unit
    ((5, 1), (1,), (1,)),
    ((5, 1), (1, 1), ()),  # padded, one unit
    ((5, 3), (1, 3), (1,)),  # padded
  ],
)
def test_a_bias_tells_the_axes_of_its_kernel(kernel, bias, expected):
  found = specs(shapes(layer__kernel=kernel, layer__bias=bias))
  assert found["layer/kernel"].axes == expected
  assert found["layer/kernel"].unit_shape == found["layer/bias"].unit_shape
  assert found["layer/kernel"].group == found["layer/bias"].group == "layer"


@pytest.mark.parametrize(
  ("weight", "bias", "expected"),
  [
    ((5, 3), (5,), (0,)),
    ((5, 5), (5,), (0,)),
    ((8, 4, 3, 3), (8, 1, 1), (0,)),
    ((3, 4, 3, 3), (3, 1, 1), (0,)),
    ((1, 4, 3, 3), (1, 1, 1), ()),
    ((8, 4, 1, 1), (8, 1, 1), (0, 2, 3)),
    ((2, 5, 3), (2, 5), (0, 1)),  # stacked
    ((5, 5, 5), (5, 5), (0, 1)),
    ((5, 3), (5, 3), (0, 1)),  # a norm
  ],
)
def test_units_first(weight, bias, expected):
  found = specs(shapes(weight=weight, bias=bias), unit_axis="first")
  assert found["weight"].axes == expected
  assert found["weight"].unit_shape == found["bias"].unit_shape
  assert found["weight"].group == found["bias"].group


@pytest.mark.parametrize(
  ("params", "expected"),
  [
    (shapes(dense__kernel=(3, 5)), ((1,), "dense")),
    (shapes(mlp__w=(3, 5)), ((1,), "mlp")),
    (shapes(kernel=(3, 5)), ((1,), "")),
    (shapes(embed__embedding=(9, 3)), ((1,), "embed/embedding")),
    (shapes(embed__embeddings=(9, 3)), ((1,), "embed/embeddings")),
    (shapes(pos_embedding=(1, 16, 3)), ((2,), "pos_embedding")),
    (shapes(cls_token=(1, 1, 3)), ((2,), "cls_token")),
    (shapes(cls=(3,)), ((0,), "cls")),
    (shapes(lora__lora_a=(9, 2)), ((1,), "lora/lora_a")),
    (shapes(norm__scale=(5,)), ((0,), "norm")),
    (shapes(norm__offset=(2, 5)), ((0, 1), "norm")),
    (shapes(norm__gamma=(1, 1, 5)), ((0, 1, 2), "norm")),
    (shapes(act__negative_slope=()), ((), "act/negative_slope")),
    (shapes(kernel=()), ((), "")),
  ],
)
def test_leaves_without_a_bias(params, expected):
  (spec,) = specs(params, strict=True).values()
  assert (spec.axes, spec.group) == expected
  assert not spec.assumed


@pytest.mark.parametrize(
  ("shape", "last", "first"),
  [((5,), (0,), (0,)), ((3, 5), (1,), (0,)), ((2, 3, 5), (2,), (0,))],
)
def test_an_unknown_leaf_shares_as_much_as_its_layout_allows(shape, last, first):
  params = shapes(layer__theta=shape)
  (spec,) = specs(params).values()
  assert (spec.axes, spec.group, spec.assumed) == (last, "layer/theta", True)
  assert axes(params, unit_axis="first") == {"layer/theta": first}


def test_strict_makes_an_unknown_leaf_an_error():
  params = shapes(a__theta=(3, 5), a__kernel=(3, 5), b__phi=(7,))
  with pytest.raises(
    ValueError, match=r"'a/theta' of shape \(3, 5\), 'b/phi'"
  ) as error:
    specs(params, strict=True)
  assert "units=UnitOptions(overrides=[(r'^a/theta$', (1,))])" in str(error.value)
  specs(params, strict=True, overrides=(("theta|phi", (-1,)),))


def test_a_norm_layers_scale_and_bias_share():
  params = shapes(norm__scale=(5,), norm__bias=(5,))
  assert groups(params) == {"norm/scale": "norm", "norm/bias": "norm"}


def test_a_scale_shares_with_a_kernel_only_if_their_units_agree():
  params = shapes(a__kernel=(3, 5), a__scale=(5,), b__kernel=(3, 5), b__scale=(3,))
  assert groups(params) == {
    "a/kernel": "a",
    "a/scale": "a",
    "b/kernel": "b",
    "b/scale": "b/scale",
  }


def test_a_scale_and_a_bias_that_differ_do_not_share():
  found = groups(shapes(norm__scale=(), norm__bias=(5,)))
  assert found == {"norm/scale": "norm/scale", "norm/bias": "norm/bias"}


@pytest.mark.parametrize("drop", ["dense/bias", "norm/bias"])
def test_masking_changes_no_other_group(drop):
  params = shapes(
    dense__kernel=(3, 5), dense__bias=(5,), norm__scale=(5,), norm__bias=(5,)
  )
  masked = jax.tree_util.tree_map_with_path(
    lambda keys, leaf: optax.MaskedNode() if path_of(keys) == drop else leaf, params
  )
  expected = {path: spec for path, spec in specs(params).items() if path != drop}
  found = specs(masked)
  assert found.keys() == expected.keys()
  for path, spec in found.items():
    assert (spec.axes, spec.group) == (expected[path].axes, expected[path].group)


@given(
  st.dictionaries(
    st.sampled_from(["kernel", "bias", "scale", "embedding", "theta", "h", "i/kernel"]),
    st.lists(st.integers(1, 3), max_size=4).map(tuple),
    max_size=5,
  ),
  st.sampled_from(["last", "first"]),
)
@settings(deadline=None, max_examples=200)
def test_members_of_a_group_have_units_of_one_shape(leaves, unit_axis):
  params = {path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in leaves.items()}
  try:
    found = specs(params, unit_axis=unit_axis).values()
  except ValueError as error:
    assert "write units=UnitOptions(overrides=" in str(error)
    return
  assert [spec.path for spec in found] == sorted(leaves)
  unit_shapes = {spec.group: spec.unit_shape for spec in found}
  for spec in found:
    assert unit_shapes[spec.group] == spec.unit_shape
    assert spec.axes == tuple(sorted(set(spec.axes)))
    assert spec.num_units * spec.tiles == np.prod([spec.shape[a] for a in spec.axes])


# --- recurrent cells and attention


def test_fused_gates_are_tiles_of_one_vector():
  params = shapes(
    cell__dense_i__kernel=(3, 28),
    cell__dense_h__kernel=(7, 28),
    cell__dense_h__bias=(28,),
  )
  for spec in specs(params).values():
    assert (spec.tiles, spec.unit_shape, spec.group) == (4, (7,), "cell")


def test_equinox_cells_are_known_with_units_first_and_last():
  cell = eqx.nn.GRUCell(3, 7, key=jax.random.key(0))
  params = eqx.filter(cell, eqx.is_inexact_array)
  for unit_axis in ("first", "last"):
    found = specs(params, unit_axis=unit_axis)
    assert {spec.axes for spec in found.values()} == {(0,)}
    assert {spec.unit_shape for spec in found.values()} == {(7,)}
    assert {path: spec.tiles for path, spec in found.items()} == {
      "weight_ih": 3,
      "weight_hh": 3,
      "bias": 3,
      "bias_n": 1,
    }


@pytest.mark.parametrize(
  "params",
  [
    shapes(
      dense_i__kernel=(3, 5), dense_h__kernel=(5, 5), dense_o__kernel=(5, 2)
    ),  # a perceptron
    shapes(i__kernel=(3, 5), h__kernel=(5, 7)),
    shapes(net__linear__w=(3, 5), net__linear_1__w=(5, 5)),
    shapes(lstm__linear__w=(3, 5)),
    shapes(lstm__linear__w=(3, 40)),  # more hidden units than inputs and hidden units
  ],
)
def test_other_layers_are_no_cells(params):
  found = specs(params)
  assert len({spec.group for spec in found.values()}) == len(found)
  assert all(spec.rule == "kernel without bias" for spec in found.values())


@pytest.mark.parametrize(
  "params",
  [
    shapes(weight_ih=(8, 2), weight_hh=(8, 3)),
    shapes(gru__w_i=(2, 8), gru__w_h=(3, 8), gru__b=(8,)),
    shapes(dense_i__kernel=(2, 8), dense_h__kernel=(3, 8)),
  ],
)
def test_gates_that_do_not_divide_are_an_error(params):
  with pytest.raises(ValueError, match="is no multiple of 3"):
    specs(params)


def test_members_of_a_cell_with_different_units_are_an_error():
  params = {gate: shapes(kernel=(2, 5, 5)) for gate in ("if", "in", "hn")}
  params["hf"] = shapes(kernel=(5, 5))
  with pytest.raises(ValueError, match=r"got in the group.*units \(5, 5\)"):
    specs(params)


def test_attention_of_plain_layers_follows_the_ordinary_rules():
  names = ("query", "key", "value", "out")
  params = {name: shapes(kernel=(6, 6)) for name in names}
  assert set(axes(params).values()) == {(1,)}
  stacked = {name: shapes(kernel=(2, 6, 5)) for name in names}
  assert set(axes(stacked).values()) == {(2,)}


def test_grouped_query_attention():
  params = shapes(
    query__kernel=(8, 4, 2),
    key__kernel=(8, 1, 2),
    value__kernel=(8, 1, 2),
    out__kernel=(4, 2, 8),
  )
  assert axes(params) == {
    "key/kernel": (1, 2),
    "out/kernel": (2,),
    "query/kernel": (1, 2),
    "value/kernel": (1, 2),
  }


# --- overrides


def test_the_first_override_that_matches_decides():
  params = shapes(a__kernel=(3, 5), b__kernel=(3, 5))
  found = axes(params, overrides=(("^a/", (0,)), ("kernel$", (0, -1))))
  assert found == {"a/kernel": (0,), "b/kernel": (0, 1)}


def test_an_overridden_kernel_shares_with_its_bias_if_their_units_agree():
  params = shapes(
    square__kernel=(5, 5), square__bias=(5,), other__kernel=(3, 5), other__bias=(5,)
  )
  found = specs(params, overrides=(("kernel$", (0,)),))
  assert {path: (spec.axes, spec.group) for path, spec in found.items()} == {
    "square/kernel": ((0,), "square"),
    "square/bias": ((0,), "square"),
    "other/kernel": ((0,), "other"),
    "other/bias": ((0,), "other/bias"),
  }


def test_words_override():
  params = shapes(
    a__kernel=(3, 5), b__kernel=(3, 5), c__kernel=(3, 5), d__kernel=(3, 5)
  )
  overrides = (("^a", "per_weight"), ("^b", "one_rate"), ("^c", "frozen"))
  found = specs(params, overrides=overrides)
  assert [(s.kind, s.axes, s.group, s.num_units) for s in found.values()] == [
    ("per_weight", (0, 1), "a/kernel", 15),
    ("one_rate", (), "b/kernel", 1),
    ("frozen", (), "", 1),
    ("unit", (1,), "d", 5),
  ]


def test_heads_can_be_frozen_and_nothing_else():
  params = shapes(dense__kernel=(3, 5), out__alrao_heads__kernel=(10, 5, 2))
  found = specs(params, overrides=(("kernel", "frozen"),))
  assert [(s.kind, s.of_heads) for s in found.values()] == [
    ("frozen", False),
    ("frozen", True),
  ]
  found = specs(params, overrides=(("kernel", "one_rate"),))
  assert [s.kind for s in found.values()] == ["one_rate", "head"]


def test_units_override_gives_group_and_tiles():
  params = shapes(a__theta=(3, 10), b__phi=(5, 2))
  overrides = (
    ("theta", Units(axes=(1,), group="shared", tiles=2)),
    ("phi", Units(axes=(0,), group="shared")),
  )
  for spec in specs(params, overrides=overrides).values():
    assert (spec.group, spec.unit_shape, spec.kind) == ("shared", (5,), "unit")


def test_a_given_group_can_join_an_existing_one():
  params = shapes(dense__kernel=(3, 5), theta=(2, 5))
  found = groups(params, overrides=(("theta", Units((1,), "dense")),))
  assert set(found.values()) == {"dense"}


def test_a_given_group_with_different_units_is_an_error():
  params = shapes(a=(3, 5), b=(4, 6))
  with pytest.raises(
    ValueError, match=r"'shared': 'b' of shape \(4, 6\) with units \(6,\)"
  ):
    specs(params, overrides=((".", Units((1,), "shared")),))


@pytest.mark.parametrize(
  ("override", "exception", "message"),
  [
    (("dnse", (0,)), ValueError, r"'dnse'.*got no match among 'dense/kernel'"),
    (("out/", (0,)), ValueError, "only heads, .*they can only be 'frozen'"),
    (("dense", (2,)), ValueError, r"'dense/kernel'.*shape \(3, 5\), got \(2,\)"),
    (("dense", (-3,)), ValueError, r"got \(-3,\)"),
    (("dense", (0, -2)), ValueError, "different axes"),
    (("dense", Units((1,), None, 2)), ValueError, "tiles"),
    (("dense", Units((), None, 2)), ValueError, "tiles"),
    (("dense", Units((1,), None, 0)), ValueError, "tiles"),
    (("dense", "per_unit"), ValueError, "'per_weight', 'one_rate', 'frozen'"),
    (("dense", 1), TypeError, "pairs"),
    (("dense", (1.0,)), TypeError, "pairs"),
    (("dense", Units(1)), TypeError, "pairs"),  # type: ignore[arg-type]
    (("dense", ("1",)), TypeError, "pairs"),
    ("dense", TypeError, "pairs"),
    ((None, (0,)), TypeError, "pairs"),
    (("(", (0,)), ValueError, "regular expression"),
  ],
)
def test_bad_overrides(override, exception, message):
  params = shapes(dense__kernel=(3, 5), out__alrao_heads__kernel=(10, 3, 5))
  with pytest.raises(exception, match=message):
    specs(params, overrides=(override,))


@pytest.mark.parametrize(
  "params",
  [
    shapes(layer__kernel=(3, 5), layer__bias=(6,)),
    shapes(layer__kernel=(4, 4, 7), layer__bias=(4, 7)),
    shapes(weight_ih=(8, 2), weight_hh=(8, 3), bias=(8,)),
    shapes(strict__theta=(3, 5)),
  ],
)
def test_what_an_error_says_to_write_mends_it(params):
  overrides = ()
  for _ in range(4):
    try:
      found = specs(params, strict=True, overrides=overrides)
    except ValueError as error:
      text = str(error)
      path, shape = re.search(r"'([\w/]+)' of shape (\(.*?\))", text).groups()
      assert str(dict(flatten_with_paths(params)[0])[path].shape) == shape
      advice = re.search(r"write units=(UnitOptions\(.*\))", text).group(1)
      # An error that can't know the axes recommends none.
      names = {"Units": Units, "UnitOptions": UnitOptions, "AXES": (-1,)}
      advised = eval(advice, names)
      overrides += advised.overrides
    else:
      break
  assert found and overrides


# --- other options


def test_every_weight_may_be_a_unit():
  params = shapes(
    a__kernel=(3, 5),
    a__bias=(6,),
    b__theta=(2,),
    c__kernel=(3,),
    out__alrao_heads__w=(9, 2),
  )
  overrides = (("^b", "one_rate"), ("^c", "frozen"), ("", "per_weight"))
  found = specs(params, overrides=overrides)
  assert {path: (spec.kind, spec.num_units) for path, spec in found.items()} == {
    "a/kernel": ("per_weight", 15),
    "a/bias": ("per_weight", 6),
    "b/theta": ("one_rate", 1),
    "c/kernel": ("frozen", 1),
    "out/alrao_heads/w": ("head", 9),
  }


def test_an_unknown_axis_is_an_error():
  with pytest.raises(ValueError, match=r"\(unit_axis=...\) must be .*got 'units'"):
    UnitOptions(unit_axis="units")


@pytest.mark.parametrize(
  ("name", "write"),
  [
    ("granularity", r"UnitOptions\(overrides=\(\('', 'per_weight'\),\)\)"),
    ("heads", "those below the key 'alrao_heads'"),
  ],
)
def test_options_that_were_removed_say_what_to_write(name, write):
  with pytest.raises(
    TypeError, match=rf"UnitOptions\({name}=...\) was removed.*{write}"
  ):
    UnitOptions(**{name: None})


@pytest.mark.parametrize("units", [(("a", (0,)),), None, "last"])
@pytest.mark.parametrize("function", [unit_specs, describe_units])
def test_what_is_no_unit_options_is_an_error(function, units):
  with pytest.raises(TypeError, match=r"\(units=...\) must be UnitOptions, got"):
    function(shapes(kernel=(3, 5)), units=units)


def test_options_hash_and_compare_by_value_lists_for_tuples():
  options = UnitOptions((("a", (0,)), ("b", Units((1,))), ("c", "frozen")))
  lists = UnitOptions([["a", [np.int64(0)]], ["b", Units([1])], ("c", "frozen")])
  assert options == lists and hash(options) == hash(lists)
  assert options != UnitOptions((("a", (0,)),)) != UnitOptions()
  assert options != dataclasses.replace(options, strict=True)


def test_options_are_a_static_argument_of_jit():
  traces = []

  @functools.partial(jax.jit, static_argnames="options")
  def count(params, options):
    traces.append(1)
    return len({spec.group for spec in unit_specs(params, options).values()})

  params = {"a": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}}
  assert count(params, options=UnitOptions()) == 1
  assert count(params, options=UnitOptions([["kernel", [0]]])) == 2
  assert count(params, options=UnitOptions((("kernel", (0,)),))) == 2
  assert len(traces) == 2


@pytest.mark.parametrize("overrides", ["kernel", 3, None])
def test_overrides_that_are_no_pairs_are_an_error(overrides):
  with pytest.raises(TypeError, match=r"UnitOptions\(overrides=...\) must be pairs"):
    UnitOptions(overrides)


def test_the_documentation_lists_the_rules_in_their_order():
  page = (pathlib.Path(__file__).parents[1] / "docs" / "units.md").read_text()
  table = page.split("## The rules")[1].split("## ")[0]
  rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
  listed = [row.split("|")[1].strip() for row in rows]
  assert listed == [rule_name(rule) for rule in RULES]


# --- heads


def test_heads_have_their_own_kind():
  params = shapes(out__alrao_heads__kernel=(10, 3, 5), out__alrao_heads__bias=(10, 5))
  for spec in specs(params).values():
    assert (spec.kind, spec.axes, spec.group, spec.num_units) == ("head", (0,), "", 10)


def test_a_head_needs_an_axis_for_the_heads():
  with pytest.raises(ValueError, match="axis 0, got 'alrao_heads/scale'"):
    specs(shapes(alrao_heads__scale=()))


@pytest.mark.parametrize(
  ("path", "expected"),
  [
    ("decoder/alrao_heads/kernel", "decoder"),
    ("model/decoder/alrao_heads/dense/kernel", "model/decoder"),
    ("alrao_heads/kernel", "alrao_heads"),
    ("alrao_heads", "alrao_heads"),
    ("decoder/my_alrao_heads/kernel", None),
    ("decoder/kernel", None),
  ],
)
def test_head_name(path, expected):
  assert head_name(path) == expected


# --- trees


@pytest.mark.parametrize(
  "leaf", [jnp.ones((3,), int), jnp.ones((3,), bool), jax.random.key(0), 1.0]
)
def test_leaves_that_are_no_floating_arrays(leaf):
  with pytest.raises(TypeError, match="'layer/table'"):
    specs({"layer": {"table": leaf}})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_floating_dtypes(dtype):
  assert axes({"kernel": jnp.ones((3, 5), dtype)}) == {"kernel": (1,)}


@pytest.mark.parametrize("tree", [{}, (), None, {"a": optax.MaskedNode()}])
def test_a_tree_without_leaves_has_no_units(tree):
  assert specs(tree, overrides=(("kernel", (0,)),), strict=True) == {}


def test_two_leaves_of_the_same_path():
  leaf = jnp.ones(3)
  with pytest.raises(ValueError, match="'a/b' twice"):
    specs({"a/b": leaf, "a": {"b": leaf}})


def test_boxed_and_pure_nnx_states_have_the_same_units():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.layers = nnx.List([nnx.Linear(3, 5, rngs=rngs), nnx.LayerNorm(5, rngs=rngs)])
      self.value = nnx.Linear(5, 5, rngs=rngs)
      self.norm = nnx.WeightNorm(nnx.Linear(5, 2, rngs=rngs), rngs=rngs)

  state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
  boxed, pure = specs(state), specs(nnx.to_pure_dict(state))
  assert boxed == pure
  assert boxed["layers/0/kernel"].group == "layers/0"
  assert boxed["value/kernel"].axes == (1,)
  assert boxed["norm/layer_instance/kernel"].group == "norm/layer_instance"


def test_partitioned_linen_boxes_have_the_units_of_what_they_hold():
  init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
  boxed = nn.Dense(5, kernel_init=init).init(jax.random.key(0), jnp.ones((2, 3)))
  assert isinstance(boxed["params"]["kernel"], nn.Partitioned)
  assert specs(boxed) == specs(nn.unbox(boxed))
  assert axes(boxed) == {"params/kernel": (1,), "params/bias": (0,)}


def test_haiku():
  def model(x):
    return hk.nets.MLP([4, 4])(hk.LayerNorm(-1, True, True)(x))

  params = hk.transform(model).init(jax.random.PRNGKey(0), jnp.ones((2, 3)))
  found = specs(params, strict=True)
  assert {spec.group: spec.unit_shape for spec in found.values()} == {
    "layer_norm": (3,),
    "mlp/~/linear_0": (4,),
    "mlp/~/linear_1": (4,),
  }
  assert found["mlp/~/linear_1/w"].axes == (1,)


def test_equinox():
  class Model(eqx.Module):
    embed: eqx.nn.Embedding
    layers: list
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
      self.embed = eqx.nn.Embedding(9, 4, key=key)
      self.layers = [
        eqx.nn.Linear(4, 4, key=key),
        eqx.nn.Conv2d(4, 3, 3, key=key),
        eqx.nn.Linear(4, 4, use_bias=False, key=key),
      ]
      self.norm = eqx.nn.LayerNorm((4, 2))

  params = eqx.filter(Model(jax.random.key(0)), eqx.is_inexact_array)
  found = specs(params, unit_axis="first", strict=True)
  assert {path: (spec.axes, spec.group) for path, spec in found.items()} == {
    "embed/weight": ((1,), "embed/weight"),
    "layers/0/weight": ((0,), "layers/0"),
    "layers/0/bias": ((0,), "layers/0"),
    "layers/1/weight": ((0,), "layers/1"),
    "layers/1/bias": ((0,), "layers/1"),
    "layers/2/weight": ((0,), "layers/2"),
    "norm/weight": ((0, 1), "norm"),
    "norm/bias": ((0, 1), "norm"),
  }


# --- overrides from module types


class Variable(NamedTuple):
  """What a Keras variable tells."""

  path: str
  shape: tuple[int, ...]


class KerasModel(NamedTuple):
  """What a Keras model tells."""

  trainable_variables: list[Variable]


def test_keras_overrides_give_a_list_of_variables_the_units_of_their_paths():
  model = KerasModel(
    [
      Variable("gru/cell/kernel", (2, 12)),
      Variable("gru/cell/recurrent_kernel", (4, 12)),
      Variable("gru/cell/bias", (2, 12)),
      Variable("depthwise/kernel", (2, 2, 4, 2)),
      Variable("depthwise/bias", (8,)),
      Variable("p_re_lu/alpha", (1, 1, 4)),
    ]
  )
  overrides = alrao_jax.keras.unit_overrides(model)
  params = [jax.ShapeDtypeStruct(v.shape, jnp.float32) for v in model[0]]
  found = list(specs(params, overrides=overrides, strict=True).values())
  assert [(s.axes, s.group, s.tiles, s.num_units) for s in found] == [
    ((1,), "gru/cell", 3, 4),
    ((1,), "gru/cell", 3, 4),
    ((1,), "gru/cell", 3, 4),
    ((2, 3), "depthwise", 1, 8),
    ((0,), "depthwise", 1, 8),
    ((2,), "p_re_lu/alpha", 1, 4),
  ]


def test_keras_overrides_need_variables_of_different_paths():
  with pytest.raises(ValueError, match="got none"):
    alrao_jax.keras.unit_overrides(KerasModel([]))
  with pytest.raises(ValueError, match="two of the same"):
    alrao_jax.keras.unit_overrides(KerasModel([Variable("a/kernel", (2, 3))] * 2))


def test_equinox_overrides_tell_stacks_from_convolutions():
  def block(key):
    return {
      "linear": eqx.nn.Linear(8, 8, use_bias=False, key=key),
      "wide": eqx.nn.Linear(3, 8, use_bias=False, key=key),
      "conv": eqx.nn.Conv1d(4, 8, 3, key=key),
      "up": eqx.nn.ConvTranspose2d(4, 8, 3, use_bias=False, key=key),
      "embedding": eqx.nn.Embedding(5, 8, key=key),
      "norm": eqx.nn.LayerNorm(8, use_bias=False),
      "group": eqx.nn.GroupNorm(2, 8),
      "single": [eqx.nn.Identity(), jax.nn.relu],
    }

  model = eqx.filter_vmap(block)(jax.random.split(KEY, 6))
  params = eqx.filter(model, eqx.is_inexact_array)
  overrides = alrao_jax.equinox.unit_overrides(model)
  found = specs(params, overrides=overrides, unit_axis="first", strict=True)
  units = {path: spec.axes for path, spec in found.items()}
  assert units.pop("embedding/weight") == (0, 2)
  assert set(units.values()) == {(0, 1)}
  assert {spec.num_units for spec in found.values()} == {48}
  assert found["conv/weight"].group == found["conv/bias"].group
  assert found["group/weight"].group == found["group/bias"].group
  alone = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, use_bias=False, key=key))(
    jax.random.split(KEY, 6)
  )
  assert alrao_jax.equinox.unit_overrides(alone) == (("^weight$", Units((0, 1))),)
  # One layer with a bias needs none.
  assert alrao_jax.equinox.unit_overrides(eqx.nn.Linear(3, 4, key=KEY)) == ()


class Network(nn.Module):
  """Heads of a kind that the shapes of other layers would not tell."""

  @nn.compact
  def __call__(self, x, train):
    assert isinstance(train, bool)
    x = nn.Dropout(0.5, deterministic=not train)(x)
    x = nn.jit(nn.DenseGeneral)((2, 3), use_bias=False, name="first")(x)
    x = nn.remat(nn.Einsum)((2, 3, 4), "bac,acd->bd", use_bias=False, name="second")(x)
    return alrao_jax.linen.MultiHead(
      nn.DenseGeneral((2, 2), use_bias=False), num_heads=3, name="out"
    )(x)


@pytest.mark.parametrize(
  "inputs", [jnp.ones((2, 5)), jax.ShapeDtypeStruct((2, 5), jnp.float32)]
)
def test_linen_overrides_name_what_differs_and_no_heads(inputs):
  overrides = alrao_jax.linen.unit_overrides(Network(), inputs, train=True)
  assert overrides == (("^first/kernel$", Units((1, 2))),)
  params = jax.eval_shape(
    lambda: Network().init(jax.random.key(0), jnp.ones((2, 5)), train=False)
  )["params"]
  found = specs(params, overrides=overrides)
  assert found["first/kernel"].unit_shape == (2, 3)
  assert found["second/kernel"].unit_shape == (4,)
  assert found["out/alrao_heads/kernel"].kind == "head"


def test_nnx_overrides_name_what_differs_and_no_heads():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.first = nnx.LinearGeneral(5, (2, 3), use_bias=False, rngs=rngs)
      self.out = alrao_jax.nnx.MultiHead(
        lambda rngs: nnx.LinearGeneral(
          (2, 3), (2, 2), axis=(-2, -1), use_bias=False, rngs=rngs
        ),
        num_heads=3,
        rngs=rngs,
      )

  overrides = alrao_jax.nnx.unit_overrides(Model(nnx.Rngs(0)))
  assert overrides == (("^first/kernel$", Units((1, 2))),)


# --- the table


def test_describe_units():
  params = shapes(
    cell__dense_i__kernel=(3, 20),
    cell__dense_h__kernel=(5, 20),
    dense__kernel=(3, 5),
    dense__bias=(5,),
    frozen__kernel=(3, 5),
    other__theta=(3, 5),
    out__alrao_heads__kernel=(10, 5, 2),
  )
  text = describe_units(params, units=UnitOptions((("^frozen", "frozen"),)))
  rows = [line.split("  ") for line in text.splitlines()]
  rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
  assert text.startswith(
    "Assumed, since no rule knows it: other/theta of shape (3, 5), units on axes (1,). "
    "To settle it, write units=UnitOptions(overrides=[(r'^other/theta$', (1,))]).\n"
  )
  assert rows[1] == ["parameter", "shape", "unit axes", "group", "units", "rule"]
  assert [
    "cell/dense_h/kernel",
    "(5, 20)",
    "(1,) x 4 gates",
    "cell",
    "5",
    "recurrent cell",
  ] in rows
  assert ["dense/kernel", "(3, 5)", "(1,)", "dense", "5", "kernel with bias"] in rows
  assert ["frozen/kernel", "(3, 5)", "()", "-", "-", "override: frozen"] in rows
  assert ["out/alrao_heads/kernel", "(10, 5, 2)", "(0,)", "-", "10", "head"] in rows
  assert rows[-2] == ["15 rates for 195 parameters in 3 groups."]
  assert rows[-1] == ["1 of 7 are assumed, 0 are ties."]


def test_describe_units_prints_what_is_most_in_doubt_first_and_what_settles_a_tie():
  params = shapes(
    a__kernel=(8, 3), a__bias=(3,), b__v=(4,), c__t=(3, 4, 5), d__weight=(8, 8)
  )
  params["d"]["bias"] = jax.ShapeDtypeStruct((8,), jnp.float32)
  first, second, tie, *_, last = describe_units(params).splitlines()
  assert first.startswith("Assumed, since no rule knows it: c/t of shape (3, 4, 5)")
  assert second.startswith("Assumed, since no rule knows it: b/v of shape (4,)")
  assert tie.startswith("Tie: d/weight of shape (8, 8), units on axes (0,), but (1,) ")
  assert last == "2 of 6 are assumed, 1 are ties."
  overrides = UnitOptions(((r"^d/weight$", (1,)), (r"b/v|c/t", (0,))), strict=True)
  assert describe_units(params, overrides).startswith("parameter")


# --- ties


TORCH = shapes(
  a__weight=(8, 4), a__bias=(8,), b__weight=(8, 8), b__bias=(8,), c__weight=(5, 5)
)


@pytest.mark.parametrize(
  ("params", "path", "expected"),
  [
    (TORCH, "b/weight", (0,)),
    (TORCH, "c/weight", (0,)),  # without bias, too
    (
      shapes(
        a__kernel=(3, 1, 4), a__bias=(3,), b__kernel=(8, 8, 8), b__bias=(8,)
      ),  # NetKet
      "b/kernel",
      (0,),
    ),
    # Neither could be last: both have their units first.
    (
      shapes(a__kernel=(4, 1, 4), a__bias=(4,), b__kernel=(4, 4, 8), b__bias=(4,)),
      "a/kernel",
      (0,),
    ),
    (
      shapes(a__weight=(4, 6, 3), a__bias=(4, 6), b__weight=(4, 5, 5), b__bias=(4, 5)),
      "b/weight",
      (0, 1),
    ),
    (
      shapes(a__w=(4, 3, 5), a__b=(4, 5), b__w=(4, 4, 4), b__b=(4, 4)),
      "b/w",
      (0, 2),
    ),
    (
      shapes(a__kernel=(4, 8), a__bias=(8,), b__kernel=(8, 8), b__bias=(8,)),
      "b/kernel",
      (1,),
    ),
  ],
)
def test_a_tie_follows_its_siblings(params, path, expected):
  found = specs(params, strict=True)
  assert found[path].axes == expected
  assert not found[path].ties and "tie" not in found[path].rule


@pytest.mark.parametrize(
  ("kernel", "bias", "expected"),
  [
    ((4, 4, 8), (4,), (0,)),
    ((4, 1, 4), (4,), (0,)),
    ((8, 8), (8,), (0,)),
    ((4, 5, 5), (4, 5), (0, 1)),
    ((3, 8, 8), (8,), (2,)),
  ],
)
def test_a_tie_without_siblings_is_reported_and_refused(kernel, bias, expected):
  params = shapes(a__weight=kernel, a__bias=bias)
  found = specs(params)["a/weight"]
  assert found.axes == expected and found.ties and "tie: " in found.rule
  with pytest.raises(ValueError, match=r"got 'a/weight'.*for AXES, write") as error:
    specs(params, strict=True)
  assert str(found.ties[0]) in str(error.value)


def test_a_stack_of_torchs_layers_alone_is_read_as_theirs():
  params = shapes(a__weight=(4, 4, 4), a__bias=(4, 4))
  assert specs(params)["a/weight"].ties == ((0, 2), (1, 2))


def test_a_square_kernel_without_siblings_is_flaxs():
  params = shapes(a__kernel=(8, 8), a__bias=(8,))
  (_, kernel) = specs(params, strict=True).values()
  assert kernel.axes == (1,) and kernel.rule == "kernel with bias, tie: last"


def test_a_square_kernel_among_siblings_that_differ_is_refused():
  params = shapes(a__kernel=(8, 8), a__bias=(8,), b__kernel=(8, 4), b__bias=(8,))
  params |= shapes(c__kernel=(8, 4), c__bias=(4,))
  assert specs(params)["a/kernel"].rule.endswith("tie: last, siblings differ")
  with pytest.raises(ValueError, match="'a/kernel'"):
    specs(params, strict=True)


@pytest.mark.parametrize(
  ("params", "expected"),
  [
    (shapes(w1=(3, 8), b1=(8,), w2=(8, 5), b2=(5,)), {"1", "2"}),
    (shapes(in_proj_weight=(24, 8), in_proj_bias=(24,)), {"in_proj"}),
    (
      [(jnp.ones((3, 8)), jnp.ones(8)), (), (jnp.ones((8, 5)), jnp.ones(5))],
      {"0", "2"},
    ),
    (shapes(weight__args__1=(5, 3), bias=(5,)), {""}),
    (shapes(net__bias=(5,), net__proj__kernel=(3, 5)), {"net/proj"}),
  ],
)
def test_layers_by_other_names(params, expected):
  found = specs(params, strict=True)
  assert {spec.group for spec in found.values()} == expected


def test_a_bias_a_step_above_inputs_or_several_kernels_is_its_own():
  params = shapes(a__bias=(8,), a__encoder__kernel=(8, 4))  # subtracted from inputs
  assert axes(params) == {"a/bias": (0,), "a/encoder/kernel": (1,)}
  params = shapes(a__bias=(8,), a__x__kernel=(4, 8), a__y__kernel=(4, 8))
  assert len(set(groups(params).values())) == 3


def test_a_convolution_named_transpose_keeps_what_its_library_keeps():
  assert axes(shapes(conv2d_transpose__kernel=(3, 3, 5, 4))) == {
    "conv2d_transpose/kernel": (2,)
  }
  assert axes(shapes(ConvTranspose_0__kernel=(3, 3, 4, 5))) == {
    "ConvTranspose_0/kernel": (3,)
  }
  assert axes(shapes(conv_transpose__kernel=(3, 3, 4, 5))) == {
    "conv_transpose/kernel": (3,)
  }


@pytest.mark.parametrize(
  "params",
  [shapes(beta=(4, 5), Lambda=(4, 3)), shapes(a__weights=(4, 5)), shapes(b=(4, 3, 2))],
)
def test_matrices_of_many_meanings_are_assumed(params):
  assert all(spec.assumed for spec in specs(params).values())


def test_a_matrix_as_long_as_the_stack_of_equinox_next_to_it_is_a_tie():
  params = shapes(
    gate__weight=(6, 8), blocks__1__weight=(6, 8, 4), blocks__1__bias=(6, 8)
  )
  found = specs(params, unit_axis="first")
  assert found["gate/weight"].axes == (0,) and found["gate/weight"].ties == ((0, 1),)


@pytest.mark.parametrize(
  ("names", "axis"),
  [
    (("wx", "wh", "b"), 1),
    (("W_x", "W_h", "b"), 1),
    (("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"), 0),
  ],
)
def test_bare_matrices_with_several_gates_are_a_cell(names, axis):
  inputs, recurrent = ((3, 20), (5, 20)) if axis else ((20, 3), (20, 5))
  params = dict(zip(names, (inputs, recurrent, (20,), (20,)), strict=False))
  for spec in specs(shapes(**params), strict=True).values():
    assert (spec.tiles, spec.unit_shape, spec.group) == (4, (5,), "")
    assert spec.axes == (axis if len(spec.shape) == 2 else 0,)


def test_a_perceptron_of_bare_matrices_is_no_cell():
  params = shapes(w_i=(3, 8), w_h=(8, 8), w_o=(8, 2), b_i=(8,), b_h=(8,), b_o=(2,))
  assert len(set(groups(params).values())) == 6


def test_an_error_says_what_each_choice_means_and_recommends_none():
  with pytest.raises(ValueError) as error:
    specs(shapes(w=(4, 4, 4), b=(4, 4)))
  assert (
    "(0, 1) if the layer sums over axis 2; (0, 2) if the layer sums over axis 1; "
    "(1, 2) if the layer sums over axis 0"
  ) in str(error.value)
  assert "overrides=[(r'^w$', AXES)]" in str(error.value)


@pytest.mark.parametrize(
  ("kernel", "bias", "axes_of_kernel", "axes_of_bias"),
  [
    ((2, 2, 4, 2), (8,), (2, 3), (0,)),
    ((7, 4, 3), (12,), (1, 2), (0,)),
    ((7, 12), (4, 3), (1,), (0, 1)),
    ((30, 12), (6, 2), (1,), (0, 1)),
  ],
)
@pytest.mark.parametrize("how", ["found", "override"])
def test_flattened_units(kernel, bias, axes_of_kernel, axes_of_bias, how):
  params = shapes(a__kernel=kernel, a__bias=bias)
  overrides = (("kernel", axes_of_kernel),) if how == "override" else ()
  found = specs(params, strict=True, overrides=overrides)
  assert found["a/kernel"].axes == axes_of_kernel
  assert found["a/bias"].axes == axes_of_bias
  assert found["a/kernel"].num_units == found["a/bias"].num_units
  assert found["a/kernel"].group == found["a/bias"].group == "a"


def test_permuted_units_of_one_number_do_not_share():
  params = shapes(a__kernel=(7, 2, 4), a__bias=(4, 2))
  found = specs(params, overrides=(("kernel", (1, 2)),))
  assert found["a/bias"].group == "a/bias"


def test_describe_units_of_nothing():
  assert describe_units({}).splitlines()[-1] == "0 rates for 0 parameters in 0 groups."


def test_an_option_of_describe_units_that_was_removed_says_what_to_write():
  with pytest.raises(
    TypeError, match=r"describe_units\(strict=...\).*UnitOptions\(str"
  ):
    describe_units({}, strict=True)


def test_two_square_layers_are_a_cell_only_where_the_node_says_so():
  def layer(features):
    return {"kernel": jnp.zeros((features, 6)), "bias": jnp.zeros(6)}

  def groups(tree):
    return {spec.group for spec in unit_specs(tree).values()}

  perceptron = {"input": layer(3), "hidden": layer(6)}
  assert groups(perceptron) == {"input", "hidden"}
  assert groups({"mlp": perceptron}) == {"mlp/input", "mlp/hidden"}
  assert groups({"cell": {"lin_x": layer(3), "lin_h": layer(6)}}) == {"cell"}
