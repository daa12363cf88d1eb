"""What the guard is worth: a small CNN without normalisation, with wide intervals.

*Finite*: after the last step all parameters and the held-out loss are. *Learns*: it is
finite, and the held-out accuracy is above chance by more than half of what the best
rate of plain SGD reaches above it in as many steps.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

import alrao_jax
from benchmarks.competitors import Competitor
from benchmarks.data import Split, Splits
from benchmarks.images import ImageData, ImageProgram
from benchmarks.models import build_model
from benchmarks.optimizers import SGD_RATES
from benchmarks.overhead_cases import Case, Contender
from benchmarks.planning import OptionError
from benchmarks.progress import Display
from benchmarks.records import write_text
from benchmarks.results import RunRecords
from benchmarks.studies import optimizers, pictures
from benchmarks.studies.arms import (
  Arm,
  Images,
  Trainer,
  final_accuracy,
  share,
  threshold,
)
from benchmarks.studies.programs import Watched
from benchmarks.studies.study import Study

NETWORK: dict[str, Any] = {"network": "small_cnn", "norm": "none"}
MIN_RATE = 1e-5
# Of the runs whose steps are timed: a head that diverged would cost a step more.
CALM = (1e-5, 1e-3)
STEPS_A_TURN = 10


@dataclasses.dataclass(frozen=True)
class Guard(Study):
  """The share of runs that end finite, and that learn, with and without the guard."""

  images: Annotated[Images, tyro.conf.arg(name="")] = Images(num_train=9_600, epochs=1)
  seeds: int = 3
  """Number of runs of each rate of SGD."""
  runs: int = 30
  """Number of runs of each interval, with the guard and without."""
  intervals: tuple[float, ...] = (10.0, 1e3)
  """Upper ends of the intervals; the lower end is 1e-5."""
  limit: float = alrao_jax.guard().limit
  """The guard's limit."""
  slowdown: float = alrao_jax.guard().slowdown
  """The guard's slowdown."""
  width: float = 0.5
  """Factor on the network's 16, 32 and 64 channels."""
  rounds: int = 100
  """Number of turns of ten steps in which steps with and without it are timed."""
  out: Path = Path("out/studies/guard")
  """Folder for records, numbers and picture."""

  @property
  def spread(self) -> str:
    """How many runs there are, and how they are summed up."""
    return f"{self.seeds} seeds of each rate of SGD."

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers.

    Raises:
      OptionError: No runs, or settings that make no guard.
    """
    if self.runs < 1 or self.rounds < 1:
      raise OptionError("--runs and --rounds must be at least 1.")
    if not all(MIN_RATE < high < math.inf for high in self.intervals):
      raise OptionError(f"--intervals must be above {MIN_RATE:g}.")
    try:
      guard = alrao_jax.guard(self.limit, self.slowdown)
    except ValueError as error:
      raise OptionError(f"--limit, --slowdown: {error}") from error
    size = {**NETWORK, "width": self.width}
    sgd: dict[float, list[float]] = {}
    runs: dict[tuple[float, bool], list[RunRecords]] = {}
    with Display() as display:
      trainer = Trainer("guard", self.images, self.out, display)
      for rate in SGD_RATES:
        arm = Arm(f"sgd-{rate:g}", optimizers.SGD, "sgd", rate, **size)
        found = trainer.run([arm], range(self.seeds))
        sgd[rate] = [final_accuracy(run) for run in found]
      for on in (False, True):
        name = f"guard-{self.limit:g}-{self.slowdown:g}" if on else "none"
        optimizer = optimizers.guarded(guard if on else None)
        for high in self.intervals:
          arm = Arm(
            f"alrao-{high:g}-{name}",
            optimizer,
            name,
            (MIN_RATE, high),
            **size,
            program=Watched,
          )
          runs[high, on] = trainer.run([arm], range(self.runs))
    rate, least = threshold(sgd)
    _draw(runs, least, self.out / "guard.png")
    return [*_table(runs, rate, least), "", self._cost(guard)]

  def _cost(self, guard: alrao_jax.Guard) -> str:
    """Times steps with the guard and without, if that was not done before."""
    path = self.out / "cost.json"
    wanted = [*guard, self.rounds]
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("settings") != wanted:
      seconds = time_steps((None, guard), self.rounds)
      found = {"settings": wanted, "seconds": seconds.tolist()}
      write_text(path, json.dumps(found) + "\n")
    plain, guarded = np.array(found["seconds"]).T
    low, middle, high = np.percentile(guarded / plain, [25, 50, 75])
    return (
      "Time of a step with the guard over that without, in turns, small CNN of width 1 "
      f"without normalisation, batch 32: median {middle:.3f}, quartiles {low:.3f} to "
      f"{high:.3f} ({1e3 * np.median(plain):.2f} ms without)."
    )


class _Network(NamedTuple):
  """The network whose steps are timed, for `benchmarks.competitors`.

  Attributes:
    guard: What guards it, if anything.
  """

  guard: alrao_jax.Guard | None

  @property
  def title(self) -> str:
    """What it is."""
    return "small_cnn without normalisation"

  def program(self, contender: Contender) -> ImageProgram:
    """Returns its program, on one batch of noise.

    Args:
      contender: Alrao, with a number of heads.
    """
    generator = np.random.default_rng(0)
    noise = Split(
      generator.integers(0, 256, (32, 32, 32, 3), dtype=np.uint8),
      generator.integers(0, 10, 32).astype(np.int32),
    )
    return ImageProgram(
      build_model("small_cnn", num_heads=contender.num_heads, norm="none"),
      optimizers.guarded(self.guard)._replace(
        make=lambda setting: alrao_jax.alrao(setting.key, None, *CALM, guard=self.guard)
      ),
      ImageData(Splits(noise, noise, noise)),
      batch_size=32,
      max_epochs=1,
      flip=False,
      augmented=False,
    )


def time_steps(guards: tuple[alrao_jax.Guard | None, ...], rounds: int) -> np.ndarray:
  """Times steps of the same network with several guards, in turns.

  Args:
    guards: The guards; None for none.
    rounds: Number of turns that each has.

  Returns:
    Seconds a step, (rounds, number of guards).
  """
  contender = Contender("Alrao", "alrao", 10)
  competitors = [Competitor(Case(_Network(guard), ()), contender) for guard in guards]
  generator = np.random.default_rng(0)
  seconds = np.zeros((rounds, len(guards)))
  for turn in range(rounds):
    for i in generator.permutation(len(guards)):
      seconds[turn, i] = competitors[i].run(STEPS_A_TURN) / STEPS_A_TURN
  return seconds


def _is_finite(run: RunRecords) -> bool:
  last = run.epochs[-1]
  return last["validation_parameters_finite"] == 1 and math.isfinite(
    math.nan if last["validation_loss"] is None else last["validation_loss"]
  )


def _table(
  runs: dict[tuple[float, bool], list[RunRecords]], rate: float, least: float
) -> list[str]:
  lines = [
    f"Best SGD: rate {rate:g}; to learn is to be above {100 * least:.1f} % held-out "
    "accuracy. Shares with exact (Clopper-Pearson) 95 % intervals; median accuracy; "
    "mean share of units that the guard stopped at least once.",
    "",
    "| interval | guard | end finite | learn | accuracy, % | units stopped, % |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for high, on in sorted(runs):
    found = runs[high, on]
    finite = [_is_finite(run) for run in found]
    accuracies = [final_accuracy(run) for run in found]
    learned = [ok and a > least for ok, a in zip(finite, accuracies, strict=True)]
    stopped = np.mean([run.epochs[-1]["validation_units_guarded"] for run in found])
    lines.append(
      f"| [1e-5, {high:g}] | {'yes' if on else 'no'} | {share(finite)} | "
      f"{share(learned)} | {100 * np.median(accuracies):.1f} | "
      f"{f'{100 * stopped:.0f}' if on else ''} |"
    )
  return lines


def _draw(
  runs: dict[tuple[float, bool], list[RunRecords]], least: float, path: Path
) -> None:
  """Every run's accuracy, those that did not end finite as crosses."""
  figure, (axis,) = pictures.subplots(1, 6.0)
  generator = np.random.default_rng(0)
  order = sorted(runs)
  for place, (high, on) in enumerate(order):
    for finite, marker in ((True, "o"), (False, "x")):
      accuracies = [
        100 * final_accuracy(run) for run in runs[high, on] if _is_finite(run) == finite
      ]
      offsets = generator.uniform(-0.2, 0.2, len(accuracies))
      axis.scatter(
        place + offsets,
        accuracies,
        s=16,
        color=f"C{int(on)}",
        marker=marker,
        alpha=0.7,
      )
  axis.axhline(100 * least, color="0.5", linestyle="--", linewidth=1)
  axis.set(
    xticks=range(len(order)),
    xticklabels=[
      f"[$10^{{-5}}$, {high:g}]\n{'with' if on else 'without'} guard"
      for high, on in order
    ],
    xlim=(-0.5, len(order) - 0.5),
    ylabel="held-out accuracy, %",
    title="each run (crosses: not finite; dashed: above it, a run learns)",
  )
  pictures.save(figure, path)
