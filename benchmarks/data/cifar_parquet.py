"""CIFAR-10 as the Hugging Face hub ships it: Parquet shards of PNG or WebP images."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from benchmarks.data.cache import cached
from benchmarks.data.cifar_batches import NUM_CLASSES
from benchmarks.data.dataset import DataError, Split, check_labels
from benchmarks.data.parquet import (
  check_complete,
  check_no_label_missing,
  damaged,
  find_shards,
  open_shard,
)

SHAPE = (32, 32, 3)


def find(folder: Path) -> Path | None:
  """Returns the folder if it holds shards, else None."""
  return folder if find_shards(folder, "train") or find_shards(folder, "test") else None


def read(path: Path, counts: tuple[int, int]) -> tuple[Split, Split]:
  """Reads training and test data from the shards of a folder.

  The first reading takes about ten seconds, on one core (pillow decodes one image at
  a time whatever the number of threads), the next ones half a second (see `cached`).

  Args:
    path: The folder.
    counts: Numbers of training and test images.

  Returns:
    Training and test data.

  Raises:
    DataError: A shard is missing, unreadable, or not what it should be.
  """
  shards = {"train": find_shards(path, "train"), "test": find_shards(path, "test")}
  for name in shards:
    check_complete(path, name, shards[name])

  def decode() -> dict[str, np.ndarray]:
    arrays = {}
    for name, count in zip(shards, counts, strict=True):
      split = _decode(path, name, shards[name], count)
      arrays[f"{name}_images"], arrays[f"{name}_labels"] = split
    return arrays

  arrays = cached([*shards["train"], *shards["test"]], decode)
  for name, count in zip(shards, counts, strict=True):
    _check_count(path, name, len(arrays[f"{name}_labels"]), count)
  train, test = (
    Split(arrays[f"{name}_images"], arrays[f"{name}_labels"]) for name in shards
  )
  return train, test


def _check_count(folder: Path, split: str, found: int, expected: int) -> None:
  if found != expected:
    raise DataError(
      f"{folder}: {found:,} {split} images in its shards, expected {expected:,}; "
      "incomplete, or another data set."
    )


def _decode(folder: Path, split: str, shards: Sequence[Path], count: int) -> Split:
  contents = [_read_shard(shard) for shard in shards]
  _check_count(folder, split, sum(len(labels) for _, labels in contents), count)
  images = np.empty((count, *SHAPE), np.uint8)
  position = 0
  console = Console(stderr=True)
  with Progress(
    console=console, transient=True, disable=not console.is_terminal
  ) as progress:
    task = progress.add_task(f"decoding {split} images (once)", total=count)
    for shard, (encoded, _) in zip(shards, contents, strict=True):
      for index, image in enumerate(encoded):
        images[position] = _decode_image(f"{shard}: image {index}", image)
        position += 1
        if position % 500 == 0:
          progress.update(task, completed=position)
  return Split(images, np.concatenate([labels for _, labels in contents]))


def _read_shard(shard: Path) -> tuple[list[bytes | None], np.ndarray]:
  """Returns the encoded images and the labels."""
  file, column = open_shard(shard)
  try:
    table = file.read()
  except (pa.ArrowException, OSError) as error:
    raise DataError(damaged(shard, error)) from error
  labels = table.column("label")
  check_no_label_missing(shard, labels)
  encoded = table.column(column).combine_chunks().field("bytes").to_pylist()
  return encoded, check_labels(shard, labels.to_numpy(), NUM_CLASSES)


def _decode_image(where: str, encoded: bytes | None) -> np.ndarray:
  try:
    # What the hub has used; a JPEG would not hold CIFAR-10's very pixels.
    with Image.open(io.BytesIO(encoded or b""), formats=("PNG", "WEBP")) as image:
      pixels = np.asarray(image.convert("RGB"))
  except (OSError, SyntaxError, ValueError) as error:
    raise DataError(f"{where}: neither PNG nor WebP, or damaged ({error}).") from error
  if pixels.shape != SHAPE:
    raise DataError(f"{where}: has shape {pixels.shape}, expected {SHAPE}.")
  return pixels
