"""Collapse where Flax users meet it: training goes on, as with one ordinary layer."""

import inspect
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import alrao_jax as alrao
import alrao_jax.linen
import alrao_jax.nnx

N, BEST = 4, 2
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (8, 5))
Y = jnp.arange(8) % 3


class Head(nn.Module):
  """A head with batch statistics and dropout."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
    return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


class Net(nn.Module):
  num_heads: int | None = N
  stateful: bool = False

  @nn.compact
  def __call__(self, x, *args):
    x = nn.relu(nn.LayerNorm()(nn.Dense(6)(x)))
    head = Head if self.stateful else lambda **name: nn.Dense(3, **name)
    if self.num_heads is None:
      return head(name="out")(x, *args)
    return alrao.linen.MultiHead(head(), self.num_heads, name="out")(x, *args)


class State(alrao.linen.TrainState):
  batch_stats: dict
  average: dict


def make_state(model=None, tx=None):
  model = Net() if model is None else model
  variables = jax.jit(model.init)({"params": KEY, "dropout": KEY}, X)
  return alrao.linen.TrainState.create(
    apply_fn=model.apply,
    params=variables["params"],
    tx=alrao.alrao(KEY, optax.trace(0.9)) if tx is None else tx,
  )


def make_step():
  @jax.jit
  def step(state):
    def loss_fn(params):
      heads = state.apply_fn({"params": params}, X)
      weights = alrao.log_weights(state.opt_state)
      return alrao.classification_loss(heads, Y, weights)

    (loss, info), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(
      grads=grads, head_log_likelihoods=info.head_log_likelihoods
    ), loss

  return step


def run(step, state, steps=5):
  for _ in range(steps):
    state, _ = step(state)
  return state


@pytest.mark.slow
def test_train_state_goes_on_with_one_further_compilation():
  step = make_step()
  state = run(step, make_state())
  compiled = step._cache_size()
  state = run(step, alrao.linen.collapse(state, keep=1))
  assert step._cache_size() == compiled + 1
  assert state.params["out"]["alrao_heads"]["kernel"].shape == (1, 6, 3)
  assert int(state.step) == 10


def test_keeping_all_heads_trains_on_to_the_same_bits():
  step = make_step()
  state = run(step, make_state())
  kept = alrao.linen.collapse(state, keep=N)
  chex.assert_trees_all_equal(run(step, kept), run(step, state))


def test_one_head_trains_as_the_ordinary_model_with_its_rate():
  tx = alrao.alrao(KEY, optax.trace(0.9), 1e-3, 1.0)
  state = alrao.linen.collapse(make_state(tx=tx), keep=(BEST,))
  rate = alrao.unit_rates(state.opt_state, state.params)["out"]["alrao_heads"]
  rate = float(rate["bias"][0, 0])
  plain_tx = optax.partition(
    {
      "body": alrao.alrao(KEY, optax.trace(0.9), 1e-3, 1.0, heads=False),
      "out": optax.sgd(rate, momentum=0.9),
    },
    lambda params: {name: "out" if name == "out" else "body" for name in params},
  )
  params = alrao.export(None, state.params)
  plain_state = plain_tx.init(params)

  @jax.jit
  def plain_step(params, opt_state):
    def loss_fn(params):
      logits = Net(None).apply({"params": params}, X)
      return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = plain_tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  step = make_step()
  for _ in range(4):
    state, loss = step(state)
    params, plain_state, plain_loss = plain_step(params, plain_state)
  # The same terms, of which some are summed in another order: updates may differ in
  # their last bits, sums of weight and update by 1 ulp a step, of the largest weight.
  np.testing.assert_allclose(loss, plain_loss, rtol=4 * np.finfo(np.float32).eps)
  for a, b in zip(
    jax.tree.leaves(alrao.export(None, state.params)),
    jax.tree.leaves(params),
    strict=True,
  ):
    ulp = np.spacing(np.float32(np.abs(b).max()))
    np.testing.assert_allclose(a, b, rtol=0, atol=4 * ulp)


def find_trace(opt_state):
  is_trace = lambda node: isinstance(node, optax.TraceState)  # noqa: E731
  (found,) = filter(is_trace, jax.tree.leaves(opt_state, is_leaf=is_trace))
  return found.trace


def test_every_field_of_a_train_state_is_sliced():
  model = Net(stateful=True)
  variables = jax.jit(model.init)({"params": KEY, "dropout": KEY}, X)
  state = State.create(
    apply_fn=model.apply,
    params=variables["params"],
    tx=alrao.track_heads(),
    batch_stats=variables["batch_stats"],
    average=jax.tree.map(jnp.copy, variables["params"]),
  )
  kept = alrao.linen.collapse(state, keep=(3, 1))
  assert isinstance(kept, State)
  for name in ("params", "batch_stats", "average"):
    chex.assert_trees_all_equal(
      getattr(kept, name), alrao.take_heads(getattr(state, name), (3, 1))
    )
  variables = {"params": kept.params, "batch_stats": kept.batch_stats}
  heads, new = jax.eval_shape(
    lambda v: model.apply(v, X, True, mutable=["batch_stats"], rngs={"dropout": KEY}),
    variables,
  )
  assert heads.num_heads == 2
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
  assert shapes(new["batch_stats"]) == shapes(kept.batch_stats)


def test_a_layer_with_fewer_heads_takes_no_more_of_them():
  params = Net().init(KEY, X)
  assert Net(9).apply(params, X).num_heads == N
  with pytest.raises(ValueError, match=r"or more, but .* \[\(4,\)\], got 3"):
    Net(3).apply(params, X)


def test_kept_heads_predict_as_before():
  state = run(make_step(), make_state())
  kept = alrao.linen.collapse(state, keep=(1, 3))
  before = state.apply_fn({"params": state.params}, X).shared
  after = kept.apply_fn({"params": kept.params}, X).shared
  # A batched product may be summed in another order: 6 terms of size up to 4.
  np.testing.assert_allclose(after, before[np.array([1, 3])], rtol=0, atol=3e-6)


def test_boxes_of_linen_are_kept():
  class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
      init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
      return alrao.linen.MultiHead(nn.Dense(3, kernel_init=init), N)(x)

  params = Boxed().init(KEY, X)["params"]
  optimizer = alrao.alrao(KEY, optax.trace(0.9))
  opt_state = optimizer.init(params)
  updates = jax.tree.map(jnp.cos, params)
  _, opt_state = jax.jit(optimizer.update)(
    updates, opt_state, params, head_log_likelihoods=jnp.array([-3.0, -1, -4, -2])
  )
  fewer, kept = alrao.collapse(optimizer, opt_state, params, 2)
  for old, new in ((params, kept), (find_trace(opt_state), find_trace(fewer))):
    assert jax.tree.structure(new) == jax.tree.structure(old)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
      np.testing.assert_array_equal(b, a[np.array([1, 3])])


def test_a_second_optimizers_state_in_another_field_is_an_error():
  class Two(alrao.linen.TrainState):
    other: tuple

  state = make_state()
  state = Two.create(
    apply_fn=state.apply_fn, params=state.params, tx=state.tx, other=state.opt_state
  )
  with pytest.raises(ValueError, match="got another one in 'other'. Collapse each"):
    alrao.linen.collapse(state)


class NnxHead(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.last = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    return self.last(self.dropout(self.norm(x)))


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.body = nnx.Linear(5, 6, rngs=rngs)
    self.out = alrao.nnx.MultiHead(NnxHead, N, rngs=rngs)

  def __call__(self, x):
    return self.out(nnx.relu(self.body(x)))


def nnx_loss(model, weights):
  return alrao.classification_loss(model(X), Y, weights)


@nnx.jit
def nnx_step(model, optimizer):
  weights = alrao.log_weights(optimizer.opt_state)
  grads, info = nnx.grad(nnx_loss, has_aux=True)(model, weights)
  optimizer.update(model, grads, head_log_likelihoods=info.head_log_likelihoods)


def make_nnx():
  model = nnx.jit(lambda: NnxNet(nnx.Rngs(0)))()
  tx = alrao.alrao(KEY, optax.trace(0.9))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  nnx_step(model, optimizer)
  return model, optimizer


def plain_leaves(tree):
  data = lambda x: (  # noqa: E731
    jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  )
  return [np.asarray(data(leaf)) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_nnx_collapses_in_place_and_trains_on():
  model, optimizer = make_nnx()
  before = alrao.take_heads(nnx.state(model), (3, 1))
  momenta = alrao.take_heads(find_trace(optimizer.opt_state), (3, 1))
  alrao.nnx.collapse(model, optimizer, keep=(3, 1))
  assert model.out.num_heads == 2
  for found, expected in (
    (nnx.state(model), before),
    (find_trace(optimizer.opt_state), momenta),
  ):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(plain_leaves(found), plain_leaves(expected), strict=True):
      np.testing.assert_array_equal(a, b)
  for _ in range(2):
    nnx_step(model, optimizer)
  assert int(optimizer.step[...]) == 3
  assert alrao.nnx.predict(model, alrao.log_weights(optimizer.opt_state), X).shape == (
    8,
    3,
  )


def test_nnx_in_place_equals_the_functional_way():
  model, optimizer = make_nnx()
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  opt_state, params = alrao.collapse(optimizer.tx, optimizer.opt_state, params)
  kept = alrao.best_heads(optimizer.opt_state)
  # The old graph definition serves: MultiHead counts the heads that it is given.
  functional = nnx.merge(graphdef, params, alrao.take_heads(rest, kept))
  alrao.nnx.collapse(model, optimizer)
  assert jax.tree.structure(opt_state) == jax.tree.structure(optimizer.opt_state)
  for found, expected in (
    (optimizer.opt_state, opt_state),
    (nnx.state(model), nnx.state(functional)),
  ):
    for a, b in zip(plain_leaves(found), plain_leaves(expected), strict=True):
      np.testing.assert_array_equal(a, b)
  assert functional(X).num_heads == 1  # last: it moves batch statistics


def test_a_refused_nnx_collapse_changes_nothing():
  model, optimizer = make_nnx()
  with pytest.raises(ValueError, match="at most num_heads = 4, got 5"):
    alrao.nnx.collapse(model, optimizer, keep=5)
  assert model(X).num_heads == N


def test_a_collapsed_state_survives_a_checkpoint(tmp_path):
  checkpoint = pytest.importorskip("orbax.checkpoint")
  step = make_step()
  state = alrao.linen.collapse(run(step, make_state()), keep=2)
  with checkpoint.StandardCheckpointer() as saver:
    saver.save(tmp_path / "state", state)
    saver.wait_until_finished()
    # A new process: a fresh state, collapsed to as many heads, is the template.
    template = alrao.linen.collapse(make_state(tx=state.tx), keep=2)
    restored = saver.restore(tmp_path / "state", template)
  chex.assert_trees_all_equal(
    run(step, restored.replace(apply_fn=state.apply_fn)), run(step, state)
  )


# linen's export


@pytest.mark.parametrize("head", [None, 2])
def test_an_exported_train_state_is_the_plain_model_with_all_its_collections(head):
  model = Net(stateful=True)
  variables = model.init({"params": KEY, "dropout": KEY}, X)
  variables["batch_stats"] = jax.tree.map(
    lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape),
    variables["batch_stats"],
  )
  tx = alrao.alrao(KEY)
  state = State.create(apply_fn=model.apply, tx=tx, average={}, **variables)
  told = {"head_log_likelihoods": jnp.array([-2.0, -1.0, -2.0, -3.0])}
  state = state.apply_gradients(grads=state.params, **told)
  exported = alrao.linen.export(state, head=head)
  plain = Net(num_heads=None, stateful=True)
  expected = jax.tree.structure(plain.init({"params": KEY, "dropout": KEY}, X))
  assert jax.tree.structure({x: exported[x] for x in variables}) == expected
  chosen = 1 if head is None else head
  old = {name: getattr(state, name)["out"]["alrao_heads"] for name in variables}
  new = {name: exported[name]["out"] for name in variables}
  chex.assert_trees_all_equal(new, jax.tree.map(lambda x: x[chosen], old))


def test_linen_and_nnx_offer_the_same_names_in_the_same_order():
  def offered(module):
    source = inspect.getsource(module)
    return re.findall(r"^(?:def|class) ([A-Za-z]\w*)", source, re.M)

  linen, nnx_names = offered(alrao.linen), offered(alrao.nnx)
  assert [name for name in linen if name != "TrainState"] == nnx_names
