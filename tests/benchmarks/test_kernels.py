import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks.models import kernels


def images(channels, side=9, seed=0):
  values = np.random.default_rng(seed).normal(size=(2, side, side, channels))
  return jnp.asarray(values, jnp.float32)


def values_and_gradients(function, *args):
  @jax.jit  # one compilation instead of one for each operation
  def both(cotangent, *args):
    outputs, pullback = jax.vjp(function, *args)
    return outputs, *pullback(cotangent)

  shape = jax.eval_shape(function, *args).shape
  cotangent = np.random.default_rng(1).normal(size=shape)
  return both(jnp.asarray(cotangent, jnp.float32), *args)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
  "shape, groups, padding",
  [((1, 1, 6, 4), 1, 0), ((1, 1, 6, 4), 1, 1), ((3, 3, 1, 6), 6, 1)]
  + [((3, 3, 6, 4), 1, 1), ((3, 3, 1, 12), 6, 1), ((3, 3, 2, 6), 3, 1)],
)
def test_convolution_is_jax_s(shape, groups, padding, stride):
  def convolve(implementation):
    return lambda lhs, rhs: implementation(
      lhs,
      rhs,
      (stride, stride),
      ((padding, padding), (padding, padding)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )

  args = images(6), images(shape[-1], seed=2)[:1, : shape[0], : shape[1], None]
  args = args[0], jnp.broadcast_to(args[1][0], shape)
  expected = values_and_gradients(convolve(lax.conv_general_dilated), *args)
  actual = values_and_gradients(convolve(kernels.conv_general_dilated), *args)
  for got, want in zip(actual, expected, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window, stride, padding", [(3, 1, 1), (3, 2, 1), (2, 2, 0)])
@pytest.mark.parametrize("side", [8, 9])
def test_max_pool_is_flax_s(window, stride, padding, side):
  pad = (padding, padding)
  expected = values_and_gradients(
    lambda x: nn.max_pool(x, (window, window), (stride, stride), (pad, pad)),
    images(3, side),
  )
  actual = values_and_gradients(
    lambda x: kernels.max_pool(x, window, stride, padding), images(3, side)
  )
  for got, want in zip(actual, expected, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_ties_behind_a_relu_pass_no_gradient():
  gradient = jax.grad(lambda x: kernels.max_pool(nn.relu(x), 3, 1, 1).sum())
  np.testing.assert_array_equal(gradient(-jnp.ones((1, 4, 4, 1))), 0.0)


@pytest.mark.parametrize("groups", [1, 6])
def test_dilated_convolutions_are_left_to_jax(groups):
  def apply(implementation):
    layer = nn.Conv(
      6,
      (3, 3),
      kernel_dilation=2,
      feature_group_count=groups,
      conv_general_dilated=implementation,
    )
    return layer.init_with_output(jax.random.key(0), images(6))[0]

  np.testing.assert_array_equal(apply(kernels.conv_general_dilated), apply(None))
