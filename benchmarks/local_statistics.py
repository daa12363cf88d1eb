"""Batch normalisation by the statistics of each device's images, not of all."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.models.layers import Classifier


class LocalStatistics(nn.Module):
  """A body whose batch normalisation sees a part of the batch at a time.

  Its parameters and statistics have the names that they have without it.

  Attributes:
    body: The body.
    parts: Number of parts, which divides the batch; one for each device.
  """

  body: nn.Module
  parts: int

  def setup(self):
    """Makes this module and the body one, as far as names go."""
    nn.share_scope(self, self.body)

  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images (batch, height, width, channels) as the body does.

    Args:
      images: The images; part `i` of the batch is on device `i`.
      train: Whether to normalise by the statistics of each part. The running averages
        then move by the mean over the parts.
    """
    if not train:
      # A `nn.Module` has no `__call__` as far as types go; every body has.
      return self.body(images, train=False)  # pyright: ignore[reportCallIssue]
    body = self.body.clone(parent=None)
    scope: Any = self.scope
    rngs = {
      name: jax.random.split(self.make_rng(name), self.parts) for name in scope.rngs
    }
    variables = self.variables

    def apply(images, rngs):
      return body.apply(
        variables, images, train=True, rngs=rngs, mutable=["batch_stats"]
      )

    parts = images.reshape(self.parts, -1, *images.shape[1:])
    result: Any = jax.vmap(apply)(parts, rngs)
    features, updated = result
    for name, value in updated.get("batch_stats", {}).items():
      means = jax.tree.map(lambda x: jnp.mean(x, axis=0), value)
      self.put_variable("batch_stats", name, means)
    return features.reshape(-1, *features.shape[2:])


def use_local_statistics(model: Classifier, parts: int) -> Classifier:
  """Returns a network whose batch normalisation sees one device's images alone.

  By default it is synchronised: under jit, the mean over a batch is the mean over all
  of it, wherever its parts lie, and for every normalisation devices add up two sums,
  and one more on the way back. Local statistics send the running
  averages alone, and nothing on the way back. Parameters and evaluation
  are the same.

  Args:
    model: The network.
    parts: In how many parts the batch is split, such as ``mesh.shape["data"]``.
  """
  return model.clone(body=LocalStatistics(model.body, parts), parent=None)
