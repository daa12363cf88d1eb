"""A small decoder-only transformer with normalisation before each block.

References: Vaswani et al., arXiv 1706.03762; normalisation before the blocks as in
Xiong et al., arXiv 2002.04745.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
  """Causal attention and a perceptron of one hidden layer, each added to its input.

  Attributes:
    num_attention_heads: Number of heads of the attention.
  """

  num_attention_heads: int = 4

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Maps (batch, time, width) to the same shape.

    Args:
      x: The input.
      mask: (1, 1, time, time), whether a time sees another.
    """
    width = x.shape[-1]
    attention = nn.MultiHeadDotProductAttention(
      self.num_attention_heads, name="attention"
    )
    x = x + attention(nn.LayerNorm(name="norm_attention")(x), mask=mask)
    hidden = nn.gelu(
      nn.Dense(4 * width, name="expand")(nn.LayerNorm(name="norm_perceptron")(x))
    )
    return x + nn.Dense(width, name="contract")(hidden)


class Decoder(nn.Module):
  """Blocks on embedded symbols and positions, and a last normalisation.

  It reads each sequence by itself, so that its carry is empty.

  Attributes:
    vocabulary_size: Number of symbols.
    context: Greatest length of a sequence.
    width: Features of each position.
    num_layers: Number of blocks.
  """

  vocabulary_size: int
  context: int = 128
  width: int = 128
  num_layers: int = 4

  def initial_carry(self, batch_size: int) -> tuple[()]:
    """Returns the empty carry.

    Args:
      batch_size: Number of sequences.
    """
    del batch_size
    return ()

  @nn.compact
  def __call__(
    self, symbols: jax.Array, carry: tuple[()]
  ) -> tuple[jax.Array, tuple[()]]:
    """Maps symbols (batch, time), int32, to features (batch, time, width).

    Args:
      symbols: The symbols, at most `context` long.
      carry: The empty carry.

    Returns:
      The features, and the empty carry.
    """
    mask = nn.make_causal_mask(symbols[:1], dtype=bool)
    positions = nn.Embed(self.context, self.width, name="position")
    x = nn.Embed(self.vocabulary_size, self.width, name="embedding")(symbols)
    x = x + positions(jnp.arange(symbols.shape[1]))[None]
    for number in range(1, self.num_layers + 1):
      x = Block(name=f"block_{number}")(x, mask)
    return nn.LayerNorm(name="norm")(x), carry
