"""Fewer heads, or one ordinary output layer, in a flax.nnx model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from .. import _collapse, _export
from .._paths import HEADS_REGEX
from ._multi_head import MultiHead


def collapse(
  model: nnx.Module, optimizer: nnx.Optimizer, keep: int | Sequence[int] = 1
) -> None:
  """Keeps the best heads of a model and of its optimizer, in place.

  What ``alrao_jax.collapse`` does, for all that the model's heads hold: parameters,
  batch statistics, random streams. Compiled functions compile once more. Call it
  between steps, outside of ``nnx.jit``.

  Args:
    model: A model with one or several MultiHeads.
    optimizer: The ``nnx.Optimizer`` that trains it.
    keep: How many heads, the best by the posterior; or their indices.

  Raises:
    ValueError: As ``alrao_jax.collapse``.
    TypeError: As ``alrao_jax.collapse``.

  Example:
    >>> import alrao_jax as alrao, alrao_jax.nnx, jax
    >>> from flax import nnx
    >>> model = alrao.nnx.MultiHead(
    ...     lambda rngs: nnx.Linear(4, 3, rngs=rngs), num_heads=10, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, alrao.alrao(jax.random.key(0)), wrt=nnx.Param)
    >>> alrao.nnx.collapse(model, optimizer, keep=2)
    >>> model.num_heads, model.alrao_heads.kernel.shape
    (2, (2, 4, 3))
  """
  params = nnx.state(model, optimizer.wrt)
  kept = _collapse.kept_heads(keep, params, optimizer.opt_state, HEADS_REGEX)
  _, opt_state = _collapse.collapse(optimizer.tx, params, optimizer.opt_state, kept)
  # The optimizer's state first: it alone can be refused.
  is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
  held = jax.tree.leaves(optimizer.opt_state, is_leaf=is_variable)
  new = jax.tree.leaves(opt_state, is_leaf=is_variable)
  for variable, value in zip(held, new, strict=True):
    variable.set_value(value.get_value())
  nnx.update(model, _collapse.take_heads(nnx.state(model), kept))
  for _, module in nnx.iter_modules(model):
    if isinstance(module, MultiHead):
      module.num_heads = len(kept)


def export(
  model: nnx.Module,
  opt_state: Any = None,
  *,
  head: int | Mapping[str, int] | None = None,
) -> Any:
  """Returns a copy of a model with an ordinary output layer in each MultiHead's place.

  The layer is the best head by the posterior, as if it had been made so: the copy
  serves like any model of Flax. (For a model of another program, ``alrao_jax.export(
  nnx.state(model), opt_state)`` is the state that ``nnx.update(plain_model, ...)``
  takes.)

  Args:
    model: A model with one or several MultiHeads; a MultiHead itself will do.
    opt_state: ``optimizer.opt_state``, whose posterior chooses. May be left out where
      there is one head.
    head: Which head to take instead, for several MultiHeads also a mapping by name.

  Returns:
    The copy; ``model`` is not changed.

  Raises:
    ValueError: As ``alrao_jax.export``; a MultiHead lies in a container of another kind
      than modules, lists, dicts and tuples.
    TypeError: As ``alrao_jax.export``.

  Example:
    >>> import alrao_jax.nnx
    >>> from flax import nnx
    >>> layer = alrao_jax.nnx.MultiHead(
    ...     lambda rngs: nnx.Linear(4, 3, rngs=rngs), num_heads=10, rngs=nnx.Rngs(0))
    >>> model = nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), layer)
    >>> alrao_jax.nnx.export(model, head=7).layers[1].kernel.shape
    (4, 3)
  """
  chosen = _export.chosen_heads(
    "export()", nnx.state(model), opt_state, head, HEADS_REGEX
  )
  model = nnx.clone(model)
  # By identity: a MultiHead may stand in several places.
  singles = {
    id(module): _single(module, chosen["/".join(map(str, path))])
    for path, module in nnx.iter_modules(model)
    if isinstance(module, MultiHead)
  }
  if id(model) in singles:
    return singles[id(model)]
  for _, node in list(nnx.iter_graph(model)):
    for name, child in list(_children(node)):
      if (new := _exchanged(child, singles)) is not child:
        if isinstance(node, nnx.Pytree):
          setattr(node, name, new)
        else:
          node[name] = new
  for path, module in nnx.iter_modules(model):
    if isinstance(module, MultiHead):
      where = "/".join(map(str, path))
      raise ValueError(
        f"nnx.export(model) can't exchange the MultiHead at {where!r}, whose container "
        "it doesn't know. Put it into nnx.List or nnx.Dict."
      )
  return model


def _single(module: MultiHead, index: Any) -> nnx.Module:
  graphdef, state = nnx.split(module.alrao_heads)
  is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
  state = jax.tree.map(
    lambda leaf: _export.one_head(leaf, index), state, is_leaf=is_variable
  )
  return nnx.merge(graphdef, state)


def _exchanged(child: Any, singles: Mapping[int, nnx.Module]) -> Any:
  """What to put in a child's place, the child itself if nothing in it changes."""
  if id(child) in singles:
    return singles[id(child)]
  if not isinstance(child, tuple):
    return child
  # A tuple is not written into but made anew.
  new = [_exchanged(each, singles) for each in child]
  if all(a is b for a, b in zip(new, child, strict=True)):
    return child
  return type(child)(*new) if hasattr(child, "_fields") else tuple(new)


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
  if isinstance(node, nnx.Pytree):
    yield from vars(node).items()
  elif isinstance(node, dict):
    yield from node.items()
  elif isinstance(node, list):
    yield from enumerate(node)
