"""What a loaded data set is, how it is split, and what a broken one is called."""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
MAX_TEXT = 2_000  # characters that are printed of a text


def one_line(text: str) -> str:
  r"""Returns a text of anyone's making as it can be printed, in one line.

  Args:
    text: The text: a file's name, another library's error.

  Example:
    >>> print(one_line("two\nlines\x07"))
    two lines\x07
  """
  line = " ".join(text[:MAX_TEXT].split("\n"))
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class DataError(ValueError):
  """Data that is missing, truncated or not what it should be.

  The text, of one line, says which.
  """

  def __init__(self, text: str):
    super().__init__(one_line(text))


class Split(NamedTuple):
  """Some images (n, height, width, channels), uint8, and their labels (n,), int32."""

  images: np.ndarray
  labels: np.ndarray


class Splits(NamedTuple):
  """The three parts of an experiment."""

  train: Split
  validation: Split
  test: Split


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Images and labels, as their authors divided and ordered them.

  Attributes:
    name: Name that `load` knows it by.
    train_images: (n, height, width, channels), uint8.
    train_labels: (n,), int32, in [0, number of classes).
    test_images: Like `train_images`.
    test_labels: Like `train_labels`.
    class_names: Name of each class.
    can_flip: Whether the mirror image of an image keeps its label (not so for digits).
    source: Where the data was found.
  """

  name: str
  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  class_names: tuple[str, ...]
  can_flip: bool
  source: str

  def split(
    self,
    num_train: int | None = None,
    num_validation: int | None = None,
    num_test: int | None = None,
  ) -> Splits:
    """Divides the data, in order, without copying it.

    By default as in the papers: of CIFAR-10's training images the first 40,000 train
    and the last 10,000 validate.

    Args:
      num_train: Number of training images, taken from the start of the training data;
        by default all that do not validate.
      num_validation: Number of validation images, taken from its end; by default a
        fifth of it.
      num_test: Number of test images, taken from the start of the test data; by default
        all.

    Returns:
      Training, validation and test part.

    Raises:
      ValueError: More images asked for than there are, or none.
    """
    total = len(self.train_labels)
    if num_validation is None:
      num_validation = total // 5
    if num_train is None:
      num_train = total - num_validation
    if num_test is None:
      num_test = len(self.test_labels)
    if (
      min(num_train, num_validation, num_test) < 1
      or num_train + num_validation > total
      or num_test > len(self.test_labels)
    ):
      raise ValueError(
        f"split() takes at least one image for each part, from {total:,} training "
        f"images (training and validation) and {len(self.test_labels):,} test images; "
        f"got {num_train:,}, {num_validation:,} and {num_test:,}."
      )
    last = slice(total - num_validation, total)
    return Splits(
      Split(self.train_images[:num_train], self.train_labels[:num_train]),
      Split(self.train_images[last], self.train_labels[last]),
      Split(self.test_images[:num_test], self.test_labels[:num_test]),
    )


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean and standard deviation of each channel, for normalisation.

  Args:
    images: (n, height, width, channels), uint8.

  Returns:
    Mean and standard deviation, (channels,) each, float64, where 255 counts as 1.
  """
  channels = images.shape[-1]
  count = images.size // channels
  # In integers, so exact, and images first: ten times faster than pixels first.
  rows = images.reshape(len(images), -1)
  total = rows.sum(axis=0, dtype=np.int64)
  squares = np.zeros_like(total)
  for start in range(0, len(rows), 500):
    squares += np.square(rows[start : start + 500], dtype=np.int32).sum(axis=0)
  mean = total.reshape(-1, channels).sum(axis=0) / count
  variance = squares.reshape(-1, channels).sum(axis=0) / count - mean**2
  return mean / 255, np.sqrt(variance) / 255


def resolve_data_dir(data_dir: str | os.PathLike[str] | None = None) -> Path:
  """Returns the folder below which data sets are looked for.

  Args:
    data_dir: The folder; by default that in the environment variable
      ``ALRAO_DATA_DIR``, else ``shared/data`` beside the project's folder.

  Raises:
    DataError: It is in the home folder of a user whom this machine does not know.
  """
  default = os.environ.get("ALRAO_DATA_DIR") or ROOT.parent / "shared" / "data"
  path = Path(data_dir or default)
  try:
    return path.expanduser().absolute()
  except RuntimeError as error:
    raise DataError(f"{path}: no such user on this machine.") from error


def check_labels(where: str | Path, labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Returns `labels` as int32, or raises `DataError` if they are not classes.

  Args:
    where: The file they come from.
    labels: (n,), any integer dtype.
    num_classes: Number of classes: labels are from 0 up to it.
  """
  if labels.ndim != 1 or labels.dtype.kind not in "iu":
    raise DataError(
      f"{where}: labels are of type {labels.dtype} and shape {labels.shape}, expected "
      "one integer for each image."
    )
  wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if wrong.size:
    raise DataError(
      f"{where}: label {labels[wrong[0]]} of image {wrong[0]} is not in "
      f"0..{num_classes - 1}; the file is damaged, or is another data set's."
    )
  return labels.astype(np.int32)
