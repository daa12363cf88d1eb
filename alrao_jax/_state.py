"""What the states have in common: how they are found by type, and their dtype."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def find_state(opt_state: Any, kind: type, factory: str) -> Any:
  """Returns the one ``kind`` in ``opt_state``, its leaves as plain arrays.

  Args:
    opt_state: A state within any chain, mask, partition or wrapper, or a whole
      ``nnx.Optimizer.opt_state``, whose leaves are boxed.
    kind: The type to look for.
    factory: Name of the transformation whose state it is, for the error.

  Raises:
    ValueError: If there is none, or more than one.
  """
  nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
  found = [node for node in nodes if isinstance(node, kind)]
  if len(found) != 1:
    raise ValueError(
      f"The optimizer's state must hold exactly one {kind.__name__}, got "
      f"{len(found)}. "
      + (
        f"Put alrao_jax.{factory}(...) into the optimizer and pass its state here."
        if not found
        else f"Pass the state of the one {factory} that you mean, not of them all."
      )
    )
  return unbox(found[0])


def replace_state(opt_state: Any, kind: type, change: Callable[[Any], Any]) -> Any:
  """Returns ``opt_state`` with ``change`` applied to its one ``kind``, boxes kept."""

  def visit(node):
    if not isinstance(node, kind):
      return node
    arrays = jax.tree.leaves(change(unbox(node)))
    return jax.tree.unflatten(jax.tree.structure(node), arrays)

  return jax.tree.map(visit, opt_state, is_leaf=lambda node: isinstance(node, kind))


def unbox(node: Any) -> Any:
  """Strips boxes (such as ``nnx.Variable``), which are nodes with a single leaf."""
  if isinstance(node, tuple):
    children = [unbox(child) for child in node]
    return type(node)(*children) if hasattr(node, "_fields") else tuple(children)
  if isinstance(node, dict):
    return {name: unbox(child) for name, child in node.items()}
  leaves = jax.tree.leaves(node)
  return leaves[0] if len(leaves) == 1 else node


def state_dtype(params: Any) -> Any:
  """Returns float64 if a parameter is float64, float32 for all others."""
  wide = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))
  return jnp.float64 if wide else jnp.float32
