"""One epoch of training, whole or in segments between which a run may be killed."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from benchmarks.progress import Display

PyTree = Any


@runtime_checkable
class Segmented(Protocol):
  """What a program has beside ``batches``, if its epochs take too long to repeat.

  Such a program is trained a segment at a time, with a checkpoint after each.
  """

  def segment(self, seed: int, epoch: int, start: int) -> PyTree:
    """Returns the next batches of an epoch, as `benchmarks.loops.Loop` takes them.

    Args:
      seed: Seed of the run.
      epoch: Number of the epoch.
      start: Number of the epoch's steps that are done.
    """
    ...

  def begin_skipped(self, names: Iterable[str]) -> None:
    """Says which examples a run has found damaged before; called as it starts."""
    ...

  def take_skipped(self) -> list[str]:
    """Returns the names of examples found damaged since the last call."""
    ...


@dataclasses.dataclass
class Progress:
  """What an epoch has come to so far; JSON can hold it.

  Attributes:
    losses: Of each step.
    head_weights: Of each step, the weight of each head.
    seconds: Time spent in training.
    skipped: Names of examples that were damaged.
  """

  losses: list[float] = dataclasses.field(default_factory=list)
  head_weights: list[list[float]] = dataclasses.field(default_factory=list)
  seconds: float = 0.0
  skipped: list[str] = dataclasses.field(default_factory=list)


def as_segmented(program: Any) -> Segmented | None:
  """Returns a program if it is trained a segment at a time, else None.

  Args:
    program: A `benchmarks.engine.Program`.
  """
  return program if isinstance(program, Segmented) else None


def train_epoch(
  program: Any,
  seed: int,
  epoch: int,
  state: PyTree,
  progress: Progress,
  on_progress: Callable[[int, float, PyTree], None],
) -> Iterator[PyTree]:
  """Trains an epoch, or the rest of one; yields the state after each segment.

  Args:
    program: A `benchmarks.engine.Program`; its epochs are one segment unless it is
      `Segmented`.
    seed: Seed of the run.
    epoch: Number of the epoch.
    state: What it starts from; not to be used afterwards.
    progress: What the epoch has come to before; is kept up to date.
    on_progress: Called now and then with the number of steps and seconds of this epoch,
      and the outputs of the last step.
  """
  segmented = as_segmented(program)
  while (done := len(progress.losses)) < program.steps_per_epoch:
    start, before = time.perf_counter(), progress.seconds

    def show(steps, outputs, done=done, start=start, before=before) -> None:
      on_progress(done + steps, before + time.perf_counter() - start, outputs)

    if segmented is None:
      batches = program.batches(seed, epoch)
    else:
      batches = segmented.segment(seed, epoch, done)
    state, outputs = program.step(state, program.data, batches, show)
    progress.losses += outputs["loss"].astype(np.float64).tolist()
    progress.head_weights += outputs["head_weights"].astype(np.float64).tolist()
    progress.seconds += time.perf_counter() - start
    if segmented is not None:
      progress.skipped += segmented.take_skipped()
    yield state


def shower(
  program: Any, display: Display, epoch: int
) -> Callable[[int, float, PyTree], None]:
  """Returns what shows the progress of an epoch, for `train_epoch`.

  Args:
    program: A `benchmarks.engine.Program`.
    display: Where it is shown.
    epoch: Number of the epoch.
  """
  examples_per_step = program.examples_per_epoch / program.steps_per_epoch

  def show(steps: int, seconds: float, outputs: PyTree) -> None:
    display.update(
      done=(epoch - 1) * program.steps_per_epoch + steps,
      epoch=epoch,
      examples_per_second=steps * examples_per_step / seconds,
      loss=float(outputs["loss"]),
      head_weights=outputs["head_weights"].tolist(),
    )

  return show
