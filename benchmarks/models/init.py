"""Initialisation in a second instead of a minute.

Linen's `init` compiles one random draw for every layer, which takes a minute for
networks as deep as the papers'. Here all normals are one draw.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

HEADS = "alrao_heads"  # the key below which MultiHead stacks its heads' leaves

# Leaves that start at one value, by their name in linen.
CONSTANTS = {"bias": 0.0, "scale": 1.0, "mean": 0.0, "var": 1.0}

# Standard deviation of a standard normal truncated to [-2, 2].
TRUNCATED_STD = 0.87962566103423978


def fast_init(
  model: nn.Module, key: jax.Array, images: jax.Array | jax.ShapeDtypeStruct
) -> dict[str, Any]:
  """Draws a network's variables, with the distributions of linen's defaults.

  A kernel is drawn from ``lecun_normal``: normal, truncated at two standard deviations,
  with variance 1 / (number of inputs of a unit). Biases and running means are 0, scales
  and running variances 1. This is what ``model.init`` does for networks of Dense, Conv
  and BatchNorm layers with their default initialisers, and for no others: a leaf of
  another name is an error. Below a ``MultiHead``, each head has its own draw.

  Kernels take their numbers in the tree's order, the body's first, so that a network
  with heads starts from the same body as the ordinary one with the same key.

  Args:
    model: The network, called as ``model(images, train=False)``.
    key: Random key.
    images: An example batch, or its shape and dtype.

  Returns:
    Variables with the tree, shapes and dtypes of ``model.init(key, images)``.

  Raises:
    ValueError: A leaf whose initial distribution is not known by its name.
  """
  shapes = jax.eval_shape(functools.partial(model.init, train=False), key, images)
  leaves, treedef = jax.tree.flatten_with_path(shapes)
  names = [[entry.key for entry in path] for path, _ in leaves]
  for name in names:
    if name[-1] != "kernel" and name[-1] not in CONSTANTS:
      known = ", ".join(["kernel", *CONSTANTS])
      raise ValueError(
        f"fast_init() knows the leaves {known}, got {'/'.join(name)}; use model.init."
      )
  total = sum(
    math.prod(leaf.shape)
    for name, (_, leaf) in zip(names, leaves, strict=True)
    if name[-1] == "kernel"
  )
  # On the host, where a slice compiles nothing.
  normals = np.asarray(_truncated_normals(key, total))
  values, start = [], 0
  for name, (_, leaf) in zip(names, leaves, strict=True):
    if name[-1] in CONSTANTS:
      values.append(np.full(leaf.shape, CONSTANTS[name[-1]], leaf.dtype))
      continue
    stop = start + math.prod(leaf.shape)
    kernel_shape = leaf.shape[1:] if HEADS in name else leaf.shape
    scale = np.float32(1 / (TRUNCATED_STD * math.sqrt(math.prod(kernel_shape[:-1]))))
    values.append((normals[start:stop] * scale).reshape(leaf.shape).astype(leaf.dtype))
    start = stop
  return jax.device_put(jax.tree.unflatten(treedef, values))


@functools.partial(jax.jit, static_argnums=1)
def _truncated_normals(key: jax.Array, count: int) -> jax.Array:
  return jax.random.truncated_normal(key, -2.0, 2.0, (count,), jnp.float32)
