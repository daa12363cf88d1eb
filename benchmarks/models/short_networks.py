"""The networks of the short trainings, small enough for seconds on a CPU."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from alrao_jax import HeadOutputs
from alrao_jax.linen import MultiHead
from benchmarks.models.kernels import max_pool
from benchmarks.models.layers import ConvBlock


class Predictor(nn.Module):
  """A body and an output layer, which alone differs between Alrao's and others'.

  Attributes:
    body: Module that maps (inputs, train=...) to features on the last axis.
    num_outputs: Number of classes, or of numbers to predict.
    num_heads: Number of copies of the output layer, or None for an ordinary one.
  """

  body: Any
  num_outputs: int
  num_heads: int | None = None

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array | HeadOutputs:
    """Maps inputs to (..., num_outputs), of each head if there are heads."""
    features = self.body(inputs, train=train)
    if self.num_heads is None:
      return nn.Dense(self.num_outputs, name="output")(features)
    head = nn.Dense(self.num_outputs)
    return MultiHead(head, num_heads=self.num_heads, name="output")(features)


class FromStart(nn.Module):
  """The body of a language model, which reads each sequence from its start.

  Attributes:
    reader: A body of `benchmarks.models.language`.
  """

  reader: Any

  def __call__(self, symbols: jax.Array, *, train: bool) -> jax.Array:
    """Maps symbols (batch, time) to (batch, time, features)."""
    del train
    return self.reader(symbols, self.reader.initial_carry(len(symbols)))[0]


class GRU(nn.Module):
  """An embedding and a layer of gated recurrent units (Cho et al., arXiv 1406.1078).

  Attributes:
    vocabulary_size: Number of symbols.
    features: Size of an embedding, and number of units.
  """

  vocabulary_size: int
  features: int = 64

  @nn.compact
  def __call__(self, symbols: jax.Array, *, train: bool) -> jax.Array:
    """Maps symbols (batch, time) to (batch, time, features)."""
    del train
    embedded = nn.Embed(self.vocabulary_size, self.features, name="embedding")(symbols)
    outputs: Any = nn.RNN(nn.GRUCell(self.features), name="gru")(embedded)
    return outputs


class Words(nn.Module):
  """Embeddings of the last words side by side, and a hidden layer.

  Bengio et al., *A Neural Probabilistic Language Model*, 2003.

  Attributes:
    vocabulary_size: Number of words.
    features: Size of an embedding.
    hidden: Units of the hidden layer.
  """

  vocabulary_size: int
  features: int = 32
  hidden: int = 128

  @nn.compact
  def __call__(self, words: jax.Array, *, train: bool) -> jax.Array:
    """Maps words (batch, context) to (batch, hidden)."""
    del train
    embedded = nn.Embed(self.vocabulary_size, self.features, name="embedding")(words)
    return nn.relu(nn.Dense(self.hidden)(embedded.reshape(len(words), -1)))


class Perceptron(nn.Module):
  """Hidden layers of ReLU units, without normalisation.

  Attributes:
    features: Units of each layer.
  """

  features: tuple[int, ...]

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps (batch, inputs) to (batch, features[-1])."""
    del train
    for features in self.features:
      x = nn.relu(nn.Dense(features)(x))
    return x


class VGGLike(nn.Module):
  """Stages of two convolutions with batch normalisation, and a maximum over 2x2.

  After Simonyan and Zisserman, arXiv 1409.1556.

  Attributes:
    channels: Channels of each stage.
  """

  channels: tuple[int, ...] = (8, 16, 32)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, 3) to (batch, channels[-1])."""
    for channels in self.channels:
      for _ in range(2):
        images = ConvBlock(channels)(images, train=train)
      images = max_pool(images, 2, 2, 0)
    return images.mean(axis=(1, 2))


class ResNet(nn.Module):
  """One residual block a stage.

  He et al., arXiv 1512.03385, in the form for small images.

  Attributes:
    channels: Channels of each stage.
    first_strides: Step of the first convolution.
  """

  channels: tuple[int, ...] = (16, 32, 64)
  first_strides: int = 2

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, 3) to (batch, channels[-1])."""
    x = ConvBlock(self.channels[0], strides=self.first_strides)(images, train=train)
    for number, channels in enumerate(self.channels):
      strides = 1 if number == 0 else 2
      y = ConvBlock(channels, strides=strides)(x, train=train)
      y = ConvBlock(channels, activate=False)(y, train=train)
      if number > 0:
        x = ConvBlock(channels, 1, strides=strides, activate=False)(x, train=train)
      x = nn.relu(x + y)
    return x.mean(axis=(1, 2))


def patches(images: jax.Array, side: int) -> jax.Array:
  """Cuts images into squares, (batch, patches, side * side * channels).

  Args:
    images: (batch, height, width, channels), sides multiples of `side`.
    side: Side of a patch.

  Example:
    >>> import jax.numpy as jnp
    >>> patches(jnp.arange(16).reshape(1, 4, 4, 1), 2)[0, 1].tolist()
    [2, 3, 6, 7]
  """
  batch, height, width, channels = images.shape
  shape = (batch, height // side, side, width // side, side, channels)
  cut = images.reshape(shape).swapaxes(2, 3)
  return cut.reshape(batch, -1, side * side * channels)


class Mixer(nn.Module):
  """Perceptrons over patches and over features (Tolstikhin et al., arXiv 2105.01601).

  Attributes:
    features: Features of each patch.
    num_layers: Number of blocks.
    side: Side of a patch.
  """

  features: int = 48
  num_layers: int = 2
  side: int = 4

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, 3) to (batch, features)."""
    del train
    x = nn.Dense(self.features, name="patch")(patches(images, self.side))
    for number in range(1, self.num_layers + 1):
      y = nn.LayerNorm(name=f"norm_tokens_{number}")(x).swapaxes(1, 2)
      y = nn.gelu(nn.Dense(self.features, name=f"tokens_in_{number}")(y))
      y = nn.Dense(x.shape[1], name=f"tokens_out_{number}")(y)
      x = x + y.swapaxes(1, 2)
      y = nn.LayerNorm(name=f"norm_channels_{number}")(x)
      y = nn.gelu(nn.Dense(2 * self.features, name=f"channels_in_{number}")(y))
      x = x + nn.Dense(self.features, name=f"channels_out_{number}")(y)
    return nn.LayerNorm(name="norm")(x).mean(axis=1)


class VisionTransformer(nn.Module):
  """Attention over patches (Dosovitskiy et al., arXiv 2010.11929), mean-pooled.

  Attributes:
    features: Features of each patch.
    num_layers: Number of blocks.
    side: Side of a patch.
  """

  features: int = 48
  num_layers: int = 2
  side: int = 4

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, 3) to (batch, features)."""
    del train
    tokens = patches(images, self.side)
    x = nn.Dense(self.features, name="patch")(tokens)
    # One embedding a position: a table, as all others.
    positions = nn.Embed(tokens.shape[1], self.features, name="position")
    x = x + positions(jnp.arange(tokens.shape[1]))[None]
    for number in range(1, self.num_layers + 1):
      y = nn.LayerNorm(name=f"norm_attention_{number}")(x)
      x = x + nn.MultiHeadDotProductAttention(4, name=f"attention_{number}")(y)
      y = nn.LayerNorm(name=f"norm_perceptron_{number}")(x)
      y = nn.gelu(nn.Dense(2 * self.features, name=f"expand_{number}")(y))
      x = x + nn.Dense(self.features, name=f"contract_{number}")(y)
    return nn.LayerNorm(name="norm")(x).mean(axis=1)
