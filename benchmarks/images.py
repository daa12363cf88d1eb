"""Training networks to classify images, as a program for `benchmarks.engine`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from benchmarks.classifying import ClassifierProgram
from benchmarks.classifying import Snapshot as Snapshot
from benchmarks.classifying import State as State
from benchmarks.data import Splits, channel_statistics
from benchmarks.data.augment import augment
from benchmarks.models.layers import Classifier
from benchmarks.optimizers import Optimizer

EVALUATION_BATCH = 250


class ImageData:
  """A data set's parts on the device, as bytes, transferred once.

  Attributes:
    images: All parts, one after the other, (n, height, width, channels), uint8.
    labels: (n,), int32.
    mean: Of each channel of the training images, (channels,), where 255 counts as 1.
    std: Standard deviation likewise.
    parts: The range of indices of ``"train"``, ``"validation"`` and ``"test"``.
  """

  def __init__(self, splits: Splits):
    """Transfers the data.

    Args:
      splits: Training, validation and test part.
    """
    self.images = jax.device_put(np.concatenate([part.images for part in splits]))
    self.labels = jax.device_put(np.concatenate([part.labels for part in splits]))
    self.mean, self.std = channel_statistics(splits.train.images)
    stops = np.cumsum([len(part.labels) for part in splits]).tolist()
    self.parts = {
      name: range(start, stop)
      for name, start, stop in zip(Splits._fields, [0, *stops[:-1]], stops, strict=True)
    }


class ImageProgram(ClassifierProgram):
  """Trains one network with one optimizer; a `benchmarks.engine.Program`.

  All images are on the device, and a batch says which.
  """

  def __init__(
    self,
    model: Classifier,
    optimizer: Optimizer,
    data: ImageData,
    *,
    batch_size: int,
    max_epochs: int,
    flip: bool,
    augmented: bool = True,
    dtype: DTypeLike = jnp.float32,
    any_rate: Any = 1.0,
  ):
    """Makes the program; nothing is compiled yet.

    Args:
      model: The network, with heads if the optimizer needs them.
      optimizer: The optimizer.
      data: What to train, validate and test on.
      batch_size: Number of images in a step. An epoch leaves out what does not fill
        the last one.
      max_epochs: Maximum number of epochs, over which schedules run.
      flip: Whether augmentation mirrors images.
      augmented: Whether training images are shifted, and mirrored.
      dtype: Of the normalised images.
      any_rate: A rate that `optimizer` could be given.
    """
    super().__init__(
      model,
      optimizer,
      num_train=len(data.parts["train"]),
      image_shape=data.images.shape[1:],
      mean=data.mean,
      std=data.std,
      batch_size=batch_size,
      max_epochs=max_epochs,
      dtype=dtype,
      any_rate=any_rate,
    )
    self.data = (data.images, data.labels)
    self._parts, self._flip, self._augmented = data.parts, flip, augmented

  def batches(self, seed: int, epoch: int) -> dict[str, np.ndarray]:
    """Returns an epoch's batches: indices of images, and a key for augmentation.

    Args:
      seed: Seed of the run.
      epoch: Number of the epoch.
    """
    train = self._parts["train"]
    order = np.random.default_rng([seed, epoch]).permutation(len(train))
    indices = order[: self.examples_per_epoch].astype(np.int32) + train.start
    return {
      "indices": indices.reshape(self.steps_per_epoch, self._batch_size),
      "key": self._keys(seed, epoch),
    }

  def evaluate(self, snapshot: Snapshot, part: str) -> dict[str, float]:
    """Returns mean ``loss`` and ``accuracy``.

    Args:
      snapshot: What predictions need.
      part: ``"validation"`` or ``"test"`` (or ``"train"``, without augmentation).
    """
    indices = np.array(self._parts[part], np.int32)
    num_batches = -(-len(indices) // EVALUATION_BATCH)
    shape = (num_batches, EVALUATION_BATCH)
    # Batches of one shape, so of one program for all parts.
    batches = {
      "indices": np.resize(indices, shape),
      "valid": (np.arange(math.prod(shape)) < len(indices)).reshape(shape),
    }
    data = (jax.device_put(snapshot), self.data)
    _, sums = self._evaluate((), data, batches)
    return {
      "loss": float(sums["loss"].sum(dtype=np.float64)) / len(indices),
      "accuracy": float(sums["correct"].sum()) / len(indices),
    }

  def _read(self, data, batch, *, train):
    images, labels = data
    images, labels = images[batch["indices"]], labels[batch["indices"]]
    if train and self._augmented:
      key = jax.random.wrap_key_data(batch["key"])
      images = augment(key, images, flip=self._flip)
    return self._normalize(images), labels

  def _last_batches(self, seed, epoch, count):
    return jax.tree.map(lambda x: x[-count:], self.batches(seed, epoch))
