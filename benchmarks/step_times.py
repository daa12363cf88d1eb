"""Times of steps on small networks, by pytest-benchmark; no part of the tests.

    make step-times
    python -m pytest benchmarks/step_times.py -k mlp --benchmark-autosave
    python -m pytest benchmarks/step_times.py -k mlp --benchmark-compare

A quick look while working on the library. Each contender has its time alone, not in
turns with the others, so a difference of some percent means nothing here; that is what
`benchmarks.overhead` is for.
"""

from typing import Any

import jax
import pytest

from benchmarks.competitors import Competitor
from benchmarks.overhead_cases import CASES, PEERS, SGD, Contender, alrao

CONTENDERS = (SGD, *alrao(10, 50), PEERS[0])
ROUNDS = 20


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda one: one.label)
@pytest.mark.parametrize("network", ["mlp", "small_cnn", "lstm"])
def test_step(benchmark: Any, network: str, contender: Contender) -> None:
  """Times steps of a network of `benchmarks.overhead_cases`, compiled beforehand."""
  case = CASES[network]
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    competitor = Competitor(case.network, contender)
    competitor.compile()
  benchmark.extra_info["steps a round"] = case.steps
  benchmark.pedantic(competitor.run, (case.steps,), rounds=ROUNDS, warmup_rounds=1)
