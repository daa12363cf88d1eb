"""ImageNet, and data sets like it, in whichever layout they lie below a folder."""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from benchmarks.data import image_folder, image_parquet
from benchmarks.data.dataset import DataError, check_labels, resolve_data_dir

Name = Literal["imagenet", "imagenette"]

# What a folder's path must hold somewhere, none of the others behind it. The hub calls
# ImageNet imagenet-1k.
NAMES = {"imagenet": r"imagenet(?!te)|ilsvrc", "imagenette": r"imagenette"}
NUM_CLASSES = {"imagenet": 1000, "imagenette": 10}
LAYOUTS = (
  (image_parquet, image_parquet.ParquetImages),
  (image_folder, image_folder.FolderImages),
)
HELD_OUT = ("validation", "val", "test")
DEPTH = 5
# Larger than this, no fifth of the training images is needed to validate.
MAX_VALIDATION = 50_000


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
    DataError: There is no such data, it has as many classes as the other data set, or a
      file of it is damaged.
  """
  place = resolve_data_dir(data_dir)
  without_test = None
  for folder in _folders(place, name):
    for layout, images in LAYOUTS:
      if not layout.has_split(folder, "train"):
        continue
      held_out = next((x for x in HELD_OUT if layout.has_split(folder, x)), None)
      if held_out is not None:
        found = images(folder, "train"), images(folder, held_out)
        _check_classes(folder, *found)
        _check_name(folder, name, _num_classes(found[0]))
        return ImageFiles(name, *found, str(folder))
      without_test = folder
  if without_test is not None:
    raise DataError(
      f"{without_test}: training images, but none of {', '.join(HELD_OUT)} beside them."
    )
  state = "" if place.is_dir() else " (no such folder)"
  raise DataError(
    f"no {name} below {place}{state}. Put there a folder {name!r} with the Hugging "
    "Face hub's train*.parquet and validation*.parquet, or with folders train/<class> "
    "and val/<class> of JPEG files. Or name another folder (--data-dir, "
    "ALRAO_DATA_DIR)."
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
