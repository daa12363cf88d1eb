"""The statistics of batch normalisation, recomputed for other parameters."""

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A running average r becomes m r + (1 - m) s with a batch's statistic s, and the
# network's outputs in training mode don't depend on r. So a huge r, a power of 2, tells
# m, and r = 0 tells s. Its square must not overflow where r is no running average.
_HUGE = 2.0**50


def recomputed(
  call: str,
  update: Callable[..., Any],
  known: Hashable,
  stats: Any,
  others: Any,
  batches: Iterable[Any],
) -> Any:
  """The mean of the batches' own statistics, in place of running averages.

  Args:
    call: The call that messages name.
    update: A pure function of `known`, statistics, `others` and a batch that returns
      the statistics after one forward pass in training mode. It is compiled once for
      each `known`.
    known: What it needs besides arrays.
    stats: A tree of arrays. What is no running average stays.
    others: All other arrays.
    batches: Pytrees of arrays with the examples on axis 0, whose numbers are weights.

  Returns:
    A tree like ``stats``, of new arrays.

  Raises:
    ValueError: If there is no batch, or no running average that a pass moves.
  """
  leaves, treedef = jax.tree.flatten(stats)

  def step(leaves, batch):
    return _step(update, known, treedef, leaves, others, batch)

  kept: list[float | None] = []
  sums: list[Any] = []
  start, total = leaves, 0
  for batch in batches:
    if not kept:
      probed = step([_filled(leaf, _HUGE) for leaf in leaves], batch)
      kept = [_decay(leaf, new) for leaf, new in zip(leaves, probed, strict=True)]
      start = [
        leaf if m is None else _filled(leaf, 0.0)
        for leaf, m in zip(leaves, kept, strict=True)
      ]
      sums = [0.0] * len(leaves)
    size = _num_examples(batch)
    total += size
    for number, new in enumerate(step(start, batch)):
      if kept[number] is not None:
        # At least float32, and on the devices where the statistics are.
        sums[number] += size * new.astype(jnp.promote_types(new.dtype, jnp.float32))
  if not total:
    raise ValueError(f"{call} needs at least one batch, got none.")
  if all(m is None for m in kept):
    raise ValueError(
      f"{call} found no running average that a forward pass moves: forward must call "
      "the model in training mode, in linen with mutable=['batch_stats']."
    )
  return treedef.unflatten(
    [
      jnp.array(leaf if m is None else sum / (total * (1 - m)), leaf.dtype)
      for leaf, m, sum in zip(leaves, kept, sums, strict=True)
    ]
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(update, known, treedef, leaves, others, batch):
  new = update(known, treedef.unflatten(leaves), others, batch)
  return jax.tree.leaves(new)


def _filled(leaf: Any, value: float) -> Any:
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    return leaf
  return jnp.full_like(leaf, value)


def _decay(leaf: Any, new: Any) -> float | None:
  """The share of a running average that a step keeps; None if it is none, or stands."""
  if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.size:
    return None
  shares = np.asarray(new) / np.asarray(_HUGE, new.dtype)
  found, counts = np.unique(shares[np.isfinite(shares)], return_counts=True)
  # A few channels may have diverged, or be so large that they change the share.
  if not counts.size or 2 * counts.max() <= shares.size:
    return None
  share = found[counts.argmax()]
  # The shortest decimal that rounds to it: 1 - 0.999 of float32 has lost digits.
  return float(str(share)) if 0 <= share < 1 else None


def _num_examples(batch: Any) -> int:
  arrays = [leaf for leaf in jax.tree.leaves(batch) if np.ndim(leaf)]
  return np.shape(arrays[0])[0] if arrays else 1
