"""The long suite's tasks, which tuned nothing: what a user would train, to its end.

They share no task with the arena and the search. Of CIFAR-10 the search has seen 4,000
training images of four animals, of Penn Treebank a twentieth of the training text.
"""

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from benchmarks import data
from benchmarks.data.text_files import load_text
from benchmarks.methods import ADAMW_COSINE
from benchmarks.models.decoder import Decoder
from benchmarks.models.short_networks import FromStart, Perceptron, Predictor, ResNet
from benchmarks.workloads.search import FLIPPED, SearchTask, SearchWorkload, Strided
from benchmarks.workloads.short import (
  NUM_POINTS,
  Examples,
  ShortData,
  ShortTask,
  imagenette,
)

CONTEXT = 64  # characters
PRETRAINING = (1e-2, 1e-2)  # rate and decay of AdamW, for the fine-tuning's body


class LongWorkload(SearchWorkload):
  """Trains as the search does; test data is measured, too, but chooses nothing."""

  watched = ("validation", "test")


def cifar10(data_dir: Path | None) -> ShortData:
  """Returns CIFAR-10: 45,000 images train, 5,000 are held out, 10,000 test.

  Args:
    data_dir: The folder below which to look, as in `benchmarks.data.load`.
  """
  splits = data.load("cifar10", data_dir).split(45_000, 5_000)
  return ShortData(*(Examples(*split) for split in splits), num_outputs=10)


def text(data_dir: Path | None) -> ShortData:
  """Returns all of Penn Treebank by characters; targets are the next ones.

  Args:
    data_dir: The folder below which to look, as in `load_text`.
  """
  found, parts = load_text("characters", data_dir), []
  for symbols in (found.train, found.validation, found.test):
    count = (len(symbols) - 1) // CONTEXT
    inputs = symbols[: count * CONTEXT].reshape(count, CONTEXT)
    targets = symbols[1 : count * CONTEXT + 1].reshape(count, CONTEXT)
    parts.append(Examples(inputs.astype(np.int32), targets.astype(np.int32)))
  return ShortData(*parts, num_outputs=len(found.vocabulary))


def wine(data_dir: Path | None) -> ShortData:
  """Returns scikit-learn's wine, 13 columns: 98 rows train, 40 are held out, 40 test.

  Args:
    data_dir: Not needed.
  """
  from sklearn.datasets import load_wine

  del data_dir
  inputs, labels = map(np.asarray, load_wine(return_X_y=True))
  inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
  return _parts(inputs.astype(np.float32), labels.astype(np.int32), 40, 3)


def flipped(data_dir: Path | None) -> ShortData:
  """Returns scikit-learn's digits, a fifth of whose labels are drawn anew.

  Args:
    data_dir: Not needed.
  """
  from sklearn.datasets import load_digits

  del data_dir
  inputs, labels = map(np.asarray, load_digits(return_X_y=True))
  random = np.random.default_rng(1)
  anew = random.random(len(labels)) < FLIPPED
  labels = np.where(anew, random.integers(0, 10, size=len(labels)), labels)
  return _parts((inputs / 16).astype(np.float32), labels.astype(np.int32), 400, 10)


def _parts(inputs, labels, count: int, num_outputs: int) -> ShortData:
  """Shuffles; the last rows test, those before are held out."""
  order = np.random.default_rng(0).permutation(len(labels))
  inputs, labels = inputs[order], labels[order]
  cuts = (slice(0, -2 * count), slice(-2 * count, -count), slice(-count, None))
  parts = (Examples(inputs[cut], labels[cut]) for cut in cuts)
  return ShortData(*parts, num_outputs=num_outputs)


def fine_tuning(data_dir: Path | None) -> ShortData:
  """Returns 1,000 images of Imagenette, and a body trained on CIFAR-10.

  1,000 are held out, 2,000 test. The body is trained by AdamW, on 20,000 images for 3
  passes, when this is called.

  Args:
    data_dir: The folder below which to look.
  """
  before = cifar10(data_dir)
  before = before._replace(
    train=Examples(before.train.inputs[:20_000], before.train.targets[:20_000])
  )
  task = SearchTask(
    ShortTask("before", "before", cifar10, _strided, 1_856, has_convolutions=True)
  )
  workload = SearchWorkload(task, before, ADAMW_COSINE, any_rate=PRETRAINING)
  state: Any = workload.init(0, PRETRAINING)
  for epoch in range(1, NUM_POINTS + 1):
    state, _ = workload.step(state, workload.data, workload.batches(0, epoch))
  body = {
    "params": state.params["body"],
    "batch_stats": state.batch_stats["body"],
  }
  found = imagenette(data_dir)
  few = Examples(found.train.inputs[:1_000], found.train.targets[:1_000])
  return found._replace(train=few, body=jax.device_get(body))


def _network(body, outputs: int, heads: int | None) -> nn.Module:
  return Predictor(body(), outputs, heads)


def _strided(outputs: int, heads: int | None) -> nn.Module:
  return Predictor(Strided((32, 64, 128)), outputs, heads)


def _decoder(outputs: int, heads: int | None) -> nn.Module:
  reader = Decoder(outputs, CONTEXT, width=48, num_layers=2)
  return Predictor(FromStart(reader), outputs, heads)


def _perceptron(*features: int):
  return functools.partial(_network, functools.partial(Perceptron, features))


# Numbers of steps are multiples of 32: eight points at a quarter of the length.
TASKS: dict[str, SearchTask] = {
  task.short.name: task
  for task in (
    SearchTask(
      ShortTask("wine", "MLP, wine, 42 passes", wine, _perceptron(64, 64), 128),
    ),
    SearchTask(
      ShortTask(
        "flipped_digits",
        "MLP, digits, a fifth of labels flipped, 42 passes",
        flipped,
        _perceptron(256, 256),
        1_312,
      ),
    ),
    SearchTask(
      ShortTask(
        "fine_tuning",
        "CNN of CIFAR-10, fine-tuned to Imagenette at 32 pixels, 20 passes",
        fine_tuning,
        _strided,
        640,
        has_convolutions=True,
      ),
      augments=True,
    ),
    SearchTask(
      ShortTask(
        "imagenette",
        "ResNet-8, Imagenette at 64 pixels, 12 passes",
        functools.partial(imagenette, side=64),
        functools.partial(_network, ResNet),
        3_168,
        has_convolutions=True,
      ),
      augments=True,
    ),
    SearchTask(
      ShortTask(
        "ptb",
        "transformer, Penn Treebank by characters, 4 passes",
        text,
        _decoder,
        9_952,
      ),
    ),
    SearchTask(
      ShortTask(
        "cifar10",
        "ResNet-8, CIFAR-10, 6 passes",
        cifar10,
        functools.partial(_network, functools.partial(ResNet, first_strides=1)),
        4_224,
        batch_size=64,
        has_convolutions=True,
      ),
      augments=True,
    ),
  )
}
