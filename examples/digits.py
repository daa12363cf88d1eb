"""Scikit-learn's digits, the real data of the short examples."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits


class Split(NamedTuple):
  """Images (n, 8, 8, 1) in [0, 1], float32, and labels (n,), int32."""

  images: np.ndarray
  labels: np.ndarray


def load(num_test: int = 500) -> tuple[Split, Split]:
  """Returns training and test images, always in the same order.

  Args:
    num_test: How many of the 1,797 images are for testing.
  """
  pixels, digits = load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(digits))
  images = pixels[order].reshape(-1, 8, 8, 1).astype(np.float32) / 16.0
  labels = digits[order].astype(np.int32)
  return (
    Split(images[num_test:], labels[num_test:]),
    Split(images[:num_test], labels[:num_test]),
  )


def check_seed(seed: int) -> None:
  """Refuses a seed that :func:`jax.random.key` would take for another one.

  Args:
    seed: From 0 to 2**32 - 1; JAX silently keeps the last 32 bits of others.

  Raises:
    ValueError: If it is another number. On the command line this is exit code 2.
  """
  if not 0 <= seed < 2**32:
    raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {seed}.")


def batches(
  split: Split, epochs: int, seed: int | tuple[int, ...] = 0, size: int = 32
) -> Iterator[Split]:
  """Yields full mini-batches, in a new order each epoch.

  Args:
    split: The images.
    epochs: Number of passes over them.
    seed: Determines the orders; one number or several.
    size: Images in a batch.
  """
  generator = np.random.default_rng(seed)
  for _ in range(epochs):
    order = generator.permutation(len(split.labels))
    for first in range(0, len(order) - size + 1, size):
      chosen = order[first : first + size]
      yield Split(split.images[chosen], split.labels[chosen])
