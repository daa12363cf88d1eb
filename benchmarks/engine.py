"""The one training loop of all benchmarks.

It trains a `Program`, whatever that is, epoch after epoch: validates, stops early,
keeps what was best, checkpoints, records, and goes on where a killed run left off. How
to train on a batch is the program's business; `benchmarks.images` has the one for
images.
"""

import dataclasses
import datetime
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from benchmarks import records
from benchmarks.checkpoints import Checkpoints, delete
from benchmarks.epochs import Progress, Segmented, shower, train_epoch
from benchmarks.progress import Display

PyTree = Any


class Program(Protocol):
  """A network and an optimizer, compiled once for all rates and seeds.

  One whose epochs take hours is `benchmarks.epochs.Segmented` too, and goes on after
  the last segment. One that reads while it trains may have a ``close()``, which ends
  that; it is called when a run ends, also by an error.

  Attributes:
    step: The training loop, such as a `benchmarks.loops.Loop`: ``(state, data,
      batches, on_progress)`` to the next state, and the
      ``loss`` (steps,) and ``head_weights`` (steps, num_heads) of each step, the latter
      with num_heads 0 where there are no heads.
    data: What `step` reads, on the device.
    examples_per_epoch: How many examples an epoch's batches hold.
    steps_per_epoch: How many batches.
    examples: What they are, in the plural, for the display.
    survives_divergence: Whether a run goes on after a loss that is not finite. Alrao
      leaves diverged heads out and may recover; ordinary training ends as failed.
    num_parameters: Of the network.
  """

  step: Callable[..., tuple[PyTree, PyTree]]
  data: PyTree
  examples_per_epoch: int
  steps_per_epoch: int
  examples: str
  survives_divergence: bool
  num_parameters: int

  def init(self, seed: int, rate: Any) -> PyTree:
    """Returns the state that training starts from, arrays of distinct buffers."""
    ...

  def batches(self, seed: int, epoch: int) -> PyTree:
    """Returns an epoch's batches: numpy arrays, one entry on axis 0 for each step."""
    ...

  def snapshot(self, state: PyTree, seed: int, epoch: int) -> PyTree:
    """Returns what is evaluated and kept of a state after `epoch` (0: untrained)."""
    ...

  def evaluate(self, snapshot: PyTree, part: str) -> dict[str, float]:
    """Returns what a ``"validation"`` or ``"test"`` part measures, by name.

    ``loss`` is what the best epoch has least of; the rest is recorded beside it.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Plan:
  """One run: which, for how long, and where its results go.

  Attributes:
    name: Name of the run, and of its file and checkpoint.
    config: All its options, as they go into the summary.
    out: Folder of the results: ``<name>.jsonl`` and ``checkpoints/<name>/``.
    seed: Determines the initial weights, the batches and Alrao's rates.
    rate: Learning rate, where the optimizer takes one, or what else it takes.
    max_epochs: Maximum number of epochs.
    patience: Number of epochs without a better validation loss that ends a run.
    posteriors_per_epoch: How many intervals between recorded head posteriors an epoch
      has: several, since it often settles within the first.
  """

  name: str
  config: dict[str, Any]
  out: Path
  seed: int
  rate: Any
  max_epochs: int
  patience: int
  posteriors_per_epoch: int = 10

  @property
  def path(self) -> Path:
    """The file of records."""
    return self.out / f"{self.name}.jsonl"

  @property
  def checkpoints(self) -> Path:
    """The folder of checkpoints."""
    return self.out / "checkpoints" / self.name


def train(
  program: Program, plan: Plan, display: Display, *, resume: bool = True
) -> records.Record:
  """Trains once, and tests the epoch of best validation loss.

  Killed at any moment and called again, it goes on after the last checkpoint, and ends
  as if it had never been killed, bit for bit (on one kind of machine).

  Args:
    program: What to train.
    plan: Which run of it.
    display: Where progress is shown.
    resume: Whether to return the summary of a run that has ended and to continue one
      that has not; otherwise it starts anew.

  Returns:
    The run's summary, as in the last line of its file.
  """
  summary = records.read_summary(plan.path) if resume else None
  if summary is not None:
    return summary
  if not resume and jax.process_index() == 0:
    delete(plan.checkpoints)
    plan.path.unlink(missing_ok=True)
  try:
    return _train(program, plan, display)
  finally:
    getattr(program, "close", lambda: None)()


def _train(program: Program, plan: Plan, display: Display) -> records.Record:
  """Trains on from the last checkpoint, if there is one; returns the summary."""
  writes = jax.process_index() == 0  # of several hosts, which share the folder
  with Checkpoints(plan.checkpoints) as checkpoints:
    state = program.init(plan.seed, plan.rate)
    best = _to_host(program.snapshot(state, plan.seed, 0))
    history: list[records.Record] = []
    progress = Progress()
    found = checkpoints.restore((state, best))
    if found is not None:
      (state, best), notes = found
      history = notes["history"]
      progress = Progress(**notes.get("progress", {}))
    per_epoch = program.steps_per_epoch
    if isinstance(program, Segmented):
      program.begin_skipped([*_skipped(history), *progress.skipped])
    display.begin(
      plan.name,
      program.examples,
      plan.max_epochs * per_epoch,
      len(history) * per_epoch + len(progress.losses),
    )
    while (ending := _ending(program, plan, history)) is None:
      epoch = len(history) + 1
      show = shower(program, display, epoch)
      states = train_epoch(program, plan.seed, epoch, state, progress, show)
      # Counted are steps and validations: the numbers of checkpoints must increase.
      before = len(history) * (per_epoch + 1)
      for state in states:
        if isinstance(program, Segmented):
          notes = {"history": history, "progress": dataclasses.asdict(progress)}
          checkpoints.save(before + len(progress.losses), (state, best), notes)
      snapshot, record = _validate(program, plan, state, epoch, progress)
      history.append(record)
      if best_epoch(history, program.survives_divergence) == epoch:
        best = _to_host(snapshot)
      checkpoints.save(before + per_epoch + 1, (state, best), {"history": history})
      if writes:
        records.write(plan.path, history)
      display.end_epoch(record)
      progress = Progress()
    summary = _summarize(program, plan, history, best, ending)
  if not writes:
    return summary
  records.write(plan.path, [*history, summary])
  delete(plan.checkpoints)
  return records.read(plan.path)[-1]


def best_epoch(
  history: list[records.Record], survives_divergence: bool = False
) -> int | None:
  """Returns the epoch of least validation loss, the first of equals; None if none is.

  Args:
    history: Records of the epochs.
    survives_divergence: Whether an epoch counts though a loss in it was not finite.
      If not, its network is lost, even where what it does can still be measured.
  """
  finite = [
    record
    for record in history
    if math.isfinite(record["validation_loss"])
    and (survives_divergence or not record["nonfinite_steps"])
  ]
  best = min(finite, key=lambda record: record["validation_loss"], default=None)
  return None if best is None else best["epoch"]


def _ending(program: Program, plan: Plan, history: list[records.Record]) -> str | None:
  """Why a run is over: ``failed``, ``early`` or ``maximum``; None if it is not."""
  if history and not program.survives_divergence:
    last = history[-1]
    if last["nonfinite_steps"] or not math.isfinite(last["validation_loss"]):
      return "failed"
  best = best_epoch(history, program.survives_divergence) or 0
  if len(history) - best >= plan.patience:
    return "early"
  return "maximum" if len(history) >= plan.max_epochs else None


def _validate(
  program: Program, plan: Plan, state: PyTree, epoch: int, progress: Progress
) -> tuple[PyTree, records.Record]:
  """Returns the snapshot after an epoch, and the epoch's record."""
  start = time.perf_counter()
  losses = np.array(progress.losses)
  snapshot = program.snapshot(state, plan.seed, epoch)
  validation = program.evaluate(snapshot, "validation")
  last = len(losses) - 1
  steps = np.unique(np.linspace(0, last, plan.posteriors_per_epoch + 1).astype(int))
  heads = np.array(progress.head_weights)
  record = {
    "kind": "epoch",
    "epoch": epoch,
    "train_loss": float(losses.mean()),
    **{f"validation_{name}": value for name, value in validation.items()},
    "nonfinite_steps": int(np.sum(~np.isfinite(losses))),
    "steps": [int(step) for step in steps],
    "head_weights": heads[steps].round(5).tolist() if heads.shape[1] else [],
    "examples_per_second": program.examples_per_epoch / progress.seconds,
    "seconds": progress.seconds + time.perf_counter() - start,
  }
  if isinstance(program, Segmented):
    record["skipped"] = sorted({*progress.skipped, *program.take_skipped()})
  return snapshot, record


def _summarize(
  program: Program,
  plan: Plan,
  history: list[records.Record],
  best: PyTree,
  ending: str,
) -> records.Record:
  """Tests the best epoch; returns the run's summary."""
  epoch = best_epoch(history, program.survives_divergence)
  # Where no epoch has a finite loss, nothing is tested, and every measure is None.
  chosen = history[epoch - 1] if epoch else dict.fromkeys(history[0])
  names = [name for name in history[0] if name.startswith("validation_")]
  tested = program.evaluate(best, "test") if epoch else {}
  skipped = {}
  if isinstance(program, Segmented):
    skipped["skipped"] = sorted({*_skipped(history), *program.take_skipped()})
  # The first epoch includes the compilation.
  speeds = [record["examples_per_second"] for record in history]
  return {
    "kind": "summary",
    "name": plan.name,
    "config": plan.config,
    "num_parameters": program.num_parameters,
    "ending": ending,
    "epochs": len(history),
    "best_epoch": epoch,
    **{name: chosen[name] for name in ("train_loss", *names)},
    **{
      name.replace("validation", "test", 1): tested.get(
        name.removeprefix("validation_")
      )
      for name in names
    },
    "examples_per_second": float(np.median(speeds[1:] or speeds)),
    **skipped,
    "seconds": sum(record["seconds"] for record in history),
    "peak_memory": records.peak_memory(),
    "date": datetime.date.today().isoformat(),
    "environment": records.environment(),
  }


def _skipped(history: list[records.Record]) -> list[str]:
  """The names of the examples that epochs have left out."""
  return [name for record in history for name in record["skipped"]]


def _to_host(tree: PyTree) -> PyTree:
  """Copies, since the buffers of a state are donated to the next step."""
  return jax.tree.map(lambda leaf: np.array(jax.device_get(leaf)), tree)
