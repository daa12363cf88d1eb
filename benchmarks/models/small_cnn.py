"""A small strided CNN, for many runs on a CPU and for studies without normalisation."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from benchmarks.models.layers import ConvBlock, Norm, scale_channels

CHANNELS = (16, 32, 64)


class SmallCNN(nn.Module):
  """Three 3x3 convolutions of stride 2: images to 64 features (times `width`)."""

  width: float = 1.0
  dtype: DTypeLike = jnp.float32
  norm: Norm = "batch"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, channels) to 1/8 of their sides."""
    for channels in CHANNELS:
      images = ConvBlock(
        scale_channels(channels, self.width),
        strides=2,
        dtype=self.dtype,
        norm=self.norm,
      )(images, train=train)
    return images
