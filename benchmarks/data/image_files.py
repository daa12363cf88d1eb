"""ImageNet, and data sets like it, in whichever layout they lie below a folder."""

import dataclasses
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from benchmarks.data.dataset import DataError, check_labels, one_line, resolve_data_dir
from benchmarks.data.files import describe_missing, read_file, reason
from benchmarks.data.image_crops import MAX_PIXELS
from benchmarks.data.parquet import Shard, check_complete, find_shards

Name = Literal["imagenet", "imagenette"]

# What a folder's path must hold somewhere, none of the others behind it. The hub calls
# ImageNet imagenet-1k.
NAMES = {"imagenet": r"imagenet(?!te)|ilsvrc", "imagenette": r"imagenette"}
NUM_CLASSES = {"imagenet": 1000, "imagenette": 10}
HELD_OUT = ("validation", "val", "test")
DEPTH = 5
# Larger than this, no fifth of the training images is needed to validate.
MAX_VALIDATION = 50_000
ENDINGS = (".jpg", ".jpeg", ".png")  # of files in folders

# Bytes of row groups in memory, of each process that reads; what the images of
# `image_stream.WINDOW` and the ends of their groups fit in.
MAX_KEPT = 2**28
# What may be read: a row group, four times what is kept; labels, four times ImageNet's;
# and a file, no more than the largest image takes when it is decoded.
MAX_GROUP_BYTES = 4 * MAX_KEPT
MAX_IMAGES = 4 * 1_281_167
MAX_FILE_BYTES = 3 * MAX_PIXELS


class ImageSource(Protocol):
  """Encoded images, of which any can be read.

  Attributes:
    labels: (n,), int32.
    class_names: Of each label; empty if they are not known.
  """

  labels: np.ndarray
  class_names: tuple[str, ...]

  @property
  def bounds(self) -> np.ndarray | None:
    """None if every image is read by itself; otherwise (groups + 1,).

    The images from ``bounds[i]`` up to ``bounds[i + 1]`` are read together.
    """
    ...

  def read(self, indices: np.ndarray) -> list[bytes | None]:
    """Returns the images (n,) at `indices`, encoded; None for what is not there."""
    ...

  def name(self, index: int) -> str:
    """Returns where an image is, for a person."""
    ...


class Part(NamedTuple):
  """A part of the images of a source.

  Attributes:
    source: The source.
    indices: (n,), of the part's images.
  """

  source: ImageSource
  indices: np.ndarray


class FolderImages:
  """The images of one split; an `ImageSource`.

  Attributes:
    labels: (n,), int32: the place of an image's class among the sorted classes.
    class_names: The names of the classes' folders, sorted.
    bounds: None: every image is read by itself.
  """

  bounds = None

  @staticmethod
  def has_split(folder: Path, split: str) -> bool:
    """Returns whether there is a folder of a split.

    Args:
      folder: Where it may be.
      split: Such as ``"train"``.
    """
    return os.path.isdir(folder / split)

  def __init__(self, folder: Path, split: str):
    """Lists the files.

    Args:
      folder: Where the splits' folders are.
      split: Name of the split's folder.

    Raises:
      DataError: It has no folders of classes, or one without images.
    """
    self._folder = folder / split
    self.class_names = tuple(_names(self._folder, os.path.isdir))
    if not self.class_names:
      raise DataError(
        f"{self._folder}: no folders of classes in it; sort its images into one folder "
        "for each class, named as those of the other split."
      )
    self._files: list[str] = []
    labels = []
    for label, name in enumerate(self.class_names):
      files = _names(self._folder / name, lambda path: path.lower().endswith(ENDINGS))
      if not files:
        raise DataError(f"{self._folder / name}: no {', '.join(ENDINGS)} in it.")
      self._files += [f"{name}/{file}" for file in files]
      labels.append(np.full(len(files), label, np.int32))
    self.labels = np.concatenate(labels)

  def read(self, indices: np.ndarray) -> list[bytes | None]:
    """Returns encoded images; None for files that cannot be read.

    Args:
      indices: (n,), of images.
    """
    return [_read(self._folder / self._files[index]) for index in indices]

  def name(self, index: int) -> str:
    """Returns where an image is, for a person.

    Args:
      index: Of the image.
    """
    return one_line(str(self._folder / self._files[index]))


def _names(folder: Path, condition: Callable[[str], bool]) -> list[str]:
  """The sorted names of what is in a folder and, by its path, fulfils a condition."""
  try:
    with os.scandir(folder) as entries:
      return sorted(entry.name for entry in entries if condition(entry.path))
  except OSError as error:
    raise DataError(f"{folder}: cannot be read ({reason(error)}).") from error


def _read(path: Path) -> bytes | None:
  try:
    return read_file(path, MAX_FILE_BYTES)
  except DataError:
    return None


class ParquetImages:
  """The images of one split; an `ImageSource`.

  Only the labels are kept. An image is read with the row group that it is in, from a
  memory map, so images of one group are best asked for together.

  Attributes:
    labels: (n,), int32.
    class_names: Of each label, where the shards say it; otherwise none.
    bounds: (groups + 1,): group ``i`` holds the images from ``bounds[i]`` on.
  """

  @staticmethod
  def has_split(folder: Path, split: str) -> bool:
    """Returns whether there are shards of a split.

    Args:
      folder: Where they may be.
      split: Such as ``"train"``.
    """
    return bool(find_shards(folder, split))

  def __init__(self, folder: Path, split: str):
    """Opens the shards, and reads the labels.

    Args:
      folder: Where the shards are.
      split: Such as ``"train"``.

    Raises:
      DataError: A shard is missing, damaged or empty, or a label out of range.
    """
    self._paths = find_shards(folder, split)
    check_complete(folder, split, self._paths)
    labels, sizes, self._places = [], [], []
    self.class_names: tuple[str, ...] = ()
    for number, path in enumerate(self._paths):
      shard = Shard(path)
      sizes += shard.sizes
      if sum(sizes) > MAX_IMAGES:
        raise DataError(
          f"{path}: {sum(sizes):,} {split} images in the shards up to this one, "
          f"expected at most {MAX_IMAGES:,}; damaged, or another data set."
        )
      self._places += [(number, group) for group in range(len(shard.sizes))]
      self.class_names = self.class_names or shard.class_names
      if shard.class_names not in ((), self.class_names):
        raise DataError(
          f"{path}: other names of classes than in {self._paths[0].name}."
        )
      labels.append(shard.labels(len(self.class_names) or max(NUM_CLASSES.values())))
    if not sum(sizes):
      raise DataError(f"{folder}: no {split} images in its shards.")
    # Those of shards before the first that names the classes, too.
    num_classes = len(self.class_names) or max(NUM_CLASSES.values())
    self.labels = check_labels(folder, np.concatenate(labels), num_classes)
    self.bounds = np.concatenate([[0], np.cumsum(sizes)])
    self._open_none()

  def _open_none(self) -> None:
    self._shards: dict[int, Shard] = {}
    self._kept: dict[int, pa.Array] = {}  # groups read last, the latest last
    # Training's images are read ahead while others of the same shards validate.
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    """What travels to another process: nothing that has been read or opened."""
    own = ("_shards", "_kept", "_lock")
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
    number, number_in_shard = self._places[group]
    first = self._places.index((number, 0))
    row_in_shard = int(self.bounds[group] - self.bounds[first]) + row
    place = f"{self._paths[number]}: image {row_in_shard}"
    with self._lock:
      path = self._shard(number).image_path(number_in_shard, row, MAX_KEPT)
    return one_line(f"{place} ({path})" if path else place)

  def _groups(self, indices: np.ndarray) -> np.ndarray:
    return np.searchsorted(self.bounds, indices, side="right") - 1

  def _encoded(self, group: int) -> pa.Array:
    """A row group's images; as many groups are kept as fit."""
    column = self._kept.pop(group, None)
    if column is None:
      column = self._read_group(group)
    self._kept[group] = column
    while sum(kept.nbytes for kept in self._kept.values()) > MAX_KEPT:
      self._kept.pop(next(iter(self._kept)))
    return column

  def _read_group(self, group: int) -> pa.Array:
    number, number_in_shard = self._places[group]
    found = self._shard(number).images(number_in_shard, MAX_GROUP_BYTES)
    if len(found) != self.bounds[group + 1] - self.bounds[group]:
      raise DataError(f"{self._paths[number]}: changed while it was read; begin anew.")
    return found

  def _shard(self, number: int) -> Shard:
    if number not in self._shards:
      self._shards[number] = Shard(self._paths[number])
    return self._shards[number]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
  """A data set's files.

  Attributes:
    name: Name that `find_images` knows it by.
    train: The training images.
    held_out: The official validation images, which test.
    source: Where they were found.
  """

  name: str
  train: ImageSource
  held_out: ImageSource
  source: str

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return _num_classes(self.train)

  def split(
    self,
    num_train: int | None = None,
    num_validation: int | None = None,
    num_test: int | None = None,
  ) -> dict[str, Part]:
    """Divides the data: training images train and validate, held-out images test.

    A part is the first of its images, validation the last; in the order of the files,
    or of a fixed permutation where these are sorted by class.

    Args:
      num_train: Number of training images; by default all that do not validate.
      num_validation: Number of validation images; by default a fifth of the training
        images, at most 50,000.
      num_test: Number of test images; by default all that are held out.

    Returns:
      ``"train"``, ``"validation"`` and ``"test"``.

    Raises:
      ValueError: More images asked for than there are, or none.
    """
    total, held_out = len(self.train.labels), len(self.held_out.labels)
    if num_validation is None:
      num_validation = min(total // 5, MAX_VALIDATION)
    if num_train is None:
      num_train = total - num_validation
    if num_test is None:
      num_test = held_out
    if (
      min(num_train, num_validation, num_test) < 1
      or num_train + num_validation > total
      or num_test > held_out
    ):
      raise ValueError(
        f"at least one image for each part, from {total:,} training images (training "
        f"and validation) and {held_out:,} test images, got {num_train:,}, "
        f"{num_validation:,} and {num_test:,}."
      )
    order = mixed_order(self.train.labels)
    return {
      "train": Part(self.train, order[:num_train]),
      "validation": Part(self.train, order[total - num_validation :]),
      "test": Part(self.held_out, mixed_order(self.held_out.labels)[:num_test]),
    }


def mixed_order(labels: np.ndarray) -> np.ndarray:
  """Returns all indices, in order if the classes are mixed, else in a fixed random one.

  Args:
    labels: (n,), integers.

  Example:
    >>> import numpy as np
    >>> mixed_order(np.array([1, 0, 0, 1, 0, 1])).tolist()
    [0, 1, 2, 3, 4, 5]
    >>> mixed_order(np.array([0, 0, 0, 1, 1, 1])).tolist() == [0, 1, 2, 3, 4, 5]
    False
  """
  changes = np.mean(labels[1:] != labels[:-1]) if len(labels) > 1 else 0.0
  shares = np.bincount(labels) / len(labels)
  mixed_changes = 1 - np.square(shares).sum()  # of labels in random order
  if changes >= mixed_changes / 2:
    return np.arange(len(labels))
  return np.random.default_rng(0).permutation(len(labels))


def find_images(
  name: Name, data_dir: str | os.PathLike[str] | None = None
) -> ImageFiles:
  """Finds a data set below a folder.

  It may lie in Parquet shards as the Hugging Face hub has them
  (``train-00000-of-00294.parquet``, ..., ``validation-...``), or in folders
  ``train/<class>/`` and ``val/<class>/`` (or ``validation``) of JPEG or PNG files;
  below a folder with its name in its path, or in `data_dir` itself, unless this has the
  other data set's name.

  Args:
    name: ``"imagenet"`` or ``"imagenette"``.
    data_dir: Where to look; by default as `benchmarks.data.load` does.

  Raises:
    DataError: There is no such data, it has as many classes as the other data set, or
      more than it should, or a file of it is damaged.
  """
  place = resolve_data_dir(data_dir)
  without_test = None
  for folder in _folders(place, name):
    for source in (ParquetImages, FolderImages):
      if not source.has_split(folder, "train"):
        continue
      held_out = next((x for x in HELD_OUT if source.has_split(folder, x)), None)
      if held_out is not None:
        found = source(folder, "train"), source(folder, held_out)
        _check_classes(folder, *found)
        _check_name(folder, name, _num_classes(found[0]))
        return ImageFiles(name, *found, str(folder))
      without_test = folder
  if without_test is not None:
    raise DataError(
      f"{without_test}: training images, but none of {', '.join(HELD_OUT)} beside them."
    )
  raise DataError(
    f"no {name} below {place}{describe_missing(place)}. Put there a folder {name!r} "
    "with the Hugging Face hub's train*.parquet and validation*.parquet, or with "
    "folders train/<class> and val/<class> of JPEG files. Or name another folder "
    "(--data-dir, ALRAO_DATA_DIR)."
  )


def _folders(place: Path, name: Name) -> Iterator[Path]:
  """The folder itself, then those below whose path says that the data set is there."""
  if _named(place.name) in (None, name):
    yield place
  for path, subfolders, _ in os.walk(place, followlinks=True):
    folder = Path(path)
    depth = len(folder.relative_to(place).parts)
    # Nor into the folders of a thousand classes.
    if depth >= DEPTH or folder.name in ("train", *HELD_OUT):
      subfolders.clear()
    subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    path = f"{place.name}/{folder.relative_to(place)}"
    if folder != place and _named(path) == name:
      yield folder


def _named(path: str) -> str | None:
  """The data set that a path names, the last one of several."""
  ends = {
    name: max((found.end() for found in re.finditer(pattern, path, re.I)), default=0)
    for name, pattern in NAMES.items()
  }
  last = max(ends, key=lambda name: ends[name])
  return last if ends[last] else None


def _check_name(folder: Path, name: str, num_classes: int) -> None:
  if num_classes > NUM_CLASSES[name]:
    raise DataError(
      f"{folder}: {num_classes:,} classes, where {name} has {NUM_CLASSES[name]:,}; "
      "damaged, or another data set. Name another folder (--data-dir, ALRAO_DATA_DIR)."
    )
  for other, number in NUM_CLASSES.items():
    if other != name and num_classes == number:
      raise DataError(
        f"{folder}: {num_classes:,} classes, as {other} has, where {name} has "
        f"{NUM_CLASSES[name]:,}. Write --dataset {other}, or name another folder "
        "(--data-dir, ALRAO_DATA_DIR)."
      )


def _check_classes(folder: Path, train: ImageSource, held_out: ImageSource) -> None:
  names = [source.class_names for source in (train, held_out)]
  if names[0] != names[1]:
    apart = ", ".join(sorted(set(names[0]) ^ set(names[1]))[:5])
    raise DataError(
      f"{folder}: its training images have {len(names[0])} classes, those held out "
      f"{len(names[1])}, and not the same ones ({apart})."
    )
  check_labels(f"{folder}, held-out images", held_out.labels, _num_classes(train))


def _num_classes(source: ImageSource) -> int:
  return len(source.class_names) or int(source.labels.max()) + 1
