"""The data of the short tasks: real, small, and always the same."""

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import data
from benchmarks.arena.problem import Data, Part
from benchmarks.data import DataError
from benchmarks.data.cache import Arrays, cached
from benchmarks.data.dataset import check_labels, resolve_data_dir
from benchmarks.data.image_crops import decode
from benchmarks.data.imagenet import MAX_GROUP_BYTES
from benchmarks.data.parquet import Shard
from benchmarks.data.text import UNKNOWN, load_text

MAX_IMAGES = 4 * 13_394  # four times Imagenette's
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
    _check,
  )
  train = Part(arrays["train_inputs"], arrays["train_targets"])
  test = Part(arrays["test_inputs"], arrays["test_targets"])
  order = np.random.default_rng(0).permutation(len(train.targets))
  train = Part(train.inputs[order], train.targets[order])
  order = np.random.default_rng(0).permutation(len(test.targets))[:NUM_TEST]
  test = Part(test.inputs[order], test.targets[order])
  return Data(*_hold_out(train, 1_000), test, num_outputs=10)


def _decode(paths: list[Path]) -> Part:
  shards = [Shard(path) for path in paths]
  count = sum(shard.num_rows for shard in shards)
  if not NUM_TEST <= count <= MAX_IMAGES:
    raise DataError(
      f"{paths[0]}: {count:,} images in it and those beside it, expected from "
      f"{NUM_TEST:,} to {MAX_IMAGES:,}; incomplete, or another data set."
    )
  labels = np.concatenate([shard.labels(num_classes=10) for shard in shards])
  images = np.empty((count, 32, 32, 3), np.uint8)
  position = 0
  for shard in shards:
    first = position
    for group in range(len(shard.sizes)):
      for encoded in shard.images(group, MAX_GROUP_BYTES):
        image = decode(encoded.as_py())
        if image is None:
          raise DataError(
            f"{shard.path}: image {position - first}: damaged, or neither JPEG, PNG "
            "nor WebP; get it anew."
          )
        images[position] = np.asarray(image.resize((32, 32), Image.Resampling.BOX))
        position += 1
  return Part(images, labels)


def _check(arrays: Arrays) -> None:
  """Raises an error unless `arrays` are what `imagenette` decodes."""
  for split in ("train", "test"):
    images, labels = arrays[f"{split}_inputs"], arrays[f"{split}_targets"]
    if images.dtype != np.uint8 or images.shape != (len(labels), 32, 32, 3):
      raise DataError("images of another type or shape")
    check_labels(split, labels, 10)


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
