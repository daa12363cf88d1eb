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
from benchmarks.console import OptionError
from benchmarks.costs import predicted
from benchmarks.models.layers import Classifier, batch_norm
from benchmarks.training import Checkpoints
from benchmarks.workloads import devices
from benchmarks.workloads.image_stream import use_local_statistics
from benchmarks.workloads.text import TextState

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


def test_batch_is_split_over_the_data_axis():
  mesh = devices.make_mesh(2, 2)
  assert devices.host_share(mesh) == (0, 1)  # one host loads it all
  given = {"images": np.arange(24.0).reshape(8, 3), "labels": np.arange(8)}
  batch = devices.make_global_batch(mesh, given)
  np.testing.assert_array_equal(batch["images"], given["images"])
  assert {x.data.shape for x in batch["images"].addressable_shards} == {(4, 3)}
  seen = [x.data[0].item() for x in batch["labels"].addressable_shards]
  assert sorted(set(seen)) == [0, 4]


class Device(NamedTuple):
  id: int
  process_index: int


class Hosts(NamedTuple):
  """The devices of a mesh's rows, each by its host."""

  rows: tuple[tuple[int, ...], ...]

  def devices_indices_map(self, shape):
    del shape
    places = [(row, host) for row, hosts in enumerate(self.rows) for host in hosts]
    return {
      Device(number, host): (slice(row, row + 1),)
      for number, (row, host) in enumerate(places)
    }


@pytest.mark.parametrize(
  "rows, shares",
  [
    (((0, 0), (1, 1)), [(0, 2), (1, 2)]),
    (((0, 1),), [(0, 1), (0, 1)]),
    (((0, 1), (2, 3)), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    (((0, 0, 1), (1, 2, 2)), None),
    (((0, 0), (0, 1)), None),
  ],
)
def test_hosts_share_a_batch_only_if_none_straddles_rows(rows, shares, monkeypatch):
  mesh = devices.make_mesh(2, 2)
  monkeypatch.setattr(devices, "batch_sharding", lambda _: Hosts(rows))
  for host in range(len(shares or [0])):
    monkeypatch.setattr(jax, "process_index", lambda host=host: host)
    if shares is None:
      with pytest.raises(OptionError, match="--mesh-heads must divide .* straddles"):
        devices.host_share(mesh)
    else:
      assert devices.host_share(mesh) == shares[host]


def test_batch_that_can_not_be_split_is_refused():
  mesh = devices.make_mesh(2, 2)
  devices.make_global_batch(mesh, {"labels": np.zeros(6, int)})
  with pytest.raises(OptionError, match="--batch-size must be a multiple of 2.* got 7"):
    devices.make_global_batch(mesh, {"labels": np.zeros(7, int)})


def test_arrays_are_placed_whatever_they_hold():
  mesh = devices.make_mesh(2, 2)
  sharding = NamedSharding(mesh, PartitionSpec("heads"))
  given = np.array([np.nan, 1.0, np.inf, -0.0], np.float32)
  for leaf in (given, jnp.asarray(given), jax.device_put(given, sharding)):
    placed = devices.place(leaf, sharding)
    assert placed.sharding == sharding
    assert placed.dtype == np.float32
    np.testing.assert_array_equal(placed, given)


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


def test_streams_of_text_are_split_with_what_they_left_in_the_network():
  mesh = devices.make_mesh(2, 2)
  optimizer, state = make_state()
  text = TextState(state.params, jnp.zeros((6, 3)), state.opt_state)
  shardings = devices.state_shardings(mesh, optimizer, text)
  assert shardings.carry == devices.batch_sharding(mesh)
  assert shardings.params == devices.state_shardings(mesh, optimizer, state).params
  batch = {"segment": np.int32(0), "key": np.zeros(2, np.uint32)}
  data, found = devices.input_shardings(mesh, (np.zeros((6, 9)), batch))
  assert data == devices.batch_sharding(mesh)
  assert all(sharding.is_fully_replicated for sharding in found.values())


def test_images_on_the_devices_are_whole_and_their_indices_split():
  mesh = devices.make_mesh(2, 2)
  batch = {"indices": np.zeros(4, int), "key": np.zeros(2, np.uint32)}
  data, found = devices.input_shardings(mesh, (np.zeros((8, 3)), batch))
  assert data.is_fully_replicated and found["key"].is_fully_replicated
  assert found["indices"] == devices.batch_sharding(mesh)


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
    found = checkpoints.restore(lambda notes: placed[1, 4])
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


@pytest.mark.parametrize(
  "error, code, text",
  [
    (
      jax.errors.JaxRuntimeError("UNAVAILABLE: no answer\nmore"),
      3,
      "another host is l",
    ),
    (
      jax.errors.JaxRuntimeError("Gloo: Connection reset by peer"),
      3,
      "another host is",
    ),
    (
      jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory"),
      1,
      "an error of its own",
    ),
    (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
    (OptionError("--rate is odd."), 2, "error: host 0 can't go on: --rate is odd."),
    (KeyboardInterrupt(), 130, "interrupted"),
  ],
)
def test_a_host_of_several_ends_at_once_and_says_why(
  error, code, text, monkeypatch, capsys
):
  class Ended(BaseException):
    pass

  def end(code):
    raise Ended(code)

  with pytest.raises(type(error)), devices.watch_hosts():
    raise error  # alone, it ends as ever
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(devices.os, "_exit", end)
  with pytest.raises(Ended) as ended, devices.watch_hosts():
    raise error
  assert ended.value.args == (code,)
  said = capsys.readouterr().err
  assert text in said
  assert ("another host" in said) == (code == 3)
  assert code == 2 or "(run: with --resume)" in said


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


def sent(model, variables, images):
  """Bytes that four devices add up for loss, gradients and running averages."""
  body = model.clone(num_heads=None, parent=None)

  def step(variables, images):
    def loss(params):
      logits, updated = apply(body, {**variables, "params": params}, images)
      return jnp.square(logits).sum(), updated

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])

  mesh = devices.make_mesh(4)
  rows = devices.batch_sharding(mesh)
  everywhere = NamedSharding(mesh, PartitionSpec())
  jitted = jax.jit(step, in_shardings=(everywhere, rows), out_shardings=everywhere)
  return predicted.count_sent(jitted.lower(variables, images).compile().as_text())


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


def test_local_statistics_send_the_averages_and_nothing_on_the_way_back(variables):
  head = jax.tree.map(lambda x: x[0], variables["params"]["output"]["alrao_heads"])
  variables = {**variables, "params": {**variables["params"], "output": head}}
  local = sent(use_local_statistics(MODEL, 4), variables, IMAGES)
  loss = 4
  assert local == loss + predicted.size(variables)  # gradients, and averages
  assert sent(MODEL, variables, IMAGES) > local
