"""The long suite: recipes to the end of training, next to tuned methods with schedules.

    python -m benchmarks study long --tasks wine flipped_digits
    python -m benchmarks collect long

Written down before its first run: its tasks (`benchmarks.workloads.long_tasks`) tuned
nothing, and every run is made once. Each choice, of a rate, a decay or an epoch, is
made by held-out data; of the runs that it chooses the test loss is shown, at the end
and at the best epoch. AdamW needs its horizon: it is trained for a quarter, a half and
the whole of a task's steps, at 4 rates x 2 decays on seed 0, and what is best there on
two more seeds. Others with a rate are trained for the whole length, likewise. What has
no horizon is trained once a seed and read at all three. CIFAR-10 has one decay, the
whole length and two seeds. The numbers are geometric means over tasks of test losses
relative to AdamW's on the same seed. A ratio above ten, or of a run that failed, counts
as ten.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.console import Display, refuse, writing_to
from benchmarks.methods import (
  ADAMW_COSINE,
  METHODS,
  MUON_COSINE,
  PRODIGY_COSINE,
  SCHEDULE_FREE_WARM_UP,
  SGD_COSINE,
)
from benchmarks.records import RESULTS
from benchmarks.studies._horizons import (
  HorizonArm,
  HorizonRun,
  HorizonTrainer,
  KnownRuns,
  known_in,
)
from benchmarks.tables import MISSING, markdown
from benchmarks.workloads.long_tasks import TASKS, LongWorkload
from benchmarks.workloads.short import NUM_POINTS

NAME = "long"
HORIZONS = (0.25, 0.5, 1.0)
SEEDS = (0, 1, 2)
CAP = 10.0  # of a ratio
LARGE = "cifar10"  # too long for all settings
ARMS = {
  method.name: HorizonArm(method)
  for method in (
    ADAMW_COSINE,
    SGD_COSINE,
    MUON_COSINE,
    SCHEDULE_FREE_WARM_UP,
    PRODIGY_COSINE,
    METHODS["alrao"],
    METHODS["schedule_free_alrao"],
  )
}
ADAMW = ADAMW_COSINE.name
WITHOUT_HORIZON = {SCHEDULE_FREE_WARM_UP.name, "alrao", "schedule_free_alrao"}


def seeds_of(task: str) -> tuple[int, ...]:
  """Returns the seeds of a task.

  Args:
    task: Its name.
  """
  return SEEDS[:2] if task == LARGE else SEEDS


def horizons_of(task: str, arm: str) -> tuple[float, ...]:
  """Returns for which lengths an arm is trained.

  Args:
    task: Name of the task.
    arm: Name of the arm.
  """
  return HORIZONS if arm == ADAMW and task != LARGE else HORIZONS[-1:]


def settings(task: str, arm: str, horizon: float) -> list[HorizonRun]:
  """Returns the runs on seed 0 of which the best by held-out data is chosen.

  Args:
    task: Name of the task.
    arm: Name of the arm.
    horizon: Share of the task's steps.
  """
  pairs = ARMS[arm].method.rates
  if task == LARGE and pairs:
    least = min(decay for _, decay in pairs)
    pairs = tuple(pair for pair in pairs if pair[1] == least)
  run = HorizonRun(task, arm, 0, horizon)
  return [run._replace(rate=rate, decay=decay) for rate, decay in pairs] or [run]


def phases(known: KnownRuns, tasks: tuple[str, ...]) -> Iterator[list[HorizonRun]]:
  """Yields what is to be trained, a list at a time; each may depend on those before.

  Args:
    known: The runs so far. All runs of a list must be in it before the next is asked.
    tasks: Names of the tasks.
  """
  for task in tasks:
    for arm in ARMS:
      for horizon in horizons_of(task, arm):
        wanted = settings(task, arm, horizon)
        yield wanted
        best = known.best(wanted)
        if best is not None:
          yield [best._replace(seed=seed) for seed in seeds_of(task)[1:]]


def losses_on_test(
  known: KnownRuns, task: str, arm: str, horizon: float, seed: int
) -> tuple[float, float] | None:
  """Returns the chosen run's test loss at the end, and at its best epoch; or None.

  Args:
    known: The runs.
    task: Name of the task.
    arm: Name of the arm.
    horizon: Share of the task's steps.
    seed: Seed of the run.
  """
  length = horizon if horizon in horizons_of(task, arm) else 1.0
  if length != horizon and arm not in WITHOUT_HORIZON:
    return None
  best = known.best(settings(task, arm, length))
  if best is None:
    return None
  chosen = best._replace(seed=seed)
  held_out, test = (known.losses(chosen, part) for part in ("validation", "test"))
  if held_out is None or test is None:
    return None
  points = NUM_POINTS if length == horizon else round(horizon * NUM_POINTS)
  return float(test[points - 1]), float(test[np.argmin(held_out[:points])])


@dataclasses.dataclass(frozen=True)
class LongStudy:
  """Train what the long suite lacks; print its table."""

  tasks: tuple[str, ...] = tuple(TASKS)
  """Names of the tasks."""
  minutes: float = 600.0
  """Begin no run after so many minutes."""
  out: Path = Path("out") / NAME
  """Folder for the runs' records."""
  results: Path = RESULTS
  """Folder of the archives, whose runs are not repeated."""
  data_dir: Path | None = None
  """Folder below which to look for data; by default ALRAO_DATA_DIR."""

  def __call__(self) -> None:
    """Trains, and prints the table.

    Raises:
      OptionError: An unknown task.
      DataError: The data is missing or damaged.
      OutputError: The folder can't be written.
    """
    for task in self.tasks:
      if task not in TASKS:
        refuse("tasks", f"must be some of {', '.join(TASKS)}", task)
    known = KnownRuns(known_in([self.results / f"{NAME}.jsonl", self.out]))
    begun = time.monotonic()
    with writing_to(self.out), Display() as display:
      trainer = HorizonTrainer(
        NAME,
        NAME,
        TASKS,
        ARMS,
        out=self.out,
        data_dir=self.data_dir,
        display=display,
        workload=LongWorkload,
      )
      for phase in phases(known, self.tasks):
        for one in phase:
          if one in known.runs:
            continue
          if time.monotonic() - begun > 60 * self.minutes:
            display.say("out of time; the same command goes on from here.")
            print("\n".join(table(known)))
            return
          run = trainer.train(one)
          known.add(run)
          display.say(f"{run.name}  {run.epochs[-1]['validation_loss']}")
    print("\n".join(table(known)))

  def derive(self, results: Path = RESULTS) -> list[str]:
    """Returns the table of an archive, as lines of Markdown; nothing is trained.

    Args:
      results: Folder of the archives.

    Raises:
      RecordError: The archive is damaged.
    """
    return table(KnownRuns(known_in([results / f"{NAME}.jsonl"])))


def table(known: KnownRuns) -> list[str]:
  """Returns what is known so far, as lines of Markdown.

  Args:
    known: The runs.
  """
  if not known.runs:
    return ["No run has been made yet."]
  rows = []
  for arm, (method, _) in ARMS.items():
    ends = _ratios(known, arm, (1.0,), 0)
    if not ends:
      continue
    cells = [f"{ends[task]:.3f}" if task in ends else MISSING for task in TASKS]
    rows.append(
      [
        method.label,
        _mean(ends),
        f"{max(ends.values()):.2f}",
        _mean(_ratios(known, arm, (1.0,), 1)),
        _mean(_ratios(known, arm, HORIZONS, 0)),
        *cells,
      ]
    )
  header = ["method", "end", "worst task", "best epoch", "all horizons", *TASKS]
  return [
    f"{len(known.runs)} runs. Test losses relative to AdamW's of the same length, at "
    "the end: "
    f"{'; '.join(f'{name}: {task.short.label}' for name, task in TASKS.items())}.",
    "",
    *markdown(header, rows),
  ]


def _mean(ratios: dict[str, float]) -> str:
  if not ratios:
    return MISSING
  told = f"{math.exp(float(np.mean(np.log([*ratios.values()])))):.3f}"
  return told if len(ratios) == len(TASKS) else f"{told} ({len(ratios)})"


def _ratios(
  known: KnownRuns, arm: str, horizons: tuple[float, ...], which: int
) -> dict[str, float]:
  """Ratios by task, where all are known: at the end (0), or at the best epoch (1)."""
  found: dict[str, float] = {}
  for task in TASKS:
    logs = []
    for horizon in horizons if task != LARGE else horizons[-1:]:
      for seed in seeds_of(task):
        one, other = (
          losses_on_test(known, task, name, horizon, seed) for name in (arm, ADAMW)
        )
        if one is None or other is None:
          break
        ratio = one[which] / other[which]
        logs.append(math.log(min(ratio, CAP) if math.isfinite(ratio) else CAP))
      else:
        continue
      break
    else:
      found[task] = math.exp(float(np.mean(logs)))
  return found


STUDY = LongStudy
