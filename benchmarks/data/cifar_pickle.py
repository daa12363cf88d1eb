"""CIFAR-10 as Python pickles: ``cifar-10-batches-py``, or its ``.tar.gz``."""

import io
import pickle
from typing import Any

import numpy as np

from benchmarks.data.cifar_batches import (
  NUM_CLASSES,
  ROW,
  BatchFiles,
  rows_to_images,
)
from benchmarks.data.dataset import DataError, Split, check_labels

# What the stand-ins below restore, in numpy's notation.
DTYPES = ("|u1", "<i4", "<i8")


def _parse(where: str, content: bytes, count: int) -> Split:
  try:
    batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    batch = {_text(key): value for key, value in batch.items()}
    rows, labels = (_plain(batch[name]) for name in ("data", "labels"))
  except DataError as error:
    raise DataError(f"{where}: {error}") from error
  except Exception as error:  # a damaged pickle can raise anything
    raise DataError(
      f"{where}: truncated, or no CIFAR-10 pickle ({type(error).__name__}: {error})."
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
  return Split(rows_to_images(rows), check_labels(where, labels, NUM_CLASSES))


class _Unpickler(pickle.Unpickler):
  """Makes numbers, text, bytes, lists, dicts and arrays; refuses all else.

  A pickle is a program, and an ordinary unpickler calls what it names. This one calls
  the stand-ins below: numpy's own functions would take a damaged array's word for its
  size and type.
  """

  def find_class(self, module_name: str, global_name: str, /) -> Any:
    # Named by the module of whatever version of numpy wrote them.
    name = f"{module_name.split('.')[0]}.{global_name}"
    if name not in STAND_INS:
      raise DataError(
        f"this pickle would call {module_name}.{global_name}, which no CIFAR-10 file "
        "does; refused."
      )
    return STAND_INS[name]


class _Dtype:
  def __init__(self, name: str | bytes, *_):
    self.code = _text(name)

  def __setstate__(self, state: tuple):
    self.code = _text(state[1]) + self.code  # byte order

  def read(self, content: bytes) -> np.ndarray:
    if self.code not in DTYPES:
      raise DataError(
        f"holds an array of type {self.code}, which no CIFAR-10 file does."
      )
    return np.frombuffer(content, self.code)


class _Array:
  value: np.ndarray

  def __setstate__(self, state: tuple):
    _, shape, dtype, is_fortran, content = state
    self.value = dtype.read(content).reshape(shape, order="F" if is_fortran else "C")


def _from_buffer(content: bytes, dtype: _Dtype, shape: tuple, order: str) -> _Array:
  array = _Array()
  array.__setstate__((1, shape, dtype, order == "F", content))
  return array


def _latin1(text: str, encoding: str) -> bytes:
  """Stands for `codecs.encode`, with which Python 3 writes bytes for Python 2."""
  if encoding != "latin1":
    raise DataError(f"refused to decode {encoding!r}.")
  return text.encode(encoding)


STAND_INS = {
  "numpy.ndarray": _Array,
  "numpy.dtype": _Dtype,
  "numpy._reconstruct": lambda *_: _Array(),
  "numpy._frombuffer": _from_buffer,
  "numpy.scalar": lambda dtype, content: dtype.read(content)[0],
  "_codecs.encode": _latin1,
}


def _text(value: str | bytes) -> str:
  return value.decode() if isinstance(value, bytes) else value


def _plain(value: Any) -> np.ndarray:
  return value.value if isinstance(value, _Array) else np.asarray(value)


LAYOUT = BatchFiles(
  folder="cifar-10-batches-py",
  archive="cifar-10-python.tar.gz",
  train_names=tuple(f"data_batch_{i}" for i in range(1, 6)),
  test_name="test_batch",
  parse=_parse,
)
