"""The product of features and all heads' kernels, in the order that suits XLA."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def head_product(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: Any,
  precision: Any = None,
  preferred_element_type: Any = None,
  *,
  out_sharding: Any = None,
) -> jax.Array:
  """`jax.lax.dot_general` for a dense layer whose kernels `jax.vmap` stacks.

  On a CPU, XLA transposes the kernels of all heads for ``features @ kernel``, and a
  second time, in another order, for the gradient of the features. With the kernels as
  the left operand one transposition serves both, and it is the outputs that are
  transposed back. This order is taken where a head has more features than the batch has
  examples (of sequences, positions), so that its kernel is larger than its outputs, and
  more than it has outputs itself, beyond which it was slower. (Large heads, which
  `multi_head` handles apart, have no kernel transposed in either order.) Elsewhere, and
  where JAX's default backend is no CPU, for which it was not measured, this is
  `jax.lax.dot_general`. A `jax.vmap` around the model hides its axis from this count.

  Args:
    lhs: features, of shape ``(..., features)``.
    rhs: kernel of one head, of shape ``(features, outputs)``.
    dimension_numbers: as for `jax.lax.dot_general`, like all that follows.
    precision: one for both operands, or the usual order is kept.
    preferred_element_type: dtype of the result.
    out_sharding: if given, the usual order is kept.

  Returns:
    The product, of shape ``(..., outputs)``.
  """
  dense = (((lhs.ndim - 1,), (0,)), ((), ()))
  sizes = (*lhs.shape, *rhs.shape)
  if (
    jax.default_backend() == "cpu"
    and rhs.ndim == 2
    and dimension_numbers == dense
    and out_sharding is None
    and (precision is None or isinstance(precision, (str, lax.Precision)))
    and all(isinstance(size, int) for size in sizes)  # jax.export knows others
    and lhs.shape[-1] > max(math.prod(lhs.shape[:-1]), rhs.shape[-1])
  ):
    swapped = (((0,), (lhs.ndim - 1,)), ((), ()))
    outputs = lax.dot_general(rhs, lhs, swapped, precision, preferred_element_type)
    return jnp.moveaxis(outputs, 0, -1)
  return lax.dot_general(
    lhs,
    rhs,
    dimension_numbers,
    precision,
    preferred_element_type,
    out_sharding=out_sharding,
  )
