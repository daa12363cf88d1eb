"""The comparison of costs, on a case so small that it takes seconds."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

import alrao_jax
from benchmarks import (
  competitors,
  large_output,
  many_seeds,
  overhead,
  overhead_cases,
  records,
  step_times,
  torch_steps,
)
from benchmarks.overhead_cases import (
  SGD,
  Case,
  Contender,
  Images,
  Symbols,
  alrao,
  bare,
  collapsed,
)
from benchmarks.planning import OptionError
from benchmarks.studies import timing

CASE = Case(
  Images("mlp", 1 / 32, 8, 6, 1, norm="none"),
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
    return competitors.measure(
      CASE, rounds=3, compilations=2, console=Console(quiet=True)
    )


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


def test_every_compilation_is_as_the_first(monkeypatch):
  """Not even functions within the step are found in JAX's caches."""
  traced = []
  competitor = competitors.Competitor(CASE.network, SGD)

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


def test_medians_are_of_ratios_within_a_turn(monkeypatch):
  """Where the machine slows down, it does so for all contenders of a turn."""
  seconds = np.array([[1.0, 1.0, 3.0], [10.0, 11.0, 20.0], [100.0, 100.0, 150.0]])
  in_turns = competitors.in_turns

  def in_known_turns(*args):
    assert in_turns(*args).shape == seconds.shape
    return seconds

  monkeypatch.setattr(competitors, "in_turns", in_known_turns)
  case = Case(CASE.network, alrao(1))
  rows = competitors.measure(case, 3, compilations=3, console=Console(quiet=True))
  for seconds_name, ratio_name, unit in (
    ("compile_seconds", "compile_ratio", 1),
    ("milliseconds", "ratio", 1000),
  ):
    assert [row[seconds_name] for row in rows] == [10 * unit, 11 * unit, 20 * unit]
    assert [row[ratio_name] for row in rows] == [1.0, 1.0, 2.0]


def test_every_competitor_has_its_turn_and_its_column():
  order = []

  def measure_one(name):
    order.append(name)
    return 10 * len(order) + "abc".index(name)

  generator = np.random.default_rng(0)
  found = competitors.in_turns(["a", "b", "c"], measure_one, range(4), generator)
  turns = np.reshape(order, (4, 3))
  assert [sorted(turn) for turn in turns] == [["a", "b", "c"]] * 4
  assert len({tuple(turn) for turn in turns}) > 1  # not always in one order
  # The last digit tells who was measured, the first ones when.
  np.testing.assert_array_equal(found % 10, np.tile([0, 1, 2], (4, 1)))
  assert sorted((found // 10).ravel()) == list(range(1, 13))
  assert (np.diff((found // 10).mean(axis=1)) == 3).all()


def test_records_tell_the_cores_that_the_process_may_use(monkeypatch):
  monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
  assert records._num_cores() == 1


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
  words = Symbols("lstm", 70, 10_000, "words", chunks=20)
  whole = 4 * 20 * 70 * 10_000
  assert words.output_bytes(None) == whole  # an ordinary layer's are never divided
  assert words.output_bytes(10) == whole // 2


def test_every_contender_trains_the_same_network():
  program, with_heads = (
    CASE.network.program(contender) for contender in (SGD, alrao(4)[0])
  )
  bodies = [
    one.init(0, rate).params["body"]
    for one, rate in ((program, 0.1), (with_heads, None))
  ]
  jax.tree.map(np.testing.assert_array_equal, *bodies)
  jax.tree.map(
    np.testing.assert_array_equal, program.batches(0, 1), with_heads.batches(0, 1)
  )


def test_bare_arithmetic_steps_as_the_library_does():
  """Two ways to write Algorithm 1 down, from several states of training."""
  library, plain = (CASE.network.program(each) for each in (alrao(4)[0], bare(4)))
  steps = [jax.jit(program.step.step) for program in (library, plain)]
  state, (rates, switch) = library.init(0, None), plain.init(0, None).opt_state
  for epoch in range(1, 11):
    batch = jax.tree.map(lambda leaf: leaf[0], library.batches(0, epoch))
    same = state._replace(opt_state=(rates, switch))
    new, outputs = steps[0](state, library.data, batch)
    other, other_outputs = steps[1](same, plain.data, batch)
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
  [Images("small_cnn"), Images("mlp"), Symbols("lstm", 4, 7, batch_size=2)],
)
def test_only_the_plain_mlp_can_be_bare(network):
  with pytest.raises(ValueError, match="bare=True"):
    network.program(bare(4))


def test_resnet50_is_of_the_size_for_imagenet():
  network = overhead_cases.CASES["resnet50"].network
  assert network.title == "resnet50, width 1, batch 64, 224 pixels, 1,000 classes"
  assert network.program(SGD).num_parameters == 25_557_032  # as everywhere
  half = overhead_cases.CASES["resnet50_bfloat16"].network
  assert half.title == f"{network.title}, bfloat16"


@pytest.mark.slow
def test_quick_look_times_the_steps_it_is_asked_for(tmp_path):
  out = tmp_path / "times.json"
  command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist"]
  command += [
    "benchmarks/step_times.py",
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
  assert all(each["stats"]["rounds"] == step_times.ROUNDS for each in found)
  assert all(each["stats"]["min"] > 0 for each in found)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["lstm", "decoder"])
def test_networks_for_text_have_costs_too(network):
  case = Case(Symbols(network, 4, 7, batch_size=2), alrao(3))
  with jax.numpy_rank_promotion("allow"):  # within flax's own layers
    sgd, _, heads = competitors.measure(
      case, rounds=1, compilations=1, console=Console(quiet=True)
    )
  features = 128 if network == "decoder" else 100
  more = heads["parameter_bytes"] - sgd["parameter_bytes"]
  assert more == 4 * 2 * (features * 7 + 7)
  assert case.network.title == f"{network}, 7 characters, 2 streams of 4"


def test_report_replaces_the_tables_and_keeps_the_rest(rows, tmp_path):
  names = ("device", "cores", "jax", "flax", "optax", "alrao_jax", "commit")
  found = {
    "kind": "overhead",
    "title": CASE.network.title,
    "steps": CASE.steps,
    "rounds": 3,
    "compilations": 2,
    "date": "2020-01-02",
    "environment": dict.fromkeys(names, "x"),
    "rows": rows,
  }
  records.write_text(tmp_path / "results" / "mlp.json", json.dumps(found))
  page = tmp_path / "OVERHEAD.md"
  page.write_text(f"before\n{overhead.START}\nold\n{overhead.END}\nafter\n")
  report = overhead.Report(tmp_path / "results", page)
  report()
  once = page.read_text()
  report()
  assert page.read_text() == once
  assert once.startswith("before\n")
  assert once.endswith("\nafter\n")
  assert "old" not in once
  assert "### mlp, width 0.03125, batch 8" in once
  assert "| SGD | 1.000 |" in once
  assert "\n2 compilations; 3 rounds of 2 steps; device x," in once


def test_unknown_case_and_no_results_are_errors(tmp_path):
  with pytest.raises(OptionError, match="--cases knows mlp"):
    overhead.Run(cases=("nonsense",))()
  with pytest.raises(OptionError, match="--rounds must be at least 1, got 0"):
    overhead.Run(rounds=0)()
  with pytest.raises(OptionError, match="--compilations must be at least 1, got 0"):
    overhead.Run(compilations=0)()
  with pytest.raises(records.RecordError, match="no JSON files"):
    overhead.Report(tmp_path)()


def test_several_seeds_are_timed_each_way(tmp_path, monkeypatch):
  monkeypatch.setitem(many_seeds.NETWORKS, "tiny", CASE.network)
  out = tmp_path / "many_seeds.json"
  many_seeds.Measure(("tiny",), num_seeds=(4,), rounds=1, steps=1, out=out)()
  (row,) = json.loads(out.read_text())["rows"]
  ways = ["sequential", "vmapped"]
  if len(jax.devices()) > 1 and 4 % len(jax.devices()) == 0:
    ways.append("sharded")
  assert list(row["milliseconds"]) == list(row["ratios"]) == ways
  assert row["ratios"]["sequential"] == 1.0
  assert all(value > 0 for value in row["ratios"].values())
  overhead.Report(tmp_path, tmp_path / "OVERHEAD.md")()
  assert "| mlp, width 0.03125, batch 8 | 4 |" in (tmp_path / "OVERHEAD.md").read_text()


def test_all_ways_train_all_seeds_equally():
  seeds = many_seeds.Seeds(CASE.network, 4)
  for _ in range(2):
    for run in seeds.ways.values():
      run(1)
  sequential, *others = (seeds.states(name) for name in seeds.ways)
  for other in others:
    for one, two in zip(
      jax.tree.leaves(sequential), jax.tree.leaves(other), strict=True
    ):
      # Sums of at most 36 products and 8 examples, over three steps.
      np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_chunks_need_less_memory_for_a_large_output_layer(tmp_path):
  layer = large_output.Layer(features=4, num_classes=3_000, num_heads=3, batch_size=32)
  out = tmp_path / "large_output.json"
  large_output.Measure(layer, chunks=(1, 8), rounds=1, out=out)()
  sgd, whole, chunked = json.loads(out.read_text())["rows"]
  heads = 4 * 4 * 3_000  # bytes of a head
  assert whole["state_bytes"] - sgd["state_bytes"] > 2 * heads
  assert whole["temporary_bytes"] > 3 * 32 * 3_000 * 4  # the logits of all heads
  assert chunked["temporary_bytes"] < whole["temporary_bytes"] / 2
  with pytest.raises(OptionError, match="must divide --batch-size 32"):
    large_output.Measure(layer, chunks=(3,))()


def test_steps_take_turns_with_those_of_pytorch(monkeypatch):
  """Without PyTorch: both run once before the clock, then as often as each other."""
  steps = []
  monkeypatch.setattr(torch_steps, "torch_step", lambda *_: fake)

  def fake(count):
    steps.append(count)
    return 4.0

  monkeypatch.setattr(torch_steps, "CASES", {"mlp": CASE})
  row = torch_steps.Compare(("mlp",), rounds=3, steps=2)._measure(None, "mlp")
  assert steps == [2] * 4
  assert row["torch_milliseconds"] == 2000
  assert 0 < row["jax_milliseconds"] < 2000
  np.testing.assert_allclose(row["ratio"], row["jax_milliseconds"] / 2000)


@pytest.mark.slow
def test_guards_are_timed_in_turns():
  seconds = timing.time_steps((None, alrao_jax.guard()), rounds=2)
  assert seconds.shape == (2, 2)
  assert (seconds > 0).all()


def test_steps_are_compared_with_those_of_pytorch_where_there_is_one(tmp_path):
  pytest.importorskip("torch", reason="PyTorch is no dependency")
  out = tmp_path / "torch.json"
  torch_steps.Compare(("mlp",), rounds=1, steps=1, out=out)()
  (row,) = json.loads(out.read_text())["rows"]
  assert row["network"] == "mlp"
  assert row["torch_milliseconds"] > 0


@pytest.mark.parametrize(
  ("name", "more"), [("mlp", 0), ("small_cnn", 0), ("lstm", 2 * 4 * 100)]
)
def test_networks_of_pytorch_have_as_many_parameters(name, more):
  torch = pytest.importorskip("torch", reason="PyTorch is no dependency")
  net, _ = torch_steps.NETWORKS[name](torch)
  expected = overhead_cases.CASES[name].network.program(SGD).num_parameters + more
  assert sum(p.numel() for p in net.parameters()) == expected


def test_unknown_networks_and_numbers_are_errors():
  with pytest.raises(OptionError, match="--networks knows mlp"):
    torch_steps.Compare(("nonsense",))()
  with pytest.raises(OptionError, match="--networks knows"):
    many_seeds.Measure(("nonsense",))()
  with pytest.raises(OptionError, match="at least 1"):
    many_seeds.Measure(num_seeds=(0,))()
