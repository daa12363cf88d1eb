"""One workload for one device, many devices and many hosts, on JAX's own engine.

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
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import alrao_jax
from benchmarks.console import OptionError, OutputError
from benchmarks.data import DataError
from benchmarks.records import RecordError
from benchmarks.training import CheckpointError

PyTree = Any

DATA, HEADS = "data", "heads"
PER_EXAMPLE = {"images", "indices", "labels"}  # arrays of a batch
EXIT_LOST = 3
# What a person can mend, and is told in one line.
REFUSALS = (CheckpointError, DataError, OptionError, OutputError, RecordError)
LOST = re.compile("UNAVAILABLE|heartbeat|connection|gloo|barrier", re.IGNORECASE)


class Share(NamedTuple):
  """Which part of every batch a host loads.

  Attributes:
    index: From 0 to ``count - 1``; the same for hosts among which heads are split.
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


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns how a batch's arrays, examples on axis 0, lie on a mesh.

  Over the data axis alone: devices of one row, each with other heads, see the same.

  Args:
    mesh: From `make_mesh`.
  """
  return NamedSharding(mesh, PartitionSpec(DATA))


def host_share(mesh: Mesh) -> Share:
  """Returns which part of every batch this host loads.

  Args:
    mesh: From `make_mesh`.

  Raises:
    OptionError: Two hosts would share some rows of the mesh, and not others.
  """
  rows: dict[int, set[int]] = {}
  places = batch_sharding(mesh).devices_indices_map((mesh.size,))
  for device, (part,) in places.items():
    rows.setdefault(device.process_index, set()).add(part.start or 0)
  parts = sorted({tuple(sorted(held)) for held in rows.values()})
  if sum(map(len, parts)) != len(set().union(*parts)):
    raise OptionError(
      "--mesh-heads must divide each host's number of devices, or be a multiple of it, "
      f"got {mesh.shape[HEADS]} on {len(rows)} hosts, one of which straddles rows."
    )
  mine = tuple(sorted(rows[jax.process_index()]))
  return Share(parts.index(mine), len(parts))


def make_global_batch(mesh: Mesh, host_batch: PyTree) -> PyTree:
  """Makes the arrays of a batch from the part of it that this host has loaded.

  Args:
    mesh: From `make_mesh`.
    host_batch: Numpy arrays, examples on axis 0: the host's `host_share` of the batch.

  Returns:
    Arrays of the whole batch, of which each device holds its part.

  Raises:
    OptionError: The batch can't be split evenly.
  """
  sharding, count = batch_sharding(mesh), host_share(mesh).count
  parts = mesh.shape[DATA]
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


def input_shardings(mesh: Mesh, inputs: PyTree) -> PyTree:
  """Returns where the data and a batch lie that a step reads.

  Split over the data axis are streams of text, and what a batch has for each example.
  The rest is on every device: data sets of images, keys, and numbers of segments.

  Args:
    mesh: From `make_mesh`.
    inputs: Data and batch of a workload of images or text; arrays or shapes.
  """
  data, batch = inputs
  is_text, split = "segment" in batch, batch_sharding(mesh)
  each = {name: split if name in PER_EXAMPLE else _everywhere(mesh) for name in batch}
  return jax.tree.map(lambda _: split if is_text else _everywhere(mesh), data), each


def state_shardings(mesh: Mesh, optimizer: Any, state: Any) -> Any:
  """Returns where the arrays of a training state lie.

  Args:
    mesh: From `make_mesh`.
    optimizer: The optax optimizer whose state it is.
    state: A NamedTuple with the fields ``params`` and ``opt_state``, and with
      ``batch_stats`` or ``carry``, such as the state of a workload of images or text;
      arrays or shapes.

  Returns:
    The same NamedTuple, of shardings.

  Raises:
    OptionError: The heads can't be split over the mesh's axis, or there are none.
  """
  found = jax.tree.map(lambda _: _everywhere(mesh), state)
  if hasattr(state, "carry"):  # of each stream of text
    carry = jax.tree.map(lambda _: batch_sharding(mesh), state.carry)
    found = found._replace(carry=carry)
  if mesh.shape[HEADS] == 1:  # nor need there be any heads
    return found
  try:
    opt_state, params = alrao_jax.head_shardings(optimizer, state.params, mesh, HEADS)
  except ValueError as error:
    raise OptionError(f"--mesh-heads: {error}") from error
  if hasattr(state, "batch_stats"):
    batch_stats = alrao_jax.tree_head_shardings(state.batch_stats, mesh, HEADS)
    found = found._replace(batch_stats=batch_stats)
  return found._replace(params=params, opt_state=opt_state)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
  """Puts arrays, the same on every host, where they shall lie.

  Args:
    tree: Arrays.
    shardings: A tree like it.
  """

  def put(leaf, sharding):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return jax.device_put(leaf, sharding)
    # By `device_put`, hosts would gather the values, and compare them: NaN fails.
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda i: whole[i])

  return jax.tree.map(put, tree, shardings)


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
    is_split = isinstance(leaf, jax.Array) and not leaf.is_fully_replicated
    if is_split and not leaf.is_fully_addressable:
      return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)

  return jax.tree.map(whole, tree)


def initialize_hosts(
  coordinator: str, num_hosts: int, host: int, heartbeat_seconds: int = 100
) -> None:
  """Joins the hosts of one run; called before anything asks JAX for a device.

  A step needs all of them: where one is lost, the others end, as `watch_hosts` says or,
  if they hear nothing, by JAX itself, whose message names the lost one. The same
  command on all hosts (run: with --resume) then goes on after the last checkpoint.

  Args:
    coordinator: Address and port of host 0, such as ``"10.0.0.1:8476"``.
    num_hosts: Number of hosts.
    host: Which this one is, from 0.
    heartbeat_seconds: How long a host may be silent before it counts as lost.

  Raises:
    OptionError: No port, numbers out of range, or the hosts did not meet.
  """
  if not re.fullmatch(r".+:\d{1,5}", coordinator):
    raise OptionError(
      "--coordinator must be an address and a port, such as 10.0.0.1:8476, got "
      f"{coordinator}."
    )
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
  """Ends the process at once, and says why, when one of several hosts can't go on.

  The exit code is 3 where another host seems lost, else as on a single host, where this
  does nothing: 2 for options and data, 130 for an interrupt, 1 for all else.
  """
  try:
    yield
  except BaseException as error:
    if jax.process_count() == 1:
      raise
    code, text = _explain(error)
    sys.stdout.flush()
    print(f"error: host {jax.process_index()} {text}", file=sys.stderr, flush=True)
    os._exit(code)  # an orderly end would wait for the other hosts


def _explain(error: BaseException) -> tuple[int, str]:
  """The exit code for what ends a host, and what to say."""
  if isinstance(error, REFUSALS):
    return 2, f"can't go on: {error}"
  again = "the same command on all hosts (run: with --resume) goes on from there"
  whole = f"The last checkpoint is whole: {again}."
  if isinstance(error, KeyboardInterrupt):
    return 130, f"was interrupted. {whole}"
  if isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(str(error)):
    reason = f"another host is lost ({str(error).partition(chr(10))[0]})"
    return EXIT_LOST, f"can't go on, most likely because {reason}. {whole}"
  described = "".join(traceback.format_exception(error))
  return 1, f"can't go on, by an error of its own:\n{described}{whole}"


def _everywhere(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())
