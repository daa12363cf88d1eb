"""Convolution and max pooling, written such that XLA's CPU backend is fast at them.

On accelerators these are the ordinary operations. On a CPU, XLA runs depthwise
convolutions, gradients of pointwise ones, and gradients of pooling many times slower
than the same arithmetic written as shifted elementwise operations and matrix products.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Padding = Sequence[tuple[int, int]]
LAYOUT = ("NHWC", "HWIO", "NHWC")  # Flax's


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: Padding,
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  **kwargs: Any,
) -> jax.Array:
  """`jax.lax.conv_general_dilated` for `flax.linen.Conv`, in two dimensions.

  Args:
    lhs: Images (batch, height, width, channels).
    rhs: Kernel (height, width, channels / `feature_group_count`, features).
    window_strides: Step along height and width.
    padding: Zeros before and after, along height and width.
    lhs_dilation: As in JAX, likewise the rest.
    rhs_dilation: As in JAX.
    dimension_numbers: As in JAX.
    feature_group_count: As in JAX.
    **kwargs: As in JAX.

  Returns:
    The convolution, equal to JAX's up to rounding.
  """
  height, width, per_group, features = rhs.shape
  plain = all(step == 1 for step in (*(lhs_dilation or ()), *(rhs_dilation or ())))
  plain &= all(option is None for option in kwargs.values())
  layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  plain &= layout == lax.conv_dimension_numbers(lhs.shape, rhs.shape, LAYOUT)
  if jax.default_backend() == "cpu" and plain:
    pointwise = (height, width, feature_group_count) == (1, 1, 1)
    if pointwise and not any(any(pair) for pair in padding):
      strided = lhs[:, :: window_strides[0], :: window_strides[1]]
      outputs = strided.reshape(-1, per_group) @ rhs[0, 0]
      return outputs.reshape(*strided.shape[:3], features)
    if per_group == 1 and feature_group_count == features == lhs.shape[-1]:
      pad = ((0, 0), *padding, (0, 0))
      windows = _shifts(jnp.pad(lhs, pad), (height, width), window_strides)
      weights = rhs.reshape(height * width, 1, 1, 1, features)
      # Summed in float32 at least, as XLA does.
      wide = jnp.float32 if lhs.dtype.itemsize < 4 else lhs.dtype
      terms = [
        x.astype(wide) * w.astype(wide) for x, w in zip(windows, weights, strict=True)
      ]
      return functools.reduce(jnp.add, terms).astype(lhs.dtype)
  return lax.conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    **kwargs,
  )


def max_pool(images: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
  """Returns maxima over square windows.

  Where several entries of a window share its maximum, one of them gets the gradient on
  accelerators, and all of them a part of it on a CPU. Behind a ReLU, where such entries
  are zeros, none of them passes it on.

  Args:
    images: (batch, height, width, channels).
    window: Side of the windows.
    stride: Step from one to the next.
    padding: By how much windows may stand over the edge, on each side.
  """
  pad = (padding, padding)
  if jax.default_backend() != "cpu":
    return nn.max_pool(
      images,
      (window, window),
      strides=(stride, stride),
      padding=(pad, pad),  # pyright: ignore[reportArgumentType] (documented)
    )
  for axis in (1, 2):  # Along one axis, then the other: fewer maxima to take.
    sizes = [window if a == axis else 1 for a in (1, 2)]
    strides = [stride if a == axis else 1 for a in (1, 2)]
    around = [pad if a == axis else (0, 0) for a in range(4)]
    padded = jnp.pad(images, around, constant_values=-jnp.inf)
    images = functools.reduce(jnp.maximum, _shifts(padded, sizes, strides))
  return images


def _shifts(
  images: jax.Array, window: Sequence[int], strides: Sequence[int]
) -> list[jax.Array]:
  """The entry at each place of a window, for all windows at once."""
  ends = [size - side + 1 for size, side in zip(images.shape[1:3], window, strict=True)]
  return [
    images[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
    for i in range(window[0])
    for j in range(window[1])
  ]
