"""MultiHead for flax.linen: a layer that holds the copies of the output layer."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from .._checks import check_count
from .._paths import HEADS
from .._products import head_product
from .._routing import HeadOutputs, multi_head

PyTree = Any

_TRAINED = {"params", OVERWRITE_WITH_GRADIENT}  # the collections with a gradient


class MultiHead(nn.Module):
  """``num_heads`` copies of an output layer, evaluated on the same features.

  Wraps the layer that ends a model, ``MultiHead(nn.Dense(10))(features)`` for
  ``nn.Dense(10)(features)``, and returns `HeadOutputs` for this package's losses and
  predictions. Each copy has its own initial draw, its own state (batch statistics) and
  its own random keys (dropout masks). What head ``j`` draws depends on ``j``, not on
  how many heads there are.

  The variables are those of the wrapped layer, stacked on axis 0 under the key
  ``alrao_heads``: ``<name>/alrao_heads/kernel[j]`` for ``<name>/kernel``. Give the
  MultiHead the ``name`` that the output layer has in the plain model, and
  `load_pretrained` finds its way; the wrapped layer's own name plays no role. A head of
  several layers is best a module class of its own: the layers of an ``nn.Sequential``
  made inline have other paths in a plain model (``Dense_0``) than here (``layers_0``).

  Large heads, as those of many classes, are handled apart; see `multi_head`. On a CPU,
  a plain ``nn.Dense`` with more features than examples and outputs is multiplied
  kernel first, which saves heads that are not large a transposition in training; one
  with a ``dot_general`` of its own, or within another module, is not. Both may change
  last bits.

  A MultiHead stands outside ``nn.scan`` and ``nn.vmap``; ``nn.jit`` and ``nn.remat``
  may surround it. This is not detected: ``nn.scan`` or ``nn.vmap`` around it put their
  own axis on axis 0, where the heads' was, and the optimizer would read the number of
  heads from that. For several models at once, apply ``jax.vmap`` to the whole
  initialization and the whole training step. Derivatives are those of reverse mode
  (``jax.grad``, ``jax.vjp``); forward mode (``jax.jvp``, ``jax.jacfwd``) is not
  available.

  Attributes:
    head: the output layer, any module, unbound or made inline.
    num_heads: number of copies that initialization makes, at least 1. Parameters with
      fewer, as ``alrao_jax.collapse`` leaves them, are taken as they are.
    head_axis: name of the mesh axis that the heads are sharded over; goes first into
      the names of what ``nn.with_partitioning`` made. None: not sharded.

  Raises:
    TypeError: ``head`` is no module, is an ``nn.Embed``, or shares parameters with the
      rest of the model (a tied output layer); ``num_heads`` is no integer.
    ValueError: ``num_heads`` is below 1 or below that of the parameters given, or the
      head has no parameters.

  Example:
    >>> import jax, jax.numpy as jnp, flax.linen as nn, alrao_jax.linen
    >>> layer = alrao_jax.linen.MultiHead(nn.Dense(3), num_heads=10)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((5, 4)))
    >>> variables["params"]["alrao_heads"]["kernel"].shape
    (10, 4, 3)
    >>> layer.apply(variables, jnp.ones((5, 4))).shared.shape
    (10, 5, 3)

  Reference:
    Blier, Wolinski, Ollivier, *Learning with Random Learning Rates*, arXiv
    1810.01322, Algorithm 1.
  """

  head: nn.Module
  num_heads: int = 10
  head_axis: str | None = None

  def __post_init__(self):
    check_count("MultiHead()", "num_heads", self.num_heads)
    _check_head(self.head)
    object.__setattr__(self, "_given", self.head)
    outer = self.head.parent
    if isinstance(outer, nn.Module) and not isinstance(outer, MultiHead):
      # Made inline, so that Flax takes it for a layer of the outer module. It is none,
      # and the automatic name that it was given there may be the MultiHead's.
      scope, name = outer.scope, self.name
      if scope is not None and name is not None and name == self.head.name:
        scope.reservations.pop(name, None)
      object.__setattr__(self, "head", self.head.copy(parent=None))
    super().__post_init__()

  @nn.compact
  def __call__(self, features: PyTree, *args: Any, **kwargs: Any) -> HeadOutputs:
    """Evaluates every head.

    Args:
      features: what the body gives to the output layer, any pytree of arrays.
      *args: passed on to each head.
      **kwargs: passed on to each head, such as ``train=True``.

    Returns:
      What the wrapped layer returns, with a leading axis ``num_heads``.
    """
    _check_head(self._given)  # by now what it may share has been used
    head = _with_head_product(self.head)
    scope: Any = self.scope
    mutable = scope.mutable or []  # False would change what apply returns
    keys = {name: self.make_rng(name) for name in scope.rngs}

    if not self.has_variable("params", HEADS) and self.is_mutable_collection("params"):

      def init(rngs):
        return head.init_with_output(rngs, features, *args, mutable=mutable, **kwargs)

      rngs = _split(keys, self.num_heads)
      outputs, variables = jax.vmap(init, axis_size=self.num_heads)(rngs)
      if not variables.get("params"):
        raise ValueError(
          "MultiHead(head=...) must have parameters, got "
          f"{type(head).__name__} without any. Wrap the layer that makes the outputs."
        )
      variables = self._add_axis(variables)
      self.param(HEADS, lambda _: variables["params"])
      for name, collection in variables.items():
        if name != "params":
          self.put_variable(name, HEADS, collection)
      return HeadOutputs(outputs, outputs)

    # Flax tells if they are missing; each head will tell if it needs other shapes.
    params = self.param(HEADS, lambda _: self.get_variable("params", HEADS))
    found = {jnp.shape(x)[:1] for x in jax.tree.leaves(params)}
    allowed = {(n,) for n in range(1, self.num_heads + 1)}  # fewer: collapsed
    if len(found) != 1 or not found <= allowed:
      raise ValueError(
        "MultiHead(num_heads=...) must be the number of heads in its parameters, or "
        f"more, but they have leading axes {sorted(found)}, got {self.num_heads}."
      )
    ((num_heads,),) = found
    rngs = _split(keys, num_heads)
    state = {
      name: nn.meta.unbox(collection[HEADS])
      for name, collection in self.variables.items()
      if HEADS in collection
    }
    trained = {name: state.pop(name) for name in _TRAINED & state.keys()}

    def apply(trained, features, aux):
      state, rngs = aux
      return head.apply(
        {**trained, **state}, features, *args, rngs=rngs, mutable=mutable, **kwargs
      )

    outputs, state = multi_head(
      apply, trained, features, aux=(state, rngs), has_aux=True
    )
    for name, value in self._add_axis(state).items():
      # A second call during initialization leaves the initial state as it is.
      if name not in _TRAINED and not self.is_initializing():
        self.variable(name, HEADS, lambda value=value: value).value = value
    return outputs

  def _add_axis(self, variables: PyTree) -> PyTree:
    return nn.meta.add_axis(variables, 0, {nn.PARTITION_NAME: self.head_axis})


def _with_head_product(head: nn.Module) -> nn.Module:
  """A copy that belongs to nobody; plain Dense multiplies in the order of its heads."""
  own = type(head) is not nn.Dense or head.dot_general or head.dot_general_cls
  changes: dict[str, Any] = {} if own else {"dot_general": head_product}
  return head.copy(parent=None, **changes)


def _split(keys: dict[str, jax.Array], num_heads: int) -> dict[str, jax.Array]:
  """One key a head from each, independent of ``num_heads``."""
  heads = jnp.arange(num_heads, dtype=jnp.uint32)
  fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  return {name: fold_in(key, heads) for name, key in keys.items()}


def _check_head(head: Any) -> None:
  rule = "MultiHead(head=...) must be a module with parameters of its own"
  owner = head if isinstance(head, nn.Module) else getattr(head, "__self__", None)
  if not isinstance(owner, nn.Module):
    raise TypeError(
      f"{rule}, got {head!r}. Write an instance, such as MultiHead(nn.Dense(10))."
    )
  if isinstance(owner, nn.Embed) or any(map(_is_shared, _modules(head))):
    shown = type(owner).__name__ + (f".{head.__name__}" if head is not owner else "")
    raise TypeError(
      f"{rule}, got {shown}, as for an output layer tied to the embedding. The heads "
      "have one learning rate each, so one matrix can't be all of them. Write "
      "MultiHead(nn.Dense(vocabulary_size, use_bias=False)); or give each head a "
      "projection of its own and what they share as an argument, "
      "MultiHead(Projection())(features, embed.embedding)."
    )


def _is_shared(module: Any) -> bool:
  """Whether it is a bound method, or a module that has its variables elsewhere."""
  if not isinstance(module, nn.Module):
    return True
  if module.scope is None:
    return False
  # What lies under HEADS belongs to a MultiHead of the same name.
  return any(collection.keys() - {HEADS} for collection in module.variables.values())


def _modules(tree: PyTree) -> Iterator[Any]:
  """A module, the modules and their bound methods in its attributes, and so on."""
  for leaf in jax.tree.leaves(tree):
    if isinstance(leaf, nn.Module):
      yield leaf
      for field in dataclasses.fields(leaf):
        if field.name not in ("parent", "name"):
          yield from _modules(getattr(leaf, field.name, None))
    elif isinstance(getattr(leaf, "__self__", None), nn.Module):
      yield leaf
