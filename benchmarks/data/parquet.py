"""Shards of a data set as the Hugging Face hub ships them: Parquet, images encoded."""

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.data.dataset import DataError

IMAGE_COLUMNS = ("img", "image")


def find_shards(folder: Path, split: str) -> list[Path]:
  """Returns a split's shards, in order; none where there are none.

  They are ``train-00000-of-00002.parquet``, ... or, as converted,
  ``train/0000.parquet``.

  Args:
    folder: Where they are.
    split: Such as ``"train"``.
  """
  return sorted(folder.glob(f"{split}*.parquet")) or sorted(
    folder.glob(f"{split}/*.parquet")
  )


def check_complete(folder: Path, split: str, shards: Sequence[Path]) -> None:
  """Raises `DataError` unless there are as many shards as their names say.

  Args:
    folder: Where they are.
    split: Their split.
    shards: What `find_shards` found.
  """
  if not shards:
    raise DataError(f"{folder}: no {split}*.parquet in it, beside the others.")
  for shard in shards:
    parts = re.search(r"-of-(\d+)\.parquet$", shard.name)
    if parts and int(parts[1]) != len(shards):
      raise DataError(
        f"{folder}: {len(shards)} shards where {shard.name} says {int(parts[1])}; get "
        "the missing ones, or remove those that do not belong there."
      )


def open_shard(shard: Path) -> tuple[pq.ParquetFile, str]:
  """Opens a shard; returns it, and the name of its column of images.

  Args:
    shard: The file.

  Raises:
    DataError: It is damaged, or has not the columns of labelled images.
  """
  try:
    file = pq.ParquetFile(shard, memory_map=True)
  except (pa.ArrowException, OSError) as error:
    raise DataError(damaged(shard, error)) from error
  schema = file.schema_arrow
  column = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
  if column is None or "label" not in schema.names:
    raise DataError(
      f"{shard}: columns are {schema.names}, expected 'img' or 'image' and 'label'."
    )
  kind = schema.field(column).type
  if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
    raise DataError(f"{shard}: {column!r} is {kind}, expected struct<bytes, path>.")
  return file, column


def check_no_label_missing(shard: Path, labels: pa.ChunkedArray) -> None:
  """Raises `DataError` unless labels are integers, all of them there.

  Args:
    shard: Where they are from.
    labels: The column.
  """
  if not pa.types.is_integer(labels.type) or labels.null_count:
    raise DataError(f"{shard}: labels are missing, or {labels.type} in place of int64.")


def damaged(shard: Path, error: Exception) -> str:
  """Returns the text for a file that cannot be read.

  Args:
    shard: The file.
    error: What reading it raised.
  """
  return f"{shard}: truncated, or no Parquet file ({error}); get it anew."
