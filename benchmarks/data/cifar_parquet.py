"""CIFAR-10 as the Hugging Face hub ships it: Parquet shards of PNG or WebP images."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from benchmarks.data.cache import cached
from benchmarks.data.cifar_batches import NUM_CLASSES
from benchmarks.data.dataset import DataError, Split, check_labels

SHAPE = (32, 32, 3)


def find(folder: Path) -> Path | None:
  """Returns the folder if it holds shards, else None."""
  return folder if _shards(folder, "train") or _shards(folder, "test") else None


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
  shards = {"train": _shards(path, "train"), "test": _shards(path, "test")}
  for name in shards:
    _check_complete(path, name, shards[name])

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


def _shards(folder: Path, split: str) -> list[Path]:
  """``train-00000-of-00002.parquet``, ... or, as converted, ``train/0000.parquet``."""
  return sorted(folder.glob(f"{split}*.parquet")) or sorted(
    folder.glob(f"{split}/*.parquet")
  )


def _check_complete(folder: Path, split: str, shards: Sequence[Path]) -> None:
  if not shards:
    raise DataError(f"{folder}: no {split}*.parquet in it, beside the others.")
  for shard in shards:
    parts = re.search(r"-of-(\d+)\.parquet$", shard.name)
    if parts and int(parts[1]) != len(shards):
      raise DataError(
        f"{folder}: {len(shards)} shards where {shard.name} says {int(parts[1])}; get "
        "the missing ones, or remove those that do not belong there."
      )


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
  try:
    table = pq.read_table(shard)
  except (pa.ArrowException, OSError) as error:
    raise DataError(
      f"{shard}: truncated, or no Parquet file ({error}); get it anew."
    ) from error
  column = next((name for name in ("img", "image") if name in table.column_names), None)
  if column is None or "label" not in table.column_names:
    raise DataError(
      f"{shard}: columns are {table.column_names}, expected 'img' or 'image' and "
      "'label'."
    )
  kind = table.schema.field(column).type
  if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
    raise DataError(f"{shard}: {column!r} is {kind}, expected struct<bytes, path>.")
  labels = table.column("label")
  if not pa.types.is_integer(labels.type) or labels.null_count:
    raise DataError(f"{shard}: labels are missing, or {labels.type} in place of int64.")
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
