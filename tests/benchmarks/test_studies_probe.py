"""A learning rate from the heads' posterior, and how it is compared with sweeps."""

import pytest
from test_tables import make_short

from benchmarks import records
from benchmarks.console import OptionError
from benchmarks.records import Run
from benchmarks.studies import probe
from benchmarks.suites import kinds
from benchmarks.suites.cifar10 import ImageOptions
from benchmarks.tables import Row, Table
from benchmarks.workloads.short import ARENA_TASKS

KIND = kinds()["cifar10"]


def run_of(optimizer, seed=0, loss=1.0, weights=()):
  epochs = [{"head_weights": [list(weights)]}]
  config = {"suite": "cifar10", "optimizer": optimizer, "seed": seed, "chance": 0.1}
  summary = {"config": config, "validation_loss": loss, "test_accuracy": 0.5}
  return Run(summary, epochs)


def test_all_weight_on_a_head_suggests_its_rate():
  assert probe.suggest([1.0, 0.0, 0.0]) == pytest.approx(1e-5)
  assert probe.suggest([0.0, 0.0, 1.0]) == pytest.approx(10.0)
  assert probe.suggest([1.0, 1.0, 1.0]) == pytest.approx(1e-2)


def test_suggestions_are_compared_with_the_best_rate():
  heads = [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]  # suggest 10 and 0.01
  alrao = [run_of("alrao", seed, weights=w) for seed, w in enumerate(heads)]
  table = Table(
    KIND,
    "net",
    [
      Row(KIND, "alrao", None, 3, alrao),
      Row(KIND, "sgd", 1.0, None, [run_of("sgd", loss=2.0)]),
      Row(KIND, "sgd", 10.0, None, [run_of("sgd", loss=1.0)]),
    ],
  )
  lines = probe.compare(probe.table_sweeps([table], epoch=5))
  assert lines[2] == "| net | 10 | 5 | 0.01 to 10 | 2 | -1.5 |"
  assert lines[-1] == (
    "1 of 2 suggestions, and the median of 0 of 1 tasks, are within half a decade of "
    "the best rate; of so many guesses of 0.1, 0 would be."
  )


def test_the_arena_is_asked_too():
  alrao = make_short([1.0, 1.0], [1.0, 1.0])
  alrao.epochs[-1]["head_weights"] = [[0.0, 1.0, 0.0]]
  sgd = [
    make_short([2.0, loss], [1.0, 1.0], optimizer="sgd_rates", rate=rate)
    for rate, loss in ((0.01, 1.1), (0.03, 1.0))
  ]
  lines = probe.compare(probe.arena_sweeps([alrao, *sgd]))
  label = ARENA_TASKS["vgg"].label
  assert f"| {label} | 0.03 | 0.01 | 0.01 to 0.01 | 1 | -0.5 |" in lines
  assert lines[-1].startswith("1 of 1 suggestions, and the median of 1 of 1")


def test_tasks_without_alrao_or_sgd_are_passed_over():
  assert probe.arena_sweeps([make_short([1.0, 1.0], [1.0, 1.0])]) == []
  assert probe.compare([]) == ["Not measured yet."]


def test_the_committed_records_have_been_asked():
  lines = probe.Probe().derive()
  found = [line for line in lines if "suggestions, and the median" in line]
  assert [line.split(",")[0] for line in found] == [
    "16 of 24 suggestions",
    "16 of 87 suggestions",
  ]


def test_probe_prints_a_rate_and_refuses_other_optimizers(tmp_path, capsys):
  options = {
    "dataset": "digits",
    "network": "mlp",
    "width": 1 / 16,
    "num_train": 64,
    "num_validation": 16,
    "num_test": 8,
    "max_epochs": 1,
  }
  with pytest.raises(OptionError, match="--optimizer must be alrao"):
    probe.Probe(ImageOptions(optimizer="adam"), out=tmp_path)()
  probe.Probe(ImageOptions(**options), out=tmp_path)()
  assert "suggested learning rate for plain SGD: " in capsys.readouterr().out
  (path,) = tmp_path.glob("*.jsonl")
  assert records.read_summary(path) is not None
