"""Optimizers that train one network step by step, in turns, and what each costs."""

import time
from typing import Any
from unittest import mock

import jax
import numpy as np
import rich.console
import rich.progress

import alrao_jax
from benchmarks.costs import size
from benchmarks.overhead_cases import AGAIN, SGD, Case, Contender

Row = dict[str, Any]

RATE = 1e-3  # SGD's; small, so that no network diverges on its one batch of noise


class Competitor:
  """A contender's compiled step, its state, and what XLA says of its cost."""

  def __init__(self, case: Case, contender: Contender):
    """Compiles the step and runs it once.

    Args:
      case: The network.
      contender: The optimizer.
    """
    program = case.network.program(contender)
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
    start = time.perf_counter()
    # Not the loop's own step, which counts its traces.
    step = program.step.step
    lowered = jax.jit(step, donate_argnums=0).lower(state, program.data, batch)
    self._step = lowered.compile()
    self.costs = {
      "compile_seconds": time.perf_counter() - start,
      "parameter_bytes": float(size(state.params)),
      "rates_bytes": _rates_bytes(state.opt_state),
      **_memory(self._step),
      # Without heads there is nothing to leave out: no second compilation.
      **_counts(
        self._step
        if contender.num_heads is None
        else _compile_usual(step, state, program.data, batch)
      ),
    }
    self._state, self._rest = state, (program.data, batch)
    self.run(1)

  def run(self, steps: int) -> float:
    """Trains; returns the seconds it took.

    Args:
      steps: Number of steps.
    """
    start = time.perf_counter()
    for _ in range(steps):
      self._state, _ = self._step(self._state, *self._rest)
    jax.block_until_ready(self._state)
    return time.perf_counter() - start


def measure(case: Case, rounds: int, console: rich.console.Console) -> list[Row]:
  """Measures all contenders on a network.

  Args:
    case: The network.
    rounds: Number of turns that each contender has.
    console: Where progress is shown.

  Returns:
    A row for each contender, SGD first.
  """
  contenders = (SGD, AGAIN, *case.contenders)
  Competitor(case, SGD)  # whatever a process does only once
  competitors = []
  for contender in contenders:
    competitors.append(Competitor(case, contender))
    seconds = competitors[-1].costs["compile_seconds"]
    console.print(
      f"{case.network.title}: {contender.label} compiled in {seconds:.1f} s"
    )
  generator = np.random.default_rng(0)
  times = np.zeros((rounds, len(contenders)))
  for i in rich.progress.track(range(rounds), case.network.title, console=console):
    for j in generator.permutation(len(contenders)):
      times[i, j] = competitors[j].run(case.steps) / case.steps
  ratios = times / times[:, :1]
  base = competitors[0].costs
  rows = []
  for j, (contender, competitor) in enumerate(
    zip(contenders, competitors, strict=True)
  ):
    costs = competitor.costs
    heads = costs["parameter_bytes"] - base["parameter_bytes"]
    rows.append(
      {
        **contender._asdict(),
        "ratio": float(np.median(ratios[:, j])),
        "ratio_quartiles": np.quantile(ratios[:, j], [0.25, 0.75]).tolist(),
        "milliseconds": 1e3 * float(np.median(times[:, j])),
        "floor": max(costs[name] / base[name] for name in ("flops", "bytes")),
        "peak_ratio": costs["peak_bytes"] / (base["peak_bytes"] + 2 * heads),
        "compile_ratio": costs["compile_seconds"] / base["compile_seconds"],
        **costs,
      }
    )
  return rows


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
  return float(sum(leaf.quantiles.nbytes for leaf in leaves if _has_rates(leaf)))


def _has_rates(node: Any) -> bool:
  return isinstance(node, alrao_jax.ScaleByUnitRatesState)
