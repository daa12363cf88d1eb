"""The rules that read a parameter's units from names and shapes.

:data:`RULES` is the list, in its order: the first rule that knows a parameter decides
its units. A rule is one function ``(shapes, path) -> UnitSpec or None``. To teach the
library a layer, write a function, put it into the list, and add a row to
``docs/units.md`` and a case to ``tests/unit_cases.py``.

A bias has exactly one entry a unit, so the shape of the bias next to a kernel tells the
kernel's unit axes. A recurrent cell's gates, input and recurrent alike, feed the same
hidden units, so the whole cell shares one vector of rates (the papers' rule). Nothing
in a single parameter says so: the names of the cell's children do, together with their
shapes. Attention projections are known the same way: their kernels have a fixed rank,
so their units are known without a bias.
"""

import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, NamedTuple

from ._tree import flatten_with_paths, head_name

Shape = tuple[int, ...]


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


@dataclass(frozen=True)
class UnitSpec:
  """The units of one parameter.

  Attributes:
    path: The parameter's path.
    shape: Its shape.
    kind: ``"unit"``, ``"per_weight"``, ``"one_rate"``, ``"frozen"`` (never updated, be
      it a head's or not) or ``"head"`` (the heads' rates are not drawn).
    axes: The axes that index the units, sorted; ``()`` for one rate.
    group: Parameters of the same group share one vector of rates; "" for frozen ones
      and heads, and for a layer at the root of the tree.
    tiles: How many times the units are repeated along the last of ``axes``.
    assumed: Whether no rule knew the parameter.
    rule: The rule that decided, in words.
    of_heads: Whether axis 0 indexes the heads: of heads that train and of frozen ones.
    decides: Who decides the shape of a group's units. 2: members of cells and of groups
      given by name, which must agree. 1: kernels. 0: all that follow, and share among
      themselves only if they agree.
  """

  path: str
  shape: Shape
  kind: Literal["unit", "per_weight", "one_rate", "frozen", "head"]
  axes: Shape
  group: str
  tiles: int = 1
  assumed: bool = False
  rule: str = ""
  of_heads: bool = False
  decides: int = 0

  @property
  def unit_shape(self) -> Shape:
    """The shape of the units: the parameter's along ``axes``, without tiles."""
    sizes = [self.shape[axis] for axis in self.axes]
    return (*sizes[:-1], sizes[-1] // self.tiles) if sizes else ()

  @property
  def num_units(self) -> int:
    """The number of units."""
    return math.prod(self.unit_shape)


Override = tuple[str, tuple[int, ...] | Units | str]


# --- What the rules ask of a tree


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
  """The path of the first of the named parameters directly below a node."""
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
  rates. linen keeps it as ``<layer>/kernel/scale``, nnx as ``scales/<path>`` next
  to ``layer_instance/<path>``.
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


class Shapes(dict[str, Shape]):
  """The shapes of the body's parameters by path, and what a tree's names tell.

  Args:
    body: The shape of every parameter that belongs to no head, by path.
    heads: The shapes of the heads' parameters.
    unit_axis: ``"last"`` or ``"first"``.
    overrides: What the user's overrides say, by path.
    given: The paths of kernels whose axes are known otherwise, so that the bias next to
      one is not compared with it. By default those of ``overrides``.
  """

  def __init__(
    self,
    body: Mapping[str, Shape],
    heads: Mapping[str, Shape] | None = None,
    unit_axis: str = "last",
    overrides: Mapping[str, str | Units] | None = None,
    given: Collection[str] | None = None,
  ):
    super().__init__(body)
    children = children_of(body)
    self.heads = heads or {}
    self.units_first = unit_axis == "first"
    self.overrides = overrides or {}
    self.given = self.overrides if given is None else given
    self.cells = cell_leaves(body, children)
    self.attention = attention_kernels(body, children)
    self.weight_norms = weight_norms(body, children)

  def one_axis(self, shape: Shape) -> Shape:
    """The one axis that a layout keeps its units on."""
    return (0,) if self.units_first else (len(shape) - 1,)


def _split(path: str) -> tuple[str, str]:
  """A parameter's layer and its own name."""
  node, _, name = path.rpartition("/")
  return node, name


def _home(shapes: Shapes, path: str) -> tuple[str, int]:
  """The group of a parameter whose axes are known, and how much it decides there."""
  if path in shapes.cells:
    return shapes.cells[path].cell, 2
  if path in shapes.weight_norms:
    return shapes.weight_norms[path], 0
  node, name = _split(path)
  if _is_embedding(shapes, path) or name not in (*KERNELS, *_SCALES):
    return path, 0
  return node, int(name in KERNELS)


# --- The rules: does this one know the parameter, and what are its units?


def override(shapes: Shapes, path: str) -> UnitSpec | None:
  """A parameter that the user's overrides name. Heads can only be frozen."""
  what = shapes.overrides.get(path)
  if what is None:
    return None
  if path in shapes.heads:
    return UnitSpec(path, shapes.heads[path], "frozen", (0,), "", of_heads=True)
  shape = shapes[path]
  if isinstance(what, str):
    axes = tuple(range(len(shape))) if what == "per_weight" else ()
    group = "" if what == "frozen" else path
    kind: Any = what
    return UnitSpec(path, shape, kind, axes, group, decides=2)
  rank = len(shape)
  axes = tuple(sorted(axis + rank if axis < 0 else axis for axis in what.axes))
  if len(set(axes)) < len(axes) or any(not 0 <= axis < rank for axis in axes):
    raise ValueError(
      f"overrides must name different axes of {path!r}, which has shape {shape}, got "
      f"{what.axes}."
    )
  if what.tiles < 1 or (what.tiles > 1 and (not axes or shape[axes[-1]] % what.tiles)):
    raise ValueError(
      f"overrides must give a number of tiles that divides the last unit axis of "
      f"{path!r}, which has shape {shape}, got {what}."
    )
  if what.group is None:
    group, decides = _home(shapes, path)
    decides = min(decides, 1)  # what leaves its cell doesn't bind the cell
  else:
    group, decides = what.group, 2
  return UnitSpec(path, shape, "unit", axes, group, what.tiles, decides=decides)


def head(shapes: Shapes, path: str) -> UnitSpec | None:
  """A parameter of a MultiHead: its rates are the heads' ladder."""
  shape = shapes.heads.get(path)
  if shape is None:
    return None
  if not shape:
    raise ValueError(
      f"Parameters of heads must have the heads on axis 0, got {path!r}, of shape ()."
    )
  return UnitSpec(path, shape, "head", (0,), "", of_heads=True)


def recurrent_cell(shapes: Shapes, path: str) -> UnitSpec | None:
  """A parameter of a recurrent cell, which shares one vector between all gates."""
  leaf, shape = shapes.cells.get(path), shapes[path]
  if leaf is None:
    return None
  axes, cell, hidden = leaf
  gates = shape[axes[-1]]
  if hidden == 0 or gates % hidden:
    raise ValueError(
      f"Gates must divide evenly, got {path!r} of shape {shape} in the recurrent "
      f"cell {cell!r} with {hidden} hidden units: {gates} is no multiple of "
      f"{hidden}. If it is no such cell, {override_text(path, axes)}."
    )
  return UnitSpec(path, shape, "unit", axes, cell, gates // hidden, decides=2)


def weight_norm_scale(shapes: Shapes, path: str) -> UnitSpec | None:
  """The scale of a weight normalisation: a factor of its layer's kernel."""
  layer, shape = shapes.weight_norms.get(path), shapes[path]
  if layer is None:
    return None
  return UnitSpec(path, shape, "unit", tuple(range(len(shape))), layer)


def attention(shapes: Shapes, path: str) -> UnitSpec | None:
  """A projection of an attention block, if its bias doesn't say otherwise."""
  axes, shape = shapes.attention.get(path), shapes[path]
  if axes is None:
    return None
  node, _ = _split(path)
  bias = first_below(shapes, node, BIASES)
  if bias is not None and shapes[bias] != tuple(shape[axis] for axis in axes):
    return None
  return UnitSpec(path, shape, "unit", axes, node, decides=1)


def embedding(shapes: Shapes, path: str) -> UnitSpec | None:
  """An embedding, a class token, a factor of LoRA: features are last."""
  if not _is_embedding(shapes, path):
    return None
  shape = shapes[path]
  return UnitSpec(path, shape, "unit", tuple(range(len(shape)))[-1:], path)


def kernel_with_bias(shapes: Shapes, path: str) -> UnitSpec | None:
  """A kernel with a bias next to it, which has one entry a unit."""
  shape, (node, name) = shapes[path], _split(path)
  bias = first_below(shapes, node, BIASES)
  if name not in KERNELS or not shape or bias is None:
    return None
  axes, _, tie = _fit(shapes, path, bias)
  return UnitSpec(path, shape, "unit", axes, node, rule=tie, decides=1)


def kernel_without_bias(shapes: Shapes, path: str) -> UnitSpec | None:
  """A kernel alone: its layout says where units are."""
  shape, (node, name) = shapes[path], _split(path)
  if name not in KERNELS or not shape:
    return None
  return UnitSpec(path, shape, "unit", shapes.one_axis(shape), node, decides=1)


def scale_or_bias(shapes: Shapes, path: str) -> UnitSpec | None:
  """A scale or a bias: one entry a unit, but for axes of length 1 that pad it."""
  shape, (node, name) = shapes[path], _split(path)
  if name not in _SCALES:
    return None
  axes = tuple(range(len(shape)))
  kernel = first_below(shapes, node, KERNELS)
  known = kernel is None or any(
    kernel in those for those in (shapes.given, shapes.cells, shapes.attention)
  )
  if name in BIASES and kernel is not None and not known and shapes[kernel]:
    axes = _fit(shapes, kernel, path)[1]
  return UnitSpec(path, shape, "unit", axes, node)


def scalar(shapes: Shapes, path: str) -> UnitSpec | None:
  """A single number: one rate."""
  if shapes[path]:
    return None
  group, decides = _home(shapes, path)
  return UnitSpec(path, (), "unit", (), group, decides=decides)


def unknown(shapes: Shapes, path: str) -> UnitSpec | None:
  """Anything else: one axis, reported as assumed."""
  shape = shapes[path]
  axes = shapes.one_axis(shape) if len(shape) > 1 else (0,)
  return UnitSpec(path, shape, "unit", axes, path, assumed=True)


RULES: tuple[Callable[[Shapes, str], UnitSpec | None], ...] = (
  override,
  head,
  recurrent_cell,
  weight_norm_scale,
  attention,
  embedding,
  kernel_with_bias,
  kernel_without_bias,
  scale_or_bias,
  scalar,
  unknown,
)


def rule_name(rule: Callable[..., Any]) -> str:
  """What tables call a rule.

  Example:
    >>> rule_name(kernel_with_bias)
    'kernel with bias'
  """
  return rule.__name__.replace("_", " ")


def read(shapes: Shapes, path: str) -> UnitSpec:
  """Reads the units of a parameter; the first rule that knows it decides.

  Raises:
    ValueError: A bias fits no axes of its kernel or several, or gates don't divide.
  """
  for rule in RULES:
    spec = rule(shapes, path)
    if spec is not None:
      return replace(spec, rule=rule_name(rule) + spec.rule)
  raise AssertionError(f"The last rule knows every parameter, but not {path!r}.")


def _is_embedding(shapes: Shapes, path: str) -> bool:
  node, name = _split(path)
  if name not in KERNELS:
    return bool(_EMBEDDING.search(name))
  # equinox's Embedding is a `weight`, with features last, as nowhere else there.
  named = re.search(r"embed(ding)?s?(_\d+)?$", node.rpartition("/")[2])
  alone = first_below(shapes, node, BIASES) is None
  return shapes.units_first and bool(named) and alone and len(shapes[path]) == 2


def _fit(shapes: Shapes, kernel: str, bias: str) -> tuple[Shape, Shape, str]:
  """The unit axes of a kernel and of its bias, and how a tie was settled."""
  shape, bias_shape = shapes[kernel], shapes[bias]
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
    axes = _choose(fits, shape, shapes.units_first)
    if axes is None:
      raise ValueError(
        f"A bias must fit one choice of its kernel's axes, got {kernel!r} of shape "
        f"{shape} and {bias!r} of shape {bias_shape}, which fits "
        f"{', '.join(map(str, fits))}. To say which, "
        f"{override_text(kernel, fits[-1])}."
      )
    tied = len(fits) > 1 and len(sizes) == 1
    tie = f", tie: {'first' if shapes.units_first else 'last'}" if tied else ""
    return axes, bias_axes, tie
  raise ValueError(
    f"A bias must fit axes of its kernel, got {kernel!r} of shape {shape} and "
    f"{bias!r} of shape {bias_shape}. To say which axes of the kernel index its "
    f"units, {override_text(kernel, shapes.one_axis(shape))}."
  )


def _choose(fits: list[Shape], shape: Shape, units_first: bool) -> Shape | None:
  """The axes that a layout would have, None where it could have several."""
  if units_first:
    return fits[0]
  if len(fits[-1]) <= 1:
    return fits[-1]
  # Stacked and batch axes come first, features last, what is contracted in between.
  rank, count = len(shape), len(fits[-1])
  layouts = [(*range(lead), *range(rank - count + lead, rank)) for lead in range(count)]
  ordered = [axes for axes in fits if axes in layouts] or fits
  # An axis of length 1 indexes nothing.
  if len({tuple(a for a in axes if shape[a] != 1) for axes in ordered}) > 1:
    return None
  return ordered[-1]


# --- Overrides: the user's, and those that a module's type tells


def override_text(path: str, what: object) -> str:
  """What to write to override the units of one parameter."""
  return f"write units=UnitOptions(overrides=[(r'^{re.escape(path)}$', {what})])"


_WORDS = ("per_weight", "one_rate", "frozen")


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
    ValueError: A pattern is found nowhere.
  """
  given: dict[str, str | Units] = {}
  for pattern, what in overrides:
    pattern = re.compile(pattern)
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


def parse_override(override: Any) -> tuple[str, str | Units]:
  """Returns an override in one form, a pair that hashes.

  Raises:
    TypeError: It is no pair of a regular expression and axes.
    ValueError: Its word is unknown, or the regular expression is malformed.
  """
  try:
    pattern, what = override
    re.compile(pattern)
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
  plainly, inside = Shapes(shapes, given=set(known)), Shapes(inner, given=given)
  overrides = []
  for path in shapes:
    if path in known:
      units = _units_of(path, shapes[path], known[path], _known(inside, path))
      plain = _known(plainly, path)
      if units and (not plain or units != Units(plain.axes, None, plain.tiles)):
        overrides.append((f"^{re.escape(path)}$", units))
  return tuple(overrides)


def _known(shapes: Shapes, path: str) -> UnitSpec | None:
  """What the rules say, None for nothing or an error, for which overrides are."""
  try:
    spec = read(shapes, path)
  except ValueError:
    return None
  return None if spec.assumed else spec


def _units_of(
  path: str, shape: Shape, known: Known, spec: UnitSpec | None
) -> Units | None:
  """The units of a parameter with all its axes, None where they stay unknown."""
  stack = _stack_axes(shape, known.shape)
  if stack is None or (known.axes is None and spec is None):
    return None
  own = [axis for axis in range(len(shape)) if axis not in stack]
  axes, tiles = known.axes, 1
  if axes is None:
    assert spec is not None
    axes, tiles = spec.axes, spec.tiles
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
