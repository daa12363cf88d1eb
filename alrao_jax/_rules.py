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

import functools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, NamedTuple

Shape = tuple[int, ...]


class _Pattern:
  """A regular expression that is compiled at its first use, not at import.

  All of them together take a third of the time to import this package.
  """

  def __init__(self, pattern: str, flags: int = 0):
    self._compiled = functools.cache(lambda: re.compile(pattern, flags))

  def __getattr__(self, name: str) -> Any:
    return getattr(self._compiled(), name)


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
    ties: The choices of axes that fit as well as ``axes`` and were not taken.
    flat: Whether a kernel's units are several axes, and its bias's one, or the other
      way round: the same units, counted in the same order.
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
  ties: tuple[Shape, ...] = ()
  flat: bool = False

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


KERNELS = ("kernel", "w", "weight", "weights")


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
  return "/".join(filter(None, names))


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


_WRAPPERS = _Pattern(r"(/args/\d+|/data_array|/_w|/_?value)+$")


_PREFIXED = _Pattern(r"^(.+)_(kernel|weights?|w|bias|b)$")


# Shorter names are those of a cell's gates.
_SUFFIXED = _Pattern(r"^(kernel|weights?|w|bias|b)_([a-z]{3,}\w*)$")


_NUMBERED = _Pattern(r"^(kernel|weights?|w|bias|b)_?(\d+)$", re.IGNORECASE)


def plain_paths(shapes: Mapping[str, Shape]) -> dict[str, str]:
  """The paths without the steps that say how a package keeps an array.

  A wrapper's own steps are left out: ``weight/args/1`` and ``weight/weight`` (paramax,
  flowjax), ``data_array`` (penzai), ``weight/_w`` (quax), ``w/_value`` (ion), and
  ``value`` where nnx's boxes have become dicts. penzai's ``Linear.weights``
  is ``kernel``, and its ``key.weights`` is ``key/kernel``. Layers that keep several
  kernels, each with its bias (``in_kernel``, ``in_bias``; ``w_out``, ``b_out``; ``w1``,
  ``b1``), are taken apart. A tuple of exactly a kernel and a vector as long as its last
  axis (stax, numpyro) is a layer.

  Args:
    shapes: The shapes of a tree's parameters by path.

  Returns:
    The plain path of each path, its own where two would be the same.

  Example:
    >>> plain_paths({"dense/weight/args/1": (3, 5), "dense/bias": (3,)})
    {'dense/weight/args/1': 'dense/weight', 'dense/bias': 'dense/bias'}
  """
  plain = {path: _unwrapped(path) for path in shapes}
  for node, children in children_of(shapes).items():
    if children.keys() == {"0", "1"}:
      paths = [join(node, name) for name in ("0", "1")]
      kernel, bias = (shapes.get(path, ()) for path in paths)
      if (
        len(kernel) >= 2
        and len(bias) in (1, len(kernel))
        and _sizes(bias) == kernel[-1:]
      ):
        plain |= {paths[0]: join(node, "kernel"), paths[1]: join(node, "bias")}
  names: dict[str, set[str]] = {}
  layers = {path: layer for path in plain if (layer := _layer_of(plain[path]))}
  for layer, name in layers.values():
    names.setdefault(layer, set()).add(name)
  for path, (layer, name) in layers.items():
    if not names[layer].isdisjoint(KERNELS) and not names[layer].isdisjoint(BIASES):
      plain[path] = join(layer, name)
  counts = Counter(plain.values())
  return {path: p if counts[p] == 1 else path for path, p in plain.items()}


def _layer_of(path: str) -> tuple[str, str] | None:
  """The layer and the plain name of what is called ``in_kernel`` or ``b1``."""
  node, name = _split(path)
  if match := _PREFIXED.match(name):
    return join(node, match[1]), match[2]
  if match := _SUFFIXED.match(name):
    return join(node, match[2]), match[1]
  if match := _NUMBERED.match(name):
    return join(node, match[2]), match[1].lower()
  return None


def _unwrapped(path: str) -> str:
  """A path without a wrapper's steps."""
  path = _WRAPPERS.sub("", path)
  node, name = _split(path)
  if node.rpartition("/")[2] == name and name in KERNELS:
    path = node
  owner, _, attribute = name.rpartition(".")
  if "." in name and attribute in (*KERNELS, *BIASES, "embeddings"):
    name = "kernel" if attribute == "weights" else attribute
    path = join(node, "" if owner in ("Linear", "AddBias") else owner, name)
  return path


def _split(path: str) -> tuple[str, str]:
  """A parameter's layer and its own name."""
  node, _, name = path.rpartition("/")
  return node, name


def cell_leaves(
  shapes: Mapping[str, Shape], children: Mapping[str, Mapping[str, str]]
) -> dict[str, CellLeaf]:
  """Finds the parameters of recurrent cells, by names and by how their shapes fit."""
  found: dict[str, CellLeaf] = {}
  for node, names in children.items():
    for gates in _GATES:
      if names.keys() >= set(gates):
        found.update(_gated(shapes, node, [names[gate] for gate in gates]))
    for pair in _PAIRS:
      if names.keys() >= set(pair):
        found.update(_paired(shapes, node, [names[n] for n in pair], len(names) == 2))
    for bare in _BARE:
      # A perceptron of bare matrices has `w_o` and more biases than haiku's GRU.
      alone = bare != _BARE[0] or names.keys() <= set(bare)
      bases = [join(node, name) for name in bare[:2]]
      if all(base in shapes for base in bases) and alone:
        found.update(_bare(shapes, node, bare))
    found.update(_two_layers(shapes, node, names))
    # haiku's layers have general names, so the cell's own must help.
    if "linear_1" in names and _VANILLA.search(node):
      found.update(_paired(shapes, node, ["linear", "linear_1"], True))
    if names.keys() == {"linear"} and _LSTM.search(node):
      found.update(_joint(shapes, join(node, "linear"), node))
    # NetKet's fused cells.
    if names.keys() == {"kernel", "bias"} and re.search(r"(lstm|/cell)(_\d+)?$", node):
      found.update(_joint(shapes, node, node))
    if names.keys() >= {"rz", "n"}:
      found.update(_reset_and_new(shapes, node, [names["rz"], names["n"]]))
    if "recurrent_kernel" in names and "kernel" in names:
      found.update(_keras(shapes, node))
    found.update(_by_letters(shapes, node, names))
    found.update(_fused(shapes, node, names))
  return found


_LSTM = _Pattern(r"(^|/)(core|cell|(\w*_)?lstm)(_\d+)?$")


_VANILLA = _Pattern(r"(^|/)(vanilla_rnn|core)(_\d+)?$")


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


_INPUT_LAYER = _Pattern(r"(^|_)(x|i|ih|xh|in|inp|input)$")


_RECURRENT_LAYER = _Pattern(r"(^|_)(h|hh|hid|hidden|rec|recurrent)$")


_CELL = _Pattern(r"cell|rnn|recurrent|core", re.IGNORECASE)


def _two_layers(shapes, node, names):
  """A cell of exactly two layers, whose names say which is recurrent (``lin_h``).

  With one gate, a perceptron of ``input`` and ``hidden`` has the same shapes, so the
  name of the node must say that it is a cell.
  """
  ends = {
    tuple(bool(rule.search(n)) for rule in (_INPUT_LAYER, _RECURRENT_LAYER)): n
    for n in names
  }
  if len(names) != 2 or ends.keys() != {(True, False), (False, True)}:
    return {}
  is_cell = _CELL.search(node.rpartition("/")[2]) is not None
  return _paired(shapes, node, [ends[True, False], ends[False, True]], alone=is_cell)


def _joint(shapes, layer, node):
  """One layer from inputs and hidden units to the four gates of an LSTM."""
  kernel = first_below(shapes, layer, KERNELS)
  shape = shapes[kernel] if kernel else ()
  if len(shape) != 2 or shape[1] % 4 or shape[0] <= shape[1] // 4:
    return {}
  return _cell(shapes, node, [layer], shape[1] // 4, stack=0)


def _reset_and_new(shapes, node, names):
  """NetKet's GRU: a layer to two gates, and one to the new hidden units."""
  layers = [join(node, name) for name in names]
  kernels = [shapes.get(first_below(shapes, layer, KERNELS), ()) for layer in layers]
  gates, new = kernels
  if not len(gates) == len(new) == 2 or gates != (new[0], 2 * new[1]):
    return {}
  return _cell(shapes, node, layers, new[1], stack=0)


def _keras(shapes, node):
  """Keras's cells: a kernel and a recurrent one; a GRU has both biases in one."""
  kernel, recurrent = join(node, "kernel"), join(node, "recurrent_kernel")
  inputs, shape = shapes.get(kernel, ()), shapes.get(recurrent, ())
  if not len(inputs) == len(shape) >= 2 or inputs[-1] != shape[-1]:
    return {}
  if shape[-2] == 0 or shape[-1] % shape[-2]:
    return {}
  paths = [kernel, recurrent, join(node, "bias")]
  return {
    path: CellLeaf((len(shapes[path]) - 1,), node, shape[-2])
    for path in paths
    if path in shapes
  }


_LETTERS = _Pattern(r"^[wu]_([a-z]{1,2})$", re.IGNORECASE)


def _by_letters(shapes, node, names):
  """A cell of bare matrices, each named by where it leads from: ``w_hh``, ``w_ih``.

  A matrix from hidden units is square and its name ends with h; one from inputs has as
  many units. Those of the gates (``w_fh``, ``w_fi``) and their biases (``b_f``) follow.
  """
  paths = {name: join(node, own) for name, own in names.items()}
  leaves = {name: shapes[path] for name, path in paths.items() if path in shapes}
  letters = {n: m[1].lower() for n in leaves if (m := _LETTERS.match(n))}
  recurrent = {
    leaves[n]
    for n, found in letters.items()
    if found[1:] == "h" and len(set(leaves[n])) == 1 and len(leaves[n]) <= 2
  }
  if not recurrent or len({shape[0] for shape in recurrent}) > 1:
    return {}
  (hidden,) = {shape[0] for shape in recurrent}
  inputs = [
    leaves[n]
    for n, found in letters.items()
    if found in ("ih", "xh", "in") or found[1:] in ("i", "x")
    if len(leaves[n]) == 2 and hidden in leaves[n]
  ]
  if not inputs:
    return {}
  wide = [shape for shape in inputs if shape[0] != shape[1]]
  axis = wide[0].index(hidden) if wide else 0 if shapes.units_first else 1
  found = {}
  for name, shape in leaves.items():
    if len(shape) == 2 and name in letters and shape[axis] == hidden:
      found[paths[name]] = CellLeaf((axis,), node, hidden)
    elif shape == (hidden,) and (name in letters or re.match(r"b(ias)?(_|$)", name)):
      found[paths[name]] = CellLeaf((0,), node, hidden)
  return found


_FROM_INPUTS = _Pattern(r"^(w|u|weight|kernel)_?(x|i|ih|xh|in)(_l\d+)?$")


_FROM_HIDDEN = _Pattern(r"^(w|u|r|weight|kernel|recurrent)_?(h|hh|rec)(_l\d+)?$")


def _fused(shapes, node, names):
  """A cell of two bare matrices with several gates each: ``wx``, ``wh``, ``b``."""
  leaves = {
    n: shapes[path] for n in names.values() if (path := join(node, n)) in shapes
  }
  inputs, recurrent = (
    next((n for n in leaves if rule.match(n.lower()) and len(leaves[n]) == 2), None)
    for rule in (_FROM_INPUTS, _FROM_HIDDEN)
  )
  if inputs is None or recurrent is None or inputs == recurrent:
    return {}
  for axis in (0, 1):
    hidden, gates = leaves[recurrent][1 - axis], leaves[recurrent][axis]
    if hidden and gates in (3 * hidden, 4 * hidden) and leaves[inputs][axis] == gates:
      return {
        join(node, n): CellLeaf(
          (axis if n in (inputs, recurrent) else 0,), node, hidden
        )
        for n, shape in leaves.items()
        if n in (inputs, recurrent) or shape == (gates,)
      }
  return {}


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
  for node, present in children.items():
    last = next((n for n in ("out", "output") if n in present), "")
    names = ("query", "key", "value", last)
    if not present.keys() >= set(names):
      continue
    kernels = {n: first_below(shapes, join(node, n), KERNELS) for n in names}
    query, out = (shapes.get(kernels[n] or "", ()) for n in ("query", last))
    if len(query) < 3 or query[-2:] != out[-3:-1]:
      continue  # projections by plain layers
    for name, path in kernels.items():
      rank = len(shapes[path]) if path else 0
      if path and rank >= 3:
        contracted = (rank - 3, rank - 2) if name == last else (rank - 3,)
        found[path] = tuple(axis for axis in range(rank) if axis not in contracted)
  return found


def weight_norms(
  shapes: Mapping[str, Shape], children: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
  """Finds the scales of weight normalisation: the layer that each belongs to by path.

  A weight norm's scale is a factor of its layer's kernel, so it shares the layer's
  rates. linen keeps it as ``<layer>/kernel/scale``, with its own name before the layer
  within a compact parent, nnx as ``scales/<path>`` next to ``layer_instance/<path>``,
  equinox as ``g`` next to ``layer``.
  """
  found: dict[str, str] = {}
  for path in shapes:
    kernel, name = _split(path)
    if name == "scale" and (known := _scaled_kernel(shapes, kernel)):
      found[path] = _split(known)[0]
  for node, names in children.items():
    if "g" in names and (kernel := join(node, "layer", "weight")) in shapes:
      found[join(node, "g")] = _split(kernel)[0]
    if names.keys() >= {"scales", "layer_instance"}:
      prefix = join(node, "scales") + "/"
      for path in shapes:
        kernel = join(node, "layer_instance", path.removeprefix(prefix))
        if path.startswith(prefix) and kernel in shapes:
          found[path] = _split(kernel)[0]
  return found


def _scaled_kernel(shapes, path):
  """The kernel that a path names, if need be without the weight norm's own step."""
  steps = path.split("/")
  if path in shapes or steps[-1] not in KERNELS:
    return path if path in shapes else None
  without = ("/".join(steps[:i] + steps[i + 1 :]) for i in range(len(steps) - 1))
  return next((kernel for kernel in without if kernel in shapes), None)


class StateLeaf(NamedTuple):
  """A parameter of a state-space layer.

  Attributes:
    axis: The axis that indexes the units: states, outputs or channels.
    group: The group of these units.
    ties: Another axis that may be the right one.
  """

  axis: int
  group: str
  ties: tuple[Shape, ...] = ()


_INTO_STATES = _Pattern(r"^(b(_?(re|im|real|imag|comps))?|w_in)$", re.IGNORECASE)


_OUT_OF_STATES = _Pattern(r"^(c(_?(re|im|real|imag|comps))?|w_out)$", re.IGNORECASE)


_PAST_STATES = _Pattern(r"^(d|w_skip)$", re.IGNORECASE)


_EIGENVALUES = _Pattern(
  r"^(log_?)?(neg_?)?(a|lambda)(_?(log|re|im|real|imag))*$", re.IGNORECASE
)


def state_spaces(
  shapes: "Shapes", children: Mapping[str, Mapping[str, str]]
) -> dict[str, StateLeaf]:
  """Finds the parameters of linear state-space layers (S5, LRU, LinOSS; S4D, Mamba).

  B leads into the states, C out of them, D past them; what else has one entry a state
  (eigenvalues, time steps) belongs to the state. Without B, every channel has states of
  its own: all that has an entry a channel belongs to the channel.
  """
  found: dict[str, StateLeaf] = {}
  for node, names in children.items():
    leaves = {
      n: shapes[path] for n in names.values() if (path := join(node, n)) in shapes
    }
    read = _of_states(leaves, shapes.units_first) or _of_channels(leaves)
    found |= {
      join(node, n): leaf._replace(group=join(node, leaf.group))
      for n, leaf in read.items()
    }
  return found


def _of_states(leaves: Mapping[str, Shape], left: bool) -> dict[str, StateLeaf]:
  """A layer whose states all inputs lead into."""
  into = [n for n in leaves if _INTO_STATES.match(n) and len(leaves[n]) >= 2]
  out = [n for n in leaves if _OUT_OF_STATES.match(n) and len(leaves[n]) >= 2]
  past = [n for n in leaves if _PAST_STATES.match(n)]
  if not into or not out or len(leaves[into[0]]) != len(leaves[out[0]]):
    return {}
  # Real and imaginary parts may be an axis of their own, first or last.
  ends = [leaves[n] for n in (into[0], out[0])]
  first = 0
  if len(ends[0]) == 3 and not all(shape[-1] == 2 for shape in ends):
    first = 1
    if not all(shape[0] == 2 for shape in ends):
      return {}
  # B times the inputs, or the inputs times B.
  fits: list[dict[str, StateLeaf]] = []
  for axis in (first, first + 1):
    states, outputs = ends[0][axis], ends[1][axis]
    single = [n for n in leaves if leaves[n] in ((states,), (states, 1))]
    vectors = [n for n in single if n not in past]
    if vectors and ends[1][2 * first + 1 - axis] == states:
      of_outputs = [n for n in past if leaves[n][:1] == (outputs,)]
      fits.append(
        {n: StateLeaf(axis, into[0]) for n in into if leaves[n][axis] == states}
        | {n: StateLeaf(0, into[0]) for n in vectors}
        | {n: StateLeaf(axis, out[0]) for n in out if leaves[n][axis] == outputs}
        | {n: StateLeaf(0, out[0]) for n in of_outputs}
      )
  if len(fits) < 2 or left:
    return fits[0] if fits else {}
  return {
    n: leaf
    if fits[1].get(n, leaf).axis == leaf.axis
    else leaf._replace(ties=((fits[1][n].axis,),))
    for n, leaf in fits[0].items()
  }


def _of_channels(leaves: Mapping[str, Shape]) -> dict[str, StateLeaf]:
  """A layer whose channels have states of their own: eigenvalues by channel."""
  values = [n for n in leaves if _EIGENVALUES.match(n) and len(leaves[n]) == 2]
  if not values:
    return {}
  shape = leaves[values[0]]
  single = [n for n in leaves if leaves[n] == shape[:1]]
  if not any(_PAST_STATES.match(n) for n in single):
    return {}
  if shape[0] == shape[1] or 1 in shape:
    return {}
  both = [n for n in leaves if leaves[n] == shape]
  return {n: StateLeaf(0, values[0]) for n in [*both, *single]}


_SCALES = ("scale", "gamma", "beta", "offset", *BIASES)


# Features are last in all that is looked up, or multiplied from the right by name.
_EMBEDDING = _Pattern(
  r"embed|(^|_)emb(_|$)|(^|_)(cls|tokens?)$|^w[tp]e$|^lora_[ab]$|_table$|_projection$"
)


class Fit(NamedTuple):
  """How a bias fits its kernel.

  Attributes:
    axes: The kernel's unit axes.
    bias_axes: The bias's.
    ties: The other axes of the kernel that it fits as well.
    flat: Whether units are several axes of one, and a single axis of the other.
  """

  axes: Shape
  bias_axes: Shape
  ties: tuple[Shape, ...] = ()
  flat: bool = False


class Shapes(dict[str, Shape]):
  """The shapes of the body's parameters by path, and what a tree's names tell.

  Args:
    body: The shape of every parameter that belongs to no head, by plain path.
    heads: The shapes of the heads' parameters.
    unit_axis: ``"last"`` or ``"first"``.
    overrides: What the user's overrides say, by path.
    given: The paths of kernels whose axes are known otherwise, so that the bias next to
      one is not compared with it. By default those of ``overrides``.
    names: What errors call a parameter, where it is not the plain path.
  """

  def __init__(
    self,
    body: Mapping[str, Shape],
    heads: Mapping[str, Shape] | None = None,
    unit_axis: str = "last",
    overrides: Mapping[str, str | Units] | None = None,
    given: Collection[str] | None = None,
    names: Mapping[str, str] | None = None,
  ):
    super().__init__(body)
    self.children = children_of(body)
    self.heads = heads or {}
    self.units_first = unit_axis == "first"
    self.overrides = overrides or {}
    self.given = self.overrides if given is None else given
    self.names = names or {}
    self.cells = cell_leaves(self, self.children)
    self.states = state_spaces(self, self.children)
    self.attention = attention_kernels(self, self.children)
    self.weight_norms = weight_norms(self, self.children)
    self.stacks = _stacks(self) if self.units_first else frozenset()
    self.biases, self.undecided = _biases_of(self)  # by kernel; those of none alone
    self.kernels = {bias: kernel for kernel, bias in reversed(self.biases.items())}
    self.layouts = _layouts(self)
    self.has_line_convolutions = self.units_first and any(
      len(self[kernel]) == 3 and self[bias][1:] == (1,)
      for kernel, bias in self.biases.items()
    )
    self._fits: dict[tuple[str, str], Fit] = {}
    self._near: dict[str, tuple[set[Shape], set[str]]] = {}

  def name(self, path: str) -> str:
    """What the tree calls a parameter."""
    return self.names.get(path, path)

  def one_axis(self, shape: Shape) -> Shape:
    """The one axis that a layout keeps its units on."""
    return (0,) if self.units_first else (len(shape) - 1,)

  def near(self, node: str) -> tuple[set[Shape], set[str]]:
    """The shapes and the names of the parameters directly below a node."""
    if node not in self._near:
      names = {n for n in self.children[node].values() if join(node, n) in self}
      self._near[node] = {self[join(node, n)] for n in names}, names
    return self._near[node]

  def fit(self, kernel: str, bias: str) -> Fit:
    """How a bias fits its kernel.

    Raises:
      ValueError: It fits no axes, or several and nothing tells which.
    """
    if (kernel, bias) not in self._fits:
      self._fits[kernel, bias] = _fit(self, kernel, bias)
    return self._fits[kernel, bias]


def _is_bias(shapes: Mapping[str, Shape], path: str) -> bool:
  """Whether a parameter is a bias by its name; matrices are called b, too."""
  node, name = _split(path)
  if name != "b" or len(shapes[path]) <= 1:
    return name in BIASES
  return first_below(shapes, node, KERNELS) is not None


def _biases_of(shapes: Shapes) -> tuple[dict[str, str], frozenset[str]]:
  """The bias of each tensor: next to it, or a step above where it fits one alone.

  Returns:
    The bias by tensor, and the biases a step above that fit several.
  """
  found: dict[str, str] = {}
  undecided: set[str] = set()
  for node, names in shapes.children.items():
    bias = first_below(shapes, node, BIASES)
    if bias is None or not _is_bias(shapes, bias) or bias in shapes.cells:
      continue
    leaves = [path for name in names.values() if (path := join(node, name)) in shapes]
    kernels = [path for n in KERNELS if (path := join(node, n)) in shapes]
    if not kernels:
      kernels = [path for path in leaves if _may_join(shapes, path, bias)]
    if not kernels and not any(_split(p)[1] in _SCALES and p != bias for p in leaves):
      below = [first_below(shapes, join(node, n), KERNELS) for n in names.values()]
      alone = [k for k in below if k and not first_below(shapes, _split(k)[0], BIASES)]
      # Along the inputs alone, it would be a bias of something else.
      kernels = [k for k in alone if _fits_usually(shapes, k, shapes[bias])]
      if len(kernels) > 1:
        undecided.add(bias)
        kernels = []
    found.update((kernel, bias) for kernel in kernels)
  return found, frozenset(undecided)


def _may_join(shapes: Shapes, path: str, bias: str) -> bool:
  """Whether a tensor of unknown name next to a bias has the bias's units."""
  name = _split(path)[1]
  known = (shapes.cells, shapes.states, shapes.attention, shapes.weight_norms)
  return (
    name not in _SCALES
    and not _EMBEDDING.search(name)
    and not any(path in those for those in known)
    and bool(shapes[path])
    and bool(_fits(shapes[path], _sizes(shapes[bias])))
  )


def _fits_usually(shapes: Shapes, kernel: str, bias: Shape) -> bool:
  """Whether a bias fits axes of a kernel that include the usual one."""
  (axis,) = shapes.one_axis(shapes[kernel]) if shapes[kernel] else (0,)
  return any(axis in axes for axes in _fits(shapes[kernel], _sizes(bias)))


def _sizes(bias: Shape) -> Shape:
  """The sizes of a bias's axes, without those of length 1 that pad it."""
  return bias if len(bias) <= 1 else tuple(size for size in bias if size != 1)


def _fits(shape: Shape, sizes: Shape) -> list[Shape]:
  """The axes of a kernel that have given sizes, in order."""
  return [
    axes
    for axes in combinations(range(len(shape)), len(sizes))
    if tuple(shape[axis] for axis in axes) == sizes
  ]


_TRANSPOSED = _Pattern(r"(\d_?|n)d_transpose(_\d+)?$")


def _is_transposed(path: str) -> bool:
  """Whether a convolution of haiku or Keras has its outputs next to last."""
  return bool(_TRANSPOSED.search(_split(path)[0]))


def _kind(shapes: Shapes, kernel: str, count: int) -> tuple[Any, ...]:
  """Layers of one kind have one layout."""
  return _split(kernel)[1], len(shapes[kernel]), count, _is_transposed(kernel)


def _layouts(shapes: Shapes) -> dict[tuple[Any, ...], set[Shape]]:
  """The unit axes that all layers of a kind could have, by kind."""
  found: dict[tuple[Any, ...], set[Shape]] = {}
  for kernel, bias in shapes.biases.items():
    if kernel in shapes.cells or kernel in shapes.given or kernel in shapes.attention:
      continue
    fits = _fits(shapes[kernel], shapes[bias])
    if fits and fits[0]:
      kind = _kind(shapes, kernel, len(fits[0]))
      found[kind] = found.get(kind, set(fits)) & set(fits)
  return found


def _stacks(shapes: Shapes) -> frozenset[str]:
  """The nodes below which all parameters have a leading axis of one length added.

  Something must say so: a bias of two axes, or a projection's weight of three.
  """
  lengths: dict[str, set[int | None]] = {}
  sure: set[str] = set()
  for path, shape in shapes.items():
    node, name = _split(path)
    length = shape[0] if len(shape) >= 2 else None
    bias = name in BIASES and len(shape) == 2 and shape[1] != 1
    says = bias or (name == "weight" and len(shape) == 3 and node.endswith("_proj"))
    while True:
      lengths.setdefault(node, set()).add(length)
      if says:
        sure.add(node)
      if not node:
        break
      node = _split(node)[0]
  return frozenset(n for n in sure if len(lengths[n]) == 1 and lengths[n] != {None})


def _is_stacked(shapes: Shapes, path: str) -> bool:
  """Whether a parameter lies in a stack of layers."""
  node = _split(path)[0]
  while node and node not in shapes.stacks:
    node = _split(node)[0]
  return node in shapes.stacks


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
  return UnitSpec(
    path, shape, "unit", axes, group, what.tiles, decides=decides, flat=True
  )


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
      f"Gates must divide evenly, got {shapes.name(path)!r} of shape {shape} in the "
      f"recurrent cell {cell!r} with {hidden} hidden units: {gates} is no multiple of "
      f"{hidden}. If it is no such cell, {override_text(shapes.name(path), axes)}."
    )
  return UnitSpec(path, shape, "unit", axes, cell, gates // hidden, decides=2)


def state_space(shapes: Shapes, path: str) -> UnitSpec | None:
  """A parameter of a linear state-space layer: a state's, an output's, a channel's."""
  leaf, shape = shapes.states.get(path), shapes[path]
  if leaf is None:
    return None
  tie = f", tie: ({leaf.axis},)" if leaf.ties else ""
  return UnitSpec(
    path, shape, "unit", (leaf.axis,), leaf.group, 1, False, tie, False, 1, leaf.ties
  )


def weight_norm_scale(shapes: Shapes, path: str) -> UnitSpec | None:
  """The scale of a weight normalisation: a factor of its layer's kernel."""
  layer, shape = shapes.weight_norms.get(path), shapes[path]
  if layer is None:
    return None
  axes = tuple(range(len(shape)))
  kernel = first_below(shapes, layer, KERNELS)
  padded = kernel is not None and len(shapes[kernel]) == len(shape) and 1 in shape
  if padded:
    axes = tuple(axis for axis in axes if shape[axis] != 1)
  return UnitSpec(path, shape, "unit", axes, layer, flat=padded)


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
  """An embedding, a table, a class token, a factor of LoRA: features are last."""
  if not _is_embedding(shapes, path):
    return None
  shape = shapes[path]
  return UnitSpec(path, shape, "unit", tuple(range(len(shape)))[-1:], path)


_PER_HEAD = _Pattern(r"^(att|attn|a)_(src|dst|edge|l|r|sender|receiver)$|^att$")


_EXPERT = _Pattern(r"(^|_)(gate|up|down|w\d?|wi|wo|experts?)(_|\d|$)")


def several_outputs(shapes: Shapes, path: str) -> UnitSpec | None:
  """Kernels of several heads, parts or experts, known by their names."""
  shape, (node, name) = shapes[path], _split(path)
  rank, parent = len(shape), node
  einsum = name
  if name in KERNELS:
    parent, einsum = _split(node)
  axes = None
  if re.search(r"(^|_)(q|k|v|kv|qkv)_einsum$", einsum) and rank >= 3:
    axes = (*range(rank - 2), rank - 1)
  elif einsum.endswith("attn_vec_einsum") and rank >= 3:
    axes = (rank - 1,)
  elif einsum.endswith("gating_einsum") and rank == 3:
    linear = shapes.get(
      join(parent, "linear"), shapes.get(join(parent, "linear/w"), ())
    )
    swapped = linear[:1] == (shape[1],) != (shape[2],)
    axes = (0, 1) if swapped else (0, 2)
  elif _PER_HEAD.match(name) and rank >= 2:
    axes = tuple(a for a in range(rank - 1) if shape[a] != 1)
  elif _EXPERT.search(name) and rank == 3 and _routes(shapes, node, shape[0]):
    axes = (0, 1) if shapes.units_first else (0, 2)
  if axes is None or (name in KERNELS and path in shapes.biases):
    return None
  return UnitSpec(
    path, shape, "unit", axes, path if name == einsum else node, decides=1
  )


def _routes(shapes: Shapes, node: str, experts: int) -> bool:
  """Whether a router next to a tensor chooses from so many experts."""
  for name in shapes.children.get(node, ()):
    if re.match(r"(router|gate|gating)$", name):
      router = join(node, name)
      kernel = first_below(shapes, router, KERNELS) or router
      shape = shapes.get(kernel, ())
      if len(shape) == 2 and experts in shape:
        return True
  return False


def depthwise(shapes: Shapes, path: str) -> UnitSpec | None:
  """A depthwise kernel of Keras: a channel's multiples are its last two axes."""
  shape, (node, name) = shapes[path], _split(path)
  rank = len(shape)
  layer = node.rpartition("/")[2]
  named = name == "depthwise_kernel" or (name in KERNELS and "depthwise" in layer)
  if not named or rank < 3 or shapes.units_first or path in shapes.biases:
    return None
  axes = tuple(a for a in (rank - 2, rank - 1) if shape[a] != 1) or (rank - 1,)
  return UnitSpec(path, shape, "unit", axes, node if name in KERNELS else path)


def kernel_with_bias(shapes: Shapes, path: str) -> UnitSpec | None:
  """A kernel with its bias, which has one entry a unit."""
  shape, (node, name) = shapes[path], _split(path)
  bias = shapes.biases.get(path)
  if name not in KERNELS or not shape or bias is None:
    return None
  fit = shapes.fit(path, bias)
  tie = _tie(fit, shapes, path)
  return UnitSpec(
    path, shape, "unit", fit.axes, node, 1, False, tie, False, 1, fit.ties, fit.flat
  )


def kernel_without_bias(shapes: Shapes, path: str) -> UnitSpec | None:
  """A kernel alone: its layout says where units are."""
  shape, (node, name) = shapes[path], _split(path)
  matrix = len(shape) == 2 and _MATRIX.search(name)
  # Many things are called weights, and have their units anywhere.
  if not (name in KERNELS or matrix) or not shape or name == "weights":
    return None
  axes, ties = _axes_alone(shapes, path)
  group = node if name in KERNELS else path
  tie = f", tie: {axes}" if ties else ""
  return UnitSpec(
    path, shape, "unit", axes, group, rule=tie, decides=1, ties=tuple(ties)
  )


_MATRIX = _Pattern(r"(_proj|_kernel|^router|^linear)$")


_NORM = _Pattern(r"(^|_)(\w*norm|ln)(_?\d+)?$", re.IGNORECASE)


def _axes_alone(shapes: Shapes, path: str) -> tuple[Shape, list[Shape]]:
  """The unit axes of a kernel without bias, and what they could be as well."""
  shape = shapes[path]
  rank, layer = len(shape), _split(path)[0].rpartition("/")[2]
  if shapes.units_first:
    if _NORM.search(layer):
      return tuple(range(rank)), []
    if rank >= 2 and _is_stacked(shapes, path):
      # A router of as many experts may stand next to their stack.
      return ((0, 1), []) if rank > 2 else ((0,), [(0, 1)])
    # A convolution along one axis, or a stack of matrices? Others' biases tell.
    if rank != 3 or shape[1] == 1 or shapes.has_line_convolutions:
      return (0,), []
    stack = shape[1] == shape[2] or shape[2] > 9
    return ((0, 1), [(0,)]) if stack else ((0,), [(0, 1)])
  if rank >= 3 and _is_transposed(path):
    return (rank - 2,), []
  if rank == 2 and shape[0] == 1 < shape[1] and _split(path)[1] == "weight":
    return (0,), [(1,)]  # a score of the inputs, as PyTorch writes it: one rate is safe
  # Siblings with biases may have all their units first.
  layout = shapes.layouts.get(_kind(shapes, path, 1))
  return ((0,) if layout == {(0,)} else (rank - 1,)), []


def tensor_with_bias(shapes: Shapes, path: str) -> UnitSpec | None:
  """A tensor of unknown name next to a bias that fits it: the bias tells its units."""
  bias, shape = shapes.biases.get(path), shapes[path]
  if bias is None:
    return None
  fit = shapes.fit(path, bias)
  tie, node = _tie(fit, shapes, path), _split(path)[0]
  return UnitSpec(
    path, shape, "unit", fit.axes, node, 1, False, tie, False, 1, fit.ties, fit.flat
  )


def _tie(fit: Fit, shapes: Shapes, path: str) -> str:
  """What a rule adds to its name where several axes fit."""
  if not fit.ties:
    return ""
  rank = len(shapes[path])
  words: dict[Shape, str] = {(rank - 1,): "last", (0,): "first"}
  tie = f", tie: {words.get(fit.axes, fit.axes)}"
  mixed = not shapes.layouts.get(_kind(shapes, path, len(fit.axes)), True)
  return tie + ", siblings differ" if mixed else tie


def scale_or_bias(shapes: Shapes, path: str) -> UnitSpec | None:
  """A scale or a bias: one entry a unit, but for axes of length 1 that pad it."""
  shape, (node, name) = shapes[path], _split(path)
  if name.endswith("_bias") and len(shape) == 1:
    return UnitSpec(path, shape, "unit", (0,), path)
  if name not in _SCALES or (name in BIASES and not _is_bias(shapes, path)):
    return None
  if name in ("beta", "gamma") and not _is_norms(shapes, path):
    return None
  axes, flat = tuple(range(len(shape))), False
  kernel = shapes.kernels.get(path)
  known = kernel is None or any(
    kernel in those for those in (shapes.given, shapes.cells, shapes.attention)
  )
  if name in BIASES and kernel is not None and not known and shapes[kernel]:
    fit = shapes.fit(kernel, path)
    axes, flat = fit.bias_axes, fit.flat
  if kernel is not None:
    node = _split(kernel)[0]
  return UnitSpec(
    path, shape, "unit", axes, node, assumed=path in shapes.undecided, flat=flat
  )


def _is_norms(shapes: Shapes, path: str) -> bool:
  """Whether a beta or a gamma is a norm's: matrices have these names, too."""
  shape, (node, name) = shapes[path], _split(path)
  other = join(node, "gamma" if name == "beta" else "beta")
  return (
    sum(size != 1 for size in shape) <= 1
    or shapes.get(other) == shape
    or _NORM.search(node.rpartition("/")[2]) is not None
  )


def scalar(shapes: Shapes, path: str) -> UnitSpec | None:
  """A single number: one rate."""
  if shapes[path]:
    return None
  group, decides = _home(shapes, path)
  return UnitSpec(path, (), "unit", (), group, decides=decides)


def unknown(shapes: Shapes, path: str) -> UnitSpec | None:
  """Anything else: one axis, not of length 1, reported as assumed.

  A vector next to a norm's scale and bias, all of one length, is one of the norm's.
  Where all arrays of a node begin with the length of a vector, that is likely to be the
  number of its units.
  """
  shape, (node, _) = shapes[path], _split(path)
  near, names = shapes.near(node)
  if len(shape) == 1 and near == {shape} and not names.isdisjoint(BIASES):
    if names & {*_SCALES, "weight"} - {*BIASES}:
      return UnitSpec(path, shape, "unit", (0,), node)
  lengths = {each for each in near if len(each) == 1}
  if len(lengths) == 1 and lengths < near and {each[:1] for each in near} == lengths:
    if not any(shape[0] in each[1:] for each in near):
      return UnitSpec(path, shape, "unit", (0,), node, assumed=True)
  long = [axis for axis in range(len(shape)) if shape[axis] != 1]
  axes = (long[0 if shapes.units_first else -1],) if long else shapes.one_axis(shape)
  return UnitSpec(path, shape, "unit", axes, path, assumed=True)


RULES: tuple[Callable[[Shapes, str], UnitSpec | None], ...] = (
  override,
  head,
  recurrent_cell,
  state_space,
  weight_norm_scale,
  attention,
  embedding,
  several_outputs,
  depthwise,
  kernel_with_bias,
  tensor_with_bias,
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
  named = re.search(r"(embed(ding)?s?|(^|_)emb)(_\d+)?$", node.rpartition("/")[2])
  alone = first_below(shapes, node, BIASES) is None
  return shapes.units_first and bool(named) and alone and len(shapes[path]) == 2


def _fit(shapes: Shapes, kernel: str, bias: str) -> Fit:
  """How a bias fits its kernel."""
  shape, bias_shape = shapes[kernel], shapes[bias]
  every = tuple(range(len(bias_shape)))
  padded = tuple(axis for axis in every if bias_shape[axis] != 1)
  for bias_axes in (every, padded):
    fits = _fits(shape, tuple(bias_shape[axis] for axis in bias_axes))
    if fits:
      axes, ties = _choose(shapes, kernel, bias, fits)
      return Fit(axes, bias_axes, ties)
  # One axis of the bias may be several of the kernel, or the other way round.
  units, rank = math.prod(bias_shape), len(shape)
  if len(padded) == 1:
    runs = [
      tuple(range(start, stop))
      for start in range(rank)
      for stop in range(start + 2, rank + 1)
      if math.prod(shape[start:stop]) == units != math.prod(shape)
    ]
    end = 0 if shapes.units_first else rank - 1
    runs = [run for run in runs if end in run] or runs
    if len(runs) == 1:
      return Fit(runs[0], padded, flat=True)
  elif fits := _fits(shape, (units,)):
    axes, ties = _choose(shapes, kernel, bias, fits)
    return Fit(axes, padded, ties, flat=True)
  raise ValueError(
    f"A bias must fit axes of its kernel, got {shapes.name(kernel)!r} of shape {shape} "
    f"and {shapes.name(bias)!r} of shape {bias_shape}. The kernel's units are on the "
    f"axes that its layer doesn't sum over: with those for AXES, "
    f"{override_text(shapes.name(kernel), 'AXES')}."
  )


def _choose(
  shapes: Shapes, kernel: str, bias: str, fits: list[Shape]
) -> tuple[Shape, tuple[Shape, ...]]:
  """The axes that a layout would have, and those that it could have as well."""
  shape, rank, count = shapes[kernel], len(shapes[kernel]), len(fits[0])
  if shapes.units_first or len(fits) == 1:
    return fits[0], ()
  common = shapes.layouts.get(_kind(shapes, kernel, count), ())
  fits = [axes for axes in fits if axes in common] or fits
  # An axis of length 1 indexes nothing.
  if len({tuple(a for a in axes if shape[a] != 1) for axes in fits}) == 1:
    return fits[-1], ()
  # PyTorch and Equinox call a kernel so, and keep its units first.
  if _split(kernel)[1] == "weight" and (first := tuple(range(count))) in fits:
    return first, tuple(axes for axes in fits if axes != first)
  if count == 1:
    if _is_transposed(kernel) and (rank - 2,) in fits:
      return (rank - 2,), ()
    # Next to the last axis are the inputs of a layer with units last.
    last = (rank - 1,) in fits and not (rank == 3 and shape[1] == 1 and (0,) in fits)
    chosen = (rank - 1,) if last else fits[0]
    return chosen, tuple(axes for axes in fits if axes != chosen)
  # Stacked and batch axes come first, features last, what is contracted in between.
  layouts = [(*range(lead), *range(rank - count + lead, rank)) for lead in range(count)]
  ordered = [axes for axes in fits if axes in layouts] or fits
  if len({tuple(a for a in axes if shape[a] != 1) for axes in ordered}) > 1:
    choices = "; ".join(f"{axes} if {_summed(axes, rank)}" for axes in fits)
    raise ValueError(
      f"A bias must fit one choice of its kernel's axes, got {shapes.name(kernel)!r} "
      f"of shape {shape} and {shapes.name(bias)!r} of shape {shapes[bias]}, which fits "
      f"{choices}. Only the layer's code tells: with the right one for AXES, "
      f"{override_text(shapes.name(kernel), 'AXES')}."
    )
  return ordered[-1], tuple(axes for axes in fits if axes != ordered[-1])


def _summed(axes: Shape, rank: int) -> str:
  """What a choice of unit axes means."""
  rest = [str(axis) for axis in range(rank) if axis not in axes]
  return f"the layer sums over {'axis' if len(rest) == 1 else 'axes'} " + " and ".join(
    rest
  )


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


def overrides_from(
  shapes: Mapping[str, Shape], known: Mapping[str, Known], unit_axis: str = "last"
) -> tuple[Override, ...]:
  """The overrides for those parameters whose shapes would tell something else.

  Args:
    shapes: Shapes of the parameters that are no head's, by path.
    known: What the model's modules know of them, by path.
    unit_axis: That of the options that the overrides are for.

  Returns:
    Overrides for :class:`UnitOptions`, the fewest that are needed.
  """
  inner = {
    path: known[path].shape if path in known else shapes[path] for path in shapes
  }
  given = {path for path in shapes if path in known and known[path].axes is not None}
  plainly = Shapes(shapes, unit_axis=unit_axis, given=set(known))
  inside = Shapes(inner, unit_axis=unit_axis, given=given)
  overrides = []
  for path in shapes:
    if path in known:
      units = _units_of(path, shapes[path], known[path], _known(inside, path))
      plain = _known(plainly, path)
      # A tie of Flax's own kernels is settled as theirs.
      if plain and plain.ties and _split(path)[1] != "kernel":
        plain = None
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
