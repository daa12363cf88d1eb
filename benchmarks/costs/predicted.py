"""What a step costs each device of a mesh, predicted without compiling it.

    python -m benchmarks cost predicted check  # against XLA's counts, on small networks
    python -m benchmarks cost predicted table  # ResNet50 on ImageNet, 1 to 64 devices

On a mesh of DATA x HEADS devices, each runs the program that a single device would run
for its part of the batch and its heads. So a step is traced for those, its operations
are counted one by one, and what the devices then add up is counted from the shapes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh, AxisType

from benchmarks import records
from benchmarks.console import OptionError
from benchmarks.costs._contenders import StreamedNoise
from benchmarks.costs._cost import Cost, check_positive, render
from benchmarks.costs._hlo import count_taps
from benchmarks.methods import METHODS, Setting
from benchmarks.models import build_model
from benchmarks.records import Record
from benchmarks.workloads import devices
from benchmarks.workloads.images import State

POINTER = 8  # XLA returns a table of where its results lie

HEAVY = {"conv_general_dilated", "dot_general", "reduce_sum", "reduce_max"}
# What XLA counts as one operation an entry; exponentials and roots it counts apart.
ARITHMETIC = {"add", "add_any", "sub", "mul", "div", "max", "min", "neg", "abs", "sign"}
ARITHMETIC |= {"select_n", "integer_pow", "square", "eq", "ne", "lt", "le", "gt", "ge"}
ARITHMETIC |= {"and", "or", "not", "xor", "is_finite"}


@dataclasses.dataclass(frozen=True)
class Setup:
  """A training step, and the mesh that it runs on.

  Attributes:
    network: Its name in `benchmarks.models`.
    width: Factor on its channels.
    side: Side of the images.
    classes: Number of classes.
    heads: Number of heads.
    batch: Number of images in a step, of all devices together.
    mesh: Sizes of the axes data and heads, which divide `batch` and `heads`.
    optimizer: Name of its method, of `benchmarks.methods`.
  """

  network: str
  width: float
  side: int
  classes: int
  heads: int
  batch: int
  mesh: tuple[int, int] = (1, 1)
  optimizer: str = "alrao"


@dataclasses.dataclass(frozen=True)
class StepCost:
  """What a step costs one device; sizes in bytes.

  Attributes:
    operations: Additions, multiplications and the like; a multiply-add is two.
    traffic: Read and written by matrix products, convolutions and reductions, and by
      the optimizer; all else is taken to run along with these.
    arguments: State and batch.
    outputs: The next state, which takes the place of this one, and what is reported.
    temporaries: What is kept from the way forward for the way back, at its largest.
    sent: Sums that the device takes part in: gradients over data, batch statistics, and
      what the heads send back to the features.
  """

  operations: float
  traffic: float
  arguments: int
  outputs: int
  temporaries: float
  sent: int


SETUPS = (
  Setup("small_cnn", 1, 32, 10, 10, 16),
  Setup("small_cnn", 2, 32, 100, 8, 32, (4, 2)),
  Setup("small_cnn", 1, 32, 1000, 8, 16, (1, 8), "alrao_adam"),
  Setup("vgg19", 1 / 8, 32, 10, 10, 16),
  Setup("vgg19", 1 / 8, 32, 100, 8, 32, (2, 4), "alrao_momentum"),
  Setup("resnet50", 1 / 8, 64, 1000, 10, 8),
  Setup("resnet50", 1 / 4, 64, 100, 8, 32, (8, 1)),
)


class Shapes(NamedTuple):
  """A step, and the shapes of what it takes.

  Attributes:
    step: Function of state, data and batch, to the next state and what is reported.
    optimizer: Its optimizer.
    state: What training changes.
    data: What steps only read.
    batch: A batch.
    examples: How many features the output layer gets.
  """

  step: Callable[[Any, Any, Any], tuple[Any, Any]]
  optimizer: Any
  state: Any
  data: Any
  batch: Any
  examples: int


def make_step(setup: Setup) -> Shapes:
  """Returns a step of the image benchmarks, and the shapes of what it takes.

  Args:
    setup: The step; its mesh does not matter.
  """
  model = build_model(setup.network, setup.classes, setup.heads, setup.width)
  method = METHODS[setup.optimizer]
  shape = (setup.side, setup.side, 3)
  workload = StreamedNoise(model, method, shape, setup.batch)
  optimizer = method.make(Setting(jax.random.key(0), None, 100, True))
  image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  init = functools.partial(model.init, train=False)
  variables = jax.eval_shape(init, jax.random.key(0), image)
  params = variables["params"]
  opt_state = jax.eval_shape(optimizer.init, params)
  state = State(params, variables.get("batch_stats", {}), opt_state)
  batch = {
    "images": jax.ShapeDtypeStruct((setup.batch, *shape), jnp.uint8),
    "labels": jax.ShapeDtypeStruct((setup.batch,), jnp.int32),
  }
  key = np.zeros(2, np.uint32)  # for dropout, the same on every device

  def step(state, data, batch):
    return workload.step.step(state, data, {**batch, "key": key})

  return Shapes(step, optimizer, state, (), batch, setup.batch)


def predict(setup: Setup) -> StepCost:
  """Predicts what a step costs each device.

  Args:
    setup: The step.

  Raises:
    OptionError: The mesh does not divide the batch or the heads.
  """
  rows, columns = setup.mesh
  if setup.batch % rows:
    raise OptionError(f"--mesh-data must divide the batch, {setup.batch}, got {rows}.")
  # Each device's own part is the step of a smaller batch and fewer heads.
  local = dataclasses.replace(
    setup, batch=setup.batch // rows, heads=setup.heads // columns
  )
  return predict_step(make_step(setup), lambda: make_step(local), setup.mesh)


def predict_step(
  whole: Shapes,
  local: Callable[[], Shapes],
  mesh_shape: tuple[int, int],
  on_chip: float = 0.0,
) -> StepCost:
  """Predicts what a step costs each device of a mesh.

  Args:
    whole: The step on all devices together.
    local: Returns a device's own part: the step of a smaller batch and fewer heads.
    mesh_shape: Sizes of the axes data and heads.
    on_chip: Bytes of fast memory that a program can plan with. A step whose temporaries
      fit reads state and batch from the main memory once, and writes the next state.
      (Where the state does not fit beside them, it is read more often.)

  Raises:
    OptionError: The mesh does not divide the heads.
  """
  rows, columns = mesh_shape
  axes = (devices.DATA, devices.HEADS)
  mesh: Any = AbstractMesh(mesh_shape, axes, (AxisType.Auto,) * 2)
  state, inputs = whole.state, (whole.data, whole.batch)
  shardings = devices.state_shardings(mesh, whole.optimizer, state)
  held = size(jax.tree.map(_part, state, shardings))
  seen = size(jax.tree.map(_part, inputs, devices.input_shardings(mesh, inputs)))
  part = local()
  jaxpr = jax.make_jaxpr(part.step)(part.state, part.data, part.batch).jaxpr
  # Of what a head's pullback returns only a half is kept.
  jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
  _, outputs = jax.eval_shape(whole.step, state, *inputs)
  reported = size(outputs)  # the loss, and the weights of all heads
  gradients = size(jax.tree.map(_part, state.params, shardings.params))
  # Of each mean: forth, its sum and that of squares; back, one more than gradients are.
  statistics = getattr(state, "batch_stats", {})
  sums = gradients + size(statistics) * 3 // 2
  sent = sums if rows > 1 else 0
  if columns > 1:
    width = state.params["output"]["alrao_heads"]["kernel"].shape[1]
    sent += 4 * part.examples * width
  kept = temporaries(jaxpr)
  fits = kept <= on_chip
  return StepCost(
    operations=count(jaxpr, operations) + sent / 4,  # to add it up
    traffic=2 * held + (seen if fits else count(jaxpr, traffic)),
    arguments=held + seen,
    outputs=held + reported + POINTER * (len(jax.tree.leaves(state)) + 2),
    temporaries=kept,
    sent=sent,
  )


def _part(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)


def count_compiled(setup: Setup) -> StepCost:
  """Compiles a step, and returns what XLA says that it costs each device.

  Args:
    setup: The step; this process has the devices of its mesh.
  """
  shapes = make_step(setup)
  mesh = devices.make_mesh(*setup.mesh)
  shardings = devices.state_shardings(mesh, shapes.optimizer, shapes.state)
  inputs = (shapes.data, shapes.batch)
  pinned = devices.pin(shapes.step, shardings)
  jitted = jax.jit(
    pinned,
    in_shardings=(shardings, *devices.input_shardings(mesh, inputs)),
    donate_argnums=0,
    keep_unused=True,
  )
  compiled = jitted.lower(shapes.state, *inputs).compile()
  counted: Any = compiled.cost_analysis()
  memory: Any = compiled.memory_analysis()
  return StepCost(
    operations=counted["flops"],
    traffic=counted["bytes accessed"],
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    sent=count_sent(compiled.as_text() or ""),
  )


@dataclasses.dataclass(frozen=True)
class PredictedCheck(Cost):
  """Compile small steps, and set XLA's counts beside what is predicted."""

  name = "predicted"

  def measure(self) -> Iterator[tuple[str, Record]]:
    """Yields both costs of every step that this process has the devices for."""
    jax.config.update("jax_num_cpu_devices", 8)  # as many as SETUPS need
    rows = []
    found = [one for one in SETUPS if math.prod(one.mesh) <= len(jax.devices())]
    for setup in found:
      both = {
        "predicted": dataclasses.asdict(predict(setup)),
        "counted": dataclasses.asdict(count_compiled(setup)),
      }
      rows.append({**dataclasses.asdict(setup), **both})
      print(setup, flush=True)
    yield "check", {"rows": rows}


@dataclasses.dataclass(frozen=True)
class PredictedTable(Cost):
  """Predict the cost of ResNet50 on ImageNet, on 1 to 64 devices."""

  name = "predicted"
  widths: tuple[float, ...] = (1.0, 3.0)
  """Factors on its channels."""
  batch: int = 256
  """Images in a step, of all devices together."""

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: A batch without images.
    """
    check_positive(batch=self.batch)

  def measure(self) -> Iterator[tuple[str, Record]]:
    """Yields the costs on all meshes."""
    rows = []
    for width in self.widths:
      for power in range(7):
        for columns in (1, 2):
          if columns <= 2**power:
            mesh = (2**power // columns, columns)
            setup = Setup("resnet50", width, 224, 1000, 10, self.batch, mesh)
            cost = dataclasses.asdict(predict(setup))
            rows.append({**dataclasses.asdict(setup), "predicted": cost})
            print(setup, flush=True)
    yield "resnet50", {"rows": rows}


def table(found: Record) -> str:
  """Returns the costs as a Markdown table, with what they were predicted by.

  Args:
    found: The record.
  """
  title, header, row = {
    "check": ("Predicted cost of a step, against XLA's counts", CHECK, check_row),
    "resnet50": ("Predicted cost of ResNet50 on ImageNet", PREDICTION, prediction_row),
  }[found["case"].partition("-")[0]]
  rows = [row(each) for each in found["rows"]]
  return render(title, header, rows, records.conditions(found))


CHECK = ("network", "width", "pixels", "classes", "heads", "batch", "mesh", "optimizer")
CHECK += ("operations", "arguments", "outputs", "temporaries", "traffic", "sent")


def check_row(found: Record) -> list[str]:
  """Returns the cells of a step that was compiled, too.

  Arguments and outputs as predicted / counted; the rest is the ratio of the two.

  Args:
    found: The row of the record.
  """
  predicted, counted = found["predicted"], found["counted"]

  def ratio(name: str) -> str:
    return f"{predicted[name] / max(counted[name], 1):.3f}"

  def both(name: str) -> str:
    return f"{predicted[name]:,} / {counted[name]:,}"

  setup = ("network", "width", "side", "classes", "heads", "batch")
  return [
    *(str(found[name]) for name in setup),
    "x".join(map(str, found["mesh"])),
    found["optimizer"],
    ratio("operations"),
    both("arguments"),
    both("outputs"),
    ratio("temporaries"),
    ratio("traffic"),
    "" if list(found["mesh"]) == [1, 1] else ratio("sent"),  # nothing is sent
  ]


PREDICTION = ("width", "devices", "mesh", "images", "heads", "GFLOP", "traffic, GB")
PREDICTION += ("state and batch, GB", "temporaries, GB", "sent, MB")


def prediction_row(found: Record) -> list[str]:
  """Returns the cells of a step on one mesh.

  Args:
    found: The row of the record.
  """
  cost, (rows, columns) = found["predicted"], found["mesh"]
  return [
    f"{found['width']:g}",
    str(rows * columns),
    f"{rows}x{columns}",
    str(found["batch"] // rows),
    str(found["heads"] // columns),
    f"{cost['operations'] / 1e9:.0f}",
    f"{cost['traffic'] / 1e9:.1f}",
    f"{cost['arguments'] / 1e9:.3f}",
    f"{cost['temporaries'] / 1e9:.2f}",
    f"{cost['sent'] / 1e6:.0f}",
  ]


# --- Counts of a program, as it was traced


def size(tree: Any) -> int:
  """Returns the bytes of a tree's arrays.

  Args:
    tree: Arrays or shapes.
  """
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )


def count(jaxpr: core.Jaxpr, of: Callable[[core.JaxprEqn], float]) -> float:
  """Sums over the operations of a program, and of those within.

  Of a condition the first branch counts: where heads are healthy, the other never runs.

  Args:
    jaxpr: The program.
    of: What to sum, of one operation.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    inner = _within(eqn)
    once = sum(count(each, of) for each in inner) if inner else of(eqn)
    total += once * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
  return total


def temporaries(jaxpr: core.Jaxpr) -> float:
  """Returns the most bytes that a program holds at once beside arguments and results.

  Held are the operands and results of convolutions, matrix products and reductions,
  from where they are made to the last of these that needs them, or what is computed
  from them. All else is taken to be computed on the way.

  Args:
    jaxpr: The program.
  """
  heavy = [_count_heavy(eqn) > 0 for eqn in jaxpr.eqns]
  kept = {
    var
    for eqn, is_heavy in zip(jaxpr.eqns, heavy, strict=True)
    if is_heavy
    for var in (*eqn.invars, *eqn.outvars)
    if isinstance(var, core.Var)
  }
  results = {var for var in jaxpr.outvars if isinstance(var, core.Var)}
  last: dict[core.Var, int] = {}
  for i, eqn in reversed(list(enumerate(jaxpr.eqns))):
    # What is held is made here, all else wherever it is needed.
    made = heavy[i] or any(var in kept or var in results for var in eqn.outvars)
    needed = i if made else max(last.get(var, -1) for var in eqn.outvars)
    for var in eqn.invars:
      if isinstance(var, core.Var):
        last[var] = max(last.get(var, -1), needed)
  changes = np.zeros(len(jaxpr.eqns) + 1)
  for i, eqn in enumerate(jaxpr.eqns):
    for var in eqn.outvars:
      if var in kept and var not in results:
        changes[i] += _bytes(var)
        changes[max(last.get(var, i), i) + 1] -= _bytes(var)
  return float(np.cumsum(changes).max())


def _count_heavy(eqn: core.JaxprEqn) -> float:
  """Returns how many convolutions, products and reductions an operation holds."""
  inner = _within(eqn)
  is_heavy = lambda each: float(each.primitive.name in HEAVY)  # noqa: E731
  return sum(count(each, is_heavy) for each in inner) if inner else is_heavy(eqn)


def operations(eqn: core.JaxprEqn) -> float:
  """Returns the arithmetic of an operation, as XLA counts it.

  Args:
    eqn: The operation.
  """
  name, results = eqn.primitive.name, sum(math.prod(_shape(v)) for v in eqn.outvars)
  if name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(_shape(eqn.invars[0])[axis] for axis in contracted)
    return 2.0 * results * depth
  if name == "conv_general_dilated":
    return 2.0 * _multiplications(eqn)
  if name.startswith(("reduce_", "arg")):
    return float(math.prod(_shape(eqn.invars[0])) - results)
  return float(results) if name in ARITHMETIC else 0.0


def traffic(eqn: core.JaxprEqn) -> float:
  """Returns the bytes that an operation reads and writes.

  None for what is taken to run along with the operations before or after it.

  Args:
    eqn: The operation.
  """
  if eqn.primitive.name not in HEAVY:
    return 0.0
  return float(sum(map(_bytes, (*eqn.invars, *eqn.outvars))))


def count_sent(hlo: str) -> int:
  """Returns the bytes of all that devices add up or gather, outside of conditions.

  Args:
    hlo: A compiled program, as text.
  """
  total = 0
  kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
  for line in hlo.splitlines():
    found = re.search(rf"= (.*?) (?:{kinds})(?:-start)?\(", line)
    if found and "/cond/" not in line:
      for dtype, shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", found[1]):
        bits = re.search(r"\d+", dtype)  # pred has none
        entries = math.prod(int(n) for n in shape.split(",") if n)
        total += entries * (int(bits[0]) // 8 if bits else 1)
  return total


def _within(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
  """The programs that an operation calls."""
  name = eqn.primitive.name
  if name.startswith(("reduce", "scatter", "arg", "sort")):
    return []  # how two entries become one
  # Of `lax.cond`, the branch where the predicate holds.
  found = eqn.params["branches"][-1:] if name == "cond" else None
  found = list(core.jaxprs_in_params(eqn.params)) if found is None else found
  return [getattr(each, "jaxpr", each) for each in found]


def _multiplications(eqn: core.JaxprEqn) -> int:
  """A convolution's, without those by the zeros of padding and of dilation."""
  numbers, params = eqn.params["dimension_numbers"], eqn.params
  images, kernel = map(_shape, eqn.invars)
  result = _shape(eqn.outvars[0])
  positions = 1
  axes = zip(
    numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True
  )
  for i, (axis, kernel_axis, result_axis) in enumerate(axes):
    positions *= count_taps(
      images[axis],
      kernel[kernel_axis],
      result[result_axis],
      stride=params["window_strides"][i],
      before=params["padding"][i][0],
      dilation=params["lhs_dilation"][i],
      kernel_dilation=params["rhs_dilation"][i],
    )
  batch = images[numbers.lhs_spec[0]] // params["batch_group_count"]
  return positions * batch * kernel[numbers.rhs_spec[0]] * kernel[numbers.rhs_spec[1]]


def _shape(var: Any) -> tuple[int, ...]:
  return var.aval.shape


def _bytes(var: Any) -> int:
  return math.prod(var.aval.shape) * var.aval.dtype.itemsize


COST = (
  Annotated[PredictedCheck, tyro.conf.subcommand("check")]
  | Annotated[PredictedTable, tyro.conf.subcommand("table")]
)
