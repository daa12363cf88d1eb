"""MultiHead and its helpers for flax.linen."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from . import _convert, _tree
from ._batch_stats import recomputed
from ._checks import check_count, refuses_removed
from ._heads import Hopeful, TrackHeadsState
from ._multi_head import HeadOutputs, head_product, multi_head
from ._predict import Output, predict_from
from ._rules import Known, Override, einsum_kernel, overrides_from
from ._tree import HEADS, find_states

PyTree = Any


_TRAINED = {"params", OVERWRITE_WITH_GRADIENT}  # the collections with a gradient


class MultiHead(nn.Module):
  """``num_heads`` copies of an output layer, evaluated on the same features.

  Wrap the last layer of a model in it: write ``MultiHead(nn.Dense(10))(features)``
  instead of ``nn.Dense(10)(features)``. It returns :class:`HeadOutputs` for this
  package's losses and predictions. Each copy has its own initial draw, its own state
  (batch statistics) and its own random keys (dropout masks). The draws of head ``j``
  depend on ``j``, not on the number of heads.

  The variables are those of the wrapped layer, stacked on axis 0 under the key
  ``alrao_heads``: ``<name>/alrao_heads/kernel[j]`` for ``<name>/kernel``. Give the
  MultiHead the ``name`` of the output layer in the plain model, so that
  :func:`load_pretrained` finds it; the wrapped layer's own name has no effect. Write a
  head of several layers as a module class: the layers of an inline ``nn.Sequential``
  have other paths in a plain model (``Dense_0``) than here (``layers_0``).

  Large heads, such as those of many classes, are computed separately; see
  :func:`multi_head`. On a CPU, a plain ``nn.Dense`` with more features than examples
  and outputs is multiplied kernel first, which saves smaller heads a transposition in
  training. This does not apply to a Dense with its own ``dot_general``, or within
  another module. Both may change last bits.

  Limits: ``nn.jit`` and ``nn.remat`` may surround a MultiHead, ``nn.scan`` and
  ``nn.vmap`` may not. These put their own axis on axis 0, in place of the heads' axis,
  and the optimizer would read the number of heads from it; no check detects this. For
  several models at once, apply ``jax.vmap`` to the whole initialization and the whole
  training step. Only reverse mode (``jax.grad``, ``jax.vjp``) is available, forward
  mode (``jax.jvp``, ``jax.jacfwd``) is not.

  Attributes:
    head: The output layer, any module, unbound or made inline.
    num_heads: Number of copies at initialization, at least 1. Parameters may have
      fewer, after ``alrao_jax.collapse``.
    head_axis: Name of the mesh axis that the heads are sharded over, which becomes the
      first name of what ``nn.with_partitioning`` made. None if they are not sharded.

  Raises:
    TypeError: If ``head`` is no module, is an ``nn.Embed``, or shares parameters with
      the rest of the model (a tied output layer); ``num_heads`` is no integer.
    ValueError: If ``num_heads`` is below 1 or below that of the parameters given, or
      the head has no parameters.

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
      # The head was made inline, so Flax takes it for a layer of the outer module. The
      # automatic name that it got there may be the MultiHead's.
      scope, name = outer.scope, self.name
      if scope is not None and name is not None and name == self.head.name:
        scope.reservations.pop(name, None)
      object.__setattr__(self, "head", self.head.copy(parent=None))
    super().__post_init__()

  @nn.compact
  def __call__(self, features: PyTree, *args: Any, **kwargs: Any) -> HeadOutputs:
    """Evaluates every head.

    Args:
      features: The body's outputs, any pytree of arrays.
      *args: Passed on to each head.
      **kwargs: Passed on to each head, such as ``train=True``.

    Returns:
      The outputs of the wrapped layer, with a leading axis ``num_heads``.
    """
    _check_head(self._given)  # shared layers have been called by now
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

    # Flax raises if they are missing, and each head raises if it needs other shapes.
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
  """A copy without parent, in which a plain Dense multiplies kernel first."""
  own = type(head) is not nn.Dense or head.dot_general or head.dot_general_cls
  changes: dict[str, Any] = {} if own else {"dot_general": head_product}
  return head.copy(parent=None, **changes)


def _split(keys: dict[str, jax.Array], num_heads: int) -> dict[str, jax.Array]:
  """One key a head from each key, independent of ``num_heads``."""
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
  # Variables below HEADS belong to a MultiHead of the same name.
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
  """Applies a model and returns the mixture's prediction, in one call for serving.

  ``predict(model, variables, log_weights, images)`` is
  ``model.apply(variables, images)`` with the mixture's prediction in place of every
  :class:`HeadOutputs`. It needs only the variables and ``num_heads`` numbers, no
  optimizer. To compile it, write ``jax.jit(functools.partial(predict, model))``.

  Args:
    model: A module that returns :class:`HeadOutputs`, or a container with one or
      several.
    variables: Its variables, such as ``{"params": params}``.
    log_weights: Shape ``(num_heads,)``, from ``alrao_jax.log_weights(opt_state)``. For
      a model that returns several :class:`HeadOutputs`, say in a dict, a mapping from
      the "/"-joined path of each in the result to its weights.
    *args: The model's inputs.
    output: ``"log_probs"`` (:func:`mixture_log_probs`), ``"mean"``
      (:func:`mixture_mean`), a function ``(heads, log_weights) -> prediction``, or a
      mapping by path to these.
    **kwargs: Passed on to ``model.apply``, such as ``train=False`` or ``rngs``.

  Returns:
    What the model returns, with predictions: log-probabilities ``(..., num_classes)``
    by default.

  Raises:
    ValueError: If the model returns no :class:`HeadOutputs`, or others than
      ``log_weights`` has.

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

  Flax's own ``TrainState`` drops extra arguments of an optimizer. This one passes
  ``head_log_likelihoods`` on; everything else is as in Flax.

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
      grads: Gradients, a tree like ``params``.
      head_log_likelihoods: ``info.head_log_likelihoods`` as the loss returned it, shape
        ``(num_heads,)``; a mapping by path for several MultiHeads.
      extra_args: What else ``tx.update`` takes by keyword, such as ``{"value": loss}``.
      **kwargs: Fields to replace, such as ``batch_stats=alrao_jax.keep_finite(
        updated["batch_stats"], state.batch_stats)``.

    Returns:
      The new state.

    Raises:
      TypeError: If ``tx.update`` takes no such arguments.
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
    # Leave to Flax what it does around the update (such as fp8 statistics).
    return super(TrainState, self.replace(tx=tx)).apply_gradients(
      grads=grads, **{"tx": self.tx, **kwargs}
    )


def _check_takes(update: Any, extra: Mapping[str, Any]) -> None:
  """Refuses an update function that does not take these arguments."""
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
def collapse(
  state: train_state.TrainState, keep: int | Sequence[int] | Hopeful = 1
) -> Any:
  """Keeps the best heads of a train state.

  It does what ``alrao_jax.collapse`` does for every field of the state: ``params``,
  ``opt_state``, and fields of a subclass, such as ``batch_stats`` or averaged
  parameters. The model and the training step stay as they are; the step compiles once
  more.

  Args:
    state: The train state, of Flax or of this library.
    keep: How many heads, the best by the posterior; or their indices; or
      ``alrao_jax.hopeful()``, those that the posterior gives hope.

  Returns:
    The new state, of the same class; the same object if a rule lets no head leave.

  Raises:
    ValueError: As ``alrao_jax.collapse``; if another field holds the state of a second
      optimizer, which is not known here.
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
        "alrao_jax.collapse(optimizer, opt_state, params, keep), and write the results "
        "back with state.replace(...)."
      )
  params: Any = state.params
  # With fp8 statistics, Flax gives the optimizer only a part of ``params``.
  trained = params["params"] if OVERWRITE_WITH_GRADIENT in params else params
  kept = _convert.kept_heads(keep, state.opt_state, trained)
  if kept is None:
    return state
  opt_state, _ = _convert.collapse(state.tx, state.opt_state, trained, kept)
  sliced = {name: _convert.take_heads(getattr(state, name), kept) for name in others}
  return state.replace(**sliced, opt_state=opt_state)


def export(
  state: train_state.TrainState, *, head: int | Mapping[str, int] | None = None
) -> dict[str, Any]:
  """Returns variables for the same model with an ordinary output layer.

  It does what ``alrao_jax.export`` does for ``params`` and every collection that a
  subclass has as a field, such as ``batch_stats``. Then
  ``plain_model.apply(export(state), images)`` works like any model of Flax.

  Args:
    state: The train state, of Flax or of this library.
    head: Which head to take, for several MultiHeads also a mapping by path. By default
      the best by the posterior.

  Returns:
    The variables, ``{"params": ..., "batch_stats": ...}``.

  Raises:
    ValueError: As ``alrao_jax.export``.
    TypeError: As ``alrao_jax.export``; if ``state`` is no train state.

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
  # Flax keeps fp8 statistics next to the trained parameters, both in ``params``.
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


def recompute_batch_stats(
  forward: Callable[[Mapping[str, PyTree], Any], tuple[Any, Mapping[str, PyTree]]],
  variables: Mapping[str, PyTree],
  batches: Iterable[Any],
) -> dict[str, PyTree]:
  """Recomputes the statistics of batch normalisation for the parameters given.

  While a network trains, its running statistics follow the parameters that train. An
  average of parameters (``alrao_jax.eval_params``) needs statistics of its own::

    variables = {"params": alrao.eval_params(opt_state, params), "batch_stats": stats}
    variables = alrao.linen.recompute_batch_stats(
      lambda variables, batch: model.apply(
        variables, batch["image"], train=True, mutable=["batch_stats"]),
      variables, itertools.islice(loader, 40))

  Give batches as in training: shuffled, of the same size, with the same augmentation.
  Batches sorted by class are worse than none. About 40 batches are enough.

  The result is the mean of the batches' own means and variances, whatever the momentum
  of the layers. Batches of other sizes weigh by their numbers of examples.

  Args:
    forward: Function of variables and a batch that calls the model in training mode and
      returns ``model.apply(..., mutable=["batch_stats"])``: outputs, which are not
      used, and updates. It is compiled, once if it is the same function in all calls.
    variables: Linen's variables, with ``params`` and ``batch_stats``.
    batches: Pytrees of arrays with the examples on axis 0, read once. A loader that
      begins anew for each loop may be given as it is.

  Returns:
    The variables with new ``batch_stats``. What is no running average there stays.

  Raises:
    ValueError: If there are no batches, no ``batch_stats``, or a pass moves none.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, alrao_jax.linen
    >>> norm = nn.BatchNorm(use_running_average=False)
    >>> variables = norm.init(jax.random.key(0), jnp.ones((2, 1)))
    >>> variables = alrao_jax.linen.recompute_batch_stats(
    ...   lambda variables, x: norm.apply(variables, x, mutable=["batch_stats"]),
    ...   variables, [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [5.0]])])
    >>> jax.tree.map(lambda x: round(float(x[0]), 4), variables["batch_stats"])
    {'mean': 3.5, 'var': 0.5}
  """
  call = "linen.recompute_batch_stats()"
  if not variables.get("batch_stats"):
    raise ValueError(
      f"{call[:-1]}variables=...) must have the key 'batch_stats', got "
      f"{list(variables)}: a model without batch normalisation has none."
    )

  others = {name: tree for name, tree in variables.items() if name != "batch_stats"}
  found = recomputed(call, _updated, forward, variables["batch_stats"], others, batches)
  return {**variables, "batch_stats": found}


def _updated(forward, stats, others, batch):
  return forward({**others, "batch_stats": stats}, batch)[1]["batch_stats"]


def unit_overrides(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Override, ...]:
  """Overrides for units that the types of a model's modules tell, and shapes don't.

  They name the parameters of ``nn.DenseGeneral`` with several features and
  ``nn.Einsum``, without bias or with permuted axes; ``nn.ConvLocal`` without bias;
  ``nn.ConvTranspose`` with ``transpose_kernel``, square or without bias; layers without
  bias, embeddings and other tables that are stacked by ``nn.vmap`` or ``nn.scan``. The
  rules decide about everything else.

  Args:
    model: A module, unbound.
    *args: What ``model.init`` takes after the key; arrays or ``jax.ShapeDtypeStruct``.
      Their values are never used.
    **kwargs: Keyword arguments of ``model.init``, such as ``train=True`` or ``method``.

  Returns:
    The overrides for ``alrao_jax.UnitOptions(overrides)``. You may add others; the
    first that matches wins.

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
        known.setdefault(path, parameter)  # the call inside a stack comes first
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
  """What a module knows about its own parameters."""
  known = {}
  for name, leaf in module.variables.get("params", {}).items():
    if not isinstance(leaf, Mapping):
      shape = nn.meta.unbox(leaf).shape
      is_kernel = name == "kernel"
      path = "/".join((*module.path, name))
      known[path] = _kernel(module, shape, args, kwargs) if is_kernel else Known(shape)
  return known


def _kernel(module: nn.Module, shape: tuple[int, ...], args, kwargs) -> Known:
  """What a module knows about its kernel; axes None if the rules know them."""
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
