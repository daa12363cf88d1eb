"""Language models: a body, dropout, and an output layer over the vocabulary."""

from typing import Any, Literal

import flax.linen as nn
import jax

from alrao_jax import HeadOutputs
from alrao_jax.linen import MultiHead
from benchmarks.models.class_factored import ClassFactored
from benchmarks.models.decoder import Decoder
from benchmarks.models.lstm import LSTM

OutputLayer = Literal["softmax", "class_factored"]


class LanguageModel(nn.Module):
  """Predicts each next symbol.

  As in the networks for images, only the output layer differs between an ordinary
  network and Alrao's.

  Attributes:
    body: Module that maps (symbols, carry) to features (batch, time, features) and the
      next carry; has ``initial_carry(batch_size)``.
    vocabulary_size: Number of symbols.
    output_layer: ``"softmax"``, a Dense layer, or ``"class_factored"``.
    num_heads: Number of copies of the output layer, or None for an ordinary one.
    dropout: Share of the features that training drops before the output layer.
  """

  body: Any
  vocabulary_size: int
  output_layer: OutputLayer = "softmax"
  num_heads: int | None = None
  dropout: float = 0.0

  def setup(self):
    """Makes output layer and dropout."""
    if self.output_layer == "softmax":
      layer: nn.Module = nn.Dense(self.vocabulary_size, parent=None)
    else:
      layer = ClassFactored(self.vocabulary_size, parent=None)
    if self.num_heads is not None:
      layer = MultiHead(layer, num_heads=self.num_heads)
    self.output: Any = layer
    self.drop = nn.Dropout(self.dropout)

  def __call__(self, symbols: jax.Array, carry: Any) -> jax.Array | HeadOutputs:
    """Returns what `predict` does of `features`, without dropout."""
    features, _ = self.features(symbols, carry, train=False)
    return self.predict(features)

  def features(
    self, symbols: jax.Array, carry: Any, *, train: bool
  ) -> tuple[jax.Array, Any]:
    """Runs the body.

    Args:
      symbols: (batch, time), int32.
      carry: What the symbols before left, or ``body.initial_carry``.
      train: Whether to drop features, with the random key ``dropout``.

    Returns:
      Features (batch, time, features), and the next carry.
    """
    features, carry = self.body(symbols, carry)
    return self.drop(features, deterministic=not train), carry

  def predict(
    self, features: jax.Array, targets: jax.Array | None = None
  ) -> jax.Array | HeadOutputs:
    """Runs the output layer.

    Args:
      features: (..., features).
      targets: (...), int32, for a class-factored layer to return their
        log-probabilities alone.

    Returns:
      Logits, or log-probabilities, (..., vocabulary_size); or log-probabilities of the
      targets (...); with `num_heads` the `HeadOutputs` of as many copies.
    """
    return self.output(features) if targets is None else self.output(features, targets)


def build_language_model(
  name: Literal["lstm", "decoder"],
  vocabulary_size: int,
  *,
  context: int = 128,
  output_layer: OutputLayer = "softmax",
  num_heads: int | None = None,
  dropout: float = 0.0,
) -> LanguageModel:
  """Builds a language model by name.

  Args:
    name: ``"lstm"``, the papers' (embedding 100, two layers of 100 units), or
      ``"decoder"`` (4 pre-norm blocks of width 128).
    vocabulary_size: Number of symbols.
    context: Greatest length of a sequence; only the decoder has one.
    output_layer: ``"softmax"`` or ``"class_factored"``.
    num_heads: Number of copies of the output layer, for Alrao.
    dropout: Share of the features dropped before the output layer.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> model = build_language_model("lstm", 50, num_heads=6)
    >>> symbols, carry = jnp.zeros((20, 70), jnp.int32), model.body.initial_carry(20)
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), symbols, carry)[0].own
    ShapeDtypeStruct(shape=(6, 20, 70, 50), dtype=float32)
  """
  if name == "lstm":
    body: nn.Module = LSTM(vocabulary_size, parent=None)
  else:
    body = Decoder(vocabulary_size, context, parent=None)
  return LanguageModel(body, vocabulary_size, output_layer, num_heads, dropout)
