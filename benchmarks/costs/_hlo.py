"""What a program costs, counted in the text that XLA has compiled it to.

XLA's own `cost_analysis` counts the body of a loop once, and all branches of a
condition. Here a body counts as often as it runs, and a condition's usual branch
alone. What stays on the chip moves nothing: only the main memory's bytes count, as they
are stored, with the padding of their tiles.
"""

import collections
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

DIGITS = re.compile(r"\d+")
ARRAY = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,]*)\](?:\{([^}]*)\})?")
NAME = re.compile(r"%([\w.\-]+)")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")

# Entry by entry, one operation each; roots, exponentials and the like XLA counts apart.
ARITHMETIC = {"add", "subtract", "multiply", "divide", "maximum", "minimum", "negate"}
ARITHMETIC |= {"abs", "sign", "select", "compare", "and", "or", "xor", "not", "clamp"}
ARITHMETIC |= {"is-finite", "floor", "ceil"}
# They move nothing, or what they call does.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while"}
FREE |= {"conditional", "call", "after-all", "iota", "partition-id", "replica-id"}
FREE |= {"optimization-barrier", "add-dependency"}
SLICES = {"slice", "dynamic-slice", "gather"}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
COLLECTIVES += ("collective-permute", "ragged-all-to-all", "collective-broadcast")


class Array(NamedTuple):
  """An array's type in the text.

  Attributes:
    dtype: Such as ``"f32"``.
    shape: Its shape.
    layout: What is in braces behind it: the order of its axes, tiles, memory.
  """

  dtype: str
  shape: tuple[int, ...]
  layout: str

  @property
  def itemsize(self) -> float:
    """Bytes of an entry."""
    bits = DIGITS.search(self.dtype)  # pred and token have none
    return int(bits[0]) / 8 if bits else float(self.dtype == "pred")

  @property
  def bytes(self) -> float:
    """Bytes of its entries."""
    return math.prod(self.shape) * self.itemsize

  @property
  def in_main_memory(self) -> bool:
    """Whether it lies there, and not on the chip."""
    return "S(" not in self.layout

  @property
  def stored_bytes(self) -> float:
    """Bytes with the padding of its tiles."""
    order, _, rest = self.layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    if not tile or not order:
      return self.bytes
    major_to_minor = [self.shape[int(axis)] for axis in reversed(order.split(","))]
    tiles = [int(size) for size in tile[1].split(",")]
    head, tail = _split_at(major_to_minor, len(major_to_minor) - len(tiles))
    tail = [1] * (len(tiles) - len(tail)) + tail
    padded = [-(-n // size) * size for n, size in zip(tail, tiles, strict=True)]
    return math.prod(head) * math.prod(padded) * self.itemsize


class Instruction(NamedTuple):
  """A line of a computation.

  Attributes:
    name: Its name.
    results: The arrays that it returns.
    opcode: What it does.
    operands: Names of what it takes.
    inside: The text between its parentheses.
    attributes: The text behind them.
    is_root: Whether its computation returns it.
  """

  name: str
  results: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  inside: str
  attributes: str
  is_root: bool

  def calls(self, attribute: str) -> list[str]:
    """Returns the computations that an attribute names.

    Args:
      attribute: Such as ``"calls"``.
    """
    found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
    return NAME.findall(found[1]) if found else []


class Call(NamedTuple):
  """An instruction that runs by itself.

  Attributes:
    instruction: The instruction.
    times: How often it runs.
    computation: Name of the computation that it is in.
  """

  instruction: Instruction
  times: int
  computation: str


class ProgramCounts(NamedTuple):
  """What a program costs.

  Attributes:
    operations: Additions, multiplications and the like; a multiply-add is two.
    traffic: Bytes that are read from and written to the main memory.
    cycles: What XLA estimates, where it does.
    kernels: How many fusions and products run, one after the other.
    collectives: By kind, how many there are and the bytes of their results.
  """

  operations: float
  traffic: float
  cycles: float
  kernels: int
  collectives: dict[str, tuple[int, float]]


class Program:
  """A compiled program, read from its text."""

  def __init__(self, text: str):
    """Reads the text.

    Args:
      text: From ``compiled.as_text()``.

    Raises:
      ValueError: It holds no program.
    """
    self._computations: dict[str, dict[str, Instruction]] = {}
    self.entry = ""
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
      header = HEADER.match(line)
      if header:
        current = self._computations.setdefault(header[2], {})
        self.entry = header[2] if header[1] else self.entry
      elif (found := LINE.match(line)) is not None:
        current[found[2]] = _read(found[2], found[3], bool(found[1]))
    if not self.entry:
      raise ValueError("Program(text=...) must be compiled HLO, got no ENTRY.")

  def computation(self, name: str) -> Iterable[Instruction]:
    """Returns the instructions of a computation.

    Args:
      name: Its name, such as `entry`.
    """
    return self._computations[name].values()

  def instructions(self) -> Iterator[Instruction]:
    """Yields all instructions, also those within fusions and unusual branches."""
    for computation in self._computations.values():
      yield from computation.values()

  def calls(self) -> Iterator[Call]:
    """Yields what runs by itself in usual steps, each with how often."""
    yield from self._calls(self.entry, 1)

  def _calls(self, name: str, times: int) -> Iterator[Call]:
    for one in self._computations[name].values():
      yield Call(one, times, name)
      if one.opcode == "while":
        (body,) = one.calls("body")
        yield from self._calls(body, times * self._trips(one))
      elif one.opcode == "conditional":
        # `lax.cond` has its true branch last.
        branches = one.calls("branch_computations") or one.calls("true_computation")
        yield from self._calls(branches[-1], times)
      elif one.opcode == "call":
        (inner,) = one.calls("to_apply")
        yield from self._calls(inner, times)

  def _trips(self, loop: Instruction) -> int:
    """How often a loop's body runs: `lax.scan` counts up to a constant."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known[1])
    (condition,) = loop.calls("condition")
    limits = [
      int(one.inside)
      for one in self._nested(condition)
      if one.opcode == "constant" and one.results[0].dtype in ("s32", "u32")
    ]
    if len(set(limits)) != 1:
      raise ValueError(f"{loop.name} has no constant number of turns.")
    return limits[0]

  def _nested(self, name: str) -> Iterator[Instruction]:
    """The instructions of a computation and of the fusions in it."""
    for one in self._computations[name].values():
      yield one
      if one.opcode in ("fusion", "async-start"):
        for inner in one.calls("calls"):
          yield from self._nested(inner)

  def counts(self) -> ProgramCounts:
    """Returns what a usual step costs."""
    operations = traffic = cycles = kernels = 0
    collectives: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0))
    for one, times, computation in self.calls():
      operations += times * self._operations(one, computation)
      traffic += times * self._traffic(one, computation)
      estimate = CYCLES.search(one.attributes)
      cycles += times * int(estimate[1]) if estimate else 0
      kernels += times * (one.opcode in ("fusion", "convolution", "dot"))
      kind = one.opcode.removesuffix("-start")
      if kind in COLLECTIVES:
        count, size = collectives[kind]
        sent = sum(self._sizes(one, computation, stored=False))
        collectives[kind] = (count + times, size + times * sent)
    return ProgramCounts(operations, traffic, cycles, kernels, dict(collectives))

  def stored_arguments(self) -> tuple[float, float]:
    """Returns the bytes of the program's arguments, without and with padding."""
    arguments = [
      one.results[0]
      for one in self._computations[self.entry].values()
      if one.opcode == "parameter"
    ]
    return sum(a.bytes for a in arguments), sum(a.stored_bytes for a in arguments)

  def copies(self) -> Iterator[tuple[Call, float]]:
    """Yields what only changes an array's layout, with the bytes that it writes.

    These are transpositions and copies that stand alone, or are all that a fusion does.
    """
    moving = {"copy", "transpose", "bitcast", "parameter", "reshape"}
    for call in self.calls():
      one = call.instruction
      inner = list(self._nested(one.calls("calls")[0])) if one.calls("calls") else [one]
      if one.opcode not in ("fusion", "copy", "transpose"):
        continue
      kinds = {each.opcode for each in inner}
      if kinds <= moving and kinds & {"copy", "transpose"}:
        yield call, call.times * sum(array.stored_bytes for array in one.results)

  def _operations(self, one: Instruction, computation: str) -> float:
    if one.opcode in ("fusion", "async-start"):
      return sum(
        self._operations(each, inner)
        for inner in one.calls("calls")
        for each in self._computations[inner].values()
      )
    size = sum(math.prod(array.shape) for array in one.results)
    if one.opcode == "convolution":
      images, kernel = (self._find(name, computation) for name in one.operands)
      return 2.0 * _multiplications(one, images, kernel)
    if one.opcode == "dot":
      contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
      shape = self._find(one.operands[0], computation).shape
      axes = DIGITS.findall(contracted[1]) if contracted else []
      return 2.0 * size * math.prod(shape[int(axis)] for axis in axes)
    if one.opcode == "reduce":
      inputs = one.operands[: len(one.operands) // 2]
      given = sum(math.prod(self._find(name, computation).shape) for name in inputs)
      return float(given - size)
    return float(size) if one.opcode in ARITHMETIC else 0.0

  def _traffic(self, one: Instruction, computation: str) -> float:
    """Bytes that an instruction reads from and writes to the main memory."""
    if one.opcode in FREE or one.opcode.endswith("-done"):
      return 0.0
    operands = [self._find(name, computation) for name in one.operands]
    if one.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
      # Source, destination and a semaphore; a copy's destination comes first.
      target = one.results[0 if one.opcode == "copy-start" else 1]
      ends = (operands[0], target)
      return target.stored_bytes * sum(end.in_main_memory for end in ends)
    if one.opcode == "custom-call" and "AllocateBuffer" in one.attributes:
      return 0.0
    return sum(self._sizes(one, computation, stored=True))

  def _sizes(
    self, one: Instruction, computation: str, *, stored: bool
  ) -> Iterator[float]:
    """The bytes of an instruction's results; `stored`: and operands, in main memory."""
    if not stored:
      is_start = one.opcode.endswith("-start")
      results = [array for array in one.results if array.shape or not is_start]
      # The start of one that runs along returns its operands as well.
      half = len(results) // 2 if is_start and len(results) > 1 else 0
      yield from (array.bytes for array in results[half:])
      return
    whole = [self._find(name, computation) for name in one.operands]
    reads: list[float] = [array.stored_bytes for array in whole]
    writes: list[float] = [array.stored_bytes for array in one.results]
    if one.opcode in SLICES:
      reads[0] = sum(writes)
    if one.opcode in ("dynamic-update-slice", "scatter"):
      reads[0], writes = 0.0, [reads[1]]
    if one.opcode == "fusion":
      (inner,) = one.calls("calls")
      reads = [
        min(size, self._read_of(inner, number)) for number, size in enumerate(reads)
      ]
      writes = self._written_by(inner, writes)
    for array, size in zip((*whole, *one.results), (*reads, *writes), strict=True):
      if array.in_main_memory:
        yield size

  def _find(self, name: str, computation: str) -> Array:
    results = self._computations[computation][name].results
    return results[0] if results else Array("token", (), "")

  @functools.cached_property
  def _parameters(self) -> dict[tuple[str, int], str]:
    return {
      (name, int(one.inside)): one.name
      for name, computation in self._computations.items()
      for one in computation.values()
      if one.opcode == "parameter"
    }

  def _read_of(self, computation: str, number: int) -> float:
    """The bytes that a fusion reads of a parameter: what it slices, if only that."""
    names, total = {self._parameters[computation, number]}, 0.0
    for one in self._computations[computation].values():
      used = [name for name in one.operands if name in names]
      if not used:
        continue
      if one.opcode == "bitcast":
        names.add(one.name)
      elif one.opcode in SLICES and one.operands[0] in names:
        total += one.results[0].bytes
      elif one.opcode == "dynamic-update-slice" and one.operands[0] in names:
        continue  # it is written in place
      elif one.opcode == "fusion" and len(one.calls("calls")) == 1:
        (inner,) = one.calls("calls")
        numbers = [i for i, name in enumerate(one.operands) if name in names]
        total += sum(self._read_of(inner, i) for i in numbers)
      else:
        return math.inf
    return total

  def _written_by(self, computation: str, whole: list[float]) -> list[float]:
    """The bytes that a fusion writes of each result: a slice, if it is updated."""
    lines = self._computations[computation]
    (root,) = [one for one in lines.values() if one.is_root]
    names = root.operands if root.opcode == "tuple" else (root.name,)
    sizes = []
    for name, size in zip(names, whole, strict=True):
      one = lines[name]
      while one.opcode == "bitcast":
        one = lines[one.operands[0]]
      if one.opcode == "dynamic-update-slice":
        size = min(size, self._find(one.operands[1], computation).bytes)
      sizes.append(size)
    return sizes


def _read(name: str, text: str, is_root: bool) -> Instruction:
  """Reads what stands behind an instruction's name."""
  if text.startswith("("):
    stop = _closing(text, 0) + 1
  else:
    stop = text.index(" ")
  results = tuple(
    Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout)
    for dtype, shape, layout in ARRAY.findall(re.sub(r"/\*.*?\*/", "", text[:stop]))
  )
  opcode, _, _ = text[stop:].lstrip().partition("(")
  start = text.index("(", stop)
  end = _closing(text, start)
  inside = text[start + 1 : end]
  operands = tuple(NAME.findall(inside))
  return Instruction(name, results, opcode, operands, inside, text[end + 1 :], is_root)


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if not depth:
      return i
  raise ValueError(f"no closing parenthesis in {text[:80]!r}.")


def _split_at(items: list[int], at: int) -> tuple[list[int], list[int]]:
  return items[: max(at, 0)], items[max(at, 0) :]


def _multiplications(one: Instruction, images: Array, kernel: Array) -> float:
  """A convolution's, without those by the zeros of padding and of dilation.

  On TPUs matrix products are convolutions, too; a product of many heads has the heads
  as an axis of space.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
  window = re.search(r"window=\{([^}]*)\}", one.attributes)
  options = dict(each.split("=") for each in window[1].split()) if window else {}
  if labels is None:
    raise ValueError(f"{one.name} has no dim_labels.")
  image_axes, kernel_axes, result_axes = labels[1], labels[2], labels[3]
  result = one.results[0]
  spatial = sorted(axis for axis in result_axes if axis.isdigit())

  def option(name: str, default: str) -> list[str]:
    return options.get(name, "x".join([default] * len(spatial))).split("x")

  positions = 1
  for i, axis in enumerate(spatial):
    size = images.shape[image_axes.index(axis)]
    taps = kernel.shape[kernel_axes.index(axis)]
    outputs = result.shape[result_axes.index(axis)]
    positions *= count_taps(
      size,
      taps,
      outputs,
      stride=int(option("stride", "1")[i]),
      before=int(option("pad", "0_0")[i].split("_")[0]),
      dilation=int(option("lhs_dilate", "1")[i]),
      kernel_dilation=int(option("rhs_dilate", "1")[i]),
    )
  groups = re.search(r"batch_group_count=(\d+)", one.attributes)
  batch = images.shape[image_axes.index("b")] // (int(groups[1]) if groups else 1)
  features = kernel.shape[kernel_axes.index("i")] * kernel.shape[kernel_axes.index("o")]
  return float(positions * batch * features)


def count_taps(
  size: int,
  taps: int,
  outputs: int,
  *,
  stride: int = 1,
  before: int = 0,
  dilation: int = 1,
  kernel_dilation: int = 1,
) -> int:
  """Returns how many multiplications by images a convolution has along one axis.

  Args:
    size: Length of the image.
    taps: Length of the kernel.
    outputs: Length of the result.
    stride: Step from one output to the next.
    before: Padding before the image.
    dilation: Distance between entries of the image.
    kernel_dilation: Distance between entries of the kernel.

  Example:
    >>> count_taps(5, 3, 5, before=1)  # the outermost outputs have one tap less
    13
  """
  total = 0
  for tap in range(taps):
    at = tap * kernel_dilation - before
    positions = range(at, at + stride * outputs, stride)
    total += sum(0 <= p < size * dilation and p % dilation == 0 for p in positions)
  return total
