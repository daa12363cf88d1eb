"""Decoded images, kept on disk: decoding CIFAR-10 from Parquet takes ten seconds."""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.files import check_file, reason

Arrays = dict[str, np.ndarray]


def cache_dir() -> Path:
  """Returns ``ALRAO_CACHE_DIR``, else this system's cache folder for alrao-jax."""
  import pooch

  return Path(os.environ.get("ALRAO_CACHE_DIR") or pooch.os_cache("alrao-jax"))


def cached(
  sources: Sequence[Path],
  decode: Callable[[], Arrays],
  check: Callable[[Arrays], Any] = lambda arrays: None,
  *,
  kind: str = "",
) -> Arrays:
  """Returns ``decode()``, from disk if `sources` are what they were when it was kept.

  There is one file for each set of sources and kind. It is written aside and renamed,
  so that a process killed half-way leaves none; one that is damaged is replaced.

  Args:
    sources: The files that `decode` reads, compared by size and time of change.
    decode: Function without arguments that returns arrays by name.
    check: Raises an error of any kind where arrays are not what `decode` returns:
      their names, shapes, dtypes, ranges. Checksums tell bytes that have changed on
      the disk, but not what another version or program has put there.
    kind: What is made of the sources, where several things are.

  Returns:
    The arrays.

  Raises:
    DataError: A source cannot be read.
  """
  for path in sources:
    check_file(path)
  stats = [path.stat() for path in sources]
  fingerprint = np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats])
  names = "\n".join([*(str(path.resolve()) for path in sources), *filter(None, [kind])])
  digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
  kept = cache_dir() / f"{digest[:16]}.npz"
  arrays = _read(kept, fingerprint, check)
  if arrays is None:
    arrays = decode()
    _keep(kept, {**arrays, "fingerprint": fingerprint})
  return arrays


def _read(
  kept: Path, fingerprint: np.ndarray, check: Callable[[Arrays], Any]
) -> Arrays | None:
  """What is kept; None if there is nothing yet, or it is old or damaged."""
  try:
    check_file(kept)
    with kept.open("rb") as file, np.load(file) as content:
      # As they were written: a compressed one could be of any size in memory.
      if any(entry.compress_type for entry in content.zip.infolist()):
        return None
      if not np.array_equal(content["fingerprint"], fingerprint):
        return None
      arrays = {name: content[name] for name in content if name != "fingerprint"}
    check(arrays)
  except Exception:  # a damaged file, read or checked, can raise anything
    return None
  return arrays


def _keep(kept: Path, content: dict[str, Any]) -> None:
  try:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as aside:
      np.savez(Path(aside) / kept.name, **content)
      os.replace(Path(aside) / kept.name, kept)
  except OSError as error:
    warnings.warn(
      f"could not keep the decoded images in {kept}: {reason(error)}", stacklevel=3
    )
