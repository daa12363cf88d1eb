"""The parts that the benchmark networks share.

Every network is a `Classifier`: a body that turns images into features, and an output
layer. Only the output layer differs between an ordinary network and Alrao's, so that
the two have the same parameters below ``body``.
"""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from alrao_jax import HeadOutputs
from alrao_jax.linen import MultiHead
from benchmarks.models.kernels import conv_general_dilated

Norm = Literal["batch", "none"]


def scale_channels(channels: int, width: float) -> int:
  """Returns `channels` times `width`, rounded half up, at least 1.

  At width 1/8 all three of the papers' networks come out without rounding, since every
  layer in them has a multiple of 8 channels.

  Args:
    channels: Number of channels at width 1.
    width: Any positive number (gamma in the papers).

  Returns:
    The number of channels of the scaled layer.

  Example:
    >>> [scale_channels(24, width) for width in (1, 3, 1 / 8, 1 / 100)]
    [24, 72, 3, 1]
  """
  return max(1, math.floor(channels * width + 0.5))


def batch_norm(images: jax.Array, *, train: bool, dtype: DTypeLike) -> jax.Array:
  """Applies a `flax.linen.BatchNorm` (momentum .9, epsilon 1e-5) of the module at work.

  Args:
    images: (batch, height, width, channels).
    train: Whether it uses, and learns from, the statistics of this batch.
    dtype: Of the result; the computation is float32.
  """
  norm = nn.BatchNorm(
    use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=jnp.float32
  )
  return norm(images.astype(jnp.float32)).astype(dtype)


class ConvBlock(nn.Module):
  """Convolution, normalisation, ReLU; or normalisation, ReLU, convolution.

  Padding is symmetric, as in the networks' original descriptions; Flax's ``"SAME"``
  would shift strided convolutions by a pixel.

  Attributes:
    features: Number of output channels.
    kernel_size: Side of the square kernel, odd.
    strides: Step of the convolution, along both axes.
    groups: Number of channel groups; `features` for a depthwise convolution.
    use_bias: Whether the convolution has a bias beside its normalisation. Without
      normalisation it always has one.
    activate: Whether there is a ReLU.
    padding: Zeros at each side; by default as many as keep the size (before strides).
    first: What comes first, ``"conv"`` or ``"norm"``.
    dtype: Of the computation. Parameters, and the statistics of the normalisation, are
      float32 always.
    norm: ``"batch"`` (momentum .9, epsilon 1e-5) or ``"none"``.
  """

  features: int
  kernel_size: int = 3
  strides: int = 1
  groups: int = 1
  use_bias: bool = True
  activate: bool = True
  padding: int | None = None
  first: Literal["conv", "norm"] = "conv"
  dtype: DTypeLike = jnp.float32
  norm: Norm = "batch"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, channels) to (..., `features`)."""
    if self.first == "norm":
      return self._convolve(self._normalize(images, train))
    return self._normalize(self._convolve(images), train)

  def _convolve(self, images: jax.Array) -> jax.Array:
    keep_size = self.kernel_size // 2
    return nn.Conv(
      self.features,
      (self.kernel_size, self.kernel_size),
      strides=self.strides,
      padding=keep_size if self.padding is None else self.padding,
      feature_group_count=self.groups,
      use_bias=self.use_bias or self.norm == "none",
      dtype=self.dtype,
      conv_general_dilated=conv_general_dilated,
    )(images)

  def _normalize(self, images: jax.Array, train: bool) -> jax.Array:
    if self.norm == "batch":
      images = batch_norm(images, train=train, dtype=self.dtype)
    return nn.relu(images) if self.activate else images


class Classifier(nn.Module):
  """A body, the mean over positions, and an output layer.

  The mean and the output layer are computed in float32 whatever the body's dtype: they
  cost little, and the loss takes the logarithm of their result.

  Attributes:
    body: Module that maps (images, train=...) to (batch, height, width, channels).
    num_classes: Number of classes.
    num_heads: Number of copies of the output layer, or None for an ordinary one.
  """

  body: nn.Module
  num_classes: int = 10
  num_heads: int | None = None

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array | HeadOutputs:
    """Maps images (batch, height, width, channels), float, to logits.

    Args:
      images: The normalised images.
      train: Whether normalisation uses, and learns from, the statistics of this batch.

    Returns:
      Logits (batch, num_classes), float32; with `num_heads` the `HeadOutputs` of as
      many copies.

    Raises:
      TypeError: The images are integers, so not normalised.
      ValueError: The images are too small for the body.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise TypeError(
        f"a Classifier takes normalised images, got {images.dtype}; apply "
        "benchmarks.data.augment.normalize first."
      )
    features = self.body(images, train=train)
    if 0 in features.shape:
      raise ValueError(
        f"images of {images.shape[1]}x{images.shape[2]} pixels are too small for "
        f"{type(self.body).__name__}, which shrinks them to nothing."
      )
    features = jnp.mean(features, axis=(1, 2), dtype=jnp.float32)
    if self.num_heads is None:
      return nn.Dense(self.num_classes, name="output")(features)
    head = nn.Dense(self.num_classes)
    return MultiHead(head, num_heads=self.num_heads, name="output")(features)
