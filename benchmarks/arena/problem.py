"""What a short task is: a network, data in three parts, and how long it trains."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import numpy as np


class Part(NamedTuple):
  """Examples.

  Attributes:
    inputs: (n, ...): uint8 for images, int32 for symbols, float32 for all else.
    targets: (n, ...): int32 classes, or float32 numbers (n, outputs).
  """

  inputs: np.ndarray
  targets: np.ndarray


class Data(NamedTuple):
  """The three parts of a task, and the number of its classes or outputs."""

  train: Part
  validation: Part
  test: Part
  num_outputs: int


class Task(NamedTuple):
  """A short training.

  Attributes:
    name: Its name in records.
    label: Its name in tables.
    load: Reads the data; takes the folder to look in, or None.
    model: Function of (number of outputs, number of heads or None) that returns a linen
      module, called as ``model(inputs, train=...)``.
    num_steps: Number of steps.
    batch_size: Number of examples in a step.
    has_convolutions: Whether the network has any. Their weights can't be batched over
      runs without loss of speed; all other networks train several runs at once.
  """

  name: str
  label: str
  load: Callable[[Path | None], Data]
  model: Callable[[int, int | None], nn.Module]
  num_steps: int
  batch_size: int = 32
  has_convolutions: bool = False
