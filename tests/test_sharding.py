"""Heads split over devices: where arrays lie, and that training is the same."""

import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharded_training
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import alrao_jax as alrao
from alrao_jax import nnx as alrao_nnx
from alrao_jax.linen import MultiHead

ROOT = Path(__file__).resolve().parent.parent
KEY = jax.random.key(0)
N, F, C = 4, 7, 3
HEAD, WHOLE = P("heads"), P()
# Roundings of float64, 2.2e-16 each, of sums over less than 2 ** 10 terms whose errors
# grow less than tenfold in each of four steps. What a device left out would be 1e-1.
ROUNDING = 2.2e-16 * 2**10 * 10


def make_params(num_heads=N):
  heads = {"kernel": jnp.ones((num_heads, F, C)), "bias": jnp.ones((num_heads, C))}
  # An axis of the body may be as long as there are heads.
  dense = {"kernel": jnp.ones((num_heads, F)), "bias": jnp.ones(F)}
  return {"dense": dense, "out": {"alrao_heads": heads}}


def make_mesh(data=2, heads=2):
  types = (AxisType.Auto, AxisType.Auto)
  return jax.make_mesh((data, heads), ("data", "heads"), types)


def specs(shardings):
  return [
    (jax.tree_util.keystr(path), sharding.spec)
    for path, sharding in jax.tree.leaves_with_path(shardings)
  ]


def of(found, *words):
  chosen = {spec for path, spec in found if all(word in path for word in words)}
  assert chosen, f"nothing has {words} in its name"
  return chosen


def test_parameters_of_heads_are_split_and_no_others():
  _, shardings = alrao.head_shardings(alrao.alrao(KEY), make_params(), make_mesh())
  found = specs(shardings)
  assert of(found, "alrao_heads") == {HEAD}
  assert of(found, "dense") == {WHOLE}


@pytest.mark.parametrize(
  "wrap",
  [
    lambda tx: tx,
    lambda tx: optax.chain(optax.clip(1.0), tx),
    lambda tx: optax.MultiSteps(tx, 2),
  ],
  ids=["itself", "chain", "multi_steps"],
)
def test_moments_of_heads_are_split_wherever_they_are(wrap):
  optimizer = wrap(alrao.alrao(KEY, optax.scale_by_adam()))
  params = make_params()
  shardings, _ = alrao.head_shardings(optimizer, params, make_mesh())
  jax.tree.map(lambda *_: None, shardings, optimizer.init(params))  # the same tree
  found = specs(shardings)
  for moment in (".mu", ".nu"):
    assert of(found, moment, "alrao_heads") == {HEAD}
    assert of(found, moment, "dense") == {WHOLE}


def test_rates_and_posterior_stand_on_every_device():
  shardings, _ = alrao.head_shardings(alrao.alrao(KEY), make_params(), make_mesh())
  found = specs(shardings)
  for name in ("ladder", "quantiles", "log_weights", ".alpha", ".beta"):
    assert of(found, name) == {WHOLE}


def test_numbers_that_per_head_keeps_for_each_head_are_split():
  inner = alrao.per_head(optax.scale_by_adam())
  optimizer = alrao.alrao(KEY, inner)
  shardings, _ = alrao.head_shardings(optimizer, make_params(), make_mesh())
  found = specs(shardings)
  assert of(found, ".heads", ".count") == {HEAD}
  assert of(found, ".body", ".count") == {WHOLE}


def test_the_axis_of_the_heads_may_be_another_than_the_first():
  def init(params):
    return jnp.moveaxis(params["out"]["alrao_heads"]["kernel"], 0, 1)

  tx = optax.GradientTransformation(
    init, lambda updates, state, _=None: (updates, state)
  )
  optimizer = optax.chain(tx, alrao.alrao(KEY))
  shardings, _ = alrao.head_shardings(optimizer, make_params(), make_mesh())
  assert shardings[0].spec == P(None, "heads")


def test_a_state_that_mixes_the_heads_stands_on_every_device():
  def init(params):
    return params["out"]["alrao_heads"]["kernel"].reshape(-1)

  tx = optax.GradientTransformation(
    init, lambda updates, state, _=None: (updates, state)
  )
  optimizer = optax.chain(tx, alrao.alrao(KEY))
  shardings, _ = alrao.head_shardings(optimizer, make_params(), make_mesh())
  assert shardings[0].spec == WHOLE


def test_agrees_with_the_metadata_of_flax():
  mesh = make_mesh()

  def boxed(head_axis):
    kernel_init = nn.initializers.lecun_normal()
    if head_axis:
      kernel_init = nn.with_partitioning(kernel_init, (None, None))
    head = nn.Dense(C, kernel_init=kernel_init, use_bias=False)
    model = MultiHead(head, num_heads=N, head_axis=head_axis)
    return jax.eval_shape(model.init, KEY, jnp.ones((1, F)))["params"]

  by_flax = nn.meta.unbox(nn.get_sharding(boxed("heads"), mesh))
  _, ours = alrao.head_shardings(alrao.alrao(KEY), boxed(None), mesh)
  equal = jax.tree.map(lambda a, b: a.is_equivalent_to(b, 3), by_flax, ours)
  assert all(jax.tree.leaves(equal))
  # Boxes are kept, so that boxed parameters can be placed.
  _, kept = alrao.head_shardings(alrao.alrao(KEY), boxed("heads"), mesh)
  assert isinstance(kept["alrao_heads"]["kernel"], nn.Partitioned)


def test_parameters_of_nnx_can_be_placed():
  def make_head(rngs):
    return nnx.Linear(F, C, rngs=rngs)

  model = alrao_nnx.MultiHead(make_head, num_heads=N, rngs=nnx.Rngs(0))
  optimizer, params = alrao.alrao(KEY, optax.trace(0.9)), nnx.state(model, nnx.Param)
  shardings = alrao.head_shardings(optimizer, params, make_mesh())
  placed = jax.device_put((optimizer.init(params), params), shardings)
  for tree in (placed[1], optax.tree.get(placed[0], "trace")):
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(tree)} == {HEAD}


def test_batch_statistics_of_heads_are_split():
  stats = {"out": {"alrao_heads": {"mean": jnp.ones((N, 3))}}, "norm": jnp.ones(3)}
  shardings = alrao.tree_head_shardings(stats, make_mesh())
  assert shardings["out"]["alrao_heads"]["mean"].spec == HEAD
  assert shardings["norm"].spec == WHOLE


def test_errors_say_what_to_write():
  optimizer = alrao.alrao(KEY)
  with pytest.raises(ValueError, match="split 5 heads evenly, got 2 .* with 1 or 5 th"):
    alrao.head_shardings(optimizer, make_params(5), make_mesh())
  with pytest.raises(ValueError, match="num_heads=4 or 6"):
    alrao.head_shardings(optimizer, make_params(5), make_mesh())
  with pytest.raises(ValueError, match="axis of the mesh, got 'model'; it has .'data'"):
    alrao.head_shardings(optimizer, make_params(), make_mesh(), "model")
  with pytest.raises(ValueError, match="must have heads, got no path"):
    alrao.head_shardings(optimizer, {"dense": jnp.ones(3)}, make_mesh())
  explicit = jax.make_mesh((2, 2), ("data", "heads"), (AxisType.Explicit,) * 2)
  for split in (
    lambda: alrao.head_shardings(optimizer, make_params(), explicit),
    lambda: alrao.tree_head_shardings(make_params(), explicit),
  ):
    with pytest.raises(
      ValueError, match=r"type Auto, got Explicit, .*axis_types=\(jax.*Auto,\) \* 2"
    ):
      split()
  scalar = {"alrao_heads": jnp.ones([])}
  with pytest.raises(ValueError, match="heads on axis 0, got a scalar"):
    alrao.tree_head_shardings(scalar, make_mesh())


def gathered(hlo):
  """The shapes of what devices gather from each other or send around."""
  kinds = "all-gather|all-to-all|collective-permute"
  results = re.findall(rf"= ([^=]*?) (?:{kinds})(?:-start)?\(", hlo)
  shapes = re.findall(r"\w+\[([\d,]*)\]", " ".join(results))
  return [tuple(map(int, filter(None, shape.split(",")))) for shape in shapes]


def check_collectives(hlo, num_heads, head, body):
  """That neither heads nor body travel: only sums, posteriors and features do.

  Args:
    hlo: The compiled step.
    num_heads: Number of heads.
    head: Shape of one head's kernel.
    body: Shape of the body's largest kernel.
  """
  assert "all-reduce" in hlo
  for shape in gathered(hlo):
    # Whatever the order of the axes, and whatever part of the heads.
    assert not set(head) <= set(shape), f"heads are gathered: {shape}"
    assert np.prod(shape) < np.prod(body), f"the body is gathered: {shape}"


# Heads of 40 classes are handled apart.
@pytest.mark.parametrize("classes", [5, 40])
def test_a_step_on_four_devices_moves_sums_alone_and_is_the_same(classes):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return MultiHead(nn.Dense(classes), num_heads=4)(nn.relu(nn.Dense(32)(x)))

  model, optimizer = Model(), alrao.alrao(KEY, optax.trace(0.9), 1e-4, 1e-2)
  inputs, labels = jax.random.normal(KEY, (8, 16)), jnp.arange(8) % 5
  params = model.init(KEY, inputs)["params"]
  opt_state = optimizer.init(params)

  def step(params, opt_state, inputs, labels):
    def loss_fn(params):
      heads = model.apply({"params": params}, inputs)
      return alrao.classification_loss(heads, labels, alrao.log_weights(opt_state))

    (_, info), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(
      grads, opt_state, params, head_log_likelihoods=info.head_log_likelihoods
    )
    return optax.apply_updates(params, updates), opt_state

  mesh = make_mesh()
  of_state, of_params = alrao.head_shardings(optimizer, params, mesh)
  shardings = (of_params, of_state)
  rows = NamedSharding(mesh, P("data"))
  sharded = jax.jit(
    step, in_shardings=(*shardings, rows, rows), out_shardings=shardings
  )
  placed = jax.device_put(
    ((params, opt_state), inputs, labels), (shardings, rows, rows)
  )
  compiled = sharded.lower(*placed[0], *placed[1:]).compile()
  check_collectives(compiled.as_text(), 4, (32, classes), (16, 32))
  # Each device computes the posterior for itself: no sum or maximum over the heads is a
  # message, but for those of each example's mixture.
  assert not re.findall(r"= \(?f32\[\][^=]* all-reduce", compiled.as_text())

  expected = jax.jit(step)(params, opt_state, inputs, labels)
  found = compiled(*placed[0], *placed[1:])
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
    # Roundings of float32, 6e-8, of a sum over 8 examples and 32 features.
    np.testing.assert_allclose(b, a, rtol=256 * 6e-8, atol=256 * 6e-8)


@pytest.mark.parametrize("classes", [5, 40])
@pytest.mark.parametrize("spec", [P("heads"), P()], ids=["split", "whole"])
def test_arrays_of_explicit_shardings_are_evaluated(classes, spec):
  kernels = jax.random.normal(KEY, (N, 32, classes))
  features = jax.random.normal(KEY, (8, 32))

  def loss_fn(kernels, features):
    heads = alrao.multi_head(lambda kernel, x: x @ kernel, kernels, features)
    return alrao.mixture_loss(
      heads, lambda x: -(x**2).sum(axis=-1), jnp.log(jnp.full(N, 1 / N))
    )[0]

  gradient = jax.jit(jax.grad(loss_fn, (0, 1)))
  expected = gradient(kernels, features)
  mesh = jax.make_mesh((2, 2), ("data", "heads"), (AxisType.Explicit,) * 2)
  with jax.set_mesh(mesh):
    found = gradient(jax.device_put(kernels, spec), jax.device_put(features, P("data")))
  for a, b in zip(expected, found, strict=True):
    # Roundings of float32, 6e-8, of sums over 32 features, 40 outputs and 4 heads.
    bound = 32 * 40 * 4 * 6e-8 * np.abs(a).max()
    np.testing.assert_allclose(b, a, rtol=0, atol=bound)


def run(*args, timeout=500):
  """Starts the small training run; returns its process."""
  command = [sys.executable, "-m", "tests.sharded_training", *map(str, args)]
  pipe = subprocess.PIPE
  return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def finish(process, timeout=500):
  try:
    _, errors = process.communicate(timeout=timeout)
  finally:
    process.kill()
  return process.returncode, errors


def check_equal(found, mesh, reference, reference_mesh="1x1"):
  prefix = f"{reference_mesh}/"
  names = [name.removeprefix(prefix) for name in reference if name.startswith(prefix)]
  for name in names:
    if name.startswith(("state", "losses")):
      a, b = reference[prefix + name], found[f"{mesh}/{name}"]
      tolerance = ROUNDING * max(np.abs(a).max(initial=0), 1)
      np.testing.assert_allclose(b, a, rtol=0, atol=tolerance, err_msg=f"{mesh} {name}")


MESHES = {
  "sgd": ("8x1", "4x2", "2x4", "1x8", "2x4:all"),
  "momentum": ("4x2", "1x8"),
  "adam": ("8x1", "2x4"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """What training on one device gives, by optimizer."""
  folder, cache = tmp_path_factory.mktemp("one"), {}

  def get(optimizer):
    if optimizer not in cache:
      out = folder / f"{optimizer}.npz"
      code, errors = finish(run(out, optimizer, "1x1"))
      assert code == 0, errors
      cache[optimizer] = np.load(out)
    return cache[optimizer]

  return get


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", MESHES)
def test_eight_devices_train_to_the_numbers_of_one(optimizer, tmp_path, trained):
  out = tmp_path / "found.npz"
  code, errors = finish(run(out, optimizer, *MESHES[optimizer]))
  assert code == 0, errors
  found = np.load(out)
  one = sharded_training
  for mesh in MESHES[optimizer]:
    check_equal(found, mesh, trained(optimizer))
    assert found[f"{mesh}/stays"], f"{mesh}: the state moved"
    head, body = (one.FEATURES, one.CLASSES), (3, 3, 16, one.FEATURES)
    check_collectives(str(found[f"{mesh}/hlo"]), one.NUM_HEADS, head, body)


def free_port():
  import socket

  with socket.socket() as sock:
    sock.bind(("localhost", 0))
    return sock.getsockname()[1]


def run_hosts(out, *args, last_host=()):
  """Two processes of four devices each; returns their return codes and messages."""
  hosts = ("--num-hosts", 2, "--port", free_port(), "--host")
  first = run(out, *args, *hosts, 0)
  second = run(out, *args, *hosts, 1, *last_host)
  return finish(first), finish(second)


@pytest.mark.slow
def test_two_processes_train_to_the_numbers_of_one(tmp_path, trained):
  out = tmp_path / "found.npz"
  # A host has half of the rows, then half of the heads.
  results = run_hosts(out, "momentum", "2x4", "1x8")
  assert [code for code, _ in results] == [0, 0], results
  for mesh in ("2x4", "1x8"):
    check_equal(np.load(out), mesh, trained("momentum"))


@pytest.mark.slow
def test_a_lost_process_leaves_a_message_and_a_checkpoint(tmp_path, trained):
  """And what two processes saved on 2x4 devices goes on, with one, on 8x1."""
  out, folder = tmp_path / "found.npz", tmp_path / "checkpoints"
  keep = ("--checkpoints", folder)
  (code, errors), (killed, _) = run_hosts(
    out, "momentum", "2x4", *keep, last_host=("--kill-at", 2)
  )
  assert killed == -9
  assert code != 0
  assert not out.exists()
  # Ours, where the loss is an error of the step; JAX's, where the step hears nothing.
  ours = "error: host 0 can't go on, .* The last checkpoint is whole"
  assert re.search(f"{ours}|tasks? .*(unhealthy|died)", errors), errors
  code, errors = finish(run(out, "momentum", "8x1", *keep))
  assert code == 0, errors
  check_equal(np.load(out), "8x1", trained("momentum"))
