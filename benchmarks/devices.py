"""One program for one device, many devices and many hosts, on JAX's own engine.

The devices form a mesh of two axes. The batch is split over ``data``, and the copies of
the output layer, with all that the optimizer keeps for them, over ``heads``; everything
else stands on every device. A step is written, and compiled, as if for one device: XLA
divides it, and adds what devices must tell each other. Only where arrays lie is said
here:

    mesh = make_mesh(data=4, heads=2)
    shardings = state_shardings(mesh, optimizer, state)
    state = place(state, shardings)
    step = jax.jit(pin(step, shardings), donate_argnums=0)
    state, outputs = step(state, make_global_batch(mesh, host_batch))
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import alrao_jax
from benchmarks.planning import OptionError

PyTree = Any
Split = Literal["data", "all"]

DATA, HEADS = "data", "heads"
EXIT_LOST = 3


class Share(NamedTuple):
  """Which part of every batch a host loads.

  Attributes:
    index: From 0 to ``count - 1``. Hosts whose devices hold the same images, because
      heads are split over hosts, have the same index.
    count: In how many parts, of equal size, a batch is loaded.
  """

  index: int
  count: int


def make_mesh(data: int | None = None, heads: int = 1) -> Mesh:
  """Returns a mesh of all hosts' devices, with axes ``data`` and ``heads``.

  Neighbours share the heads' axis, since they are the best connected.

  Args:
    data: Number of parts of a batch; by default as many as the devices allow.
    heads: Over how many devices the heads are split.

  Raises:
    OptionError: There are not that many devices, or some host's are left out.
  """
  num_devices = jax.device_count()
  rows = num_devices // max(heads, 1) if data is None else data
  used = rows * heads
  exact = data is None or jax.process_count() > 1
  if min(rows, heads) < 1 or used > num_devices or (exact and used < num_devices):
    given = "as many as fit" if data is None else data
    rule = "exactly" if exact else "at most"
    raise OptionError(
      f"--mesh-data times --mesh-heads must be {rule} the number of devices, "
      f"{num_devices}, got {given} times {heads}."
    )
  # With types of axes other than Auto, every operation would have to say where its
  # result lies; so XLA decides, from where the arguments do.
  return jax.make_mesh((rows, heads), (DATA, HEADS), (AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh, split: Split = "data") -> NamedSharding:
  """Returns how a batch's arrays, examples on axis 0, lie on a mesh.

  Args:
    mesh: From `make_mesh`.
    split: ``"data"``: over the data axis alone. Devices that hold different heads, but
      are of one row, see the same images and compute the same features. ``"all"``: over
      both axes. No features are computed twice, and all devices of a row exchange those
      of their images for their heads.
  """
  return NamedSharding(mesh, PartitionSpec(DATA if split == "data" else (DATA, HEADS)))


def host_share(mesh: Mesh, split: Split = "data") -> Share:
  """Returns which part of every batch this host loads.

  Args:
    mesh: From `make_mesh`.
    split: As in `batch_sharding`.
  """
  rows: dict[int, set[int]] = {}
  places = batch_sharding(mesh, split).devices_indices_map((mesh.size,))
  for device, (part,) in places.items():
    rows.setdefault(device.process_index, set()).add(part.start or 0)
  parts = sorted({tuple(sorted(held)) for held in rows.values()})
  mine = tuple(sorted(rows[jax.process_index()]))
  return Share(parts.index(mine), len(parts))


def make_global_batch(mesh: Mesh, host_batch: PyTree, split: Split = "data") -> PyTree:
  """Makes the arrays of a batch from the part of it that this host has loaded.

  Args:
    mesh: From `make_mesh`.
    host_batch: Numpy arrays, examples on axis 0: the host's `host_share` of the batch.
    split: As in `batch_sharding`.

  Returns:
    Arrays of the whole batch, of which each device holds its part.

  Raises:
    OptionError: The batch can't be split evenly.
  """
  sharding = batch_sharding(mesh, split)
  _, count = host_share(mesh, split)
  parts = mesh.shape[DATA] * (mesh.shape[HEADS] if split == "all" else 1)
  for leaf in jax.tree.leaves(host_batch):
    if len(leaf) * count % parts:
      raise OptionError(
        f"--batch-size must be a multiple of {parts}, in so many parts the mesh splits "
        f"it, got {len(leaf) * count}."
      )
  return jax.tree.map(
    lambda leaf: jax.make_array_from_process_local_data(
      sharding, leaf, (len(leaf) * count, *leaf.shape[1:])
    ),
    host_batch,
  )


def state_shardings(mesh: Mesh, optimizer: Any, state: Any) -> Any:
  """Returns where the arrays of a training state lie.

  Args:
    mesh: From `make_mesh`.
    optimizer: The optax optimizer whose state it is.
    state: A NamedTuple with the fields ``params``, ``batch_stats`` and ``opt_state``,
      such as the state of an image program; arrays or shapes.

  Returns:
    The same NamedTuple, of shardings.

  Raises:
    OptionError: The heads can't be split over the mesh's axis, or there are none.
  """
  if mesh.shape[HEADS] == 1:  # nor need there be any heads
    return jax.tree.map(lambda _: _everywhere(mesh), state)
  try:
    params, opt_state = alrao_jax.head_shardings(optimizer, state.params, mesh, HEADS)
  except ValueError as error:
    raise OptionError(f"--mesh-heads: {error}") from error
  batch_stats = alrao_jax.tree_head_shardings(state.batch_stats, mesh, HEADS)
  return state._replace(params=params, batch_stats=batch_stats, opt_state=opt_state)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
  """Puts arrays, the same on every host, where they shall lie.

  Args:
    tree: Arrays.
    shardings: A tree like it.
  """
  return jax.device_put(tree, shardings)


def pin(step: Callable[..., Any], shardings: PyTree) -> Callable[..., Any]:
  """Makes a step leave its state where it lies, and its outputs on every device.

  Left to itself, XLA may return arrays elsewhere: the next step would compile anew, and
  no host could read outputs that are in part on others.

  Args:
    step: Function of the state and more arguments, to the new state and outputs.
    shardings: Of the state.
  """
  everywhere = _everywhere(jax.tree.leaves(shardings)[0].mesh)

  def pinned(state, *args):
    # At both ends, so that it holds within a `lax.scan`, too.
    state = jax.lax.with_sharding_constraint(state, shardings)
    state, outputs = step(state, *args)
    return (
      jax.lax.with_sharding_constraint(state, shardings),
      jax.lax.with_sharding_constraint(outputs, everywhere),
    )

  return pinned


def fetch(tree: PyTree) -> PyTree:
  """Returns a tree as numpy arrays, whole on every host; all hosts must call it.

  Args:
    tree: Arrays, wherever they lie.
  """

  def whole(leaf):
    if isinstance(leaf, jax.Array) and not (
      leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
      return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)

  return jax.tree.map(whole, tree)


def initialize_hosts(
  coordinator: str, num_hosts: int, host: int, heartbeat_seconds: int = 100
) -> None:
  """Joins the hosts of one run; called before anything asks JAX for a device.

  A step needs all of them: where one is lost, the others end, as `watch_hosts` says or,
  if they hear nothing, by JAX itself, whose message names the lost one. The same
  command on all hosts then goes on after the last checkpoint.

  Args:
    coordinator: Address and port of host 0, such as ``"10.0.0.1:8476"``.
    num_hosts: Number of hosts.
    host: Which this one is, from 0.
    heartbeat_seconds: How long a host may be silent before it counts as lost.

  Raises:
    OptionError: The numbers are out of range, or the hosts did not meet.
  """
  if not 0 <= host < num_hosts:
    raise OptionError(f"--host must be from 0 to {num_hosts - 1}, got {host}.")
  if heartbeat_seconds < 1:
    raise OptionError(f"--heartbeat-seconds must be positive, got {heartbeat_seconds}.")
  try:
    jax.distributed.initialize(
      coordinator, num_hosts, host, heartbeat_timeout_seconds=heartbeat_seconds
    )
  except RuntimeError as error:
    raise OptionError(
      f"host {host} of {num_hosts} could not join the run at --coordinator "
      f"{coordinator}: {error}"
    ) from error
  print(
    f"host {host} of {num_hosts}, {jax.local_device_count()} of {jax.device_count()} "
    f"devices; if a host is lost, the others end within about {heartbeat_seconds} s.",
    file=sys.stderr,
  )


@contextlib.contextmanager
def watch_hosts() -> Iterator[None]:
  """Ends the process, with exit code 3 and what to do, when another host is lost.

  Around training. With a single host it does nothing.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    reason = str(error).partition("\n")[0]
    print(
      f"error: host {jax.process_index()} can't go on, most likely because another "
      f"host is lost ({reason}). The last checkpoint is whole: the same command on all "
      "hosts goes on from there.",
      file=sys.stderr,
      flush=True,
    )
    os._exit(EXIT_LOST)  # an orderly end would wait for the other hosts


def _everywhere(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())
