"""A small network trained on simulated devices, in processes of their own.

    python -m tests.sharded_training OUT OPTIMIZER MESH...

A mesh is DATAxHEADS, or, of one process, DATAxHEADS:all for a batch split over both
axes. For each, the
losses, the last state and the compiled step go into OUT. With --checkpoints, training
keeps one after every step, and goes on after the last.
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

HEARTBEAT_SECONDS = 10
NUM_DEVICES, NUM_STEPS, BATCH, NUM_HEADS, FEATURES, CLASSES = 8, 4, 16, 8, 24, 11


class State(NamedTuple):
  params: Any
  batch_stats: Any
  opt_state: Any


def make_model():
  import flax.linen as nn

  from alrao_jax.linen import MultiHead

  class Model(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
      for features in (16, FEATURES):
        # In the images' dtype throughout. A bias before the normalisation would have a
        # gradient of nothing but rounding.
        images = nn.Conv(features, (3, 3), strides=2, use_bias=False)(images)
        images = nn.relu(nn.BatchNorm(use_running_average=not train)(images))
      head = nn.Dense(CLASSES)
      return MultiHead(head, num_heads=NUM_HEADS)(images.mean(axis=(1, 2)))

  return Model()


def make_optimizer(name):
  import jax
  import optax

  import alrao_jax as alrao

  bases = {
    "sgd": optax.identity(),
    "momentum": optax.trace(0.9),
    "adam": optax.scale_by_adam(),
  }
  # Rates at which nothing diverges, so that roundings do not grow from step to step.
  return alrao.alrao(jax.random.key(1), bases[name], 1e-4, 1e-2)


def make_batch(step):
  import numpy as np

  generator = np.random.default_rng(step)
  images = generator.normal(size=(BATCH, 8, 8, 3))
  return {"images": images, "labels": generator.integers(0, CLASSES, BATCH)}


def make_step(model, optimizer):
  import jax
  import optax

  import alrao_jax as alrao

  def step(state, batch):
    def loss_fn(params):
      variables = {"params": params, "batch_stats": state.batch_stats}
      heads, updated = model.apply(
        variables, batch["images"], train=True, mutable=["batch_stats"]
      )
      log_weights = alrao.log_weights(state.opt_state)
      loss, info = alrao.classification_loss(heads, batch["labels"], log_weights)
      return loss, (info, updated["batch_stats"])

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (info, batch_stats)), grads = grad_fn(state.params)
    updates, opt_state = optimizer.update(
      grads,
      state.opt_state,
      state.params,
      head_log_likelihoods=info.head_log_likelihoods,
    )
    params = optax.apply_updates(state.params, updates)
    return State(params, batch_stats, opt_state), loss

  return step


def init(model, optimizer):
  import jax
  import jax.numpy as jnp

  @jax.jit
  def start():
    images = jnp.zeros((1, 8, 8, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    # Linen's parameters are float32 whatever the input.
    variables = jax.tree.map(lambda x: x.astype(images.dtype), variables)
    params = variables["params"]
    return State(params, variables["batch_stats"], optimizer.init(params))

  return jax.tree.map(jax.device_get, start())


def train(mesh_name, optimizer_name, folder=None, kill_at=0, steps=NUM_STEPS):
  """Trains on one mesh; returns losses, state, HLO and whether the state stayed."""
  import jax

  from benchmarks.training import Checkpoints
  from benchmarks.workloads import devices

  size, _, split = mesh_name.partition(":")
  rows, heads = map(int, size.split("x"))
  model, optimizer = make_model(), make_optimizer(optimizer_name)
  mesh = devices.make_mesh(rows, heads)
  state = init(model, optimizer)
  shardings = devices.state_shardings(mesh, optimizer, state)
  state = devices.place(state, shardings)
  compiled = None
  step = jax.jit(devices.pin(make_step(model, optimizer), shardings), donate_argnums=0)
  losses, done = [], 0
  checkpoints = None if folder is None else Checkpoints(folder)
  if (
    checkpoints is not None
    and (found := checkpoints.restore(lambda _: state)) is not None
  ):
    state, notes = found
    losses, done = notes["losses"], len(notes["losses"])
  share = devices.host_share(mesh)
  everything = jax.NamedSharding(mesh, jax.P(("data", "heads")))
  part = BATCH // share.count
  for i in range(done, steps):
    mine = slice(share.index * part, (share.index + 1) * part)
    host_batch = {name: leaf[mine] for name, leaf in make_batch(i).items()}
    batch = devices.make_global_batch(mesh, host_batch)
    if split == "all":
      batch = jax.device_put(batch, everything)
    compiled = compiled or step.lower(state, batch).compile()
    state, loss = compiled(state, batch)
    losses.append(float(loss))
    if checkpoints is not None:
      checkpoints.save(i + 1, state, {"losses": losses})
    if kill_at == i + 1:
      os.kill(os.getpid(), signal.SIGKILL)
  stays = jax.tree.map(
    lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim),
    state,
    shardings,
  )
  text = compiled.as_text() if compiled is not None else ""
  return losses, devices.fetch(state), text, all(jax.tree.leaves(stays))


def parse():
  parser = argparse.ArgumentParser()
  parser.add_argument("out", type=Path)
  parser.add_argument("optimizer")
  parser.add_argument("meshes", nargs="+")
  parser.add_argument("--checkpoints", type=Path)
  parser.add_argument("--kill-at", type=int, default=0)
  parser.add_argument("--port", type=int)
  parser.add_argument("--num-hosts", type=int, default=1)
  parser.add_argument("--host", type=int, default=0)
  return parser.parse_args()


def main():
  args = parse()
  count = NUM_DEVICES // args.num_hosts
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax
  import numpy as np

  jax.config.update("jax_enable_x64", True)
  from benchmarks.workloads.devices import initialize_hosts, watch_hosts

  if args.num_hosts > 1:
    coordinator = f"localhost:{args.port}"
    initialize_hosts(coordinator, args.num_hosts, args.host, HEARTBEAT_SECONDS)
  found = {}
  for mesh in args.meshes:
    with watch_hosts():
      results = train(mesh, args.optimizer, args.checkpoints, args.kill_at)
    losses, state, found[f"{mesh}/hlo"], found[f"{mesh}/stays"] = results
    found[f"{mesh}/losses"] = losses
    for path, leaf in jax.tree.leaves_with_path(state):
      found[f"{mesh}/state{jax.tree_util.keystr(path)}"] = leaf
  if jax.process_index() == 0:
    np.savez(args.out, **found)


if __name__ == "__main__":
  main()
