"""Counts of a program: its operations, its traffic, and what it holds at once.

They are taken from the program as it was traced, one operation after the other; nothing
is compiled for them.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core

HEAVY = {"conv_general_dilated", "dot_general", "reduce_sum", "reduce_max"}
# What XLA counts as one operation an entry; exponentials and roots it counts apart.
ARITHMETIC = {"add", "add_any", "sub", "mul", "div", "max", "min", "neg", "abs", "sign"}
ARITHMETIC |= {"select_n", "integer_pow", "square", "eq", "ne", "lt", "le", "gt", "ge"}
ARITHMETIC |= {"and", "or", "not", "xor", "is_finite"}


def size(tree: Any) -> int:
  """Returns the bytes of a tree's arrays.

  Args:
    tree: Arrays or shapes.
  """
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )


def count(jaxpr: core.Jaxpr, of: Callable[[core.JaxprEqn], float]) -> float:
  """Sums over the operations of a program, and of those within.

  Of a condition the first branch counts: where heads are alive, the other never runs.

  Args:
    jaxpr: The program.
    of: What to sum, of one operation.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    inner = _within(eqn)
    total += sum(count(each, of) for each in inner) if inner else of(eqn)
  return total


def temporaries(jaxpr: core.Jaxpr) -> float:
  """Returns the most bytes that a program holds at once beside arguments and results.

  Held are the operands and results of convolutions, matrix products and reductions,
  from where they are made to the last of these that needs them, or what is computed
  from them. All else is taken to be computed on the way.

  Args:
    jaxpr: The program.
  """
  heavy = [_count_heavy(eqn) > 0 for eqn in jaxpr.eqns]
  kept = {
    var
    for eqn, is_heavy in zip(jaxpr.eqns, heavy, strict=True)
    if is_heavy
    for var in (*eqn.invars, *eqn.outvars)
    if isinstance(var, core.Var)
  }
  results = {var for var in jaxpr.outvars if isinstance(var, core.Var)}
  last: dict[core.Var, int] = {}
  for i, eqn in reversed(list(enumerate(jaxpr.eqns))):
    # What is held is made here, all else wherever it is needed.
    made = heavy[i] or any(var in kept or var in results for var in eqn.outvars)
    needed = i if made else max(last.get(var, -1) for var in eqn.outvars)
    for var in eqn.invars:
      if isinstance(var, core.Var):
        last[var] = max(last.get(var, -1), needed)
  changes = np.zeros(len(jaxpr.eqns) + 1)
  for i, eqn in enumerate(jaxpr.eqns):
    for var in eqn.outvars:
      if var in kept and var not in results:
        changes[i] += _bytes(var)
        changes[max(last.get(var, i), i) + 1] -= _bytes(var)
  return float(np.cumsum(changes).max())


def _count_heavy(eqn: core.JaxprEqn) -> float:
  """Returns how many convolutions, products and reductions an operation holds."""
  inner = _within(eqn)
  is_heavy = lambda each: float(each.primitive.name in HEAVY)  # noqa: E731
  return sum(count(each, is_heavy) for each in inner) if inner else is_heavy(eqn)


def operations(eqn: core.JaxprEqn) -> float:
  """Returns the arithmetic of an operation, as XLA counts it.

  Args:
    eqn: The operation.
  """
  name, results = eqn.primitive.name, sum(math.prod(_shape(v)) for v in eqn.outvars)
  if name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(_shape(eqn.invars[0])[axis] for axis in contracted)
    return 2.0 * results * depth
  if name == "conv_general_dilated":
    return 2.0 * _multiplications(eqn)
  if name.startswith(("reduce_", "arg")):
    return float(math.prod(_shape(eqn.invars[0])) - results)
  return float(results) if name in ARITHMETIC else 0.0


def traffic(eqn: core.JaxprEqn) -> float:
  """Returns the bytes that an operation reads and writes.

  None for what is taken to run along with the operations before or after it.

  Args:
    eqn: The operation.
  """
  if eqn.primitive.name not in HEAVY:
    return 0.0
  return float(sum(map(_bytes, (*eqn.invars, *eqn.outvars))))


def sent(hlo: str) -> int:
  """Returns the bytes of all that devices add up or gather, outside of conditions.

  Args:
    hlo: A compiled program, as text.
  """
  total = 0
  kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
  for line in hlo.splitlines():
    found = re.search(rf"= (.*?) (?:{kinds})(?:-start)?\(", line)
    if found and "/cond/" not in line:
      for dtype, shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", found[1]):
        bits = re.search(r"\d+", dtype)  # pred has none
        entries = math.prod(int(n) for n in shape.split(",") if n)
        total += entries * (int(bits[0]) // 8 if bits else 1)
  return total


def _within(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
  """The programs that an operation calls."""
  name = eqn.primitive.name
  if name.startswith(("reduce", "scatter", "arg", "sort")):
    return []  # how two entries become one
  # Of `lax.cond`, the branch where the predicate holds.
  found = eqn.params["branches"][-1:] if name == "cond" else None
  found = list(core.jaxprs_in_params(eqn.params)) if found is None else found
  return [getattr(each, "jaxpr", each) for each in found]


def _multiplications(eqn: core.JaxprEqn) -> int:
  """A convolution's, without those by the zeros of padding and of dilation."""
  numbers, params = eqn.params["dimension_numbers"], eqn.params
  images, kernel = map(_shape, eqn.invars)
  result = _shape(eqn.outvars[0])
  positions = 1
  axes = zip(
    numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True
  )
  for i, (axis, kernel_axis, result_axis) in enumerate(axes):
    outputs = np.arange(result[result_axis])[:, None] * params["window_strides"][i]
    taps = np.arange(kernel[kernel_axis])[None, :] * params["rhs_dilation"][i]
    at = outputs + taps - params["padding"][i][0]
    dilation = params["lhs_dilation"][i]
    valid = (at >= 0) & (at % dilation == 0) & (at < images[axis] * dilation)
    positions *= int(valid.sum())
  batch = images[numbers.lhs_spec[0]] // params["batch_group_count"]
  return positions * batch * kernel[numbers.rhs_spec[0]] * kernel[numbers.rhs_spec[1]]


def _shape(var: Any) -> tuple[int, ...]:
  return var.aval.shape


def _bytes(var: Any) -> int:
  return math.prod(var.aval.shape) * var.aval.dtype.itemsize
