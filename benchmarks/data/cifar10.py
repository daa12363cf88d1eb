"""CIFAR-10, in whichever layout it lies below a folder."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.data import cifar_binary, cifar_parquet, cifar_pickle
from benchmarks.data.dataset import DataError, Dataset
from benchmarks.data.download import URL, download_cifar10

COUNTS = (50_000, 10_000)
PICKLE, BINARY = cifar_pickle.LAYOUT, cifar_binary.LAYOUT
CLASS_NAMES = (
  "airplane",
  "automobile",
  "bird",
  "cat",
  "deer",
  "dog",
  "frog",
  "horse",
  "ship",
  "truck",
)


def load(
  data_dir: Path, *, download: bool = False, counts: tuple[int, int] = COUNTS
) -> Dataset:
  """Finds and reads CIFAR-10; `benchmarks.data.load` says how."""
  found = _find(data_dir)
  if found is None and download:
    download_cifar10(data_dir)
    found = _find(data_dir)
  if found is None:
    state = "" if data_dir.is_dir() else " (no such folder)"
    raise DataError(
      f"no CIFAR-10 below {data_dir}{state}. Put there any of: {PICKLE.archive} or "
      f"{BINARY.archive} (from {URL.rpartition('/')[0]}), a folder {PICKLE.folder} "
      f"or {BINARY.folder}, or a folder 'cifar10' with the Hugging Face hub's "
      "train*.parquet and test*.parquet. Or name another folder (--data-dir, "
      "ALRAO_DATA_DIR), allow the download (--download), or try --dataset digits, "
      "which needs no files."
    )
  layout, path = found
  train, test = layout.read(path, counts)
  return Dataset(
    name="cifar10",
    train_images=train.images,
    train_labels=train.labels,
    test_images=test.images,
    test_labels=test.labels,
    class_names=CLASS_NAMES,
    can_flip=True,
    source=str(path),
  )


def _find(data_dir: Path):
  """Returns the first layout found and where, quickest layouts first, or None."""
  folders = list(_folders(data_dir))
  # Parquet shards look alike whatever they hold: go by the folder's name.
  named = [path for path in folders if path == data_dir or _is_named(path, data_dir)]
  for layout, places in ((PICKLE, folders), (BINARY, folders), (cifar_parquet, named)):
    for folder in places:
      path = layout.find(folder)
      if path is not None:
        return layout, path
  return None


def _folders(data_dir: Path) -> Iterator[Path]:
  """All folders to look in: two levels, and six where the name promises CIFAR-10."""
  for name, subfolders, _ in os.walk(data_dir, followlinks=True):
    folder = Path(name)
    depth = len(folder.relative_to(data_dir).parts)
    if depth >= (6 if _is_named(folder, data_dir) else 2):
      subfolders.clear()
    subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    yield folder


def _is_named(folder: Path, data_dir: Path) -> bool:
  path = f"{data_dir.name}/{folder.relative_to(data_dir)}"
  return re.search(r"cifar[-_]?10(?!0)", path, re.IGNORECASE) is not None
