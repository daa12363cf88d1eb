"""What a training step costs each device, predicted without compiling it.

    python -m benchmarks.scaling check    # against XLA's counts, on small networks
    python -m benchmarks.scaling table    # ResNet50 on ImageNet, on 1 to 64 devices

On a mesh of DATA x HEADS devices, each runs the program that a single device would run
for its part of the batch and its heads. So a step is traced for those, its operations
are counted one by one, and what the devices then add up is counted from the shapes.
"""

import dataclasses
import datetime
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh, AxisType

from benchmarks import commands, costs, devices, records
from benchmarks.classifying import ClassifierProgram, State
from benchmarks.models import build_model
from benchmarks.optimizers import OPTIMIZERS, Setting
from benchmarks.planning import OptionError

PAGE = Path("docs/scaling.md")
CHECKED, TABLE = "checked", "table"  # parts of the page, between marks
POINTER = 8  # XLA returns a table of where its results lie


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
    optimizer: Its name in `benchmarks.optimizers`.
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
class Cost:
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


class StepProgram(ClassifierProgram):
  """The step of the image benchmarks, on the images that a batch holds."""

  def _read(self, data, batch, *, train):
    del data, train
    return self._normalize(batch["images"]), batch["labels"]


def make_step(setup: Setup) -> tuple[Any, Any, State, Any]:
  """Returns a step, its optimizer, and the shapes of its state and of its batch.

  Args:
    setup: The step; its mesh does not matter.
  """
  model = build_model(setup.network, setup.classes, setup.heads, setup.width)
  recipe = OPTIMIZERS[setup.optimizer]
  shape = (setup.side, setup.side, 3)
  program = StepProgram(
    model,
    recipe,
    num_train=setup.batch,
    image_shape=shape,
    mean=np.zeros(3),
    std=np.ones(3),
    batch_size=setup.batch,
    max_epochs=100,
  )
  optimizer = recipe.make(Setting(jax.random.key(0), None, 100, True))
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

  def step(state, batch):
    return program.step.step(state, (), {**batch, "key": key})

  return step, optimizer, state, batch


def predict(setup: Setup) -> Cost:
  """Predicts what a step costs each device.

  Args:
    setup: The step.

  Raises:
    OptionError: The mesh does not divide the batch or the heads.
  """
  rows, columns = setup.mesh
  if setup.batch % rows:
    raise OptionError(f"--mesh-data must divide the batch, {setup.batch}, got {rows}.")
  axes = (devices.DATA, devices.HEADS)
  mesh: Any = AbstractMesh(setup.mesh, axes, (AxisType.Auto,) * 2)
  _, optimizer, state, batch = make_step(setup)
  shardings = devices.state_shardings(mesh, optimizer, state)
  held = costs.size(jax.tree.map(_part, state, shardings))
  seen = costs.size(jax.tree.map(lambda x: _rows(x, rows), batch))
  # Each device's own part is the step of a smaller batch and fewer heads.
  local = dataclasses.replace(
    setup, batch=setup.batch // rows, heads=setup.heads // columns
  )
  step, _, *local_inputs = make_step(local)
  jaxpr = jax.make_jaxpr(step)(*local_inputs).jaxpr
  # Of what a head's pullback returns only a half is kept.
  jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
  reported = 4 * (1 + setup.heads)  # the loss, and the weights of all heads
  gradients = costs.size(jax.tree.map(_part, state.params, shardings.params))
  # Of each mean: forth, its sum and that of squares; back, one more than gradients are.
  sums = gradients + costs.size(state.batch_stats) * 3 // 2
  width = state.params["output"]["alrao_heads"]["kernel"].shape[1]
  features = 4 * local.batch * width
  sent = (sums if rows > 1 else 0) + (features if columns > 1 else 0)
  return Cost(
    operations=costs.count(jaxpr, costs.operations) + sent / 4,  # to add it up
    traffic=costs.count(jaxpr, costs.traffic) + 2 * held,
    arguments=held + seen,
    outputs=held + reported + POINTER * (len(jax.tree.leaves(state)) + 2),
    temporaries=costs.temporaries(jaxpr),
    sent=sent,
  )


def _part(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)


def _rows(leaf: Any, rows: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((leaf.shape[0] // rows, *leaf.shape[1:]), leaf.dtype)


def measure(setup: Setup) -> Cost:
  """Compiles a step, and returns what XLA says that it costs each device.

  Args:
    setup: The step; this process has the devices of its mesh.
  """
  step, optimizer, state, batch = make_step(setup)
  mesh = devices.make_mesh(*setup.mesh)
  shardings = devices.state_shardings(mesh, optimizer, state)
  split = jax.tree.map(lambda _: devices.batch_sharding(mesh), batch)
  pinned = devices.pin(step, shardings)
  jitted = jax.jit(
    pinned, in_shardings=(shardings, split), donate_argnums=0, keep_unused=True
  )
  compiled = jitted.lower(state, batch).compile()
  counted: Any = compiled.cost_analysis()
  memory: Any = compiled.memory_analysis()
  return Cost(
    operations=counted["flops"],
    traffic=counted["bytes accessed"],
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    sent=costs.sent(compiled.as_text() or ""),
  )


@dataclasses.dataclass(frozen=True)
class Check:
  """Compile small steps on simulated devices, and compare with XLA's counts."""

  page: Path = PAGE
  """The page; what stands outside of its marks is kept."""

  def __call__(self) -> None:
    """Prints and writes the comparison."""
    jax.config.update("jax_num_cpu_devices", 8)
    rows = [["network", "width", "pixels", "classes", "heads", "batch", "mesh"]]
    rows[0] += ["optimizer", "operations", "arguments", "outputs", "temporaries"]
    rows[0] += ["traffic", "sent"]
    for setup in SETUPS:
      found, predicted = measure(setup), predict(setup)
      ratios = [
        f"{getattr(predicted, name) / max(getattr(found, name), 1):.3f}"
        for name in ("operations", "temporaries", "traffic", "sent")
      ]
      exact = [
        f"{getattr(predicted, name):,} / {getattr(found, name):,}"
        for name in ("arguments", "outputs")
      ]
      if setup.mesh == (1, 1):
        ratios[-1] = ""  # nothing is sent
      row = [*map(str, dataclasses.astuple(setup)[:6]), "x".join(map(str, setup.mesh))]
      rows.append([*row, setup.optimizer, ratios[0], *exact, *ratios[1:]])
      print(rows[-1], flush=True)
    _write(self.page, CHECKED, rows)


@dataclasses.dataclass(frozen=True)
class Table:
  """Predict the cost of ResNet50 on ImageNet, on 1 to 64 devices."""

  widths: tuple[float, ...] = (1.0, 3.0)
  """Factors on its channels."""
  batch: int = 256
  """Images in a step, of all devices together."""
  page: Path = PAGE
  """The page; what stands outside of its marks is kept."""

  def __call__(self) -> None:
    """Prints and writes the table."""
    rows = [["width", "devices", "mesh", "images", "heads", "GFLOP", "traffic, GB"]]
    rows[0] += ["state and batch, GB", "temporaries, GB", "sent, MB"]
    for width in self.widths:
      for power in range(7):
        for columns in (1, 2):
          if columns <= 2**power:
            mesh = (2**power // columns, columns)
            rows.append(self._row(width, mesh))
            print(rows[-1], flush=True)
    _write(self.page, TABLE, rows)

  def _row(self, width: float, mesh: tuple[int, int]) -> list[str]:
    cost = predict(Setup("resnet50", width, 224, 1000, 10, self.batch, mesh))
    counts = (math.prod(mesh), f"{mesh[0]}x{mesh[1]}", self.batch // mesh[0])
    return [
      f"{width:g}",
      *map(str, (*counts, 10 // mesh[1])),
      f"{cost.operations / 1e9:.0f}",
      f"{cost.traffic / 1e9:.1f}",
      f"{cost.arguments / 1e9:.3f}",
      f"{cost.temporaries / 1e9:.2f}",
      f"{cost.sent / 1e6:.0f}",
    ]


def _write(page: Path, part: str, rows: list[list[str]]) -> None:
  """Puts a table between a page's marks, in place of the one there."""
  environment = records.environment()
  versions = ", ".join(f"{name} {environment[name]}" for name in ("jax", "flax"))
  lines = ["| " + " | ".join(row) + " |" for row in rows]
  lines.insert(1, "|" + " --- |" * len(rows[0]))
  table = "\n".join([*lines, "", f"{versions}; {datetime.date.today().isoformat()}."])
  start, end = f"<!-- {part}: start -->", f"<!-- {part}: end -->"
  before, mark, rest = page.read_text(encoding="utf-8").partition(start)
  _, closing, after = rest.partition(end)
  if not (mark and closing):
    raise records.RecordError(f"{page} must have the marks {start} and {end}.")
  records.write_text(page, f"{before}{start}\n\n{table}\n\n{end}{after}")


if __name__ == "__main__":
  commands.main(Check | Table, __doc__)
