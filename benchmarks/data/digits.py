"""Scikit-learn's handwritten digits, which need no file and no network."""

import numpy as np

from benchmarks.data.dataset import Dataset

NUM_TRAIN = 1_500  # of 1,797; the rest is for testing
SCALE = 4  # from 8x8 to the 32x32 that the networks are made for


def load() -> Dataset:
  """Returns the digits as colour images (n, 32, 32, 3) of 4x4 equal pixels."""
  from sklearn.datasets import load_digits

  rows, labels = load_digits(return_X_y=True)
  grey = np.round(rows.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
  large = grey.repeat(SCALE, axis=1).repeat(SCALE, axis=2)
  images = np.repeat(large[..., None], 3, axis=-1)
  labels = labels.astype(np.int32)
  return Dataset(
    name="digits",
    train_images=images[:NUM_TRAIN],
    train_labels=labels[:NUM_TRAIN],
    test_images=images[NUM_TRAIN:],
    test_labels=labels[NUM_TRAIN:],
    class_names=tuple("0123456789"),
    can_flip=False,
    source="scikit-learn",
  )
