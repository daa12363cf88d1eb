"""The comparison of costs, on a case so small that it takes seconds."""

import json

import jax
import pytest
from rich.console import Console

from benchmarks import competitors, overhead, records
from benchmarks.overhead_cases import SGD, Case, Contender, Images, Symbols, alrao
from benchmarks.planning import OptionError

CASE = Case(
  Images("mlp", 1 / 32, 8, 6, 1, norm="none"),
  (*alrao(1, 4), Contender("Adam", "adam")),
  steps=2,
)


@pytest.fixture(scope="module")
def rows():
  with jax.numpy_dtype_promotion("standard"):  # Adam's own arithmetic needs it
    return competitors.measure(CASE, rounds=3, console=Console(quiet=True))


def test_every_contender_has_a_row_relative_to_sgd(rows):
  assert [row["label"] for row in rows] == [
    "SGD",
    "SGD again",
    "Alrao, 1 head",
    "Alrao, 4 heads",
    "Adam",
  ]
  sgd = rows[0]
  for name in ("ratio", "floor", "peak_ratio", "compile_ratio"):
    assert sgd[name] == 1.0
  assert all(row["milliseconds"] > 0 for row in rows)


def test_costs_are_those_of_the_networks(rows):
  by_label = {row["label"]: row for row in rows}
  # 36 pixels, two layers of 16 units, 10 classes; heads are copies of the last layer.
  body, head = 36 * 16 + 16 + 16 * 16 + 16, 16 * 10 + 10
  assert by_label["SGD"]["parameter_bytes"] == 4 * (body + head)
  four = by_label["Alrao, 4 heads"]
  assert four["parameter_bytes"] == 4 * (body + 4 * head)
  assert four["rates_bytes"] == 4 * (2 * 16 + 4)  # one a unit and one a head
  assert four["flops"] > by_label["Alrao, 1 head"]["flops"] > by_label["SGD"]["flops"]
  # Adam keeps two moments of every parameter.
  more = by_label["Adam"]["peak_bytes"] - by_label["SGD"]["peak_bytes"]
  assert more >= 2 * by_label["SGD"]["parameter_bytes"]


def test_every_contender_trains_the_same_network():
  program = CASE.network.program(SGD)
  with_heads = CASE.network.program(alrao(4)[0])
  assert program.examples_per_epoch == with_heads.examples_per_epoch == 8


@pytest.mark.slow
@pytest.mark.parametrize("network", ["lstm", "decoder"])
def test_networks_for_text_have_costs_too(network):
  case = Case(Symbols(network, 4, 7, batch_size=2), alrao(3))
  with jax.numpy_rank_promotion("allow"):  # within flax's own layers
    sgd, _, heads = competitors.measure(case, rounds=1, console=Console(quiet=True))
  features = 128 if network == "decoder" else 100
  more = heads["parameter_bytes"] - sgd["parameter_bytes"]
  assert more == 4 * 2 * (features * 7 + 7)
  assert case.network.title == f"{network}, 7 characters, 2 streams of 4"


def test_report_replaces_the_tables_and_keeps_the_rest(rows, tmp_path):
  names = ("device", "cores", "jax", "flax", "optax", "alrao_jax", "commit")
  found = {
    "title": CASE.network.title,
    "steps": CASE.steps,
    "rounds": 3,
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


def test_unknown_case_and_no_results_are_errors(tmp_path):
  with pytest.raises(OptionError, match="--cases knows mlp"):
    overhead.Run(cases=("nonsense",))()
  with pytest.raises(records.RecordError, match="no JSON files"):
    overhead.Report(tmp_path)()
