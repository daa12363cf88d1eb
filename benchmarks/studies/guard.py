"""What the guard is worth: a small CNN without normalisation, with wide intervals.

*Finite*: after the last step all parameters and the held-out loss are. *Learns*: it is
finite, and the held-out accuracy is above chance by more than half of what the best
rate of plain SGD reaches above it in as many steps.
"""

import dataclasses
import datetime
import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from scipy.stats import quantile_test

import alrao_jax
from benchmarks.optimizers import SGD_RATES
from benchmarks.planning import OptionError, refuse
from benchmarks.progress import Display
from benchmarks.records import environment, write_text
from benchmarks.results import RunRecords
from benchmarks.studies import optimizers, pictures
from benchmarks.studies.arms import (
  Images,
  Trainer,
  final_accuracy,
  share,
  threshold,
)
from benchmarks.studies.programs import Watched
from benchmarks.studies.runner import Arm
from benchmarks.studies.study import Study
from benchmarks.studies.timing import STEPS_A_TURN, time_steps

NETWORK: dict[str, Any] = {"network": "small_cnn", "norm": "none"}
MIN_RATE = 1e-5
MIN_ROUNDS = 6  # fewer have no 95 % interval of their median


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
  """Number of turns of ten steps in which steps with and without it are timed; at
  least 6."""
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
    if self.runs < 1:
      refuse("runs", "must be at least 1", self.runs)
    if self.rounds < MIN_ROUNDS:
      refuse("rounds", f"must be at least {MIN_ROUNDS}", self.rounds)
    if not all(MIN_RATE < high < math.inf for high in self.intervals):
      refuse("intervals", f"must be finite, above {MIN_RATE:g}", self.intervals)
    try:
      guard = alrao_jax.guard(self.limit, self.slowdown)
    except ValueError as error:
      raise OptionError(f"--limit, --slowdown: {error}") from error
    size = {**NETWORK, "width": self.width}
    sgd: dict[float, list[float]] = {}
    runs: dict[tuple[float, bool], list[RunRecords]] = {}
    with Display() as display:
      trainer = Trainer("guard", self.images, self.out, display, used=self.used)
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
    wanted = {**guard._asdict(), "rounds": self.rounds, "steps": STEPS_A_TURN}
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("settings") != wanted:
      # Twice without: how far two equal programs come out apart.
      seconds = time_steps((None, None, guard), self.rounds)
      found = {
        "settings": wanted,
        "seconds": seconds.tolist(),
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
      }
      write_text(path, json.dumps(found) + "\n")
    self.used.append(found)
    plain, again, guarded = np.array(found["seconds"]).T
    return (
      "Time of a step over that of one without the guard, in turns, small CNN of width "
      f"1 without normalisation, batch 32 ({1e3 * np.median(plain):.2f} ms); median, "
      "with the 95 % interval that its order statistics give: with the guard "
      f"{_median(guarded / plain)}; a second program without, for control, "
      f"{_median(again / plain)}."
    )


def _median(values: np.ndarray) -> str:
  found = quantile_test(values, p=0.5).confidence_interval()
  return f"{np.median(values):.3f} ({found.low:.3f} to {found.high:.3f})"


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
