"""Batches of decoded, randomly cropped images, by grain, in worker processes.

A batch is a function of the run's seed and the batch's number alone, whatever the
number of workers and of hosts: a stream stands at a number, and goes on from any.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import Image

from benchmarks.data.dataset import DataError
from benchmarks.data.image_crops import Box, centre_box, decode, random_box
from benchmarks.data.image_files import Part

Batch = dict[str, np.ndarray]
# Of an image's index, width and height: which box to keep, and whether to mirror it.
Crop = Callable[[int, int, int], tuple[Box, bool]]

# Images among which those of shards are mixed: a batch reads all row groups that it has
# images of, so mixing further costs more reading. Row groups come in random order. A
# window's groups must fit in `imagenet.MAX_KEPT`, or every batch reads them anew:
# ImageNet's images have 115 kB each, in groups of about 100. Every process that reads
# keeps its own.
WINDOW = 2048


class TrainBatches:
  """Batches of all epochs, one after the other: a random-access source for grain.

  Batch ``k`` is of epoch ``k // steps_per_epoch + 1``. An epoch shows each image once,
  less what does not fill a batch.
  """

  def __init__(
    self,
    part: Part,
    *,
    batch_size: int,
    image_size: int,
    max_epochs: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
  ):
    """Makes the source; nothing is read yet.

    Args:
      part: The training images.
      batch_size: Number of images in a batch, of all hosts together.
      image_size: Side of the cropped images.
      max_epochs: Number of epochs.
      seed: Determines order, crops and mirroring.
      share: Which part of every batch to load, and of how many; see
        `benchmarks.devices.Share`.
    """
    self.steps_per_epoch = len(part.indices) // batch_size
    self._part, self._seed, self._size = part, seed, image_size
    self._batch_size, self._max_epochs = batch_size, max_epochs
    self._rows = _rows(batch_size, *share)
    self._order = (0, np.zeros(0, np.int64))  # of the epoch last asked for

  def __len__(self) -> int:
    return self.steps_per_epoch * self._max_epochs

  def __getitem__(self, number: int) -> Batch:
    """Returns ``images``, ``labels``, ``index`` and ``is_corrupt``, as `load` does.

    What is corrupt has another image of the batch in its place, whoever loads that.

    Args:
      number: Of the batch.

    Raises:
      DataError: All images of the batch are damaged.
    """
    epoch, step = divmod(int(number), self.steps_per_epoch)
    order = self._epoch_order(epoch + 1)
    start = step * self._batch_size
    whole = order[start : start + self._batch_size]
    indices = whole[self._rows]

    def crop(index: int, width: int, height: int) -> tuple[Box, bool]:
      # Not `index`: a last 0 would give the generator of the epoch's order.
      rng = np.random.default_rng([self._seed, epoch + 1, 1 + index])
      return random_box(rng, width, height), bool(rng.random() < 0.5)

    batch = load(self._part, indices, self._size, crop)
    for position in np.flatnonzero(batch["is_corrupt"]):
      key = [self._seed, epoch + 1, 1 + int(indices[position]), 1]
      other = self._first_whole(np.random.default_rng(key).permutation(whole), crop)
      for name in ("images", "labels"):
        batch[name][position] = other[name][0]
    return batch

  def _first_whole(self, indices: np.ndarray, crop: Crop) -> Batch:
    """The first of some images that is not damaged, as a batch."""
    for index in indices:
      found = load(self._part, np.array([index]), self._size, crop)
      if not found["is_corrupt"][0]:
        return found
    raise DataError(
      f"{self._part.source.name(int(indices[0]))}: damaged, too large, or neither "
      "JPEG, PNG nor WebP, as are all images of its batch; mend or remove them."
    )

  def _epoch_order(self, epoch: int) -> np.ndarray:
    found = self._order
    if found[0] != epoch:
      rng = np.random.default_rng([self._seed, epoch])
      # One tuple, since a thread may ask for the next epoch meanwhile.
      found = self._order = epoch, shuffle(self._part, rng, WINDOW)
    return found[1]


class EvaluationBatches:
  """Batches of a part, each image once, in order: a random-access source for grain."""

  def __init__(
    self,
    part: Part,
    *,
    batch_size: int,
    image_size: int,
    share: tuple[int, int] = (0, 1),
  ):
    """Makes the source; nothing is read yet.

    Args:
      part: The images.
      batch_size: Number of images in a batch, of all hosts together.
      image_size: Side of the cropped images.
      share: Which part of every batch to load, and of how many; see
        `benchmarks.devices.Share`.
    """
    self._part, self._size, self._batch_size = part, image_size, batch_size
    self._rows = _rows(batch_size, *share)

  def __len__(self) -> int:
    return -(-len(self._part.indices) // self._batch_size)

  def __getitem__(self, number: int) -> Batch:
    """Returns what `load` does, and ``valid``: (n,), bool, the images that count.

    What fills the last batch up is not valid.

    Args:
      number: Of the batch.
    """
    indices = self._part.indices
    positions = int(number) * self._batch_size + np.arange(self._batch_size)
    positions = positions[self._rows]
    inside = positions < len(indices)
    batch = load(
      self._part,
      indices[positions[inside]],
      self._size,
      lambda index, width, height: (centre_box(width, height), False),
    )
    missing = len(positions) - int(inside.sum())
    batch = {
      name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
      for name, array in batch.items()
    }
    return {**batch, "valid": inside & ~batch["is_corrupt"]}


def _rows(batch_size: int, index: int, count: int) -> slice:
  size = batch_size // count
  return slice(index * size, (index + 1) * size)


class Stream:
  """Reads a source's batches in order, ahead of time, and keeps its place."""

  def __init__(self, source: Any, workers: int):
    """Makes the stream; it starts to read when asked to.

    Args:
      source: Batches by number.
      workers: Number of processes that read; 0: a thread of this one.
    """
    self._source, self._workers = source, workers
    self._iterator: Any = None
    self._position = 0

  def read(self, start: int, stop: int) -> Iterator[Batch]:
    """Yields batches; goes on reading ahead if it stands at the first.

    Args:
      start: Number of the first batch.
      stop: Number behind the last.
    """
    if self._iterator is None or self._position != start:
      self.close()
      self._iterator, self._position = self._open(start), start
    for _ in range(start, stop):
      batch = next(self._iterator)
      self._position += 1
      yield batch
    if self._position == len(self._source):
      self.close()

  def close(self) -> None:
    """Ends the processes that read."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None

  def _open(self, start: int) -> Any:
    # Every element is a whole batch, so that none depends on the number of workers.
    batches = grain.MapDataset.source(self._source)[start:]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    dataset = batches.to_iter_dataset(options)
    if self._workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain has some, which no program here parses
      processes = grain.MultiprocessingOptions(
        num_workers=min(self._workers, len(self._source) - start),
        per_worker_buffer_size=2,
      )
      dataset = dataset.mp_prefetch(processes, _end_with_parent)
    return iter(dataset)


def _end_with_parent(*_: int) -> None:
  """Makes a process that reads end when the one that trains is killed."""
  parent = multiprocessing.parent_process()

  def wait() -> None:
    if parent is not None:
      parent.join()
      os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


def load(
  part: Part,
  indices: np.ndarray,
  size: int,
  crop: Crop,
) -> Batch:
  """Reads, decodes, cuts out and resizes images.

  Args:
    part: Of what.
    indices: (n,), of the source's images.
    size: Side of the result.
    crop: Says which box of an image to keep, and whether to mirror it.

  Returns:
    ``images`` (n, size, size, 3), uint8; ``labels`` (n,), int32; their ``index`` (n,),
    int64; and ``is_corrupt`` (n,), bool, where an image could not be decoded and is
    black.
  """
  images = np.zeros((len(indices), size, size, 3), np.uint8)
  is_corrupt = np.zeros(len(indices), bool)
  for place, encoded in enumerate(part.source.read(indices)):
    decoded = decode(encoded)
    if decoded is None:
      is_corrupt[place] = True
      continue
    box, mirrored = crop(int(indices[place]), *decoded.size)
    resized = decoded.resize((size, size), Image.Resampling.BILINEAR, box)
    pixels = np.asarray(resized)
    images[place] = pixels[:, ::-1] if mirrored else pixels
  return {
    "images": images,
    "labels": part.source.labels[indices],
    "index": np.asarray(indices, np.int64),
    "is_corrupt": is_corrupt,
  }


def shuffle(part: Part, rng: np.random.Generator, window: int) -> np.ndarray:
  """Returns a part's indices in a random order that keeps reading cheap.

  Where images are read in groups, the groups come in random order, and images are mixed
  within windows; otherwise, and where a window holds all, every order is as likely.

  Args:
    part: The images.
    rng: Random generator.
    window: Number of images in a window.
  """
  indices, bounds = part.indices, part.source.bounds
  if bounds is None or len(indices) <= window:
    return rng.permutation(indices)
  groups = np.searchsorted(bounds, indices, side="right") - 1
  rank = rng.permutation(len(bounds) - 1)
  order = indices[np.argsort(rank[groups], kind="stable")]
  for start in range(0, len(order), window):
    order[start : start + window] = rng.permutation(order[start : start + window])
  return order
