"""Training networks to classify images, wherever the images come from."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

import alrao_jax
from alrao_jax.linen import recompute_batch_stats
from benchmarks.data import Splits, channel_statistics
from benchmarks.data.augment import augment, normalize
from benchmarks.methods import Heads, Method, Setting
from benchmarks.models import fast_init
from benchmarks.models.layers import Classifier
from benchmarks.training import Loop, Workload, each_batch, num_entries

PyTree = Any

NUM_STATISTICS = 40  # batches for batch normalisation's statistics
EVALUATION_BATCH = 250


class State(NamedTuple):
  """All that training changes.

  Attributes:
    params: Parameters of the network.
    batch_stats: Running averages of its batch normalisation.
    opt_state: State of the optimizer; with Alrao, rates and posterior too.
  """

  params: PyTree
  batch_stats: PyTree
  opt_state: optax.OptState


class Snapshot(NamedTuple):
  """All that predictions need.

  Attributes:
    params: Parameters, averaged where the optimizer says so.
    batch_stats: Running averages that belong to them.
    log_weights: Alrao's posterior that belongs to them, (num_heads,), else (0,).
  """

  params: PyTree
  batch_stats: PyTree
  log_weights: jax.Array


class ClassifierWorkload(Workload):
  """The part of a workload that does not depend on where images come from.

  A subclass says what a batch holds, by `_read`, and where batches come from.
  """

  def __init__(
    self,
    model: Classifier,
    method: Method,
    *,
    num_train: int,
    image_shape: tuple[int, ...],
    mean: ArrayLike,
    std: ArrayLike,
    batch_size: int,
    max_epochs: int,
    dtype: DTypeLike = jnp.float32,
    any_rate: Any = 1.0,
    scan: bool | None = None,
  ):
    """Makes the workload; nothing is compiled yet.

    Args:
      model: The network, with heads if the optimizer needs them.
      method: The optimizer.
      num_train: Number of training images.
      image_shape: Height, width and channels.
      mean: Of each channel, (channels,), where 255 counts as 1.
      std: Standard deviation likewise.
      batch_size: Number of images in a step. An epoch leaves out what does not fill
        the last one.
      max_epochs: Maximum number of epochs, over which schedules run.
      dtype: Of the normalised images.
      any_rate: A rate that `method` could be given.
      scan: As in `Loop`.
    """
    self.steps_per_epoch = num_train // batch_size
    self.examples_per_epoch = self.steps_per_epoch * batch_size
    self.examples = "images"
    self.survives_divergence = method.has_heads
    self._model, self._method = model, method
    self._batch_size, self._num_steps = batch_size, max_epochs * self.steps_per_epoch
    self._normalize = functools.partial(normalize, mean=mean, std=std, dtype=dtype)
    self._image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(
      functools.partial(model.init, train=False), jax.random.key(0), self._image
    )
    self.num_parameters = num_entries(shapes["params"])
    self._has_batch_norm = "batch_stats" in shapes
    # Updates read key and rate from their state, so any will do here.
    optimizer = self.make_optimizer(jax.random.key(0), any_rate)
    self._update = optax.with_extra_args_support(optimizer).update
    self.heads: Heads = Heads(method, optimizer, shapes["params"])
    self.step = Loop(self._train_step, scan=scan, heads=self.heads)
    self._forward = self._forward_step  # one object, which is compiled once
    self._evaluate = Loop(self._evaluate_step, scan=scan)

  def init(self, seed: int, rate: Any) -> State:
    """Returns the state that training starts from.

    Args:
      seed: Determines weights and Alrao's rates. Networks that differ only in their
        heads get the same body.
      rate: Learning rate, where the optimizer takes one.
    """
    init_key, rates_key, _ = _keys(seed)
    variables = fast_init(self._model, init_key, self._image)
    params = variables["params"]
    opt_state = self.make_optimizer(rates_key, rate).init(params)
    state = State(params, variables.get("batch_stats", {}), opt_state)
    # Some optimizers keep the first parameters, yet a buffer can be donated only once.
    return jax.device_put(jax.tree.map(np.array, state))

  def snapshot(self, state: State, seed: int, epoch: int) -> Snapshot:
    """Returns what predictions need.

    Where the optimizer averages weights, BatchNorm's statistics are recomputed for
    them, as means over the epoch's last batches.

    Args:
      state: The state after `epoch`.
      seed: Seed of the run.
      epoch: Number of the epoch; 0 before training.
    """
    params, batch_stats = state.params, state.batch_stats
    average = self._method.averaged_params
    if average is not None and epoch > 0:
      params = average(state.opt_state, params)
      if self._has_batch_norm:
        last = each_batch(self._last_batches(seed, epoch, NUM_STATISTICS))
        variables = {"params": params, "batch_stats": batch_stats, "data": self.data}
        found = recompute_batch_stats(self._forward, variables, last)
        batch_stats = found["batch_stats"]
    return Snapshot(params, batch_stats, self._log_weights(state))

  def _read(
    self, data: PyTree, batch: PyTree, *, train: bool
  ) -> tuple[jax.Array, jax.Array]:
    """The normalised images of a batch, augmented in training, and their labels."""
    raise NotImplementedError

  def _last_batches(self, seed: int, epoch: int, count: int) -> PyTree:
    """An epoch's last batches, `count` at most."""
    raise NotImplementedError

  def _keys(self, seed: int, epoch: int) -> np.ndarray:
    """A key for each step of an epoch, (steps, 2), as data."""
    keys = jax.random.fold_in(_keys(seed)[2], epoch)
    return np.asarray(jax.random.key_data(jax.random.split(keys, self.steps_per_epoch)))

  def _train_step(self, state: State, data, batch):
    inputs, targets = self._read(data, batch, train=True)
    log_weights = self._log_weights(state)
    # Drawn apart from what augmentation draws from the same key.
    dropout_key = jax.random.fold_in(jax.random.wrap_key_data(batch["key"]), 1)

    def loss_fn(params):
      outputs, updated = self._model.apply(
        {"params": params, "batch_stats": state.batch_stats},
        inputs,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": dropout_key},
      )
      batch_stats = updated.get("batch_stats", {})
      if not self._method.has_heads:
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
        return losses.mean(), ({}, batch_stats)
      loss, info = alrao_jax.classification_loss(outputs, targets, log_weights)
      extra = {"head_log_likelihoods": info.head_log_likelihoods}
      return loss, (extra, batch_stats)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (extra, batch_stats)), grads = grad_fn(state.params)
    updates, opt_state = self._update(grads, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    outputs = {"loss": loss, "head_weights": self.heads.weights(state.opt_state)}
    if self.survives_divergence:  # one broken batch would leave them NaN for good
      batch_stats = alrao_jax.keep_finite(batch_stats, state.batch_stats)
    return State(params, batch_stats, opt_state), outputs

  def _forward_step(self, variables, batch):
    inputs, _ = self._read(variables["data"], batch, train=True)
    return self._model.apply(
      {name: variables[name] for name in ("params", "batch_stats")},
      inputs,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": jax.random.wrap_key_data(batch["key"])},
    )

  def _evaluate_step(self, carry, data, batch):
    snapshot, data = data
    inputs, targets = self._read(data, batch, train=False)
    outputs: Any = self._model.apply(
      {"params": snapshot.params, "batch_stats": snapshot.batch_stats},
      inputs,
      train=False,
    )
    if self._method.has_heads:
      log_probs = alrao_jax.mixture_log_probs(outputs, snapshot.log_weights)
    else:
      log_probs = jax.nn.log_softmax(outputs)
    losses = -jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]
    correct = log_probs.argmax(axis=-1) == targets
    return carry, {
      "loss": jnp.where(batch["valid"], losses, 0.0).sum(),
      "correct": jnp.sum(batch["valid"] & correct),
      "count": jnp.sum(batch["valid"]),
    }

  def make_optimizer(self, key: jax.Array, rate: Any) -> optax.GradientTransformation:
    """Returns the optimizer.

    Args:
      key: Where Alrao's rates are drawn from.
      rate: Learning rate, for optimizers that take one.
    """
    return self._method.make(Setting(key, rate, self._num_steps, self._has_batch_norm))

  def _log_weights(self, state: State) -> jax.Array:
    return self._method.log_weights(state.opt_state)


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


class ImageWorkload(ClassifierWorkload):
  """Trains one network with one method on images that fit on the device.

  All images are on the device, and a batch says which.
  """

  def __init__(
    self,
    model: Classifier,
    method: Method,
    data: ImageData,
    *,
    batch_size: int,
    max_epochs: int,
    flip: bool,
    augmented: bool = True,
    dtype: DTypeLike = jnp.float32,
    any_rate: Any = 1.0,
  ):
    """Makes the workload; nothing is compiled yet.

    Args:
      model: The network, with heads if the optimizer needs them.
      method: The optimizer.
      data: What to train, validate and test on.
      batch_size: Number of images in a step. An epoch leaves out what does not fill
        the last one.
      max_epochs: Maximum number of epochs, over which schedules run.
      flip: Whether augmentation mirrors images.
      augmented: Whether training images are shifted, and mirrored.
      dtype: Of the normalised images.
      any_rate: A rate that `method` could be given.
    """
    super().__init__(
      model,
      method,
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


def _keys(seed: int) -> jax.Array:
  """Keys for the initial weights, Alrao's rates, and the batches."""
  return jax.random.split(jax.random.key(seed), 3)
