"""DenseNet121, for ImageNet.

Reference: Huang et al., arXiv 1608.06993, table 1.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from benchmarks.models.kernels import max_pool
from benchmarks.models.layers import ConvBlock, Norm, batch_norm, scale_channels

STEM = 64  # channels
BLOCKS = (6, 12, 24, 16)  # layers of each; between blocks, sides and channels halve
GROWTH = 32  # channels that a layer adds
BOTTLENECK = 4  # channels of a layer's first convolution, in multiples of GROWTH


class DenseNet121(nn.Module):
  """The body of DenseNet121: images to 1,024 features (times `width`)."""

  width: float = 1.0
  dtype: DTypeLike = jnp.float32
  norm: Norm = "batch"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, channels) to 1/32 of their sides."""
    scale = functools.partial(scale_channels, width=self.width)
    block = functools.partial(
      ConvBlock, use_bias=False, dtype=self.dtype, norm=self.norm
    )
    before = functools.partial(block, first="norm")
    images = block(scale(STEM), 7, 2)(images, train=train)
    images = max_pool(images, 3, 2, 1)
    channels = STEM
    for index, layers in enumerate(BLOCKS):
      if index > 0:
        channels //= 2
        images = before(scale(channels), 1)(images, train=train)
        images = _halve(images)
      for _ in range(layers):
        added = before(scale(BOTTLENECK * GROWTH), 1)(images, train=train)
        added = before(scale(GROWTH))(added, train=train)
        images = _join(images, added)
      channels += layers * GROWTH
    if self.norm == "batch":
      images = batch_norm(images, train=train, dtype=self.dtype)
    return nn.relu(images)


def _join(images: jax.Array, added: jax.Array) -> jax.Array:
  """Puts channels side by side."""
  joined = jnp.concatenate([images, added], axis=-1)
  if jax.default_backend() != "cpu":
    return joined
  # Every later layer reads this. Without a barrier, XLA's CPU backend puts it together
  # anew in each: twice the time to compile, and a fifth more to run.
  return jax.lax.optimization_barrier(joined)


def _halve(images: jax.Array) -> jax.Array:
  """Means over 2x2 pixels; an odd last row or column is left out."""
  batch, height, width, channels = images.shape
  images = images[:, : height // 2 * 2, : width // 2 * 2]
  parts = images.reshape(batch, height // 2, 2, width // 2, 2, channels)
  return parts.mean(axis=(2, 4))
