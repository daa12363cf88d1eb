"""Encoded images in a folder for each class."""

import os
from pathlib import Path

import numpy as np

from benchmarks.data.dataset import DataError

ENDINGS = (".jpg", ".jpeg", ".png")


class FolderImages:
  """The images of one split; a `benchmarks.data.imagenet.ImageSource`.

  Attributes:
    labels: (n,), int32: the place of an image's class among the sorted classes.
    class_names: The names of the classes' folders, sorted.
    bounds: None: every image is read by itself.
  """

  bounds = None

  def __init__(self, folder: Path, split: str):
    """Lists the files.

    Args:
      folder: Where the splits' folders are.
      split: Name of the split's folder.

    Raises:
      DataError: It has no folders of classes, or one without images.
    """
    self._folder = folder / split
    self.class_names = tuple(
      sorted(entry.name for entry in os.scandir(self._folder) if entry.is_dir())
    )
    if not self.class_names:
      raise DataError(
        f"{self._folder}: no folders of classes in it; sort its images into one folder "
        "for each class, named as those of the other split."
      )
    self._files: list[str] = []
    labels = []
    for label, name in enumerate(self.class_names):
      files = sorted(
        f"{name}/{entry.name}"
        for entry in os.scandir(self._folder / name)
        if entry.name.lower().endswith(ENDINGS)
      )
      if not files:
        raise DataError(f"{self._folder / name}: no {', '.join(ENDINGS)} in it.")
      self._files += files
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
    return str(self._folder / self._files[index])


def has_split(folder: Path, split: str) -> bool:
  """Returns whether there is a folder of a split.

  Args:
    folder: Where it may be.
    split: Such as ``"train"``.
  """
  return (folder / split).is_dir()


def _read(path: Path) -> bytes | None:
  try:
    return path.read_bytes()
  except OSError:
    return None
