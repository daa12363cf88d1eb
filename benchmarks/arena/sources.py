"""The data of the short tasks: real, small, and always the same."""

import io
from pathlib import Path

import numpy as np

from benchmarks import data
from benchmarks.arena.problem import Data, Part
from benchmarks.data import DataError
from benchmarks.data.cache import cached
from benchmarks.data.dataset import check_labels, resolve_data_dir
from benchmarks.data.text import UNKNOWN, load_text

NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 10_000, 2_000, 2_000


def cifar10(data_dir: Path | None) -> Data:
  """Returns 10,000 of CIFAR-10's images to train on, 2,000 to hold out, 2,000 to test.

  Args:
    data_dir: The folder below which to look, as in `benchmarks.data.load`.
  """
  splits = data.load("cifar10", data_dir).split(NUM_TRAIN, NUM_VALIDATION, NUM_TEST)
  return Data(*(Part(*split) for split in splits), num_outputs=10)


def imagenette(data_dir: Path | None) -> Data:
  """Returns Imagenette at 32x32 pixels: its first 8,469 training images, 1,000, 2,000.

  Args:
    data_dir: The folder that holds ``imagenette*/train-*.parquet`` and
      ``imagenette*/validation-*.parquet``.

  Raises:
    DataError: There is none, or it is damaged.
  """
  root = resolve_data_dir(data_dir)
  paths = []
  for split in ("train", "validation"):
    found = sorted(root.glob(f"imagenette*/{split}-*.parquet"))
    if not found:
      raise DataError(f"no imagenette*/{split}-*.parquet below {root}.")
    paths.append(found)
  arrays = cached(
    [path for found in paths for path in found],
    lambda: {
      f"{split}_{name}": array
      for split, found in zip(("train", "test"), paths, strict=True)
      for name, array in _decode(found)._asdict().items()
    },
  )
  train = Part(arrays["train_inputs"], arrays["train_targets"])
  test = Part(arrays["test_inputs"], arrays["test_targets"])
  order = np.random.default_rng(0).permutation(len(train.targets))
  train = Part(train.inputs[order], train.targets[order])
  order = np.random.default_rng(0).permutation(len(test.targets))[:NUM_TEST]
  test = Part(test.inputs[order], test.targets[order])
  return Data(*_hold_out(train, 1_000), test, num_outputs=10)


def _decode(paths: list[Path]) -> Part:
  import pyarrow.parquet as pq
  from PIL import Image

  images, labels = [], []
  for path in paths:
    try:
      table = pq.read_table(path)
      for encoded in table.column("image").combine_chunks().field("bytes").to_pylist():
        with Image.open(io.BytesIO(encoded)) as image:
          small = image.convert("RGB").resize((32, 32), Image.Resampling.BOX)
          images.append(np.asarray(small))
    except (OSError, KeyError, ValueError) as error:
      raise DataError(f"{path}: damaged, or not images ({error}).") from error
    labels.append(check_labels(path, table.column("label").to_numpy(), 10))
  return Part(np.stack(images), np.concatenate(labels))


def characters(length: int, data_dir: Path | None) -> Data:
  """Returns Penn Treebank's first million characters, cut; targets are the next ones.

  Args:
    length: Characters of an example.
    data_dir: The folder below which to look, as in `benchmarks.data.text.load_text`.
  """
  text = load_text("characters", data_dir)
  sizes = {"train": 1_000_000, "validation": 50_000, "test": 50_000}
  parts = [_windows(getattr(text, part)[:n], length) for part, n in sizes.items()]
  return Data(*parts, num_outputs=len(text.vocabulary))


def _windows(symbols: np.ndarray, length: int) -> Part:
  count = (len(symbols) - 1) // length
  cut = lambda shift: symbols[shift : shift + count * length].reshape(count, length)  # noqa: E731
  return Part(cut(0).astype(np.int32), cut(1).astype(np.int32))


def words(context: int, vocabulary: int, data_dir: Path | None) -> Data:
  """Returns Penn Treebank's words, each with those before it, if both are frequent.

  Args:
    context: Number of words before.
    vocabulary: How many of the most frequent words there are. Targets are only these;
      all others are one unknown word in contexts.
    data_dir: The folder below which to look.
  """
  text = load_text("words", data_dir)
  sizes = {"train": 200_000, "validation": 10_000, "test": 10_000}
  parts = []
  for part, size in sizes.items():
    symbols = getattr(text, part)[:size]
    # Most frequent first, so that an index is a rank.
    known = np.where(symbols < vocabulary, symbols, vocabulary)
    if UNKNOWN in text.vocabulary:
      unknown = text.vocabulary.index(UNKNOWN)
      known = np.where(symbols == unknown, vocabulary, known)
    inputs = np.lib.stride_tricks.sliding_window_view(known[:-1], context)
    targets = known[context:]
    kept = targets < vocabulary
    parts.append(Part(inputs[kept].astype(np.int32), targets[kept].astype(np.int32)))
  return Data(*parts, num_outputs=vocabulary)


def digits(data_dir: Path | None) -> Data:
  """Returns scikit-learn's digits, 64 numbers from 0 to 1 each.

  Args:
    data_dir: Not needed.
  """
  from sklearn.datasets import load_digits

  del data_dir
  inputs, labels = map(np.asarray, load_digits(return_X_y=True))
  return _thirds(inputs.astype(np.float32) / 16, labels.astype(np.int32), 10)


def diabetes(data_dir: Path | None) -> Data:
  """Returns scikit-learn's diabetes data, all columns with mean 0 and deviation 1.

  Args:
    data_dir: Not needed.
  """
  from sklearn.datasets import load_diabetes

  del data_dir
  inputs, targets = map(np.asarray, load_diabetes(return_X_y=True))
  columns = np.concatenate([inputs, targets[:, None]], axis=1)
  columns = (columns - columns.mean(axis=0)) / columns.std(axis=0)
  columns = columns.astype(np.float32)
  return _thirds(columns[:, :-1], columns[:, -1:], 1)


def _thirds(inputs: np.ndarray, targets: np.ndarray, num_outputs: int) -> Data:
  """Shuffles; three fifths train, a fifth validates, a fifth tests."""
  order = np.random.default_rng(0).permutation(len(targets))
  whole = Part(inputs[order], targets[order])
  fifth = len(targets) // 5
  rest, test = _hold_out(whole, fifth)
  return Data(*_hold_out(rest, fifth), test, num_outputs=num_outputs)


def _hold_out(part: Part, count: int) -> tuple[Part, Part]:
  return (
    Part(part.inputs[:-count], part.targets[:-count]),
    Part(part.inputs[-count:], part.targets[-count:]),
  )
