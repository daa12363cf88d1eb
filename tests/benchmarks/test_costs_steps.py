"""What steps cost beside SGD's, on a case so small that it takes seconds."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

import alrao_jax
from benchmarks import records
from benchmarks.costs import _contenders, _step_times, steps
from benchmarks.costs._contenders import (
  SGD,
  Contender,
  ImageNetwork,
  ShortNetwork,
  TextNetwork,
  alrao,
  bare,
  collapsed,
  with_heads,
)
from benchmarks.costs.steps import CASES, Case

CASE = Case(
  ImageNetwork("mlp", 1 / 32, 8, 6, 1, norm="none"),
  (
    *alrao(1, 4),
    bare(4),
    collapsed(4),
    Contender("Adam", "adam"),
  ),
  steps=2,
)


@pytest.fixture(scope="module")
def rows():
  with jax.numpy_dtype_promotion("standard"):  # Adam's own arithmetic needs it
    return steps.compare(CASE, rounds=3, compilations=2, console=Console(quiet=True))


@pytest.mark.slow
def test_every_contender_has_a_row_relative_to_sgd(rows):
  assert [row["label"] for row in rows] == [
    "SGD",
    "SGD again",
    "Alrao, 1 head",
    "Alrao, 4 heads",
    "bare arithmetic, 4 heads",
    "Alrao, 1 head left of 4",
    "Adam",
  ]
  sgd = rows[0]
  for name in (
    "ratio",
    "floor",
    "peak_ratio",
    "peak_ratio_with_outputs",
    "compile_ratio",
  ):
    assert sgd[name] == 1.0
  assert all(row["milliseconds"] > 0 for row in rows)


def test_a_peer_with_heads_differs_from_alrao_in_the_optimizer_alone():
  network, (peer, _) = ShortNetwork("diabetes"), with_heads(3)
  sizes = [network.workload(one).num_parameters for one in (peer, *alrao(3))]
  assert sizes[0] == sizes[1]
  competitor = _contenders.Competitor(network, peer)
  before = jax.device_get(competitor._state.params)
  competitor.compile()
  competitor.run(2)
  after = competitor._state
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after.params)
  assert all(jax.tree.leaves(moved))
  np.testing.assert_allclose(np.exp(alrao_jax.log_weights(after.opt_state)), 1 / 3)


def test_every_compilation_is_as_the_first(monkeypatch):
  """Not even functions within the step are found in JAX's caches."""
  traced = []
  competitor = _contenders.Competitor(CASE.network, SGD)

  @jax.jit
  def inner(params):
    traced.append(True)
    return params

  def step(state, *args):
    return state._replace(params=inner(state.params)), args

  monkeypatch.setattr(competitor, "_step", step)
  for count in (1, 2, 3):
    assert competitor.compile() > 0
    assert len(traced) == count
  competitor.run(3)
  assert len(traced) == 3


@pytest.mark.slow
def test_medians_are_of_ratios_within_a_turn(monkeypatch):
  """Where the machine slows down, it does so for all contenders of a turn."""
  seconds = np.array([[1.0, 1.0, 3.0], [10.0, 11.0, 20.0], [100.0, 100.0, 150.0]])
  in_turns = steps.in_turns

  def in_known_turns(*args):
    assert in_turns(*args).shape == seconds.shape
    return seconds

  monkeypatch.setattr(steps, "in_turns", in_known_turns)
  case = Case(CASE.network, alrao(1))
  rows = steps.compare(case, 3, compilations=3, console=Console(quiet=True))
  for seconds_name, ratio_name, unit in (
    ("compile_seconds", "compile_ratio", 1),
    ("milliseconds", "ratio", 1000),
  ):
    assert [row[seconds_name] for row in rows] == [10 * unit, 11 * unit, 20 * unit]
    assert [row[ratio_name] for row in rows] == [1.0, 1.0, 2.0]


@pytest.mark.slow
def test_costs_are_those_of_the_networks(rows):
  by_label = {row["label"]: row for row in rows}
  # 36 pixels, two layers of 16 units, 10 classes; heads are copies of the last layer.
  body, head = 36 * 16 + 16 + 16 * 16 + 16, 16 * 10 + 10
  assert by_label["SGD"]["parameter_bytes"] == 4 * (body + head)
  four = by_label["Alrao, 4 heads"]
  assert four["parameter_bytes"] == 4 * (body + 4 * head)
  assert four["rates_bytes"] == 4 * (2 * 16 + 4)  # one a unit and one a head
  assert four["flops"] > by_label["Alrao, 1 head"]["flops"] > by_label["SGD"]["flops"]
  # What is left after the others have gone is the same program as one head's.
  for name in ("parameter_bytes", "rates_bytes", "flops", "bytes", "peak_bytes"):
    assert by_label["Alrao, 1 head left of 4"][name] == by_label["Alrao, 1 head"][name]
  # Further heads hold parameters and outputs, and gradients of both.
  own = 2 * (4 * 3 * head + 4 * 3 * 8 * 10)
  expected = four["peak_bytes"] / (by_label["SGD"]["peak_bytes"] + own)
  assert four["peak_ratio_with_outputs"] == pytest.approx(expected)
  # Adam keeps two moments of every parameter.
  more = by_label["Adam"]["peak_bytes"] - by_label["SGD"]["peak_bytes"]
  assert more >= 2 * by_label["SGD"]["parameter_bytes"]


def test_outputs_in_chunks_are_held_one_chunk_at_a_time():
  words = TextNetwork("lstm", 70, 10_000, "words", chunks=20)
  whole = 4 * 20 * 70 * 10_000
  assert words.output_bytes(None) == whole  # an ordinary layer's are never divided
  assert words.output_bytes(10) == whole // 2


def test_every_contender_trains_the_same_network():
  workload, with_heads = (
    CASE.network.workload(contender) for contender in (SGD, alrao(4)[0])
  )
  bodies = [
    one.init(0, rate).params["body"]
    for one, rate in ((workload, 0.1), (with_heads, None))
  ]
  jax.tree.map(np.testing.assert_array_equal, *bodies)
  jax.tree.map(
    np.testing.assert_array_equal, workload.batches(0, 1), with_heads.batches(0, 1)
  )


def test_bare_arithmetic_steps_as_the_library_does():
  """Two ways to write Algorithm 1 down, from several states of training."""
  library, plain = (CASE.network.workload(each) for each in (alrao(4)[0], bare(4)))
  jitted = [jax.jit(workload.step.step) for workload in (library, plain)]
  state, (rates, switch) = library.init(0, None), plain.init(0, None).opt_state
  for epoch in range(1, 11):
    batch = jax.tree.map(lambda leaf: leaf[0], library.batches(0, epoch))
    same = state._replace(opt_state=(rates, switch))
    new, outputs = jitted[0](state, library.data, batch)
    other, other_outputs = jitted[1](same, plain.data, batch)
    np.testing.assert_allclose(outputs["loss"], other_outputs["loss"], rtol=1e-5)

    def compare(old, a, b, rate):
      # A gradient is a sum of at most 36 products over 8 examples, rounded to 1e-7 of
      # the layer's largest; a parameter is rounded once more.
      largest = (np.abs(a - old) / rate).max()
      bound = 2**-23 * (2 * np.abs(old) + 36 * 8 * rate * largest) + 1e-9
      assert (np.abs(a - b) <= bound).all()

    params = [jax.tree.map(np.asarray, each.params) for each in (state, new, other)]
    jax.tree.map(compare, *params, jax.tree.map(np.asarray, rates))
    state, (_, switch) = new, other.opt_state
    np.testing.assert_allclose(
      alrao_jax.log_weights(new.opt_state),
      alrao_jax.switch().log_weights(switch),
      atol=1e-5,
    )


@pytest.mark.parametrize(
  "network",
  [
    ImageNetwork("small_cnn"),
    ImageNetwork("mlp"),
    TextNetwork("lstm", 4, 7, batch_size=2),
  ],
)
def test_only_the_plain_mlp_can_be_bare(network):
  with pytest.raises(ValueError, match="bare=True"):
    network.workload(bare(4))


def test_resnet50_is_of_the_size_for_imagenet():
  network = CASES["resnet50"].network
  assert network.title == "resnet50, width 1, batch 64, 224 pixels, 1,000 classes"
  assert network.workload(SGD).num_parameters == 25_557_032  # as everywhere
  half = CASES["resnet50_bfloat16"].network
  assert half.title == f"{network.title}, bfloat16"


@pytest.mark.slow
def test_quick_look_times_the_steps_it_is_asked_for(tmp_path):
  out = tmp_path / "times.json"
  command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist"]
  command += [
    "benchmarks/costs/_step_times.py",
    "-k",
    "mlp and not 50",
    f"--benchmark-json={out}",
  ]
  # Beside other workers nothing is timed; this one need not know of them.
  alone = {key: x for key, x in os.environ.items() if "XDIST" not in key}
  subprocess.run(command, check=True, cwd=records.ROOT, env=alone)
  found = json.loads(out.read_text())["benchmarks"]
  labels = ["SGD", "Alrao, 10 heads", "Adam"]
  assert [each["name"] for each in found] == [f"test_step[mlp-{x}]" for x in labels]
  assert all(each["stats"]["rounds"] == _step_times.ROUNDS for each in found)
  assert all(each["stats"]["min"] > 0 for each in found)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["lstm", "decoder"])
def test_networks_for_text_have_costs_too(network):
  case = Case(TextNetwork(network, 4, 7, batch_size=2), alrao(3))
  with jax.numpy_rank_promotion("allow"):  # within flax's own layers
    sgd, _, heads = steps.compare(
      case, rounds=1, compilations=1, console=Console(quiet=True)
    )
  features = 128 if network == "decoder" else 100
  more = heads["parameter_bytes"] - sgd["parameter_bytes"]
  assert more == 4 * 2 * (features * 7 + 7)
  assert case.network.title == f"{network}, 7 characters, 2 streams of 4"
