"""Encoded images in Parquet shards, read as they are asked for."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.data.dataset import DataError, check_labels
from benchmarks.data.parquet import (
  check_complete,
  check_no_label_missing,
  damaged,
  find_shards,
  open_shard,
)

# Bytes of row groups in memory, of each process that reads; what the images of
# `image_stream.WINDOW` and the ends of their groups fit in.
MAX_KEPT = 2**28


class ParquetImages:
  """The images of one split; a `benchmarks.data.imagenet.ImageSource`.

  Only the labels are kept. An image is read with the row group that it is in, from a
  memory map, so images of one group are best asked for together.

  Attributes:
    labels: (n,), int32.
    class_names: Of each label, where the shards say it; otherwise none.
    bounds: (groups + 1,): group ``i`` holds the images from ``bounds[i]`` on.
  """

  def __init__(self, folder: Path, split: str):
    """Opens the shards, and reads the labels.

    Args:
      folder: Where the shards are.
      split: Such as ``"train"``.

    Raises:
      DataError: A shard is missing, damaged or empty, or a label out of range.
    """
    self._shards = find_shards(folder, split)
    check_complete(folder, split, self._shards)
    labels, sizes, self._places = [], [], []
    self.class_names: tuple[str, ...] = ()
    for number, shard in enumerate(self._shards):
      file, _ = open_shard(shard)
      self.class_names = self.class_names or _class_names(file)
      labels.append(_read_labels(shard, file, len(self.class_names)))
      groups = range(file.num_row_groups)
      sizes += [file.metadata.row_group(group).num_rows for group in groups]
      self._places += [(number, group) for group in groups]
    self.labels = np.concatenate(labels)
    if not self.labels.size:
      raise DataError(f"{folder}: no {split} images in its shards.")
    self.bounds = np.concatenate([[0], np.cumsum(sizes)])
    self._open_none()

  def _open_none(self) -> None:
    self._files: dict[int, tuple[pq.ParquetFile, str]] = {}
    self._kept: dict[int, pa.BinaryArray] = {}  # groups read last, the latest last
    # Training's images are read ahead while others of the same shards validate.
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    """What travels to another process: nothing that has been read or opened."""
    own = ("_files", "_kept", "_lock")
    return {name: value for name, value in self.__dict__.items() if name not in own}

  def __setstate__(self, state: dict[str, Any]) -> None:
    """Opens files anew."""
    self.__dict__.update(state)
    self._open_none()

  def read(self, indices: np.ndarray) -> list[bytes | None]:
    """Returns encoded images; None for what a shard does not hold.

    Args:
      indices: (n,), of images.

    Raises:
      DataError: A shard is damaged.
    """
    found: list[bytes | None] = [None] * len(indices)
    groups = self._groups(indices)
    for group in np.unique(groups):
      positions = np.flatnonzero(groups == group)
      rows = indices[positions] - self.bounds[group]
      with self._lock:
        column = self._encoded(int(group)).take(pa.array(rows))
      for position, value in zip(positions, column, strict=True):
        found[position] = value.as_py()
    return found

  def name(self, index: int) -> str:
    """Returns where an image is, for a person.

    Args:
      index: Of the image.
    """
    (group,) = self._groups(np.array([index]))
    row = index - int(self.bounds[group])
    number, _ = self._places[group]
    first = self._places.index((number, 0))
    row_in_shard = int(self.bounds[group] - self.bounds[first]) + row
    place = f"{self._shards[number]}: image {row_in_shard}"
    with self._lock:
      paths = self._read_group(group, "path")
    path = None if paths is None else paths[row].as_py()
    return f"{place} ({path})" if path else place

  def _groups(self, indices: np.ndarray) -> np.ndarray:
    return np.searchsorted(self.bounds, indices, side="right") - 1

  def _encoded(self, group: int) -> pa.BinaryArray:
    """A row group's images; as many groups are kept as fit."""
    column = self._kept.pop(group, None)
    if column is None:
      column = self._read_group(group, "bytes")
    self._kept[group] = column
    while sum(kept.nbytes for kept in self._kept.values()) > MAX_KEPT:
      self._kept.pop(next(iter(self._kept)))
    return column

  def _read_group(self, group: int, field: str) -> Any:
    """One field of the column of images, of a row group."""
    number, number_in_shard = self._places[group]
    shard = self._shards[number]
    if number not in self._files:
      self._files[number] = open_shard(shard)
    file, name = self._files[number]
    if file.schema_arrow.field(name).type.get_field_index(field) < 0:
      return None
    try:
      table = file.read_row_group(
        number_in_shard, columns=[f"{name}.{field}"], use_threads=False
      )
    except (pa.ArrowException, OSError) as error:
      raise DataError(damaged(shard, error)) from error
    return table.column(name).combine_chunks().field(field)


def has_split(folder: Path, split: str) -> bool:
  """Returns whether there are shards of a split.

  Args:
    folder: Where they may be.
    split: Such as ``"train"``.
  """
  return bool(find_shards(folder, split))


def _read_labels(shard: Path, file: pq.ParquetFile, num_classes: int) -> np.ndarray:
  try:
    column = file.read(columns=["label"]).column("label")
  except (pa.ArrowException, OSError) as error:
    raise DataError(damaged(shard, error)) from error
  check_no_label_missing(shard, column)
  labels = column.to_numpy()
  largest = int(labels.max(initial=0))
  return check_labels(shard, labels, num_classes or largest + 1)


def _class_names(file: pq.ParquetFile) -> tuple[str, ...]:
  """What the hub's metadata says that the classes are called, if it does."""
  metadata = file.schema_arrow.metadata or {}
  try:
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    return tuple(map(str, features["label"]["names"]))
  except (KeyError, TypeError, ValueError):
    return ()
