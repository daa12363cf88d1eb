"""What CIFAR-10's own two layouts share: files of images in a folder or archive."""

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.data.dataset import DataError, Split

NUM_CLASSES = 10
ROW = 3 * 32 * 32

# (name of a file for errors, its content, number of images) -> images, labels.
Parse = Callable[[str, bytes, int], Split]


class BatchFiles(NamedTuple):
  """A layout of equal training files and one test file.

  Attributes:
    folder: The folder's official name.
    archive: Name of the ``.tar.gz`` that holds it.
    train_names: Names of the training files, in order.
    test_name: Name of the test file.
    parse: Reads one file.
  """

  folder: str
  archive: str
  train_names: tuple[str, ...]
  test_name: str
  parse: Parse

  def find(self, folder: Path) -> Path | None:
    """Returns what to `read` in a folder: the folder itself, an archive, or None."""
    if folder.name == self.folder or (folder / self.train_names[0]).is_file():
      return folder
    archive = folder / self.archive
    return archive if archive.is_file() else None

  def read(self, path: Path, counts: tuple[int, int]) -> tuple[Split, Split]:
    """Reads the data.

    Args:
      path: The folder, or the archive.
      counts: Numbers of training and test images.

    Returns:
      Training and test data.

    Raises:
      DataError: A file is missing, unreadable, or not what it should be.
    """
    num_train, num_test = counts
    sizes = dict.fromkeys(self.train_names, num_train // len(self.train_names))
    sizes[self.test_name] = num_test
    files = _archive_files if path.is_file() else _folder_files
    batches = {
      name: self.parse(f"{path}/{name}", content, sizes[name])
      for name, content in files(path, list(sizes))
    }
    missing = [name for name in sizes if name not in batches]
    if missing:
      raise DataError(f"{path}: no {', '.join(missing)} in it; get it anew.")
    test = batches.pop(self.test_name)
    train = [batches[name] for name in self.train_names]
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return Split(images, labels), test


def rows_to_images(rows: np.ndarray) -> np.ndarray:
  """Turns rows (n, 3072), channel after channel, into images (n, 32, 32, 3)."""
  return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _folder_files(path: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
  for name in names:
    try:
      content = (path / name).read_bytes()
    except FileNotFoundError:
      continue  # named together with all others that are missing
    except OSError as error:
      raise DataError(f"{path / name}: cannot be read ({error}).") from error
    yield name, content


def _archive_files(path: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
  try:
    with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
      for member in archive:
        name = Path(member.name).name
        content = archive.extractfile(member) if name in names else None
        if content is not None:
          yield name, content.read()
      # The archive's checksum stands at its end.
      while stream.read(2**20):
        pass
  except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
    raise DataError(f"{path}: truncated or damaged ({error}); get it anew.") from error
