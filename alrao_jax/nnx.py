"""MultiHead and its helpers for flax.nnx."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError

from . import _convert, _tree
from ._batch_stats import recomputed
from ._checks import check_count
from ._heads import Hopeful
from ._multi_head import HeadOutputs, head_product, multi_head
from ._predict import Output, predict_from
from ._rules import Known, Override, einsum_kernel, overrides_from
from ._tree import HEADS

PyTree = Any


class MultiHead(nnx.Module):
  """``num_heads`` copies of an output layer, evaluated on the same features.

  Use it in the place of a model's last layer: write
  ``self.out = MultiHead(lambda rngs: nnx.Linear(64, 10, rngs=rngs), rngs=rngs)``
  instead of ``self.out = nnx.Linear(64, 10, rngs=rngs)``. A call returns
  :class:`HeadOutputs` for this package's losses and predictions. Each copy has its own
  initial draw, its own state (batch statistics) and its own random streams (dropout
  masks). The draws of head ``j`` depend on ``j``, not on the number of heads.

  The attribute ``alrao_heads`` is one such layer, with the heads on axis 0 of its
  Variables: ``out/alrao_heads/kernel[j]`` for ``out/kernel``. So
  :func:`load_pretrained` finds a MultiHead in the plain layer's place. State is updated
  in place, and ``train()``, ``eval()`` and ``nnx.view`` reach the layer.

  Large heads, such as those of many classes, are computed separately; see
  :func:`multi_head`. On a CPU, a plain ``nnx.Linear`` with more features than examples
  and outputs is multiplied kernel first, which saves smaller heads a transposition in
  training. This does not apply to a Linear with its own ``dot_general``, or within
  another module. Both may change last bits.

  Limits: only ``nnx.Param`` of a head is trained. ``nnx.scan`` and ``nnx.vmap`` must
  not surround a MultiHead. They put their own axis on axis 0, in place of the heads'
  axis, and the optimizer would read the number of heads from it; no check detects this.
  For several models at once, apply ``jax.vmap`` to the whole initialization and the
  whole training step. Only reverse mode (``jax.grad``, ``jax.vjp``) is available,
  forward mode (``jax.jvp``, ``jax.jacfwd``) is not.

  Args:
    make_head: A function that makes one head from its own ``nnx.Rngs``.
    num_heads: Number of copies, at least 1.
    rngs: Random streams; each is split into one stream a head.
    head_axis: Name of the mesh axis that the heads are sharded over, which becomes the
      first name in the sharding of Variables that have one. None if they are not
      sharded.

  Raises:
    TypeError: If ``make_head`` is no function that returns an ``nnx.Module``, or
      belongs to an embedding (a tied output layer); ``num_heads`` is no integer;
      ``rngs`` is no ``nnx.Rngs``.
    ValueError: If ``num_heads`` is below 1, or the head has no ``nnx.Param``.

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
      features: The body's outputs, any pytree of arrays.
      *args: Passed on to each head.
      rngs: Random streams for the heads; each gets its own. None by default.
      **kwargs: Passed on to each head.

    Returns:
      The outputs of the wrapped layer, with a leading axis ``num_heads``.
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
      # Write only what a head assigned: inside jax.jit, a model from outside may not be
      # written to, and evaluation does not need it.
      nnx.update(self.alrao_heads, state)
    return outputs


def _state(head: nnx.Module) -> list[tuple[Any, Any]]:
  """Paths and values of the state that is not trained."""
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


def predict(
  model: nnx.Module,
  log_weights: PyTree,
  *args: Any,
  output: Output | Mapping[str, Output] = "log_probs",
  **kwargs: Any,
) -> PyTree:
  """Calls a model and returns the mixture's prediction, in one call for serving.

  ``predict(model, log_weights, images)`` returns ``model(images)`` with the mixture's
  prediction in place of every :class:`HeadOutputs`. The model runs as after
  ``model.eval()`` and does not change. Next to the model this needs only ``num_heads``
  numbers, no optimizer. To compile it, write ``nnx.jit(predict)``, or ``jax.jit`` of a
  function that closes over the model.

  Args:
    model: A module that returns :class:`HeadOutputs`, or a container with one or
      several.
    log_weights: Shape ``(num_heads,)``, from ``alrao_jax.log_weights(opt_state)``. For
      a model that returns several :class:`HeadOutputs`, say in a dict, a mapping from
      the "/"-joined path of each in the result to its weights.
    *args: The model's inputs.
    output: ``"log_probs"`` (:func:`mixture_log_probs`), ``"mean"``
      (:func:`mixture_mean`), a function ``(heads, log_weights) -> prediction``, or a
      mapping by path to these.
    **kwargs: Passed on to the model.

  Returns:
    What the model returns, with predictions: log-probabilities ``(..., num_classes)``
    by default.

  Raises:
    ValueError: If the model returns no :class:`HeadOutputs`, or others than
      ``log_weights`` has.

  Example:
    >>> import jax.numpy as jnp, alrao_jax.nnx
    >>> from flax import nnx
    >>> model = alrao_jax.nnx.MultiHead(
    ...     lambda rngs: nnx.Linear(4, 3, rngs=rngs), num_heads=2, rngs=nnx.Rngs(0))
    >>> log_weights = jnp.log(jnp.array([0.9, 0.1]))
    >>> alrao_jax.nnx.predict(model, log_weights, jnp.ones((5, 4))).shape
    (5, 3)
  """
  _check_model("predict", model)
  model = nnx.view(
    model, deterministic=True, use_running_average=True, raise_if_not_found=False
  )
  model = nnx.clone(model)  # a view's Variables are the model's own
  return predict_from(model(*args, **kwargs), log_weights, output)


def _check_model(call: str, model: Any) -> None:
  if not isinstance(model, nnx.Module):
    raise TypeError(
      f"nnx.{call}(model=...) must be an nnx.Module, got a {type(model).__name__}. "
      f"For a model of linen write alrao_jax.linen.{call}(...); for an nnx.State, "
      "nnx.merge(graphdef, state)."
    )


def collapse(
  model: nnx.Module,
  optimizer: nnx.Optimizer,
  keep: int | Sequence[int] | Hopeful = 1,
) -> None:
  """Keeps the best heads of a model and of its optimizer, in place.

  It does what ``alrao_jax.collapse`` does for everything that the model's heads hold:
  parameters, batch statistics, random streams. Compiled functions compile once more.
  Call it between steps, outside of ``nnx.jit``.

  Args:
    model: A model with one or several MultiHeads.
    optimizer: The ``nnx.Optimizer`` that trains it.
    keep: How many heads, the best by the posterior; or their indices; or
      ``alrao_jax.hopeful()``, those that the posterior gives hope.

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
  _check_model("collapse", model)
  if not isinstance(optimizer, nnx.Optimizer):
    raise TypeError(
      "nnx.collapse(optimizer=...) must be the nnx.Optimizer, got a "
      f"{type(optimizer).__name__}. Write nnx.collapse(model, optimizer); for "
      "parameters and an optimizer's state alrao_jax.collapse(...)."
    )
  params = nnx.state(model, optimizer.wrt)
  kept = _convert.kept_heads(keep, optimizer.opt_state, params)
  if kept is None:
    return
  opt_state, _ = _convert.collapse(optimizer.tx, optimizer.opt_state, params, kept)
  # The optimizer's state comes first, since only it can be refused.
  is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
  held = jax.tree.leaves(optimizer.opt_state, is_leaf=is_variable)
  new = jax.tree.leaves(opt_state, is_leaf=is_variable)
  for variable, value in zip(held, new, strict=True):
    variable.set_value(value.get_value())
  nnx.update(model, _convert.take_heads(nnx.state(model), kept))
  for _, module in nnx.iter_modules(model):
    if isinstance(module, MultiHead):
      module.num_heads = len(kept)


def export(
  model: nnx.Module,
  opt_state: Any = None,
  *,
  head: int | Mapping[str, int] | None = None,
) -> Any:
  """Returns a copy of a model with ordinary output layers instead of MultiHeads.

  The layer is the best head by the posterior. The copy works like any model of Flax.
  (For a model of another program, give
  ``alrao_jax.export(opt_state, nnx.state(model))`` to
  ``nnx.update(plain_model, ...)``.)

  Args:
    model: A model with one or several MultiHeads, or a MultiHead itself.
    opt_state: ``optimizer.opt_state``; its posterior chooses. It may be left out if
      there is one head.
    head: Which head to take instead, for several MultiHeads also a mapping by path.

  Returns:
    The copy; ``model`` stays as it is.

  Raises:
    ValueError: As ``alrao_jax.export``; if a MultiHead is in a container other than a
      module, list, dict or tuple.
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
  _check_model("export", model)
  chosen = _convert.chosen_heads("export()", opt_state, nnx.state(model), head)
  model = nnx.clone(model)
  # By identity, since a MultiHead may be in several places.
  singles = {
    id(module): _single(module, chosen["/".join(map(str, path)) or HEADS])
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
    lambda leaf: _convert.one_head(leaf, index), state, is_leaf=is_variable
  )
  return nnx.merge(graphdef, state)


def _exchanged(child: Any, singles: Mapping[int, nnx.Module]) -> Any:
  """The replacement of a child; the child itself if nothing in it changes."""
  if id(child) in singles:
    return singles[id(child)]
  if not isinstance(child, tuple):
    return child
  # A tuple can't be written into: make a new one.
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


def recompute_batch_stats(
  forward: Callable[[nnx.Module, Any], Any],
  model: nnx.Module,
  batches: Iterable[Any],
) -> nnx.Module:
  """Recomputes the statistics of batch normalisation for the parameters of a model.

  As ``alrao_jax.linen.recompute_batch_stats``, which says which batches to give::

    model = alrao.eval_params(optimizer.opt_state, model)
    model = alrao.nnx.recompute_batch_stats(
      lambda model, batch: model(batch["image"]), model, itertools.islice(loader, 40))

  Args:
    forward: Function of a model and a batch that calls the model; its result is not
      used. The model is as after ``model.train()``. The function is compiled.
    model: A model with ``nnx.BatchStat``.
    batches: Pytrees of arrays with the examples on axis 0, read once.

  Returns:
    A copy with new statistics; ``model`` stays as it is.

  Raises:
    ValueError: If there are no batches, no ``nnx.BatchStat``, or a pass moves none.
    TypeError: If ``model`` is no module of nnx.

  Example:
    >>> import jax.numpy as jnp, alrao_jax.nnx
    >>> from flax import nnx
    >>> norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> norm = alrao_jax.nnx.recompute_batch_stats(
    ...   lambda norm, batch: norm(batch), norm,
    ...   [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [5.0]])])
    >>> [round(float(each[...][0]), 4) for each in (norm.mean, norm.var)]
    [3.5, 0.5]
  """
  call = "nnx.recompute_batch_stats()"
  _check_model("recompute_batch_stats", model)
  graphdef, found, rest = nnx.split(model, nnx.BatchStat, ...)
  if not jax.tree.leaves(found):
    raise ValueError(
      f"{call[:-1]}model=...) must hold an nnx.BatchStat, got none: a model without "
      "batch normalisation has no statistics."
    )
  new = recomputed(call, _updated, (forward, graphdef), found, rest, batches)
  return nnx.merge(graphdef, new, nnx.clone(rest))


def _updated(known, stats, rest, batch):
  forward, graphdef = known
  model = nnx.view(
    nnx.merge(graphdef, stats, rest),
    deterministic=False,
    use_running_average=False,
    raise_if_not_found=False,
  )
  forward(model, batch)
  return nnx.state(model, nnx.BatchStat)


def unit_overrides(model: nnx.Module) -> tuple[Override, ...]:
  """Overrides for units that the types of a model's modules tell, and shapes don't.

  They name the parameters of ``nnx.LinearGeneral`` with several features and
  ``nnx.Einsum``, without bias or with permuted axes; ``nnx.ConvTranspose`` with
  ``transpose_kernel``, square or without bias; layers without bias and embeddings that
  are stacked by ``nnx.vmap`` or ``nnx.scan``. The rules decide about everything else.

  Args:
    model: A module, such as ``nnx.eval_shape(lambda: Model(rngs=nnx.Rngs(0)))``.

  Returns:
    The overrides for ``alrao_jax.UnitOptions(overrides)``. You may add others; the
    first that matches wins.

  Example:
    >>> import alrao_jax.nnx
    >>> from flax import nnx
    >>> model = nnx.LinearGeneral(5, (2, 3), use_bias=False, rngs=nnx.Rngs(0))
    >>> alrao_jax.nnx.unit_overrides(model)
    (('^kernel$', Units(axes=(1, 2), group=None, tiles=1)),)
  """
  _check_model("unit_overrides", model)
  known: dict[str, Known] = {}
  for names, module in nnx.iter_modules(model):
    for name, parameter in _own_parameters(module).items():
      known["/".join(map(str, (*names, name)))] = parameter
  return overrides_from(_tree.body_shapes(nnx.state(model, nnx.Param)), known)


def _own_parameters(module: nnx.Module) -> dict[str, Known]:
  """What a module of Flax knows about its own parameters."""
  match module:
    case nnx.Linear():
      features = module.out_features
      kernel, bias = Known((module.in_features, features)), (features,)
    case nnx.LinearGeneral():
      batch, features = tuple(module.batch_axis.values()), tuple(module.out_features)
      shape, bias = (*batch, *module.in_features, *features), (*batch, *features)
      axes = tuple(range(len(shape)))
      kernel = Known(shape, axes[: len(batch)] + axes[-len(features) :])
    case nnx.Einsum():
      kernel = einsum_kernel(tuple(module.kernel_shape), module.einsum_str)
      bias = tuple(module.bias_shape or ())
    case nnx.Conv() | nnx.ConvTranspose():
      transposed = isinstance(module, nnx.ConvTranspose) and module.transpose_kernel
      rank, bias = len(module.kernel_shape), (module.out_features,)
      kernel = Known(module.kernel_shape, (rank - 2,) if transposed else None)
    case nnx.Embed():
      return {"embedding": Known((module.num_embeddings, module.features))}
    case nnx.LoRA():
      rank = module.lora_a.shape[-1]
      a, b = (module.in_features, rank), (rank, module.out_features)
      return {"lora_a": Known(a), "lora_b": Known(b)}
    case nnx.PReLU():
      return {"negative_slope": Known(())}
    case _:
      return {}
  return {"kernel": kernel, "bias": Known(bias)}
