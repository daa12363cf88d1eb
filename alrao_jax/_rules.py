"""The rules that read a parameter's units from names and shapes.

A recurrent cell's gates, input and recurrent alike, feed the same hidden units, so the
whole cell shares one vector of rates (the papers' rule). Nothing in a single parameter
says so: the names of the cell's children do, together with their shapes. Attention
projections are known the same way: their kernels have a fixed rank, so their units are
known without a bias.
"""

import operator
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from ._tree import flatten_with_paths, head_name

Shape = tuple[int, ...]


KERNELS = ("kernel", "w", "weight")


BIASES = ("bias", "b")


# Cells whose gates are layers of their own: linen's LSTM, GRU and MGU, nnx's LSTM
# (which spells `if_`); with a recurrent layer that every such cell has.
_GATES = (
  ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho"),
  ("ir", "iz", "in", "hr", "hz", "hn"),
  ("if", "in", "hf", "hn"),
)


# Cells of an input layer and a recurrent one: linen's SimpleCell and ConvLSTM, the
# fused cells of nnx, haiku's convolutional LSTM.
_PAIRS = (
  ("i", "h"),
  ("ih", "hh"),
  ("dense_i", "dense_h"),
  ("input_to_hidden", "hidden_to_hidden"),
)


_CONVOLUTIONAL = ("ih", "input_to_hidden")


# Cells without layers: haiku's GRU, with units on the last axis, and equinox's cells,
# with units on the first.
_BARE = (("w_i", "w_h", "b"), ("weight_ih", "weight_hh", "bias", "bias_n"))


class CellLeaf(NamedTuple):
  """A parameter of a recurrent cell.

  Attributes:
    axes: The axes that index the units, that of the gates last.
    cell: The path of the cell.
    hidden: The number of hidden units; the last of ``axes`` holds one or more gates
      of that many.
  """

  axes: Shape
  cell: str
  hidden: int


def join(*names: str) -> str:
  """Joins names to a path, leaving out empty ones."""
  return "/".join(name for name in names if name)


def first_below(
  shapes: Mapping[str, Shape], node: str, names: Iterable[str]
) -> str | None:
  """The path of the first of the named parameters that lies directly below a node."""
  return next((p for name in names if (p := join(node, name)) in shapes), None)


def children_of(paths: Iterable[str]) -> dict[str, dict[str, str]]:
  """The children of each node, by the node's path: plain name to name."""
  children: dict[str, dict[str, str]] = {}
  for path in paths:
    node = ""
    for name in path.split("/"):
      # nnx appends "_" to names that are Python's keywords.
      children.setdefault(node, {})[name.rstrip("_") or name] = name
      node = join(node, name)
  return children


def cell_leaves(
  shapes: Mapping[str, Shape], children: Mapping[str, Mapping[str, str]]
) -> dict[str, CellLeaf]:
  """Finds the parameters of the recurrent cells of linen, nnx, haiku and equinox."""
  found: dict[str, CellLeaf] = {}
  for node, names in children.items():
    for gates in _GATES:
      if names.keys() >= set(gates):
        found.update(_gated(shapes, node, [names[gate] for gate in gates]))
    for pair in _PAIRS:
      if names.keys() >= set(pair):
        found.update(_paired(shapes, node, [names[n] for n in pair], len(names) == 2))
    for bare in _BARE:
      if names.keys() >= set(bare[:2]):
        found.update(_bare(shapes, node, bare))
    # haiku's layers have general names, so the cell's own must help.
    if re.search(r"(^|/)vanilla_rnn(_\d+)?$", node) and "linear_1" in names:
      found.update(_paired(shapes, node, ["linear", "linear_1"], True))
    if re.search(r"(^|/)lstm(_\d+)?$", node) and names.keys() == {"linear"}:
      found.update(_joint(shapes, join(node, "linear"), node))
  return found


def _gated(shapes, node, names):
  """A cell whose gates are layers of their own."""
  layers = [join(node, name) for name in names]
  kernel = first_below(shapes, layers[-1], KERNELS)
  if kernel is None or len(shapes[kernel]) < 2:
    return {}
  shape = shapes[kernel]
  return _cell(shapes, node, layers, shape[-1], stack=len(shape) - 2)


def _paired(shapes, node, names, alone):
  """A cell of an input layer and a recurrent one, each with all gates."""
  layers = [join(node, name) for name in names]
  kernels = [shapes.get(first_below(shapes, layer, KERNELS), ()) for layer in layers]
  inputs, recurrent = kernels
  # Both feed the same gates.
  if not len(inputs) == len(recurrent) >= 2 or inputs[-1] != recurrent[-1]:
    return {}
  # So do two layers of a perceptron when the second is square: with one gate, the
  # pair must be all there is.
  if recurrent[-1] == recurrent[-2] and not alone:
    return {}
  stack = 0 if names[0] in _CONVOLUTIONAL else len(recurrent) - 2
  return _cell(shapes, node, layers, recurrent[-2], stack)


def _joint(shapes, layer, node):
  """The LSTM of haiku: one layer from inputs and hidden units to the four gates."""
  shape = shapes.get(join(layer, "w"), ())
  if len(shape) != 2 or shape[1] % 4 or shape[0] <= shape[1] // 4:
    return {}
  return _cell(shapes, node, [layer], shape[1] // 4, stack=0)


def _bare(shapes, node, names):
  """A cell without layers."""
  recurrent = shapes[join(node, names[1])]
  stack = len(recurrent) - 2
  if stack < 0:
    return {}
  first = names[0] == "weight_ih"
  axes = tuple(range(stack + 1)) if first else (*range(stack), stack + 1)
  hidden = recurrent[-1] if first else recurrent[-2]
  found = {}
  for name in names:
    path = join(node, name)
    if path in shapes:
      is_bias = len(shapes[path]) == stack + 1
      found[path] = CellLeaf(tuple(range(stack + 1)) if is_bias else axes, node, hidden)
  return found


def _cell(shapes, node, layers, hidden, stack):
  """The parameters of layers that make up one cell."""
  paths = [
    path
    for layer in layers
    for name in (*KERNELS, *BIASES)
    if (path := join(layer, name)) in shapes
  ]
  biases = [len(shapes[p]) - 1 for p in paths if p.rpartition("/")[2] in BIASES]
  stack = min(biases, default=stack)
  found = {}
  for path in paths:
    last = len(shapes[path]) - 1
    found[path] = CellLeaf((*range(min(stack, last)), last), node, hidden)
  return found


def attention_kernels(
  shapes: Mapping[str, Shape], children: Mapping[str, Mapping[str, str]]
) -> dict[str, Shape]:
  """Finds the kernels of attention blocks: their unit axes by path.

  ``query``, ``key`` and ``value`` project features to heads and dimensions, ``out``
  projects back. All four kernels have three axes; further leading ones are stacks.
  """
  found: dict[str, Shape] = {}
  names = ("query", "key", "value", "out")
  for node, present in children.items():
    if not present.keys() >= set(names):
      continue
    kernels = {n: first_below(shapes, join(node, n), KERNELS) for n in names}
    query, out = (shapes.get(kernels[n] or "", ()) for n in ("query", "out"))
    if len(query) < 3 or query[-2:] != out[-3:-1]:
      continue  # projections by plain layers
    for name, path in kernels.items():
      rank = len(shapes[path]) if path else 0
      if path and rank >= 3:
        contracted = (rank - 3, rank - 2) if name == "out" else (rank - 3,)
        found[path] = tuple(axis for axis in range(rank) if axis not in contracted)
  return found


def weight_norms(
  shapes: Mapping[str, Shape], children: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
  """Finds the scales of weight normalisation: the layer that each belongs to by path.

  A weight norm's scale is a factor of its layer's kernel, so it shares the layer's
  rates. linen keeps it as ``<layer>/kernel/scale``, nnx as ``scales/<path>`` beside
  ``layer_instance/<path>``.
  """
  found: dict[str, str] = {}
  for path in shapes:
    kernel, _, name = path.rpartition("/")
    if name == "scale" and kernel in shapes:
      found[path] = kernel.rpartition("/")[0]
  for node, names in children.items():
    if names.keys() >= {"scales", "layer_instance"}:
      prefix = join(node, "scales") + "/"
      for path in shapes:
        kernel = join(node, "layer_instance", path.removeprefix(prefix))
        if path.startswith(prefix) and kernel in shapes:
          found[path] = kernel.rpartition("/")[0]
  return found


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
    children = children_of(shapes)
    self._shapes = shapes
    self._first = unit_axis == "first"
    self._given = given
    self._cells = cell_leaves(shapes, children)
    self._attention = attention_kernels(shapes, children)
    self._weight_norms = weight_norms(shapes, children)

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


_WORDS = ("per_weight", "one_rate", "frozen")


class Units(NamedTuple):
  """A parameter's units, as an override gives them.

  Attributes:
    axes: The axes that index the units, negative ones counted from the end; ``()``
      for one rate.
    group: Parameters of the same group share one vector of rates. None: that of the
      parameter's layer.
    tiles: How many times (gates) the units are repeated along the last of ``axes``.
  """

  axes: tuple[int, ...]
  group: str | None = None
  tiles: int = 1


Override = tuple[str, tuple[int, ...] | Units | str]


def match_overrides(
  shapes: Mapping[str, Shape], heads: Collection[str], overrides: Sequence[Any]
) -> dict[str, str | Units]:
  """Finds what the overrides say.

  Args:
    shapes: The shapes of the parameters that may be overridden, by path.
    heads: The paths of the heads' parameters, which can only be frozen.
    overrides: Those of :class:`UnitOptions`.

  Returns:
    What the first override says whose pattern is found in the path, for each path
    that has one.

  Raises:
    TypeError: An override is no pair of a regular expression and axes.
    ValueError: An override's word is unknown, or its pattern is found nowhere.
  """
  given: dict[str, str | Units] = {}
  for override in overrides:
    pattern, what = _parse_override(override)
    matched = [path for path in shapes if pattern.search(path)]
    of_heads = [path for path in heads if pattern.search(path)]
    if what == "frozen":
      matched += of_heads
    if not matched and (shapes or heads):
      raise ValueError(
        f"overrides=[({pattern.pattern!r}, ...)] must match the path of a parameter, "
        + (
          f"got only heads, {_some(of_heads)}, whose rates are not drawn: they can "
          "only be 'frozen'."
          if of_heads
          else f"got no match among {_some([*shapes, *heads])}."
        )
      )
    for path in matched:
      given.setdefault(path, what)
  return given


def _parse_override(override: Any) -> tuple[re.Pattern[str], str | Units]:
  try:
    pattern, what = override
    pattern = re.compile(pattern)
    if not isinstance(what, str):
      units = what if isinstance(what, Units) else Units(what)
      what = units._replace(axes=tuple(operator.index(axis) for axis in units.axes))
  except re.error as error:
    raise ValueError(
      f"overrides must hold regular expressions, got {override[0]!r}: {error}."
    ) from error
  except (TypeError, ValueError) as error:
    raise TypeError(
      "overrides must hold pairs of a regular expression and axes, such as "
      f"[(r'dense/kernel$', (0,))], got {override!r}."
    ) from error
  if isinstance(what, str) and what not in _WORDS:
    raise ValueError(
      f"overrides must say axes, Units or one of {_WORDS}, got {what!r}."
    )
  return pattern, what


def _some(paths: Collection[str]) -> str:
  """The first few paths, to be shown in an error."""
  names = [repr(path) for path in list(paths)[:5]]
  return ", ".join(names) + (", ..." if len(paths) > 5 else "")


class Known(NamedTuple):
  """What a module knows of one of its parameters.

  Attributes:
    shape: Its shape without the axes that vmap and scan have added.
    axes: Those of its axes that index units; None: by the rules.
    apart: Whether the module's bias has these axes in another order.
  """

  shape: Shape
  axes: Shape | None = None
  apart: bool = False


def overrides_from(params: Any, known: Mapping[str, Known]) -> tuple[Override, ...]:
  """The overrides for those parameters whose shapes would tell something else.

  Args:
    params: The parameters, arrays or ``jax.ShapeDtypeStruct``.
    known: What the model's modules know of them, by path.

  Returns:
    Overrides for :class:`UnitOptions`, the fewest that are needed.
  """
  shapes = {
    path: tuple(leaf.shape)
    for path, leaf in flatten_with_paths(params)[0]
    if head_name(path) is None
  }
  inner = {
    path: known[path].shape if path in known else shapes[path] for path in shapes
  }
  given = {path for path in shapes if path in known and known[path].axes is not None}
  rules, inner_rules = Rules(shapes, "last", set(known)), Rules(inner, "last", given)
  overrides = []
  for path in shapes:
    if path in known:
      units = _units_of(path, shapes[path], known[path], _read(inner_rules, path))
      plain = _read(rules, path)
      if units and (not plain or units != Units(plain.axes, None, plain.tiles)):
        overrides.append((f"^{re.escape(path)}$", units))
  return tuple(overrides)


def _read(rules: Rules, path: str) -> Reading | None:
  """What the rules say, None for nothing or an error, for which overrides are."""
  try:
    reading = rules.read(path)
  except ValueError:
    return None
  return None if reading.assumed else reading


def _units_of(
  path: str, shape: Shape, known: Known, reading: Reading | None
) -> Units | None:
  """The units of a parameter with all its axes, None where they stay unknown."""
  stack = _stack_axes(shape, known.shape)
  if stack is None or (known.axes is None and reading is None):
    return None
  own = [axis for axis in range(len(shape)) if axis not in stack]
  axes, tiles = known.axes, 1
  if axes is None:
    assert reading is not None
    axes, tiles = reading.axes, reading.tiles
  units = [own[axis] for axis in axes]
  # Tiles run along the last unit axis: share across stacks that come after it.
  stack = [axis for axis in stack if tiles == 1 or axis < units[-1]]
  group = path if known.apart else None
  return Units(tuple(sorted([*stack, *units])), group, tiles)


def _stack_axes(shape: Shape, inner: Shape) -> Shape | None:
  """The axes that stacking has added, leading ones where it could have been several."""
  added, rest = [], list(inner)
  for axis in reversed(range(len(shape))):
    if rest and shape[axis] == rest[-1]:
      rest.pop()
    else:
      added.append(axis)
  return tuple(reversed(added)) if not rest else None


def einsum_kernel(shape: Shape, equation: str) -> Known:
  """What an einsum layer knows of its kernel: the units are the axes that stay.

  Args:
    shape: The kernel's shape.
    equation: That of the einsum, with the kernel as its second operand.

  Example:
    >>> einsum_kernel((4, 5, 6), "ab,bcd->adc")
    Known(shape=(4, 5, 6), axes=(1, 2), apart=True)
  """
  operands, result = equation.replace(" ", "").split("->")
  letters = operands.split(",")[1]
  if len(letters) != len(shape) or "." in letters:
    return Known(shape)
  axes = tuple(axis for axis, letter in enumerate(letters) if letter in result)
  places = [result.index(letters[axis]) for axis in axes]
  return Known(shape, axes, apart=places != sorted(places))
