"""What the guard is worth: a small CNN without normalisation, with wide intervals.

*Finite*: after the last step all parameters and the held-out loss are. *Learns*: it is
finite, and the held-out accuracy is above chance by more than half of what the best
rate of plain SGD reaches above it in as many steps.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from scipy.stats import quantile_test

import alrao_jax
from benchmarks import pictures
from benchmarks.console import OptionError, refuse
from benchmarks.data import Split, Splits
from benchmarks.methods import ALRAO, SGD, SGD_RATES, guarded
from benchmarks.models import build_model
from benchmarks.records import Run
from benchmarks.studies._study import (
  Arm,
  ImageRunner,
  Images,
  Source,
  Study,
  final_accuracy,
  share,
  threshold,
)
from benchmarks.tables import markdown
from benchmarks.timing import in_turns
from benchmarks.workloads.images import ImageData, ImageWorkload, Snapshot, State

NETWORK: dict[str, Any] = {"network": "small_cnn", "norm": "none"}
MIN_RATE = 1e-5
MIN_ROUNDS = 6  # fewer have no 95 % interval of their median
# Bounds of the rates of the steps that are timed: a head that diverged would cost more.
CALM = (1e-5, 1e-3)
STEPS_A_TURN = 10


class WatchedSnapshot(NamedTuple):
  """What predictions need, and what the guard has done.

  Attributes:
    predictions: The former.
    units_guarded: Share of the units that it stopped at least once.
    guard_trips: How often it stopped any.
  """

  predictions: Snapshot
  units_guarded: Any
  guard_trips: Any


class WatchedWorkload(ImageWorkload):
  """Tells beside the loss whether parameters are finite, and what a guard does."""

  def snapshot(self, state: State, seed: int, epoch: int) -> WatchedSnapshot:
    """Returns what predictions need, and what the guard has done.

    Args:
      state: The state after `epoch`.
      seed: Seed of the run.
      epoch: Number of the epoch; 0 before training.
    """
    scalars = alrao_jax.scalars(state.opt_state)
    return WatchedSnapshot(
      super().snapshot(state, seed, epoch),
      scalars.get("alrao/units_guarded", np.zeros([], np.float32)),
      scalars.get("alrao/guard_trips", np.zeros([], np.int32)),
    )

  def evaluate(self, snapshot: WatchedSnapshot, part: str) -> dict[str, float]:
    """Returns ``loss``, ``accuracy``, ``parameters_finite`` (0 or 1) and the guard's.

    Args:
      snapshot: What `snapshot` returned.
      part: As of `ImageWorkload`.
    """
    leaves = jax.device_get(jax.tree.leaves(snapshot.predictions.params))
    return {
      **super().evaluate(snapshot.predictions, part),
      "parameters_finite": float(all(np.isfinite(leaf).all() for leaf in leaves)),
      "units_guarded": float(snapshot.units_guarded),
      "guard_trips": float(snapshot.guard_trips),
    }


class GuardRuns(NamedTuple):
  """What table and picture show.

  Attributes:
    runs: By upper end of the interval, and whether there is a guard.
    rate: SGD's best rate.
    least: The accuracy above which a run has learned.
    seconds: Of a step without the guard, without it again, and with it, (rounds, 3).
  """

  runs: dict[tuple[float, bool], list[Run]]
  rate: float
  least: float
  seconds: np.ndarray


@dataclasses.dataclass(frozen=True)
class GuardStudy(Study[GuardRuns]):
  """The share of runs that end finite, and that learn, with and without the guard."""

  name = "guard"
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
  """Number of turns of ten steps in which steps with and without it are timed; at
  least 6."""
  out: Path = Path("out/studies/guard")
  """Folder for records, numbers and picture."""

  @property
  def spread(self) -> str:
    """How many runs there are, and how they are summed up."""
    return f"{self.seeds} seeds of each rate of SGD."

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: No runs, or settings that make no guard.
    """
    super().check()
    if self.runs < 1:
      refuse("runs", "must be at least 1", self.runs)
    if self.rounds < MIN_ROUNDS:
      refuse("rounds", f"must be at least {MIN_ROUNDS}", self.rounds)
    if not all(MIN_RATE < high < math.inf for high in self.intervals):
      refuse("intervals", f"must be finite, above {MIN_RATE:g}", self.intervals)
    try:
      alrao_jax.guard(self.limit, self.slowdown)
    except ValueError as error:
      raise OptionError(f"--limit, --slowdown: {error}") from error

  def find(self, source: Source) -> GuardRuns:
    """Returns the runs, and times of steps.

    Args:
      source: Where all runs and times come from.
    """
    runner = ImageRunner(source, self.images)
    size = {**NETWORK, "width": self.width}
    sgd: dict[float, list[float]] = {}
    for rate in SGD_RATES:
      arm = Arm(f"sgd-{rate:g}", SGD, "sgd", rate, **size)
      sgd[rate] = [final_accuracy(run) for run in runner.run([arm], range(self.seeds))]
    guard = alrao_jax.guard(self.limit, self.slowdown)
    runs: dict[tuple[float, bool], list[Run]] = {}
    for on in (False, True):
      name = f"guard-{self.limit:g}-{self.slowdown:g}" if on else "none"
      method = guarded(guard if on else None)
      for high in self.intervals:
        arm = Arm(
          f"alrao-{high:g}-{name}",
          method,
          name,
          (MIN_RATE, high),
          **size,
          workload=WatchedWorkload,
        )
        runs[high, on] = runner.run([arm], range(self.runs))
    settings = {
      "limit": self.limit,
      "slowdown": self.slowdown,
      "rounds": self.rounds,
      "steps": STEPS_A_TURN,
    }
    # Twice without: how far two equal programs come out apart.
    guards = (None, None, guard)
    seconds = source.cost(settings, lambda: time_steps(guards, self.rounds).tolist())
    return GuardRuns(runs, *threshold(sgd), np.array(seconds))

  def table(self, found: GuardRuns) -> list[str]:
    """Returns shares of runs, and what a step costs.

    Args:
      found: The runs and times.
    """
    rows = []
    for high, on in sorted(found.runs):
      runs = found.runs[high, on]
      finite = [is_finite(run) for run in runs]
      accuracies = [final_accuracy(run) for run in runs]
      learned = [
        ok and accuracy > found.least
        for ok, accuracy in zip(finite, accuracies, strict=True)
      ]
      stopped = np.mean([run.epochs[-1]["validation_units_guarded"] for run in runs])
      rows.append(
        [
          f"[1e-5, {high:g}]",
          "yes" if on else "no",
          share(finite),
          share(learned),
          f"{100 * np.median(accuracies):.1f}",
          f"{100 * stopped:.0f}" if on else "",
        ]
      )
    header = ["interval", "guard", "end finite", "learn", "accuracy, %"]
    return [
      f"Best SGD: rate {found.rate:g}; to learn is to be above "
      f"{100 * found.least:.1f} % held-out accuracy. Shares with exact "
      "(Clopper-Pearson) 95 % intervals; median accuracy; mean share of units that the "
      "guard stopped at least once.",
      "",
      *markdown([*header, "units stopped, %"], rows),
      "",
      describe_cost(found.seconds),
    ]

  def draw(self, found: GuardRuns, path: Path) -> None:
    """Draws every run's accuracy, those that did not end finite as crosses.

    Args:
      found: The runs.
      path: The PNG file.
    """
    figure, (axis,) = pictures.subplots(1, 6.0)
    generator = np.random.default_rng(0)
    order = sorted(found.runs)
    for place, (high, on) in enumerate(order):
      for finite, marker in ((True, "o"), (False, "x")):
        accuracies = [
          100 * final_accuracy(run)
          for run in found.runs[high, on]
          if is_finite(run) == finite
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
    axis.axhline(100 * found.least, color="0.5", linestyle="--", linewidth=1)
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


def is_finite(run: Run) -> bool:
  """Returns whether parameters and held-out loss are finite in the end.

  Args:
    run: The run.
  """
  parameters = run.epochs[-1]["validation_parameters_finite"]
  return parameters == 1 and math.isfinite(run.curve("validation_loss")[-1])


def describe_cost(seconds: np.ndarray) -> str:
  """Returns what a step costs, with intervals, as a sentence.

  Args:
    seconds: Of a step without the guard, without it again, and with it, (rounds, 3).
  """
  plain, again, with_guard = seconds.T
  return (
    "Time of a step over that of one without the guard, in turns, small CNN of width "
    f"1 without normalisation, batch 32 ({1e3 * np.median(plain):.2f} ms); median, "
    "with the 95 % interval that its order statistics give: with the guard "
    f"{_median(with_guard / plain)}; a second program without, for control, "
    f"{_median(again / plain)}."
  )


def _median(values: np.ndarray) -> str:
  found = quantile_test(values, p=0.5).confidence_interval()
  return f"{np.median(values):.3f} ({found.low:.3f} to {found.high:.3f})"


def time_steps(guards: Sequence[alrao_jax.Guard | None], rounds: int) -> np.ndarray:
  """Times steps of the same network with several guards, in turns.

  Args:
    guards: The guards; None for none. Two equal ones tell what the machine adds.
    rounds: Number of turns that each has.

  Returns:
    Seconds a step, (rounds, number of guards).
  """
  return in_turns([_timer(guard) for guard in guards], rounds) / STEPS_A_TURN


def _timer(guard: alrao_jax.Guard | None) -> Callable[[], float]:
  """Returns a function that trains on noise for a turn, and returns the seconds."""
  generator = np.random.default_rng(0)
  noise = Split(
    generator.integers(0, 256, (32, 32, 32, 3), dtype=np.uint8),
    generator.integers(0, 10, 32).astype(np.int32),
  )
  method = ALRAO._replace(
    make=lambda setting: alrao_jax.alrao(setting.key, None, *CALM, guard=guard)
  )
  workload = ImageWorkload(
    build_model("small_cnn", num_heads=method.num_heads, norm="none"),
    method,
    ImageData(Splits(noise, noise, noise)),
    batch_size=32,
    max_epochs=1,
    flip=False,
    augmented=False,
  )
  state = workload.init(0, None)
  batch = jax.tree.map(lambda leaf: leaf[0], workload.batches(0, 1))
  step = jax.jit(workload.step.step, donate_argnums=0)

  def train() -> float:
    nonlocal state
    start = time.perf_counter()
    for _ in range(STEPS_A_TURN):
      state, _ = step(state, workload.data, batch)
    jax.block_until_ready(state)
    return time.perf_counter() - start

  train()  # compiles
  return train


STUDY = GuardStudy
