"""The tasks of the search for the next recipe, and how they are trained.

None of them is one of the arena's, and all are long for their size: many passes of
little data, so that it counts what a method does when it could overfit. Each has a
held-out part; test parts are left where they are and never read. What the search must
not know stays apart: the tables wine, digits and diabetes, Imagenette, CIFAR-10's test
images and all classes but four, and Penn Treebank but for 270,000 characters of its
training text.
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

import alrao_jax
from alrao_jax.linen import MultiHead
from benchmarks import data
from benchmarks.data.augment import augment
from benchmarks.data.text_files import load_text
from benchmarks.methods import Method
from benchmarks.models import short_networks
from benchmarks.models.decoder import Decoder
from benchmarks.models.layers import ConvBlock
from benchmarks.models.lstm import LSTM
from benchmarks.models.short_networks import FromStart, Predictor
from benchmarks.training import Loop
from benchmarks.workloads.images import State
from benchmarks.workloads.short import (
  Examples,
  ShortData,
  ShortTask,
  ShortWorkload,
  floats,
)

TILE = 16  # side, in pixels
LENGTH = 32  # characters of an example
FLIPPED = 0.2  # share of labels that are drawn anew
ANIMALS = ("bird", "cat", "deer", "dog")


class SearchTask(NamedTuple):
  """A training of the search.

  Attributes:
    short: Its data, network and length.
    augments: Whether images are shifted and mirrored in training.
    learns_noise: Whether the output layer is a `GaussianHead`.
  """

  short: ShortTask
  augments: bool = False
  learns_noise: bool = False


class GaussianHead(nn.Module):
  """A mean and the logarithm of a standard deviation for each output.

  Attributes:
    num_outputs: Number of outputs.
  """

  num_outputs: int

  @nn.compact
  def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps (batch, features) to two arrays (batch, num_outputs)."""
    mean, log_scale = jnp.split(nn.Dense(2 * self.num_outputs)(features), 2, axis=-1)
    return mean, log_scale


class NoisyPredictor(nn.Module):
  """A body and a `GaussianHead`, as `Predictor` otherwise.

  Attributes:
    body: Module that maps (inputs, train=...) to features.
    num_outputs: Number of outputs.
    num_heads: Number of copies of the output layer, or None for an ordinary one.
  """

  body: Any
  num_outputs: int
  num_heads: int | None = None

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool) -> Any:
    """Maps inputs to means and log-scales, of each head if there are heads."""
    features = self.body(inputs, train=train)
    if self.num_heads is None:
      return GaussianHead(self.num_outputs, name="output")(features)
    head = GaussianHead(self.num_outputs)
    return MultiHead(head, num_heads=self.num_heads, name="output")(features)


class Pixels(nn.Module):
  """Convolutions that keep the size, for a class a pixel; without normalisation.

  Attributes:
    channels: Channels of each layer.
  """

  channels: tuple[int, ...] = (16, 16, 16)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, channels) to features of each pixel."""
    for channels in self.channels:
      images = ConvBlock(channels, norm="none")(images, train=train)
    return images


class Strided(nn.Module):
  """3x3 convolutions of stride 2 with batch normalisation, and the mean of positions.

  Attributes:
    channels: Channels of each layer.
  """

  channels: tuple[int, ...] = (16, 32, 64)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, 3) to (batch, channels[-1])."""
    for channels in self.channels:
      images = ConvBlock(channels, strides=2)(images, train=train)
    return images.mean(axis=(1, 2))


class SearchWorkload(ShortWorkload):
  """Trains a network on a task of the search, with judges where a method has them.

  An epoch is a point of the curve. What it measures is the held-out negative
  log-likelihood of an example's target; for numbers of deviation 1 it is that plus 1,
  which keeps ratios meaningful.
  """

  watched = ("validation",)

  def __init__(
    self,
    task: SearchTask,
    data: ShortData,
    method: Method,
    *,
    one_in: int | None = None,
    any_rate: Any = 1.0,
  ):
    """Makes the workload; nothing is compiled yet.

    Args:
      task: The task.
      data: Its data.
      method: The optimizer.
      one_in: Of how many training examples one judges; None: all train.
      any_rate: A rate that `method` could be given.
    """
    super().__init__(task.short, data, method, any_rate=any_rate)
    self._augments, self._one_in, self._body = task.augments, one_in, data.body
    scan = None if task.short.has_convolutions else True
    self.step = Loop(self._train_step, scan=scan, heads=self.heads)
    self._evaluate = Loop(self._evaluate_step, scan=scan)

  def init(self, seed: int, rate: Any) -> State:
    """Returns the state that training starts from, with a trained body if there is one.

    Args:
      seed: Of initial weights, Alrao's rates, and the order of examples.
      rate: Learning rate, where the optimizer takes one.
    """
    state = super().init(seed, rate)
    if self._body is None:
      return state
    params = {**state.params, "body": self._body["params"]}
    batch_stats = {**state.batch_stats, "body": self._body["batch_stats"]}
    rates_key = jax.random.split(jax.random.key(seed))[1]
    opt_state = self.make_optimizer(rates_key, rate).init(params)
    return jax.device_put(jax.tree.map(np.array, State(params, batch_stats, opt_state)))

  def _forward_step(self, variables, batch):
    inputs, indices = batch
    inputs = self._prepared(inputs, indices)
    return self._model.apply(variables, inputs, train=True, mutable=["batch_stats"])

  def _prepared(self, inputs: jax.Array, indices: jax.Array) -> jax.Array:
    """The inputs of a training batch as numbers, images augmented if they are to be."""
    if self._augments:
      # A key of the batch's own: indices come in another order in each pass.
      number = jnp.sum(indices * jnp.arange(1, len(indices) + 1))
      inputs = augment(jax.random.fold_in(jax.random.key(0), number), inputs)
    return floats(inputs)

  def _train_step(self, state: State, train: Examples, indices: jax.Array):
    inputs = self._prepared(train.inputs[indices], indices)
    targets = train.targets[indices]
    log_weights = self._method.log_weights(state.opt_state)
    judges = None
    if self._one_in is not None:
      judges = alrao_jax.judges(indices, self._one_in)

    def loss_fn(params):
      outputs, batch_stats = self._apply(params, state.batch_stats, inputs, train=True)
      if not self._method.has_heads:
        return self._plain_losses(outputs, targets).mean(), ({}, batch_stats)
      loss, info = self._mixture(outputs, targets, log_weights, judges=judges)
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

  def _mixture(self, outputs, targets, log_weights, **options):
    loss_of = alrao_jax.classification_loss
    if self._regression:
      loss_of = alrao_jax.regression_loss
    return loss_of(outputs, targets, log_weights, **options)

  def _plain_losses(self, outputs, targets):
    """The losses of an ordinary output layer."""
    if not self._regression:
      return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    mean, log_scale = outputs
    z = (targets - mean) * jnp.exp(-log_scale)
    return (0.5 * z**2 + log_scale + 0.5 * math.log(2 * math.pi)).sum(axis=-1)

  def _evaluate_step(self, carry, data, batch):
    snapshot, examples = data
    inputs = floats(examples.inputs[batch["indices"]])
    targets, valid = examples.targets[batch["indices"]], batch["valid"]
    outputs: Any = self._apply(
      snapshot.params, snapshot.batch_stats, inputs, train=False
    )[0]
    if self._method.has_heads:
      shape = targets.shape[:-1] if self._regression else targets.shape
      weights = valid.reshape(valid.shape + (1,) * (len(shape) - 1))
      weights = jnp.broadcast_to(weights, shape)
      _, info = self._mixture(outputs, targets, snapshot.log_weights, weights=weights)
      total = info.nll * valid.sum()
    else:
      losses = self._plain_losses(outputs, targets)
      losses = losses.reshape(len(valid), -1).mean(axis=-1)
      total = jnp.where(valid, losses, 0.0).sum()
    return carry, total + (valid.sum() if self._regression else 0.0)


# --- Data


def _data(train: Examples, held_out: Examples, num_outputs: int) -> ShortData:
  # There is no test part: what stands in for it is the part that chooses.
  return ShortData(train, held_out, held_out, num_outputs)


def _split(inputs, targets, sizes: tuple[int, int], num_outputs: int) -> ShortData:
  """The first examples train, the next ones are held out, the rest is left alone."""
  first, last = sizes[0], sizes[0] + sizes[1]
  return _data(
    Examples(inputs[:first], targets[:first]),
    Examples(inputs[first:last], targets[first:last]),
    num_outputs,
  )


def rows(data_dir: Path | None) -> ShortData:
  """Returns a generated table: 1,500 rows of 20 columns, three classes.

  Classes are drawn with probabilities that a fixed rule gives. 2,000 rows are held out.

  Args:
    data_dir: Not needed.
  """
  del data_dir
  random = np.random.default_rng(1)
  inputs = random.normal(size=(3_500, 20)).astype(np.float32)
  hidden = np.tanh(inputs @ random.normal(size=(20, 16)) / math.sqrt(20))
  logits = 3 * hidden @ random.normal(size=(16, 3)) / 2
  drawn = logits + random.gumbel(size=logits.shape)
  return _split(inputs, drawn.argmax(axis=1).astype(np.int32), (1_500, 2_000), 3)


def flipped(data_dir: Path | None) -> ShortData:
  """Returns 6,000 generated examples of ten classes; a fifth of labels is random.

  Those of the 2,000 held-out examples are, too.

  Args:
    data_dir: Not needed.
  """
  del data_dir
  random = np.random.default_rng(2)
  centers = random.normal(size=(30, 24))  # three to a class
  which = random.integers(0, 30, size=8_000)
  inputs = centers[which] + 0.7 * random.normal(size=(8_000, 24))
  labels = which % 10
  anew = random.random(8_000) < FLIPPED
  labels = np.where(anew, random.integers(0, 10, size=8_000), labels)
  inputs, labels = inputs.astype(np.float32), labels.astype(np.int32)
  return _split(inputs, labels, (6_000, 2_000), 10)


def cancer(data_dir: Path | None) -> ShortData:
  """Returns scikit-learn's breast cancer data: 285 rows train, 170 are held out.

  Args:
    data_dir: Not needed.
  """
  from sklearn.datasets import load_breast_cancer

  del data_dir
  inputs, labels = map(np.asarray, load_breast_cancer(return_X_y=True))
  order = np.random.default_rng(3).permutation(len(labels))
  inputs, labels = inputs[order], labels[order].astype(np.int32)
  inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
  return _split(inputs.astype(np.float32), labels, (285, 170), 2)


def noise(data_dir: Path | None) -> ShortData:
  """Returns 2,000 generated examples whose noise depends on the inputs.

  2,000 more are held out.

  Args:
    data_dir: Not needed.
  """
  del data_dir
  random = np.random.default_rng(4)
  inputs = random.normal(size=(4_000, 8)).astype(np.float32)
  hidden = np.tanh(inputs @ random.normal(size=(8, 12)) / 2)
  mean = hidden @ random.normal(size=(12, 1)) / 3
  scale = np.exp(np.clip(inputs[:, :1] - 1, -2.5, 0.5)) / 2
  targets = mean + scale * random.normal(size=mean.shape)
  targets = ((targets - targets.mean()) / targets.std()).astype(np.float32)
  return _split(inputs, targets, (2_000, 2_000), 1)


def tiles(data_dir: Path | None) -> ShortData:
  """Returns tiles of scikit-learn's two photographs, and from which twelfth they are.

  1,000 tiles train, 600 are held out, 440 are left alone.

  Args:
    data_dir: Not needed.
  """
  from sklearn.datasets import load_sample_images

  del data_dir
  photographs = np.stack(load_sample_images().images)  # (2, 427, 640, 3)
  height, width = photographs.shape[1] // TILE, photographs.shape[2] // TILE
  cut = photographs[:, : height * TILE, : width * TILE]
  cut = cut.reshape(2, height, TILE, width, TILE, 3).swapaxes(2, 3)
  photo, row, column = np.indices((2, height, width))
  labels = 6 * photo + 3 * (2 * row // height) + 3 * column // width
  order = np.random.default_rng(5).permutation(labels.size)
  images = cut.reshape(-1, TILE, TILE, 3)[order]
  return _split(images, labels.ravel()[order].astype(np.int32), (1_000, 600), 12)


def animals(data_dir: Path | None) -> ShortData:
  """Returns 3,000 of CIFAR-10's training images of four animals, and 1,000 held out.

  Args:
    data_dir: The folder below which to look, as in `benchmarks.data.load`.
  """
  found = data.load("cifar10", data_dir)
  classes = [found.class_names.index(name) for name in ANIMALS]
  which = np.flatnonzero(np.isin(found.train_labels, classes))[:4_000]
  labels = np.searchsorted(classes, found.train_labels[which]).astype(np.int32)
  return _split(found.train_images[which], labels, (3_000, 1_000), len(ANIMALS))


def segments(data_dir: Path | None) -> ShortData:
  """Returns 300 generated images of discs, squares and crosses, a class a pixel.

  Args:
    data_dir: Not needed.
  """
  del data_dir
  random = np.random.default_rng(6)
  count, side = 500, 24
  y, x = np.mgrid[:side, :side]
  labels = np.zeros((count, side, side), np.int32)
  for image in labels:
    for kind in random.permutation(3):
      (row, column), size = random.integers(4, side - 4, 2), random.integers(2, 6)
      far, near = np.maximum(abs(y - row), abs(x - column)), abs(y - row)
      shape = (
        (y - row) ** 2 + (x - column) ** 2 <= size**2,
        far <= size,
        (far <= size) & (np.minimum(near, abs(x - column)) <= 1),
      )[kind]
      image[shape] = kind + 1
  colors = random.normal(size=(count, 4, 3))  # of each image; the shape alone tells
  images = colors[np.arange(count)[:, None, None], labels]
  images = images + 0.5 * random.normal(size=images.shape)
  return _split(images.astype(np.float32), labels, (300, 200), 4)


def characters(first: int, size: int, data_dir: Path | None) -> ShortData:
  """Returns a piece of Penn Treebank's training text, and the 30,000 behind it.

  Args:
    first: Where it begins, counted from the end of the text.
    size: How many characters train.
    data_dir: The folder below which to look, as in `load_text`.
  """
  text = load_text("characters", data_dir)
  piece = text.train[len(text.train) - first :]
  parts = []
  for symbols in (piece[: size + 1], piece[size + 1 : size + 30_002]):
    count = (len(symbols) - 1) // LENGTH
    inputs = symbols[: count * LENGTH].reshape(count, LENGTH)
    targets = symbols[1 : count * LENGTH + 1].reshape(count, LENGTH)
    parts.append(Examples(inputs.astype(np.int32), targets.astype(np.int32)))
  return _data(*parts, num_outputs=len(text.vocabulary))


# --- Tasks


def _network(body: Callable[[], nn.Module], outputs: int, heads: int | None):
  return Predictor(body(), outputs, heads)


def _noisy(outputs: int, heads: int | None) -> nn.Module:
  return NoisyPredictor(short_networks.Perceptron((64, 64)), outputs, heads)


def _lstm(outputs: int, heads: int | None) -> nn.Module:
  reader = LSTM(outputs, features=48, units=48, num_layers=1)
  return Predictor(FromStart(reader), outputs, heads)


def _transformer(outputs: int, heads: int | None) -> nn.Module:
  reader = Decoder(outputs, LENGTH, width=32, num_layers=2)
  return Predictor(FromStart(reader), outputs, heads)


def _perceptron(*features: int):
  return functools.partial(
    _network, functools.partial(short_networks.Perceptron, features)
  )


def _task(name, label, load, model, num_steps, batch_size=32, convolves=False, **extra):
  short = ShortTask(name, label, load, model, num_steps, batch_size, convolves)
  return name, SearchTask(short, **extra)


# Numbers of steps are multiples of 32: eight points at a quarter of the length.
TASKS: dict[str, SearchTask] = dict(
  [
    _task("rows", "generated table, 41 passes", rows, _perceptron(64, 64), 1_920),
    _task(
      "flipped", "flipped labels, 22 passes", flipped, _perceptron(128, 128), 4_096
    ),
    _task(
      "tiles",
      "CNN with BatchNorm, tiles, 31 passes",
      tiles,
      functools.partial(_network, Strided),
      960,
      convolves=True,
    ),
    _task(
      "text",
      "transformer, 100,000 characters, 11 passes",
      functools.partial(characters, 270_000, 100_000),
      _transformer,
      2_048,
      batch_size=16,
    ),
    _task("cancer", "breast cancer, 36 passes", cancer, _perceptron(64, 64), 320),
    _task("noise", "learned noise, 31 passes", noise, _noisy, 1_920, learns_noise=True),
    _task(
      "animals",
      "CNN with BatchNorm, four animals, augmented, 20 passes",
      animals,
      functools.partial(_network, Strided),
      1_888,
      convolves=True,
      augments=True,
    ),
    _task(
      "segments",
      "segmentation, 32 passes",
      segments,
      functools.partial(_network, Pixels),
      608,
      batch_size=16,
      convolves=True,
    ),
    _task(
      "lstm",
      "LSTM, 50,000 characters, 16 passes",
      functools.partial(characters, 140_000, 50_000),
      _lstm,
      1_568,
      batch_size=16,
    ),
  ]
)
SCREENING = ("rows", "flipped", "tiles", "text")
