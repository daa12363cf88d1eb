"""What runs leave behind: a file for each while they train, then a line in an archive.

A run in ``out/`` writes its own file, a JSON line an epoch and a summary at its end.
`collect` folds the files of runs that have ended into one archive, such as
``benchmarks/results/tier_b.jsonl``: each environment once, then one line a run, whose
epochs are columns. `load` reads both.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import alrao_jax

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
DIGITS, POSTERIOR_DIGITS = 6, 3  # significant digits in an archive
# Studies whose numbers need posteriors within an epoch, and whether they need all, or
# only those next to a change of the heaviest head.
SAMPLED = {"posterior": "all", "averaging": "changes"}
PARTS = 100_000  # of a weight of 1; a sample's weights are whole numbers of these

# What every line has; all else depends on what is trained.
KEYS = {
  "epoch": {"epoch", "train_loss", "validation_loss"},
  "summary": {"name", "config", "environment", "date"},
  "cost": {"environment", "date"},
}
# What tells one cost from another.
COST_OPTIONS = ("table", "suite", "study", "task", "case", "title", "optimizer")

Record = dict[str, Any]


class RecordError(ValueError):
  """A file that does not hold records, or too few of them; the text names it."""


@dataclasses.dataclass(frozen=True)
class Run:
  """One run that has ended.

  Attributes:
    summary: Its summary.
    epochs: The records of its epochs.
  """

  summary: Record
  epochs: list[Record]

  @property
  def config(self) -> Record:
    """The run's options."""
    return self.summary["config"]

  @property
  def name(self) -> str:
    """The run's name."""
    return self.summary["name"]

  @property
  def failed(self) -> bool:
    """Whether a loss that was not finite ended the run."""
    return self.summary["ending"] == "failed"

  def curve(self, name: str) -> np.ndarray:
    """Returns a measure by epoch, (epochs,); nan where it was not finite.

    Args:
      name: Its name in the records, such as ``"validation_loss"``.
    """
    return np.array([epoch[name] for epoch in self.epochs], float)


class Counts(NamedTuple):
  """What `collect` has found.

  Attributes:
    added: Number of runs and costs that the archive did not have.
    replaced: Number of those that it had.
    unfinished: Number of runs that have not ended, which it leaves out.
  """

  added: int
  replaced: int
  unfinished: int


def archive(name: str) -> Path:
  """Returns the archive of a suite's preset or of a study.

  Args:
    name: Its name.
  """
  return RESULTS / f"{name}.jsonl"


def write(path: Path, records: Iterable[Record]) -> None:
  """Writes records as JSON lines, aside and renamed: whole or not at all.

  Numbers that are not finite become null, which every reader of JSON knows.

  Args:
    path: The file; its folder is made if need be.
    records: What `json` can write.
  """
  text = "".join(
    json.dumps(_finite(record), allow_nan=False) + "\n" for record in records
  )
  write_text(path, text)


def write_text(path: Path, text: str) -> None:
  """Writes a text file, aside and renamed: whole or not at all.

  Args:
    path: The file; its folder is made if need be.
    text: Its content.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as aside:
    part = Path(aside) / path.name
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read(path: Path) -> list[Record]:
  """Reads the records of one run, or of costs.

  Args:
    path: A file that `write` wrote.

  Raises:
    RecordError: The file is no such file.
  """
  records = _lines(path)
  for number, record in enumerate(records, 1):
    kind = record.get("kind")
    if kind not in KEYS:
      raise _damaged(path, number, "is neither an epoch nor a summary")
    missing = KEYS[kind] - set(record)
    if missing:
      raise _damaged(path, number, f"is {kind} without {', '.join(sorted(missing))}")
    if kind != "epoch" and not isinstance(record["environment"], dict):
      raise _damaged(path, number, f"is {kind} without an environment")
    if kind == "summary" and not isinstance(record["config"], dict):
      raise _damaged(path, number, "is summary without options")
    if kind == "summary" and number < len(records):
      raise _damaged(path, number, "is a summary, with more lines behind it")
    if kind == "epoch" and record["epoch"] != number:
      raise _damaged(path, number, f"is not epoch {number}")
  return records


def read_summary(path: Path) -> Record | None:
  """Returns the summary of a run that has ended, or None.

  Args:
    path: A run's file, which need not exist.
  """
  records = read(path) if path.exists() else []
  ended = bool(records) and records[-1]["kind"] == "summary"
  return records[-1] if ended else None


def load(places: Iterable[Path]) -> list[Run]:
  """Reads all runs that have ended.

  Args:
    places: Archives, runs' own files, or folders of these, with their subfolders.

  Raises:
    RecordError: A file is damaged, or no run has ended.
  """
  places = list(places)
  runs = [run for path in _files(places) for run in _read_any(path).runs]
  if not runs:
    names = ", ".join(map(str, places))
    raise RecordError(f"no run that has ended below {names}; name it with --results.")
  return runs


def load_costs(places: Iterable[Path]) -> list[Record]:
  """Reads all measured costs.

  Args:
    places: As in `load`.

  Returns:
    The records, which may be none.

  Raises:
    RecordError: A file is damaged.
  """
  return [cost for path in _files(places) for cost in _read_any(path).costs]


def collect(folder: Path, path: Path) -> Counts:
  """Folds the runs that have ended, and costs, into an archive.

  A run takes the place of one with its name, a cost that of one of the same thing.

  Args:
    folder: The folder of runs' files, with its subfolders, or one such file.
    path: The archive, which need not exist.

  Returns:
    How many there were.

  Raises:
    RecordError: A file is damaged, or nothing has ended.
  """
  found = [_read_any(each) for each in _files([folder])]
  new = {_identity(item): item for one in found for item in (*one.runs, *one.costs)}
  if not new:
    raise RecordError(f"no run that has ended below {folder}: nothing to collect.")
  old = _read_any(path) if path.exists() else _Content([], [], 0)
  kept = {_identity(item): item for item in (*old.runs, *old.costs)}
  _write_archive(path, [*{**kept, **new}.values()])
  replaced = len(set(new) & set(kept))
  return Counts(len(new) - replaced, replaced, sum(one.unfinished for one in found))


@functools.cache
def environment() -> Record:
  """Returns what results depend on besides the options: versions, device, commit.

  ``cores`` counts those that the process may use. Records of before 2026-11-29 count
  those of the machine.
  """
  device = jax.local_devices()[0]
  return {
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in PACKAGES},
    "alrao_jax": alrao_jax.__version__,
    "backend": device.platform,
    "device": device.device_kind,
    "cores": _num_cores(),
    "commit": _commit(),
  }


def now() -> Record:
  """Returns what a measurement made now says of itself: environment and date."""
  return {
    "environment": environment(),
    "date": datetime.date.today().isoformat(),
  }


def conditions(found: Record) -> str:
  """Returns under what a measurement was made, as a sentence.

  Args:
    found: The measurement, with ``environment`` and ``date``; ``rounds`` and ``steps``
      where it has them.
  """
  counts = [f"{found[name]} {name}" for name in ("rounds", "steps") if name in found]
  return "; ".join([*filter(None, [" of ".join(counts)]), conditions_of_all([found])])


def conditions_of_all(found: Iterable[Record]) -> str:
  """Returns under what measurements of several days and commits were made.

  Args:
    found: The measurements, each with ``environment`` and ``date``.
  """
  found = list(found)
  names = (
    "device",
    "cores",
    "devices",
    "jax",
    "flax",
    "optax",
    "torch",
    "libtpu",
    "alrao_jax",
    "commit",
  )
  parts = []
  for name in names:
    values = [each["environment"].get(name) for each in found]
    known = sorted({_short(name, value) for value in values if value is not None})
    parts += [f"{name} {' and '.join(known)}"] if known else []
  dates = " and ".join(sorted({each["date"] for each in found}))
  return f"{', '.join(parts)}; {dates}."


def peak_memory() -> Record:
  """Returns the most memory that this process has used so far, in bytes.

  ``host`` is resident memory; ``device`` is None where the backend doesn't count.
  """
  # Kilobytes, but bytes on macOS.
  unit = 1 if sys.platform == "darwin" else 1024
  # Only local devices report memory.
  stats = jax.local_devices()[0].memory_stats() or {}
  return {
    "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    "device": stats.get("peak_bytes_in_use"),
  }


class _Content(NamedTuple):
  """What a file holds: runs that have ended, costs, and how many runs have not."""

  runs: list[Run]
  costs: list[Record]
  unfinished: int


def _files(places: Iterable[Path]) -> list[Path]:
  """The files of records below some places."""
  files = []
  for place in places:
    if place.is_dir():
      found = sorted(place.rglob("*.jsonl"))
      # What a kill left behind is hidden.
      files += [path for path in found if "/." not in f"/{path.relative_to(place)}"]
    elif place.exists():
      files.append(place)
  return files


def _read_any(path: Path) -> _Content:
  """Reads an archive, a run's own file, or a file of costs."""
  if _is_archive(path):
    return _read_archive(path)
  records = read(path)
  costs = [record for record in records if record["kind"] == "cost"]
  epochs = [record for record in records if record["kind"] == "epoch"]
  if records and records[-1]["kind"] == "summary":
    return _Content([Run(records[-1], epochs)], costs, 0)
  return _Content([], costs, 1 if epochs else 0)


def _is_archive(path: Path) -> bool:
  with path.open("rb") as file:
    try:
      first = json.loads(file.readline())
    except ValueError:
      return False  # `read` says what is wrong
  return isinstance(first, dict) and first.get("kind") == "environment"


def _read_archive(path: Path) -> _Content:
  environments: list[Record] = []
  runs, costs = [], []
  for number, record in enumerate(_lines(path), 1):
    kind = record.pop("kind", None)
    if kind == "environment":
      environments.append(record)
      continue
    try:
      record["environment"] = environments[record["environment"]]
      if kind == "run":
        runs.append(_unfold(record))
      elif kind == "cost":
        costs.append({"kind": "cost", **record})
      else:
        raise _damaged(path, number, "is neither an environment, a run nor a cost")
    except (AttributeError, LookupError, TypeError) as error:
      raise _damaged(path, number, f"lacks a part of a {kind} ({error!r})") from error
  return _Content(runs, costs, 0)


def _write_archive(path: Path, items: Sequence[Run | Record]) -> None:
  environments: list[Record] = []
  lines = []
  for item in items:
    about = item.summary if isinstance(item, Run) else item
    found = about["environment"]
    if found not in environments:
      environments.append(found)
    line = _fold(item) if isinstance(item, Run) else _rounded(item, DIGITS)
    lines.append({**line, "environment": environments.index(found)})
  head = [{"kind": "environment", **found} for found in environments]
  text = "".join(
    json.dumps(_finite(line), allow_nan=False, separators=(",", ":")) + "\n"
    for line in (*head, *lines)
  )
  write_text(path, text)


def _fold(run: Run) -> Record:
  """A run as one line; `_unfold` is its inverse, but for digits."""
  options = {"name": run.name, "config": run.config}
  followed = _following(run.summary, run.epochs)
  rest = {
    name: value
    for name, value in run.summary.items()
    if name not in (*options, "kind") and not _equal(value, followed.get(name, _NONE))
  }
  line = {"kind": "run", **options, **_rounded(rest, DIGITS)}
  line["curves"] = {
    name: _rounded([epoch[name] for epoch in run.epochs], DIGITS)
    for name in (run.epochs[0] if run.epochs else ())
    if name not in ("kind", "epoch", "steps", "head_weights", "skipped")
  }
  if any(epoch.get("skipped") for epoch in run.epochs):
    line["curves"]["skipped"] = [epoch["skipped"] for epoch in run.epochs]
  if any(epoch.get("head_weights") for epoch in run.epochs):
    which = SAMPLED.get(run.config.get("study", ""))
    line |= _samples(run.epochs, which) if which else _last_posteriors(run.epochs)
  return line


_NONE = object()


def _last_posteriors(epochs: list[Record]) -> Record:
  weights = [e["head_weights"][-1] if e["head_weights"] else None for e in epochs]
  steps = [e["steps"][-1] if e["steps"] else None for e in epochs]
  return {"steps": steps, "posteriors": _rounded(weights, POSTERIOR_DIGITS)}


def _samples(epochs: list[Record], which: str) -> Record:
  """Posteriors within epochs; the steps of all are given as their number."""
  steps = [epoch["steps"] for epoch in epochs]
  weights = [epoch["head_weights"] for epoch in epochs]
  if which == "changes":
    leaders = [np.argmax(one) for of_epoch in weights for one in of_epoch]
    changes = np.flatnonzero(np.diff(leaders))
    kept = {*changes, *(changes + 1)}
    start = 0
    for i, of_epoch in enumerate(weights):
      last = len(of_epoch) - 1
      at = [j for j in range(last + 1) if start + j in kept or j == last]
      steps[i], weights[i] = ([x[j] for j in at] for x in (steps[i], of_epoch))
      start += last + 1
  return {
    "steps": [len(s) if s == list(range(len(s))) else s for s in steps],
    "samples": [
      [[round(weight * PARTS) for weight in one] for one in of_epoch]
      for of_epoch in weights
    ],
  }


def _unfold(line: Record) -> Run:
  curves = line.pop("curves")
  steps, posteriors = line.pop("steps", None), line.pop("posteriors", None)
  samples = line.pop("samples", None)
  length = len(next(iter(curves.values()), ()))
  epochs: list[Record] = []
  for i in range(length):
    found: list[Any] = []
    at: list[Any] = []
    if samples is not None:
      found = [[part / PARTS for part in weights] for weights in samples[i]]
      at = list(range(steps[i])) if isinstance(steps[i], int) else steps[i]
    elif posteriors is not None and posteriors[i] is not None:
      found, at = [posteriors[i]], [steps[i]]
    columns = {name: values[i] for name, values in curves.items()}
    epochs.append(
      {"kind": "epoch", "epoch": i + 1, **columns, "steps": at, "head_weights": found}
    )
  summary = {"kind": "summary", **_following(line, epochs), **line}
  return Run(summary, epochs)


def _following(summary: Record, epochs: list[Record]) -> Record:
  """What a summary says that follows from its epochs."""
  if not epochs:
    return {}
  best = summary.get("best_epoch")
  # Where no epoch has a finite loss, every measure is None.
  chosen = epochs[best - 1] if best else dict.fromkeys(epochs[0])
  found: Record = {"epochs": len(epochs), "train_loss": chosen["train_loss"]}
  found |= {name: chosen[name] for name in epochs[0] if name.startswith("validation_")}
  if "examples_per_second" in epochs[0]:
    # The first epoch includes the compilation.
    speeds = [epoch["examples_per_second"] for epoch in epochs]
    found["examples_per_second"] = float(np.median(speeds[1:] or speeds))
  if "seconds" in epochs[0]:
    found["seconds"] = sum(epoch["seconds"] for epoch in epochs)
  return found


def _equal(one: Any, other: Any) -> bool:
  """Whether two values are, to the digits that are kept."""
  if isinstance(one, float) and isinstance(other, (int, float)):
    both_nan = math.isnan(one) and math.isnan(other)
    return both_nan or math.isclose(one, other, rel_tol=10.0**-DIGITS)
  return type(one) is type(other) and one == other


def _rounded(value: Any, digits: int) -> Any:
  """Rounds all floats to a number of significant digits."""
  if isinstance(value, float):
    return float(f"{value:.{digits}g}")
  if isinstance(value, dict):
    return {key: _rounded(item, digits) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_rounded(item, digits) for item in value]
  return value


def _identity(item: Run | Record) -> tuple:
  if isinstance(item, Run):
    return ("run", item.name)
  return ("cost", *(item.get(name) for name in COST_OPTIONS))


def _lines(path: Path) -> list[Record]:
  """The JSON objects of a file."""
  try:
    text = path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    text = f"{path} is damaged: not text ({error}). {_advice(path)}"
    raise RecordError(text) from error
  found = []
  for number, line in enumerate(text.splitlines(), 1):
    try:
      record = json.loads(line)
    except ValueError as error:
      raise _damaged(path, number, f"is not JSON ({error})") from error
    if not isinstance(record, dict):
      raise _damaged(path, number, "is not a JSON object")
    found.append(record)
  return found


def _damaged(path: Path, number: int, what: str) -> RecordError:
  return RecordError(f"{path} is damaged: line {number} {what}. {_advice(path)}")


def _advice(path: Path) -> str:
  if path.parent == RESULTS:
    return f"Restore it: git checkout {path.relative_to(ROOT)}"
  return "Delete it, and the same command trains that run again."


def _short(name: str, value: Any) -> str:
  # A commit's first digits, and the + of files that have changed since.
  value = str(value)
  return value[:12] + "+" * value.endswith("+") if name == "commit" else value


def _num_cores() -> int | None:
  """Returns how many cores this process may use: fewer than all under ``taskset``."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def _commit() -> str:
  """Returns this checkout's commit, with a + if files have changed, or unknown."""
  try:
    described = subprocess.run(
      ["git", "describe", "--always", "--abbrev=40", "--match=", "--dirty=+"],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return described.stdout.strip()


def _finite(value: Any) -> Any:
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return value
