"""Optimizers that train one network step by step, in turns, and what each costs."""

import time
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import rich.console
import rich.progress

import alrao_jax
from benchmarks.data.dataset import Split, Splits
from benchmarks.images import ImageData, ImageProgram
from benchmarks.models import build_model
from benchmarks.optimizers import OPTIMIZERS

Row = dict[str, Any]

RATE = 1e-3  # SGD's; small, so that no network diverges on its one batch of noise


class Contender(NamedTuple):
  """One optimizer on one network.

  Attributes:
    label: Its name.
    optimizer: Its optimizer, of `benchmarks.optimizers`.
    num_heads: Number of heads; None for an ordinary output layer.
  """

  label: str
  optimizer: str
  num_heads: int | None = None


SGD = Contender("SGD", "sgd")
AGAIN = Contender("SGD again", "sgd")  # how far two equal programs come out apart
PEERS = (
  Contender("Adam", "adam"),
  Contender("Prodigy", "prodigy"),
  Contender("schedule-free AdamW", "schedule_free_adamw"),
)


def alrao(*num_heads: int) -> tuple[Contender, ...]:
  """Returns Alrao with several numbers of heads.

  Args:
    *num_heads: The numbers.
  """
  return tuple(
    Contender(f"Alrao, {n} head{'s' * (n > 1)}", "alrao", n) for n in num_heads
  )


class Case(NamedTuple):
  """A network at one size.

  Attributes:
    network: Its name in `benchmarks.models`.
    width: Factor on its channels.
    contenders: What trains it, beside SGD.
    batch_size: Number of images in a step.
    side: Side of the images.
    channels: Channels of the images.
    norm: Its normalisation.
    steps: Number of steps in a contender's turn.
  """

  network: str
  width: float
  contenders: tuple[Contender, ...]
  batch_size: int = 32
  side: int = 32
  channels: int = 3
  norm: Any = "batch"
  steps: int = 1


CASES = {
  "mlp": Case(
    "mlp", 1.0, alrao(1, 2, 5, 10, 20, 50) + PEERS, 128, 28, 1, "none", steps=20
  ),
  "small_cnn": Case("small_cnn", 1.0, alrao(10) + PEERS, steps=10),
  "googlenet_narrow": Case("googlenet", 1 / 8, alrao(10) + PEERS),
  "mobilenet_v2_narrow": Case("mobilenet_v2", 1 / 8, alrao(10) + PEERS),
  "vgg19_narrow": Case("vgg19", 1 / 4, alrao(10) + PEERS),
  "googlenet": Case("googlenet", 1.0, alrao(10)),
  "mobilenet_v2": Case("mobilenet_v2", 1.0, alrao(10)),
  "vgg19": Case("vgg19", 1.0, alrao(10)),
}


def make_program(case: Case, contender: Contender) -> ImageProgram:
  """Returns the program of the CIFAR-10 benchmark, on one batch of random images.

  Args:
    case: The network.
    contender: The optimizer.
  """
  generator = np.random.default_rng(0)
  shape = (case.batch_size, case.side, case.side, case.channels)
  batch = Split(
    generator.integers(0, 256, shape, dtype=np.uint8),
    generator.integers(0, 10, case.batch_size).astype(np.int32),
  )
  return ImageProgram(
    build_model(
      case.network, num_heads=contender.num_heads, width=case.width, norm=case.norm
    ),
    OPTIMIZERS[contender.optimizer],
    ImageData(Splits(batch, batch, batch)),
    batch_size=case.batch_size,
    max_epochs=1000,
    flip=False,
    augmented=False,
  )


class Competitor:
  """A contender's compiled step, its state, and what XLA says of its cost."""

  def __init__(self, case: Case, contender: Contender):
    """Compiles the step and runs it once.

    Args:
      case: The network.
      contender: The optimizer.
    """
    program = make_program(case, contender)
    state = program.init(0, RATE if contender.optimizer == "sgd" else None)
    batch = jax.tree.map(lambda leaf: leaf[0], program.batches(0, 1))
    start = time.perf_counter()
    # Not the loop's own step, which counts its traces.
    lowered = jax.jit(program.step.step, donate_argnums=0).lower(
      state, program.data, batch
    )
    self._step = lowered.compile()
    self.costs = {
      "compile_seconds": time.perf_counter() - start,
      "parameter_bytes": 4.0 * program.num_parameters,
      "rates_bytes": _rates_bytes(state.opt_state),
      **_xla_costs(self._step),
      **_usual_costs(program.step.step, state, program.data, batch),
    }
    self._state, self._rest = state, (program.data, batch)
    self.run(1)

  def run(self, steps: int) -> float:
    """Trains; returns the seconds it took.

    Args:
      steps: Number of steps.
    """
    start = time.perf_counter()
    for _ in range(steps):
      self._state, _ = self._step(self._state, *self._rest)
    jax.block_until_ready(self._state)
    return time.perf_counter() - start


def measure(case: Case, rounds: int, console: rich.console.Console) -> list[Row]:
  """Measures all contenders on a network.

  Args:
    case: The network.
    rounds: Number of turns that each contender has.
    console: Where progress is shown.

  Returns:
    A row for each contender, SGD first.
  """
  contenders = (SGD, AGAIN, *case.contenders)
  Competitor(case, SGD)  # whatever a process does only once
  competitors = []
  for contender in contenders:
    competitors.append(Competitor(case, contender))
    seconds = competitors[-1].costs["compile_seconds"]
    console.print(f"{case.network}: {contender.label} compiled in {seconds:.1f} s")
  generator = np.random.default_rng(0)
  times = np.zeros((rounds, len(contenders)))
  for i in rich.progress.track(range(rounds), case.network, console=console):
    for j in generator.permutation(len(contenders)):
      times[i, j] = competitors[j].run(case.steps) / case.steps
  ratios = times / times[:, :1]
  base = competitors[0].costs
  rows = []
  for j, (contender, competitor) in enumerate(
    zip(contenders, competitors, strict=True)
  ):
    costs = competitor.costs
    heads = costs["parameter_bytes"] - base["parameter_bytes"]
    rows.append(
      {
        **contender._asdict(),
        "ratio": float(np.median(ratios[:, j])),
        "ratio_quartiles": np.quantile(ratios[:, j], [0.25, 0.75]).tolist(),
        "milliseconds": 1e3 * float(np.median(times[:, j])),
        "floor": max(costs[name] / base[name] for name in ("flops", "bytes")),
        "peak_ratio": costs["peak_bytes"] / (base["peak_bytes"] + 2 * heads),
        "compile_ratio": costs["compile_seconds"] / base["compile_seconds"],
        **costs,
      }
    )
  return rows


def _usual_costs(step: Any, *args: Any) -> dict[str, float]:
  """Operations and bytes of a step in which no head diverges.

  XLA counts both branches of a condition. The rule that MultiHead's gradient follows
  has one that runs only where a head is no longer finite; it is left out here.
  """
  with mock.patch.object(jax.lax, "cond", lambda _, usual, other, *args: usual(*args)):
    # Another function, or JAX would find the program it traced before.
    costs: Any = jax.jit(lambda *args: step(*args)).lower(*args).compile()
  found = costs.cost_analysis()
  return {"flops": float(found["flops"]), "bytes": float(found["bytes accessed"])}


def _xla_costs(compiled: Any) -> dict[str, float]:
  memory = compiled.memory_analysis()
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return {
    "peak_bytes": float(kept - memory.alias_size_in_bytes + memory.temp_size_in_bytes),
  }


def _rates_bytes(opt_state: Any) -> float:
  """Bytes of Alrao's rates, 0 without."""
  leaves = jax.tree.leaves(opt_state, is_leaf=_has_rates)
  return float(sum(leaf.quantiles.nbytes for leaf in leaves if _has_rates(leaf)))


def _has_rates(node: Any) -> bool:
  return isinstance(node, alrao_jax.ScaleByUnitRatesState)
