"""The four tasks that tune the recipe; the arena has none of them."""

import functools

from benchmarks.arena.models import FromStart, Predictor
from benchmarks.arena.problem import Task
from benchmarks.arena.sources import characters, cifar10
from benchmarks.models import build_model
from benchmarks.models.decoder import Decoder
from benchmarks.models.lstm import LSTM


def _cnn(norm, num_outputs, num_heads):
  return build_model("small_cnn", num_outputs, num_heads, norm=norm)


def _lstm(num_outputs, num_heads):
  reader = LSTM(num_outputs, features=48, units=48, num_layers=1)
  return Predictor(FromStart(reader), num_outputs, num_heads)


def _transformer(num_outputs, num_heads):
  reader = Decoder(num_outputs, LENGTH, width=32, num_layers=2)
  return Predictor(FromStart(reader), num_outputs, num_heads)


LENGTH = 32  # of a text

TASKS = {
  task.name: task
  for task in (
    Task(
      "cnn_batch_norm",
      "small CNN with BatchNorm",
      cifar10,
      functools.partial(_cnn, "batch"),
      num_steps=500,
      has_convolutions=True,
    ),
    Task(
      "cnn",
      "small CNN without normalisation",
      cifar10,
      functools.partial(_cnn, "none"),
      num_steps=500,
      has_convolutions=True,
    ),
    Task(
      "lstm",
      "LSTM, characters",
      functools.partial(characters, LENGTH),
      _lstm,
      num_steps=500,
      batch_size=16,
    ),
    Task(
      "transformer",
      "transformer, characters",
      functools.partial(characters, LENGTH),
      _transformer,
      num_steps=500,
      batch_size=16,
    ),
  )
}
