"""Many small networks, to be put in order."""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax

from benchmarks.models.layers import ConvBlock

Kind = Literal["mlp", "cnn"]
Activation = Literal["relu", "tanh"]


class Layers(nn.Module):
  """Alike layers, each with batch normalisation and an activation.

  Attributes:
    kind: ``"mlp"``, dense layers on all pixels, or ``"cnn"``, 3x3 convolutions of
      stride 2.
    depth: Number of layers.
    features: Units of each, or channels.
    activation: ``"relu"`` or ``"tanh"``.
  """

  kind: Kind
  depth: int
  features: int
  activation: Activation = "relu"

  @property
  def title(self) -> str:
    """A name that no other has."""
    return f"{self.kind}-{self.depth}x{self.features}-{self.activation}"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, channels) to (batch, ..., `features`)."""
    x = images if self.kind == "cnn" else images.reshape(len(images), 1, 1, -1)
    for _ in range(self.depth):
      if self.kind == "cnn":
        x = ConvBlock(self.features, strides=2, activate=False)(x, train=train)
      else:
        x = nn.Dense(self.features)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
      x = nn.relu(x) if self.activation == "relu" else nn.tanh(x)
    return x


def _grid(
  kind: Kind,
  depths: Sequence[int],
  widths: Sequence[int],
  activations: Sequence[Activation],
) -> tuple[Layers, ...]:
  return tuple(
    Layers(kind, depth, features, activation)
    for depth in depths
    for features in widths
    for activation in activations
  )


DIGITS = (
  *_grid("mlp", (1, 2, 3), (8, 64), ("relu", "tanh")),
  *_grid("cnn", (1, 2, 3), (4, 16), ("relu", "tanh")),
)
CIFAR10 = (
  *_grid("mlp", (1, 3), (16, 128), ("relu",)),
  *_grid("cnn", (1, 3), (8, 32), ("relu",)),
)
