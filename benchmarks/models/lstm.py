"""A long short-term memory, its carry an argument and a result.

Reference: Hochreiter and Schmidhuber, *Long Short-Term Memory*, 1997, with the forget
gate of Gers et al.; one bias a gate.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

Carry = tuple[jax.Array, jax.Array]

GATES = "ifgo"  # input, forget, cell, output


class _Gate(nn.Module):
  """The parameters of a Dense layer."""

  inputs: int
  features: int
  kernel_init: nn.initializers.Initializer
  use_bias: bool

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array | None]:
    kernel = self.param("kernel", self.kernel_init, (self.inputs, self.features))
    if not self.use_bias:
      return kernel, None
    return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


class LSTMLayer(nn.Module):
  """One layer over a whole sequence.

  Parameters, their names and initial distributions are those of
  `flax.linen.OptimizedLSTMCell`, so that the cell's units are known. Unlike in
  ``nn.RNN``, the product with the inputs is one for all times, which leaves the loop
  over time half of the work.

  Attributes:
    units: Number of units.
  """

  units: int

  @nn.compact
  def __call__(self, inputs: jax.Array, carry: Carry) -> tuple[jax.Array, Carry]:
    """Maps a sequence to that of hidden states.

    Args:
      inputs: (time, batch, features).
      carry: Cells and hidden states before the first time, (batch, units) each.

    Returns:
      Hidden states (time, batch, units), and the carry after the last time.
    """
    sizes = (inputs.shape[-1], self.units)
    to_input = nn.initializers.lecun_normal()
    to_hidden = nn.initializers.orthogonal()
    input_gates, hidden_gates = (
      [
        _Gate(size, self.units, init, use_bias, name=f"{kind}{gate}")()
        for gate in GATES
      ]
      for kind, size, init, use_bias in zip(
        "ih", sizes, (to_input, to_hidden), (False, True), strict=True
      )
    )
    input_kernel = jnp.concatenate([kernel for kernel, _ in input_gates], axis=-1)
    hidden_kernel = jnp.concatenate([kernel for kernel, _ in hidden_gates], axis=-1)
    bias = jnp.concatenate([bias for _, bias in hidden_gates if bias is not None])
    # Inputs first, for all times at once.
    activations = inputs @ input_kernel + bias[None, None]

    def step(carry: Carry, activation: jax.Array) -> tuple[Carry, jax.Array]:
      cell, hidden = carry
      i, f, g, o = jnp.split(activation + hidden @ hidden_kernel, len(GATES), axis=-1)
      cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * jnp.tanh(g)
      hidden = nn.sigmoid(o) * jnp.tanh(cell)
      return (cell, hidden), hidden

    carry, hidden = jax.lax.scan(step, carry, activations)
    return hidden, carry


class LSTM(nn.Module):
  """The papers' body: an embedding and LSTM layers.

  Attributes:
    vocabulary_size: Number of symbols.
    features: Size of a symbol's embedding.
    units: Units of each layer.
    num_layers: Number of layers.
  """

  vocabulary_size: int
  features: int = 100
  units: int = 100
  num_layers: int = 2

  def initial_carry(self, batch_size: int) -> tuple[Carry, ...]:
    """Returns the carry of a text's start: zeros.

    Args:
      batch_size: Number of sequences.
    """
    return tuple(
      (jnp.zeros((batch_size, self.units)), jnp.zeros((batch_size, self.units)))
      for _ in range(self.num_layers)
    )

  @nn.compact
  def __call__(
    self, symbols: jax.Array, carry: tuple[Carry, ...]
  ) -> tuple[jax.Array, tuple[Carry, ...]]:
    """Maps symbols (batch, time), int32, to features (batch, time, units).

    Args:
      symbols: The symbols.
      carry: As `initial_carry`, or what the sequences' symbols before left.

    Returns:
      The features, and the carry after the last symbol.
    """
    embed = nn.Embed(self.vocabulary_size, self.features, name="embedding")
    outputs, carries = embed(symbols.T), []
    for number, before in enumerate(carry, 1):
      outputs, after = LSTMLayer(self.units, name=f"lstm_{number}")(outputs, before)
      carries.append(after)
    return outputs.swapaxes(0, 1), tuple(carries)
