"""A multilayer perceptron, for studies with many runs and for measuring overhead."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from benchmarks.models.layers import Norm, scale_channels

FEATURES = (512, 512)


class MLP(nn.Module):
  """Two layers of 512 ReLU units (times `width`) on all pixels of an image."""

  width: float = 1.0
  dtype: DTypeLike = jnp.float32
  norm: Norm = "batch"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, channels) to (batch, 1, 1, 512)."""
    x = images.reshape(len(images), -1)
    for features in FEATURES:
      x = nn.Dense(scale_channels(features, self.width), dtype=self.dtype)(x)
      if self.norm == "batch":
        x = nn.BatchNorm(
          use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=jnp.float32
        )(x.astype(jnp.float32)).astype(self.dtype)
      x = nn.relu(x)
    return x[:, None, None]
