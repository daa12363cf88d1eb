"""Shards of labelled images as the Hugging Face hub ships them: Parquet files."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.data.dataset import DataError, check_labels
from benchmarks.data.files import check_file, damage_told

IMAGE_COLUMNS = ("img", "image")
# Arrow's names of types that hold bytes.
BYTES = ("binary", "large_binary", "binary_view")


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


class Shard:
  """One Parquet file of labelled images, open.

  Attributes:
    path: Of the file.
    sizes: Number of images in each of its row groups.
    class_names: Of each label, where the file says it; otherwise none.
  """

  def __init__(self, path: Path):
    """Opens the file, and checks its columns; no image is read yet.

    Args:
      path: Of the file.

    Raises:
      DataError: It is damaged, or has not the columns of labelled images.
    """
    self.path = path
    check_file(path)
    with self._damage_told():
      self._file = pq.ParquetFile(path, memory_map=True)
      schema, metadata = self._file.schema_arrow, self._file.metadata
      groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
      self.sizes = [group.num_rows for group in groups]
      names = schema.names
    if min(self.sizes, default=0) < 0:
      raise DataError(f"{path}: damaged, a group of {min(self.sizes)} rows.")
    self._column = next((name for name in IMAGE_COLUMNS if name in names), "")
    if any(names.count(name) != 1 for name in (self._column, "label")):
      raise DataError(
        f"{path}: columns are {names[:10]}, expected one called 'img' or 'image' and "
        "one called 'label'."
      )
    with self._damage_told():
      images, labels = (schema.field(x).type for x in (self._column, "label"))
      is_nested = pa.types.is_struct(images)
      fields = {field.name: field.type for field in images} if is_nested else {}
      self.class_names = _class_names(schema.metadata or {})
    if str(fields.get("bytes")) not in BYTES or images.get_field_index("bytes") < 0:
      raise DataError(
        f"{path}: {self._column!r} is {images}, expected struct<bytes: binary, path: "
        "string>."
      )
    if not pa.types.is_integer(labels):
      raise DataError(f"{path}: labels are missing, or {labels} in place of int64.")
    self._has_paths = "path" in fields

  @property
  def num_rows(self) -> int:
    """Number of images."""
    return sum(self.sizes)

  def labels(self, num_classes: int) -> np.ndarray:
    """Reads the labels, eight bytes each: first compare `num_rows` with what can be.

    Args:
      num_classes: Number of classes.

    Returns:
      (num_rows,), int32, in [0, num_classes).

    Raises:
      DataError: The file is damaged; a label is missing or out of range.
    """
    with self._damage_told():
      column = self._file.read(columns=["label"]).column("label")
      has_all = column.null_count == 0
      labels = column.to_numpy() if has_all else np.zeros(0, np.int64)
    if not has_all:
      raise DataError(f"{self.path}: labels are missing ({column.null_count} of them).")
    if len(labels) != self.num_rows:
      raise DataError(
        f"{self.path}: damaged, {len(labels):,} labels for {self.num_rows:,} images."
      )
    return check_labels(self.path, labels, num_classes)

  def images(self, group: int, max_bytes: int) -> pa.Array:
    """Reads the encoded images of a row group.

    Args:
      group: Number of the row group.
      max_bytes: Largest size of them all.

    Returns:
      (sizes[group],), of bytes, null where an image is missing.

    Raises:
      DataError: The file is damaged, or the images are larger.
    """
    with self._damage_told():
      # Of one type, whatever the writer's: views of bytes can't be taken by index.
      return self._read(group, "bytes", max_bytes).cast(pa.large_binary())

  def image_path(self, group: int, row: int, max_bytes: int) -> str | None:
    """Returns what an image's file was called, where the shard says it.

    Args:
      group: Number of the row group.
      row: Of the image, in its group.
      max_bytes: As in `images`, for the names.

    Raises:
      DataError: The file is damaged.
    """
    if not self._has_paths:
      return None
    found = self._read(group, "path", max_bytes)[row].as_py()
    return found if isinstance(found, str) else None

  def _read(self, group: int, field: str, max_bytes: int) -> pa.Array:
    """One field of the column of images, of a row group."""
    path = f"{self._column}.{field}"
    with self._damage_told():
      metadata = self._file.metadata.row_group(group)
      columns = [metadata.column(i) for i in range(metadata.num_columns)]
      size = sum(
        column.total_uncompressed_size
        for column in columns
        if f"{column.path_in_schema}.".startswith(f"{path}.")
      )
      self._check_size(size, max_bytes)
      # A page may hold a value once that many rows refer to, each of which is a copy
      # when it is read: in batches, so that the first too many end it.
      batches = self._file.iter_batches(
        batch_size=max(1, min(self.sizes[group], max_bytes // max(size, 1))),
        row_groups=[group],
        columns=[path],
        use_threads=False,
      )
      parts, total = [], 0
      for batch in batches:
        parts.append(batch.column(0).field(field))
        total += parts[-1].nbytes
        self._check_size(total, max_bytes)
      found = pa.concat_arrays(parts)
    if len(found) != self.sizes[group]:
      raise DataError(
        f"{self.path}: damaged, {len(found):,} images in a group of "
        f"{self.sizes[group]:,}."
      )
    return found

  def _check_size(self, size: int, max_bytes: int) -> None:
    if not 0 <= size <= max_bytes:
      raise DataError(
        f"{self.path}: a row group of images of {size:,} bytes, expected at most "
        f"{max_bytes:,}; damaged, or to be written in smaller groups."
      )

  def _damage_told(self):
    return damage_told(f"{self.path}: truncated, or no Parquet file")


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
  """What the hub's metadata says that the classes are called, if it does."""
  try:
    names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
  except (KeyError, TypeError, ValueError, RecursionError):
    return ()
  return tuple(map(str, names)) if isinstance(names, list) else ()
