"""Costs: how they are measured in turns, written and shown, and those but steps."""

import dataclasses
import functools
import importlib
import sys
import types

import jax
import numpy as np
import pytest

import alrao_jax
from benchmarks import costs, records, timing
from benchmarks.console import OptionError
from benchmarks.costs import _cost, many_seeds, memory, pytorch, whole_runs
from benchmarks.costs._contenders import SGD, ImageNetwork
from benchmarks.costs.many_seeds import ManySeeds
from benchmarks.costs.memory import Layer, Memory
from benchmarks.costs.pytorch import PyTorch
from benchmarks.costs.steps import CASES, Case, Steps
from benchmarks.records import RecordError
from benchmarks.studies import guard

NETWORK = ImageNetwork("mlp", 1 / 32, 8, 6, 1, norm="none")
MEASURED = records.load_costs([records.archive("costs")])


def collected(out, tmp_path):
  """What the archive holds of the costs that a command has written."""
  archive = tmp_path / "results" / "costs.jsonl"
  records.collect(out, archive)
  return records.load_costs([archive])


# --- Turns


def test_every_program_has_its_turn_and_its_column():
  order = []

  def measure(name):
    order.append(name)
    return 10 * len(order) + "abc".index(name)

  found = timing.in_turns([lambda name=name: measure(name) for name in "abc"], 4)
  turns = np.reshape(order, (4, 3))
  assert [sorted(turn) for turn in turns] == [["a", "b", "c"]] * 4
  assert len({tuple(turn) for turn in turns}) > 1  # not always in one order
  # The last digit tells who was measured, the first ones when.
  np.testing.assert_array_equal(found % 10, np.tile([0, 1, 2], (4, 1)))
  assert sorted((found // 10).ravel()) == list(range(1, 13))
  assert (np.diff((found // 10).mean(axis=1)) == 3).all()


@pytest.mark.slow
def test_guards_are_timed_in_turns():
  seconds = guard.time_steps((None, alrao_jax.guard()), rounds=2)
  assert seconds.shape == (2, 2)
  assert (seconds > 0).all()


# --- Records and tables


@pytest.mark.parametrize(
  "record", MEASURED, ids=[f"{one['table']}-{one['case']}" for one in MEASURED]
)
def test_every_committed_cost_has_its_table(record):
  title, _, *rows, _, conditions = costs.table(record).splitlines()
  assert title.startswith("### ")
  header, rule, *cells = [row.split(" | ") for row in rows]
  assert {len(row) for row in (header, rule, *cells)} == {len(header)}
  assert len(cells) == len(record["rows"])
  assert conditions.endswith(f"; {record['date']}.")


@pytest.mark.parametrize(
  ("table", "case", "title", "row", "conditions"),
  [
    (
      "steps",
      "mlp",
      "### mlp, width 1, batch 128",
      "| Alrao, 10 heads | 1.106 | 1.091 to 1.121 | 1.106 | 1.000 | 5.09 | 0.0014 |",
      "5 compilations; 30 rounds of 20 steps; device cpu, cores 1, jax 0.10.2, "
      "flax 0.12.8, optax 0.2.8, alrao_jax 0.1.0, commit 72e2acdb97fc; 2026-11-29.",
    ),
    (
      "many_seeds",
      "devices_2",
      "### Several seeds of one network, Alrao with 10 heads",
      "| mlp, width 0.125, batch 32 | 4 | 0.61 | 0.90 | 0.76 |",
      "10 rounds of 5 steps; device cpu, cores 2, devices 2, jax 0.10.2, flax 0.12.8, ",
    ),
    (
      "memory",
      "features_128-num_classes_50000-num_heads_10-batch_size_128",
      "### Output layer of 50,000 classes on 128 features, batch 128",
      "| Alrao, 10 heads | 4 | 256 | 640 | 896 |",
      "5 rounds; device cpu, cores 1, jax 0.10.2, flax 0.12.8, optax 0.2.8, ",
    ),
    (
      "pytorch",
      "sgd",
      "### Plain SGD, JAX beside PyTorch",
      "| mlp | 3.14 | 6.60 | 0.48 | 0.46 to 0.50 |",
      "30 rounds of 10 steps; device cpu, cores 2, jax 0.12.0.1, flax 0.12.12, optax "
      "0.2.8, torch 2.15.0+cu132, ",
    ),
  ],
)
def test_published_tables_come_from_the_committed_costs(
  table, case, title, row, conditions
):
  (found,) = [one for one in MEASURED if (one["table"], one["case"]) == (table, case)]
  lines = costs.table(found).splitlines()
  assert lines[0] == title
  assert any(line.startswith(row) for line in lines)
  assert lines[-1].startswith(conditions)


def test_a_measurement_says_what_it_is_of_and_how_it_was_made(monkeypatch):
  record = _cost.make_record("steps", "mlp", {"rows": [], "environment": {"torch": 1}})
  assert (record["kind"], record["table"], record["case"]) == ("cost", "steps", "mlp")
  assert record["environment"] == {**records.environment(), "torch": 1}
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  # No archive puts it in the place of what was measured on a CPU.
  assert _cost.make_record("steps", "mlp", {})["case"] == "mlp-gpu"


def test_by_default_nothing_is_written_to_the_committed_records():
  for name in costs.names():
    module = importlib.import_module(f"benchmarks.costs.{name}")
    # A union's members are annotated with the names of their commands.
    for one in getattr(module.COST, "__args__", (module.COST,)):
      kind = getattr(one, "__origin__", one)
      assert kind().out.parts[0] == "out"


def test_unknown_and_incomplete_costs_are_named():
  with pytest.raises(RecordError, match="must be one of many_seeds, .*got 'nonsense'"):
    costs.table({"table": "nonsense"})
  with pytest.raises(RecordError, match="the record of pytorch, sgd, lacks .*'rows'"):
    costs.table({"table": "pytorch", "case": "sgd"})


@pytest.mark.parametrize(
  ("cost", "message"),
  [
    (Steps(cases=("nonsense",)), "--cases knows mlp, .* not .'nonsense'."),
    (Steps(rounds=0), "--rounds must be at least 1, got 0"),
    (Steps(compilations=0), "--compilations must be at least 1, got 0"),
    (PyTorch(networks=("nonsense",)), "--networks knows mlp"),
    (PyTorch(steps=0), "--steps must be at least 1, got 0"),
    (ManySeeds(networks=("nonsense",)), "--networks knows"),
    (ManySeeds(num_seeds=(0,)), "--num-seeds must be at least 1"),
    (Memory(layer=Layer(features=0)), "--features must be at least 1, got 0"),
    (Memory(chunks=()), "--chunks must be at least 1"),
    (Memory(chunks=(3,)), "--chunks must divide --batch-size 128, got .3"),
  ],
)
def test_options_that_measure_nothing_are_errors(cost, message, tmp_path):
  out = tmp_path / "out"
  with pytest.raises(OptionError, match=message):
    dataclasses.replace(cost, out=out)()
  assert not out.exists()


# --- Many seeds

seed_steps = functools.cache(many_seeds.SeedSteps)  # compiling all ways takes seconds


@pytest.mark.slow
def test_several_seeds_are_timed_each_way(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(many_seeds.NETWORKS, "tiny", NETWORK)
  monkeypatch.setattr(many_seeds, "SeedSteps", seed_steps)
  out = tmp_path / "out"
  ManySeeds(networks=("tiny",), num_seeds=(4,), rounds=1, steps=1, out=out)()
  (record,) = collected(out, tmp_path)
  (row,) = record["rows"]
  ways = ["sequential", "vmapped"]
  if len(jax.devices()) > 1 and 4 % len(jax.devices()) == 0:
    ways.append("sharded")
  assert record["case"] == f"devices_{len(jax.devices())}"
  assert list(row["milliseconds"]) == list(row["ratios"]) == ways
  assert row["ratios"]["sequential"] == 1.0
  assert all(value > 0 for value in row["ratios"].values())
  assert "| mlp, width 0.03125, batch 8 | 4 |" in capsys.readouterr().out


def test_all_ways_train_all_seeds_equally():
  seeds = seed_steps(NETWORK, 4)
  for _ in range(2):
    for run in seeds.ways.values():
      run(1)
  sequential, *others = (seeds.states(name) for name in seeds.ways)
  for other in others:
    for one, two in zip(
      jax.tree.leaves(sequential), jax.tree.leaves(other), strict=True
    ):
      # Sums of at most 36 products and 8 examples, over a few steps.
      np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


# --- Memory


def test_chunks_need_less_memory_for_a_large_output_layer(tmp_path):
  layer = Layer(features=4, num_classes=3_000, num_heads=3, batch_size=32)
  out = tmp_path / "out"
  Memory(layer=layer, chunks=(1, 8), rounds=1, out=out)()
  (record,) = collected(out, tmp_path)
  sgd, whole, chunked = record["rows"]
  heads = 4 * 4 * 3_000  # bytes of a head
  assert whole["state_bytes"] - sgd["state_bytes"] > 2 * heads
  assert whole["temporary_bytes"] > 3 * 32 * 3_000 * 4  # the logits of all heads
  assert chunked["temporary_bytes"] < whole["temporary_bytes"] / 2


def test_layers_of_two_sizes_are_two_measurements():
  assert memory.Layer().name != memory.Layer(features=100).name


# --- PyTorch


def test_steps_take_turns_with_those_of_pytorch(monkeypatch):
  """Without PyTorch: both run once before the clock, then as often as each other."""
  steps = []
  monkeypatch.setattr(pytorch, "torch_step", lambda *_: fake)

  def fake(count):
    steps.append(count)
    return 4.0

  monkeypatch.setattr(pytorch, "CASES", {"mlp": Case(NETWORK, ())})
  row = pytorch.compare(None, "mlp", rounds=3, steps=2)
  assert steps == [2] * 4
  assert row["torch_milliseconds"] == 2000
  assert 0 < row["jax_milliseconds"] < 2000
  np.testing.assert_allclose(row["ratio"], row["jax_milliseconds"] / 2000)


def test_measurements_say_which_pytorch(tmp_path, monkeypatch):
  row = {"network": "mlp", "jax_milliseconds": 1.0, "torch_milliseconds": 2.0}
  row |= {"ratio": 0.5, "ratio_quartiles": [0.4, 0.6]}
  monkeypatch.setattr(pytorch, "compare", lambda *_: row)
  module = types.SimpleNamespace(__version__="9.9")
  monkeypatch.setitem(sys.modules, "torch", module)
  PyTorch(networks=("mlp",), out=tmp_path / "out")()
  (record,) = collected(tmp_path / "out", tmp_path)
  assert "| mlp | 1.00 | 2.00 | 0.50 | 0.40 to 0.60 |" in costs.table(record)
  assert "torch 9.9" in costs.table(record)


def test_without_pytorch_the_command_says_how_to_get_it(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(OptionError, match="pip install torch"):
    PyTorch(out=tmp_path / "out")()


def test_steps_are_compared_with_those_of_pytorch_where_there_is_one(tmp_path):
  pytest.importorskip("torch", reason="PyTorch is no dependency")
  out = tmp_path / "out"
  PyTorch(networks=("mlp",), rounds=1, steps=1, out=out)()
  ((row,),) = (record["rows"] for record in collected(out, tmp_path))
  assert row["network"] == "mlp"
  assert row["torch_milliseconds"] > 0


@pytest.mark.parametrize(
  ("name", "more"), [("mlp", 0), ("small_cnn", 0), ("lstm", 2 * 4 * 100)]
)
def test_networks_of_pytorch_have_as_many_parameters(name, more):
  module = pytest.importorskip("torch", reason="PyTorch is no dependency")
  net, _ = pytorch.NETWORKS[name](module)
  expected = CASES[name].network.workload(SGD).num_parameters + more
  assert sum(p.numel() for p in net.parameters()) == expected


# --- Whole runs


class CountedRun:
  """A run of two epochs of two steps, in which one of two heads leaves."""

  data = ()

  def __init__(self):
    self.seeds = []

  def init(self, seed, rate):
    self.seeds.append((seed, rate))
    return 0

  def batches(self, seed, epoch):
    return epoch

  def step(self, state, data, batches):
    left = [[0.5, 0.5], [0.5, 0.5]] if batches == 1 else [[0.4, 0.6], [1.0, 0.0]]
    return state + 1, {"head_weights": np.array(left)}

  def snapshot(self, state, seed, epoch):
    return state

  def evaluate(self, snapshot, part):
    return {"loss": float(snapshot)}


def test_whole_runs_go_on_after_the_last_seed(tmp_path, monkeypatch, capsys):
  workloads = {name: CountedRun() for name in ("sgd", "alrao_hopeful", "alrao")}
  monkeypatch.setattr(whole_runs, "_workloads", lambda *_: workloads)
  monkeypatch.setitem(
    whole_runs.CASES, "toy", whole_runs.CASES["words"]._replace(title="Toy", epochs=2)
  )
  command = whole_runs.WholeRuns(tmp_path, ("toy",), ("alrao_hopeful",), 1)
  monkeypatch.setattr(jax, "clear_caches", lambda: None)
  command()
  dataclasses.replace(command, seeds=3)()
  assert workloads["sgd"].seeds == [(0, 1.0), (1, 1.0), (2, 1.0)]
  assert workloads["alrao_hopeful"].seeds == [(0, None), (1, None), (2, None)]
  (record,) = collected(tmp_path, tmp_path)
  first = record["rows"][1]["runs"][0]
  assert first["left"] == [[0, 2], [3, 1]] and first["loss"] == 2.0
  assert "2.000 ± 0.000 | 2 from 0; 1 from 3 |" in costs.table(record)
  assert "### Toy" in capsys.readouterr().out
  # Other methods begin anew.
  dataclasses.replace(command, methods=("alrao",))()
  assert len(workloads["sgd"].seeds) == 4


@pytest.mark.parametrize(
  "options", [{"cases": ("no",)}, {"methods": ("sgd",)}, {"seeds": 0}]
)
def test_whole_runs_refuse_what_they_do_not_know(options):
  with pytest.raises(OptionError):
    whole_runs.WholeRuns(**options).check()
