"""Decoded images, kept on disk: decoding CIFAR-10 from Parquet takes ten seconds."""

import hashlib
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def cache_dir() -> Path:
  """Returns ``ALRAO_CACHE_DIR``, else this system's cache folder for alrao-jax."""
  import pooch

  return Path(os.environ.get("ALRAO_CACHE_DIR") or pooch.os_cache("alrao-jax"))


def cached(sources: Sequence[Path], decode: Callable[[], Arrays]) -> Arrays:
  """Returns ``decode()``, from disk if `sources` are what they were when it was kept.

  There is one file for each set of sources. It is written aside and renamed, so that a
  process killed half-way leaves none; one that cannot be read is replaced.

  Args:
    sources: The files that `decode` reads, compared by size and time of change.
    decode: Function without arguments that returns arrays by name.

  Returns:
    The arrays.
  """
  stats = [path.stat() for path in sources]
  fingerprint = np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats])
  names = "\n".join(str(path.resolve()) for path in sources)
  kept = cache_dir() / f"{hashlib.sha256(names.encode()).hexdigest()[:16]}.npz"
  try:
    with kept.open("rb") as file, np.load(file) as content:
      if np.array_equal(content["fingerprint"], fingerprint):
        return {name: content[name] for name in content if name != "fingerprint"}
  except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
    pass  # none yet, or a damaged one (zip files carry checksums)
  arrays = decode()
  content: dict[str, Any] = {**arrays, "fingerprint": fingerprint}
  try:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as aside:
      np.savez(Path(aside) / kept.name, **content)
      os.replace(Path(aside) / kept.name, kept)
  except OSError as error:
    warnings.warn(f"could not keep the decoded images: {error}", stacklevel=2)
  return arrays
