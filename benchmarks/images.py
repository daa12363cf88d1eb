"""Training networks to classify images, as a program for `benchmarks.engine`."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

import alrao_jax
from benchmarks.data import Splits, channel_statistics
from benchmarks.data.augment import augment, normalize
from benchmarks.loops import Loop
from benchmarks.models import fast_init
from benchmarks.models.layers import Classifier
from benchmarks.optimizers import Optimizer, Setting

PyTree = Any

EVALUATION_BATCH = 250
# Of BatchNorm's running averages, .9 ** 100 = 3e-5 is left of what was before.
REFRESH_STEPS = 100


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


class ImageProgram:
  """Trains one network with one optimizer; a `benchmarks.engine.Program`."""

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
    self.steps_per_epoch = len(data.parts["train"]) // batch_size
    self.examples_per_epoch = self.steps_per_epoch * batch_size
    self.examples = "images"
    self.survives_divergence = optimizer.has_heads
    self.data = (data.images, data.labels)
    self._model, self._optimizer, self._parts = model, optimizer, data.parts
    self._batch_size, self._num_steps = batch_size, max_epochs * self.steps_per_epoch
    self._flip, self._augmented = flip, augmented
    self._normalize = functools.partial(
      normalize, mean=data.mean, std=data.std, dtype=dtype
    )
    self._image = jax.ShapeDtypeStruct((1, *data.images.shape[1:]), jnp.float32)
    shapes = jax.eval_shape(
      functools.partial(model.init, train=False), jax.random.key(0), self._image
    )
    self.num_parameters = sum(
      math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"])
    )
    self._has_batch_norm = "batch_stats" in shapes
    # Updates read key and rate from their state, so any will do here.
    self._update = optax.with_extra_args_support(
      self._make_optimizer(jax.random.key(0), any_rate)
    ).update
    self.step = Loop(self._train_step)
    self._refresh = Loop(self._refresh_step)
    self._evaluate = Loop(self._evaluate_step)

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
    opt_state = self._make_optimizer(rates_key, rate).init(params)
    state = State(params, variables.get("batch_stats", {}), opt_state)
    # Some optimizers keep the first parameters, yet a buffer can be donated only once.
    return jax.device_put(jax.tree.map(np.array, state))

  def batches(self, seed: int, epoch: int) -> dict[str, np.ndarray]:
    """Returns an epoch's batches: indices of images, and a key for augmentation.

    Args:
      seed: Seed of the run.
      epoch: Number of the epoch.
    """
    train = self._parts["train"]
    order = np.random.default_rng([seed, epoch]).permutation(len(train))
    indices = order[: self.examples_per_epoch].astype(np.int32) + train.start
    _, _, batches_key = _keys(seed)
    keys = jax.random.split(
      jax.random.fold_in(batches_key, epoch), self.steps_per_epoch
    )
    return {
      "indices": indices.reshape(self.steps_per_epoch, self._batch_size),
      "key": np.asarray(jax.random.key_data(keys)),
    }

  def snapshot(self, state: State, seed: int, epoch: int) -> Snapshot:
    """Returns what predictions need.

    Where the optimizer averages weights, BatchNorm's statistics are recomputed for
    them, as running averages over the epoch's last batches.

    Args:
      state: The state after `epoch`.
      seed: Seed of the run.
      epoch: Number of the epoch; 0 before training.
    """
    params, batch_stats = state.params, state.batch_stats
    average = self._optimizer.averaged_params
    if average is not None and epoch > 0:
      params = average(state.opt_state, params)
      if self._has_batch_norm:
        last = jax.tree.map(lambda x: x[-REFRESH_STEPS:], self.batches(seed, epoch))
        copied = jax.tree.map(jnp.array, batch_stats)
        batch_stats, _ = self._refresh(copied, (params, self.data[0]), last)
    return Snapshot(params, batch_stats, _log_weights(state, self._optimizer))

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
    data = (jax.device_put(snapshot), *self.data)
    _, sums = self._evaluate((), data, batches)
    return {
      "loss": float(sums["loss"].sum(dtype=np.float64)) / len(indices),
      "accuracy": float(sums["correct"].sum()) / len(indices),
    }

  def _train_step(self, state: State, data, batch):
    images, labels = data
    inputs, targets = self._prepare(images, batch), labels[batch["indices"]]
    log_weights = _log_weights(state, self._optimizer)

    def loss_fn(params):
      outputs, updated = self._model.apply(
        {"params": params, "batch_stats": state.batch_stats},
        inputs,
        train=True,
        mutable=["batch_stats"],
      )
      batch_stats = updated.get("batch_stats", {})
      if not self._optimizer.has_heads:
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
        return losses.mean(), ({}, batch_stats)
      loss, info = alrao_jax.classification_loss(outputs, targets, log_weights)
      extra = {"head_log_likelihoods": info.head_log_likelihoods}
      return loss, (extra, batch_stats)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (extra, batch_stats)), grads = grad_fn(state.params)
    updates, opt_state = self._update(grads, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    outputs = {"loss": loss, "head_weights": jnp.exp(log_weights)}
    return State(params, batch_stats, opt_state), outputs

  def _refresh_step(self, batch_stats, data, batch):
    params, images = data
    _, updated = self._model.apply(
      {"params": params, "batch_stats": batch_stats},
      self._prepare(images, batch),
      train=True,
      mutable=["batch_stats"],
    )
    return updated["batch_stats"], {}

  def _evaluate_step(self, carry, data, batch):
    snapshot, images, labels = data
    outputs: Any = self._model.apply(
      {"params": snapshot.params, "batch_stats": snapshot.batch_stats},
      self._normalize(images[batch["indices"]]),
      train=False,
    )
    if self._optimizer.has_heads:
      log_probs = alrao_jax.mixture_log_probs(outputs, snapshot.log_weights)
    else:
      log_probs = jax.nn.log_softmax(outputs)
    targets = labels[batch["indices"]]
    losses = -jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]
    correct = log_probs.argmax(axis=-1) == targets
    return carry, {
      "loss": jnp.where(batch["valid"], losses, 0.0).sum(),
      "correct": jnp.sum(batch["valid"] & correct),
    }

  def _prepare(self, images, batch):
    """The normalised images of a training batch."""
    images = images[batch["indices"]]
    if self._augmented:
      key = jax.random.wrap_key_data(batch["key"])
      images = augment(key, images, flip=self._flip)
    return self._normalize(images)

  def _make_optimizer(self, key: jax.Array, rate: Any):
    return self._optimizer.make(
      Setting(key, rate, self._num_steps, self._has_batch_norm)
    )


def _log_weights(state: State, optimizer: Optimizer) -> jax.Array:
  if optimizer.has_heads:
    return alrao_jax.log_weights(state.opt_state)
  return jnp.zeros(0)


def _keys(seed: int) -> jax.Array:
  """Keys for the initial weights, Alrao's rates, and the batches."""
  return jax.random.split(jax.random.key(seed), 3)
