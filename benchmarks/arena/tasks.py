"""The eight tasks of the arena; none of them tuned anything."""

import functools

import flax.linen as nn

from benchmarks.arena import models, sources
from benchmarks.arena.problem import Task

LENGTH = 32  # of a text
VOCABULARY, CONTEXT = 1_000, 4  # words


def _network(body, num_outputs: int, num_heads: int | None) -> nn.Module:
  return models.Predictor(body(), num_outputs, num_heads)


def _gru(num_outputs: int, num_heads: int | None) -> nn.Module:
  return models.Predictor(models.GRU(num_outputs), num_outputs, num_heads)


def _words(num_outputs: int, num_heads: int | None) -> nn.Module:
  # And the unknown word.
  return models.Predictor(models.Words(num_outputs + 1), num_outputs, num_heads)


TASKS = {
  task.name: task
  for task in (
    Task(
      "vgg",
      "VGG, CIFAR-10",
      sources.cifar10,
      functools.partial(_network, models.VGGLike),
      num_steps=800,
      has_convolutions=True,
    ),
    Task(
      "mixer",
      "Mixer, CIFAR-10",
      sources.cifar10,
      functools.partial(_network, models.Mixer),
      num_steps=800,
    ),
    Task(
      "resnet",
      "ResNet, Imagenette",
      sources.imagenette,
      functools.partial(_network, models.ResNet),
      num_steps=800,
      has_convolutions=True,
    ),
    Task(
      "gru",
      "GRU, characters",
      functools.partial(sources.characters, LENGTH),
      _gru,
      num_steps=2_000,
      batch_size=16,
    ),
    Task(
      "words",
      "embedding, words",
      functools.partial(sources.words, CONTEXT, VOCABULARY),
      _words,
      num_steps=1_500,
      batch_size=64,
    ),
    Task(
      "vit",
      "transformer, CIFAR-10",
      sources.cifar10,
      functools.partial(_network, models.VisionTransformer),
      num_steps=800,
    ),
    Task(
      "diabetes",
      "regression, diabetes",
      sources.diabetes,
      functools.partial(_network, functools.partial(models.Perceptron, (64, 64))),
      num_steps=400,
    ),
    Task(
      "digits",
      "wide MLP, digits",
      sources.digits,
      functools.partial(_network, functools.partial(models.Perceptron, (512, 512))),
      num_steps=400,
    ),
  )
}
