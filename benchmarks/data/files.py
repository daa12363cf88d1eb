"""Reading files that may be damaged: sizes checked first, faults told in one line."""

import errno
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from benchmarks.data.dataset import DataError

CHUNK = 2**20
MAX_REASON = 200  # characters of another library's error that are worth quoting


def reason(error: BaseException) -> str:
  """Returns why something failed, for the end of a `DataError`.

  Args:
    error: What another library raised.

  Example:
    >>> reason(KeyError("labels")), reason(RecursionError())
    ("KeyError: 'labels'", 'RecursionError')
    >>> reason(FileNotFoundError(2, "No such file or directory"))
    'No such file or directory'
  """
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = str(error)[:MAX_REASON].strip()
  return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def damage_told(start: str) -> Iterator[None]:
  """Turns what reading raises into a `DataError`; one of our own stays as it is.

  Libraries that parse damaged or hostile bytes raise whatever their code runs into, so
  this catches all errors: keep what it surrounds to the calls of such a library.

  Args:
    start: What the text begins with; the reason follows in brackets.

  Raises:
    DataError: The reading failed.
  """
  try:
    yield
  except DataError:
    raise
  except Exception as error:
    raise DataError(f"{start} ({reason(error)}); get it anew.") from error


def check_file(path: Path, max_bytes: int | None = None, *, pipe: bool = False) -> None:
  """Raises `DataError` unless a path leads to a file, of a size that can be.

  Args:
    path: Of the file.
    max_bytes: Largest size; by default any.
    pipe: Whether a pipe will do. To open one waits for whoever writes.
  """
  try:
    found = os.stat(path)
    if not os.access(path, os.R_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
  except (OSError, ValueError) as error:
    raise DataError(f"{path}: cannot be read ({reason(error)}).") from error
  if pipe and stat.S_ISFIFO(found.st_mode):
    return
  if not stat.S_ISREG(found.st_mode):
    kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
    raise DataError(f"{path}: cannot be read (it is {kind}, not a file).")
  if max_bytes is not None and found.st_size > max_bytes:
    raise DataError(f"{path}: holds {found.st_size:,} bytes, {_at_most(max_bytes)}")


def read_file(path: Path, max_bytes: int, *, pipe: bool = False) -> bytes:
  """Returns a file's content.

  Args:
    path: Of the file.
    max_bytes: Largest size that is read.
    pipe: Whether it may be a pipe.

  Raises:
    DataError: It is missing, unreadable, no file, or larger.
  """
  check_file(path, max_bytes, pipe=pipe)
  try:
    with path.open("rb") as file:
      # In pieces: the size of a pipe is not known, and that of a file can be wrong.
      stream = Bounded(path, file, max_bytes)
      return b"".join(iter(lambda: stream.read(CHUNK), b""))
  except OSError as error:
    raise DataError(f"{path}: cannot be read ({reason(error)}).") from error


def unzip(path: Path, content: bytes, max_bytes: int) -> bytes:
  """Returns what a gzip file's content stands for; nothing larger takes memory.

  Args:
    path: Of the file, for errors.
    content: Of the file.
    max_bytes: Largest size that is returned.

  Raises:
    DataError: It is damaged, or larger.
  """
  try:
    # Twice, since a file's own word for its size can be wrong.
    with gzip.open(io.BytesIO(content)) as file:
      bounded = Bounded(path, file, max_bytes)
      while bounded.read(CHUNK):
        pass
    return gzip.decompress(content)
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise DataError(f"{path}: damaged ({reason(error)}).") from error


class Bounded:
  """A stream that is read up to a number of bytes."""

  def __init__(self, path: Path, stream: BinaryIO | gzip.GzipFile, max_bytes: int):
    """Makes the stream.

    Args:
      path: Of the file that it comes from, for errors.
      stream: What to read.
      max_bytes: How much of it.
    """
    self._path, self._stream = path, stream
    self._max_bytes = self._left = max_bytes

  def read(self, size: int) -> bytes:
    """Returns the next bytes.

    Args:
      size: How many, at most.

    Raises:
      DataError: There is more in the stream than there may be.
    """
    content = self._stream.read(min(size, self._left + 1))
    self._left -= len(content)
    if self._left < 0:
      raise DataError(
        f"{self._path}: holds more than {self._max_bytes:,} bytes, so it is not what "
        "its name says; get it anew."
      )
    return content


def describe_missing(folder: Path) -> str:
  """Returns what to add where a folder has been searched in vain.

  Args:
    folder: The folder.

  Example:
    >>> describe_missing(Path("/no/such/folder")), describe_missing(Path("/"))
    (' (no such folder)', '')
  """
  try:
    with os.scandir(folder):
      return ""
  except FileNotFoundError:
    return " (no such folder)"
  except (OSError, ValueError) as error:
    return f" ({reason(error)})"


def _at_most(max_bytes: int) -> str:
  return f"expected at most {max_bytes:,}; it is not what its name says."
