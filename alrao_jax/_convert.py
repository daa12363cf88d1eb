"""Converts one head to many, many to fewer, and many to one."""

import functools
import operator
import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks, _tree
from ._alrao import GatherUnitsState, ScheduleFreeAlraoState, averages_by_path
from ._averaging import log_normalised, renormalised
from ._heads import (
  Hopeful,
  TrackHeadsState,
  averagings_of,
  best_heads,
  by_layer,
  by_name,
)
from ._rates import ScaleByUnitRatesState
from ._tree import (
  HEADS,
  find_state,
  find_states,
  flatten_with_paths,
  head_name,
  layers_of,
  match_layers,
  need_heads,
  path_of,
  replace_state,
)

PyTree = Any


def load_pretrained(
  params: PyTree, pretrained: PyTree, *, keep: Sequence[str] = ()
) -> PyTree:
  """Copies an ordinary model's parameters, and its output layer into every head.

  The papers start the heads as clones of one output layer, and fine-tuning does the
  same. ``<name>/kernel`` of the ordinary model goes to each head of
  ``<name>/alrao_heads/kernel``, and everything else to its own path. Paths are joined
  by "/", so a linen tree may have boxes (``nn.Partitioned``) or not, and an
  ``nnx.State`` may hold Variables or pure arrays. Random streams (a key and its
  counter, as in ``nnx.Dropout``) stay as in ``params``, so each head keeps its own
  dropout masks.

  Args:
    params: The tree of the model with MultiHead: linen's ``params``, whole variables
      (``batch_stats`` are copied too), an ``nnx.State``, or any pytree of arrays or
      ``jax.ShapeDtypeStruct``.
    pretrained: The same tree of the ordinary model, with the same dtypes.
    keep: Regular expressions, searched for in the paths of the ordinary model. A match
      stays as in ``params``, for instance an output layer for other classes.

  Returns:
    A tree with the type, structure and sharding of ``params``. All its arrays are new,
    so either argument may be donated.

  Raises:
    ValueError: If paths are missing or left over, shapes differ, a regular expression
      of ``keep`` matches nothing, or a leaf that stays as in ``params`` is a
      ``jax.ShapeDtypeStruct``.
    TypeError: If dtypes differ, a leaf is no array, or ``keep`` is a string.

  Example:
    >>> import jax.numpy as jnp, alrao_jax
    >>> params = {"out": {"alrao_heads": {"bias": jnp.zeros((3, 2))}}}
    >>> pretrained = {"out": {"bias": jnp.array([1.0, 2.0])}}
    >>> loaded = alrao_jax.load_pretrained(params, pretrained)
    >>> loaded["out"]["alrao_heads"]["bias"].tolist()
    [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]
  """
  for name, tree in (("params", params), ("pretrained", pretrained)):
    _tree.check_tree("load_pretrained()", tree, name)
  targets, treedef = flatten_with_paths(params)
  sources = dict(flatten_with_paths(pretrained)[0])
  _check_arrays("params", dict(targets))
  _check_arrays("pretrained", sources)
  names = [_plain(path) for path, _ in targets]
  kept = _streams(dict(targets)) | _streams(sources)
  kept = {_plain(path) for path in kept} | _matching(keep, {*names, *sources})
  _check_paths(set(names) - kept, sources.keys() - kept)

  leaves, abstract, shapes, dtypes = [], [], [], []
  for name, (path, target) in zip(names, targets, strict=True):
    if name in kept and isinstance(target, jax.ShapeDtypeStruct):
      abstract.append(path)
      continue
    source = target if name in kept else sources[name]
    headed = name != path and name not in kept
    shape = target.shape[1:] if headed else target.shape
    if source.shape != shape:
      shapes.append(f"{name}: {source.shape} for {shape}")
    elif source.dtype != target.dtype:
      dtypes.append(f"{name}: {source.dtype} for {target.dtype}")
    else:
      leaves.append(_copy(source, target))
  if abstract:
    raise ValueError(
      "load_pretrained() needs values for what stays as params has it (keep=... and "
      f"random streams), got jax.ShapeDtypeStruct for {_listed(abstract)}. Initialise "
      "the model first and give what it has, not the result of eval_shape."
    )
  if shapes:
    raise ValueError(
      f"load_pretrained() needs equal shapes, got {_listed(shapes)}. For an "
      "output layer with other classes, write keep=('^<its name>/',)."
    )
  if dtypes:
    raise TypeError(
      f"load_pretrained() needs equal dtypes, got {_listed(dtypes)}. Cast pretrained "
      "first, as with jax.tree.map(lambda x: x.astype(dtype), pretrained)."
    )
  return jax.tree.unflatten(treedef, leaves)


def _check_arrays(argument: str, leaves: dict[str, Any]) -> None:
  wrong = [
    f"{path}: {type(leaf).__name__}"
    for path, leaf in leaves.items()
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))
    or (argument == "pretrained" and isinstance(leaf, jax.ShapeDtypeStruct))
  ]
  if wrong:
    raise TypeError(
      f"load_pretrained({argument}=...) must have arrays for leaves, got "
      f"{_listed(wrong)}. Write jnp.asarray(leaf, dtype), or leave it out of the tree."
    )


def _plain(path: str) -> str:
  """The path that a leaf has in a model without MultiHead."""
  return "/".join(part for part in path.split("/") if part != HEADS)


def _streams(leaves: dict[str, Any]) -> set[str]:
  """Paths of random keys and of their counters."""
  keys = {
    path
    for path, leaf in leaves.items()
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  }
  return keys | {path.removesuffix("key") + "count" for path in keys} & leaves.keys()


def _matching(keep: Sequence[str], names: set[str]) -> set[str]:
  if isinstance(keep, str):
    raise TypeError(f"load_pretrained(keep=...) must be a sequence, got {keep!r}.")
  matches = {
    pattern: {name for name in names if re.search(pattern, name)} for pattern in keep
  }
  for pattern, found in matches.items():
    if not found:
      raise ValueError(
        f"load_pretrained(keep=...) must match some path, got {pattern!r}."
      )
  return set().union(*matches.values())


def _check_paths(wanted: set[str], given: set[str]) -> None:
  if wanted != given:
    raise ValueError(
      "load_pretrained() needs the same paths in both trees, but for alrao_heads. "
      f"Missing in pretrained: {_listed(wanted - given)}. Not in params: "
      f"{_listed(given - wanted)}. Name the MultiHead as the plain model names its "
      "output layer; keep=(...) lists what stays as it is in params."
    )


def _listed(items: Any, limit: int = 12) -> str:
  items = sorted(items)
  more = f" and {len(items) - limit} more" if len(items) > limit else ""
  return (", ".join(items[:limit]) or "none") + more


def _copy(source: Any, target: Any) -> jax.Array:
  """A new array with the source's value and the target's shape and sharding."""
  value = jnp.array(source)  # a copy, so that either tree may be donated
  if value.ndim < len(target.shape):
    value = jnp.repeat(value[None], target.shape[0], axis=0)
  concrete = isinstance(target, jax.Array) and not isinstance(target, jax.core.Tracer)
  if isinstance(target, jax.ShapeDtypeStruct) or (concrete and target.committed):
    return jax.device_put(value, target.sharding)
  return value


@_checks.refuses_removed
def collapse(
  optimizer: optax.GradientTransformation,
  opt_state: Any,
  params: Any,
  keep: int | Sequence[int] | Hopeful = 1,
) -> tuple[Any, Any]:
  """Keeps the best heads of the optimizer's state and of the parameters.

  Training then goes on with the same model, optimizer and training step, which compiles
  once more and costs what the kept heads cost. The parameters, momenta and averages of
  a kept head and the quantile of its learning rate stay the same to the last bit. The
  posterior goes on as if the others had diverged for good: over the sequences of kept
  heads alone, with the prior of all heads. The body does not change, and neither
  do its rates, even if they follow the posterior (:func:`schedule_free_alrao`). Its
  arrays are those of the arguments, not copies, so a step that donates the new state's
  buffers ends the old state's too. If all heads are kept, everything is returned as it
  is.

  Several MultiHeads keep the same heads, since one ladder of rates serves them all. By
  default the product of their posteriors decides.

  When? With ``keep=alrao.hopeful()``, call it every 50 steps or so: heads leave as soon
  as the posterior leaves them no hope. Until then a call only reads the posterior, for
  which it waits for the step under way. With several processes (``jax.distributed``),
  all must call it after the same step. They take the same decision, since the posterior
  is replicated.

  Heads that were split over a mesh's axis (:func:`head_shardings`) are replicated over
  the mesh afterwards. To split them again, and wherever a step names its
  ``out_shardings``, call :func:`head_shardings` for the new parameters, with a mesh
  whose axis divides their number.

  :func:`take_heads` slices a head's other state (batch statistics, random streams).
  ``alrao_jax.linen.collapse`` does all of this for a ``TrainState``, and
  ``alrao_jax.nnx.collapse`` for a model with its ``nnx.Optimizer``.

  Args:
    optimizer: The optimizer. Its ``init`` tells which axes of its state are the
      heads', and runs on shapes only.
    opt_state: The optimizer's state.
    params: The parameters that the optimizer trains.
    keep: How many heads, the best by the posterior; or ``alrao.hopeful()``, those that
      the posterior gives hope; or the indices of the heads to keep, in any order: the
      heads stay sorted, slowest first. Inside ``jax.jit`` give indices, since the
      posterior is not yet known.

  Returns:
    The new ``opt_state`` and ``params``, with their boxes (``nn.Partitioned``,
    ``nnx.Variable``).

  Raises:
    ValueError: If ``params`` has no heads, or fewer than ``keep``; indices repeat or
      are out of range; ``opt_state`` is not the optimizer's for these ``params``; a
      transformation's state mixes the heads, so that none can be removed.
    TypeError: If ``keep`` is neither a number nor indices nor a rule, or is traced; if
      the posterior that must tell which heads to keep is traced.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"kernel": jnp.ones((10, 3, 2))}}}
    >>> optimizer = alrao.alrao(jax.random.key(0))
    >>> opt_state = optimizer.init(params)
    >>> opt_state, params = alrao.collapse(optimizer, opt_state, params, keep=1)
    >>> params["out"]["alrao_heads"]["kernel"].shape
    (1, 3, 2)
  """
  _tree.check_optimizer("collapse()", optimizer)
  _tree.check_params("collapse()", params)
  _tree.check_state("collapse()", opt_state, TrackHeadsState)
  if hasattr(opt_state, "opt_state"):
    raise TypeError(
      "collapse(opt_state=...) must be the optimizer's state alone, got a "
      f"{type(opt_state).__name__}. Write its .opt_state, or "
      "alrao_jax.linen.collapse(state), or alrao_jax.nnx.collapse(model, optimizer)."
    )
  kept = kept_heads(keep, opt_state, params)
  if kept is None:
    return opt_state, params
  num_heads = need_heads("collapse()", params)
  leaves, treedef = jax.tree_util.tree_flatten_with_path(opt_state)
  fresh = _tree.fresh_shapes(optimizer, params, num_heads)
  _check_state(optimizer, params, leaves, fresh, opt_state)
  if kept == tuple(range(num_heads)):
    return opt_state, params
  # The heads' axis is the one that grows with their number.
  more = _tree.fresh_shapes(optimizer, params, num_heads + 1)
  axes = [
    _heads_axis(path_of(path), *shapes)
    for (path, _), *shapes in zip(leaves, fresh, more, strict=True)
  ]
  sliced = _take([leaf for _, leaf in leaves], axes, kept)
  params = take_heads(params, kept)
  expected = _tree.fresh_shapes(optimizer, params, len(kept))
  for (path, _), leaf, shape in zip(leaves, sliced, expected, strict=True):
    if jnp.shape(leaf) != shape:
      raise _mixed(path_of(path), jnp.shape(leaf), shape)
  opt_state = jax.tree.unflatten(treedef, sliced)
  averagings = iter(averagings_of(optimizer, params))
  opt_state = replace_state(
    opt_state,
    TrackHeadsState,
    # One program for each, as in _take.
    lambda state: jax.jit(functools.partial(_renormalised, next(averagings, None)))(
      state
    ),
  )
  # Fewer heads have another posterior; the units' rates must not jump to it.
  opt_state = replace_state(
    opt_state,
    GatherUnitsState,
    lambda state: state._replace(collapsed=jnp.ones_like(state.collapsed)),
  )
  return opt_state, params


@_checks.refuses_removed
def take_heads(tree: Any, kept: Sequence[int]) -> Any:
  """Returns a tree with only the given heads, such as batch statistics.

  Args:
    tree: Any tree that has the heads' arrays below the key ``alrao_heads``, with the
      heads on axis 0.
    kept: Indices of the heads, in any order: the heads stay sorted.

  Returns:
    The tree with its boxes. What belongs to no head stays as it is.

  Raises:
    ValueError: If indices repeat, or an array has fewer heads.
    TypeError: If the indices are no integers, or are traced.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> batch_stats = {"out": {"alrao_heads": {"mean": jnp.arange(3.0)}}}
    >>> alrao.take_heads(batch_stats, (2, 0))["out"]["alrao_heads"]["mean"].tolist()
    [0.0, 2.0]
  """
  call = "take_heads()"
  _tree.check_tree(call, tree, "tree")

  leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
  axes, chosen = [], ()
  for path, leaf in leaves:
    name = path_of(path)
    if (is_head := head_name(name) is not None) and not jnp.ndim(leaf):
      raise ValueError(f"{call} needs the heads on axis 0, got a scalar at {name!r}.")
    if is_head:
      chosen = _indices(call, "kept", kept, jnp.shape(leaf)[0])
    axes.append(0 if is_head else None)
  sliced = _take([leaf for _, leaf in leaves], axes, chosen)
  return jax.tree.unflatten(treedef, sliced)


def kept_heads(
  keep: int | Sequence[int] | Hopeful, opt_state: Any, params: Any
) -> tuple[int, ...] | None:
  """The indices of the heads that ``keep`` means; arguments as of :func:`collapse`.

  Returns:
    The indices, ascending; None if a rule lets no head leave.
  """
  num_heads = need_heads("collapse()", params)
  if isinstance(keep, Hopeful):
    # One head has nobody to leave: there is no need to wait for the posterior.
    kept = (0,) if num_heads == 1 else best_heads(opt_state, keep)
    return None if len(kept) == num_heads else kept
  if np.ndim(keep):
    return _indices("collapse()", "keep", keep, num_heads)
  _checks.check_count("collapse()", "keep", keep)
  count = operator.index(keep)  # pyright: ignore[reportArgumentType]: checked
  if count > num_heads:
    raise ValueError(
      f"collapse(keep=...) must be at most num_heads = {num_heads}, got {keep}."
    )
  return best_heads(opt_state, count)


def _indices(call, argument, given, num_heads):
  where = f"{call.removesuffix('()')}({argument}=...)"
  try:
    kept = tuple(operator.index(index) for index in given)
  except TypeError:  # jax.errors.TracerIntegerConversionError is one
    raise TypeError(
      f"{where} must be the indices of heads, known before tracing, got {given!r}."
    ) from None
  if not kept or len(set(kept)) < len(kept) or not set(kept) <= set(range(num_heads)):
    raise ValueError(
      f"{where} must be different indices from 0 to {num_heads - 1}, got {kept}."
    )
  return tuple(sorted(kept))  # the ladder of rates ascends


def _fingerprints(optimizer, params):
  """The fingerprints in a fresh state; XLA removes the rest of it."""

  def read():
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    return [state.fingerprint for state in _rate_states(optimizer.init(zeros))]

  return jax.jit(read)()


def _rate_states(opt_state):
  is_rates = lambda node: isinstance(node, ScaleByUnitRatesState)  # noqa: E731
  return filter(is_rates, jax.tree.leaves(opt_state, is_leaf=is_rates))


def _check_state(optimizer, params, leaves, fresh, opt_state):
  rule = "collapse(opt_state=...) must be the optimizer's state for these params, "
  write = "Pass the optimizer, the parameters and the state of one training step."
  if len(leaves) != len(fresh):
    raise ValueError(f"{rule}which has {len(fresh)} arrays, got {len(leaves)}. {write}")
  for (path, leaf), shape in zip(leaves, fresh, strict=True):
    if jnp.shape(leaf) != shape:
      raise ValueError(
        f"{rule}got {path_of(path)!r} of shape {jnp.shape(leaf)} instead of {shape}. "
        f"{write}"
      )
  held = jax.tree.leaves([state.fingerprint for state in _rate_states(opt_state)])
  for old, new in zip(held, _fingerprints(optimizer, params), strict=True):
    if _checks.is_concrete(old) and _checks.is_concrete(new) and int(old) != int(new):
      raise ValueError(f"{rule}got one for parameters of other names. {write}")


def _heads_axis(name, shape, more):
  """The axis of the heads, None if there is none."""
  if shape == more:
    return None
  axes = [
    i for i, sizes in enumerate(zip(shape, more, strict=False)) if len(set(sizes)) > 1
  ]
  if len(shape) != len(more) or len(axes) != 1 or more[axes[0]] != shape[axes[0]] + 1:
    raise _mixed(name, shape, more)
  return axes[0]


def _take(leaves, axes, kept):
  """The kept heads of the arrays that have an axis of heads, and all else as it is."""
  index = np.asarray(kept)

  def take(i, leaf):
    return leaf[(slice(None),) * axes[i] + (index,)]

  of_heads = {i: leaf for i, leaf in enumerate(leaves) if axes[i] is not None}
  taken = {}
  by_devices: dict[Any, dict[int, jax.Array]] = {}
  for i, leaf in of_heads.items():
    if isinstance(leaf, jax.Array):
      traced = isinstance(leaf, jax.core.Tracer)
      devices = None if traced else frozenset(leaf.sharding.device_set)
      by_devices.setdefault(devices, {})[i] = leaf
    else:
      taken[i] = take(i, leaf)
  for arrays in by_devices.values():
    # One program: operation by operation, each would compile alone, for seconds.
    taken |= jax.jit(lambda xs: {i: take(i, x) for i, x in xs.items()})(arrays)
  return [taken.get(i, leaf) for i, leaf in enumerate(leaves)]


def _mixed(name, shape, other):
  return ValueError(
    "collapse() can't take single heads out of a state that mixes them, got "
    f"{name!r} of shape {shape}, which is {other} for another number of heads. Put "
    "the transformation into alrao_jax.per_head(...)."
  )


def _renormalised(averaging, state):
  """Scales the weights of the kept heads so that they sum to one."""
  if isinstance(state.log_weights, Mapping):
    each = by_layer(state)
    return by_name({name: _renormalised(averaging, one) for name, one in each.items()})
  held = state.averaging
  if hasattr(held, "renormalised"):
    held = held.renormalised()
  elif averaging is not None:
    held = renormalised(averaging, held)
  return state._replace(log_weights=log_normalised(state.log_weights), averaging=held)


@_checks.refuses_removed
def export(
  opt_state: Any,
  params: Any,
  *,
  head: int | Mapping[str, int] | None = None,
) -> Any:
  """Returns the parameters of the same model with an ordinary output layer.

  It takes the best head of each MultiHead by the posterior:
  ``<name>/alrao_heads/kernel[j]`` becomes ``<name>/kernel``, to the last bit, and
  everything else stays. The model without MultiHead can load and serve the result, and
  needs nothing of this library. It is the inverse of :func:`load_pretrained`.

  Args:
    opt_state: The optimizer's state; its posterior chooses. It may be None if there is
      one head, after :func:`collapse`, or if ``head`` is given.
    params: Linen's ``params``, whole variables (``batch_stats`` too), an ``nnx.State``,
      or any tree that has the heads below the key ``alrao_heads``. With
      :func:`schedule_free_alrao`, give what :func:`eval_params` returns.
    head: Which head to take instead. For several MultiHeads also a mapping by their
      paths, or by ends that no other path has.

  Returns:
    A tree like ``params`` with its boxes (``nn.Partitioned``, ``nnx.Variable``). Their
    names of axes lack the heads' axis.

  Raises:
    ValueError: If ``params`` has no heads, or has several and neither ``opt_state`` nor
      ``head`` chooses; if ``opt_state`` has a posterior over another number of heads,
      or averages that differ from ``params``; if ``head`` is out of range; if a
      MultiHead has a parameter with the name of a head's parameter.
    TypeError: If ``head`` is no integer; or ``params`` is an optimizer's state, since
      the two are swapped.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"bias": jnp.array([[1.0], [2.0], [3.0]])}}}
    >>> alrao.export(None, params, head=2)
    {'out': {'bias': Array([3.], dtype=float32)}}
  """
  _tree.check_tree("export()", params)
  pick = chosen_heads("export()", opt_state, params, head)

  def visit(path, leaf):
    layer = head_name(path_of(path))
    return leaf if layer is None else one_head(leaf, pick[layer])

  single = jax.tree_util.tree_map_with_path(visit, params, is_leaf=_is_box)
  return jax.tree.map(_splice, single, is_leaf=_holds_heads)


def chosen_heads(call: str, opt_state: Any, params: Any, head: Any) -> dict[str, Any]:
  """Which head to take of each MultiHead, by the MultiHead's path.

  Args:
    call: The call that errors name.
    opt_state: See :func:`export`.
    params: See :func:`export`.
    head: See :func:`export`.

  Returns:
    Indices: Python integers, or scalars if the posterior chooses.
  """
  layers = layers_of(call, params)
  if not layers:
    need_heads(call, params)  # its error
  tracked = [] if opt_state is None else find_states(opt_state, TrackHeadsState)
  if head is None and opt_state is not None:
    tracked = [find_state(opt_state, TrackHeadsState, "track_heads", call)]
  posterior = tracked[0].log_weights if len(tracked) == 1 else None
  several = isinstance(posterior, Mapping)
  names = tuple(posterior) if several else _layer_names(params, layers)
  if head is not None:
    if isinstance(head, Mapping):
      head = match_layers(f"{call[:-1]}head=...)", head, names)
      each = {layer: head[_belongs(call, layer, names)] for layer in layers}
    else:
      each = dict.fromkeys(layers, head)
    return {layer: _given(call, each[layer], n) for layer, n in layers.items()}
  if posterior is None:
    if set(layers.values()) != {1}:
      raise ValueError(
        f"{call} must know which head to take of {layers}. Pass the optimizer's state, "
        "so that its posterior chooses, or head=0 for the first."
      )
    return dict.fromkeys(layers, 0)
  best = {}
  for layer, num_heads in layers.items():
    one = posterior[_belongs(call, layer, names)] if several else posterior
    best[layer] = _best(call, one, layer, num_heads)
  if find_states(opt_state, ScheduleFreeAlraoState):
    _check_averaged(call, params, opt_state)
  return best


def _layer_names(params, layers):
  """The paths of the MultiHeads in linen's ``params``, or as they are."""
  variables = any(
    path.startswith("params/") for path, _ in flatten_with_paths(params)[0]
  )
  inner = (layer.partition("/")[2] or HEADS for layer in layers)
  return tuple(dict.fromkeys(inner)) if variables else tuple(layers)


def _belongs(call, layer, names):
  """The name of a MultiHead, also for a path in a collection of linen's variables."""

  def key(name):
    return HEADS if name == HEADS else f"{name}/{HEADS}"

  fits = [name for name in names if f"/{key(layer)}".endswith(f"/{key(name)}")]
  if not fits:
    raise ValueError(
      f"{call[:-1]}opt_state=...) must know the MultiHead {layer!r}, got {names}. Pass "
      "the state that belongs to these parameters."
    )
  return max(fits, key=len)


def _check_averaged(call, params, opt_state):
  """Refuses parameters that are not the average, which is the result of training."""
  averages = averages_by_path(call, opt_state, params)
  given = dict(flatten_with_paths(params)[0])
  pairs = [(given[path], average) for path, average in averages.items()]
  if not any(isinstance(x, jax.core.Tracer) for pair in pairs for x in pair) and all(
    _same(np.asarray(leaf), np.asarray(jnp.asarray(average, leaf.dtype)))
    for leaf, average in pairs
  ):
    return
  raise ValueError(
    f"{call} needs the averaged parameters, got others than the average that "
    "schedule_free_alrao's state holds (or traced ones, which can't be compared). "
    "Write export(opt_state, eval_params(opt_state, params)), outside of jax.jit; for "
    "parameters of another step, name the head: export(None, params, head=...)."
  )


def _same(one: np.ndarray, other: np.ndarray) -> bool:
  """Whether arrays of one shape are equal; NaN equals NaN, in every dtype."""
  return bool(((one == other) | ((one != one) & (other != other))).all())


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


def _given(call, head, num_heads):
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
  if log_weights.shape != (num_heads,):
    raise ValueError(
      f"{call[:-1]}opt_state=...) must have a posterior over the {num_heads} heads of "
      f"{name!r}, got one over {log_weights.size}. Pass the state that belongs to "
      "these parameters; after collapse(...), pass the state that it returned."
    )
  return jnp.argmax(log_weights)


def _is_box(node):
  # The boxes of Flax know how to drop an axis; no array does.
  return hasattr(node, "remove_axis")


def _holds_heads(node):
  return isinstance(node, Mapping) and HEADS in node


def _splice(node):
  if not _holds_heads(node):
    return node
  inner = {name: node[HEADS][name] for name in node[HEADS]}
  outer = {
    name: jax.tree.map(_splice, node[name], is_leaf=_holds_heads)
    for name in node
    if name != HEADS
  }
  if both := inner.keys() & outer.keys():
    raise ValueError(
      f"export() got the names {sorted(map(str, both))} both in a head and beside its "
      f"MultiHead's {HEADS!r}. Rename those outside the head."
    )
  if not isinstance(node, MutableMapping):
    return type(node)({**outer, **inner})
  # An nnx.State takes States into itself by item assignment only.
  make: Any = type(node)
  merged = make({})
  merged.update({**outer, **inner})
  return merged
