"""Functions whose closed-over arrays become arguments, for gradients of their own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
from jax.extend.core import Jaxpr, jaxpr_as_fun

PyTree = Any


class Converted(NamedTuple):
  """A function without closed-over arrays.

  Attributes:
    fn: ``fn(closed_over, *args)`` equals the given function of ``args``.
    closed_over: the arrays, or nothing if all are constants.
    jaxpr: the function's program.
    outputs: shapes of what it returns.
  """

  fn: Callable[..., PyTree]
  closed_over: list[jax.Array]
  jaxpr: Jaxpr
  outputs: PyTree


def closure_convert(fn: Callable[..., PyTree], *args: PyTree) -> Converted:
  """Makes the arrays that a function closes over an argument of it, the first.

  Does as `jax.closure_convert`, whose cache would keep all those arrays alive.

  Args:
    fn: a pure function.
    *args: arguments of the types that it will be called with.

  Returns:
    ``fn`` as it is to be called, and what is known of it.
  """
  closed_jaxpr, outputs = jax.make_jaxpr(fn, return_shape=True)(*args)
  if not any(isinstance(x, jax.core.Tracer) for x in closed_jaxpr.consts):
    # Traced anew, fn takes arguments that vary over other axes of a jax.shard_map.
    return Converted(lambda _, *args: fn(*args), [], closed_jaxpr.jaxpr, outputs)
  treedef = jax.tree.structure(outputs)

  def converted(closed_over, *args):
    flat_fn = jaxpr_as_fun(closed_jaxpr.replace(consts=closed_over))
    return jax.tree.unflatten(treedef, flat_fn(*jax.tree.leaves(args)))

  return Converted(converted, closed_jaxpr.consts, closed_jaxpr.jaxpr, outputs)
