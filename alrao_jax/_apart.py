"""Which heads are faster with a product for each than with one for all."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, jaxprs_in_params

from ._closures import Converted

PyTree = Any


def are_better_apart(
  num_heads: int, stacked_params: PyTree, features: PyTree, heads: Converted
) -> bool:
  """Whether heads are large, and can be handled apart.

  With one product for all heads, XLA transposes their kernels and their outputs; with
  one for each, there are as many gradients of the features to add up. Dense heads with
  64 to 2,048 features, 1 to 1,400 examples and 2 to 50,000 outputs, on a CPU, took,
  apart, 0.2 to 1.2 of the time that they take together where this is true, and 0.9 to
  50 times that elsewhere. On accelerators it was not measured.

  Args:
    num_heads: number of heads.
    stacked_params: their parameters.
    features: what each receives.
    heads: all heads as a function of parameters and features, which returns outputs
      and what else is new.

  Returns:
    True for heads that have more than twice as many numbers in parameters and outputs
    as the features have, hold no convolution, and close over constants alone.
  """
  trees = (stacked_params, heads.outputs[0], features)
  sizes = [[math.prod(jnp.shape(x)) for x in jax.tree.leaves(tree)] for tree in trees]
  if not all(isinstance(size, int) for tree in sizes for size in tree):
    return False  # symbolic dimensions of jax.export
  num_params, num_outputs, num_features = map(sum, sizes)
  large = num_params + num_outputs > 2 * num_heads * num_features
  return large and not heads.closed_over and not _convolves(heads.jaxpr)


def _convolves(jaxpr: Jaxpr) -> bool:
  """Whether there is a convolution, which heads apart would make a slow grouped one."""
  return any(
    eqn.primitive.name == "conv_general_dilated"
    or any(
      _convolves(getattr(inner, "jaxpr", inner))
      for inner in jaxprs_in_params(eqn.params)
    )
    for eqn in jaxpr.eqns
  )
