"""Layers known by their children: recurrent cells, attention blocks, weight norms.

A recurrent cell's gates, input and recurrent alike, feed the same hidden units, so the
whole cell shares one vector of rates (the papers' rule). Nothing in a single parameter
says so: the names of the cell's children do, together with their shapes. Attention
projections are known the same way: their kernels have a fixed rank, so their units are
known without a bias.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

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
