"""Training on images that are read while it goes on, on one device or many."""

from collections.abc import Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from benchmarks.console import refuse
from benchmarks.data import DataError
from benchmarks.data.image_batches import (
  Batch,
  EvaluationBatches,
  Stream,
  TrainBatches,
)
from benchmarks.data.image_files import Part
from benchmarks.methods import Method
from benchmarks.models.layers import Classifier
from benchmarks.training import Loop
from benchmarks.workloads import devices
from benchmarks.workloads.images import ClassifierWorkload, Snapshot, State

PyTree = Any

EVALUATION_BATCH = 256
# Of ImageNet's training images, as everybody has them: where 255 counts as 1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class StreamWorkload(ClassifierWorkload):
  """Trains one network with one method on images of files.

  Images are decoded and cropped by other processes, travel as bytes, and are normalised
  on the device. An epoch is cut into segments, after each of which a killed run can go
  on: what is read next follows from the seed and the number of the step.
  """

  is_segmented = True

  def __init__(
    self,
    model: Classifier,
    method: Method,
    parts: dict[str, Part],
    *,
    image_size: int,
    batch_size: int,
    max_epochs: int,
    checkpoint_steps: int,
    workers: int = 0,
    max_corrupt: int = 0,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    any_rate: Any = 1.0,
  ):
    """Makes the workload; nothing is compiled or read yet.

    Args:
      model: The network, with heads if the optimizer needs them.
      method: The optimizer.
      parts: What to train, validate and test on, as `ImageFiles.split` gives it.
      image_size: Side of the images that the network sees.
      batch_size: Number of images in a step, of all devices together.
      max_epochs: Maximum number of epochs, over which schedules run.
      checkpoint_steps: Number of steps of a segment; an epoch's last may have fewer.
      workers: Number of processes that read images; 0: a thread of this one.
      max_corrupt: How many damaged images to leave out before giving up.
      dtype: Of the normalised images.
      mesh: Devices to train on; None: the first.
      any_rate: A rate that `method` could be given.
    """
    super().__init__(
      model,
      method,
      num_train=len(parts["train"].indices),
      image_shape=(image_size, image_size, 3),
      mean=np.array(MEAN),
      std=np.array(STD),
      batch_size=batch_size,
      max_epochs=max_epochs,
      dtype=dtype,
      any_rate=any_rate,
      scan=False,  # the batches are not all there
    )
    if self.heads.may_leave and mesh is not None and mesh.shape[devices.HEADS] > 1:
      refuse(
        "optimizer", "must keep its heads if --mesh-heads splits them", method.name
      )
    self.data = ()
    self._parts, self._image_size, self._workers = parts, image_size, workers
    self._checkpoint_steps, self._max_epochs = checkpoint_steps, max_epochs
    self._max_corrupt = max_corrupt
    self._corrupt: set[str] = set()
    self._untold: list[str] = []
    self._mesh = mesh
    parts_of_batch = 1 if mesh is None else mesh.size
    self._evaluation_batch = -(-EVALUATION_BATCH // parts_of_batch) * parts_of_batch
    self._share = (0, 1) if mesh is None else devices.host_share(mesh)
    self._stream: tuple[int, Stream] | None = None
    self._shardings: Any = None

  def init(self, seed: int, rate: Any) -> State:
    """Returns the state that training starts from, where it shall lie.

    Args:
      seed: Determines weights and Alrao's rates.
      rate: Learning rate, where the optimizer takes one.
    """
    state = super().init(seed, rate)
    if self._mesh is None:
      return state
    if self._shardings is None:
      optimizer = self.make_optimizer(jax.random.key(0), rate)
      self._shardings = devices.state_shardings(self._mesh, optimizer, state)
      step = devices.pin(self._train_step, self._shardings)
      self.step = Loop(step, scan=False, heads=self.heads)
    return devices.place(state, self._shardings)

  def snapshot(self, state: State, seed: int, epoch: int) -> Snapshot:
    """Returns what predictions need; on several devices, brought together.

    Args:
      state: The state after `epoch`.
      seed: Seed of the run.
      epoch: Number of the epoch; 0 before training.
    """
    snapshot = super().snapshot(state, seed, epoch)
    return snapshot if self._mesh is None else devices.fetch(snapshot)

  def batches(self, seed: int, epoch: int) -> Iterator[Batch]:
    """Reads the batches of an epoch.

    Args:
      seed: Seed of the run.
      epoch: Number of the epoch.
    """
    return self._read_steps(seed, epoch, 0, self.steps_per_epoch)

  def segment(self, seed: int, epoch: int, start: int) -> Iterator[Batch]:
    """Reads the next batches of an epoch.

    Args:
      seed: Seed of the run.
      epoch: Number of the epoch.
      start: Number of the epoch's steps that are done.
    """
    return self._read_steps(seed, epoch, start, start + self._checkpoint_steps)

  def begin_skipped(self, names: Iterable[str]) -> None:
    """Says which images a run has found damaged before, which count against the limit.

    Args:
      names: Their names.
    """
    self._corrupt, self._untold = set(names), []

  def take_skipped(self) -> list[str]:
    """Returns the names of damaged images found since the last call."""
    names, self._untold = self._untold, []
    return names

  def evaluate(self, snapshot: Snapshot, part: str) -> dict[str, float]:
    """Returns mean ``loss`` and ``accuracy`` of all images that are not damaged.

    Args:
      snapshot: What predictions need.
      part: ``"validation"`` or ``"test"``.

    Raises:
      DataError: Too many images are damaged.
    """
    batches = EvaluationBatches(
      self._parts[part],
      batch_size=self._evaluation_batch,
      image_size=self._image_size,
      share=self._share,
    )
    stream = Stream(batches, self._workers)
    try:
      data = (self._placed(snapshot), ())
      read = map(self._on_devices, self._watched(stream.read(0, len(batches)), part))
      _, sums = self._evaluate((), data, read)
    finally:
      stream.close()
    totals = {name: values.sum(dtype=np.float64) for name, values in sums.items()}
    count = totals.pop("count")
    return {
      "loss": float(totals["loss"] / count),
      "accuracy": float(totals["correct"] / count),
    }

  def close(self) -> None:
    """Ends the processes that read."""
    if self._stream is not None:
      self._stream[1].close()
      self._stream = None

  def _read_steps(
    self, seed: int, epoch: int, start: int, stop: int
  ) -> Iterator[Batch]:
    """Batches from step `start` of an epoch up to, without it, step `stop`."""
    if self._stream is None or self._stream[0] != seed:
      self.close()
      batches = TrainBatches(
        self._parts["train"],
        batch_size=self._batch_size,
        image_size=self._image_size,
        max_epochs=self._max_epochs,
        seed=seed,
        share=self._share,
      )
      self._stream = seed, Stream(batches, self._workers)
    before, stop = (epoch - 1) * self.steps_per_epoch, min(stop, self.steps_per_epoch)
    batches = self._stream[1].read(before + start, before + stop)
    keys = self._keys(seed, epoch)[start:stop]
    for key, batch in zip(keys, self._watched(batches, "train"), strict=True):
      yield {**self._on_devices(batch), "key": key}

  def _watched(self, batches: Iterator[Batch], part: str) -> Iterator[Batch]:
    """Counts the damaged images that pass by: each host those that it reads."""
    source = self._parts[part].source
    for batch in batches:
      for index in batch["index"][batch["is_corrupt"]]:
        name = source.name(int(index))
        self._untold.append(name)
        self._corrupt.add(name)
        if len(self._corrupt) > self._max_corrupt:
          raise DataError(
            f"{name}: damaged, or neither JPEG, PNG nor WebP, as are "
            f"{len(self._corrupt) - 1} images before it; mend or remove it, or allow "
            f"more with --max-corrupt, now {self._max_corrupt}."
          )
      yield batch

  def _on_devices(self, batch: Batch) -> PyTree:
    """What the compiled steps read of a batch."""
    batch = {x: batch[x] for x in ("images", "labels", "valid") if x in batch}
    return batch if self._mesh is None else devices.make_global_batch(self._mesh, batch)

  def _placed(self, snapshot: Snapshot) -> Snapshot:
    if self._mesh is None:
      return jax.device_put(snapshot)
    params, batch_stats, _ = self._shardings
    everywhere: Any = NamedSharding(self._mesh, PartitionSpec())
    return devices.place(snapshot, Snapshot(params, batch_stats, everywhere))

  def _last_batches(self, seed, epoch, count):
    start = max(0, self.steps_per_epoch - count)
    return self._read_steps(seed, epoch, start, self.steps_per_epoch)

  def _read(self, data, batch, *, train):
    del data, train
    return self._normalize(batch["images"]), batch["labels"]


class LocalStatistics(nn.Module):
  """A body whose batch normalisation sees a part of the batch at a time.

  Its parameters and statistics have the names that they have without it.

  Attributes:
    body: The body.
    parts: Number of parts, which divides the batch; one for each device.
  """

  body: nn.Module
  parts: int

  def setup(self):
    """Makes this module and the body one, as far as names go."""
    nn.share_scope(self, self.body)

  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, channels) as the body does.

    Args:
      images: The images; part `i` of the batch is on device `i`.
      train: Whether to normalise by the statistics of each part. The running averages
        then move by the mean over the parts.
    """
    if not train:
      # A `nn.Module` has no `__call__` as far as types go; every body has.
      return self.body(images, train=False)  # pyright: ignore[reportCallIssue]
    body = self.body.clone(parent=None)
    scope: Any = self.scope
    rngs = {
      name: jax.random.split(self.make_rng(name), self.parts) for name in scope.rngs
    }
    variables = self.variables

    def apply(images, rngs):
      return body.apply(
        variables, images, train=True, rngs=rngs, mutable=["batch_stats"]
      )

    parts = images.reshape(self.parts, -1, *images.shape[1:])
    result: Any = jax.vmap(apply)(parts, rngs)
    features, updated = result
    for name, value in updated.get("batch_stats", {}).items():
      means = jax.tree.map(lambda x: jnp.mean(x, axis=0), value)
      self.put_variable("batch_stats", name, means)
    return features.reshape(-1, *features.shape[2:])


def use_local_statistics(model: Classifier, parts: int) -> Classifier:
  """Returns a network whose batch normalisation sees one device's images alone.

  By default it is synchronised: under jit, the mean over a batch is the mean over all
  of it, wherever its parts lie, and for every normalisation devices add up two sums,
  and one more on the way back. Local statistics send the running
  averages alone, and nothing on the way back. Parameters and evaluation
  are the same.

  Args:
    model: The network.
    parts: In how many parts the batch is split, such as ``mesh.shape["data"]``.
  """
  return model.clone(body=LocalStatistics(model.body, parts), parent=None)
