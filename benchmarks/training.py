"""The one training loop of all benchmarks.

It trains a `Workload`, whatever that is, epoch after epoch: validates, stops early,
keeps what was best, checkpoints, records, and goes on where a killed run left off. How
to train on a batch is the workload's business; `benchmarks.workloads` has them.
"""

import abc
import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from benchmarks import records
from benchmarks.console import Display, OutputError
from benchmarks.methods import Heads
from benchmarks.records import Record

PyTree = Any
Step = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
OnProgress = Callable[[int, PyTree], None]

REFRESH_SECONDS = 0.5
DISMISSAL_STEPS = 50  # steps after which heads may leave
SUMS = "sums.json"
DISK = re.compile(
  "no space left|file too large|read-only file system|permission denied|disk quota|"
  "input/output error|file name too long",
  re.IGNORECASE,
)


class CheckpointError(ValueError):
  """A checkpoint that can't be read; the text names its folder and says what to do."""


class Workload(abc.ABC):
  """A network and an optimizer on some data, compiled once for all rates and seeds.

  Attributes:
    step: The training loop, such as a `Loop`: ``(state, data, batches, on_progress)``
      to the next state, and the ``loss`` (steps,) and ``head_weights`` (steps,
      num_heads) of each step, the latter with num_heads 0 where there are no heads.
    data: What `step` reads, on the device.
    examples_per_epoch: How many examples an epoch's batches hold.
    steps_per_epoch: How many batches; the most of any epoch, where they differ.
    examples: What they are, in the plural, for the display.
    survives_divergence: Whether a run goes on after a loss that is not finite. Alrao
      leaves diverged heads out and may recover; ordinary training ends as failed.
    num_parameters: Of the network.
    watched: The parts that are measured after each epoch.
    is_segmented: Whether an epoch is trained a segment at a time, with a checkpoint
      after each, because it takes too long to repeat.
    heads: The heads, where some may leave.
  """

  step: Callable[..., tuple[PyTree, PyTree]]
  data: PyTree
  examples_per_epoch: int
  steps_per_epoch: int
  examples: str
  survives_divergence: bool
  num_parameters: int
  watched: tuple[str, ...] = ("validation",)
  is_segmented: bool = False
  heads: Heads | None = None

  @abc.abstractmethod
  def init(self, seed: int, rate: Any) -> PyTree:
    """Returns the state that training starts from, arrays of distinct buffers."""

  @abc.abstractmethod
  def batches(self, seed: int, epoch: int) -> PyTree:
    """Returns an epoch's batches: numpy arrays, one entry on axis 0 for each step."""

  @abc.abstractmethod
  def snapshot(self, state: PyTree, seed: int, epoch: int) -> PyTree:
    """Returns what is evaluated and kept of a state after `epoch` (0: untrained)."""

  @abc.abstractmethod
  def evaluate(self, snapshot: PyTree, part: str) -> dict[str, float]:
    """Returns what a ``"validation"`` or ``"test"`` part measures, by name.

    ``loss`` is what the best epoch has least of; the rest is recorded beside it.
    """

  def segment(self, seed: int, epoch: int, start: int) -> PyTree:
    """Returns the next batches of an epoch: all of them, unless it is segmented.

    Args:
      seed: Seed of the run.
      epoch: Number of the epoch.
      start: Number of the epoch's steps that are done.
    """
    del start
    return self.batches(seed, epoch)

  def begin_skipped(self, names: Iterable[str]) -> None:  # noqa: B027
    """Says which examples a run has found damaged before; called as it starts."""

  def take_skipped(self) -> list[str]:
    """Returns the names of examples found damaged since the last call."""
    return []

  def close(self) -> None:  # noqa: B027
    """Ends what runs beside the training; called when a run ends, also by an error."""


class Loop:
  """A step, compiled once, and the loop over it that suits the backend.

  On accelerators the loop is one `lax.scan`, which spares the launch of every step. On
  a CPU it is a Python loop over the jitted step: XLA runs convolutions within a scan on
  one thread, several times slower. This is the only place that chooses.

  Heads may leave every `DISMISSAL_STEPS` steps of a call, and at its end. The step is
  then compiled anew. A call that begins with several heads, which may leave, runs step
  by step on accelerators, too.

  Attributes:
    step: The step.
    num_traces: How many times the step has been traced, hence compiled.
  """

  def __init__(
    self, step: Step, *, scan: bool | None = None, heads: Heads | None = None
  ):
    """Makes the loop; nothing is compiled yet.

    Args:
      step: Pure function ``(carry, data, batch) -> (carry, outputs)``. The buffers of
        `carry` are donated, those of `data` are not.
      scan: Whether to scan; by default, unless the backend is a CPU.
      heads: The heads of `carry`, if some may leave. On a CPU such a loop does not
        scan: its step would be compiled once more for each number of heads.
    """
    self.step = step
    self.num_traces = 0
    self._heads = heads if heads is not None and heads.may_leave else None
    if scan is None or self._heads is not None:
      scan = jax.default_backend() != "cpu"
    self._scan = scan

    def counted(carry, data, batch):
      self.num_traces += 1
      return step(carry, data, batch)

    def scanned(carry, data, batches):
      return jax.lax.scan(lambda carry, x: counted(carry, data, x), carry, batches)

    self._one = jax.jit(counted, donate_argnums=0)
    self._all = jax.jit(scanned, donate_argnums=0)

  def trace(self, carry: PyTree, data: PyTree, batches: PyTree) -> jax.stages.Traced:
    """Returns the program that the loop runs, traced for arguments of some shapes.

    Args:
      carry: What a step changes; arrays or shapes, likewise the rest.
      data: What steps only read.
      batches: As the loop takes them if it scans, else a single batch.
    """
    jitted = self._all if self._scan else self._one
    return jitted.trace(carry, data, batches)

  def __call__(
    self,
    carry: PyTree,
    data: PyTree,
    batches: PyTree,
    on_progress: OnProgress | None = None,
  ) -> tuple[PyTree, PyTree]:
    """Runs all batches.

    Args:
      carry: What a step changes. Not to be used afterwards.
      data: What steps only read, on the device.
      batches: Numpy arrays, one entry on axis 0 for each step; or, for a loop that
        does not scan, an iterator of at least one batch.
      on_progress: Called now and then with the number of steps done and the outputs of
        the last.

    Returns:
      The last carry, and the outputs of all steps as numpy arrays, stacked on axis 0.
    """
    heads = self._heads
    if heads is not None and len(heads.left(carry)) == 1:
      heads = None  # nobody is left to leave
    if self._scan and heads is None:
      carry, outputs = self._all(carry, data, batches)
      outputs = jax.device_get(outputs)
      if on_progress is not None:
        num_steps = len(jax.tree.leaves(batches)[0])
        on_progress(num_steps, jax.tree.map(lambda x: x[-1], outputs))
      return carry, outputs
    collected, last = [], time.perf_counter()
    for i, batch in enumerate(each_batch(batches)):
      if heads is not None and i and i % DISMISSAL_STEPS == 0:
        carry = heads.dismiss(carry)
      carry, outputs = self._one(carry, data, batch)
      collected.append(outputs)
      if on_progress is not None and time.perf_counter() - last > REFRESH_SECONDS:
        on_progress(i + 1, jax.device_get(outputs))
        last = time.perf_counter()
    if heads is not None:
      carry = heads.dismiss(carry)
    collected = jax.device_get(collected)
    return carry, jax.tree.map(lambda *xs: np.stack(xs), *collected)


def each_batch(batches: PyTree) -> Iterator[PyTree]:
  """Yields batches, one after the other.

  Args:
    batches: Arrays with one entry on axis 0 for each, or an iterator.
  """
  if isinstance(batches, Iterator):
    yield from batches
  else:
    for i in range(len(jax.tree.leaves(batches)[0])):
      yield jax.tree.map(lambda x, i=i: x[i], batches)


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


def make_plan(
  title: list[str],
  config: Record,
  notes: Record,
  out: Path,
  *,
  patience: int,
) -> Plan:
  """Returns the plan of a run, under a name that no other options have.

  Args:
    title: What its name begins with.
    config: All its options, with ``optimizer``, ``rate``, ``seed`` and ``max_epochs``.
    notes: What else its records say beside the options.
    out: Folder of the results.
    patience: As in `Plan`.
  """
  digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
  rate = config["rate"]
  parts = [
    *title,
    config["optimizer"],
    *([f"{rate:g}"] if rate is not None else []),
    f"s{config['seed']}",
    digest[:8],
  ]
  return Plan(
    name="-".join(parts),
    config={**config, **notes},
    out=out,
    seed=config["seed"],
    rate=rate,
    max_epochs=config["max_epochs"],
    patience=patience,
  )


def train(
  workload: Workload,
  plan: Plan,
  display: Display,
  *,
  resume: bool = True,
  restart: bool = False,
) -> Record:
  """Trains once, and tests the epoch of best validation loss.

  Killed at any moment and called again, it goes on after the last checkpoint, and ends
  as if it had never been killed, bit for bit (on one kind of machine).

  Args:
    workload: What to train.
    plan: Which run of it.
    display: Where progress is shown.
    resume: Whether to return the summary of a run that has ended and to continue one
      that has not; otherwise it starts anew.
    restart: Whether a run whose checkpoint is damaged starts anew, and says so.

  Returns:
    The run's summary, as in the last line of its file.

  Raises:
    CheckpointError: The checkpoint is damaged.
    RecordError: The run's file is damaged.
  """
  writes = jax.process_index() == 0  # of several hosts, which share the folder
  summary = records.read_summary(plan.path) if resume else None
  if writes and (summary is not None or not resume):
    delete(plan.checkpoints)  # a run killed at its very end leaves one
  if summary is not None:
    return summary
  if not resume and writes:
    plan.path.unlink(missing_ok=True)
  try:
    try:
      return _train(workload, plan, display)
    except CheckpointError as error:
      if not restart:
        raise
      display.say(f"{error}\nStarting this run anew.")
      if writes:
        delete(plan.checkpoints)
      if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoint deleted")
      return _train(workload, plan, display)
  finally:
    workload.close()


def _train(workload: Workload, plan: Plan, display: Display) -> Record:
  """Trains on from the last checkpoint, if there is one; returns the summary."""
  writes = jax.process_index() == 0
  with Checkpoints(plan.checkpoints) as checkpoints:
    state = workload.init(plan.seed, plan.rate)
    best = _to_host(workload.snapshot(state, plan.seed, 0))
    left = best_left = _left(workload, state)
    history: list[Record] = []
    progress = _Progress()

    def like(notes: dict[str, Any]) -> PyTree:
      """A state and a snapshot with as many heads as those of a checkpoint."""
      if workload.heads is None or notes["left"] == notes["best_left"] == left:
        return state, best  # as it began
      then = workload.heads.only(state, notes["best_left"])
      snapshot = _to_host(workload.snapshot(then, plan.seed, 0))
      return workload.heads.only(state, notes["left"]), snapshot

    found = checkpoints.restore(like)
    if found is not None:
      (state, best), notes = found
      history, best_left = notes["history"], notes["best_left"]
      progress = _Progress(**notes.get("progress", {}))
    per_epoch = workload.steps_per_epoch
    workload.begin_skipped([*_skipped(history), *progress.skipped])
    display.begin(
      plan.name,
      workload.examples,
      plan.max_epochs * per_epoch,
      len(history) * per_epoch + len(progress.losses),
    )
    while (ending := _ending(workload, plan, history)) is None:
      epoch = len(history) + 1
      # Counted are steps and validations: the numbers of checkpoints must increase.
      before = len(history) * (per_epoch + 1)
      states = _train_epoch(workload, plan.seed, epoch, state, progress, display)
      for state in states:
        if workload.is_segmented:
          notes = {
            "history": history,
            "progress": dataclasses.asdict(progress),
            "left": _left(workload, state),
            "best_left": best_left,
          }
          checkpoints.save(before + len(progress.losses), (state, best), notes)
      snapshot, record = _validate(workload, plan, state, epoch, progress)
      history.append(record)
      if best_epoch(history, workload.survives_divergence) == epoch:
        best, best_left = _to_host(snapshot), _left(workload, state)
      notes = {
        "history": history,
        "left": _left(workload, state),
        "best_left": best_left,
      }
      checkpoints.save(before + per_epoch + 1, (state, best), notes)
      if writes:
        records.write(plan.path, history)
      display.end_epoch(record)
      progress = _Progress()
    summary = _summarize(workload, plan, history, best, ending)
  if not writes:
    return summary
  records.write(plan.path, [*history, summary])
  delete(plan.checkpoints)
  return records.read(plan.path)[-1]


def _left(workload: Workload, state: PyTree) -> list[int]:
  """The numbers of the heads that are left; none where none may leave."""
  return [] if workload.heads is None else workload.heads.left(state)


@dataclasses.dataclass
class _Progress:
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


def _train_epoch(
  workload: Workload,
  seed: int,
  epoch: int,
  state: PyTree,
  progress: _Progress,
  display: Display,
) -> Iterator[PyTree]:
  """Trains an epoch, or the rest of one; yields the state after each segment.

  Args:
    workload: What to train.
    seed: Seed of the run.
    epoch: Number of the epoch.
    state: What it starts from; not to be used afterwards.
    progress: What the epoch has come to before; is kept up to date.
    display: Where progress is shown.
  """
  examples_per_step = workload.examples_per_epoch / workload.steps_per_epoch
  wanted = workload.steps_per_epoch if workload.is_segmented else 1
  while (done := len(progress.losses)) < wanted:
    start, before = time.perf_counter(), progress.seconds

    def show(
      steps: int,
      outputs: PyTree,
      done: int = done,
      start: float = start,
      before: float = before,
    ) -> None:
      seconds = before + time.perf_counter() - start
      display.update(
        done=(epoch - 1) * workload.steps_per_epoch + done + steps,
        epoch=epoch,
        examples_per_second=(done + steps) * examples_per_step / seconds,
        loss=float(outputs["loss"]),
        head_weights=outputs["head_weights"].tolist(),
      )

    batches = workload.segment(seed, epoch, done)
    state, outputs = workload.step(state, workload.data, batches, show)
    progress.losses.extend(outputs["loss"].astype(np.float64).tolist())
    progress.head_weights.extend(outputs["head_weights"].astype(np.float64).tolist())
    progress.seconds += time.perf_counter() - start
    progress.skipped += workload.take_skipped()
    yield state


def best_epoch(history: list[Record], survives_divergence: bool = False) -> int | None:
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


def _ending(workload: Workload, plan: Plan, history: list[Record]) -> str | None:
  """Why a run is over: ``failed``, ``early`` or ``maximum``; None if it is not."""
  if history and not workload.survives_divergence:
    last = history[-1]
    if last["nonfinite_steps"] or not math.isfinite(last["validation_loss"]):
      return "failed"
  best = best_epoch(history, workload.survives_divergence) or 0
  if len(history) - best >= plan.patience:
    return "early"
  return "maximum" if len(history) >= plan.max_epochs else None


def _validate(
  workload: Workload, plan: Plan, state: PyTree, epoch: int, progress: _Progress
) -> tuple[PyTree, Record]:
  """Returns the snapshot after an epoch, and the epoch's record."""
  start = time.perf_counter()
  losses = np.array(progress.losses)
  snapshot = workload.snapshot(state, plan.seed, epoch)
  measured = {
    f"{part}_{name}": value
    for part in workload.watched
    for name, value in workload.evaluate(snapshot, part).items()
  }
  last = len(losses) - 1
  steps = np.unique(np.linspace(0, last, plan.posteriors_per_epoch + 1).astype(int))
  heads = np.array(progress.head_weights)
  record = {
    "kind": "epoch",
    "epoch": epoch,
    "train_loss": float(losses.mean()),
    **measured,
    "nonfinite_steps": int(np.sum(~np.isfinite(losses))),
    "steps": [int(step) for step in steps],
    "head_weights": heads[steps].round(5).tolist() if heads.shape[1] else [],
    "examples_per_second": workload.examples_per_epoch / progress.seconds,
    "seconds": progress.seconds + time.perf_counter() - start,
  }
  if workload.is_segmented:
    record["skipped"] = sorted({*progress.skipped, *workload.take_skipped()})
  return snapshot, record


def _summarize(
  workload: Workload,
  plan: Plan,
  history: list[Record],
  best: PyTree,
  ending: str,
) -> Record:
  """Tests the best epoch; returns the run's summary."""
  epoch = best_epoch(history, workload.survives_divergence)
  # Where no epoch has a finite loss, nothing is tested, and every measure is None.
  chosen = history[epoch - 1] if epoch else dict.fromkeys(history[0])
  names = [name for name in history[0] if name.startswith("validation_")]
  tested = workload.evaluate(best, "test") if epoch else {}
  skipped = {}
  if workload.is_segmented:
    skipped["skipped"] = sorted({*_skipped(history), *workload.take_skipped()})
  # The first epoch includes the compilation.
  speeds = [record["examples_per_second"] for record in history]
  return {
    "kind": "summary",
    "name": plan.name,
    "config": plan.config,
    "num_parameters": workload.num_parameters,
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


def _skipped(history: list[Record]) -> list[str]:
  """The names of the examples that epochs have left out."""
  return [name for record in history for name in record.get("skipped", ())]


def _to_host(tree: PyTree) -> PyTree:
  """Copies, since the buffers of a state are donated to the next step."""
  return jax.tree.map(lambda leaf: np.array(jax.device_get(leaf)), tree)


class Checkpoints:
  """The newest checkpoint of one run; used as a context manager.

  A checkpoint is written aside and renamed, so that a process killed at any moment
  leaves either the old or the new one. Trees are kept as lists of their leaves, since
  only the workload knows their types; leaves are arrays, no typed keys.
  """

  def __init__(self, folder: Path):
    """Opens the checkpoints below `folder`, which need not exist.

    Args:
      folder: One for each run.
    """
    self._folder = folder
    options = ocp.CheckpointManagerOptions(
      max_to_keep=1,
      # A kill shall lose the segment under way and not the one before.
      enable_async_checkpointing=False,
    )
    self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self._manager.close()

  def save(self, steps: int, tree: PyTree, notes: dict[str, Any]) -> None:
    """Keeps `tree` and `notes` (JSON) as the state after `steps`; drops the one before.

    Args:
      steps: Larger than at any call before.
      tree: Any pytree of arrays.
      notes: What else it takes to go on.
    """
    leaves = jax.tree.leaves(tree)
    args = ocp.args.Composite(
      leaves=ocp.args.StandardSave(_filled(leaves)), notes=ocp.args.JsonSave(notes)
    )
    try:
      if jax.process_index() == 0:
        self._reserve(sum(leaf.nbytes for leaf in leaves))
      self._manager.save(steps, args=args)
      self._manager.wait_until_finished()
      if jax.process_index() == 0:
        sums = {
          "steps": steps,
          "leaves": _describe_leaves(leaves),
          "files": self._sums(steps),
        }
        records.write_text(self._folder / SUMS, json.dumps(sums))
    except (OSError, ValueError, RuntimeError) as error:
      if found := DISK.search(str(error)):
        raise OutputError(
          f"the checkpoint {self._folder} can't be written ({found[0]}); make room, or "
          "give another --out. The one before is whole."
        ) from error
      raise

  def _reserve(self, size: int) -> None:
    """Fails on a full disk, before Orbax does, whose threads print pages."""
    if hasattr(os, "posix_fallocate"):
      with tempfile.TemporaryFile(dir=self._folder) as file:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))

  def restore(
    self, like: Callable[[dict[str, Any]], PyTree]
  ) -> tuple[PyTree, dict[str, Any]] | None:
    """Returns what was saved last, or None if nothing was.

    Args:
      like: Function of the notes that returns a tree of arrays of the structure, shapes
        and dtypes of the saved one.

    Raises:
      CheckpointError: What was saved is damaged, or of another structure.
    """
    try:
      return self._restore(like)
    except jax.errors.JaxRuntimeError:
      raise  # a device or a host is lost, not the checkpoint
    except Exception as error:  # Orbax, TensorStore and json raise what they like
      reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
      raise CheckpointError(
        f"the checkpoint {self._folder} can't be read ({type(error).__name__}: "
        f"{reason}); delete this folder, or run without --resume, to start this run "
        "anew."
      ) from error

  def _restore(
    self, like: Callable[[dict[str, Any]], PyTree]
  ) -> tuple[PyTree, dict[str, Any]] | None:
    steps = self._manager.latest_step()
    if steps is None:
      return None
    written = self._check_files(steps)
    found = self._manager.restore(
      steps, args=ocp.args.Composite(notes=ocp.args.JsonRestore())
    )
    notes = found["notes"]
    leaves, treedef = jax.tree.flatten(like(notes))
    if written is not None and written != _describe_leaves(leaves):
      raise ValueError("it is of another network or optimizer")
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _filled(leaves))
    args = ocp.args.Composite(leaves=ocp.args.StandardRestore(shapes))
    restored = iter(self._manager.restore(steps, args=args)["leaves"])
    leaves = [next(restored) if leaf.size else leaf for leaf in leaves]
    return jax.tree.unflatten(treedef, leaves), notes

  def _check_files(self, steps: int) -> list[str] | None:
    """Compares with what was written: Orbax trusts its files, and fails noisily.

    Returns:
      Shape and type of each leaf, as they were written; None if nothing tells.
    """
    path = self._folder / SUMS
    sums = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    # A process killed before it wrote the sums leaves none, or those of another step.
    if sums.get("steps") != steps:
      return None
    if sums["files"] != self._sums(steps):
      raise ValueError("its files are not as they were written")
    return sums["leaves"]

  def _sums(self, steps: int) -> dict[str, str]:
    """A checksum of each file of a checkpoint."""
    folder, sums = self._folder / str(steps), {}
    for path in sorted(folder.rglob("*")):
      if path.is_file():
        with path.open("rb") as file:
          digest = hashlib.file_digest(file, "blake2b").hexdigest()
        sums[path.relative_to(folder).as_posix()] = digest
    return sums


def num_entries(tree: PyTree) -> int:
  """Returns the number of a tree's numbers, such as of a network's parameters.

  Args:
    tree: Arrays or shapes.
  """
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def delete(folder: Path) -> None:
  """Deletes the checkpoints below `folder`, if there are any.

  Args:
    folder: One for each run; the one above is deleted with the last of them.
  """
  shutil.rmtree(folder, ignore_errors=True)
  with contextlib.suppress(OSError):
    folder.parent.rmdir()


def _describe_leaves(leaves: list[Any]) -> list[str]:
  """Shape and type of each."""
  return [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]


def _filled(leaves: list[Any]) -> list[Any]:
  """Orbax refuses arrays without entries."""
  return [leaf for leaf in leaves if leaf.size]
