"""GoogLeNet, for 32x32 images.

One 3x3 convolution to 192 channels stands for the original's stem, two 3x3 convolutions
for each 5x5, and there are no auxiliary classifiers.

Reference: Szegedy et al., arXiv 1409.4842, table 1.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from benchmarks.models.kernels import max_pool
from benchmarks.models.layers import ConvBlock, Norm, scale_channels

# Columns of the reference's table 1: 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool
# projection. None halves the image.
STAGES = (
  (64, 96, 128, 16, 32, 32),
  (128, 128, 192, 32, 96, 64),
  None,
  (192, 96, 208, 16, 48, 64),
  (160, 112, 224, 24, 64, 64),
  (128, 128, 256, 24, 64, 64),
  (112, 144, 288, 32, 64, 64),
  (256, 160, 320, 32, 128, 128),
  None,
  (256, 160, 320, 32, 128, 128),
  (384, 192, 384, 48, 128, 128),
)


class Inception(nn.Module):
  """Four parallel branches, concatenated along the channels.

  Attributes:
    channels: Six numbers of channels, in the order of `STAGES`, already scaled.
    dtype: As in `ConvBlock`.
    norm: As in `ConvBlock`.
  """

  channels: tuple[int, ...]
  dtype: DTypeLike = jnp.float32
  norm: Norm = "batch"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Keeps the size; the channels become those of the four branches."""
    block = functools.partial(ConvBlock, dtype=self.dtype, norm=self.norm)
    direct, reduce3, conv3, reduce5, conv5, project = self.channels
    pooled = max_pool(images, 3, 1, 1)
    branches = (
      (images, (block(direct, 1),)),
      (images, (block(reduce3, 1), block(conv3))),
      (images, (block(reduce5, 1), block(conv5), block(conv5))),
      (pooled, (block(project, 1),)),
    )
    outputs = []
    for branch, layers in branches:
      for layer in layers:
        branch = layer(branch, train=train)
      outputs.append(branch)
    return jnp.concatenate(outputs, axis=-1)


class GoogLeNet(nn.Module):
  """The body of GoogLeNet: images to 1,024 features (times `width`)."""

  width: float = 1.0
  dtype: DTypeLike = jnp.float32
  norm: Norm = "batch"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, channels) to 1/4 of their sides."""
    scale = functools.partial(scale_channels, width=self.width)
    images = ConvBlock(scale(192), dtype=self.dtype, norm=self.norm)(
      images, train=train
    )
    for channels in STAGES:
      if channels is None:
        images = max_pool(images, 3, 2, 1)
      else:
        scaled = tuple(scale(count) for count in channels)
        images = Inception(scaled, self.dtype, self.norm)(images, train=train)
    return images
