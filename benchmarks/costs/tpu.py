"""What a step costs on TPUs, as XLA compiles it for them; no TPU is needed.

    pip install 'jax[tpu]'                    # has libtpu, which compiles for TPUs
    python -m benchmarks cost tpu
    python -m benchmarks cost tpu --networks mlp --topologies v5e:1x1 v5e:2x4

JAX compiles ahead of time for a topology that is only described. What is compiled is
the loop of the benchmarks itself, around the step of their workload. Nothing runs, so
nothing is timed but the compilation. A program is compiled once: what the folder or the
committed records hold for the same versions is not compiled again.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks import records, tables
from benchmarks.console import OptionError
from benchmarks.costs import _hlo
from benchmarks.costs._contenders import (
  RATE,
  Contender,
  ImageNetwork,
  TextNetwork,
)
from benchmarks.costs._cost import Cost, check_known, check_positive, render
from benchmarks.costs.predicted import Shapes, StepCost, predict_step
from benchmarks.methods import METHODS
from benchmarks.records import Record
from benchmarks.training import Loop
from benchmarks.workloads import devices

# Each at the size of its benchmark, with a batch for one chip.
NETWORKS: dict[str, ImageNetwork | TextNetwork] = {
  # Not augmented, so that what the optimizer adds is not lost in it.
  "mlp": ImageNetwork("mlp", 1.0, 128, 28, 1, norm="none"),
  "lstm_words": TextNetwork("lstm", 70, 10_000, "words", chunks=20),
  "decoder": TextNetwork("decoder", 128),
  "mobilenet_v2": ImageNetwork("mobilenet_v2", batch_size=128, augmented=True),
  "resnet50": ImageNetwork(
    "resnet50", 1.0, 128, 224, 3, 1000, dtype=jnp.bfloat16, streamed=True
  ),
}
COMPARED = ("sgd", "adam", "alrao", "schedule_free_alrao")
# libtpu asks a cloud's server for these, unless it is told.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
# Bytes of a chip's vector memory that XLA plans with on v5e, v5p and v6e.
ON_CHIP = 128 * 2**20
INSTALL = "install it with `pip install 'jax[tpu]'`"


class Target(NamedTuple):
  """What a step is compiled for.

  Attributes:
    topology: Name of the chips and how they are arranged, such as ``"v5e:2x4"``.
    mesh: Sizes of the axes data and heads.
    num_heads: Number of heads, where there are any.
  """

  topology: str
  mesh: tuple[int, int]
  num_heads: int = 10


@dataclasses.dataclass(frozen=True)
class TPU(Cost):
  """Compile steps for TPUs, and count what they cost."""

  name = "tpu"
  networks: tuple[str, ...] = tuple(NETWORKS)
  """Which networks; see NETWORKS in benchmarks/costs/tpu.py."""
  methods: tuple[str, ...] = COMPARED
  """Which optimizers; all are compared with sgd, where it is compiled, too."""
  topologies: tuple[str, ...] = ("v5e:1x1", "v5e:2x4", "v5p:1x1x1", "v6e:1x1")
  """Which chips, and how many along each axis."""
  batch: int | None = None
  """Number of images or streams for each row of chips; None for the network's own."""
  num_heads: int = 10
  """Number of heads."""
  mesh_heads: int = 1
  """Over how many chips the heads are split; the batch is split over the others."""

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: Options that make no measurement, or libtpu is missing.
    """
    check_known("networks", self.networks, NETWORKS)
    check_known("methods", self.methods, METHODS)
    check_positive(num_heads=self.num_heads, mesh_heads=self.mesh_heads)
    if self.batch is not None:
      check_positive(batch=self.batch)
    for topology in self.topologies:
      self._target(topology, len(describe(topology)))

  def measure(self) -> Iterator[tuple[str, Record]]:
    """Yields a network's programs, each time that one more is compiled."""
    # A program read from the cache would not have been compiled in the time it took.
    jax.config.update("jax_enable_compilation_cache", False)
    for name in self.networks:
      network = NETWORKS[name]
      if self.batch is not None:
        network = network._replace(batch_size=self.batch)
      rows = self._known(name)
      yield name, _record(network, rows.values())
      for topology in self.topologies:
        target = self._target(topology, len(describe(topology)))
        for method in self.methods:
          key = key_of(network, target, method)
          if key not in rows:
            rows[key] = compile_row(network, target, method)
            yield name, _record(network, rows.values())

  def _target(self, topology: str, num_chips: int) -> Target:
    if num_chips % self.mesh_heads:
      raise OptionError(
        f"--mesh-heads must divide the {num_chips} chips of {topology}, got "
        f"{self.mesh_heads}."
      )
    mesh = (num_chips // self.mesh_heads, self.mesh_heads)
    return Target(topology, mesh, self.num_heads)

  def _known(self, name: str) -> dict[tuple, Record]:
    """The rows of programs that these versions have compiled before."""
    path = self.out / f"{self.name}-{name}.jsonl"
    places = [records.archive("costs"), *([path] if path.exists() else [])]
    found = [
      row
      for record in records.load_costs(places)
      if (record["table"], record["case"]) == (self.name, name)
      for row in record["rows"]
    ]
    return {tuple(row["key"]): row for row in found if row["versions"] == versions()}


def versions() -> dict[str, str]:
  """Returns the versions that a compiled program depends on.

  Raises:
    OptionError: libtpu is missing.
  """
  try:
    libtpu = importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    raise OptionError(f"cost tpu needs libtpu: {INSTALL}.") from None
  return {"jax": jax.__version__, "libtpu": libtpu}


def describe(topology: str) -> list[Any]:
  """Returns the chips of a topology that is only described.

  Args:
    topology: Such as ``"v5e:2x4"``.

  Raises:
    OptionError: There is no such topology, or libtpu is missing or does not start.
  """
  versions()
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  # With libtpu installed, JAX would look for a TPU.
  jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
  rule = "--topologies must be names and sizes such as v5e:2x4, v6e:1x1 or v5p:2x2x1"
  if not topology:
    raise OptionError(f"{rule}, got an empty one.")
  try:
    return list(topologies.get_topology_desc(topology, "tpu").devices)
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).partition("\n")[0].partition(": ")[2]
    if "INVALID_ARGUMENT" in str(error):
      raise OptionError(f"{rule}, got {topology!r}: {reason}.") from error
    raise OptionError(
      f"libtpu does not start ({reason}): another process may use it; wait for its "
      "end, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1."
    ) from error
  except RuntimeError as error:
    raise OptionError(f"libtpu can't be loaded ({error}): {INSTALL}.") from error


@contextlib.contextmanager
def tracing_for_tpu() -> Iterator[None]:
  """Lets what chooses by JAX's backend choose as on a TPU."""
  with mock.patch.object(jax, "default_backend", lambda: "tpu"):
    yield


def shapes_of(
  network: ImageNetwork | TextNetwork, method: str, num_heads: int
) -> Shapes:
  """Returns the step of a network's benchmark, and the shapes of what it takes.

  Args:
    network: The network.
    method: Name of the optimizer.
    num_heads: Number of heads, where it has any.
  """
  has_heads = METHODS[method].has_heads
  contender = Contender(method, method, num_heads if has_heads else None)
  workload = network.workload(contender)
  rate = RATE if METHODS[method].rates else None
  state = workload.init(0, rate)
  batch = jax.tree.map(lambda leaf: leaf[0], workload.batches(0, 1))
  examples = network.batch_size * getattr(network, "length", 1)
  state, data, batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), (state, workload.data, batch)
  )
  optimizer = workload.make_optimizer(jax.random.key(0), rate)
  return Shapes(workload.step.step, optimizer, state, data, batch, examples)


def trace(
  shapes: Shapes, target: Target, chips: list[Any], *, steps: int | None = None
) -> jax.stages.Traced:
  """Returns the benchmarks' loop around a step, traced for some chips.

  Args:
    shapes: The step on all chips together.
    target: How they divide the work.
    chips: The devices.
    steps: Number of steps of a loop that scans; None for the loop that takes one step.
  """
  axes = (devices.DATA, devices.HEADS)
  mesh = Mesh(np.array(chips).reshape(target.mesh), axes, (AxisType.Auto,) * 2)
  state = devices.state_shardings(mesh, shapes.optimizer, shapes.state)
  data, batch = devices.input_shardings(mesh, (shapes.data, shapes.batch))
  # On one chip this is the loop of all suites, on several that of `run imagenet`.
  step = shapes.step if len(chips) == 1 else devices.pin(shapes.step, state)
  loop = Loop(step, scan=steps is not None)

  def placed(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  def stacked(leaf, sharding):
    spec = jax.sharding.PartitionSpec(None, *sharding.spec)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    shape = (steps, *leaf.shape)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

  place_batch = placed if steps is None else stacked
  return loop.trace(
    jax.tree.map(placed, shapes.state, state),
    jax.tree.map(placed, shapes.data, data),
    jax.tree.map(place_batch, shapes.batch, batch),
  )


def predict_row(
  network: ImageNetwork | TextNetwork, target: Target, method: str
) -> tuple[Shapes, StepCost]:
  """Returns the step on all chips together, and what it is predicted to cost each.

  Args:
    network: The network, with the batch of a row of chips.
    target: The chips.
    method: Name of the optimizer.
  """
  rows, columns = target.mesh
  whole = network._replace(batch_size=network.batch_size * rows)
  shapes = shapes_of(whole, method, target.num_heads)
  local = functools.partial(shapes_of, network, method, target.num_heads // columns)
  return shapes, predict_step(shapes, local, target.mesh, ON_CHIP)


def compile_row(
  network: ImageNetwork | TextNetwork, target: Target, method: str
) -> Record:
  """Compiles a step, and returns what it costs each chip.

  Args:
    network: The network, with the batch of a row of chips.
    target: The chips.
    method: Name of the optimizer.
  """
  chips = describe(target.topology)
  print(f"compiling {network.title}: {method}, {target}", flush=True)
  with tracing_for_tpu():
    shapes, predicted = predict_row(network, target, method)
    jax.clear_caches()
    start = time.perf_counter()
    lowered = trace(shapes, target, chips).lower()
    traced = time.perf_counter()
  compiled = lowered.compile()
  stop = time.perf_counter()
  text, memory = compiled.as_text() or "", compiled.memory_analysis()
  program = _hlo.Program(text)
  counts = program.counts()
  assert memory is not None
  arguments = memory.argument_size_in_bytes
  outputs, temporaries = memory.output_size_in_bytes, memory.temp_size_in_bytes
  logical, stored = program.stored_arguments()
  xla = compiled.cost_analysis() or {}
  return {
    "key": list(key_of(network, target, method)),
    "topology": target.topology,
    "mesh": list(target.mesh),
    "method": method,
    "label": METHODS[method].label,
    "num_heads": target.num_heads if METHODS[method].has_heads else None,
    "batch": network.batch_size,
    "parameter_bytes": sum(
      math.prod(x.shape) * x.dtype.itemsize
      for x in jax.tree.leaves(shapes.state.params)
    ),
    "counted": {
      "operations": counts.operations,
      "traffic": counts.traffic,
      "arguments": logical,
      "stored_arguments": stored,
      "outputs": outputs,
      "temporaries": temporaries,
      "peak": arguments + outputs - memory.alias_size_in_bytes + temporaries,
      "cycles": counts.cycles,
      "kernels": counts.kernels,
      "copied": sum(size for _, size in program.copies()),
      "collectives": {kind: list(each) for kind, each in counts.collectives.items()},
      "sent": sum(size for _, size in counts.collectives.values()),
      "xla_operations": xla.get("flops"),
      "xla_bytes": xla.get("bytes accessed"),
    },
    "predicted": dataclasses.asdict(predicted),
    "trace_seconds": traced - start,
    "compile_seconds": stop - traced,
    "versions": versions(),
    **records.now(),
  }


def key_of(
  network: ImageNetwork | TextNetwork, target: Target, method: str
) -> tuple[Any, ...]:
  """What tells a program of a network from the others."""
  heads = target.num_heads if METHODS[method].has_heads else 0
  return (target.topology, *target.mesh, network.batch_size, method, heads)


def _record(network: ImageNetwork | TextNetwork, rows: Any) -> Record:
  # The others are compared with SGD.
  order = {method: i for i, method in enumerate(dict.fromkeys([*COMPARED, *METHODS]))}
  rows = sorted(rows, key=lambda row: (*row["key"][:4], order[row["method"]]))
  return {"title": network.title, "rows": rows, "environment": versions()}


SUMMARY = ("network", "chips", "mesh", *(METHODS[name].label for name in COMPARED[1:]))


def summary(found: Iterable[Record]) -> list[str]:
  """Returns the lines of a table of all networks, as ratios to SGD's.

  Each cell has operations, traffic with the main memory, peak memory, and the cycles
  that XLA estimates.

  Args:
    found: The records.
  """
  found = sorted(found, key=lambda record: list(NETWORKS).index(record["case"]))
  lines, used = [], []
  for record in found:
    places = dict.fromkeys(tuple(row["key"][:4]) for row in record["rows"])
    for place in places:
      rows = {
        row["method"]: row for row in record["rows"] if tuple(row["key"][:4]) == place
      }
      if "sgd" not in rows:
        continue
      base = rows["sgd"]["counted"]
      cells = []
      for method in COMPARED[1:]:
        counted = rows[method]["counted"] if method in rows else None
        ratios = (
          [f"{counted[name] / base[name]:.2f}" for name in SHOWN] if counted else []
        )
        cells.append(" / ".join(ratios))
      topology, *mesh, _ = place
      lines.append([record["title"], topology, "x".join(map(str, mesh)), *cells])
      used += [_with_versions(row, record) for row in rows.values()]
  return [*tables.markdown(SUMMARY, lines), "", records.conditions_of_all(used)]


def _with_versions(row: Record, record: Record) -> Record:
  return {**row, "environment": row["environment"] | record["environment"]}


SHOWN = ("operations", "traffic", "peak", "cycles")
HEADER = ("chips", "mesh", "batch a row", "optimizer", "operations / SGD's")
HEADER += ("traffic / SGD's", "peak / SGD's", "peak / (SGD's + 2 x more parameters)")
HEADER += ("XLA's cycles / SGD's", "kernels", "collectives", "compile, s", "/ SGD's")
HEADER += ("predicted / counted: operations", "arguments", "traffic", "temporaries")
HEADER += ("sent",)

AGREEMENTS = ("operations", "arguments", "traffic", "temporaries")


def table(found: Record) -> str:
  """Returns a network's programs as a Markdown table with its conditions.

  Args:
    found: The record.
  """
  base = {tuple(row["key"][:4]): row for row in found["rows"] if row["method"] == "sgd"}
  cells = [_cells(row, base.get(tuple(row["key"][:4]))) for row in found["rows"]]
  title = f"{found['title']}, compiled for TPUs"
  made = [_with_versions(row, found) for row in found["rows"]] or [found]
  return render(title, HEADER, cells, records.conditions_of_all(made))


def _cells(row: Record, base: Record | None) -> list[str]:
  counted, predicted = row["counted"], row["predicted"]

  def ratio(name: str) -> str:
    return f"{counted[name] / base['counted'][name]:.3f}" if base else ""

  def agreement(name: str) -> str:
    return f"{predicted[name] / counted[name]:.3f}" if counted[name] else ""

  more = base and 2 * (row["parameter_bytes"] - base["parameter_bytes"])
  peak = base and counted["peak"] / (base["counted"]["peak"] + more)
  compile_ratio = base and row["compile_seconds"] / base["compile_seconds"]
  collectives = [
    f"{count} {kind}, {size / 1e6:,.2f} MB"
    for kind, (count, size) in sorted(counted["collectives"].items())
  ]
  return [
    row["topology"],
    "x".join(map(str, row["mesh"])),
    str(row["batch"]),
    row["label"] + (f", {row['num_heads']} heads" if row["num_heads"] else ""),
    ratio("operations"),
    ratio("traffic"),
    ratio("peak"),
    f"{peak:.3f}" if peak else "",
    ratio("cycles"),
    f"{counted['kernels']:,}",
    "; ".join(collectives),
    f"{row['compile_seconds']:.0f}",
    f"{compile_ratio:.2f}" if compile_ratio else "",
    *(agreement(name) for name in AGREEMENTS),
    agreement("sent") if math.prod(row["mesh"]) > 1 else "",
  ]


COST = TPU
