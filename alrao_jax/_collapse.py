"""Fewer heads while training goes on: the best are kept, the rest cost nothing more."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks
from ._averaging import BayesState, FixedShareState, SwitchState
from ._heads import TrackHeadsState
from ._leader import best_heads
from ._paths import HEADS_REGEX, flatten_with_paths, head_name, path_of
from ._state import replace_state
from ._transform import ScaleByUnitRatesState


def collapse(
  optimizer: optax.GradientTransformation,
  params: Any,
  opt_state: Any,
  keep: int | Sequence[int] = 1,
  *,
  heads: str = HEADS_REGEX,
) -> tuple[Any, Any]:
  """Keeps the best heads of the parameters and of the optimizer's state.

  Training then goes on with the same model, the same optimizer and the same training
  step, which compiles once more, and costs what the kept heads cost. A kept head goes
  on as it was: its parameters, momenta and averages and the quantile of its learning
  rate stay to the last bit. The posterior is renormalised over the kept heads. The body
  changes in nothing: its arrays are those of the arguments, not copies, so a step that
  donates the new state's buffers ends the old state's too. With all heads kept,
  everything is returned as it is.

  Several MultiHeads keep the same heads, since one ladder of rates serves them all: by
  default those that are best in the product of their posteriors.

  A head's other state (batch statistics, random streams) is sliced by
  :func:`take_heads`. ``alrao_jax.linen.collapse`` does it all for a ``TrainState``, and
  ``alrao_jax.nnx.collapse`` for a model with its ``nnx.Optimizer``.

  Args:
    optimizer: The optimizer. Its ``init`` tells which axes of its state are the
      heads', and runs on shapes only.
    params: The parameters, as the optimizer is given them.
    opt_state: The optimizer's state.
    keep: How many heads, the best by the posterior; or the indices of the heads to
      keep, in any order: the heads stay sorted, slowest first. Inside ``jax.jit``,
      where the posterior is not yet known, only indices.
    heads: Regular expression for the paths of the heads' parameters, as the optimizer
      was given it.

  Returns:
    The new ``params`` and ``opt_state``, boxes kept (``nn.Partitioned``,
    ``nnx.Variable``).

  Raises:
    ValueError: ``params`` has no heads, or fewer than ``keep``; indices repeat or are
      out of range; ``opt_state`` is not the optimizer's for these ``params``; a
      transformation's state mixes the heads, so that none can be taken out.
    TypeError: ``keep`` is neither a number nor indices, or is traced.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"kernel": jnp.ones((10, 3, 2))}}}
    >>> optimizer = alrao.alrao(jax.random.key(0))
    >>> opt_state = optimizer.init(params)
    >>> params, opt_state = alrao.collapse(optimizer, params, opt_state, keep=1)
    >>> params["out"]["alrao_heads"]["kernel"].shape
    (1, 3, 2)
  """
  kept = kept_heads(keep, params, opt_state, heads)
  num_heads = _count_heads(params, heads)
  leaves, treedef = jax.tree_util.tree_flatten_with_path(opt_state)
  fresh = fresh_shapes(optimizer, params, num_heads, heads)
  _check_state(optimizer, params, leaves, fresh, opt_state)
  if kept == tuple(range(num_heads)):
    return params, opt_state
  # The heads' axis is the one that grows with their number.
  more = fresh_shapes(optimizer, params, num_heads + 1, heads)
  sliced = [
    _take(leaf, _heads_axis(path_of(path), *shapes), kept, num_heads)
    for (path, leaf), *shapes in zip(leaves, fresh, more, strict=True)
  ]
  params = take_heads(params, kept, heads=heads)
  expected = fresh_shapes(optimizer, params, len(kept), heads)
  for (path, _), leaf, shape in zip(leaves, sliced, expected, strict=True):
    if jnp.shape(leaf) != shape:
      raise _mixed(path_of(path), jnp.shape(leaf), shape)
  opt_state = jax.tree.unflatten(treedef, sliced)
  opt_state = replace_state(opt_state, TrackHeadsState, _renormalised)
  prints = iter(_fingerprints(optimizer, params))
  return params, replace_state(
    opt_state,
    ScaleByUnitRatesState,
    lambda state: state._replace(fingerprint=next(prints)),
  )


def take_heads(tree: Any, kept: Sequence[int], *, heads: str = HEADS_REGEX) -> Any:
  """Returns a tree with only the given heads: of batch statistics, of averages.

  Args:
    tree: Any tree in which the heads' arrays lie below their key, ``alrao_heads``,
      with the heads on axis 0.
    kept: Indices of the heads, in any order: the heads stay sorted.
    heads: Regular expression for the paths of the heads' arrays.

  Returns:
    The tree, boxes kept; all that belongs to no head as it was.

  Raises:
    ValueError: Indices repeat, or an array has not that many heads.
    TypeError: The indices are no integers, or are traced.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> batch_stats = {"out": {"alrao_heads": {"mean": jnp.arange(3.0)}}}
    >>> alrao.take_heads(batch_stats, (2, 0))["out"]["alrao_heads"]["mean"].tolist()
    [0.0, 2.0]
  """
  call = "take_heads()"

  def take(path, leaf):
    name = path_of(path)
    if head_name(name, heads) is None:
      return leaf
    if not jnp.ndim(leaf):
      raise ValueError(f"{call} needs the heads on axis 0, got a scalar at {name!r}.")
    num_heads = jnp.shape(leaf)[0]
    return _take(leaf, 0, _indices(call, "kept", kept, num_heads), num_heads)

  return jax.tree_util.tree_map_with_path(take, tree)


def kept_heads(
  keep: int | Sequence[int], params: Any, opt_state: Any, heads: str
) -> tuple[int, ...]:
  """The indices of the heads that ``keep`` means; arguments as of :func:`collapse`."""
  num_heads = _count_heads(params, heads)
  if np.ndim(keep):
    return _indices("collapse()", "keep", keep, num_heads)
  _checks.check_count("collapse()", "keep", keep)
  count = operator.index(keep)  # pyright: ignore[reportArgumentType]: checked
  if count > num_heads:
    raise ValueError(
      f"collapse(keep=...) must be at most num_heads = {num_heads}, got {keep}."
    )
  return best_heads(opt_state, count)


def _count_heads(params, heads):
  found = {
    path: jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0
    for path, leaf in flatten_with_paths(params)[0]
    if head_name(path, heads) is not None
  }
  if len(set(found.values())) != 1:
    raise ValueError(
      f"collapse(params=...) must have heads, all of one number, got {found or 'none'}"
      f" below {heads!r}."
    )
  return next(iter(found.values()))


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


def fresh_shapes(optimizer, params, num_heads, heads):
  """The shapes of a fresh state's leaves if there were ``num_heads`` heads."""

  def shape(path, leaf):
    is_head = head_name(path_of(path), heads) is not None
    shape = (num_heads, *leaf.shape[1:]) if is_head else leaf.shape
    return jax.ShapeDtypeStruct(shape, leaf.dtype)

  shapes = jax.tree_util.tree_map_with_path(shape, params)
  return [x.shape for x in jax.tree.leaves(jax.eval_shape(optimizer.init, shapes))]


def _fingerprints(optimizer, params):
  """The fingerprints in a fresh state; all else of it is dead code."""

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
  """The axis along which the heads stand first, None if there is none."""
  if shape == more:
    return None
  axes = [
    i for i, sizes in enumerate(zip(shape, more, strict=False)) if len(set(sizes)) > 1
  ]
  if len(shape) != len(more) or len(axes) != 1 or more[axes[0]] != shape[axes[0]] + 1:
    raise _mixed(name, shape, more)
  return axes[0]


def _take(leaf, axis, kept, num_heads):
  if axis is None:
    return leaf
  # The vector of rates has those of all other units behind the heads'.
  index = np.asarray((*kept, *range(num_heads, jnp.shape(leaf)[axis])))
  return leaf[(slice(None),) * axis + (index,)]


def _mixed(name, shape, other):
  return ValueError(
    "collapse() can't take single heads out of a state that mixes them, got "
    f"{name!r} of shape {shape}, which is {other} for another number of heads. Put "
    "the transformation into alrao_jax.per_head(...)."
  )


def _renormalised(state):
  """Scales the weights of the kept heads so that they sum to one."""
  if isinstance(state.log_weights, Mapping):
    each = {
      name: _renormalised(TrackHeadsState(state.log_weights[name], averaging))
      for name, averaging in state.averaging.items()
    }
    return TrackHeadsState(
      {name: one.log_weights for name, one in each.items()},
      {name: one.averaging for name, one in each.items()},
    )
  averaging = state.averaging
  if isinstance(averaging, SwitchState):
    # Without any weight, all is in beta: so it is where nothing switches (theta 0).
    empty = jnp.full_like(averaging.alpha, -jnp.inf)
    alpha, beta = _log_normalised(
      jnp.stack([averaging.alpha, averaging.beta]),
      jnp.stack([empty, _uniform(averaging.beta)]),
    )
    averaging = averaging._replace(alpha=alpha, beta=beta)
  elif isinstance(averaging, (BayesState, FixedShareState)):
    weights = averaging.log_weights
    averaging = averaging._replace(log_weights=_log_normalised(weights))
  return TrackHeadsState(_log_normalised(state.log_weights), averaging)


def _log_normalised(log_weights, otherwise=None):
  """Log-weights that sum to one, equal ones if the kept heads had no weight at all."""
  total = jax.nn.logsumexp(log_weights)
  otherwise = _uniform(log_weights) if otherwise is None else otherwise
  return jnp.where(jnp.isfinite(total), log_weights - total, otherwise)


def _uniform(log_weights):
  return jnp.full_like(log_weights, -math.log(log_weights.size))
