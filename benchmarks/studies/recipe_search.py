"""The search for the next recipe: its rules, which came first, and how far it got.

    python -m benchmarks study recipe_search --minutes 60   # goes on where it was
    python -m benchmarks collect recipe_search              # keeps what has ended

All of this was written down before the first run:

- **Tasks**: `benchmarks.workloads.search`, none of the arena's. Four of them screen.
- **Measure**: the held-out loss at the end of training, at three horizons: a quarter, a
  half and the whole of a task's steps. AdamW with warm-up and cosine is trained for
  each horizon, at 4 rates x 2 decays on seed 0. The best by the same held-out loss is
  the reference, and is trained for that horizon on other seeds. A recipe without a
  horizon is trained once and measured at all three. What counts is the geometric mean
  of ratios to the reference over tasks, seeds and horizons; a run whose loss is not
  finite, or more than ten times the reference, counts as ten times. Next to it are the
  worst ratio, and how far the end is above the best evaluation before it.
- **Noise**: the standard deviation of that mean's logarithm over five reruns of today's
  recipe, seeds 1 to 5. A change is kept if its paired difference to today's (same
  tasks, seeds and horizons) is below 0 by more than twice the noise.
- **Candidates**: the 24 of `benchmarks.studies._candidates`. No other is tried.
- **Stopping**: each candidate is trained once (seed 0) on the tasks that screen. The
  best eight at most, of those that gain more than twice the noise there, are trained on
  all tasks on seeds 0 and 1; the best two of these on seed 2. The better one is the
  next recipe if it is kept by the rule above on all tasks and three seeds, and today's
  stays if not. Then the search is over.

Test data has no part in it: the loaders leave it where it is.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.console import Display, writing_to
from benchmarks.methods import ADAMW_COSINE as ADAMW
from benchmarks.records import RESULTS
from benchmarks.studies._candidates import CANDIDATES, TODAY
from benchmarks.studies._horizons import (
  HorizonArm,
  HorizonRun,
  HorizonTrainer,
  KnownRuns,
  known_in,
)
from benchmarks.tables import markdown
from benchmarks.workloads.search import SCREENING, TASKS
from benchmarks.workloads.short import NUM_POINTS

NAME = "recipe_search"
HORIZONS = (0.25, 0.5, 1.0)
NOISE_SEEDS = (1, 2, 3, 4, 5)
FINAL_SEEDS = (0, 1)
LAST_SEED = 2
NUM_FINALISTS, NUM_LAST = 8, 2
CAP = 10.0  # of a ratio
ARMS = {candidate.name: candidate for candidate in (TODAY, *CANDIDATES)}
TRAINED = {
  ADAMW.name: HorizonArm(ADAMW),
  **{name: HorizonArm(arm.method, arm.one_in) for name, arm in ARMS.items()},
}


class Known(KnownRuns):
  """What is known of the search."""

  def setting(self, task: str, horizon: float) -> HorizonRun | None:
    """Returns the reference of a task and horizon on seed 0; None if not yet known.

    Args:
      task: Name of the task.
      horizon: Share of its steps.
    """
    return self.best(references(task, horizon))

  def reference(self, task: str, horizon: float, seed: int) -> float | None:
    """Returns the reference's loss; None if not yet known.

    Args:
      task: Name of the task.
      horizon: Share of its steps.
      seed: Seed of the run.
    """
    best = self.setting(task, horizon)
    found = None if best is None else self.losses(best._replace(seed=seed))
    return None if found is None else float(found[-1])

  def logs(
    self, arm: str, tasks: Sequence[str], seeds: Sequence[int]
  ) -> np.ndarray | None:
    """Returns logarithms of losses at the horizons, (tasks, seeds, horizons), or None.

    Args:
      arm: A recipe without a horizon.
      tasks: Names of the tasks.
      seeds: Seeds of the runs.
    """
    found = [
      [self.losses(HorizonRun(task, arm, seed)) for seed in seeds] for task in tasks
    ]
    if any(one is None for of_task in found for one in of_task):
      return None
    at = [round(horizon * NUM_POINTS) - 1 for horizon in HORIZONS]
    with np.errstate(divide="ignore"):
      return np.log(np.array(found)[..., at])

  def reference_logs(
    self, tasks: Sequence[str], seeds: Sequence[int]
  ) -> np.ndarray | None:
    """Returns the same of the reference.

    Args:
      tasks: Names of the tasks.
      seeds: Seeds of the runs.
    """
    found = [
      [[self.reference(task, h, seed) for h in HORIZONS] for seed in seeds]
      for task in tasks
    ]
    if any(x is None for of_task in found for of_seed in of_task for x in of_seed):
      return None
    return np.log(np.array(found, float))

  def difference(
    self, arm: str, tasks: Sequence[str], seeds: Sequence[int]
  ) -> float | None:
    """Returns how far an arm's mean logarithm is above today's; None if not yet known.

    Args:
      arm: Name of a candidate.
      tasks: Names of the tasks.
      seeds: Seeds of the runs.
    """
    one, other = (self.logs(name, tasks, seeds) for name in (arm, TODAY.name))
    if one is None or other is None:
      return None
    cap = math.log(CAP)
    with np.errstate(invalid="ignore"):  # both failed
      apart = np.nan_to_num(one - other, nan=0.0, posinf=cap, neginf=-cap)
    return float(np.clip(apart, -cap, cap).mean())

  def noise(self, tasks: Sequence[str]) -> float | None:
    """Returns the deviation of today's mean over reruns; None if not yet known.

    Args:
      tasks: Names of the tasks.
    """
    found = self.logs(TODAY.name, tasks, NOISE_SEEDS)
    return None if found is None else float(found.mean(axis=(0, 2)).std(ddof=1))


def references(task: str, horizon: float, seed: int = 0) -> list[HorizonRun]:
  """Returns the runs that choose the reference of a task and horizon.

  Args:
    task: Name of the task.
    horizon: Share of its steps.
    seed: Seed of the runs.
  """
  return [
    HorizonRun(task, ADAMW.name, seed, horizon, rate, decay)
    for rate, decay in ADAMW.rates
  ]


def phases(known: Known) -> Iterator[list[HorizonRun]]:
  """Yields what is to be trained, a list at a time; each may depend on those before.

  Args:
    known: The runs so far. All runs of a list must be in it before the next is asked.
  """
  tasks = tuple(TASKS)
  others = tuple(task for task in tasks if task not in SCREENING)
  today = [0, *NOISE_SEEDS]
  yield [HorizonRun(task, TODAY.name, seed) for task in SCREENING for seed in today]
  yield [one for task in SCREENING for h in HORIZONS for one in references(task, h)]
  for candidate in CANDIDATES:
    yield [HorizonRun(task, candidate.name, 0) for task in SCREENING]
  chosen = finalists(known)
  if not chosen:
    return
  yield [HorizonRun(task, TODAY.name, seed) for task in others for seed in today]
  yield [one for task in others for h in HORIZONS for one in references(task, h)]
  yield _chosen_references(known, FINAL_SEEDS)
  for name in chosen:
    yield [HorizonRun(task, name, seed) for task in tasks for seed in FINAL_SEEDS]
  yield _chosen_references(known, (LAST_SEED,))
  for name in last(known):
    yield [HorizonRun(task, name, LAST_SEED) for task in tasks]


def _chosen_references(known: Known, seeds: Sequence[int]) -> list[HorizonRun]:
  settings = [known.setting(task, h) for task in TASKS for h in HORIZONS]
  return [
    one._replace(seed=seed) for one in settings if one is not None for seed in seeds
  ]


def finalists(known: Known) -> list[str]:
  """Returns the candidates that are trained on all tasks, the best first.

  Args:
    known: The runs so far, with all that screen.
  """
  noise = known.noise(SCREENING)
  scores = {c.name: known.difference(c.name, SCREENING, (0,)) for c in CANDIDATES}
  gains = {
    name: score
    for name, score in scores.items()
    if score is not None and noise is not None and score < -2 * noise
  }
  return sorted(gains, key=lambda name: gains[name])[:NUM_FINALISTS]


def last(known: Known) -> list[str]:
  """Returns the two candidates that are trained on a third seed.

  Args:
    known: The runs so far, with the finalists'.
  """
  scores = {name: known.difference(name, [*TASKS], FINAL_SEEDS)
            for name in finalists(known)}  # fmt: skip
  found = {name: score for name, score in scores.items() if score is not None}
  return sorted(found, key=lambda name: found[name])[:NUM_LAST]


# --- The command


@dataclasses.dataclass(frozen=True)
class RecipeSearch:
  """Train what the search lacks, as its rules say; print how far it is."""

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
      DataError: The data is missing or damaged.
      OutputError: The folder can't be written.
    """
    known = Known(known_in([self.results / f"{NAME}.jsonl", self.out]))
    begun, stop = time.monotonic(), 60 * self.minutes
    with writing_to(self.out), Display() as display:
      trainer = HorizonTrainer(
        NAME,
        "search",
        TASKS,
        TRAINED,
        out=self.out,
        data_dir=self.data_dir,
        display=display,
      )
      for phase in phases(known):
        for trial in phase:
          if trial in known.runs:
            continue
          if time.monotonic() - begun > stop:
            display.say("out of time; the same command goes on from here.")
            print("\n".join(table(known)))
            return
          run = trainer.train(trial)
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
    return table(Known(known_in([results / f"{NAME}.jsonl"])))


# --- The table


def table(known: Known) -> list[str]:
  """Returns what is known so far, as lines of Markdown.

  Args:
    known: The runs.
  """
  if not known.runs:
    return ["No run has been made yet."]
  tasks = tuple(TASKS)
  lines = [f"{len(known.runs)} runs.", ""]
  for title, of, seeds in (
    ("Screening", SCREENING, (0,)),
    ("All tasks, two seeds", tasks, FINAL_SEEDS),
    ("All tasks, three seeds", tasks, (*FINAL_SEEDS, LAST_SEED)),
  ):
    rows = _rows(known, of, seeds)
    if len(rows) < 2 and title != "Screening":
      continue
    noise = known.noise(of)
    told = "not yet known" if noise is None else f"{100 * math.expm1(2 * noise):.1f} %"
    lines += [
      f"{title}: {', '.join(TASKS[task].short.label for task in of)}. Twice the noise: "
      f"{told}.",
      "",
      *markdown(
        ["candidate", "to today's", "to AdamW", "worst", "end above best", *of], rows
      ),
      "",
    ]
  untried = [c.name for c in CANDIDATES if not _tried(known, c.name)]
  tried = len(CANDIDATES) - len(untried)
  rest = f" Not yet tried: {', '.join(untried)}." if untried else ""
  return [*lines, f"{tried} of {len(CANDIDATES)} candidates were tried.{rest}"]


def _tried(known: Known, name: str) -> bool:
  return known.logs(name, SCREENING, (0,)) is not None


def _rows(known: Known, tasks: Sequence[str], seeds: Sequence[int]) -> list[list[str]]:
  """A row for each arm that was trained on all of it, today's first."""
  reference, rows = known.reference_logs(tasks, seeds), []
  cap = math.log(CAP)
  for name, arm in ARMS.items():
    logs = known.logs(name, tasks, seeds)
    difference = known.difference(name, tasks, seeds)
    if logs is None or difference is None:
      continue
    against = ["", "", *([""] * len(tasks))]
    if reference is not None:
      ratios = np.clip(logs - reference, -cap, cap)
      each = [f"{math.exp(one):.3f}" for one in ratios.mean(axis=(1, 2))]
      against = [f"{math.exp(ratios.mean()):.3f}", f"{math.exp(ratios.max()):.2f}"]
      against += each
    above = []
    for task in tasks:
      for seed in seeds:
        losses = known.losses(HorizonRun(task, name, seed))
        if losses is not None:
          above.append(min(losses[-1] / losses.min(), CAP))
    rows.append(
      [
        arm.idea,
        f"{math.exp(difference):.3f}",
        *against[:2],
        f"{math.exp(float(np.log(above).mean())):.3f}",
        *against[2:],
      ]
    )
  return rows


STUDY = RecipeSearch
