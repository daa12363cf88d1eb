"""The rules that read a parameter's units from names and shapes."""

import re
from collections.abc import Collection, Mapping
from itertools import combinations
from typing import NamedTuple

from . import _cells
from ._cells import BIASES, KERNELS, Shape, first_below

_SCALES = ("scale", "gamma", "beta", "offset", *BIASES)
_EMBEDDING = re.compile(r"embed|(^|_)(cls|tokens?)$|^w[tp]e$|^lora_[ab]$")


class Reading(NamedTuple):
  """What a rule says of a parameter.

  Attributes:
    axes: The axes that index the units.
    tiles: How many times the units are repeated along the last of ``axes``.
    rule: The rule, in words.
    assumed: Whether no rule knew the parameter.
  """

  axes: Shape
  rule: str
  tiles: int = 1
  assumed: bool = False


class Rules:
  """The rules, applied to one tree.

  Args:
    shapes: The shape of every parameter by path.
    unit_axis: ``"last"`` or ``"first"``.
    given: The paths of parameters whose units are given by overrides; a bias beside
      such a kernel is not compared with it.
  """

  def __init__(
    self, shapes: Mapping[str, Shape], unit_axis: str, given: Collection[str]
  ):
    children = _cells.children_of(shapes)
    self._shapes = shapes
    self._first = unit_axis == "first"
    self._given = given
    self._cells = _cells.cell_leaves(shapes, children)
    self._attention = _cells.attention_kernels(shapes, children)
    self._weight_norms = _cells.weight_norms(shapes, children)

  def group(self, path: str) -> str:
    """The group that a parameter joins if its units have the group's shape."""
    if path in self._cells:
      return self._cells[path].cell
    if path in self._weight_norms:
      return self._weight_norms[path]
    node, _, name = path.rpartition("/")
    if self._is_embedding(path) or name not in (*KERNELS, *_SCALES):
      return path
    return node

  def rank(self, path: str) -> int:
    """Who decides the shape of a group's units: cells (2), kernels (1), others (0)."""
    if path in self._cells:
      return 2
    is_kernel = path.rpartition("/")[2] in KERNELS and path not in self._weight_norms
    return 1 if is_kernel else 0

  def read(self, path: str) -> Reading:
    """Reads the units of a parameter; first match wins."""
    shape = self._shapes[path]
    name = path.rpartition("/")[2]
    every = tuple(range(len(shape)))
    if path in self._cells:
      return self._read_cell(path, shape)
    if path in self._weight_norms:
      return Reading(every, "weight norm's scale")
    if self._is_embedding(path):
      return Reading(every[-1:], "embedding")
    if name in KERNELS and shape:
      return self._read_kernel(path, shape)
    if name in _SCALES:
      return Reading(self._bias_axes(path, shape), "scale or bias")
    if len(shape) <= 1:
      return Reading(every, "scalar" if not shape else "unknown", assumed=bool(shape))
    return Reading(self._one(shape), "unknown", assumed=True)

  def _one(self, shape: Shape) -> Shape:
    """The one axis that a layout keeps its units on."""
    return (0,) if self._first else (len(shape) - 1,)

  def _is_embedding(self, path: str) -> bool:
    *nodes, name = path.split("/")
    if name in KERNELS:
      # equinox's Embedding is a `weight`, with features last, as nowhere else there.
      shape, node = self._shapes[path], "/".join(nodes)
      named = bool(nodes) and re.search(r"embed(ding)?s?(_\d+)?$", nodes[-1])
      alone = first_below(self._shapes, node, BIASES) is None
      return self._first and bool(named) and alone and len(shape) == 2
    return bool(_EMBEDDING.search(name))

  def _read_cell(self, path: str, shape: Shape) -> Reading:
    axes, cell, hidden = self._cells[path]
    gates = shape[axes[-1]]
    if hidden == 0 or gates % hidden:
      raise ValueError(
        f"Gates must divide evenly, got {path!r} of shape {shape} in the recurrent "
        f"cell {cell!r} with {hidden} hidden units: {gates} is no multiple of "
        f"{hidden}. If it is no such cell, {override_text(path, axes)}."
      )
    return Reading(axes, "recurrent cell", tiles=gates // hidden)

  def _read_kernel(self, path: str, shape: Shape) -> Reading:
    bias = first_below(self._shapes, path.rpartition("/")[0], BIASES)
    if path in self._attention:
      axes = self._attention[path]
      sizes = tuple(shape[axis] for axis in axes)
      if bias is None or self._shapes[bias] == sizes:
        return Reading(axes, "attention")
    if bias is None:
      return Reading(self._one(shape), "kernel without bias")
    axes, _, rule = self._fit(path, bias)
    return Reading(axes, rule)

  def _bias_axes(self, path: str, shape: Shape) -> Shape:
    """All axes, but for those of length 1 that pad a bias to its kernel's rank."""
    every = tuple(range(len(shape)))
    node, _, name = path.rpartition("/")
    kernel = first_below(self._shapes, node, KERNELS)
    if name not in BIASES or kernel is None or kernel in self._given:
      return every
    if not self._shapes[kernel] or kernel in self._cells or kernel in self._attention:
      return every
    return self._fit(kernel, path)[1]

  def _fit(self, kernel: str, bias: str) -> tuple[Shape, Shape, str]:
    """The unit axes of a kernel and of its bias, and the rule in words."""
    shape, bias_shape = self._shapes[kernel], self._shapes[bias]
    every = tuple(range(len(bias_shape)))
    padded = tuple(axis for axis in every if bias_shape[axis] != 1)
    for bias_axes in (every, padded):
      sizes = tuple(bias_shape[axis] for axis in bias_axes)
      fits = [
        axes
        for axes in combinations(range(len(shape)), len(sizes))
        if tuple(shape[axis] for axis in axes) == sizes
      ]
      if not fits:
        continue
      axes = self._choose(fits, shape)
      if axes is None:
        raise ValueError(
          f"A bias must fit one choice of its kernel's axes, got {kernel!r} of shape "
          f"{shape} and {bias!r} of shape {bias_shape}, which fits "
          f"{', '.join(map(str, fits))}. To say which, "
          f"{override_text(kernel, fits[-1])}."
        )
      rule = "kernel with bias"
      if len(fits) > 1 and len(sizes) == 1:
        rule += f", tie: {'first' if self._first else 'last'}"
      return axes, bias_axes, rule
    raise ValueError(
      f"A bias must fit axes of its kernel, got {kernel!r} of shape {shape} and "
      f"{bias!r} of shape {bias_shape}. To say which axes of the kernel index its "
      f"units, {override_text(kernel, self._one(shape))}."
    )

  def _choose(self, fits: list[Shape], shape: Shape) -> Shape | None:
    """The axes that a layout would have, None where it could have several."""
    if self._first:
      return fits[0]
    if len(fits[-1]) <= 1:
      return fits[-1]
    # Stacked and batch axes lead, features come last, what is contracted lies between.
    rank, count = len(shape), len(fits[-1])
    layouts = [
      (*range(lead), *range(rank - count + lead, rank)) for lead in range(count)
    ]
    ordered = [axes for axes in fits if axes in layouts] or fits
    # An axis of length 1 indexes nothing.
    if len({tuple(a for a in axes if shape[a] != 1) for axes in ordered}) > 1:
      return None
    return ordered[-1]


def override_text(path: str, what: object) -> str:
  """What to write to override the units of one parameter."""
  return f"write overrides=[(r'^{re.escape(path)}$', {what})]"
