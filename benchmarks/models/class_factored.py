"""A softmax over many symbols in two steps: the symbol's class, then the symbol.

Reference: Goodman, *Classes for fast maximum entropy training*, 2001; with classes of
equal size, of symbols of about one frequency.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp


class ClassFactored(nn.Module):
  """An output layer that gives log-probabilities, of all symbols or of the targets.

  Class ``c`` holds the symbols ``c * size ... (c + 1) * size - 1``, which lie together
  in frequency if symbols are numbered by it. For the log-likelihoods that training
  needs, only the targets' classes are evaluated: ``num_classes + size`` products in
  place of ``vocabulary_size``, for 10,000 symbols 200.

  In a `MultiHead`, each head has its own classes' and symbols' weights, and the loss is
  ``mixture_loss(layer(features, targets), lambda log_probs: log_probs, log_weights)``.

  Attributes:
    vocabulary_size: Number of symbols.
    num_classes: Greatest number of classes, by default the root of that of symbols.
  """

  vocabulary_size: int
  num_classes: int | None = None

  @nn.compact
  def __call__(
    self, features: jax.Array, targets: jax.Array | None = None
  ) -> jax.Array:
    """Maps features to log-probabilities.

    Args:
      features: (..., features).
      targets: (...), int32 in [0, `vocabulary_size`), or None for all symbols.

    Returns:
      The log-probabilities of the targets, (...), or of all symbols,
      (..., `vocabulary_size`).
    """
    at_most = self.num_classes or math.isqrt(self.vocabulary_size - 1) + 1
    size = -(-self.vocabulary_size // at_most)
    num_classes = -(-self.vocabulary_size // size)  # none is empty
    shape = (num_classes, features.shape[-1], size)
    # A class's weights are drawn as those of a Dense layer.
    init = nn.initializers.lecun_normal(batch_axis=0)
    kernel = self.param("kernel", init, shape)
    bias = self.param("bias", nn.initializers.zeros, (num_classes, size))
    batch = features.shape[:-1]
    features = features.reshape(-1, features.shape[-1])
    classes = jax.nn.log_softmax(nn.Dense(num_classes, name="classes")(features))
    exists = jnp.arange(num_classes * size) < self.vocabulary_size
    exists = exists.reshape(num_classes, size)
    floor = jnp.finfo(features.dtype).min  # for places that the last class lacks
    if targets is None:
      logits = jnp.einsum("nf,cfs->ncs", features, kernel) + bias[None]
      within = jax.nn.log_softmax(jnp.where(exists[None], logits, floor))
      log_probs = (classes[..., None] + within).reshape(len(features), -1)
      return log_probs[:, : self.vocabulary_size].reshape(*batch, -1)
    targets = targets.reshape(-1)
    row, column = targets // size, targets % size
    logits = jnp.einsum("nf,nfs->ns", features, kernel[row]) + bias[row]
    within = jax.nn.log_softmax(jnp.where(exists[row], logits, floor))
    return (_pick(classes, row) + _pick(within, column)).reshape(batch)


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
  return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]
