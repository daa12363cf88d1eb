"""Checks of arguments, aware of tracers, and packages that only some functions need."""

import functools
import importlib
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax


def is_concrete(value: Any) -> bool:
  """Whether ``value`` is a number (or an array of numbers) that can be looked at.

  Args:
    value: Anything.

  Returns:
    False for tracers, and for what is no number at all (``None``, text, functions).
  """
  return not isinstance(value, jax.core.Tracer) and _as_numbers(value) is not None


def check_positive(call: str, name: str, value: Any) -> None:
  """Refuses values that are zero, negative, infinite or NaN.

  Args:
    call: The call that the message names, such as ``"alrao()"``.
    name: The argument's name.
    value: A number, or an array of which every entry must obey.

  Raises:
    ValueError: The value breaks the rule.
    TypeError: The value is no number.
  """
  numbers = _numbers(call, name, value)
  if numbers is None:
    return
  if not np.all(numbers > 0):  # NaN compares false, so it is refused too
    raise ValueError(f"{_where(call, name)} must be positive, got {value}.")
  _check_finite(call, name, value, numbers)


def check_non_negative(call: str, name: str, value: Any) -> None:
  """Refuses values that are negative, infinite or NaN.

  Args:
    call: The call that the message names, such as ``"alrao()"``.
    name: The argument's name.
    value: A number, or an array of which every entry must obey.

  Raises:
    ValueError: The value breaks the rule.
    TypeError: The value is no number.
  """
  numbers = _numbers(call, name, value)
  if numbers is None:
    return
  if not np.all(numbers >= 0):
    raise ValueError(f"{_where(call, name)} must not be negative, got {value}.")
  _check_finite(call, name, value, numbers)


def check_interval(
  call: str,
  low: Any,
  high: Any,
  *,
  names: tuple[str, str] = ("min_learning_rate", "max_learning_rate"),
) -> None:
  """Refuses an interval that is not ``0 < low <= high``, in the range of float32.

  Args:
    call: The call that the message names, such as ``"alrao()"``.
    low: The lower bound.
    high: The upper bound; equal bounds are an interval too.
    names: What the two arguments are called.

  Raises:
    ValueError: A bound breaks the rule, or the bounds are reversed.
    TypeError: A bound is no number.
  """
  check_positive(call, names[0], low)
  check_positive(call, names[1], high)
  lows, highs = _numbers(call, names[0], low), _numbers(call, names[1], high)
  if lows is not None and highs is not None and np.any(lows > highs):
    raise ValueError(
      f"{_where(call, names[0])} must not be above {names[1]}, got {low} and {high}: "
      "write the lower bound first."
    )
  smallest, largest = np.finfo(np.float32).tiny, np.finfo(np.float32).max
  for name, value, numbers in ((names[0], low, lows), (names[1], high, highs)):
    if numbers is not None and not np.all((smallest <= numbers) & (numbers <= largest)):
      raise ValueError(
        f"{_where(call, name)} must be in the range of float32, {smallest:.1e} to "
        f"{largest:.1e}, got {value}."
      )


def check_probability(call: str, name: str, value: Any, *, open: bool = False) -> None:
  """Refuses values outside ``[0, 1]``, or outside ``(0, 1)`` if ``open``.

  Args:
    call: The call that the message names, such as ``"switch()"``.
    name: The argument's name.
    value: A number, or an array of which every entry must obey.
    open: Whether the two ends are refused.

  Raises:
    ValueError: The value breaks the rule.
    TypeError: The value is no number.
  """
  numbers = _numbers(call, name, value)
  if numbers is None:
    return
  if open:
    inside, interval = (numbers > 0) & (numbers < 1), "strictly between 0 and 1"
  else:
    inside, interval = (numbers >= 0) & (numbers <= 1), "between 0 and 1"
  if not np.all(inside):
    raise ValueError(f"{_where(call, name)} must be {interval}, got {value}.")


def check_count(call: str, name: str, value: Any) -> None:
  """Refuses what is not an integer of 1 or more, known before tracing.

  A count fixes shapes. So, unlike the other checks, this one refuses tracers too.

  Args:
    call: The call that the message names, such as ``"MultiHead()"``.
    name: The argument's name.
    value: A Python or NumPy integer; a bool is none.

  Raises:
    ValueError: The integer is below 1.
    TypeError: The value is no integer, or a traced one.
  """
  where = _where(call, name)
  if isinstance(value, jax.core.Tracer):
    raise TypeError(
      f"{where} must be an integer known before tracing, got {value}: it fixes the "
      "shapes, so don't pass it through jit or inject_hyperparams."
    )
  try:
    count = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
  except TypeError:
    count = None
  if count is None:
    raise TypeError(f"{where} must be an integer, got {_shown(value)}.")
  if count < 1:
    raise ValueError(f"{where} must be at least 1, got {value}.")


def check_key(call: str, key: Any) -> None:
  """Refuses what is not one PRNG key: ``jax.random.key(0)`` or ``PRNGKey(0)``.

  Args:
    call: The call that the message names, such as ``"alrao()"``.
    key: A typed key of shape ``()``, or an old-style one: uint32, shape ``(2,)`` or
      ``(4,)``. Tracers of either pass.

  Raises:
    TypeError: It is something else (a seed, an optimizer).
    ValueError: It is an array of several keys.
  """
  where = _where(call, "key")
  write = f"write {call.removesuffix('()')}(jax.random.key(0), ...)"
  dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
  if dtype is None or shape is None:
    if isinstance(key, int) and not 0 <= key < 2**32:
      # Without x64, JAX takes the seed modulo 2**32 and says nothing.
      write += ", with a seed from 0 to 2**32 - 1"
    raise TypeError(f"{where} must be a PRNG key, got {_shown(key)}: {write}.")
  if jnp.issubdtype(dtype, jax.dtypes.prng_key):
    single = shape == ()
  elif dtype == np.uint32 and shape and shape[-1] in (2, 4):
    single = len(shape) == 1
  else:
    raise TypeError(
      f"{where} must be a PRNG key, got an array of {dtype} and shape {shape}: {write}."
    )
  if not single:
    raise ValueError(
      f"{where} must be one PRNG key, got an array of keys with shape {shape}: index "
      "it, or use jax.vmap over the keys."
    )


def check_parameter(path: str, leaf: Any) -> None:
  """Refuses a leaf of the parameters that can't be trained.

  Args:
    path: Where it is in the tree, for the error.
    leaf: An array, a tracer or a ``jax.ShapeDtypeStruct``.

  Raises:
    TypeError: It is no array, or an array of another dtype than floating.
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
  if jnp.issubdtype(dtype, jnp.floating):
    return
  got = (
    f"Parameters must be of a floating dtype, got {path!r} of shape "
    f"{tuple(leaf.shape)} and dtype {dtype}."
  )
  keep = (
    f"keep them out of the tree that the optimizer is given, for instance by {equinox},"
    " optax.masked or nnx.Optimizer(..., wrt=nnx.Param)."
  )
  if jnp.issubdtype(dtype, jnp.complexfloating):
    raise TypeError(
      f"{got} Complex parameters can't be trained: make a parameter each of the real "
      "and the imaginary part, and join them in the model by jax.lax.complex."
    )
  if jnp.issubdtype(dtype, jax.dtypes.prng_key):
    raise TypeError(f"{got} Random keys can't be trained: {keep}")
  if dtype == np.bool_:
    raise TypeError(f"{got} Masks can't be trained: {keep}")
  raise TypeError(f"{got} Parameters of integer dtype can't be trained: {keep}")


def check_tree(
  call: str, tree: Any, name: str = "params", *, models: bool = False
) -> None:
  """Refuses what is often given in the place of a tree of arrays.

  Args:
    call: The call that the message names, such as ``"export()"``.
    tree: A model, an optimizer or its state raise; any other tree passes.
    name: The argument's name.
    models: Whether an nnx model passes, too.

  Raises:
    TypeError: It is one of these.
  """
  if is_a(tree, "flax.nnx", "Module"):
    if models:
      return
    what, write = "an nnx model", f"nnx.state(model, nnx.Param) for {name}"
    if (ours := _NNX.get(_name(call))) is not None:
      write = f"{ours}, or {write}"
  elif is_a(tree, "flax.linen", "Module"):
    what, write = "a linen module", 'model.init(key, inputs)["params"]'
  elif is_a(tree, "flax.nnx", "Optimizer"):
    what, write = "an nnx.Optimizer", "nnx.state(model, nnx.Param)"
  elif hasattr(tree, "params") and hasattr(tree, "opt_state"):
    what, write = f"a {type(tree).__name__}", f"state.params for {name}"
    if (ours := _LINEN.get(_name(call))) is not None:
      write = f"{ours}, or {write}"
  elif _is_optimizer(tree):
    what, write = "an optimizer", _signature(call)
  elif _holds_states(tree):
    what, write = "an optimizer's state", _signature(call)
  else:
    return
  raise TypeError(
    f"{_where(call, name)} must be a tree of arrays, got {what}. Write {write}."
  )


def check_params(call: str, params: Any) -> None:
  """Refuses parameters that can't be trained; see :func:`check_parameter`.

  Args:
    call: The call that the message names, such as ``"collapse()"``.
    params: A tree of arrays or of ``jax.ShapeDtypeStruct``.

  Raises:
    TypeError: It is a model, an optimizer, a state; or has a leaf that is no array of a
      floating dtype.
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
    TypeError: It is something else.
  """
  if _is_optimizer(optimizer):
    return
  write = _signature(call)
  if is_a(optimizer, "flax.nnx", "Optimizer"):
    write += " with optimizer.tx"
    if (ours := _NNX.get(_name(call))) is not None:
      write = f"{ours}, or {write}"
  raise TypeError(
    f"{_where(call, 'optimizer')} must be an optax optimizer, got "
    f"{_shown(optimizer)}. Write {write}."
  )


def check_state(call: str, state: Any, kind: type) -> None:
  """Refuses what holds no ``kind``, where it can be told what it is instead.

  Args:
    call: The call that the message names, such as ``"log_weights()"``.
    state: An optimizer's state passes, also if it holds no ``kind``.
    kind: The type of state that is needed, a NamedTuple.

  Raises:
    TypeError: It is a state that was restored without its types, parameters, a model,
      an optimizer.
  """
  if isinstance(state, kind):
    return
  nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
  if any(isinstance(node, kind) for node in nodes):
    return
  where, write = _where(call, "opt_state"), _signature(call)
  rule = f"{where} must be an optimizer's state, got"
  if is_a(state, "flax.nnx", "Module"):
    ours = _NNX.get(_name(call), f"{write} with optimizer.opt_state")
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
    raise TypeError(f"{rule} {_shown(state)}. Write {write}.")
  if not isinstance(state, (tuple, list)) and not _holds_states(state):
    raise TypeError(
      f"{rule} a {type(state).__name__}, as parameters are. Write {write}."
    )


def checked(
  call: str, tx: optax.GradientTransformationExtraArgs, kind: type
) -> optax.GradientTransformationExtraArgs:
  """The same transformation, with checks of what its two functions are given.

  Args:
    call: The factory that the messages name, such as ``"alrao()"``.
    tx: The transformation.
    kind: A type that its state holds.

  Returns:
    ``tx`` in all else; its state is that of ``tx``.
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


# How the arguments of a call are ordered, for those that were swapped.
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


# What to write for an nnx model, where there is more to it than its parameters.
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


def _name(call: str) -> str:
  return call.removesuffix("()").rpartition(".")[2]


def _signature(call: str) -> str:
  return _SIGNATURES.get(_name(call), call)


def is_a(value: Any, package: str, name: str) -> bool:
  """Whether a class of this name in a package that is not imported here made it."""
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
  """Whether a state of optax or of this library is somewhere in a tree."""

  def is_state(node):
    package = type(node).__module__.partition(".")[0]
    return (
      isinstance(node, tuple)
      and package in ("optax", __name__.partition(".")[0])
      and not isinstance(node, optax.MaskedNode)
    )

  return any(map(is_state, jax.tree.leaves(tree, is_leaf=is_state)))


def _is_raw(state: Any, kind: Any) -> bool:
  """Whether it is a state whose NamedTuples became dicts, and tuples perhaps lists."""
  if isinstance(state, Mapping):
    if set(kind._fields) <= set(map(str, state)):
      return True
    children = list(state.values())
  elif isinstance(state, (list, tuple)):
    children = list(state)
  else:
    return False
  return any(_is_raw(child, kind) for child in children)


def _where(call: str, name: str) -> str:
  return f"{call.removesuffix('()')}({name}=...)"


def _shown(value: Any) -> str:
  """A value in an error message: short, with its type where the type is the matter."""
  kind = type(value).__name__
  if isinstance(value, (bool, int, float, str)):
    return f"{value!r} of type {kind}"
  return f"a value of type {kind}"


def _as_numbers(value: Any) -> np.ndarray | None:
  """The value in float64, or None if it is no number and no array of numbers."""
  if value is None or isinstance(value, (str, bytes)) or callable(value):
    return None
  try:
    return np.asarray(value).astype(np.float64)
  except (TypeError, ValueError):
    return None


def _numbers(call: str, name: str, value: Any) -> np.ndarray | None:
  """The value to look at, or None for a tracer.

  Raises:
    TypeError: The value is no number.
  """
  if isinstance(value, jax.core.Tracer):
    return None
  numbers = _as_numbers(value)
  if numbers is None:
    raise TypeError(f"{_where(call, name)} must be a number, got {_shown(value)}.")
  return numbers


def _check_finite(call: str, name: str, value: Any, numbers: np.ndarray) -> None:
  if not all(map(math.isfinite, numbers.flat)):
    raise ValueError(f"{_where(call, name)} must be finite, got {value}.")


def optional(call: str, module: str, instead: str) -> Any:
  """Imports a module of a package that alrao_jax doesn't depend on.

  Args:
    call: What needs it, for the error, such as ``"Report.plot()"``.
    module: The module, ``"rich.table"``.
    instead: What does without it, for the error.

  Returns:
    The module.

  Raises:
    ImportError: The package is not installed.

  Example:
    >>> optional("median()", "statistics", "sorted() does without.").median([3, 1, 2])
    2
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.partition(".")[0]
    raise ImportError(
      f"{call} needs {package}, which can't be imported ({error}). Write pip install "
      f"{package}; {instead}"
    ) from error


# Keywords that were taken out, and what to write instead.
_REMOVED = {
  "overrides": "write units=alrao_jax.UnitOptions(overrides=...)",
  "strict": "write units=alrao_jax.UnitOptions(strict=...)",
  "unit_axis": "write units=alrao_jax.UnitOptions(unit_axis=...)",
  "granularity": (
    "write units=alrao_jax.UnitOptions(overrides=(('', 'per_weight'),)), which gives "
    "every weight its own rate"
  ),
  "redraw": (
    "rates are drawn once; for the papers' control, initialise scale_by_unit_rates "
    "with a new key in every step"
  ),
  "names": (
    "leave it out: with several MultiHeads, posteriors and head_log_likelihoods go by "
    "their paths"
  ),
  "heads": (
    "leave it out: the heads' parameters are those below the key 'alrao_heads', as "
    "alrao_jax.linen.MultiHead and alrao_jax.nnx.MultiHead name them"
  ),
}

_P = ParamSpec("_P")
_R = TypeVar("_R")


def refuses_removed(function: Callable[_P, _R]) -> Callable[_P, _R]:
  """Decorates a function that once had more keywords: it says what to write instead.

  Example:
    >>> refuses_removed(lambda tree: tree)(tree=3)
    3
  """
  taken = inspect.signature(function).parameters

  @functools.wraps(function)
  def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
    refuse_removed(f"{function.__name__}()", kwargs, taken)
    return function(*args, **kwargs)

  return checked


def refuse_removed(call: str, given: Mapping[str, Any], taken: Any = ()) -> None:
  """Refuses keywords that were taken out.

  Args:
    call: The call that the message names, such as ``"alrao()"``.
    given: The keywords that it got.
    taken: The names that it does take.

  Raises:
    TypeError: There is one; the message says what to write instead.
  """
  for name in given:
    if name in _REMOVED and name not in taken:
      raise TypeError(f"{_where(call, name)} was removed: {_REMOVED[name]}.")
