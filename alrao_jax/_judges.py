"""Judges: examples that do not train, and alone tell the posterior of the heads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import check_count


def judges(index: Any, one_in: int = 16) -> Any:
  r"""Tells which examples judge the heads and do not train.

  A posterior that sees only what trains drifts to heads that overfit, since the
  training loss goes on falling. Judges come out of the training data, as held-out data
  would, but need no pass of their own: give the mask to the loss::

    judges = alrao.judges(index, one_in=16)
    loss, info = alrao.classification_loss(heads, labels, log_weights, judges=judges)

  Of every ``one_in`` neighbours in the data set exactly one judges, the same one in
  every pass and on every machine. A hash of the neighbourhood's number chooses it, so
  that nothing is kept.

  Args:
    index: Where the examples are in the data set, integers of any shape: a number that
      belongs to an example, whatever the order in which it comes. Copies of an example
      (other crops) must have its number, or it would judge what it trains.
    one_in: How many examples have one judge, at least 2.

  Returns:
    A bool mask in the shape of ``index``, a NumPy array for a NumPy array, else a JAX
    array.

  Raises:
    TypeError: If ``index`` holds no integers, or ``one_in`` is none.
    ValueError: If ``one_in`` is below 2.

  Example:
    >>> import alrao_jax as alrao, numpy as np
    >>> alrao.judges(np.arange(12), one_in=4).astype(int)
    array([0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 0])
  """
  check_count("judges()", "one_in", one_in)
  if one_in < 2:
    raise ValueError(
      f"judges(one_in=...) must be at least 2, got {one_in}: judges do not train."
    )
  if not isinstance(index, (jax.Array, np.ndarray)):
    index = np.asarray(index)
  if not jnp.issubdtype(index.dtype, jnp.integer):
    raise TypeError(
      f"judges(index=...) must be integers, got {index.dtype}: each example's place in "
      "the data set."
    )
  xp: Any = jnp if isinstance(index, jax.Array) else np
  if index.dtype.itemsize < 4:
    index = index.astype(xp.int32)  # may not hold one_in
  neighbours = index // one_in
  with np.errstate(over="ignore"):  # the products wrap around
    chosen = _hash(neighbours.astype(xp.uint32), xp) % xp.uint32(one_in)
  return (index - neighbours * one_in).astype(xp.uint32) == chosen


def _hash(x: Any, xp: Any) -> Any:
  """Mixes the bits of uint32 numbers.

  The finaliser ``lowbias32`` of C. Wellons's hash-prospector, in the public domain.
  """
  x = x + xp.uint32(0x9E3779B9)  # or 0 would stay 0
  x = (x ^ (x >> xp.uint32(16))) * xp.uint32(0x7FEB352D)
  x = (x ^ (x >> xp.uint32(15))) * xp.uint32(0x846CA68B)
  return x ^ (x >> xp.uint32(16))


def judge_mask(call: str, judges: Any, shape: tuple[int, ...]) -> jax.Array:
  """The mask for every example of a batch.

  Args:
    call: The loss.
    judges: Its argument, a bool array.
    shape: The examples' shape, which that of ``judges`` must begin.

  Returns:
    The mask in the shape of the examples.

  Raises:
    TypeError: If it is not bool.
    ValueError: If it has another shape.
  """
  call = call.removesuffix("()")
  if not hasattr(judges, "dtype"):
    judges = np.asarray(judges)
  if judges.dtype != bool:
    raise TypeError(
      f"{call}(judges=...) must be a bool mask, got {judges.dtype}: write "
      "judges=alrao_jax.judges(index), with each example's place in the data set."
    )
  if judges.shape != shape[: judges.ndim] or not judges.ndim:
    raise ValueError(
      f"{call}(judges=...) must have the shape of the examples, {shape}, or of their "
      f"first axes, got {judges.shape}."
    )
  mask = jnp.asarray(judges).reshape(judges.shape + (1,) * (len(shape) - judges.ndim))
  return jnp.broadcast_to(mask, shape)
