"""Meshes, and what lies where on them; one process with four simulated devices."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import alrao_jax as alrao
from benchmarks import devices
from benchmarks.checkpoints import Checkpoints
from benchmarks.local_statistics import use_local_statistics
from benchmarks.models.layers import Classifier, batch_norm
from benchmarks.planning import OptionError

KEY = jax.random.key(0)


class State(NamedTuple):
  params: Any
  batch_stats: Any
  opt_state: Any


def make_state(num_heads=4):
  params = {
    "body": jnp.arange(6.0),
    "output": {"alrao_heads": {"kernel": jnp.ones((num_heads, 6, 3))}},
  }
  optimizer = alrao.alrao(KEY, optax.trace(0.9))
  return optimizer, State(params, {"mean": jnp.zeros(6)}, optimizer.init(params))


@pytest.mark.parametrize(
  "data, heads, shape",
  [(None, 1, (4, 1)), (None, 2, (2, 2)), (1, 4, (1, 4)), (2, 1, (2, 1))],
)
def test_mesh_has_the_devices_asked_for(data, heads, shape):
  assert devices.make_mesh(data, heads).devices.shape == shape


@pytest.mark.parametrize("data, heads", [(3, 2), (None, 3), (0, 1), (2, 0), (None, 8)])
def test_mesh_of_other_numbers_is_refused(data, heads):
  with pytest.raises(OptionError, match="--mesh-data times --mesh-heads must be .* 4"):
    devices.make_mesh(data, heads)


@pytest.mark.parametrize("split, rows", [("data", 4), ("all", 2)])
def test_batch_is_split_over_the_axes_asked_for(split, rows):
  mesh = devices.make_mesh(2, 2)
  assert devices.host_share(mesh, split) == (0, 1)  # one host loads it all
  given = {"images": np.arange(24.0).reshape(8, 3), "labels": np.arange(8)}
  batch = devices.make_global_batch(mesh, given, split)
  np.testing.assert_array_equal(batch["images"], given["images"])
  assert {x.data.shape for x in batch["images"].addressable_shards} == {(rows, 3)}
  seen = [x.data[0].item() for x in batch["labels"].addressable_shards]
  assert sorted(set(seen)) == list(range(0, 8, rows))


def test_batch_that_can_not_be_split_is_refused():
  mesh = devices.make_mesh(2, 2)
  batch = {"labels": np.zeros(6, int)}
  devices.make_global_batch(mesh, batch)
  with pytest.raises(OptionError, match="--batch-size must be a multiple of 4.* got 6"):
    devices.make_global_batch(mesh, batch, "all")


def test_state_without_heads_stands_on_every_device():
  _, state = make_state()
  optimizer = optax.sgd(0.1)
  params = {"body": state.params["body"]}
  state = State(params, state.batch_stats, optimizer.init(params))
  mesh = devices.make_mesh(4)
  shardings = devices.state_shardings(mesh, optimizer, state)
  assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings))
  assert jax.tree.structure(shardings) == jax.tree.structure(state)
  with pytest.raises(OptionError, match="--mesh-heads: .* must have heads"):
    devices.state_shardings(devices.make_mesh(2, 2), optimizer, state)


def test_heads_that_can_not_be_split_are_refused():
  optimizer, state = make_state(5)
  with pytest.raises(OptionError, match="--mesh-heads: .* split 5 heads evenly"):
    devices.state_shardings(devices.make_mesh(2, 2), optimizer, state)


def test_pinned_step_leaves_the_state_where_it_lies_and_compiles_once():
  mesh = devices.make_mesh(2, 2)
  optimizer, state = make_state()
  shardings = devices.state_shardings(mesh, optimizer, state)
  traces = []

  def step(state):
    traces.append(None)
    kernel = state.params["output"]["alrao_heads"]["kernel"]
    # What would come out split, and what would come out whole.
    params = {**state.params, "body": state.params["body"] + kernel.sum(axis=(1, 2))[0]}
    return state._replace(params=params), kernel.sum(axis=(1, 2))

  placed = devices.place(state, shardings)
  jitted = jax.jit(devices.pin(step, shardings))
  new, outputs = jitted(placed)
  jitted(new)
  assert len(traces) == 1
  assert outputs.is_fully_replicated
  same = jax.tree.map(
    lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), new, shardings
  )
  assert all(jax.tree.leaves(same))
  shards = new.params["output"]["alrao_heads"]["kernel"].addressable_shards
  assert {shard.data.shape for shard in shards} == {(2, 6, 3)}


def test_checkpoint_of_one_mesh_goes_on_on_another(tmp_path):
  optimizer, state = make_state()
  placed = {}
  for mesh in (devices.make_mesh(2, 2), devices.make_mesh(1, 4)):
    shardings = devices.state_shardings(mesh, optimizer, state)
    placed[mesh.devices.shape] = devices.place(state, shardings)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, placed[2, 2], {})
    found = checkpoints.restore(placed[1, 4])
  assert found is not None
  for expected, like, leaf in zip(
    *map(jax.tree.leaves, (state, placed[1, 4], found[0])), strict=True
  ):
    np.testing.assert_array_equal(leaf, expected)
    assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


def test_fetch_brings_the_parts_together():
  mesh = devices.make_mesh(2, 2)
  whole = np.arange(8.0)
  sharding = NamedSharding(mesh, PartitionSpec(("data", "heads")))
  found = devices.fetch({"x": jax.device_put(whole, sharding)})
  assert isinstance(found["x"], np.ndarray)
  np.testing.assert_array_equal(found["x"], whole)


def test_hosts_out_of_range_are_refused():
  with pytest.raises(OptionError, match="--host must be from 0 to 1, got 2"):
    devices.initialize_hosts("localhost:1", 2, 2)
  with pytest.raises(OptionError, match="--heartbeat-seconds must be positive, got 0"):
    devices.initialize_hosts("localhost:1", 2, 0, 0)


class Body(nn.Module):
  @nn.compact
  def __call__(self, images, *, train):
    images = nn.Dense(6)(images)
    images = batch_norm(images, train=train, dtype=jnp.float32)
    # Twice the dropped share would change the mean over the parts.
    return nn.Dropout(0.5, deterministic=not train)(nn.relu(images))


MODEL = Classifier(Body(), num_classes=3, num_heads=2)
IMAGES = jax.random.normal(KEY, (8, 2, 2, 3)) * jnp.arange(1.0, 9).reshape(8, 1, 1, 1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(model, variables, images, train=True):
  return model.apply(
    variables, images, train=train, mutable=["batch_stats"], rngs={"dropout": KEY}
  )


@pytest.fixture(scope="module")
def variables():
  return jax.jit(MODEL.init, static_argnames="train")(KEY, IMAGES, train=False)


def lowered(model, variables, images):
  def body_of(variables, images):
    body = model.clone(num_heads=None, parent=None)
    return apply(body, variables, images)[0].sum()

  mesh = devices.make_mesh(4)
  rows = devices.batch_sharding(mesh)
  everywhere = NamedSharding(mesh, PartitionSpec())
  head = jax.tree.map(lambda x: x[0], variables["params"]["output"]["alrao_heads"])
  variables = {**variables, "params": {**variables["params"], "output": head}}
  jitted = jax.jit(body_of, in_shardings=(everywhere, rows))
  return jitted.lower(variables, images).compile().as_text()


def test_statistics_of_a_split_batch_are_those_of_all_of_it(variables):
  mesh = devices.make_mesh(4)
  images = devices.make_global_batch(mesh, np.asarray(IMAGES))
  _, whole = apply(MODEL, variables, IMAGES)
  _, split = apply(MODEL, variables, images)
  for a, b in zip(*map(jax.tree.leaves, (whole, split)), strict=True):
    np.testing.assert_allclose(a, b, rtol=32 * 6e-8, atol=32 * 6e-8 * 100)  # var's sums


def test_local_statistics_are_those_of_each_part(variables):
  local = use_local_statistics(MODEL, 4)
  init = functools.partial(local.init, train=False)
  shapes = jax.eval_shape(init, KEY, IMAGES)
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
  _, found = apply(local, variables, IMAGES)
  each = [apply(MODEL, variables, part)[1] for part in jnp.split(IMAGES, 4)]
  expected = jax.tree.map(lambda *xs: sum(xs) / 4, *each)
  for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
    np.testing.assert_allclose(a, b, rtol=32 * 6e-8, atol=32 * 6e-8 * 100)
  _, whole = apply(MODEL, variables, IMAGES)
  mean = [x["batch_stats"]["body"]["BatchNorm_0"]["var"] for x in (whole, found)]
  assert np.abs(mean[0] - mean[1]).max() > 0.01  # it matters


def test_local_statistics_change_no_evaluation(variables):
  local = use_local_statistics(MODEL, 4)
  a, _ = apply(MODEL, variables, IMAGES, train=False)
  b, _ = apply(local, variables, IMAGES, train=False)
  np.testing.assert_array_equal(a.shared, b.shared)


def test_local_statistics_send_nothing_but_the_averages(variables):
  synchronised = lowered(MODEL, variables, IMAGES)
  local = lowered(use_local_statistics(MODEL, 4), variables, IMAGES)
  # Only the sum over the batch, which the test asks for, is left.
  assert local.count(" all-reduce(") < synchronised.count(" all-reduce(")
  assert "BatchNorm" in "".join(
    x for x in synchronised.splitlines() if "all-reduce(" in x
  )
  assert "BatchNorm" not in "".join(x for x in local.splitlines() if "all-reduce(" in x)
