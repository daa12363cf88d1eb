"""Names of parameters: "/"-joined paths, the same for every kind of tree."""

import re
from typing import Any

import jax

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
