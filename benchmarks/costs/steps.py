"""What a step of Alrao costs, and its compilation, beside plain SGD's.

    python -m benchmarks cost steps --cases mlp small_cnn

Every contender trains the same network on the same batch. Contenders take turns, round
by round, in an order drawn anew, so that whatever else the machine does meets them all;
what is reported is the median over the rounds of a contender's time over SGD's.
Compilation is timed in such turns, too; reported are the median of its seconds and that
of their ratio to SGD's in the same turn. Beside them stands the floor, the larger of
the ratios of arithmetic operations and of bytes in memory that XLA counts in the
compiled programs.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from benchmarks import records
from benchmarks.costs._contenders import (
  AGAIN,
  PEERS,
  SGD,
  Competitor,
  Contender,
  ImageNetwork,
  Network,
  ShortNetwork,
  TextNetwork,
  alrao,
  bare,
  collapsed,
  with_heads,
)
from benchmarks.costs._cost import Cost, check_known, check_positive, render
from benchmarks.records import Record
from benchmarks.timing import in_turns
from benchmarks.workloads.short import ARENA_TASKS


class Case(NamedTuple):
  """A network and what trains it.

  Attributes:
    network: The network, and its batch.
    contenders: What trains it, beside SGD.
    steps: Number of steps in a contender's turn.
  """

  network: Network
  contenders: tuple[Contender, ...]
  steps: int = 1


_COLLAPSED = collapsed(10)
_ALRAO = (*alrao(10), _COLLAPSED)
_RECIPE = Contender("schedule-free Alrao, 10 heads", "schedule_free_alrao", 10)
_MLP = ImageNetwork("mlp", 1.0, 128, 28, 1, norm="none")
_RESNET50 = ImageNetwork("resnet50", 1.0, 64, 224, num_classes=1000)

CASES = {
  "mlp": Case(
    _MLP,
    (*alrao(1, 2, 5, 10, 20, 50), bare(10), bare(50), _COLLAPSED, *PEERS),
    steps=20,
  ),
  "small_cnn": Case(ImageNetwork("small_cnn"), _ALRAO + PEERS, steps=10),
  "googlenet_narrow": Case(ImageNetwork("googlenet", 1 / 8), _ALRAO + PEERS),
  "mobilenet_v2_narrow": Case(ImageNetwork("mobilenet_v2", 1 / 8), _ALRAO + PEERS),
  "vgg19_narrow": Case(ImageNetwork("vgg19", 1 / 4), _ALRAO + PEERS),
  "resnet50_narrow": Case(
    _RESNET50._replace(width=1 / 4, batch_size=32, side=64), _ALRAO + PEERS
  ),
  "lstm": Case(TextNetwork("lstm", 70), _ALRAO + PEERS),
  "decoder": Case(TextNetwork("decoder", 128), _ALRAO + PEERS),
  "googlenet": Case(ImageNetwork("googlenet"), _ALRAO),
  "mobilenet_v2": Case(ImageNetwork("mobilenet_v2"), _ALRAO),
  "vgg19": Case(ImageNetwork("vgg19"), _ALRAO),
  # All of the arena: what Alrao's own parts cost beside peers with the same heads.
  **{
    f"arena_{name}": Case(
      ShortNetwork(name),
      (*with_heads(10), *alrao(10), _RECIPE, *PEERS),
      steps=5 if task.has_convolutions else 20,
    )
    for name, task in ARENA_TASKS.items()
  },
  # For accelerators.
  "resnet50": Case(_RESNET50, _ALRAO),
  "resnet50_bfloat16": Case(_RESNET50._replace(dtype=jnp.bfloat16), _ALRAO),
  "googlenet_bfloat16": Case(ImageNetwork("googlenet", dtype=jnp.bfloat16), _ALRAO),
  "mobilenet_v2_bfloat16": Case(
    ImageNetwork("mobilenet_v2", dtype=jnp.bfloat16), _ALRAO
  ),
  "vgg19_bfloat16": Case(ImageNetwork("vgg19", dtype=jnp.bfloat16), _ALRAO),
  "lstm_words": Case(TextNetwork("lstm", 70, 10_000, "words", chunks=20), _ALRAO),
}


@dataclasses.dataclass(frozen=True)
class Steps(Cost):
  """Time steps and compilations of Alrao beside those of SGD."""

  name = "steps"
  cases: tuple[str, ...] = ("mlp", "small_cnn")
  """Which networks; see CASES in benchmarks/costs/steps.py."""
  rounds: int = 50
  """Number of turns that each contender has."""
  compilations: int = 5
  """How often each contender's step is compiled, in turns as well. The first turn may
  pay for what a process does only once: a median needs three."""

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: An unknown network, or a number that is not positive.
    """
    check_known("cases", self.cases, CASES)
    check_positive(rounds=self.rounds, compilations=self.compilations)

  def measure(self) -> Iterator[tuple[str, Record]]:
    """Yields each network's measurements."""
    # A program read from the cache would not have been compiled in the time it took.
    jax.config.update("jax_enable_compilation_cache", False)
    console = rich.console.Console()
    for name in self.cases:
      case = CASES[name]
      rows = compare(case, self.rounds, self.compilations, console)
      yield (
        name,
        {
          "title": case.network.title,
          "rounds": self.rounds,
          "steps": case.steps,
          "compilations": self.compilations,
          "rows": rows,
        },
      )


def compare(
  case: Case, rounds: int, compilations: int, console: rich.console.Console
) -> list[Record]:
  """Measures all contenders on a network.

  Args:
    case: The network.
    rounds: Number of turns that each contender has.
    compilations: How often each is compiled, in turns as well.
    console: Where progress is shown.

  Returns:
    A row for each contender, SGD first.
  """
  contenders = (SGD, AGAIN, *case.contenders)
  Competitor(case.network, SGD).compile()  # most of what a process does only once
  competitors = [Competitor(case.network, contender) for contender in contenders]

  def track(turns: int, what: str) -> Iterable[int]:
    title = f"{case.network.title}: {what}"
    return rich.progress.track(range(turns), title, console=console)

  compile_seconds = in_turns(
    [competitor.compile for competitor in competitors], track(compilations, "compiling")
  )
  costs = [competitor.costs() for competitor in competitors]
  for competitor in competitors:
    competitor.run(1)
  step_seconds = in_turns(
    [competitor.timer(case.steps) for competitor in competitors],
    track(rounds, "training"),
  )
  ratios = step_seconds / step_seconds[:, :1]
  compile_ratios = compile_seconds / compile_seconds[:, :1]
  base = costs[0]
  rows = []
  for j, (contender, cost) in enumerate(zip(contenders, costs, strict=True)):
    # What further heads hold beside SGD's: both with a gradient of the same size.
    parameters = cost["parameter_bytes"] - base["parameter_bytes"]
    num_heads = contender.num_heads and (contender.keep or contender.num_heads)
    outputs = case.network.output_bytes(num_heads) - case.network.output_bytes(None)
    outputs = max(0, outputs)  # in chunks they may be fewer
    rows.append(
      {
        **contender._asdict(),
        "ratio": float(np.median(ratios[:, j])),
        "ratio_quartiles": np.quantile(ratios[:, j], [0.25, 0.75]).tolist(),
        "milliseconds": 1e3 * float(np.median(step_seconds[:, j])),
        "floor": max(cost[name] / base[name] for name in ("flops", "bytes")),
        "peak_ratio": cost["peak_bytes"] / (base["peak_bytes"] + 2 * parameters),
        "peak_ratio_with_outputs": cost["peak_bytes"]
        / (base["peak_bytes"] + 2 * (parameters + outputs)),
        "compile_seconds": float(np.median(compile_seconds[:, j])),
        "compile_ratio": float(np.median(compile_ratios[:, j])),
        "trace_seconds": float(np.median(competitors[j].trace_seconds)),
        **cost,
      }
    )
  return rows


def table(found: Record) -> str:
  """Returns a network's measurements as a Markdown table with its conditions.

  Args:
    found: The record.
  """
  header = [
    "contender",
    "time / SGD's",
    "quartiles",
    "floor",
    "time / floor",
    "ms a step",
    "rates / parameters",
    "peak memory / (SGD's + 2 x more parameters)",
    "peak memory / (SGD's + 2 x more parameters and outputs)",
    "compile, s",
    "compile / SGD's",
    "of it tracing, s",
  ]
  rows = []
  for row in found["rows"]:
    low, high = row["ratio_quartiles"]
    rates = row["rates_bytes"] / row["parameter_bytes"]
    rows.append(
      [
        row["label"],
        f"{row['ratio']:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{row['floor']:.3f}",
        f"{row['ratio'] / row['floor']:.3f}",
        f"{row['milliseconds']:.2f}",
        f"{rates:.4f}" if rates else "",
        f"{row['peak_ratio']:.3f}",
        f"{row['peak_ratio_with_outputs']:.3f}",
        f"{row['compile_seconds']:.1f}",
        f"{row['compile_ratio']:.2f}",
        f"{row['trace_seconds']:.2f}" if "trace_seconds" in row else "",
      ]
    )
  conditions = f"{found['compilations']} compilations; {records.conditions(found)}"
  return render(found["title"], header, rows, conditions)


COST = Steps
