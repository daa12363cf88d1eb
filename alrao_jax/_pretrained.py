"""From an ordinary model's parameters to those of the same model with many heads."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from ._paths import HEADS, flatten_with_paths

PyTree = Any


def load_pretrained(
  params: PyTree, pretrained: PyTree, *, keep: Sequence[str] = ()
) -> PyTree:
  """Copies an ordinary model's parameters; its output layer goes into all heads.

  The papers start the heads as clones of one output layer, and so does fine-tuning:
  ``<name>/kernel`` of the ordinary model is copied to each head of
  ``<name>/alrao_heads/kernel``, everything else by its path. Trees are compared by
  "/"-joined paths, so a linen tree may have boxes (``nn.Partitioned``) or not, and an
  ``nnx.State`` may hold Variables or pure arrays. Random streams (a key and its
  counter, as of ``nnx.Dropout``) stay as ``params`` has them, so that each head keeps
  its own dropout masks.

  Args:
    params: what the model with MultiHead has: linen's ``params``, whole variables
      (``batch_stats`` are copied likewise), an ``nnx.State``, or any pytree of arrays
      or ``jax.ShapeDtypeStruct``.
    pretrained: the same of the ordinary model, with the same dtypes.
    keep: regular expressions, looked for in the paths of the ordinary model. What
      matches stays as ``params`` has it; an output layer for other classes, say.

  Returns:
    A tree of the type, structure and sharding of ``params``. All its arrays are new,
    those that stay as ``params`` has them too: either tree may be donated.

  Raises:
    ValueError: paths are missing or left over, shapes differ, a regular expression of
      ``keep`` matches nothing, or what stays as ``params`` has it is a
      ``jax.ShapeDtypeStruct``.
    TypeError: dtypes differ, a leaf is no array, or ``keep`` is a string.

  Example:
    >>> import jax.numpy as jnp, alrao_jax
    >>> params = {"out": {"alrao_heads": {"bias": jnp.zeros((3, 2))}}}
    >>> pretrained = {"out": {"bias": jnp.array([1.0, 2.0])}}
    >>> loaded = alrao_jax.load_pretrained(params, pretrained)
    >>> loaded["out"]["alrao_heads"]["bias"].tolist()
    [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]
  """
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
      f"load_pretrained() needs equal shapes, got {_listed(shapes)}. An output layer "
      "for other classes starts afresh with keep=('^<its name>/',)."
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
      "output layer; keep=(...) lists what shall stay as it is."
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
