"""ResNet50, for ImageNet.

A block's stride is in its 3x3 convolution, as is usual since, not in the first 1x1.

Reference: He et al., arXiv 1512.03385, table 1.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from benchmarks.models.kernels import max_pool
from benchmarks.models.layers import ConvBlock, Norm, scale_channels

STEM = 64  # channels
# (channels between, blocks) of each stage; all but the first halve the sides.
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
EXPANSION = 4  # channels of a block's output, in multiples of those between


class Bottleneck(nn.Module):
  """Reduce, convolve, expand; added to a shortcut.

  Attributes:
    channels: Number of channels between, already scaled.
    features: Number of output channels, already scaled.
    strides: Step of the 3x3 convolution.
    project: Whether the shortcut is a 1x1 convolution.
    dtype: As in `ConvBlock`.
    norm: As in `ConvBlock`.
  """

  channels: int
  features: int
  strides: int
  project: bool
  dtype: DTypeLike = jnp.float32
  norm: Norm = "batch"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Divides the sides by `strides`; the channels become `features`."""
    block = functools.partial(
      ConvBlock, use_bias=False, dtype=self.dtype, norm=self.norm
    )
    outputs = block(self.channels, 1)(images, train=train)
    outputs = block(self.channels, strides=self.strides)(outputs, train=train)
    outputs = block(self.features, 1, activate=False)(outputs, train=train)
    if self.project:
      images = block(self.features, 1, self.strides, activate=False)(
        images, train=train
      )
    return nn.relu(outputs + images)


class ResNet50(nn.Module):
  """The body of ResNet50: images to 2,048 features (times `width`)."""

  width: float = 1.0
  dtype: DTypeLike = jnp.float32
  norm: Norm = "batch"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, channels) to 1/32 of their sides."""
    scale = functools.partial(scale_channels, width=self.width)
    images = ConvBlock(
      scale(STEM), 7, 2, use_bias=False, dtype=self.dtype, norm=self.norm
    )(images, train=train)
    images = max_pool(images, 3, 2, 1)
    for stage, (channels, blocks) in enumerate(STAGES):
      for index in range(blocks):
        is_first = index == 0
        images = Bottleneck(
          scale(channels),
          scale(EXPANSION * channels),
          strides=2 if is_first and stage > 0 else 1,
          project=is_first,
          dtype=self.dtype,
          norm=self.norm,
        )(images, train=train)
    return images
