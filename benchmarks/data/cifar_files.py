"""CIFAR-10, in whichever layout it lies below a folder."""

import gzip
import io
import os
import pickle
import pickletools
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from benchmarks.data.cache import Arrays, cached
from benchmarks.data.dataset import DataError, Dataset, Split, check_labels
from benchmarks.data.download import URL, download_cifar10
from benchmarks.data.files import (
  CHUNK,
  Bounded,
  check_file,
  damage_told,
  describe_missing,
  read_file,
  reason,
)
from benchmarks.data.image_crops import to_rgb
from benchmarks.data.parquet import Shard, check_complete, find_shards

COUNTS = (50_000, 10_000)
SHAPE = (32, 32, 3)
ROW = 3 * 32 * 32
# What is read takes at most four times the memory of what it holds: a file of 10,000
# images, and the data set.
MAX_FILE_BYTES = 4 * 10_000 * (1 + ROW)
MAX_BYTES = 6 * MAX_FILE_BYTES
MAX_MEMBERS = 1_000  # of an archive, which tarfile keeps; the official one has 9
CLASS_NAMES = (
  "airplane",
  "automobile",
  "bird",
  "cat",
  "deer",
  "dog",
  "frog",
  "horse",
  "ship",
  "truck",
)
NUM_CLASSES = len(CLASS_NAMES)


def load(
  data_dir: Path, *, download: bool = False, counts: tuple[int, int] = COUNTS
) -> Dataset:
  """Finds and reads CIFAR-10; `benchmarks.data.load` says how."""
  found = _find(data_dir)
  if found is None and download:
    download_cifar10(data_dir)
    found = _find(data_dir)
  if found is None:
    raise DataError(
      f"no CIFAR-10 below {data_dir}{describe_missing(data_dir)}. Put there any of: "
      f"{PICKLE.archive} or {BINARY.archive} (from {URL.rpartition('/')[0]}), a folder "
      f"{PICKLE.folder} or {BINARY.folder}, or a folder 'cifar10' with the Hugging "
      "Face hub's train*.parquet and test*.parquet. Or name another folder "
      "(--data-dir, ALRAO_DATA_DIR), allow the download (--download), or try "
      "--dataset digits, which needs no files."
    )
  layout, path = found
  train, test = layout.read(path, counts)
  return Dataset(
    name="cifar10",
    train_images=train.images,
    train_labels=train.labels,
    test_images=test.images,
    test_labels=test.labels,
    class_names=CLASS_NAMES,
    can_flip=True,
    source=str(path),
  )


def _find(data_dir: Path):
  """Returns the first layout found and where, quickest layouts first, or None."""
  folders = list(_folders(data_dir))
  # Parquet shards look alike whatever they hold: go by the folder's name.
  named = [path for path in folders if path == data_dir or _is_named(path, data_dir)]
  for layout, places in ((PICKLE, folders), (BINARY, folders), (PARQUET, named)):
    for folder in places:
      path = layout.find(folder)
      if path is not None:
        return layout, path
  return None


def _folders(data_dir: Path) -> Iterator[Path]:
  """All folders to look in: two levels, and six where the name promises CIFAR-10."""
  for name, subfolders, _ in os.walk(data_dir, followlinks=True):
    folder = Path(name)
    depth = len(folder.relative_to(data_dir).parts)
    if depth >= (6 if _is_named(folder, data_dir) else 2):
      subfolders.clear()
    subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    yield folder


def _is_named(folder: Path, data_dir: Path) -> bool:
  path = f"{data_dir.name}/{folder.relative_to(data_dir)}"
  return re.search(r"cifar[-_]?10(?!0)", path, re.IGNORECASE) is not None


# CIFAR-10's own two layouts: files of images in a folder or archive.


class BatchFiles(NamedTuple):
  """A layout of equal training files and one test file.

  Attributes:
    folder: The folder's official name.
    archive: Name of the ``.tar.gz`` that holds it.
    train_names: Names of the training files, in order.
    test_name: Name of the test file.
    parse: Reads one file: (its name for errors, its content, number of images).
  """

  folder: str
  archive: str
  train_names: tuple[str, ...]
  test_name: str
  parse: Callable[[str, bytes, int], Split]

  def find(self, folder: Path) -> Path | None:
    """Returns what to `read` in a folder: the folder itself, an archive, or None."""
    if folder.name == self.folder or os.path.isfile(folder / self.train_names[0]):
      return folder
    archive = folder / self.archive
    return archive if os.path.isfile(archive) else None

  def read(self, path: Path, counts: tuple[int, int]) -> tuple[Split, Split]:
    """Reads the data.

    Args:
      path: The folder, or the archive.
      counts: Numbers of training and test images.

    Returns:
      Training and test data.

    Raises:
      DataError: A file is missing, unreadable, or not what it should be.
    """
    num_train, num_test = counts
    sizes = dict.fromkeys(self.train_names, num_train // len(self.train_names))
    sizes[self.test_name] = num_test
    files = _archive_files if os.path.isfile(path) else _folder_files
    batches = {
      name: self.parse(f"{path}/{name}", content, sizes[name])
      for name, content in files(path, list(sizes))
    }
    missing = [name for name in sizes if name not in batches]
    if missing:
      raise DataError(f"{path}: no {', '.join(missing)} in it; get it anew.")
    test = batches.pop(self.test_name)
    train = [batches[name] for name in self.train_names]
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return Split(images, labels), test


def _rows_to_images(rows: np.ndarray) -> np.ndarray:
  """Turns rows (n, 3072), channel after channel, into images (n, 32, 32, 3)."""
  return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _folder_files(path: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
  for name in names:
    # Those that are missing are named together.
    if os.path.lexists(path / name):
      yield name, read_file(path / name, MAX_FILE_BYTES)


def _archive_files(path: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
  check_file(path)
  with damage_told(f"{path}: truncated or damaged"), gzip.open(path) as compressed:
    stream: Any = Bounded(path, compressed, MAX_BYTES)
    with tarfile.open(fileobj=stream, mode="r|") as archive:
      for number, member in enumerate(archive):
        if number >= MAX_MEMBERS:
          raise DataError(f"{path}: more than {MAX_MEMBERS} files; no CIFAR-10.")
        name = Path(member.name).name
        if name in names:
          yield name, _member(path, archive, member)
    # The archive's checksum stands at its end.
    while stream.read(CHUNK):
      pass


def _member(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
  # A link's target may be missing, or the link itself, and no official archive has any;
  # a sparse file's size is its own word alone.
  content = None
  if member.isreg() and not member.issparse():
    content = archive.extractfile(member)
  if content is None:
    raise DataError(
      f"{path}/{member.name}: a link, a folder or a device, not a file; get it anew."
    )
  if member.size > MAX_FILE_BYTES:
    raise DataError(
      f"{path}/{member.name}: holds {member.size:,} bytes, expected at most "
      f"{MAX_FILE_BYTES:,}; no CIFAR-10 file."
    )
  found = content.read()
  if len(found) != member.size:
    raise DataError(f"{path}/{member.name}: truncated; get it anew.")
  return found


# Plain bytes: `cifar-10-batches-bin`, or its `.tar.gz`.


def _parse_binary(where: str, content: bytes, count: int) -> Split:
  record = 1 + ROW  # a label, then the image
  if len(content) != count * record:
    raise DataError(
      f"{where}: holds {len(content):,} bytes, expected {count * record:,} ({count:,} "
      f"images of {record:,}); truncated, or no CIFAR-10 file."
    )
  records = np.frombuffer(content, np.uint8).reshape(count, record)
  labels = check_labels(where, records[:, 0], NUM_CLASSES)
  return Split(_rows_to_images(records[:, 1:]), labels)


BINARY = BatchFiles(
  folder="cifar-10-batches-bin",
  archive="cifar-10-binary.tar.gz",
  train_names=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
  test_name="test_batch.bin",
  parse=_parse_binary,
)


# Python pickles: `cifar-10-batches-py`, or its `.tar.gz`.

# What the stand-ins below restore, in numpy's notation.
DTYPES = ("|u1", "<i4", "<i8")
# For an image: its label, as one of numpy's integers, and its file's name take a dozen,
# one of them a tuple.
MAX_OPCODES = 20
MAX_TUPLES = 2


def _parse_pickle(where: str, content: bytes, count: int) -> Split:
  try:
    _check_opcodes(content, count)
    batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    batch = {_text(key): value for key, value in batch.items()}
    rows, labels = (_plain(batch[name]) for name in ("data", "labels"))
  except DataError as error:
    raise DataError(f"{where}: {error}") from error
  except Exception as error:  # a damaged pickle can raise anything
    raise DataError(
      f"{where}: truncated, or no CIFAR-10 pickle ({reason(error)})."
    ) from error
  if (rows.shape, labels.shape) != ((count, ROW), (count,)):
    raise DataError(
      f"{where}: holds data of shape {rows.shape} and labels of shape {labels.shape}, "
      f"expected {(count, ROW)} and {(count,)}."
    )
  if rows.dtype != np.uint8 or labels.dtype.kind not in "iu":
    raise DataError(
      f"{where}: holds data of {rows.dtype} and labels of {labels.dtype}, expected "
      "uint8 and integers."
    )
  return Split(_rows_to_images(rows), check_labels(where, labels, NUM_CLASSES))


def _check_opcodes(content: bytes, count: int) -> None:
  """Raises an error unless a pickle takes about as much memory as its bytes.

  An unpickler allocates what a length says before it reads that much, and a table as
  long as the largest number under which something is remembered: nine bytes can ask for
  all memory. An empty set takes 200 times the byte that makes it. And Python itself
  ends, without an error, when it hashes 200,000 tuples that are each in the next one.
  """
  left = {"objects": 1_000 + MAX_OPCODES * count, "tuples": 1_000 + MAX_TUPLES * count}
  argument: Any
  for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
    left["objects"] -= 1
    left["tuples"] -= opcode.name.startswith("TUPLE")
    for kind, number_left in left.items():
      if number_left < 0:
        raise DataError(f"holds too many {kind} for {count:,} images; refused.")
    if "PUT" in opcode.name and int(argument) > number:
      raise DataError(f"remembers an object as number {argument}; refused.")


class _Unpickler(pickle.Unpickler):
  """Makes numbers, text, bytes, lists, dicts and arrays; refuses all else.

  A pickle is a program, and an ordinary unpickler calls what it names. This one calls
  the stand-ins below: numpy's own functions would take a damaged array's word for its
  size and type.
  """

  _encoded = 0  # bytes that `encode` has made: a text can be encoded many times

  def find_class(self, module_name: str, global_name: str, /) -> Any:
    # Named by the module of whatever version of numpy wrote them.
    name = f"{module_name.split('.')[0]}.{global_name}"
    if name == "_codecs.encode":
      return self._encode
    if name not in STAND_INS:
      raise DataError(
        f"this pickle would call {module_name[:80]}.{global_name[:80]}, which no "
        "CIFAR-10 file does; refused."
      )
    return STAND_INS[name]

  def _encode(self, text: str, encoding: str) -> bytes:
    """Stands for `codecs.encode`, with which Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
      raise DataError(f"refused to decode {encoding!r}.")
    self._encoded += len(text)
    if self._encoded > MAX_FILE_BYTES:
      raise DataError(f"encodes more than {MAX_FILE_BYTES:,} bytes; refused.")
    return text.encode(encoding)


class _Dtype:
  order = ""

  def __init__(self, name: str | bytes, *_):
    self.name = _text(name)

  def __setstate__(self, state: tuple):
    self.order = _text(state[1])

  def read(self, content: bytes) -> np.ndarray:
    code = f"{self.order}{self.name}"
    if code not in DTYPES:
      raise DataError(
        f"holds an array of type {code[:80]}, which no CIFAR-10 file does."
      )
    return np.frombuffer(content, code)


class _Array:
  value: np.ndarray

  def __setstate__(self, state: tuple):
    _, shape, dtype, is_fortran, content = state
    self.value = dtype.read(content).reshape(shape, order="F" if is_fortran else "C")


def _from_buffer(content: bytes, dtype: _Dtype, shape: tuple, order: str) -> _Array:
  array = _Array()
  array.__setstate__((1, shape, dtype, order == "F", content))
  return array


STAND_INS = {
  "numpy.ndarray": _Array,
  "numpy.dtype": _Dtype,
  "numpy._reconstruct": lambda *_: _Array(),
  "numpy._frombuffer": _from_buffer,
  "numpy.scalar": lambda dtype, content: dtype.read(content)[0],
}


def _text(value: str | bytes) -> str:
  return value.decode() if isinstance(value, bytes) else value


def _plain(value: Any) -> np.ndarray:
  if isinstance(value, _Array):
    return value.value
  # As an array, a list of lists that are all the same one could be of any size.
  if not isinstance(value, list) or not all(map(_is_number, value)):
    raise TypeError(f"neither an array nor a list of numbers, but {type(value)}")
  return np.asarray(value)


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float, np.number))


PICKLE = BatchFiles(
  folder="cifar-10-batches-py",
  archive="cifar-10-python.tar.gz",
  train_names=tuple(f"data_batch_{i}" for i in range(1, 6)),
  test_name="test_batch",
  parse=_parse_pickle,
)


# As the Hugging Face hub ships it: Parquet shards of PNG or WebP images.


class ParquetFiles:
  """The layout of shards in a folder."""

  def find(self, folder: Path) -> Path | None:
    """Returns the folder if it holds shards, else None."""
    has_any = find_shards(folder, "train") or find_shards(folder, "test")
    return folder if has_any else None

  def read(self, path: Path, counts: tuple[int, int]) -> tuple[Split, Split]:
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
    splits = dict(zip(("train", "test"), counts, strict=True))
    shards = {name: find_shards(path, name) for name in splits}
    for name in shards:
      check_complete(path, name, shards[name])

    def decode() -> Arrays:
      arrays = {}
      for name, count in splits.items():
        split = _decode_shards(path, name, shards[name], count)
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = split
      return arrays

    def check(arrays: Arrays) -> None:
      for name, count in splits.items():
        images, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]
        if (images.dtype, labels.dtype) != (np.uint8, np.int32):
          raise DataError("images and labels of other types")
        if (images.shape, labels.shape) != ((count, *SHAPE), (count,)):
          raise DataError("images and labels of other shapes")
        check_labels(path, labels, NUM_CLASSES)

    arrays = cached([*shards["train"], *shards["test"]], decode, check)
    train, test = (
      Split(arrays[f"{name}_images"], arrays[f"{name}_labels"]) for name in shards
    )
    return train, test


def _decode_shards(
  folder: Path, split: str, paths: Sequence[Path], count: int
) -> Split:
  shards = [Shard(path) for path in paths]
  found = sum(shard.num_rows for shard in shards)
  if found != count:
    raise DataError(
      f"{folder}: {found:,} {split} images in its shards, expected {count:,}; "
      "incomplete, or another data set."
    )
  labels = np.concatenate([shard.labels(NUM_CLASSES) for shard in shards])
  images = np.empty((count, *SHAPE), np.uint8)
  position = 0
  console = Console(stderr=True)
  with Progress(
    console=console, transient=True, disable=not console.is_terminal
  ) as progress:
    task = progress.add_task(f"decoding {split} images (once)", total=count)
    for shard in shards:
      first = position
      for group in range(len(shard.sizes)):
        for encoded in shard.images(group, MAX_BYTES):
          where = f"{shard.path}: image {position - first}"
          images[position] = _decode_image(where, encoded.as_py())
          position += 1
        progress.update(task, completed=position)
  return Split(images, labels)


def _decode_image(where: str, encoded: bytes | None) -> np.ndarray:
  height, width, _ = SHAPE
  with (
    damage_told(f"{where}: neither PNG nor WebP, or damaged"),
    # What the hub has used; a JPEG would not hold CIFAR-10's very pixels.
    Image.open(io.BytesIO(encoded or b""), formats=("PNG", "WEBP")) as image,
  ):
    if image.size != (width, height):
      raise DataError(
        f"{where}: has {image.width} x {image.height} pixels, expected {width} x "
        f"{height}."
      )
    return np.asarray(to_rgb(image))


PARQUET = ParquetFiles()
