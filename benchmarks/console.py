"""What a person sees of a run while it trains, and is told of options that fail."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import rich.console
import rich.progress

BLOCKS = "▁▂▃▄▅▆▇█"
PART = ".part-"  # how the folders begin in which files are written aside
LOCK = ".lock"
MAX_SEED = 2**32 - 1  # the largest that JAX takes without 64-bit numbers

# What a disk says of a folder that can't be written.
DISK_ERRORS = frozenset(
  getattr(errno, name)
  for name in (
    "EACCES EPERM EROFS ENOENT ENOTDIR EISDIR EEXIST ENAMETOOLONG ELOOP ENOSPC EDQUOT "
    "EFBIG EIO EINVAL ESTALE"
  ).split()
  if hasattr(errno, name)
)

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))


class OptionError(ValueError):
  """Options that make no run; the text says why."""


class OutputError(ValueError):
  """Results that can't be written; the text says where, and what to do."""


def refuse(name: str, rule: str, value: Any) -> NoReturn:
  """Raises the error for an option's value.

  Args:
    name: Name of the option.
    rule: What it must be.
    value: What it is.

  Raises:
    OptionError: Always.
  """
  raise OptionError(f"--{name.replace('_', '-')} {rule}, got {value}.")


def check_seed(seed: int) -> None:
  """Checks that random keys can be made from a seed.

  Args:
    seed: The seed.

  Raises:
    OptionError: It is out of range.
  """
  if not 0 <= seed <= MAX_SEED:
    refuse("seed", "must be from 0 to 2^32 - 1", seed)


def check_seeds(count: int, at_least: int = 1) -> None:
  """Checks a number of runs, whose seeds count from 0.

  Args:
    count: The number.
    at_least: The smallest that makes sense.

  Raises:
    OptionError: It is smaller, or there are not as many seeds.
  """
  if not at_least <= count <= MAX_SEED + 1:
    refuse("seeds", f"must be at least {at_least}, at most 2^32", count)


@contextlib.contextmanager
def writing_to(out: Path, *, writes: bool = True) -> Iterator[None]:
  """Makes a folder for results, and keeps other processes from writing there.

  What a killed process left half-written is removed. The lock is the operating
  system's, so it ends with the process, however that ends.

  Args:
    out: The folder.
    writes: Whether this process writes. Only one of several hosts does.

  Raises:
    OutputError: The folder can't be written, or another process writes there.
  """
  if not writes:
    yield
    return
  try:
    out.mkdir(parents=True, exist_ok=True)
    lock = _lock(out / LOCK)
  except BlockingIOError as error:
    raise OutputError(
      f"--out {out} is in use by another process; wait for it, or give another folder."
    ) from error
  except OSError as error:
    raise OutputError(explain(error, out)) from error
  try:
    for leftover in out.glob(f"{PART}*"):
      shutil.rmtree(leftover, ignore_errors=True)
    yield
  except OSError as error:
    if _is_about(error, out):
      raise OutputError(explain(error, out)) from error
    raise
  finally:
    with contextlib.suppress(OSError):
      (out / LOCK).unlink()
    os.close(lock)


def _is_about(error: OSError, out: Path) -> bool:
  """Whether an error comes from writing below a folder."""
  if error.errno not in DISK_ERRORS:
    return False
  if error.filename is None:  # as when a file that is open can't grow
    return error.errno in FULL
  return out.resolve() in Path(str(error.filename)).resolve().parents


def explain(error: OSError, out: Path) -> str:
  """Returns what to tell of a folder or file that can't be written.

  Args:
    error: What the operating system said.
    out: What was to be written.
  """
  place = str(out)
  place = place if len(place) <= 200 else f"{place[:200]}..."
  reason = error.strerror or str(error)
  return f"--out {place} can't be written ({reason}); give another folder."


def _lock(path: Path) -> int:
  """Locks a file; returns its descriptor, which holds the lock while it is open."""
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      with contextlib.suppress(FileNotFoundError):
        # The process that held it may have removed the file in between.
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
          return descriptor
    except BaseException:
      os.close(descriptor)
      raise
    os.close(descriptor)


def sparkline(values: Sequence[float]) -> str:
  """Returns one bar for each value in [0, 1].

  Args:
    values: Numbers in [0, 1], such as the weights of the heads.

  Example:
    >>> sparkline([0.0, 0.3, 0.7, 1.0])
    '▁▃▆█'
  """
  return "".join(BLOCKS[round(value * (len(BLOCKS) - 1))] for value in values)


class Display:
  """A progress bar for one run after the other; used as a context manager.

  The bar shows the speed, the loss, time left (to the maximum number of epochs)
  and the weight of each of Alrao's heads, from the slowest to the fastest. Where there
  is no terminal, every epoch is a line instead.
  """

  def __init__(self, console: rich.console.Console | None = None):
    """Makes the display.

    Args:
      console: Where to write, by default standard output.
    """
    self.console = console or rich.console.Console()
    self._live = self.console.is_terminal
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn("{task.description}"),
      rich.progress.BarColumn(),
      rich.progress.TextColumn("epoch {task.fields[epoch]}"),
      rich.progress.TextColumn("{task.fields[speed]}"),
      rich.progress.TextColumn("{task.fields[loss]}"),
      rich.progress.TimeRemainingColumn(),
      rich.progress.TextColumn("{task.fields[heads]}"),
      console=self.console,
      transient=True,
      disable=not self._live,
    )
    self._task: rich.progress.TaskID | None = None
    self._name, self._examples = "", ""

  def __enter__(self) -> "Display":
    self._progress.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._progress.stop()

  def begin(self, name: str, examples: str, total: int, done: int) -> None:
    """Shows a new run in place of the one before.

    Args:
      name: Its name.
      examples: What it trains on, in the plural, whose number a second is its speed.
      total: Number of steps, if it runs to the maximum of epochs.
      done: Number of steps that it has done already.
    """
    if self._task is not None:
      self._progress.remove_task(self._task)
    self._name, self._examples = name, examples
    self._task = self._progress.add_task(
      name, total=total, completed=done, epoch="-", speed="", loss="", heads=""
    )

  def update(
    self,
    done: int,
    epoch: int,
    examples_per_second: float,
    loss: float,
    head_weights: Sequence[float],
  ) -> None:
    """Moves the bar.

    Args:
      done: Number of steps done in all.
      epoch: The epoch under way.
      examples_per_second: Speed in this epoch.
      loss: Loss of the last batch.
      head_weights: Weight of each head; empty without heads.
    """
    if self._task is not None:
      self._progress.update(
        self._task,
        completed=done,
        epoch=epoch,
        speed=f"{examples_per_second:,.0f} {self._examples}/s",
        loss=f"loss {loss:.3f}",
        heads=sparkline(head_weights),
      )

  def end_epoch(self, record: dict) -> None:
    """Prints an epoch's record, where there is no bar.

    Args:
      record: The epoch's record.
    """
    if not self._live:
      heads = sparkline(record["head_weights"][-1]) if record["head_weights"] else ""
      validation = "  ".join(
        f"{name.replace('_', ' ')} {value:.4f}"
        for name, value in record.items()
        if name.startswith("validation_") and not isinstance(value, list)
      )
      self.console.print(
        f"{self._name}  epoch {record['epoch']}  "
        f"{record['examples_per_second']:,.0f} {self._examples}/s  "
        f"train loss {record['train_loss']:.4f}  {validation}  {heads}",
        highlight=False,
        soft_wrap=True,
      )

  def say(self, text: str) -> None:
    """Prints a line.

    Args:
      text: The line.
    """
    self.console.print(text, highlight=False, soft_wrap=True)


def describe(summary: dict[str, Any]) -> str:
  """Returns a run's outcome in a line.

  Args:
    summary: The run's summary.
  """
  if summary["test_loss"] is None:
    outcome = "no epoch with a finite validation loss"
  else:
    measured = ", ".join(
      f"{name.replace('_', ' ')} {value:.4f}"
      for name, value in summary.items()
      if name.startswith("test_")
    )
    outcome = f"{measured}, at epoch {summary['best_epoch']}"
  ending = {
    "early": f"stopped early after {summary['epochs']}",
    "maximum": f"hit the maximum of {summary['epochs']}",
    "failed": f"FAILED in epoch {summary['epochs']}: a loss was not finite",
  }[summary["ending"]]
  return f"{summary['name']}: {outcome} ({ending}; {summary['seconds']:.0f} s)"
