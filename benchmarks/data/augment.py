"""Normalisation and random crops and flips, on the device, inside jit."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike


def normalize(
  images: jax.Array, mean: ArrayLike, std: ArrayLike, dtype: DTypeLike = jnp.float32
) -> jax.Array:
  """Returns ``(images / 255 - mean) / std``.

  Args:
    images: (..., channels), uint8.
    mean: (channels,), where 255 counts as 1; see `benchmarks.data.channel_statistics`.
    std: (channels,), likewise.
    dtype: Of the result; the computation is float32.
  """
  shape = (1,) * (images.ndim - 1) + (-1,)
  mean = jnp.asarray(mean, jnp.float32).reshape(shape)
  std = jnp.asarray(std, jnp.float32).reshape(shape)
  return ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def augment(
  key: jax.Array, images: jax.Array, *, padding: int = 4, flip: bool = True
) -> jax.Array:
  """Shifts each image by up to `padding` pixels and mirrors every second one.

  What a shift uncovers is black (0 before normalisation). Each image has its own shift,
  uniform over all ``(2 * padding + 1) ** 2``, and its own coin.

  Args:
    key: Random key.
    images: (batch, height, width, channels), uint8.
    padding: Largest shift, along both axes, in pixels.
    flip: Whether to mirror left and right. Not for digits: see `Dataset.can_flip`.

  Returns:
    Images of the same shape and dtype.
  """
  shift_key, flip_key = jax.random.split(key)
  batch = images.shape[0]
  shifts = jax.random.randint(shift_key, (batch, 2), 0, 2 * padding + 1)
  flips = jax.random.bernoulli(flip_key, 0.5 if flip else 0.0, (batch,))
  return crop_and_flip(images, shifts, flips, padding)


def crop_and_flip(
  images: jax.Array, corners: jax.Array, flips: jax.Array, padding: int
) -> jax.Array:
  """Pads with zeros, cuts out at the original size, mirrors where asked to.

  Args:
    images: (batch, height, width, channels).
    corners: (batch, 2), integers in [0, 2 padding]: first row and column to keep.
    flips: (batch,), bool.
    padding: Number of zeros at each of the four sides.

  Returns:
    Images of the same shape and dtype.
  """

  def one(image, corner, flip):
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    start = (corner[0], corner[1], jnp.zeros_like(corner[0]))
    cut = jax.lax.dynamic_slice(padded, start, image.shape)
    return jnp.where(flip, cut[:, ::-1], cut)

  return jax.vmap(one)(images, corners, flips)
