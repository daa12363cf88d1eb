"""An ordinary model's parameters in the same model with many heads."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import alrao_jax.linen
import alrao_jax.nnx
from alrao_jax import load_pretrained

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 4))


def assert_equal(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


class Output(nn.Module):
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    x = nn.BatchNorm(True, param_dtype=self.param_dtype)(x)
    init = nn.with_partitioning(nn.initializers.uniform(1.0), ("in", "out"))
    return nn.Dense(3, kernel_init=init, param_dtype=self.param_dtype)(x)


class Model(nn.Module):
  num_heads: int = 0
  param_dtype: jnp.dtype = jnp.float32
  name_of_output: str = "out"

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(5, param_dtype=self.param_dtype)(x))
    output = Output(self.param_dtype, name=self.name_of_output)
    if self.num_heads:
      output = alrao_jax.linen.MultiHead(
        output, self.num_heads, name=self.name_of_output
      )
    return output(x)


@functools.cache  # compiling an initializer takes a second
def init(model):
  return jax.jit(model.init)(KEY, X)


def randomised(tree):
  """Other values for every leaf, statistics included."""
  leaves, treedef = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  return jax.tree.unflatten(
    treedef,
    [
      jax.random.uniform(key, x.shape, x.dtype, 0.5, 1.5)
      for key, x in zip(keys, leaves, strict=True)
    ],
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_head_becomes_the_linen_output_layer(dtype):
  plain, model = Model(0, dtype), Model(3, dtype)
  with jax.numpy_dtype_promotion("standard"):  # as Flax's layers need it in bfloat16
    pretrained, variables = randomised(init(plain)), init(model)
    loaded = load_pretrained(variables, pretrained)
    expected, heads = plain.apply(pretrained, X), model.apply(loaded, X).shared
  assert jax.tree.structure(loaded) == jax.tree.structure(variables)
  dtypes = (jax.tree.map(lambda x: x.dtype, tree) for tree in (loaded, variables))
  assert next(dtypes) == next(dtypes)
  for j in range(3):
    np.testing.assert_allclose(heads[j], expected, rtol=1e-5, atol=1e-6)


def test_boxed_and_pure_trees_fit_each_other():
  pretrained = randomised(init(Model()))
  variables = init(Model(3))
  boxed = load_pretrained(variables, nn.meta.unbox(pretrained))
  kernel = boxed["params"]["out"]["alrao_heads"]["Dense_0"]["kernel"]
  assert kernel.names == (None, "in", "out")
  pure = load_pretrained(nn.meta.unbox(variables), pretrained)
  assert_equal(nn.meta.unbox(boxed), pure)
  assert_equal(
    load_pretrained(variables["params"], pretrained["params"]), boxed["params"]
  )


def test_shapes_alone_are_enough():
  pretrained = randomised(init(Model()))
  abstract = jax.eval_shape(Model(3).init, KEY, X)
  assert_equal(
    load_pretrained(abstract, pretrained),
    load_pretrained(init(Model(3)), pretrained),
  )


def test_numpy_arrays_do_and_nothing_is_shared_with_them():
  params = {"out": {"alrao_heads": {"b": jnp.zeros((2, 3))}}, "w": jnp.zeros(3)}
  pretrained = {"out": {"b": np.ones(3, np.float32)}, "w": jnp.ones(3)}
  loaded = load_pretrained(params, pretrained)
  pretrained["w"].delete()  # as donation does
  pretrained["out"]["b"][:] = 7
  assert_equal(loaded, jax.tree.map(jnp.ones_like, params))


def test_the_sharding_is_that_of_params():
  mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  bias = jax.device_put(jnp.zeros((2, 3)), sharding)
  pretrained = {"b": jnp.ones(3), "w": jnp.ones(3)}
  loaded = load_pretrained({"alrao_heads": {"b": bias}, "w": jnp.zeros(3)}, pretrained)
  assert loaded["alrao_heads"]["b"].sharding == sharding
  assert not loaded["w"].committed


def test_works_under_jit():
  params, pretrained = {"alrao_heads": {"b": jnp.zeros((2, 3))}}, {"b": jnp.ones(3)}
  loaded = jax.jit(load_pretrained)(params, pretrained)
  assert_equal(loaded, jax.tree.map(jnp.ones_like, params))


def test_what_is_kept_is_copied_so_that_params_may_be_donated():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  bias = jax.device_put(jnp.arange(4.0).reshape(2, 2), sharding)
  key = jax.random.split(jax.random.key(3), 2)
  params = {
    "out": {"alrao_heads": {"b": bias, "rngs": {"count": jnp.zeros(2), "key": key}}},
    "w": jnp.zeros(3),
  }
  loaded = load_pretrained(params, {"w": jnp.ones(3)}, keep=("^out/b",))
  expected = np.arange(4.0).reshape(2, 2), np.array(jax.random.key_data(key))
  for leaf in jax.tree.leaves(params):
    leaf.delete()  # as donation does
  heads = loaded["out"]["alrao_heads"]
  assert_equal((heads["b"], jax.random.key_data(heads["rngs"]["key"])), expected)
  assert heads["b"].committed and heads["b"].sharding == sharding
  assert not heads["rngs"]["count"].any()


# nnx


class NnxOutput(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.linear = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    return self.linear(self.dropout(self.norm(x)))


class NnxModel(nnx.Module):
  def __init__(self, rngs, num_heads=0):
    self.body = nnx.Linear(4, 4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    if num_heads:
      self.out = alrao_jax.nnx.MultiHead(NnxOutput, num_heads, rngs=rngs)
    else:
      self.out = NnxOutput(rngs)

  def __call__(self, x):
    return self.out(self.dropout(self.body(x)))


@pytest.mark.parametrize("pure", [False, True])
def test_every_head_becomes_the_nnx_output_layer(pure):
  plain, model = NnxModel(nnx.Rngs(0)), NnxModel(nnx.Rngs(1), 3)
  plain(X)  # moves the statistics
  state, pretrained = nnx.state(model), nnx.state(plain)
  key = state["out"]["alrao_heads"]["dropout"]["rngs"]["key"][...]
  if pure:
    pretrained = nnx.to_pure_dict(pretrained)
  loaded = load_pretrained(state, pretrained)
  assert isinstance(loaded, nnx.State)
  nnx.update(model, loaded)
  plain.eval()
  model.eval()
  expected, heads = plain(X), model(X).shared
  for j in range(3):
    np.testing.assert_allclose(heads[j], expected, rtol=1e-5, atol=1e-6)
  # Each head keeps its own dropout masks.
  assert (model.out.alrao_heads.dropout.rngs.key[...] == key).all()


def test_nnx_parameters_alone():
  plain, model = NnxModel(nnx.Rngs(0)), NnxModel(nnx.Rngs(1), 3)
  loaded = load_pretrained(nnx.state(model, nnx.Param), nnx.state(plain, nnx.Param))
  kernel = loaded["out"]["alrao_heads"]["linear"]["kernel"][...]
  assert_equal(kernel[2], plain.out.linear.kernel[...])


# What does not fit


def test_a_multi_head_of_another_name_is_named():
  model = Model(3, name_of_output="MultiHead_0")
  with pytest.raises(ValueError) as error:
    load_pretrained(init(model)["params"], init(Model())["params"])
  message = str(error.value)
  assert "Missing in pretrained: MultiHead_0/BatchNorm_0/bias, MultiHead_0/" in message
  assert "Not in params: out/BatchNorm_0/bias, out/" in message
  assert "Name the MultiHead as the plain model names its output layer" in message


def test_long_lists_are_cut():
  params = {f"layer_{i:02d}": jnp.zeros(1) for i in range(20)}
  with pytest.raises(ValueError, match=r"layer_11 and 8 more\. Not in params: none\."):
    load_pretrained(params, {})


def test_other_shapes_and_dtypes_are_listed():
  params = {"out": {"alrao_heads": {"b": jnp.zeros((2, 10)), "k": jnp.zeros((2, 4))}}}
  other = {"out": {"b": jnp.ones(1000), "k": jnp.ones(4)}}
  with pytest.raises(ValueError, match=r"out/b: \(1000,\) for \(10,\)\. .* keep="):
    load_pretrained(params, other)
  other = {"out": {"b": jnp.ones(10, jnp.bfloat16), "k": jnp.ones(4)}}
  with pytest.raises(TypeError, match="out/b: bfloat16 for float32. Cast pretrained"):
    load_pretrained(params, other)


def test_what_is_kept_stays_and_need_not_fit():
  heads = {"alrao_heads": {"b": jnp.arange(4.0).reshape(2, 2)}}
  params = {"body": {"b": jnp.zeros(3)}, "out": heads}
  pretrained = {
    "body": {"b": jnp.ones(3)},
    "out": {"b": jnp.ones(9)},
    "aux": jnp.ones(1),
  }
  loaded = load_pretrained(params, pretrained, keep=("^out/", "^aux$"))
  assert_equal(loaded, {"body": {"b": jnp.ones(3)}, "out": heads})


def test_what_is_kept_needs_values():
  pretrained = {"out": {"b": jnp.ones(2)}}
  heads = {"b": jax.ShapeDtypeStruct((3, 2), jnp.float32)}
  params = {"out": {"alrao_heads": heads}}
  message = "ShapeDtypeStruct for out/alrao_heads/b. Initialise the model first"
  with pytest.raises(ValueError, match=message):
    load_pretrained(params, pretrained, keep=("^out/",))
  abstract = nnx.state(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0), 3)))
  with pytest.raises(ValueError, match="dropout/rngs/key. Initialise the model first"):
    load_pretrained(abstract, nnx.state(NnxModel(nnx.Rngs(0))))


@pytest.mark.parametrize(
  ("params", "pretrained", "message"),
  [
    ({"a": 1.0}, {"a": np.ones(1)}, r"params=...\) must have arrays .* got a: float"),
    ({"a": np.ones(1)}, {"a": "x"}, r"pretrained=...\) must have .* got a: str"),
    (
      {"a": np.ones(1)},
      {"a": jax.ShapeDtypeStruct((1,), float)},
      "got a: ShapeDtypeStruct",
    ),
  ],
)
def test_leaves_that_are_no_arrays_are_named(params, pretrained, message):
  with pytest.raises(TypeError, match=message):
    load_pretrained(params, pretrained)


@pytest.mark.parametrize(
  ("keep", "error", "message"),
  [
    (("typo",), ValueError, "match some path, got 'typo'"),
    ("w", TypeError, "sequence"),
  ],
)
def test_bad_keep_is_named(keep, error, message):
  with pytest.raises(error, match=message):
    load_pretrained({"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, keep=keep)
