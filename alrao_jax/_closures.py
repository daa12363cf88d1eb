"""Functions whose closed-over arrays become arguments, for gradients of their own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
from jax.extend.core import jaxpr_as_fun

PyTree = Any


def closure_convert(
  fn: Callable[..., PyTree], *args: PyTree
) -> tuple[Callable[..., PyTree], list[jax.Array], PyTree]:
  """Makes the arrays that a function closes over an argument of it, the first.

  Does as `jax.closure_convert`, whose cache would keep all those arrays alive.

  Args:
    fn: a pure function.
    *args: arguments of the types that it will be called with.

  Returns:
    ``converted``, with ``converted(closed_over, *args) == fn(*args)``;
    ``closed_over``, which is empty if it would hold constants only; and the shapes of
    what ``fn`` returns.
  """
  closed_jaxpr, outputs = jax.make_jaxpr(fn, return_shape=True)(*args)
  if not any(isinstance(x, jax.core.Tracer) for x in closed_jaxpr.consts):
    # Traced anew, fn takes arguments that vary over other axes of a jax.shard_map.
    return lambda _, *args: fn(*args), [], outputs
  treedef = jax.tree.structure(outputs)

  def converted(closed_over, *args):
    flat_fn = jaxpr_as_fun(closed_jaxpr.replace(consts=closed_over))
    return jax.tree.unflatten(treedef, flat_fn(*jax.tree.leaves(args)))

  return converted, closed_jaxpr.consts, outputs
