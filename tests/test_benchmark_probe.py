"""A learning rate from the heads' posterior, and how it is compared with sweeps."""

import pytest
from benchmark_cases import quiet

from benchmarks import probe, records
from benchmarks.arena.tasks import TASKS as TASKS_OF_ARENA
from benchmarks.experiments import Experiment
from benchmarks.planning import OptionError
from benchmarks.results import Row, RunRecords, Table
from benchmarks.tasks import TASKS


def run_of(optimizer, seed=0, loss=1.0, weights=()):
  epochs = [{"head_weights": [list(weights)]}]
  config = {"task": "images", "optimizer": optimizer, "seed": seed, "chance": 0.1}
  summary = {"config": config, "validation_loss": loss, "test_accuracy": 0.5}
  return RunRecords(summary, epochs)


def test_all_weight_on_a_head_suggests_its_rate():
  assert probe.suggest([1.0, 0.0, 0.0]) == pytest.approx(1e-5)
  assert probe.suggest([0.0, 0.0, 1.0]) == pytest.approx(10.0)
  assert probe.suggest([1.0, 1.0, 1.0]) == pytest.approx(1e-2)


def test_suggestions_are_compared_with_the_best_rate():
  heads = [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]  # suggest 10 and 0.01
  alrao = [run_of("alrao", seed, weights=w) for seed, w in enumerate(heads)]
  table = Table(
    TASKS["images"],
    "net",
    [
      Row("alrao", None, 3, alrao),
      Row("sgd", 1.0, None, [run_of("sgd", loss=2.0)]),
      Row("sgd", 10.0, None, [run_of("sgd", loss=1.0)]),
    ],
  )
  lines = probe.compare(probe.table_sweeps([table], epoch=5))
  assert lines[2] == "| net | 10 | 5 | 0.01 to 10 | 2 | -1.5 |"
  assert lines[-1] == (
    "1 of 2 suggestions, and the median of 0 of 1 tasks, are within half a decade of "
    "the best rate; of so many guesses of 0.1, 0 would be."
  )


def test_the_arena_is_asked_too(tmp_path):
  name, task = next(iter(TASKS_OF_ARENA.items()))
  steps = [task.num_steps]
  for method, runs in {
    "alrao": [{"seed": 0, "rate": None, "head_weights": [0.0, 1.0, 0.0]}],
    "sgd": [
      {"seed": 0, "rate": rate, "validation_loss": [loss], "test_loss": [1.0]}
      for rate, loss in ((0.01, 1.1), (0.03, 1.0))
    ],
  }.items():
    common = {"kind": "summary", "steps": steps, "chance": 2.0}
    path = tmp_path / name / f"{method}.jsonl"
    records.write(path, [{**common, **run} for run in runs])
  check = probe.Check(tmp_path, results=(), out=tmp_path / "PROBE.md")
  check()
  lines = check.out.read_text().splitlines()
  assert f"| {task.label} | 0.03 | 0.01 | 0.01 to 0.01 | 1 | -0.5 |" in lines
  assert any(
    line.startswith("1 of 1 suggestions, and the median of 1 of 1") for line in lines
  )


def test_probe_prints_a_rate_and_refuses_other_optimizers(tmp_path, monkeypatch):
  base = Experiment(
    "digits", "mlp", 1 / 16, num_train=64, num_validation=16, num_test=8
  )
  with pytest.raises(OptionError, match="--optimizer must be alrao"):
    probe.Run(Experiment(optimizer="adam"))()
  monkeypatch.setattr(probe, "Display", quiet)
  said = []
  monkeypatch.setattr(
    "benchmarks.progress.Display.say", lambda _, text: said.append(text)
  )
  options = {**vars(base), "max_epochs": 1}
  probe.Run(Experiment(**options), out=tmp_path)()
  assert said[-1].startswith("suggested learning rate for plain SGD: ")
