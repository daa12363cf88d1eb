"""Fetching the official CIFAR-10 archive."""

from pathlib import Path

from rich.progress import (
  BarColumn,
  DownloadColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from benchmarks.data.dataset import DataError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"


def download_cifar10(data_dir: Path) -> Path:
  """Downloads ``cifar-10-python.tar.gz`` (163 MiB) and checks its MD5.

  Args:
    data_dir: The folder to put it in, made if it does not exist.

  Returns:
    The archive.

  Raises:
    DataError: No connection, no right to write, or not the expected file.
  """
  import pooch

  pooch.get_logger().setLevel("WARNING")
  name = URL.rpartition("/")[-1]
  try:
    with _Bar(name) as bar:
      path = pooch.retrieve(
        URL,
        f"md5:{MD5}",
        name,
        data_dir,
        progressbar=bar,  # pyright: ignore[reportArgumentType] (any bar like tqdm's)
      )
  except (OSError, ValueError) as error:
    raise DataError(
      f"{URL} could not be downloaded into {data_dir}: {error}. Put {name} there "
      "yourself, or name another folder."
    ) from error
  return Path(path)


class _Bar:
  """The part of tqdm's interface that pooch calls, shown by rich."""

  total = 0

  def __init__(self, name: str):
    self._progress = Progress(
      TextColumn(name), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    )
    self._task = self._progress.add_task(name)

  def __enter__(self) -> "_Bar":
    self._progress.start()
    return self

  def __exit__(self, *_):
    self._progress.stop()

  def update(self, count: int) -> None:
    self._progress.update(self._task, advance=count, total=self.total)

  def reset(self) -> None:
    self._progress.reset(self._task)

  def close(self) -> None:
    pass
