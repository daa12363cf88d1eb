"""MobileNetV2, for 32x32 images.

Two strides of the original become 1 (stem, second stage), and where a block with stride
1 changes the channels, its shortcut is a 1x1 convolution with normalisation instead of
nothing. ReLU is not capped at 6.

Reference: Sandler et al., arXiv 1801.04381, table 2.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from benchmarks.models.layers import ConvBlock, Norm, scale_channels

# (expansion, channels, blocks, stride of the first block) of each stage.
STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 1),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
  """Expand, convolve each channel apart, project; added to a shortcut at stride 1.

  Attributes:
    features: Number of output channels, already scaled.
    expansion: Ratio of the channels between to those of the input.
    strides: Step of the depthwise convolution.
    dtype: As in `ConvBlock`.
    norm: As in `ConvBlock`.
  """

  features: int
  expansion: int
  strides: int
  dtype: DTypeLike = jnp.float32
  norm: Norm = "batch"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Divides the sides by `strides`; the channels become `features`."""
    block = functools.partial(
      ConvBlock, use_bias=False, dtype=self.dtype, norm=self.norm
    )
    hidden = self.expansion * images.shape[-1]
    outputs = block(hidden, 1)(images, train=train)
    outputs = block(hidden, strides=self.strides, groups=hidden)(outputs, train=train)
    outputs = block(self.features, 1, activate=False)(outputs, train=train)
    if self.strides != 1:
      return outputs
    if images.shape[-1] != self.features:
      images = block(self.features, 1, activate=False)(images, train=train)
    return outputs + images


class MobileNetV2(nn.Module):
  """The body of MobileNetV2: images to 1,280 features (times `width`)."""

  width: float = 1.0
  dtype: DTypeLike = jnp.float32
  norm: Norm = "batch"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, channels) to 1/8 of their sides."""
    scale = functools.partial(scale_channels, width=self.width)
    block = functools.partial(
      ConvBlock, use_bias=False, dtype=self.dtype, norm=self.norm
    )
    images = block(scale(32))(images, train=train)
    for expansion, channels, blocks, first_stride in STAGES:
      for index in range(blocks):
        strides = first_stride if index == 0 else 1
        images = InvertedResidual(
          scale(channels), expansion, strides, self.dtype, self.norm
        )(images, train=train)
    return block(scale(1280), 1)(images, train=train)
