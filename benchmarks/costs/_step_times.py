"""Times of steps on small networks, by pytest-benchmark; no part of the tests.

    make step-times
    python -m pytest benchmarks/costs/_step_times.py -k mlp --benchmark-autosave
    python -m pytest benchmarks/costs/_step_times.py -k mlp --benchmark-compare

A quick look while working on the library. Each contender has its time alone, not in
turns with the others, so a difference of some percent means nothing here; that is what
`python -m benchmarks cost steps` is for.
"""

from typing import Any

import jax
import pytest

from benchmarks.costs._contenders import PEERS, SGD, Competitor, Contender, alrao
from benchmarks.costs.steps import CASES

CONTENDERS = (SGD, *alrao(10, 50), PEERS[0])
ROUNDS = 20


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda one: one.label)
@pytest.mark.parametrize("network", ["mlp", "small_cnn", "lstm"])
def test_step(benchmark: Any, network: str, contender: Contender) -> None:
  """Times steps of a network of `benchmarks.costs.steps`, compiled beforehand."""
  case = CASES[network]
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    competitor = Competitor(case.network, contender)
    competitor.compile()
  benchmark.extra_info["steps a round"] = case.steps
  benchmark.pedantic(competitor.run, (case.steps,), rounds=ROUNDS, warmup_rounds=1)
