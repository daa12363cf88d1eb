"""What runs leave behind: a file for each, one JSON line an epoch and a summary."""

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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

import alrao_jax

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")

Record = dict[str, Any]


class RecordError(ValueError):
  """A file that does not hold a run's records; the text names it."""


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
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as aside:
    part = Path(aside) / path.name
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read(path: Path) -> list[Record]:
  """Reads the records of one run.

  Args:
    path: A file that `write` wrote.

  Raises:
    RecordError: The file is no such file.
  """
  records = []
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise RecordError(f"{path}, line {number}: not JSON ({error}).") from error
    if not isinstance(record, dict) or record.get("kind") not in ("epoch", "summary"):
      raise RecordError(f"{path}, line {number}: neither an epoch nor a summary.")
    records.append(record)
  return records


def read_summary(path: Path) -> Record | None:
  """Returns the summary of a run that has ended, or None.

  Args:
    path: A run's file, which need not exist.
  """
  records = read(path) if path.exists() else []
  ended = bool(records) and records[-1]["kind"] == "summary"
  return records[-1] if ended else None


@functools.cache
def environment() -> Record:
  """Returns what results depend on besides the options: versions, device, commit.

  The cores are those that the process may use; in records of before 2026-11-29 those
  of the machine.
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


def _short(name: str, value: Any) -> str:
  # A commit's first digits, and the + of files that have changed since.
  value = str(value)
  return value[:12] + "+" * value.endswith("+") if name == "commit" else value


def _num_cores() -> int | None:
  """How many cores this process may use: fewer than there are under ``taskset``."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def _commit() -> str:
  """The commit of this checkout, with a + if files have changed since; or unknown."""
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


def peak_memory() -> Record:
  """Returns the most memory in use so far by this process, in bytes.

  ``host`` is resident memory; ``device`` is None where the backend doesn't count.
  """
  # Kilobytes, but bytes on macOS.
  unit = 1 if sys.platform == "darwin" else 1024
  # Of several hosts, each can ask its own devices alone.
  stats = jax.local_devices()[0].memory_stats() or {}
  return {
    "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    "device": stats.get("peak_bytes_in_use"),
  }


def _finite(value: Any) -> Any:
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return value
