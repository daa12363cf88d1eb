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
from alrao_jax._multi_head import head_product

pytestmark = pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="on accelerators the order is the usual one"
)

KEY = jax.random.key(0)
# Batch axes, features and outputs.
KERNEL_FIRST = {
  "examples": ((8,), 32, 3),
  "positions": ((2, 3), 32, 3),
  "one example": ((), 4, 3),
  "a small kernel": ((128,), 512, 10),
}
USUAL = {
  "many outputs": ((8,), 32, 40),
  "as many outputs": ((8,), 32, 32),
  "many examples": ((40,), 32, 3),
  "as many examples": ((32,), 32, 3),
  "many positions": ((8, 5), 32, 3),
}


def operands(shape, dtype: Any = jnp.float32):
  batch, features, outputs = shape
  x = jax.random.normal(KEY, (*batch, features), dtype)
  kernels = jax.random.normal(jax.random.key(1), (5, features, outputs), dtype)
  return x, kernels


def numbers(x):
  return (((x.ndim - 1,), (0,)), ((), ()))


def products(fn, *args):
  """All products in a program."""
  found = []

  def visit(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "dot_general":
        found.append(eqn)
      for inner in core.jaxprs_in_params(eqn.params):
        visit(getattr(inner, "jaxpr", inner))

  visit(jax.make_jaxpr(fn)(*args).jaxpr)
  return found


def left_operands(fn, *args):
  return [eqn.invars[0].aval.shape for eqn in products(fn, *args)]


def vmapped(x, product: Any = head_product, **options):
  return jax.vmap(lambda kernel: product(x, kernel, numbers(x), **options))


@pytest.mark.parametrize("shape", KERNEL_FIRST)
def test_product_and_gradients_are_those_of_dot_general(shape):
  with jax.enable_x64(True):
    x, kernels = operands(KERNEL_FIRST[shape], jnp.float64)

    def total(product):
      def loss(x, kernels):
        outputs = vmapped(x, product)(kernels)
        return jnp.sum(jnp.sin(outputs)), outputs

      return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, kernels)

    got, expected = total(head_product), total(lax.dot_general)
  for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
    # Sums of at most 512 products, each rounded to 1e-16 of the largest.
    np.testing.assert_allclose(a, b, rtol=0, atol=512 * 2**-52 * np.abs(b).max())


@pytest.mark.parametrize("shape", KERNEL_FIRST)
def test_kernels_go_first_where_features_are_many(shape):
  x, kernels = operands(KERNEL_FIRST[shape])
  assert left_operands(vmapped(x), kernels) == [kernels.shape]


@pytest.mark.parametrize("shape", USUAL)
def test_elsewhere_the_order_is_the_usual_one(shape):
  x, kernels = operands(USUAL[shape])
  assert left_operands(vmapped(x), kernels) == [x.shape]


def test_on_accelerators_the_order_is_the_usual_one(monkeypatch):
  x, kernels = operands(KERNEL_FIRST["examples"])
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert left_operands(vmapped(x), kernels) == [x.shape]


def test_products_that_are_not_of_dense_layers_are_left_alone():
  x, kernel = jnp.ones((2, 32)), jnp.ones((32, 3, 4))
  assert head_product(x, kernel, numbers(x)).shape == (2, 3, 4)
  x, kernel = jnp.ones((32, 2)), jnp.ones((32, 3))
  first_axes = (((0,), (0,)), ((), ()))
  assert head_product(x, kernel, first_axes).shape == (2, 3)


def test_a_precision_of_each_operand_keeps_the_usual_order():
  x, kernels = operands(KERNEL_FIRST["examples"])
  for precision, first in (
    (lax.Precision.HIGHEST, kernels),
    ((lax.Precision.HIGHEST, lax.Precision.DEFAULT), x),
  ):
    (eqn,) = products(vmapped(x, precision=precision), kernels)
    assert eqn.invars[0].aval.shape == first.shape
    given = precision if isinstance(precision, tuple) else (precision, precision)
    assert eqn.params["precision"] == given


def test_preferred_dtype_is_passed_on():
  x, kernels = operands(KERNEL_FIRST["examples"], jnp.bfloat16)
  product = vmapped(x, preferred_element_type=jnp.float32)
  assert product(kernels).dtype == jnp.float32
  assert left_operands(product, kernels) == [kernels.shape]


def test_a_batch_without_a_size_keeps_the_usual_order():
  """As in jax.export."""
  (batch,) = jax.export.symbolic_shape("batch")
  layer = alrao_jax.linen.MultiHead(nn.Dense(3), 5)
  variables = layer.init(KEY, jnp.ones((4, 32)))
  x = jax.ShapeDtypeStruct((batch, 32), jnp.float32)
  heads = jax.eval_shape(lambda x: layer.apply(variables, x), x)
  assert heads.shared.shape == (5, batch, 3)


def test_linen_heads_take_it():
  x, layer = jnp.ones((4, 32)), alrao_jax.linen.MultiHead(nn.Dense(3), 5)
  variables = layer.init(KEY, x)
  assert list(variables["params"]) == ["alrao_heads"]
  apply = lambda variables: layer.apply(variables, x)  # noqa: E731
  assert left_operands(apply, variables) == [(5, 32, 3)]


def test_nnx_heads_take_it():
  make = lambda rngs: nnx.Linear(32, 3, rngs=rngs)  # noqa: E731
  model = alrao_jax.nnx.MultiHead(make, 5, rngs=nnx.Rngs(0))
  assert left_operands(lambda x: model(x), jnp.ones((4, 32))) == [(5, 32, 3)]
  head: Any = model.alrao_heads
  assert head.dot_general is lax.dot_general  # the layer itself is as it was made


def test_large_heads_of_flax_have_a_product_each():
  """Also within a jitted step, where everything is traced."""
  x, classes = jnp.ones((4, 32)), 40
  layer = alrao_jax.linen.MultiHead(nn.Dense(classes), 5)
  variables = layer.init(KEY, x)
  model = alrao_jax.nnx.MultiHead(
    lambda rngs: nnx.Linear(32, classes, rngs=rngs), 5, rngs=nnx.Rngs(0)
  )
  graphdef, state = nnx.split(model)
  for fn, params in (
    (lambda params, x: layer.apply(params, x), variables),
    (lambda params, x: nnx.merge(graphdef, params)(x), state),
  ):
    (eqn,) = products(jax.jit(fn), params, x)
    assert eqn.params["dimension_numbers"][1] == ((0,), (0,))  # heads by heads


def test_on_tpus_large_heads_have_a_product_each_in_chunks_alone(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  kernels, x = jnp.ones((5, 32, 40)), jnp.ones((4, 32))

  def evaluate(x):
    return alrao_jax.multi_head(lambda kernel, x: x @ kernel, kernels, x)

  def chunked(x):
    return alrao_jax.chunked_mixture_loss(
      evaluate, x, lambda x, y: x[:, 0] + y, x[:, 0], jnp.zeros(5), chunk_size=2
    )[0]

  (whole,) = products(lambda x: evaluate(x).shared, x)
  (in_chunks,) = products(chunked, x)
  assert whole.params["dimension_numbers"][1] == ((), ())
  assert in_chunks.params["dimension_numbers"][1] == ((0,), (0,))  # heads by heads


class LinenOwn(nn.Dense):
  """A dense layer of a user's own."""


class NnxOwn(nnx.Linear):
  """Likewise."""


def own_product(lhs, rhs, *args, **options):
  return 2.0 * lax.dot_general(lhs, rhs, *args, **options)


@pytest.mark.parametrize(
  "head",
  [
    LinenOwn(3),
    nn.Dense(3, dot_general=lax.dot_general),
    nn.Dense(3, dot_general=own_product),
    nn.Sequential([nn.Dense(3)]),
  ],
)
def test_other_linen_heads_are_left_alone(head):
  x, layer = jnp.ones((4, 32)), alrao_jax.linen.MultiHead(head, 5)
  variables = layer.init(KEY, x)
  apply = lambda variables: layer.apply(variables, x)  # noqa: E731
  assert left_operands(apply, variables) == [(4, 32)]


@pytest.mark.parametrize(
  "make",
  [
    lambda rngs: NnxOwn(32, 3, rngs=rngs),
    lambda rngs: nnx.Linear(32, 3, dot_general=own_product, rngs=rngs),
  ],
)
def test_other_nnx_heads_are_left_alone(make):
  model = alrao_jax.nnx.MultiHead(make, 5, rngs=nnx.Rngs(0))
  assert left_operands(lambda x: model(x), jnp.ones((4, 32))) == [(4, 32)]
