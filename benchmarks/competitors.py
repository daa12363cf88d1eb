"""Optimizers that train one network step by step, in turns, and what each costs."""

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
import rich.console
import rich.progress

import alrao_jax
from benchmarks.costs import size
from benchmarks.overhead_cases import AGAIN, SGD, Case, Contender, Trainable

Row = dict[str, Any]

RATE = 1e-3  # SGD's; small, so that no network diverges on its one batch of noise


class Competitor:
  """A contender's step, its state, and what XLA says of its cost."""

  def __init__(self, network: Trainable, contender: Contender):
    """Makes the state; nothing is compiled yet.

    Args:
      network: The network.
      contender: The optimizer.
    """
    program = network.program(contender)
    state = program.init(0, RATE if contender.optimizer == "sgd" else None)
    if contender.keep is not None:
      params, opt_state = alrao_jax.collapse(
        program.make_optimizer(jax.random.key(0), None),
        state.params,
        state.opt_state,
        contender.keep,
      )
      state = state._replace(params=params, opt_state=opt_state)
    batch = jax.tree.map(lambda leaf: leaf[0], program.batches(0, 1))
    # Not the loop's own step, which counts its traces.
    self._step: Callable[..., Any] = program.step.step
    self._compiled: Any = None
    self._has_heads = contender.num_heads is not None
    self._state, self._rest = state, (program.data, batch)

  def compile(self) -> float:
    """Traces and compiles the step; returns the seconds it took.

    As for the first time in the process, where JAX's persistent cache is off: all its
    other caches are emptied. Compiled steps stay usable.
    """
    self._compiled = None
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    step = jax.jit(self._step, donate_argnums=0)
    compiled = step.lower(self._state, *self._rest).compile()
    seconds = time.perf_counter() - start
    self._compiled = compiled
    return seconds

  def costs(self) -> dict[str, float]:
    """Returns bytes and operations of the step, once compiled.

    Where there are heads, this compiles a second program.
    """
    return {
      "parameter_bytes": float(size(self._state.params)),
      "rates_bytes": _rates_bytes(self._state.opt_state),
      **_memory(self._compiled),
      # Without heads there is nothing to leave out: no second compilation.
      **_counts(
        _compile_usual(self._step, self._state, *self._rest)
        if self._has_heads
        else self._compiled
      ),
    }

  def run(self, steps: int) -> float:
    """Trains with the compiled step; returns the seconds it took.

    Args:
      steps: Number of steps.
    """
    start = time.perf_counter()
    for _ in range(steps):
      self._state, _ = self._compiled(self._state, *self._rest)
    jax.block_until_ready(self._state)
    return time.perf_counter() - start


def measure(
  case: Case, rounds: int, compilations: int, console: rich.console.Console
) -> list[Row]:
  """Measures all contenders on a network.

  Args:
    case: The network.
    rounds: Number of turns that each contender has.
    compilations: How often each is compiled, in turns as well.
    console: Where progress is shown.

  Returns:
    A row for each contender, SGD first.
  """
  contenders = (SGD, AGAIN, *case.contenders)
  Competitor(case.network, SGD).compile()  # most of what a process does only once
  competitors = [Competitor(case.network, contender) for contender in contenders]
  generator = np.random.default_rng(0)
  title = case.network.title

  def track(turns, what):
    return rich.progress.track(range(turns), f"{title}: {what}", console=console)

  compile_seconds = in_turns(
    competitors, Competitor.compile, track(compilations, "compiling"), generator
  )
  costs = [competitor.costs() for competitor in competitors]
  for competitor in competitors:
    competitor.run(1)
  step_seconds = in_turns(
    competitors,
    lambda competitor: competitor.run(case.steps) / case.steps,
    track(rounds, "training"),
    generator,
  )
  ratios = step_seconds / step_seconds[:, :1]
  compile_ratios = compile_seconds / compile_seconds[:, :1]
  base = costs[0]
  rows = []
  for j, (contender, cost) in enumerate(zip(contenders, costs, strict=True)):
    # What further heads hold beside SGD's: both with a gradient of the same size.
    parameters = cost["parameter_bytes"] - base["parameter_bytes"]
    num_heads = contender.num_heads and (contender.keep or contender.num_heads)
    outputs = case.network.output_bytes(num_heads) - case.network.output_bytes(None)
    outputs = max(0, outputs)  # in chunks they may be fewer
    rows.append(
      {
        **contender._asdict(),
        "ratio": float(np.median(ratios[:, j])),
        "ratio_quartiles": np.quantile(ratios[:, j], [0.25, 0.75]).tolist(),
        "milliseconds": 1e3 * float(np.median(step_seconds[:, j])),
        "floor": max(cost[name] / base[name] for name in ("flops", "bytes")),
        "peak_ratio": cost["peak_bytes"] / (base["peak_bytes"] + 2 * parameters),
        "peak_ratio_with_outputs": cost["peak_bytes"]
        / (base["peak_bytes"] + 2 * (parameters + outputs)),
        "compile_seconds": float(np.median(compile_seconds[:, j])),
        "compile_ratio": float(np.median(compile_ratios[:, j])),
        **cost,
      }
    )
  return rows


def in_turns(
  competitors: Sequence[Any],
  measure_one: Callable[[Any], float],
  turns: Iterable[int],
  generator: np.random.Generator,
) -> np.ndarray:
  """Measures all competitors in each turn, in an order drawn anew.

  Args:
    competitors: What is measured.
    measure_one: Measures one of them.
    turns: One entry for each turn.
    generator: Draws the order.

  Returns:
    The measurements, of shape (turns, competitors).
  """
  measured = []
  for _ in turns:
    row = np.zeros(len(competitors))
    for j in generator.permutation(len(competitors)):
      row[j] = measure_one(competitors[j])
    measured.append(row)
  return np.stack(measured)


def _compile_usual(step: Any, *args: Any) -> Any:
  """A step in which no head diverges, for its operations and bytes.

  XLA counts both branches of a condition. The rule that MultiHead's gradient follows
  has one that runs only where a head is no longer finite; it is left out here.
  """
  with mock.patch.object(jax.lax, "cond", lambda _, usual, other, *args: usual(*args)):
    # Another function, or JAX would find the program it traced before.
    usual = jax.jit(lambda *args: step(*args), donate_argnums=0)
    return usual.lower(*args).compile()


def _counts(compiled: Any) -> dict[str, float]:
  found = compiled.cost_analysis()
  return {"flops": float(found["flops"]), "bytes": float(found["bytes accessed"])}


def _memory(compiled: Any) -> dict[str, float]:
  memory = compiled.memory_analysis()
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return {
    "peak_bytes": float(kept - memory.alias_size_in_bytes + memory.temp_size_in_bytes),
  }


def _rates_bytes(opt_state: Any) -> float:
  """Bytes of Alrao's rates, 0 without."""
  leaves = jax.tree.leaves(opt_state, is_leaf=_has_rates)
  return float(
    sum(
      leaf.ladder.nbytes + leaf.quantiles.nbytes for leaf in leaves if _has_rates(leaf)
    )
  )


def _has_rates(node: Any) -> bool:
  return isinstance(node, alrao_jax.ScaleByUnitRatesState)
