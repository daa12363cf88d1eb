"""MultiHead and its helpers for flax.linen."""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from . import _convert, _tree
from ._checks import check_count, refuses_removed
from ._heads import TrackHeadsState
from ._multi_head import HeadOutputs, head_product, multi_head
from ._predict import Output, predict_from
from ._rules import Known, Override, einsum_kernel, overrides_from
from ._tree import HEADS, find_states

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


def predict(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  log_weights: PyTree,
  *args: Any,
  output: Output | Mapping[str, Output] = "log_probs",
  **kwargs: Any,
) -> PyTree:
  """Applies a model and returns the mixture's prediction: one call for serving.

  ``predict(model, variables, log_weights, images)`` is ``model.apply(variables,
  images)`` with the mixture's prediction in place of every `HeadOutputs`. All it needs
  are the variables and ``num_heads`` numbers, no optimizer. To compile it:
  ``jax.jit(functools.partial(predict, model))``.

  Args:
    model: a module that returns `HeadOutputs`, or a container with one or several.
    variables: its variables, such as ``{"params": params}``.
    log_weights: shape ``(num_heads,)``, from ``alrao_jax.log_weights(opt_state)``.
      For a model that returns several `HeadOutputs`, say in a dict, a mapping from the
      "/"-joined path of each in the result to its weights.
    *args: the model's inputs.
    output: ``"log_probs"`` (`mixture_log_probs`), ``"mean"`` (`mixture_mean`), a
      function ``(heads, log_weights) -> prediction``, or a mapping by path to these.
    **kwargs: passed on to ``model.apply``, such as ``train=False`` or ``rngs``.

  Returns:
    What the model returns, with predictions: log-probabilities ``(..., num_classes)``
    by default.

  Raises:
    ValueError: the model returns no `HeadOutputs`, or others than ``log_weights`` has.

  Example:
    >>> import jax, jax.numpy as jnp, flax.linen as nn, alrao_jax.linen
    >>> model = alrao_jax.linen.MultiHead(nn.Dense(3), num_heads=2)
    >>> variables = model.init(jax.random.key(0), jnp.ones((5, 4)))
    >>> log_weights = jnp.log(jnp.array([0.9, 0.1]))
    >>> alrao_jax.linen.predict(model, variables, log_weights, jnp.ones((5, 4))).shape
    (5, 3)
  """
  _check_model("predict", model)
  outputs = model.apply(variables, *args, **kwargs)
  return predict_from(outputs, log_weights, output)


def _check_model(call: str, model: Any) -> None:
  if not isinstance(model, nn.Module):
    raise TypeError(
      f"linen.{call}(model=...) must be a linen module, got a {type(model).__name__}. "
      f"Write alrao_jax.nnx.{call}(...) for a model of nnx."
    )


class TrainState(train_state.TrainState):
  """Flax's ``TrainState`` for optimizers that need more than gradients.

  Flax's own drops what an optimizer takes beside gradients and parameters. This one
  hands over ``head_log_likelihoods``; all else is as in Flax.

  Example:
    >>> import jax, jax.numpy as jnp, flax.linen as nn, alrao_jax as alrao
    >>> import alrao_jax.linen
    >>> model = alrao_jax.linen.MultiHead(nn.Dense(3), num_heads=2)
    >>> params = model.init(jax.random.key(0), jnp.ones((5, 4)))["params"]
    >>> state = alrao_jax.linen.TrainState.create(
    ...     apply_fn=model.apply, params=params, tx=alrao.alrao(jax.random.key(1)))
    >>> int(state.apply_gradients(
    ...     grads=params, head_log_likelihoods=jnp.array([-1.0, -2.0])).step)
    1
  """

  def apply_gradients(
    self,
    *,
    grads: PyTree,
    head_log_likelihoods: PyTree = None,
    extra_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
  ) -> "TrainState":
    """Updates ``step``, ``params``, ``opt_state``, and the fields in ``kwargs``.

    Args:
      grads: gradients, a tree like ``params``.
      head_log_likelihoods: ``info.head_log_likelihoods`` as the loss returned it, shape
        ``(num_heads,)``; a mapping by path for several MultiHeads.
      extra_args: what else ``tx.update`` takes by keyword, such as ``{"value": loss}``.
      **kwargs: fields to replace, such as ``batch_stats=alrao_jax.keep_finite(
        updated["batch_stats"], state.batch_stats)``.

    Returns:
      The new state.

    Raises:
      TypeError: ``tx.update`` takes no such arguments.
    """
    extra = dict(extra_args or {})
    if head_log_likelihoods is not None:
      extra["head_log_likelihoods"] = head_log_likelihoods
    if not extra:
      return super().apply_gradients(grads=grads, **kwargs)
    _check_takes(self.tx.update, extra)
    tx = optax.GradientTransformation(
      self.tx.init, functools.partial(self.tx.update, **extra)
    )
    # What Flax does around the update (say for fp8 statistics) is left to Flax.
    return super(TrainState, self.replace(tx=tx)).apply_gradients(
      grads=grads, **{"tx": self.tx, **kwargs}
    )


def _check_takes(update: Any, extra: Mapping[str, Any]) -> None:
  """Refuses an update without these arguments, whatever class it belongs to."""
  try:
    inspect.signature(update).bind("updates", "state", "params", **extra)
  except TypeError:
    raise TypeError(
      f"TrainState.apply_gradients() got {sorted(extra)}, which this tx can't take. "
      "Write tx=alrao_jax.alrao(key), or a chain with alrao_jax.track_heads(); "
      "wrappers that take no extra arguments, such as optax.lookahead, go inside."
    ) from None
  except ValueError:  # it has no signature to look at
    pass


@refuses_removed
def collapse(state: train_state.TrainState, keep: int | Sequence[int] = 1) -> Any:
  """Keeps the best heads of a train state.

  What ``alrao_jax.collapse`` does, for every field of the state: ``params``,
  ``opt_state``, and what a subclass adds, such as ``batch_stats`` or averaged
  parameters. The model stays as it is, and so does the training step, which compiles
  once more.

  Args:
    state: The train state, of Flax or of this library.
    keep: How many heads, the best by the posterior; or their indices.

  Returns:
    The new state, of the same class.

  Raises:
    ValueError: As ``alrao_jax.collapse``; another field holds a second optimizer's
      state, whose optimizer is not known here.
    TypeError: As ``alrao_jax.collapse``.

  Example:
    >>> import jax, jax.numpy as jnp, flax.linen as nn, alrao_jax as alrao
    >>> import alrao_jax.linen
    >>> model = alrao.linen.MultiHead(nn.Dense(3), num_heads=10)
    >>> state = alrao.linen.TrainState.create(
    ...     apply_fn=model.apply, tx=alrao.alrao(jax.random.key(1)),
    ...     params=model.init(jax.random.key(0), jnp.ones((5, 4)))["params"])
    >>> state = alrao.linen.collapse(state, keep=2)
    >>> state.apply_fn({"params": state.params}, jnp.ones((5, 4))).num_heads
    2
  """
  others = _other_fields("collapse", state)
  for name in others:
    if find_states(getattr(state, name), TrackHeadsState):
      raise ValueError(
        "linen.collapse(state) must hold the state of one track_heads, in opt_state, "
        f"got another one in {name!r}. Collapse each optimizer's state by "
        "alrao_jax.collapse(optimizer, opt_state, params, keep), and state.replace(...)"
        " the fields."
      )
  params: Any = state.params
  # Flax gives the optimizer a part, where fp8 statistics are beside it.
  trained = params["params"] if OVERWRITE_WITH_GRADIENT in params else params
  kept = _convert.kept_heads(keep, state.opt_state, trained)
  opt_state, _ = _convert.collapse(state.tx, state.opt_state, trained, kept)
  sliced = {name: _convert.take_heads(getattr(state, name), kept) for name in others}
  return state.replace(**sliced, opt_state=opt_state)


def export(
  state: train_state.TrainState, *, head: int | Mapping[str, int] | None = None
) -> dict[str, Any]:
  """Returns variables for the same model with an ordinary output layer.

  What ``alrao_jax.export`` does, for ``params`` and for every collection that a
  subclass adds as a field, such as ``batch_stats``:
  ``plain_model.apply(export(state), images)`` serves like any model of Flax.

  Args:
    state: The train state, of Flax or of this library.
    head: Which head to take, for several MultiHeads also a mapping by path. By default
      the best by the posterior.

  Returns:
    The variables, ``{"params": ..., "batch_stats": ...}``.

  Raises:
    ValueError: As ``alrao_jax.export``.
    TypeError: As ``alrao_jax.export``; ``state`` is no train state.

  Example:
    >>> import jax, jax.numpy as jnp, flax.linen as nn, alrao_jax as alrao
    >>> import alrao_jax.linen
    >>> model = alrao.linen.MultiHead(nn.Dense(3), num_heads=10)
    >>> state = alrao.linen.TrainState.create(
    ...     apply_fn=model.apply, tx=alrao.alrao(jax.random.key(1)),
    ...     params=model.init(jax.random.key(0), jnp.ones((5, 4)))["params"])
    >>> nn.Dense(3).apply(alrao.linen.export(state), jnp.ones((5, 4))).shape
    (5, 3)
  """
  others = _other_fields("export", state)
  variables = {
    name: value for name in others if isinstance(value := getattr(state, name), Mapping)
  }
  # Flax keeps fp8 statistics beside what is trained, all in ``params``.
  if OVERWRITE_WITH_GRADIENT in variables["params"]:
    variables |= variables["params"]
  return dict(_convert.export(state.opt_state, variables, head=head))


def _other_fields(call: str, state: Any) -> list[str]:
  """The names of a train state's fields that hold arrays, but for ``opt_state``."""
  if not (dataclasses.is_dataclass(state) and hasattr(state, "opt_state")):
    raise TypeError(
      f"linen.{call}(state=...) must be a TrainState, got a {type(state).__name__}. "
      f"For parameters and an optimizer's state write alrao_jax.{call}(...)."
    )
  return [
    field.name
    for field in dataclasses.fields(state)
    if field.metadata.get("pytree_node", True) and field.name != "opt_state"
  ]


def unit_overrides(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Override, ...]:
  """Overrides for units that the types of a model's modules tell, and shapes don't.

  They name the parameters of: ``nn.DenseGeneral`` with several features and
  ``nn.Einsum``, without bias or with permuted axes; ``nn.ConvLocal`` without bias;
  ``nn.ConvTranspose`` with ``transpose_kernel``, square or without bias; layers
  without bias, embeddings and other tables that are stacked by ``nn.vmap`` or
  ``nn.scan``. All else is left to the rules.

  Args:
    model: A module, unbound.
    *args: What ``model.init`` takes after the key; arrays or ``jax.ShapeDtypeStruct``,
      whose values are never used.
    **kwargs: Likewise, such as ``train=True`` or ``method``.

  Returns:
    The overrides for ``alrao_jax.UnitOptions(overrides)``, to which others may be
    added: the first that matches wins.

  Example:
    >>> import flax.linen as nn, jax.numpy as jnp, alrao_jax.linen
    >>> model = nn.DenseGeneral(features=(2, 3), use_bias=False)
    >>> alrao_jax.linen.unit_overrides(model, jnp.ones((1, 5)))
    (('^kernel$', Units(axes=(1, 2), group=None, tiles=1)),)
  """
  _check_model("unit_overrides", model)
  known: dict[str, Known] = {}
  in_heads = False

  def look(next_fun, args, kwargs, context):
    nonlocal in_heads
    outside, in_heads = in_heads, in_heads or isinstance(context.module, MultiHead)
    outputs = next_fun(*args, **kwargs)
    if not in_heads and context.module.scope is not None:
      for path, parameter in _own_parameters(context.module, args, kwargs).items():
        known.setdefault(path, parameter)  # within a stack before around it
    in_heads = outside
    return outputs

  leaves, treedef = jax.tree.flatten((args, kwargs))
  arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

  def init(arrays):
    filled = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
    args, kwargs = jax.tree.unflatten(treedef, filled)
    return model.init(jax.random.key(0), *args, **kwargs)

  with nn.intercept_methods(look):
    variables = jax.eval_shape(init, arrays)
  return overrides_from(_tree.body_shapes(variables.get("params", {})), known)


def _own_parameters(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Known]:
  """What a module knows of the parameters that are its own."""
  known = {}
  for name, leaf in module.variables.get("params", {}).items():
    if not isinstance(leaf, Mapping):
      shape = nn.meta.unbox(leaf).shape
      is_kernel = name == "kernel"
      path = "/".join((*module.path, name))
      known[path] = _kernel(module, shape, args, kwargs) if is_kernel else Known(shape)
  return known


def _kernel(module: nn.Module, shape: tuple[int, ...], args, kwargs) -> Known:
  """What a module knows of its kernel; None for its axes where the rules know them."""
  axes = tuple(range(len(shape)))
  match module:
    case nn.DenseGeneral():
      batch, features = (
        1 if isinstance(value, int) else len(value)
        for value in (module.batch_dims, module.features)
      )
      return Known(shape, axes[:batch] + axes[-features:])
    case nn.ConvTranspose(transpose_kernel=True):
      return Known(shape, axes[-2:-1])
    case nn.ConvLocal():
      return Known(shape, axes[:-2] + axes[-1:])
    case nn.Einsum():
      equation = module.einsum_str or kwargs.get("einsum_str") or args[1]
      return einsum_kernel(shape, equation)
  return Known(shape)
