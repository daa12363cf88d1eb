"""Trees: paths, heads, states, and checks of what is no such tree."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

HEADS = "alrao_heads"


def path_of(key_path: tuple[Any, ...]) -> str:
  """The "/"-joined path of a leaf, the same for boxed and for pure trees.

  Args:
    key_path: A key path of ``jax.tree_util``. A trailing attribute ``.value`` is
      dropped; the boxes of nnx and of linen's partitioning add it.

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
    ValueError: If two leaves have the same path.

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
  """The path of the MultiHead that a leaf is part of, None without one.

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
    tree: A tree of arrays or of ``jax.ShapeDtypeStruct``. It may have no heads.

  Raises:
    ValueError: If a head's array has no axis for the heads, or another number of them
      than the rest of its MultiHead.
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
  """Returns the path of the MultiHead with this name, its path or an end of it.

  Args:
    where: The argument that errors name, such as ``"log_weights(name=...)"``.
    name: A whole path, or an end that no other path has.
    layers: The paths of all MultiHeads.

  Raises:
    ValueError: If none or several fit.

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
  """Returns a mapping by names (:func:`match_layer`) as one by paths.

  Raises:
    ValueError: If a name fits none or several, or a MultiHead is left out or named
      twice.
  """
  layers = tuple(layers)
  found = {match_layer(where, name, layers): value for name, value in given.items()}
  if len(found) < len(given) or set(found) != set(layers):
    raise ValueError(
      f"{where} must name each MultiHead of {layers} once, got {tuple(given)}."
    )
  return {layer: found[layer] for layer in layers}


def find_state(opt_state: Any, kind: type, factory: str, call: str = "update()") -> Any:
  """Returns the one ``kind`` in ``opt_state``, with plain arrays as leaves.

  Args:
    opt_state: A state within any chain, mask, partition or wrapper, or a whole
      ``nnx.Optimizer.opt_state``, whose leaves are boxed.
    kind: The type to look for.
    factory: Name of the transformation that has such a state, for the error.
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
  """Returns ``opt_state`` with ``change`` applied to its one ``kind``; keeps boxes."""

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
  """Returns float64 if a parameter is float64 or complex128, float32 for all others."""
  for path, leaf in flatten_with_paths(params)[0]:
    if not hasattr(leaf, "dtype"):
      check_parameter(path, leaf)
  wide = any(
    leaf.dtype in (jnp.float64, jnp.complex128) for leaf in jax.tree.leaves(params)
  )
  return jnp.float64 if wide else jnp.float32


def by_parts(fn: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
  """Applies a function to real arrays, to the two parts of complex ones each.

  So what is done to a complex parameter is exactly what would be done to its real and
  imaginary parts as two parameters that share their units.

  Args:
    fn: An elementwise function of real arrays.
    *arrays: Arrays of equal shapes, all complex or none.

  Returns:
    The result, complex if the arrays are.

  Example:
    >>> import jax.numpy as jnp
    >>> print(by_parts(lambda x: 2 * x, jnp.array([1 + 2j])))
    [2.+4.j]
  """
  parts = [fn(*part) for part in zip(*map(parts_of, arrays), strict=True)]
  return parts[0] if len(parts) == 1 else jax.lax.complex(*parts)


def parts_of(array: jax.Array) -> tuple[jax.Array, ...]:
  """A real array alone; the real and the imaginary part of a complex one."""
  is_complex = jnp.issubdtype(array.dtype, jnp.complexfloating)
  return (jnp.real(array), jnp.imag(array)) if is_complex else (array,)


def find_states(opt_state: Any, kind: type) -> list[Any]:
  """All states of this type in ``opt_state``, with plain arrays as leaves."""
  nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
  return [unbox(node) for node in nodes if isinstance(node, kind)]


def body_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """The shapes of the body's arrays, by path."""
  return {
    path: tuple(leaf.shape)
    for path, leaf in flatten_with_paths(tree)[0]
    if head_name(path) is None
  }


def fresh_shapes(optimizer, params, num_heads):
  """The shapes of a fresh state's leaves if there were ``num_heads`` heads."""

  def shape(path, leaf):
    is_head = head_name(path_of(path)) is not None
    shape = (num_heads, *leaf.shape[1:]) if is_head else leaf.shape
    return jax.ShapeDtypeStruct(shape, leaf.dtype)

  shapes = jax.tree_util.tree_map_with_path(shape, params)
  return [x.shape for x in jax.tree.leaves(jax.eval_shape(optimizer.init, shapes))]


def check_parameter(path: str, leaf: Any) -> None:
  """Refuses a leaf of the parameters that can't be trained.

  Args:
    path: Where it is in the tree, for the error.
    leaf: An array, a tracer or a ``jax.ShapeDtypeStruct``.

  Raises:
    TypeError: If it is no array, or an array of integers, booleans or random keys.
  """
  arrays = "Parameters must be arrays"
  equinox = "eqx.filter(model, eqx.is_inexact_array)"
  dtype = getattr(leaf, "dtype", None)
  if is_a(leaf, "penzai", "AbstractVariable"):
    raise TypeError(
      f"{arrays}, got penzai's {type(leaf).__name__} for {path!r}. Write model, params "
      "= pz.unbind_params(model, freeze=True), and give params to the optimizer."
    )
  if dtype is None and callable(leaf):
    raise TypeError(
      f"{arrays}, got the function {leaf!r} for {path!r}. Keep functions out of the "
      f"tree; for an Equinox model write {equinox} wherever params are asked for."
    )
  if dtype is None and isinstance(leaf, (bool, int)):
    raise TypeError(
      f"{arrays}, got the Python number {leaf!r} for {path!r}, which is no floating "
      f"one. Keep it out of the tree; for an Equinox model write {equinox}."
    )
  if dtype is None:
    raise TypeError(f"{arrays}, got {leaf!r} for {path!r}. Write jnp.asarray(...).")
  if jnp.issubdtype(dtype, jnp.inexact):
    return
  got = (
    f"Parameters must be of a floating or complex dtype, got {path!r} of shape "
    f"{tuple(leaf.shape)} and dtype {dtype}."
  )
  keep = (
    f"keep them out of the tree that the optimizer is given, for instance by {equinox},"
    " optax.masked or nnx.Optimizer(..., wrt=nnx.Param)."
  )
  if jnp.issubdtype(dtype, jax.dtypes.prng_key):
    raise TypeError(f"{got} Random keys can't be trained: {keep}")
  if dtype == np.bool_:
    raise TypeError(f"{got} Masks can't be trained: {keep}")
  raise TypeError(f"{got} Parameters of integer dtype can't be trained: {keep}")


def check_tree(
  call: str, tree: Any, name: str = "params", *, models: bool = False
) -> None:
  """Refuses what is often passed instead of a tree of arrays.

  Args:
    call: The call that the message names, such as ``"export()"``.
    tree: A model, an optimizer or its state raise; any other tree passes.
    name: The argument's name.
    models: Whether an nnx model passes, too.

  Raises:
    TypeError: If it is one of these.
  """
  if is_a(tree, "flax.nnx", "Module"):
    if models:
      return
    what, write = "an nnx model", f"nnx.state(model, nnx.Param) for {name}"
    if (ours := _NNX.get(_function(call))) is not None:
      write = f"{ours}, or {write}"
  elif is_a(tree, "flax.linen", "Module"):
    what, write = "a linen module", 'model.init(key, inputs)["params"]'
  elif is_a(tree, "flax.nnx", "Optimizer"):
    what, write = "an nnx.Optimizer", "nnx.state(model, nnx.Param)"
  elif hasattr(tree, "params") and hasattr(tree, "opt_state"):
    what, write = f"a {type(tree).__name__}", f"state.params for {name}"
    if (ours := _LINEN.get(_function(call))) is not None:
      write = f"{ours}, or {write}"
  elif _is_optimizer(tree):
    what, write = "an optimizer", _signature(call)
  elif _holds_states(tree):
    what, write = "an optimizer's state", _signature(call)
  else:
    return
  raise TypeError(
    f"{_argument(call, name)} must be a tree of arrays, got {what}. Write {write}."
  )


def check_params(call: str, params: Any) -> None:
  """Refuses parameters that can't be trained; see :func:`check_parameter`.

  Args:
    call: The call that the message names, such as ``"collapse()"``.
    params: A tree of arrays or of ``jax.ShapeDtypeStruct``.

  Raises:
    TypeError: If it is a model, an optimizer or a state; if a leaf is no array of a
      floating or complex dtype.
  """
  check_tree(call, params)
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    check_parameter(jax.tree_util.keystr(key_path, simple=True, separator="/"), leaf)


def check_optimizer(call: str, optimizer: Any) -> None:
  """Refuses what has no ``init`` and ``update``.

  Args:
    call: The call that the message names, such as ``"collapse()"``.
    optimizer: An optax optimizer, or anything that can do the same.

  Raises:
    TypeError: If it is something else.
  """
  if _is_optimizer(optimizer):
    return
  write = _signature(call)
  if is_a(optimizer, "flax.nnx", "Optimizer"):
    write += " with optimizer.tx"
    if (ours := _NNX.get(_function(call))) is not None:
      write = f"{ours}, or {write}"
  raise TypeError(
    f"{_argument(call, 'optimizer')} must be an optax optimizer, got "
    f"{_kind_of(optimizer)}. Write {write}."
  )


def check_state(call: str, state: Any, kind: type) -> None:
  """Refuses what holds no ``kind``, if it is recognisably something else.

  Args:
    call: The call that the message names, such as ``"log_weights()"``.
    state: An optimizer's state passes, also if it holds no ``kind``.
    kind: The type of state that is needed, a NamedTuple.

  Raises:
    TypeError: If it is a state that was restored without its types, or parameters, a
      model or an optimizer.
  """
  if isinstance(state, kind):
    return
  nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
  if any(isinstance(node, kind) for node in nodes):
    return
  where, write = _argument(call, "opt_state"), _signature(call)
  rule = f"{where} must be an optimizer's state, got"
  if is_a(state, "flax.nnx", "Module"):
    ours = _NNX.get(_function(call), f"{write} with optimizer.opt_state")
    raise TypeError(f"{rule} an nnx model. Write {ours}, of its nnx.Optimizer.")
  if _is_optimizer(state):
    raise TypeError(
      f"{rule} an optimizer itself. Write {write} with what optimizer.init(params) and "
      "optimizer.update(...) return."
    )
  if _is_raw(state, kind):
    raise TypeError(
      f"{rule} plain dicts or lists in the place of its own types, as a checkpoint "
      "that is restored without a target. Restore with optimizer.init(params) as the "
      "target: ocp.args.StandardRestore(optimizer.init(params)), or "
      "flax.serialization.from_bytes(optimizer.init(params), data)."
    )
  if state is None or isinstance(state, (str, int, float)) or hasattr(state, "dtype"):
    raise TypeError(f"{rule} {_kind_of(state)}. Write {write}.")
  if not isinstance(state, (tuple, list)) and not _holds_states(state):
    raise TypeError(
      f"{rule} a {type(state).__name__}, as parameters are. Write {write}."
    )


def checked(
  call: str, tx: optax.GradientTransformationExtraArgs, kind: type
) -> optax.GradientTransformationExtraArgs:
  """Adds checks of the arguments of ``init`` and ``update``.

  Args:
    call: The factory that the messages name, such as ``"alrao()"``.
    tx: The transformation.
    kind: A type that its state holds.

  Returns:
    The transformation, with the state of ``tx``.
  """

  def init_fn(params):
    check_params(f"{call}.init()", params)
    return tx.init(params)

  def update_fn(updates, state, params=None, **extra_args):
    check_state(f"{call}.update()", state, kind)
    if params is not None:
      check_params(f"{call}.update()", params)
    return tx.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# How to write each call, for errors about swapped arguments.
_SIGNATURES = {
  "init": "optimizer.init(params)",
  "update": "optimizer.update(grads, opt_state, params, head_log_likelihoods=...)",
  "best_heads": "best_heads(opt_state, keep)",
  "collapse": "collapse(optimizer, opt_state, params)",
  "describe_units": "describe_units(params)",
  "eval_params": "eval_params(opt_state, params)",
  "export": "export(opt_state, params)",
  "head_shardings": "head_shardings(optimizer, params, mesh)",
  "load_pretrained": "load_pretrained(params, pretrained)",
  "log_weights": "log_weights(opt_state)",
  "report": "report(opt_state, params)",
  "scalars": "scalars(opt_state, params)",
  "take_heads": "take_heads(tree, kept)",
  "tree_head_shardings": "tree_head_shardings(tree, mesh)",
  "unit_rates": "unit_rates(opt_state, params)",
  "with_unit_rates": "with_unit_rates(opt_state, params, rates)",
}


# What to write for an nnx model, if its parameters alone are not enough.
_NNX = {
  "init": "nnx.Optimizer(model, optimizer, wrt=nnx.Param)",
  "update": "nnx.Optimizer(model, optimizer, wrt=nnx.Param).update(model, grads, ...)",
  "collapse": "alrao_jax.nnx.collapse(model, optimizer)",
  "export": "alrao_jax.nnx.export(model, optimizer.opt_state)",
}


_LINEN = {
  "collapse": "alrao_jax.linen.collapse(state)",
  "export": "alrao_jax.linen.export(state)",
}


def _function(call: str) -> str:
  return call.removesuffix("()").rpartition(".")[2]


def _signature(call: str) -> str:
  return _SIGNATURES.get(_function(call), call)


def is_a(value: Any, package: str, name: str) -> bool:
  """Whether a value is of a class of this name, without importing its package."""
  return any(
    kind.__name__ == name and (kind.__module__ + ".").startswith(package + ".")
    for kind in type(value).__mro__
  )


def _is_optimizer(value: Any) -> bool:
  return (
    callable(getattr(value, "init", None))
    and callable(getattr(value, "update", None))
    and not is_a(value, "flax.linen", "Module")
  )


def _holds_states(tree: Any) -> bool:
  """Whether a tree holds a state of optax or of this library."""

  def is_state(node):
    package = type(node).__module__.partition(".")[0]
    return (
      isinstance(node, tuple)
      and package in ("optax", __name__.partition(".")[0])
      and not isinstance(node, optax.MaskedNode)
    )

  return any(map(is_state, jax.tree.leaves(tree, is_leaf=is_state)))


def _is_raw(state: Any, kind: Any) -> bool:
  """Whether it is a state with dicts (or lists) in place of its NamedTuples."""
  if isinstance(state, Mapping):
    if set(kind._fields) <= set(map(str, state)):
      return True
    children = list(state.values())
  elif isinstance(state, (list, tuple)):
    children = list(state)
  else:
    return False
  return any(_is_raw(child, kind) for child in children)


def _argument(call: str, name: str) -> str:
  return f"{call.removesuffix('()')}({name}=...)"


def _kind_of(value: Any) -> str:
  kind = type(value).__name__
  plain = isinstance(value, (bool, int, float, str))
  return f"{value!r} of type {kind}" if plain else f"a value of type {kind}"
