"""The order in which features and all heads' kernels are multiplied."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.extend import core

import alrao_jax.linen
import alrao_jax.nnx
from alrao_jax._products import head_product

KEY = jax.random.key(0)
# Batch axes, features and outputs; and whether the kernels go first.
SHAPES = {
  "wide": ((8,), 32, 3, True),
  "positions": ((2, 3), 32, 3, True),
  "one example": ((), 4, 3, True),
  "many classes": ((8,), 32, 40, False),
  "large batch": ((40,), 32, 3, False),
  "many positions": ((8, 5), 32, 3, False),
  "square": ((32,), 32, 3, False),
}


def operands(batch, features, outputs, dtype=jnp.float32):
  x = jax.random.normal(KEY, (*batch, features), dtype)
  kernels = jax.random.normal(jax.random.key(1), (5, features, outputs), dtype)
  return x, kernels


def numbers(x):
  return (((x.ndim - 1,), (0,)), ((), ()))


def left_operands(fn, *args):
  """The shapes of the left operands of all products in a program."""
  found = []

  def visit(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "dot_general":
        found.append(eqn.invars[0].aval.shape)
      for inner in core.jaxprs_in_params(eqn.params):
        visit(getattr(inner, "jaxpr", inner))

  visit(jax.make_jaxpr(fn)(*args).jaxpr)
  return found


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_gradients_are_those_of_dot_general(shape, dtype):
  batch, features, outputs, _ = SHAPES[shape]
  x, kernels = operands(batch, features, outputs, dtype)

  def total(product: Any):
    def loss(x, kernels):
      outputs = jax.vmap(lambda kernel: product(x, kernel, numbers(x)))(kernels)
      return jnp.sum(jnp.sin(outputs.astype(jnp.float32))), outputs

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, kernels)

  got, expected = total(head_product), total(lax.dot_general)
  rtol = 1e-5 if dtype == jnp.float32 else 2e-2
  for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_go_first_where_they_are_the_largest(shape):
  *sizes, first = SHAPES[shape]
  x, kernels = operands(*sizes)
  product = jax.vmap(lambda kernel: head_product(x, kernel, numbers(x)))
  assert left_operands(product, kernels) == [kernels.shape if first else x.shape]


def test_other_products_are_left_alone():
  a, b = jnp.ones((2, 32, 3)), jnp.ones((2, 3, 4))
  batched = (((2,), (1,)), ((0,), (0,)))
  assert head_product(a, b, batched).shape == (2, 32, 4)
  x, kernels = operands((8,), 32, 3)
  half, kernel = x.astype(jnp.bfloat16), kernels[0].astype(jnp.bfloat16)
  options = {"preferred_element_type": jnp.float32, "precision": lax.Precision.HIGHEST}
  assert head_product(half, kernel, numbers(x), **options).dtype == jnp.float32


def test_linen_and_nnx_heads_take_it():
  x = jnp.ones((4, 32))
  layer = alrao_jax.linen.MultiHead(nn.Dense(3), 5)
  variables = layer.init(KEY, x)
  apply = lambda variables: layer.apply(variables, x)  # noqa: E731
  assert left_operands(apply, variables) == [(5, 32, 3)]
  make = lambda rngs: nnx.Linear(32, 3, rngs=rngs)  # noqa: E731
  model = alrao_jax.nnx.MultiHead(make, 5, rngs=nnx.Rngs(0))
  assert left_operands(lambda x: model(x), x) == [(5, 32, 3)]
  # The layer itself is as it was made, so that export and collapse find it so.
  head: Any = model.alrao_heads
  assert head.dot_general is lax.dot_general


def test_a_product_of_the_users_own_is_used():
  x, calls = jnp.ones((4, 32)), []

  def own(*args, **options):
    calls.append(args)
    return lax.dot_general(*args, **options)

  layer = alrao_jax.linen.MultiHead(nn.Dense(3, dot_general=own), 5)
  variables = layer.init(KEY, x)
  calls.clear()
  layer.apply(variables, x)
  assert calls
  calls.clear()
  make = lambda rngs: nnx.Linear(32, 3, dot_general=own, rngs=rngs)  # noqa: E731
  alrao_jax.nnx.MultiHead(make, 5, rngs=nnx.Rngs(0))(x)
  assert calls
