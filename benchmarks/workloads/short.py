"""Short trainings of seconds: the arena's tasks, and those that tuned the recipe.

To add a task, add an entry to `ARENA_TASKS`: its data, its network, and its length.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

import alrao_jax
from alrao_jax.linen import recompute_batch_stats
from benchmarks import data
from benchmarks.data import DataError
from benchmarks.data.cache import Arrays, cached
from benchmarks.data.dataset import check_labels, resolve_data_dir
from benchmarks.data.image_crops import decode
from benchmarks.data.image_files import MAX_GROUP_BYTES
from benchmarks.data.parquet import Shard
from benchmarks.data.text_files import UNKNOWN, load_text
from benchmarks.methods import Heads, Method, Setting
from benchmarks.models import build_model, short_networks
from benchmarks.models.decoder import Decoder
from benchmarks.models.lstm import LSTM
from benchmarks.models.short_networks import FromStart, Predictor
from benchmarks.training import Loop, Workload, num_entries
from benchmarks.workloads.images import NUM_STATISTICS, Snapshot, State

PyTree = Any

NUM_POINTS = 8  # of a run's curve
EVALUATION_BATCH = 100  # in 500 the transformer takes twice as long on a CPU
MIN_HEAD_WEIGHT = 0.05  # of a head that counts in a mean, which one far off would ruin
MAX_IMAGES = 4 * 13_394  # four times Imagenette's
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 10_000, 2_000, 2_000
LENGTH = 32  # of a text
VOCABULARY, CONTEXT = 1_000, 4  # words


class Examples(NamedTuple):
  """Inputs and their targets.

  Attributes:
    inputs: (n, ...): uint8 for images, int32 for symbols, float32 for all else.
    targets: (n, ...): int32 classes, or float32 numbers (n, outputs).
  """

  inputs: np.ndarray
  targets: np.ndarray


class ShortData(NamedTuple):
  """The three parts of a task, and the number of its classes or outputs.

  Attributes:
    train: What trains.
    validation: What is held out.
    test: What tests.
    num_outputs: Number of classes, or of numbers to predict.
    body: Variables of a body that was trained before, by collection; else None.
  """

  train: Examples
  validation: Examples
  test: Examples
  num_outputs: int
  body: Any = None

  @property
  def is_regression(self) -> bool:
    """Whether targets are numbers, not classes."""
    return np.issubdtype(self.train.targets.dtype, np.floating)

  @property
  def chance(self) -> float:
    """The loss of knowing nothing."""
    # The variance of standardised numbers, or equal probabilities.
    return 1.0 if self.is_regression else math.log(self.num_outputs)


class ShortTask(NamedTuple):
  """A short training.

  Attributes:
    name: Its name in records.
    label: Its name in tables.
    load: Reads the data; takes the folder to look in, or None.
    model: Function of (number of outputs, number of heads or None) that returns a linen
      module, called as ``model(inputs, train=...)``.
    num_steps: Number of steps.
    batch_size: Number of examples in a step.
    has_convolutions: Whether the network has any, which a CPU is slow at within a scan.
  """

  name: str
  label: str
  load: Callable[[Path | None], ShortData]
  model: Callable[[int, int | None], nn.Module]
  num_steps: int
  batch_size: int = 32
  has_convolutions: bool = False


class ShortWorkload(Workload):
  """Trains one network with one method on a short task; an epoch is a point of a curve.

  Held-out and test loss are measured at every point.
  """

  examples = "examples"
  watched = ("validation", "test")

  def __init__(
    self, task: ShortTask, data: ShortData, method: Method, *, any_rate: Any = 1.0
  ):
    """Makes the workload; nothing is compiled yet.

    Args:
      task: The task.
      data: Its data.
      method: The optimizer.
      any_rate: A rate that `method` could be given.
    """
    self._task, self._method = task, method
    self._model = task.model(
      data.num_outputs, method.num_heads if method.has_heads else None
    )
    self._stops = np.linspace(0, task.num_steps, NUM_POINTS + 1).astype(int)
    self.steps_per_epoch = -(-task.num_steps // NUM_POINTS)
    self.examples_per_epoch = self.steps_per_epoch * task.batch_size
    self.survives_divergence = method.has_heads
    self._train_size = len(data.train.targets)
    self._parts: dict[str, Any] = {
      name: jax.device_put(getattr(data, name))
      for name in ("train", "validation", "test")
    }
    self.data = self._parts["train"]
    self._regression = data.is_regression
    example = floats(self.data.inputs[:1])
    self._init_network = jax.jit(
      lambda key: self._model.init(key, example, train=False)
    )
    shapes = jax.eval_shape(self._init_network, jax.random.key(0))
    self.num_parameters = num_entries(shapes["params"])
    self._has_batch_norm = "batch_stats" in shapes
    # Updates read key and rate from their state, so any will do here.
    optimizer = self.make_optimizer(jax.random.key(0), any_rate)
    self._update = optax.with_extra_args_support(optimizer).update
    self.heads: Heads = Heads(method, optimizer, shapes["params"])
    # Within a scan, a CPU is slow at convolutions only.
    scan = None if task.has_convolutions else True
    self.step = Loop(self._train_step, scan=scan, heads=self.heads)
    self._evaluate = Loop(self._evaluate_step, scan=scan)
    self._forward = self._forward_step  # one object, which is compiled once

  def init(self, seed: int, rate: Any) -> State:
    """Returns the state that training starts from.

    Args:
      seed: Of initial weights, Alrao's rates, and the order of examples.
      rate: Learning rate, where the optimizer takes one.
    """
    init_key, rates_key = jax.random.split(jax.random.key(seed))
    variables = self._init_network(init_key)
    params = variables["params"]
    opt_state = self.make_optimizer(rates_key, rate).init(params)
    state = State(params, variables.get("batch_stats", {}), opt_state)
    # Some optimizers keep the first parameters, yet a buffer can be donated only once.
    return jax.device_put(jax.tree.map(np.array, state))

  def batches(self, seed: int, epoch: int) -> np.ndarray:
    """Returns the indices of an epoch's batches, (steps, batch_size).

    Args:
      seed: Seed of the run.
      epoch: Number of the point of the curve, from 1.
    """
    first, last = self._stops[epoch - 1 : epoch + 1] * self._task.batch_size
    order, generator = np.zeros(0, np.int32), np.random.default_rng(seed)
    while len(order) < last:
      permuted = generator.permutation(self._train_size).astype(np.int32)
      order = np.concatenate([order, permuted])
    return order[first:last].reshape(-1, self._task.batch_size)

  def snapshot(self, state: State, seed: int, epoch: int) -> Snapshot:
    """Returns what predictions need.

    Where weights are averaged, BatchNorm's statistics are those of the batches that the
    run has trained on last.

    Args:
      state: The state after `epoch`.
      seed: Seed of the run.
      epoch: Number of the point of the curve; 0 before training.
    """
    params, batch_stats = state.params, state.batch_stats
    if self._method.averaged_params is not None:
      params = self._method.averaged_params(state.opt_state, params)
      if self._has_batch_norm and epoch > 0:
        last = self.batches(seed, epoch)[-NUM_STATISTICS:]
        variables = recompute_batch_stats(
          self._forward,
          {"params": params, "batch_stats": batch_stats},
          ((self.data.inputs[each], each) for each in last),
        )
        batch_stats = variables["batch_stats"]
    # Copies, since the state's buffers are donated to the next step.
    params, batch_stats = jax.tree.map(jnp.array, (params, batch_stats))
    return Snapshot(params, batch_stats, self._method.log_weights(state.opt_state))

  def evaluate(self, snapshot: Snapshot, part: str) -> dict[str, float]:
    """Returns the mean ``loss``: cross-entropy, or the mean square of errors.

    Args:
      snapshot: What predictions need.
      part: ``"validation"`` or ``"test"``.
    """
    examples = self._parts[part]
    size = len(examples.targets)
    # Batches of one shape; what the last one repeats does not count.
    indices = np.arange(-(-size // EVALUATION_BATCH) * EVALUATION_BATCH, dtype=np.int32)
    indices = indices.reshape(-1, EVALUATION_BATCH)
    batches = {"indices": indices % size, "valid": indices < size}
    _, sums = self._evaluate((), (jax.device_put(snapshot), examples), batches)
    return {"loss": float(sums.sum(dtype=np.float64) / size)}

  def make_optimizer(self, key: jax.Array, rate: Any) -> optax.GradientTransformation:
    """Returns the optimizer.

    Args:
      key: Where Alrao's rates are drawn from.
      rate: Learning rate, for optimizers that take one.
    """
    setting = Setting(key, rate, self._task.num_steps, self._has_batch_norm)
    return self._method.make(setting)

  def _train_step(self, state: State, train: Examples, indices: jax.Array):
    inputs, targets = floats(train.inputs[indices]), train.targets[indices]
    log_weights = self._method.log_weights(state.opt_state)

    def loss_fn(params):
      outputs, batch_stats = self._apply(params, state.batch_stats, inputs, train=True)
      if self._method.has_heads:
        loss_of = (
          alrao_jax.regression_loss
          if self._regression
          else alrao_jax.classification_loss
        )
        loss, info = loss_of(outputs, targets, log_weights)
        extra = {"head_log_likelihoods": info.head_log_likelihoods}
        return loss, (extra, batch_stats)
      if self._regression:  # the same Gaussian, but for a constant
        loss = 0.5 * jnp.square(outputs - targets).sum(axis=-1).mean()
      else:
        loss = optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()
      return loss, ({}, batch_stats)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (extra, batch_stats)), grads = grad_fn(state.params)
    updates, opt_state = self._update(grads, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    outputs = {"loss": loss, "head_weights": self.heads.weights(state.opt_state)}
    return State(params, batch_stats, opt_state), outputs

  def _forward_step(self, variables, batch):
    inputs, _ = batch
    return self._model.apply(
      variables, floats(inputs), train=True, mutable=["batch_stats"]
    )

  def _evaluate_step(self, carry, data, batch):
    snapshot, examples = data
    inputs = floats(examples.inputs[batch["indices"]])
    targets = examples.targets[batch["indices"]]
    outputs: Any = self._apply(
      snapshot.params, snapshot.batch_stats, inputs, train=False
    )[0]
    if self._regression:
      if self._method.has_heads:
        outputs = alrao_jax.mixture_mean(
          outputs, snapshot.log_weights, min_weight=MIN_HEAD_WEIGHT
        )
      losses = jnp.square(outputs - targets)
    else:
      if self._method.has_heads:
        log_probs = alrao_jax.mixture_log_probs(outputs, snapshot.log_weights)
      else:
        log_probs = jax.nn.log_softmax(outputs)
      losses = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    # An example of text has several targets: their mean counts.
    losses = losses.reshape(len(batch["valid"]), -1).mean(axis=-1)
    return carry, jnp.where(batch["valid"], losses, 0.0).sum()

  def _apply(self, params, batch_stats, inputs, *, train: bool):
    outputs, updated = self._model.apply(
      {"params": params, "batch_stats": batch_stats},
      inputs,
      train=train,
      mutable=["batch_stats"],
    )
    return outputs, updated.get("batch_stats", {})


def floats(inputs: jax.Array) -> jax.Array:
  """Returns images, which are bytes, as numbers around 0, and all else as it is.

  Args:
    inputs: Of any task.
  """
  if inputs.dtype == jnp.uint8:
    return (inputs.astype(jnp.float32) / 255 - 0.5) / 0.25
  return inputs


def cifar10(data_dir: Path | None) -> ShortData:
  """Returns 10,000 of CIFAR-10's images to train on, 2,000 to hold out, 2,000 to test.

  Args:
    data_dir: The folder below which to look, as in `benchmarks.data.load`.
  """
  splits = data.load("cifar10", data_dir).split(NUM_TRAIN, NUM_VALIDATION, NUM_TEST)
  return ShortData(*(Examples(*split) for split in splits), num_outputs=10)


def imagenette(data_dir: Path | None, side: int = 32) -> ShortData:
  """Returns Imagenette, small: its first 8,469 training images, 1,000, 2,000.

  Args:
    data_dir: The folder that holds ``imagenette*/train-*.parquet`` and
      ``imagenette*/validation-*.parquet``.
    side: Height and width, in pixels.

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
      for name, array in _decode(found, side)._asdict().items()
    },
    functools.partial(_check, side=side),
    kind="" if side == 32 else f"{side} pixels",
  )
  train = Examples(arrays["train_inputs"], arrays["train_targets"])
  test = Examples(arrays["test_inputs"], arrays["test_targets"])
  order = np.random.default_rng(0).permutation(len(train.targets))
  train = Examples(train.inputs[order], train.targets[order])
  order = np.random.default_rng(0).permutation(len(test.targets))[:NUM_TEST]
  test = Examples(test.inputs[order], test.targets[order])
  return ShortData(*_hold_out(train, 1_000), test, num_outputs=10)


def _decode(paths: list[Path], side: int) -> Examples:
  shards = [Shard(path) for path in paths]
  count = sum(shard.num_rows for shard in shards)
  if not NUM_TEST <= count <= MAX_IMAGES:
    raise DataError(
      f"{paths[0]}: {count:,} images in it and those beside it, expected from "
      f"{NUM_TEST:,} to {MAX_IMAGES:,}; incomplete, or another data set."
    )
  labels = np.concatenate([shard.labels(num_classes=10) for shard in shards])
  images = np.empty((count, side, side, 3), np.uint8)
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
        images[position] = np.asarray(image.resize((side, side), Image.Resampling.BOX))
        position += 1
  return Examples(images, labels)


def _check(arrays: Arrays, side: int) -> None:
  """Raises an error unless `arrays` are what `imagenette` decodes."""
  for split in ("train", "test"):
    images, labels = arrays[f"{split}_inputs"], arrays[f"{split}_targets"]
    if images.dtype != np.uint8 or images.shape != (len(labels), side, side, 3):
      raise DataError("images of another type or shape")
    check_labels(split, labels, 10)


def characters(length: int, data_dir: Path | None) -> ShortData:
  """Returns Penn Treebank's first million characters, cut; targets are the next ones.

  Args:
    length: Characters of an example.
    data_dir: The folder below which to look, as in `load_text`.
  """
  text = load_text("characters", data_dir)
  sizes = {"train": 1_000_000, "validation": 50_000, "test": 50_000}
  parts = [_windows(getattr(text, part)[:n], length) for part, n in sizes.items()]
  return ShortData(*parts, num_outputs=len(text.vocabulary))


def _windows(symbols: np.ndarray, length: int) -> Examples:
  count = (len(symbols) - 1) // length
  cut = lambda shift: symbols[shift : shift + count * length].reshape(count, length)  # noqa: E731
  return Examples(cut(0).astype(np.int32), cut(1).astype(np.int32))


def words(context: int, vocabulary: int, data_dir: Path | None) -> ShortData:
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
    parts.append(
      Examples(inputs[kept].astype(np.int32), targets[kept].astype(np.int32))
    )
  return ShortData(*parts, num_outputs=vocabulary)


def digits(data_dir: Path | None) -> ShortData:
  """Returns scikit-learn's digits, 64 numbers from 0 to 1 each.

  Args:
    data_dir: Not needed.
  """
  from sklearn.datasets import load_digits

  del data_dir
  inputs, labels = map(np.asarray, load_digits(return_X_y=True))
  return _thirds(inputs.astype(np.float32) / 16, labels.astype(np.int32), 10)


def diabetes(data_dir: Path | None) -> ShortData:
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


def _thirds(inputs: np.ndarray, targets: np.ndarray, num_outputs: int) -> ShortData:
  """Shuffles; three fifths train, a fifth validates, a fifth tests."""
  order = np.random.default_rng(0).permutation(len(targets))
  whole = Examples(inputs[order], targets[order])
  fifth = len(targets) // 5
  rest, test = _hold_out(whole, fifth)
  return ShortData(*_hold_out(rest, fifth), test, num_outputs=num_outputs)


def _hold_out(part: Examples, count: int) -> tuple[Examples, Examples]:
  return (
    Examples(part.inputs[:-count], part.targets[:-count]),
    Examples(part.inputs[-count:], part.targets[-count:]),
  )


def _network(body, num_outputs: int, num_heads: int | None) -> nn.Module:
  return Predictor(body(), num_outputs, num_heads)


def _perceptron(
  features: tuple[int, ...], num_outputs: int, num_heads: int | None
) -> nn.Module:
  return Predictor(short_networks.Perceptron(features), num_outputs, num_heads)


def _gru(num_outputs: int, num_heads: int | None) -> nn.Module:
  return Predictor(short_networks.GRU(num_outputs), num_outputs, num_heads)


def _words(num_outputs: int, num_heads: int | None) -> nn.Module:
  # And the unknown word.
  return Predictor(short_networks.Words(num_outputs + 1), num_outputs, num_heads)


def _cnn(norm: Any, num_outputs: int, num_heads: int | None) -> nn.Module:
  return build_model("small_cnn", num_outputs, num_heads, norm=norm)


def _lstm(num_outputs: int, num_heads: int | None) -> nn.Module:
  reader = LSTM(num_outputs, features=48, units=48, num_layers=1)
  return Predictor(FromStart(reader), num_outputs, num_heads)


def _transformer(num_outputs: int, num_heads: int | None) -> nn.Module:
  reader = Decoder(num_outputs, LENGTH, width=32, num_layers=2)
  return Predictor(FromStart(reader), num_outputs, num_heads)


# None of them tuned anything.
ARENA_TASKS = {
  task.name: task
  for task in (
    ShortTask(
      "vgg",
      "VGG, CIFAR-10",
      cifar10,
      functools.partial(_network, short_networks.VGGLike),
      num_steps=800,
      has_convolutions=True,
    ),
    ShortTask(
      "mixer",
      "Mixer, CIFAR-10",
      cifar10,
      functools.partial(_network, short_networks.Mixer),
      num_steps=800,
    ),
    ShortTask(
      "resnet",
      "ResNet, Imagenette",
      imagenette,
      functools.partial(_network, short_networks.ResNet),
      num_steps=800,
      has_convolutions=True,
    ),
    ShortTask(
      "gru",
      "GRU, characters",
      functools.partial(characters, LENGTH),
      _gru,
      num_steps=2_000,
      batch_size=16,
    ),
    ShortTask(
      "words",
      "embedding, words",
      functools.partial(words, CONTEXT, VOCABULARY),
      _words,
      num_steps=1_500,
      batch_size=64,
    ),
    ShortTask(
      "vit",
      "transformer, CIFAR-10",
      cifar10,
      functools.partial(_network, short_networks.VisionTransformer),
      num_steps=800,
    ),
    ShortTask(
      "diabetes",
      "regression, diabetes",
      diabetes,
      functools.partial(
        _network, functools.partial(short_networks.Perceptron, (64, 64))
      ),
      num_steps=400,
    ),
    ShortTask(
      "digits",
      "wide MLP, digits",
      digits,
      functools.partial(
        _network, functools.partial(short_networks.Perceptron, (512, 512))
      ),
      num_steps=400,
    ),
  )
}

# These tuned the recipe; the arena has none of them.
SEARCH_TASKS = {
  task.name: task
  for task in (
    ShortTask(
      "cnn_batch_norm",
      "small CNN with BatchNorm",
      cifar10,
      functools.partial(_cnn, "batch"),
      num_steps=500,
      has_convolutions=True,
    ),
    ShortTask(
      "cnn",
      "small CNN without normalisation",
      cifar10,
      functools.partial(_cnn, "none"),
      num_steps=500,
      has_convolutions=True,
    ),
    ShortTask(
      "lstm",
      "LSTM, characters",
      functools.partial(characters, LENGTH),
      _lstm,
      num_steps=500,
      batch_size=16,
    ),
    ShortTask(
      "transformer",
      "transformer, characters",
      functools.partial(characters, LENGTH),
      _transformer,
      num_steps=500,
      batch_size=16,
    ),
  )
}

SHORT_TASKS = {**ARENA_TASKS, **SEARCH_TASKS}
