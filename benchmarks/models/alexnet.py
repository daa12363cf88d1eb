"""AlexNet, in its second, one-column form.

Without normalisation, as it was made, it is the hardest of the papers' networks to
train.

Reference: Krizhevsky, *One weird trick for parallelizing convolutional neural
networks*, arXiv 1404.5997.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from benchmarks.models.kernels import max_pool
from benchmarks.models.layers import ConvBlock, Norm, scale_channels

# (channels, side of the kernel, stride, padding); None: 3x3 pooling with stride 2.
LAYERS = (
  (64, 11, 4, 2),
  None,
  (192, 5, 1, 2),
  None,
  (384, 3, 1, 1),
  (256, 3, 1, 1),
  (256, 3, 1, 1),
  None,
)
POSITIONS = 6  # along each side, whatever the size of the images
HIDDEN = 4096
DROPOUT = 0.5


class AlexNet(nn.Module):
  """The body of AlexNet: images of at least 63x63 to 4,096 features (times `width`).

  In training it takes a random key ``"dropout"``.
  """

  width: float = 1.0
  dtype: DTypeLike = jnp.float32
  norm: Norm = "none"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, channels) to (batch, 1, 1, features)."""
    scale = functools.partial(scale_channels, width=self.width)
    for layer in LAYERS:
      if layer is None:
        images = max_pool(images, 3, 2, 0)
      else:
        channels, side, stride, padding = layer
        images = ConvBlock(
          scale(channels),
          side,
          stride,
          padding=padding,
          dtype=self.dtype,
          norm=self.norm,
        )(images, train=train)
    if 0 in images.shape:
      return images  # too small, which the classifier says
    images = adaptive_average_pool(images, POSITIONS)
    features = images.reshape(len(images), 1, 1, -1)
    for _ in range(2):
      features = nn.Dropout(DROPOUT, deterministic=not train)(features)
      features = nn.relu(nn.Dense(scale(HIDDEN), dtype=self.dtype)(features))
    return features


def adaptive_average_pool(images: jax.Array, size: int) -> jax.Array:
  """Returns means over `size` times `size` parts, which cover the image evenly.

  Part ``i`` along an axis of ``n`` pixels is from ``floor(i n / size)`` up to, without
  it, ``ceil((i + 1) n / size)``; parts overlap where `size` does not divide ``n``.

  Args:
    images: (batch, height, width, channels).
    size: Number of parts along each axis.

  Returns:
    The means, (batch, `size`, `size`, channels).
  """
  if images.shape[1:3] == (size, size):
    return images
  rows, columns = (
    jnp.asarray(_averages(side, size), images.dtype) for side in images.shape[1:3]
  )
  return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, images)


def _averages(side: int, size: int) -> np.ndarray:
  """The matrix (size, side) that takes means over the parts of an axis."""
  matrix = np.zeros((size, side))
  for part in range(size):
    start, stop = part * side // size, -(-(part + 1) * side // size)
    matrix[part, start:stop] = 1 / (stop - start)
  return matrix
