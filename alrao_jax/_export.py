"""From a model with many heads to the parameters of the ordinary one."""

import operator
from collections.abc import Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._heads import TrackHeadsState
from ._paths import HEADS, HEADS_REGEX, flatten_with_paths, head_name, path_of
from ._state import find_state


def export(
  params: Any,
  opt_state: Any = None,
  *,
  head: int | Mapping[str, int] | None = None,
  heads: str = HEADS_REGEX,
) -> Any:
  """Returns what the same model has with an ordinary output layer in MultiHead's place.

  Of each MultiHead, the best head by the posterior: ``<name>/alrao_heads/kernel[j]``
  becomes ``<name>/kernel``, to the last bit, and everything else stays. So the model
  without MultiHead loads it, serves it, and needs nothing of this library. The inverse
  of :func:`load_pretrained`.

  Args:
    params: Linen's ``params``, whole variables (``batch_stats`` too), an ``nnx.State``,
      or any tree in which the heads lie below the key ``alrao_heads``.
    opt_state: The optimizer's state, whose posterior chooses. May be left out where
      there is one head, after :func:`collapse`.
    head: Which head to take instead, for several MultiHeads also a mapping by name.
    heads: Regular expression for the paths of the heads' arrays. Where they do not lie
      below ``alrao_heads``, all paths stay.

  Returns:
    A tree like ``params``. Boxes are kept (``nn.Partitioned``, ``nnx.Variable``), their
    names of axes without the heads' axis.

  Raises:
    ValueError: ``params`` has no heads, or several and neither ``opt_state`` nor
      ``head`` chooses; ``opt_state`` has a posterior over another number of heads;
      ``head`` is out of range; a MultiHead has a parameter that goes by the name of a
      head's.
    TypeError: Both ``opt_state`` and ``head`` are given, or ``head`` is no integer.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"bias": jnp.array([[1.0], [2.0], [3.0]])}}}
    >>> alrao.export(params, head=2)
    {'out': {'bias': Array([3.], dtype=float32)}}
  """
  pick = chosen_heads("export()", params, opt_state, head, heads)

  def visit(path, leaf):
    layer = head_name(path_of(path), heads)
    return leaf if layer is None else one_head(leaf, pick[layer])

  single = jax.tree_util.tree_map_with_path(visit, params, is_leaf=_is_box)
  return jax.tree.map(_splice, single, is_leaf=_holds_heads)


def chosen_heads(
  call: str, params: Any, opt_state: Any, head: Any, heads: str
) -> dict[str, Any]:
  """Which head to take of each MultiHead, by the MultiHead's path.

  Args:
    call: The call that errors name.
    params: As for :func:`export`, also the rest.
    opt_state: See there.
    head: See there.
    heads: See there.

  Returns:
    Indices: Python integers, or scalars where the posterior chooses.
  """
  layers: dict[str, int] = {}
  for path, leaf in flatten_with_paths(params)[0]:
    if (layer := head_name(path, heads)) is not None:
      num_heads = jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0
      if layers.setdefault(layer, num_heads) != num_heads or not num_heads:
        raise ValueError(
          f"{call} needs one number of heads in a layer, on axis 0 of its arrays, got "
          f"{path!r} of shape {jnp.shape(leaf)}."
        )
  if not layers:
    raise ValueError(f"{call} needs heads, got no path that matches {heads!r}.")
  if opt_state is not None and head is not None:
    raise TypeError(f"{call} takes either opt_state or head, got both.")
  if head is not None:
    return {name: _given(call, head, name, n) for name, n in layers.items()}
  if opt_state is not None:
    found = find_state(opt_state, TrackHeadsState, "track_heads").log_weights
    return {name: _best(call, found, name, n) for name, n in layers.items()}
  if set(layers.values()) != {1}:
    raise ValueError(
      f"{call} must know which head to take of {layers}. Pass the optimizer's state, "
      "whose posterior chooses, or head=0 for the first."
    )
  return dict.fromkeys(layers, 0)


def one_head(leaf: Any, index: Any) -> Any:
  """Entry ``index`` of axis 0, in the same box if there is one."""
  if not _is_box(leaf):
    return leaf[index]
  (array,), treedef = jax.tree.flatten(leaf)
  box = jax.tree.unflatten(treedef, [array[index]])
  if hasattr(box, "get_metadata"):  # nnx.Variable
    box = box.copy()
    if box.get_metadata().get("out_sharding"):
      box.set_metadata(out_sharding=tuple(box.get_metadata()["out_sharding"])[1:])
  elif hasattr(box, "names"):  # linen's Partitioned
    box = box.replace(names=tuple(box.names)[1:])
  return box


def _given(call, head, name, num_heads):
  if isinstance(head, Mapping):
    head = head[_match(call, name, head)]
  where = f"{call.removesuffix('()')}(head=...)"
  try:
    index = None if isinstance(head, (bool, np.bool_)) else operator.index(head)
  except TypeError:  # jax.errors.TracerIntegerConversionError is one
    index = None
  if index is None:
    raise TypeError(
      f"{where} must be an integer, known before tracing, got {head!r} of type "
      f"{type(head).__name__}. Write head=0 for the first."
    )
  if not 0 <= index < num_heads:
    raise ValueError(f"{where} must be from 0 to {num_heads - 1}, got {index}.")
  return index


def _best(call, log_weights, name, num_heads):
  if isinstance(log_weights, Mapping):
    log_weights = log_weights[_match(call, name, log_weights)]
  if log_weights.shape != (num_heads,):
    raise ValueError(
      f"{call[:-1]}opt_state=...) must have a posterior over the {num_heads} heads of "
      f"{name!r}, got one over {log_weights.size}. Pass the state that belongs to "
      "these parameters; after collapse(...), that which it returned."
    )
  return jnp.argmax(log_weights)


def _match(call, layer, names):
  fits = [name for name in names if layer == name or layer.endswith("/" + name)]
  if len(fits) != 1:
    raise ValueError(
      f"{call} must find each MultiHead under one name, got {tuple(names)}, of which "
      f"{fits} name {layer!r}."
    )
  return fits[0]


def _is_box(node):
  # The boxes of Flax know how to drop an axis; no array does.
  return hasattr(node, "remove_axis")


def _holds_heads(node):
  return isinstance(node, Mapping) and HEADS in node


def _splice(node):
  if not _holds_heads(node):
    return node
  inner = {name: node[HEADS][name] for name in node[HEADS]}
  outer = {name: node[name] for name in node if name != HEADS}
  if both := inner.keys() & outer.keys():
    raise ValueError(
      f"export() got the names {sorted(map(str, both))} both in a head and beside its "
      f"MultiHead's {HEADS!r}. Rename what stands beside it."
    )
  if not isinstance(node, MutableMapping):
    return type(node)({**outer, **inner})
  # An nnx.State takes States into itself by item assignment only.
  make: Any = type(node)
  merged = make({})
  merged.update({**outer, **inner})
  return merged
