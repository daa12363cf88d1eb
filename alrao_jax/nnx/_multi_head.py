"""MultiHead for flax.nnx: a layer that holds the copies of the output layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError

from .._checks import check_count
from .._products import head_product
from .._routing import HeadOutputs, multi_head

PyTree = Any


class MultiHead(nnx.Module):
  """``num_heads`` copies of an output layer, evaluated on the same features.

  Stands where the layer that ends a model stood: ``self.out = MultiHead(lambda rngs:
  nnx.Linear(64, 10, rngs=rngs), rngs=rngs)`` for ``self.out = nnx.Linear(64, 10,
  rngs=rngs)``. Calling it returns `HeadOutputs` for this package's losses and
  predictions. Each copy has its own initial draw, its own state (batch statistics) and
  its own random streams (dropout masks). What head ``j`` draws depends on ``j``, not on
  how many heads there are.

  The attribute ``alrao_heads`` is one such layer, whose Variables have the heads on
  axis 0: ``out/alrao_heads/kernel[j]`` for ``out/kernel``. So a MultiHead in the plain
  layer's place is what `load_pretrained` expects. State is updated in place, and
  ``train()``, ``eval()`` and ``nnx.view`` reach the layer.

  Large heads, as those of many classes, are handled apart; see `multi_head`. On a CPU,
  a plain ``nnx.Linear`` with more features than examples and outputs is multiplied
  kernel first, which saves heads that are not large a transposition in training; one
  with a ``dot_general`` of its own, or within another module, is not. Both may change
  last bits.

  Limits: of a head, only ``nnx.Param`` is trained. A MultiHead stands outside
  ``nnx.scan`` and ``nnx.vmap``, which is not detected: around it they put their own
  axis on axis 0, where the heads' was, and the optimizer would read the number of heads
  from that. For several models at once, apply ``jax.vmap`` to the whole initialization
  and the whole training step. Derivatives are those of reverse mode (``jax.grad``,
  ``jax.vjp``); forward mode (``jax.jvp``, ``jax.jacfwd``) is not available.

  Args:
    make_head: makes one head from its own ``nnx.Rngs``.
    num_heads: number of copies, at least 1.
    rngs: random streams; each is split into one stream a head.
    head_axis: name of the mesh axis that the heads are sharded over; goes first into
      the sharding of Variables that have one. None: not sharded.

  Raises:
    TypeError: ``make_head`` is no function that returns an ``nnx.Module``, or belongs
      to an embedding (a tied output layer); ``num_heads`` is no integer; ``rngs`` is
      no ``nnx.Rngs``.
    ValueError: ``num_heads`` is below 1, or the head has no ``nnx.Param``.

  Example:
    >>> import jax.numpy as jnp, alrao_jax.nnx
    >>> from flax import nnx
    >>> layer = alrao_jax.nnx.MultiHead(
    ...     lambda rngs: nnx.Linear(4, 3, rngs=rngs), num_heads=10, rngs=nnx.Rngs(0))
    >>> layer.alrao_heads.kernel.shape
    (10, 4, 3)
    >>> layer(jnp.ones((5, 4))).shared.shape
    (10, 5, 3)

  Reference:
    Blier, Wolinski, Ollivier, *Learning with Random Learning Rates*, arXiv
    1810.01322, Algorithm 1.
  """

  def __init__(
    self,
    make_head: Callable[[nnx.Rngs], nnx.Module],
    num_heads: int = 10,
    *,
    rngs: nnx.Rngs,
    head_axis: str | None = None,
  ):
    check_count("MultiHead()", "num_heads", num_heads)
    _check_factory(make_head)
    self.num_heads = num_heads

    def make(keys):
      head = make_head(nnx.Rngs(**keys))
      _check_head(head)
      return head

    make = nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: head_axis})
    self.alrao_heads = make(_split(rngs, num_heads))

  def __call__(
    self, features: PyTree, *args: Any, rngs: nnx.Rngs | None = None, **kwargs: Any
  ) -> HeadOutputs:
    """Evaluates every head.

    Args:
      features: what the body gives to the output layer, any pytree of arrays.
      *args: passed on to each head.
      rngs: passed on to each head, which gets its own part; by default none.
      **kwargs: passed on to each head.

    Returns:
      What the wrapped layer returns, with a leading axis ``num_heads``.
    """
    graphdef, params, state = nnx.split(self.alrao_heads, nnx.Param, ...)
    # Not self.num_heads: params may come from a collapsed model's state.
    num_heads = jax.tree.leaves(params)[0].shape[0]
    keys = {} if rngs is None else _split(rngs, num_heads)

    def apply(params, features, aux):
      state, keys = aux
      head = nnx.merge(graphdef, params, state, copy=True)
      if type(head) is nnx.Linear and head.dot_general is jax.lax.dot_general:
        head.dot_general = head_product
      before = {path: jax.tree.leaves(x) for path, x in _state(head)}
      own = {"rngs": nnx.Rngs(**keys)} if keys else {}
      outputs = head(features, *args, **own, **kwargs)
      assigned = [
        (path, x)
        for path, x in _state(head)
        if [*map(id, jax.tree.leaves(x))] != [*map(id, before.get(path, []))]
      ]
      return outputs, nnx.from_flat_state(assigned)

    outputs, state = multi_head(
      apply, params, features, aux=(state, keys), has_aux=True
    )
    if jax.tree.leaves(state):
      # What no head assigned is left alone: inside jax.jit, a model from outside may
      # not be written to, and need not be in evaluation.
      nnx.update(self.alrao_heads, state)
    return outputs


def _state(head: nnx.Module) -> list[tuple[Any, Any]]:
  """Paths and values of what is not trained."""
  return list(nnx.to_flat_state(nnx.state(head, nnx.Not(nnx.Param))))


def _split(rngs: nnx.Rngs, num_heads: int) -> dict[str, jax.Array]:
  """One key a head from every stream, each independent of ``num_heads``."""
  if not isinstance(rngs, nnx.Rngs):
    raise TypeError(
      f"MultiHead(rngs=...) must be an nnx.Rngs, got {type(rngs).__name__}. Write "
      "rngs=nnx.Rngs(0), or the rngs of the model around it."
    )
  heads = jnp.arange(num_heads, dtype=jnp.uint32)
  fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  return {name: fold_in(stream(), heads) for name, stream in rngs.items()}


def _check_factory(make_head: Any) -> None:
  owner = getattr(make_head, "__self__", None)
  if isinstance(owner, nnx.Embed):
    raise TypeError(f"{_RULE}{type(owner).__name__}.{make_head.__name__}{_TIED}")
  if isinstance(make_head, nnx.Module) or not callable(make_head):
    raise TypeError(
      f"{_RULE}{type(make_head).__name__}. Write MultiHead(lambda rngs: "
      "nnx.Linear(64, 10, rngs=rngs), rngs=rngs)."
    )


def _check_head(head: Any) -> None:
  if not isinstance(head, nnx.Module):
    raise TypeError(f"{_RULE}a function to {type(head).__name__}.")
  name = type(head).__name__
  variables = [
    node for _, node in nnx.iter_graph(head) if isinstance(node, nnx.Variable)
  ]
  try:
    for variable in variables:
      variable.set_value(variable.get_value())
  except TraceContextError:  # made before this function was called
    raise TypeError(
      f"{_RULE}one to {name} with parameters from outside{_TIED}"
    ) from None
  if isinstance(head, nnx.Embed):
    raise TypeError(f"{_RULE}one to {name}{_TIED}")
  if not any(isinstance(variable, nnx.Param) for variable in variables):
    raise ValueError(
      f"MultiHead(make_head=...) must make a layer with parameters, got {name} without "
      "any nnx.Param."
    )


_RULE = (
  "MultiHead(make_head=...) must be a function from nnx.Rngs to a new module, got "
)
_TIED = (
  ", as for an output layer tied to the embedding. The heads have one learning rate "
  "each, so one matrix can't be all of them. Write MultiHead(lambda rngs: nnx.Linear("
  "features, vocabulary_size, use_bias=False, rngs=rngs), rngs=rngs); or give each "
  "head a projection of its own and what they share as an argument, "
  "self.out(features, self.embed.embedding[...])."
)
