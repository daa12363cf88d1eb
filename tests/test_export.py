"""Export: one head as the ordinary model's output layer, loaded and served by it."""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import PartitionSpec as P

import alrao_jax as alrao
import alrao_jax.linen
import alrao_jax.nnx

N, BEST = 4, 2
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 5))
LOG_LIKELIHOODS = jnp.array([-2.0, -1.5, -0.5, -3.0])


class Head(nn.Module):
  """A head with batch statistics and dropout."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(7)(x))
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(3)(x)


class Net(nn.Module):
  """The same model with and without MultiHead."""

  num_heads: int | None = None

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))
    if self.num_heads is None:
      return Head(name="out")(x, train)
    return alrao.linen.MultiHead(Head(), self.num_heads, name="out")(x, train)


@pytest.fixture(scope="module")
def variables():
  @jax.jit
  def make():
    variables = Net(N).init({"params": KEY, "dropout": KEY}, X)
    _, state = Net(N).apply(
      variables, X, True, mutable=["batch_stats"], rngs={"dropout": KEY}
    )
    return {**variables, **state}

  return make()


@pytest.fixture(scope="module")
def opt_state(variables):
  return posterior(variables["params"])


def posterior(params, log_likelihoods=LOG_LIKELIHOODS):
  """An optimizer's state whose posterior prefers head BEST."""
  tracker = alrao.track_heads()
  return jax.jit(tracker.update)(
    params, tracker.init(params), params, head_log_likelihoods=log_likelihoods
  )[1]


def paths(tree):
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def test_exported_arrays_are_the_best_heads_to_the_last_bit(variables, opt_state):
  exported = paths(alrao.export(opt_state, variables))
  assert exported.keys() == {
    path.replace("['alrao_heads']", "") for path in paths(variables)
  }
  for path, leaf in paths(variables).items():
    expected = leaf[BEST] if "alrao_heads" in path else leaf
    np.testing.assert_array_equal(
      exported[path.replace("['alrao_heads']", "")], expected
    )


def test_linens_plain_model_loads_and_serves_what_is_exported(variables, opt_state):
  exported = alrao.export(opt_state, variables)
  assert jax.tree.map(jnp.shape, exported) == jax.tree.map(
    jnp.shape, jax.eval_shape(Net().init, KEY, X)
  )
  tracker = alrao.track_heads()
  state, params = alrao.collapse(tracker, opt_state, variables["params"])
  batch_stats = alrao.take_heads(variables["batch_stats"], (BEST,))
  collapsed = {"params": params, "batch_stats": batch_stats}
  predicted = alrao.linen.predict(Net(N), collapsed, alrao.log_weights(state), X)
  expected = jax.nn.log_softmax(Net().apply(exported, X))
  # The mixture normalises the same logits; 4 ulp of the largest.
  ulp = np.spacing(np.float32(jnp.abs(expected).max()))
  np.testing.assert_allclose(predicted, expected, rtol=0, atol=4 * ulp)


def test_a_collapsed_model_needs_no_choice(variables):
  kept = alrao.take_heads(variables, (BEST,))
  chex.assert_trees_all_equal(
    alrao.export(None, kept), alrao.export(None, variables, head=BEST)
  )


def test_export_undoes_load_pretrained(variables):
  plain = jax.jit(Net().init)(KEY, X)
  loaded = alrao.load_pretrained(variables, plain)
  chex.assert_trees_all_equal(alrao.export(None, loaded, head=1), plain)


def test_export_compiles(variables, opt_state):
  chex.assert_trees_all_equal(
    jax.jit(alrao.export)(opt_state, variables), alrao.export(opt_state, variables)
  )


def test_frozen_dicts_stay_frozen(variables):
  exported = alrao.export(None, FrozenDict(variables), head=0)
  assert isinstance(exported, FrozenDict)
  chex.assert_trees_all_equal(
    exported.unfreeze(), alrao.export(None, variables, head=0)
  )


def test_a_multi_head_alone_becomes_its_layer():
  params = {"alrao_heads": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
  assert alrao.export(None, params, head=1)["kernel"].tolist() == [3.0, 4.0, 5.0]


def test_several_layers_export_each_its_own_best_head():
  layer = lambda: {"alrao_heads": {"bias": jnp.arange(float(N))}}  # noqa: E731
  params = {"a": layer(), "b": {"c": layer()}}
  observed = {"a": LOG_LIKELIHOODS, "c": LOG_LIKELIHOODS[::-1]}
  state = posterior(params, observed)
  exported = alrao.export(state, params)
  assert jax.tree.map(float, exported) == {
    "a": {"bias": 2.0},
    "b": {"c": {"bias": 1.0}},
  }
  exported = alrao.export(None, params, head={"a": 3, "c": 0})
  assert jax.tree.map(float, exported) == {
    "a": {"bias": 3.0},
    "b": {"c": {"bias": 0.0}},
  }
  # So do linen's whole variables, whose heads are in several collections.
  stats = {"b": {"c": {"alrao_heads": {"mean": 10 + jnp.arange(float(N))}}}}
  variables = {"params": params, "batch_stats": stats}
  for chosen in (
    alrao.export(state, variables),
    alrao.export(None, variables, head={"a": 2, "b/c": 1}),
    alrao.export(state, variables, head={"a": 2, "c": 1}),
  ):
    assert float(chosen["params"]["a"]["bias"]) == 2.0
    assert float(chosen["params"]["b"]["c"]["bias"]) == 1.0
    assert float(chosen["batch_stats"]["b"]["c"]["mean"]) == 11.0


def test_a_multi_head_below_another_one_is_exported_too():
  params = {
    "alrao_heads": {"w": jnp.arange(N)},
    "b": {"alrao_heads": {"w": jnp.ones(N)}},
  }
  exported = alrao.export(None, params, head={"alrao_heads": 3, "b": 0})
  assert exported["w"] == 3 and exported["b"]["w"] == 1


@pytest.mark.parametrize("head_axis", [None, "heads"])
def test_linens_boxes_lose_the_name_of_the_heads_axis(head_axis):
  def dense(kernel):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", None))
    return nn.Dense(3, kernel_init=init if kernel else nn.initializers.ones)

  model = alrao.linen.MultiHead(dense(True), N, head_axis=head_axis)
  variables = model.init(KEY, X)
  exported = alrao.export(None, variables, head=BEST)
  plain = dense(True).init(KEY, X)
  assert jax.tree.structure(exported) == jax.tree.structure(plain)
  assert nn.get_partition_spec(exported)["params"]["kernel"] == P("in", None)
  boxed = alrao.take_heads(variables, (1, 2))["params"]["alrao_heads"]["kernel"]
  assert boxed.names == (head_axis, "in", None)
  assert boxed.value.shape == (2, 5, 3)


class NnxHead(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(4, 7, rngs=rngs)
    self.norm = nnx.BatchNorm(7, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.last = nnx.Linear(7, 3, rngs=rngs)

  def __call__(self, x):
    return self.last(self.dropout(self.norm(self.dense(x))))


class NnxNet(nnx.Module):
  def __init__(self, rngs, num_heads=None):
    self.body = nnx.Linear(5, 4, rngs=rngs)
    if num_heads is None:
      self.out = NnxHead(rngs)
    else:
      self.out = alrao.nnx.MultiHead(NnxHead, num_heads, rngs=rngs)

  def __call__(self, x):
    return self.out(nnx.relu(self.body(x)))


@pytest.fixture(scope="module")
def nnx_model():
  model = NnxNet(nnx.Rngs(0), N)
  model(X)  # moves batch statistics and dropout's counters
  return model


def test_nnx_plain_model_takes_the_exported_state(nnx_model):
  opt_state = posterior(nnx.state(nnx_model, nnx.Param))
  exported = alrao.export(opt_state, nnx.state(nnx_model))
  plain = NnxNet(nnx.Rngs(1))
  assert jax.tree.structure(exported) == jax.tree.structure(nnx.state(plain))
  nnx.update(plain, exported)
  kernel = nnx_model.out.alrao_heads.last.kernel[...]
  np.testing.assert_array_equal(plain.out.last.kernel[...], kernel[BEST])
  weights = jnp.where(jnp.arange(N) == BEST, 0.0, -jnp.inf)
  predicted = alrao.nnx.predict(nnx_model, weights, X)
  plain.eval()
  expected = jax.nn.log_softmax(plain(X))
  ulp = np.spacing(np.float32(jnp.abs(expected).max()))
  np.testing.assert_allclose(predicted, expected, rtol=0, atol=4 * ulp)


def test_nnx_export_is_the_plain_model_with_the_exported_state(nnx_model):
  before = jax.tree.leaves(nnx.state(nnx_model))
  exported = alrao.nnx.export(nnx_model, posterior(nnx.state(nnx_model, nnx.Param)))
  assert isinstance(exported.out, NnxHead)
  state = alrao.export(None, nnx.state(nnx_model), head=BEST)
  assert jax.tree.structure(nnx.state(exported)) == jax.tree.structure(state)
  plain = NnxNet(nnx.Rngs(1))
  nnx.update(plain, state)
  np.testing.assert_array_equal(exported(X), plain(X))  # dropout too draws alike
  assert isinstance(nnx_model.out, alrao.nnx.MultiHead)  # the model itself is as it was
  after = jax.tree.leaves(nnx.state(nnx_model))
  assert [*map(id, after)] == [*map(id, before)]


def linear_heads(rngs):
  return alrao.nnx.MultiHead(lambda rngs: nnx.Linear(5, 3, rngs=rngs), N, rngs=rngs)


def test_nnx_export_of_a_multi_head_alone_is_its_layer():
  exported = alrao.nnx.export(linear_heads(nnx.Rngs(0)), head=1)
  assert isinstance(exported, nnx.Linear)
  assert exported.kernel.shape == (5, 3)


def test_nnx_export_reaches_containers_and_shared_layers():
  shared, rngs = linear_heads(nnx.Rngs(0)), nnx.Rngs(1)

  class Several(nnx.Module):
    def __init__(self):
      self.layers = nnx.List([nnx.Linear(5, 5, rngs=rngs), shared])
      self.named = nnx.Dict(out=linear_heads(rngs))
      self.again = shared

  exported = alrao.nnx.export(Several(), head=BEST)
  assert isinstance(exported.layers[1], nnx.Linear)
  assert isinstance(exported.named["out"], nnx.Linear)
  assert exported.again is exported.layers[1]


def test_nnx_export_makes_tuples_anew():
  class Pair(NamedTuple):
    first: nnx.Module
    second: nnx.Module

  class Tuples(nnx.Module):
    def __init__(self):
      heads = [linear_heads(nnx.Rngs(i)) for i in range(4)]
      self.plain = nnx.data((nnx.Linear(5, 5, rngs=nnx.Rngs(0)), (heads[0],)))
      self.listed = nnx.data([Pair(heads[1], heads[2])])
      self.mapped = nnx.data({"out": ({"deep": heads[3]},)})

  model = Tuples()
  exported = alrao.nnx.export(model, head=BEST)
  pair = exported.listed[0]
  assert isinstance(pair, Pair)
  found = (exported.plain[1][0], *pair, exported.mapped["out"][0]["deep"])
  heads = (model.plain[1][0], *model.listed[0], model.mapped["out"][0]["deep"])
  for layer, old in zip(found, heads, strict=True):
    assert isinstance(layer, nnx.Linear)
    kernel = old.alrao_heads.kernel[...]  # the model itself is as it was
    np.testing.assert_array_equal(layer.kernel[...], kernel[BEST])


@pytest.mark.filterwarnings("ignore")  # how Flax sees foreign nodes is its own matter
def test_nnx_export_says_which_multi_head_it_can_not_exchange():
  @jax.tree_util.register_pytree_node_class
  class Odd:
    def __init__(self, child):
      self.child = child

    def tree_flatten(self):
      return (self.child,), None

    @classmethod
    def tree_unflatten(cls, _, children):
      return cls(*children)

  class Model(nnx.Module):
    def __init__(self):
      self.odd = nnx.data(Odd(linear_heads(nnx.Rngs(0))))

  with pytest.raises(ValueError, match=r"MultiHead at 'odd.*'.* Put it into nnx.List"):
    alrao.nnx.export(Model(), head=0)


@pytest.mark.parametrize(
  ("head_axis", "stacked"), [(None, (None, "in", None)), ("h", ("h", "in", None))]
)
def test_nnx_variables_lose_the_name_of_the_heads_axis(head_axis, stacked):
  init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", None))
  with nnx.use_eager_sharding(False):
    layer = alrao.nnx.MultiHead(
      lambda rngs: nnx.Linear(5, 3, kernel_init=init, rngs=rngs),
      N,
      rngs=nnx.Rngs(0),
      head_axis=head_axis,
    )
    for exported in (
      alrao.export(None, nnx.state(layer), head=0)["kernel"],
      alrao.nnx.export(layer, head=0).kernel,
    ):
      assert exported.get_metadata()["out_sharding"] == ("in", None)
    taken = alrao.take_heads(nnx.state(layer), (1, 2))["alrao_heads"]["kernel"]
    for kernel in (taken, layer.alrao_heads.kernel):
      assert kernel.get_metadata()["out_sharding"] == stacked


@pytest.mark.parametrize(
  ("options", "error", "message"),
  [
    ({}, ValueError, "must know which head"),
    ({"head": N}, ValueError, r"head=...\) must be from 0 to 3, got 4"),
    ({"head": -1}, ValueError, r"head=...\) must be from 0 to 3, got -1"),
    ({"head": 1.0}, TypeError, r"head=...\) must be an integer, .*got 1.0 of type"),
    (
      {"head": "0"},
      TypeError,
      r"must be an integer, .*got '0' of type str. Write head",
    ),
    ({"head": True}, TypeError, r"must be an integer, .*got True of type bool"),
    ({"head": {"wrong": 1}}, ValueError, r"head=...\) must name one MultiHead of"),
  ],
)
def test_what_leaves_no_head_to_take_is_an_error(variables, options, error, message):
  with pytest.raises(error, match=message):
    alrao.export(None, variables, **options)


def test_a_head_that_is_given_beats_the_posterior(variables, opt_state):
  given = alrao.export(opt_state, variables, head=0)
  chex.assert_trees_all_equal(given, alrao.export(None, variables, head=0))


def test_a_tree_without_heads_is_an_error():
  with pytest.raises(ValueError, match="must have heads, got no path"):
    alrao.export(None, {"dense": jnp.ones(3)}, head=0)


def test_a_posterior_over_other_heads_is_an_error(variables, opt_state):
  fewer = alrao.take_heads(variables, (0, 1))
  with pytest.raises(ValueError, match="posterior over the 2 heads of '.*/out'"):
    alrao.export(opt_state, fewer)


def test_a_name_both_in_a_head_and_beside_it_is_an_error():
  params = {"alrao_heads": {"kernel": jnp.ones((2, 3))}, "kernel": jnp.ones(3)}
  with pytest.raises(ValueError, match=r"\['kernel'\] both in a head and beside"):
    alrao.export(None, params, head=0)


def trained_schedule_free():
  params = {
    "hidden": {"kernel": jnp.ones((2, 4))},
    "out": {"alrao_heads": {"kernel": jnp.arange(24.0).reshape(N, 3, 2)}},
  }
  optimizer = alrao.schedule_free_alrao(KEY)
  updates, state = jax.jit(optimizer.update)(
    params, optimizer.init(params), params, head_log_likelihoods=LOG_LIKELIHOODS
  )
  updates, state = jax.jit(optimizer.update)(  # after one step, both are still equal
    params, state, params, head_log_likelihoods=LOG_LIKELIHOODS
  )
  return jax.tree.map(jnp.add, params, updates), state


def test_parameters_that_are_not_the_average_are_refused():
  params, state = trained_schedule_free()
  write = r"Write export\(opt_state, eval_params\(opt_state, params\)\).*head=..."
  with pytest.raises(ValueError, match=write):
    alrao.export(state, params)
  variables = {"params": params, "batch_stats": {"hidden": {"mean": jnp.ones(4)}}}
  with pytest.raises(ValueError, match=write):
    alrao.export(state, variables)
  averages = alrao.eval_params(state, params)
  exported = alrao.export(state, averages)
  chex.assert_trees_all_equal(exported, alrao.export(None, averages, head=BEST))
  # What was not trained is not compared.
  alrao.export(state, alrao.eval_params(state, variables))
  # Parameters of another step, say with the best validation loss.
  alrao.export(None, params, head=BEST)


def test_the_average_can_not_be_compared_when_traced():
  params, state = trained_schedule_free()
  averages = alrao.eval_params(state, params)
  with pytest.raises(
    ValueError, match=r"Write export\(opt_state, eval_params.*outside of jax.jit"
  ):
    jax.jit(alrao.export)(state, averages)


def test_the_average_in_half_precision_is_exported():
  params = {"out": {"alrao_heads": {"kernel": jnp.ones((N, 3, 2), jnp.bfloat16)}}}
  optimizer = alrao.schedule_free_alrao(KEY)
  _, state = jax.jit(optimizer.update)(
    params, optimizer.init(params), params, head_log_likelihoods=LOG_LIKELIHOODS
  )
  exported = alrao.export(state, alrao.eval_params(state, params))
  assert exported["out"]["kernel"].dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def nnx_trained():
  model = NnxNet(nnx.Rngs(0), N)
  optimizer = nnx.Optimizer(model, alrao.schedule_free_alrao(KEY), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    log_weights = alrao.log_weights(optimizer.opt_state)

    def loss_fn(model):
      return alrao.classification_loss(model(X), jnp.zeros(len(X), int), log_weights)

    grads, info = nnx.grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads, head_log_likelihoods=info.head_log_likelihoods)

  for _ in range(2):
    step(model, optimizer)
  return model, optimizer


def test_nnx_export_needs_the_averaged_model(nnx_trained):
  model, optimizer = nnx_trained
  write = r"Write export\(opt_state, eval_params\(opt_state, params\)\)"
  with pytest.raises(ValueError, match=write):
    alrao.nnx.export(model, optimizer.opt_state)
  averaged = alrao.eval_params(optimizer.opt_state, model)
  exported = alrao.nnx.export(averaged, optimizer.opt_state)
  state = alrao.eval_params(optimizer.opt_state, nnx.state(model))
  chosen = alrao.export(optimizer.opt_state, state)
  expected = NnxNet(nnx.Rngs(1))
  nnx.update(expected, chosen)
  chex.assert_trees_all_equal(*(nnx.state(m, nnx.Param) for m in (exported, expected)))


def test_nnx_eval_params_leave_the_model_and_batch_statistics_alone(nnx_trained):
  model, optimizer = nnx_trained
  before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
  averaged = alrao.eval_params(optimizer.opt_state, model)
  assert isinstance(averaged, NnxNet)
  chex.assert_trees_all_equal(
    nnx.state(averaged, nnx.BatchStat), nnx.state(model, nnx.BatchStat)
  )
  chex.assert_trees_all_equal(nnx.state(model, nnx.Param), before)
  average = optimizer.opt_state.average["body"]["kernel"][...]
  np.testing.assert_array_equal(averaged.body.kernel[...], average)
  assert not np.array_equal(average, model.body.kernel[...])


def test_nnx_layers_in_two_places_are_averaged_in_both():
  class Twice(nnx.Module):
    def __init__(self, rngs):
      self.first = nnx.Linear(5, 5, rngs=rngs)
      self.second = self.first
      self.out = linear_heads(rngs)

  model = Twice(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, alrao.schedule_free_alrao(KEY), wrt=nnx.Param)
  average = optimizer.opt_state.average["first"]["kernel"]
  average.set_value(average.get_value() + 1)
  averaged = alrao.eval_params(optimizer.opt_state, model)
  for layer in (averaged.first, averaged.second):
    np.testing.assert_array_equal(layer.kernel[...], average[...])
