"""Data sets for the benchmarks, read from whatever layout the user has.

Example:
  >>> dataset = load("digits")
  >>> dataset.train_images.shape, dataset.train_images.dtype
  ((1500, 32, 32, 3), dtype('uint8'))
  >>> [len(part.labels) for part in dataset.split(num_validation=300)]
  [1200, 300, 297]
"""

import os

from benchmarks.data import cifar_files as cifar10
from benchmarks.data import digits
from benchmarks.data import text_files as text  # noqa: F401 (named as what it reads)
from benchmarks.data.dataset import DataError as DataError
from benchmarks.data.dataset import Dataset as Dataset
from benchmarks.data.dataset import Split as Split
from benchmarks.data.dataset import Splits as Splits
from benchmarks.data.dataset import channel_statistics as channel_statistics
from benchmarks.data.dataset import resolve_data_dir

NAMES = ("cifar10", "digits")


def load(
  name: str,
  data_dir: str | os.PathLike[str] | None = None,
  *,
  download: bool = False,
) -> Dataset:
  """Reads a data set.

  CIFAR-10 is found below `data_dir` by itself, in the first of these layouts that is
  there: ``cifar-10-batches-py`` (pickles, read without running what they name),
  ``cifar-10-batches-bin``, the ``.tar.gz`` of either (read without extracting it), and
  the Hugging Face hub's Parquet shards of PNG or WebP images, below a folder that has
  ``cifar10`` or ``cifar-10`` in its name, or in `data_dir` itself. Numbers of images,
  shapes and labels are checked.

  Args:
    name: ``"cifar10"``, or ``"digits"``: scikit-learn's, enlarged to 32x32, for which
      no files are needed.
    data_dir: The folder below which to look; by default ``ALRAO_DATA_DIR``, else
      ``shared/data`` beside the project's folder.
    download: Whether to download CIFAR-10 into `data_dir` where there is none.

  Returns:
    The data set.

  Raises:
    DataError: There is no such data, or a file of it is damaged; the text names it.
    ValueError: Unknown `name`.
  """
  if name == "digits":
    return digits.load()
  if name == "cifar10":
    return cifar10.load(resolve_data_dir(data_dir), download=download)
  raise ValueError(f"load(name=...) must be one of {', '.join(NAMES)}, got {name!r}.")
