"""Paths of parameters, and how a state is found in an optimizer's state."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._checks import check_parameter, check_state

HEADS = "alrao_heads"


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


def head_name(path: str) -> str | None:
  """The path of the MultiHead that a leaf is part of, None if it is part of none.

  Args:
    path: A leaf's path.

  Returns:
    The path of the module that holds the key ``alrao_heads``; ``"alrao_heads"`` for one
    at the root of the tree.

  Example:
    >>> head_name("model/decoder/alrao_heads/kernel"), head_name("alrao_heads/kernel")
    ('model/decoder', 'alrao_heads')
  """
  names = path.split("/")
  if HEADS not in names:
    return None
  return "/".join(names[: names.index(HEADS)]) or HEADS


def layers_of(call: str, tree: Any) -> dict[str, int]:
  """The number of heads of each MultiHead in a tree, by the MultiHead's path.

  Args:
    call: The call that errors name.
    tree: A tree of arrays or of ``jax.ShapeDtypeStruct``. It may hold no heads.

  Raises:
    ValueError: A head's array has no axis for the heads, or another number of them than
      the rest of its MultiHead.
  """
  layers: dict[str, int] = {}
  for path, leaf in flatten_with_paths(tree)[0]:
    if (layer := head_name(path)) is not None:
      shape = jnp.shape(leaf)
      if not shape or layers.setdefault(layer, shape[0]) != shape[0] or not shape[0]:
        raise ValueError(
          f"{call} needs the heads on axis 0, the same number in all arrays of a "
          f"MultiHead, got {path!r} of shape {shape}."
        )
  return layers


def count_heads(call: str, tree: Any) -> int:
  """The number of heads of a model, the same in all its MultiHeads; 0 without any.

  Args:
    call: The call that errors name.
    tree: As for :func:`layers_of`.

  Raises:
    ValueError: As :func:`layers_of`; or two MultiHeads differ.
  """
  layers = layers_of(call, tree)
  if len(set(layers.values())) > 1:
    raise ValueError(
      f"{call} needs all heads of a model to agree on num_heads, the leading axis of "
      f"their arrays, got {layers}. Write the same num_heads= in every MultiHead."
    )
  return next(iter(layers.values()), 0)


def need_heads(call: str, tree: Any, name: str = "params") -> int:
  """:func:`count_heads` of a tree that must have some.

  Raises:
    ValueError: As :func:`count_heads`; or there are no heads.
  """
  if not (num_heads := count_heads(call, tree)):
    raise ValueError(
      f"{call.removesuffix('()')}({name}=...) must have heads, got no path with the "
      f"key {HEADS!r}. Wrap the output layer in alrao_jax.linen.MultiHead or "
      "alrao_jax.nnx.MultiHead."
    )
  return num_heads


def match_layer(where: str, name: Any, layers: Iterable[str]) -> str:
  """The path of the MultiHead that a name means: its path, or an end of it.

  Args:
    where: The argument that errors name, such as ``"log_weights(name=...)"``.
    name: A whole path, or names at its end that no other path ends in.
    layers: The paths of all MultiHeads.

  Raises:
    ValueError: None or several fit.

  Example:
    >>> match_layer("log_weights(name=...)", "critic", ["actor", "net/critic"])
    'net/critic'
  """
  layers = tuple(layers)
  if name in layers:
    return name
  fits = [layer for layer in layers if layer.endswith(f"/{name}")]
  if len(fits) == 1:
    return fits[0]
  got = f"{name!r}, which fits {tuple(fits)}" if fits else repr(name)
  raise ValueError(
    f"{where} must name one MultiHead of {layers}, by its path or by an end that no "
    f"other path has, got {got}."
  )


def match_layers(
  where: str, given: Mapping[str, Any], layers: Iterable[str]
) -> dict[str, Any]:
  """What a mapping holds for each MultiHead, by path; names as for `match_layer`.

  Raises:
    ValueError: A name fits none or several, or a MultiHead is left out or named twice.
  """
  layers = tuple(layers)
  found = {match_layer(where, name, layers): value for name, value in given.items()}
  if len(found) < len(given) or set(found) != set(layers):
    raise ValueError(
      f"{where} must name each MultiHead of {layers} once, got {tuple(given)}."
    )
  return {layer: found[layer] for layer in layers}


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
