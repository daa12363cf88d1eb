"""VGG19 with batch normalisation, for 32x32 images.

Reference: Simonyan and Zisserman, arXiv 1409.1556, configuration E, with one output
layer in place of three.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from benchmarks.models.kernels import max_pool
from benchmarks.models.layers import ConvBlock, Norm, scale_channels

# (channels, convolutions) of each stage; every stage ends by halving the image.
STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))


class VGG19(nn.Module):
  """The body of VGG19: images of at least 32x32 to 512 features (times `width`)."""

  width: float = 1.0
  dtype: DTypeLike = jnp.float32
  norm: Norm = "batch"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, channels) to 1/32 of their sides."""
    for channels, convolutions in STAGES:
      for _ in range(convolutions):
        images = ConvBlock(
          scale_channels(channels, self.width), dtype=self.dtype, norm=self.norm
        )(images, train=train)
      images = max_pool(images, 2, 2, 0)
    return images
