"""The regression example's two problems."""

from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_diabetes


class Problem(NamedTuple):
  """Inputs (n, d) and targets (n,) of each split, standardised.

  Attributes:
    name: Its name.
    inputs: By split.
    targets: By split.
    noise_scale: Of the targets, where it is not learned.
    grid: More inputs, at which the picture shows predictions, (m, d).
  """

  name: str
  inputs: dict[str, np.ndarray]
  targets: dict[str, np.ndarray]
  noise_scale: float
  grid: np.ndarray


def split(inputs: Any, targets: Any, sizes: Any) -> list[dict[str, np.ndarray]]:
  """Returns inputs and targets by split, scaled by the training part's statistics."""
  names, stops, parts = ("train", "validation", "test"), np.cumsum(sizes)[:-1], []
  for values in (inputs, targets):
    train, *others = np.split(np.asarray(values, np.float32), stops)
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    scaled = [(part - mean) / deviation for part in (train, *others)]
    parts.append(dict(zip(names, scaled, strict=True)))
  return parts


def make_sine() -> Problem:
  """Returns 400 points of a sine whose noise grows from left to right."""
  random = np.random.default_rng(0)
  x = random.uniform(-3.0, 3.0, 400)
  y = np.sin(2.0 * x) + (0.05 + 0.05 * (x + 3.0)) * random.normal(size=400)
  inputs, targets = split(x[:, None], y, (200, 100, 100))
  grid = np.linspace(-2.2, 2.2, 221, dtype=np.float32)[:, None]
  return Problem("sine", inputs, targets, 0.3, grid)


def load_patients() -> Problem:
  """Returns ten measurements of 442 patients, and their diabetes' course in a year."""
  data: Any = load_diabetes(scaled=False)
  order = np.random.default_rng(0).permutation(len(data.target))
  inputs, targets = split(data.data[order], data.target[order], (242, 100, 100))
  return Problem("diabetes", inputs, targets, 0.7, grid=inputs["test"][:0])
