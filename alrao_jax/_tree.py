"""Paths of parameters, and how a state is found in an optimizer's state."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._checks import check_parameter, check_state

HEADS = "alrao_heads"


HEADS_REGEX = rf"(^|/){HEADS}(/|$)"


def path_of(key_path: tuple[Any, ...]) -> str:
  """The "/"-joined path of a leaf, the same for boxed and for pure trees.

  Args:
    key_path: A key path of ``jax.tree_util``. A trailing attribute ``.value``, which
      the boxes of nnx and of linen's partitioning add, is dropped.

  Returns:
    The path, such as ``"encoder/layers/0/kernel"``.

  Example:
    >>> import jax
    >>> [(keys, _)] = jax.tree_util.tree_leaves_with_path({"dense": {"kernel": 1.0}})
    >>> path_of(keys)
    'dense/kernel'
  """
  keys = list(key_path)
  while keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
    keys.pop()
  return "/".join(_name(key) for key in keys)


def _name(key: Any) -> str:
  """The name of one step of a path."""
  for attribute in ("key", "idx", "name"):
    if hasattr(key, attribute):
      name = getattr(key, attribute)
      # nnx.WeightNorm keys its scales by tuples.
      return "/".join(map(str, name)) if isinstance(name, tuple) else str(name)
  return str(key)


def flatten_with_paths(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
  """Flattens a tree into pairs of path and leaf.

  Args:
    tree: Any pytree.

  Returns:
    The pairs ``(path, leaf)`` in the tree's order, and its treedef.

  Raises:
    ValueError: Two leaves have the same path.

  Example:
    >>> flatten_with_paths({"dense": {"bias": 0.0, "kernel": 1.0}})[0]
    [('dense/bias', 0.0), ('dense/kernel', 1.0)]
  """
  leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
  named = [(path_of(keys), leaf) for keys, leaf in leaves]
  seen: set[str] = set()
  for path, _ in named:
    if path in seen:
      raise ValueError(
        f"Parameters must have different paths, got {path!r} twice. Rename one of them."
      )
    seen.add(path)
  return named, treedef


def head_name(path: str, heads: str | None = HEADS_REGEX) -> str | None:
  """The path of the MultiHead that a leaf lies below, None if it lies below none.

  Args:
    path: A leaf's path.
    heads: Regular expression for the paths of the heads' leaves; None for no heads.

  Returns:
    The path of the module that holds the key ``alrao_heads``; with another regular
    expression, the path as far as the component where the match ends.

  Example:
    >>> head_name("model/decoder/alrao_heads/kernel")
    'model/decoder'
    >>> head_name("decoder/kernel", heads="^decoder/")
    'decoder'
  """
  match = re.search(heads, path) if heads is not None else None
  if match is None:
    return None
  # The last character matched may be the "/" that ends a component.
  end = path.find("/", max(match.end() - 1, 0))
  if end < 0:  # the match goes into the leaf's own name
    end = max(path.rfind("/"), 0)
  return path[:end].removesuffix(HEADS).removesuffix("/")


def find_state(opt_state: Any, kind: type, factory: str, call: str = "update()") -> Any:
  """Returns the one ``kind`` in ``opt_state``, its leaves as plain arrays.

  Args:
    opt_state: A state within any chain, mask, partition or wrapper, or a whole
      ``nnx.Optimizer.opt_state``, whose leaves are boxed.
    kind: The type to look for.
    factory: Name of the transformation whose state it is, for the error.
    call: The call that asks, for the error, such as ``"log_weights()"``.

  Raises:
    ValueError: If there is none, or more than one.
    TypeError: If it is no optimizer's state: see :func:`check_state`.
  """
  nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
  found = [node for node in nodes if isinstance(node, kind)]
  if not found:
    check_state(call, opt_state, kind)
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
  for path, leaf in flatten_with_paths(params)[0]:
    if not hasattr(leaf, "dtype"):
      check_parameter(path, leaf)
  wide = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))
  return jnp.float64 if wide else jnp.float32


def find_states(opt_state: Any, kind: type) -> list[Any]:
  """All states of this type in ``opt_state``, their leaves as plain arrays."""
  nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
  return [unbox(node) for node in nodes if isinstance(node, kind)]
