"""Tables of canned runs: suites' tables, and the arena's with what is missing."""

import json
import math

import pytest

from benchmarks import standings, tables
from benchmarks.methods import ADAM_HALF_DECADES, ARENA, METHODS
from benchmarks.records import Run
from benchmarks.standings import Arena, geometric_mean, relative
from benchmarks.suites import kinds
from benchmarks.tables import MISSING, Row, Table

KINDS = {name: kind for name, kind in kinds().items() if kind is not None}
CONFIG = {
  "suite": "cifar10",
  "dataset": "digits",
  "network": "vgg19",
  "width": 1.0,
  "norm": "batch",
  "dtype": "float32",
  "batch_size": 32,
  "max_epochs": 200,
  "patience": 20,
  "augment": True,
  "num_train": 64,
  "num_validation": 16,
  "num_test": 16,
  "real_data": False,
  "chance": 0.1,
}
# Validation loss and test accuracy by optimizer and rate, None where a run failed.
OUTCOMES = {
  ("sgd", 0.1): (0.5, 0.90),
  ("sgd", 0.01): (0.4, 0.80),  # the best by validation loss
  ("sgd", 10.0): (None, None),
  ("alrao", None): (0.6, 0.75),
  ("adam", None): (2.3, 0.10),
}


def make_run(
  optimizer, rate=None, seed=0, loss=0.5, accuracy=0.5, nonfinite_steps=0, **config
) -> Run:
  """A run of two epochs."""
  has_heads = METHODS[optimizer].has_heads
  epochs = [
    {
      "kind": "epoch",
      "epoch": epoch,
      "train_loss": loss,
      "validation_loss": loss,
      "validation_accuracy": accuracy,
      "nonfinite_steps": nonfinite_steps,
      "steps": [0, 3] if has_heads else [],
      "head_weights": [[0.5, 0.5], [0.1, 0.9]] if has_heads else [],
      "seconds": 1.0,
    }
    for epoch in (1, 2)
  ]
  names = ("device", "cores", "jax", "flax", "optax", "alrao_jax", "commit")
  config = {
    **CONFIG,
    "optimizer": optimizer,
    "rate": rate,
    "seed": seed,
    "num_heads": 10 if has_heads else None,
    **config,
  }
  summary = {
    "kind": "summary",
    "name": f"{optimizer}-{rate}-s{seed}",
    "config": config,
    "num_parameters": 20_086_692 if has_heads else 20_040_522,
    "ending": "failed" if loss is None else "maximum",
    "epochs": 2,
    "best_epoch": None if loss is None else 1,
    "train_loss": loss,
    "validation_loss": loss,
    "validation_accuracy": accuracy,
    "test_loss": loss,
    "test_accuracy": accuracy,
    "seconds": 2.0,
    "date": "2020-01-02",
    "environment": dict.fromkeys(names, "x"),
  }
  return Run(summary, epochs)


def make_runs() -> list[Run]:
  """Three seeds of each optimizer, of SGD at its best rate."""
  runs = []
  for (optimizer, rate), (loss, accuracy) in OUTCOMES.items():
    for seed in range(3 if optimizer != "sgd" or rate == 0.01 else 1):
      shift = 0.05 * (seed - 1) if optimizer == "alrao" else 0.0
      found = None if accuracy is None else accuracy + shift
      runs.append(make_run(optimizer, rate, seed, loss, found))
  return runs


def rows_of(lines: list[str], label: str) -> list[list[str]]:
  return [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in lines
    if line.startswith(f"| {label}")
  ]


@pytest.fixture
def lines(monkeypatch) -> list[str]:
  """The tables of `make_runs`, next to the papers' for CIFAR-10."""
  figures = {("digits", *key[1:]): found for key, found in tables.PAPERS.items()}
  monkeypatch.setattr(tables, "PAPERS", figures)
  return tables.suite_tables(make_runs(), KINDS)


def test_tables_have_ours_next_to_the_papers(lines):
  (alrao,) = rows_of(lines, "Alrao")
  assert alrao[:5] == ["Alrao", "3", "3", "0.600 ± 0.000", "75.00 ± 5.00"]
  assert alrao[6:8] == ["0.45 ± 0.03", "87.5 ± 0.4"]
  (best,) = rows_of(lines, "**SGD 0.01, best rate**")
  assert best[3:] == ["0.400 ± 0.000", "80.00 ± 0.00", "-5.00",
                      "0.42 ± 0.02", "89.5 ± 0.2", "-2.0"]  # fmt: skip
  (other,) = rows_of(lines, "SGD 0.1")
  assert other[:6] == ["SGD 0.1", "1", "1", "0.500", "90.00", "-15.00"]
  (vgg,) = rows_of(lines, "vgg19, width 1")
  assert vgg[1:] == ["20,040,522", "20,086,692 (10)", "20,040,522", "20,086,692"]


def test_tables_count_what_did_not_learn_and_what_failed(lines):
  # Learned: above 10 % plus half of the best rate's 70 points, 45 %.
  assert [row[2] for row in rows_of(lines, "Adam")] == ["0"]
  (failed,) = rows_of(lines, "SGD 10")
  assert failed[1:5] == ["1", "0", "none", "10.00"]
  text = "\n".join(lines)
  assert "2 of 3 SGD rates learn. 2 of 3 beat Alrao." in text
  assert "Methods with a better mean score than Alrao's: SGD 0.01." in text
  assert "not finite: SGD 10 (1 of 1)." in text
  assert "One run of Alrao took 2 epochs; one of each SGD rate, 6." in text
  assert "**Not CIFAR-10**" in text


def test_best_rate_is_compared_on_the_seeds_that_all_rates_have():
  # Rate 0.1 is best on seed 0, as a sweep sees it, and worse on average.
  runs = [
    make_run("sgd", rate, seed, loss)
    for rate, seed, loss in ((0.1, 0, 0.5), (0.1, 1, 0.9), (0.01, 0, 0.6))
  ]
  ((table,),) = tables.by_size(runs, KINDS)
  assert table.best_sgd is not None
  assert table.best_sgd.label == "SGD 0.1"
  assert len(table.best_sgd.runs) == 2


def test_sizes_of_an_experiment_have_a_section_each():
  runs = [make_run("adam", max_epochs=epochs) for epochs in (2, 3)]
  sizes = tables.by_size(runs, KINDS)
  assert [[table.title for table in size] for size in sizes] == [["vgg19, width 1"]] * 2
  text = "\n".join(tables.suite_tables(runs, KINDS))
  assert "## 1. Images: digits, 64 training images, at most 2 epochs" in text
  assert "## 2. Images: digits, 64 training images, at most 3 epochs" in text


def test_parameters_are_given_for_each_number_of_heads():
  runs = [make_run("alrao", num_heads=heads) for heads in (10, 6)]
  for run in runs:
    run.summary["num_parameters"] = 1_000 * run.config["num_heads"]
  (vgg,) = rows_of(tables.suite_tables(runs, KINDS), "vgg19, width 1")
  assert vgg[1:3] == ["", "6,000 (6), 10,000 (10)"]


def test_runs_that_went_on_after_losses_that_were_not_finite_are_named():
  runs = [make_run("alrao", seed=seed, nonfinite_steps=3 * seed) for seed in (0, 1)]
  text = "\n".join(tables.suite_tables(runs, KINDS))
  assert "- Trained on after such losses: Alrao (1 of 2)." in text


def test_an_optimizer_that_is_gone_has_its_row_under_its_own_name():
  run = make_run("adam")
  run.config["optimizer"] = "forgotten"
  lines = tables.suite_tables([run, make_run("adam")], KINDS)
  assert len(rows_of(lines, "forgotten")) == len(rows_of(lines, "Adam")) == 1


def test_learning_needs_sgd_to_compare_with():
  table = Table(KINDS["cifar10"], "net", [])
  assert table.best_sgd is None and table.alrao is None
  with pytest.raises(ValueError, match="no run of SGD"):
    table.has_learned(0.5)


def test_a_row_without_a_finite_loss_has_no_loss_and_the_score_of_chance():
  row = Row(KINDS["cifar10"], "sgd", 1.0, None, [make_run("sgd", 1.0, 0, None, None)])
  assert row.scores == [0.1]
  assert tables.measured(row, tables.LOSS) == "none"
  assert tables.measured(row, tables.ACCURACY) == "10.00"


# --- The arena

LABELS = {"vgg": "VGG, CIFAR-10", "gru": "GRU, characters"}


def make_short(
  validation, test, *, task="vgg", optimizer="alrao", rate=None, seed=0, chance=2.0
) -> Run:
  """A run whose curve has points at steps 50 and 100."""
  epochs = [
    {"kind": "epoch", "epoch": i, "train_loss": 1.0, "validation_loss": v,
     "test_loss": t, "steps": [], "head_weights": []}
    for i, (v, t) in enumerate(zip(validation, test, strict=True), 1)
  ]  # fmt: skip
  config = {
    "suite": "arena",
    "task": task,
    "optimizer": optimizer,
    "rate": rate,
    "seed": seed,
    "num_steps": 100,
    "max_epochs": 2,
    "chance": chance,
  }
  summary = {
    "kind": "summary",
    "name": json.dumps(config),
    "config": config,
    "environment": {"device": "cpu", "commit": "c" * 40},
    "date": "2020-01-02",
  }
  return Run(summary, epochs)


def make_cost(task, optimizer, ratio=2.0) -> dict:
  return {
    "kind": "cost",
    "suite": "arena",
    "task": task,
    "optimizer": optimizer,
    "ratio": ratio,
    "milliseconds": 1.0,
    "environment": {"device": "cpu"},
    "date": "2021-03-04",
  }


def arena_runs(tasks=tuple(LABELS), methods=ARENA) -> list[Run]:
  return [
    make_short([1.0, 0.5], [1.0, 0.5 if name == "adam_rates" else 1.0],
               task=task, optimizer=name, rate=rate)
    for task in tasks
    for name in methods
    for rate in METHODS[name].rates or (None,)
  ]  # fmt: skip


def arena_costs(tasks=tuple(LABELS), methods=ARENA) -> list[dict]:
  return [make_cost(task, name) for task in tasks for name in methods]


def test_the_rate_is_chosen_on_held_out_data():
  kept = [
    make_short([1.0, 0.9], [1.0, 0.5], rate=0.1),
    make_short([1.0, 0.8], [1.0, 0.7], rate=0.2),
  ]
  found = standings.result(kept)
  assert (found.rate, found.losses, found.failures) == (0.2, (0.7,), 0)


def test_failures_count_with_the_loss_of_knowing_nothing():
  kept = [
    make_short([None, None], [None, None], seed=0),
    make_short([1.0, 9.0], [1.0, 9.0], seed=1),
    make_short([1.0], [1.0], seed=2),  # has ended early
    make_short([1.0, 1.0], [1.0, 1.0], seed=3),
  ]
  found = standings.result(kept)
  assert found.losses == (2.0, 2.0, 2.0, 1.0)
  assert found.failures == 3


def test_at_equal_compute_the_curve_is_read_when_the_budget_is_spent():
  kept = [make_short([1.0, 0.5], [1.0, 0.6])]
  assert standings.result(kept, cost=2.0).losses == (1.0,)
  assert math.isclose(standings.result(kept, cost=4.0).losses[0], 1.5)  # from chance, 2
  assert math.isclose(standings.result(kept, cost=100 / 75).losses[0], 0.8)
  assert standings.result(kept, cost=0.5).losses == (0.6,)


def test_losses_are_relative_to_the_better_of_the_tuned():
  of = lambda loss: standings.result([make_short([1, loss], [1, loss])])  # noqa: E731
  found = {"a": of(0.4), "sgd": of(0.8), "adam": of(0.5), "b": None}
  assert relative(found, ("sgd", "adam")) == {"a": 0.8, "sgd": 1.6, "adam": 1.0}
  assert relative({"a": of(0.4)}, ("sgd", "adam")) == {}


def test_the_arena_ranks_by_the_geometric_mean():
  lines = Arena(LABELS, arena_runs(), arena_costs()).lines()
  text = "\n".join(lines)
  first = text.split("### Equal steps")[1].splitlines()[4]
  assert first.startswith("| Adam, best of 7 rates | 1.000 | 1.000 | 1.000 | 1.000 | 0")
  assert "### Equal compute" in text
  assert MISSING not in text.split("### Equal steps")[1]
  runs_line, times_line = lines[-3], lines[-1]
  assert runs_line.startswith("`python -m benchmarks sweep arena`; device ")
  assert runs_line.endswith("; 2020-01-02.")
  assert times_line.startswith("Times of steps: device ")
  assert times_line.endswith("; 2021-03-04.")
  assert geometric_mean([2.0, 8.0]) == 4.0


def test_a_method_without_records_has_empty_cells_and_the_others_are_shown():
  measured = [name for name in ARENA if name != "prodigy"]
  arena = Arena(LABELS, arena_runs(methods=measured), arena_costs(methods=measured))
  lines = arena.lines()
  label = METHODS["prodigy"].label
  steps, compute, times, losses = rows_of(lines, f"{label} |")
  assert steps == compute == [label, *[MISSING] * 5]
  assert times == losses == [label, MISSING, MISSING]
  whole = Arena(LABELS, arena_runs(), arena_costs()).lines()
  for name in measured:
    of_both = (rows_of(each, f"{METHODS[name].label} |") for each in (lines, whole))
    assert next(of_both) == next(of_both)
  assert arena.missing_costs == []
  assert arena.standings()[-1].name == "prodigy"


def test_a_task_that_a_method_lacks_leaves_it_without_a_mean():
  runs = [
    run
    for run in arena_runs()
    if (run.config["task"], run.config["optimizer"]) != ("gru", "dog")
  ]
  lines = Arena(LABELS, runs, arena_costs()).lines()
  first, *_ = rows_of(lines, f"{METHODS['dog'].label} |")
  assert first[1:] == ["2.000", MISSING, MISSING, MISSING, "0"]


def test_missing_times_of_steps_are_said_to_be_missing():
  costs = [
    cost
    for cost in arena_costs()
    if (cost["task"], cost["optimizer"]) != ("gru", "adamw")
  ]
  arena = Arena(LABELS, arena_runs(), costs)
  assert arena.missing_costs == ["gru/adamw"]
  lines = arena.lines()
  _, compute, times, _ = rows_of(lines, "AdamW |")
  assert compute[1:] == ["1.000", MISSING, MISSING, MISSING, "0"]
  assert times == ["AdamW", "2.00", MISSING]
  text = "\n".join(lines)
  assert "have not been measured: gru/adamw. `python -m benchmarks sweep arena" in text
  assert "--methods adamw` and `python -m benchmarks collect arena` add them" in text


def test_without_times_there_are_tables_all_the_same():
  lines = Arena(LABELS, arena_runs(), []).lines()
  text = "\n".join(lines)
  assert "### Equal steps" in text and "### Equal compute" not in text
  assert "have not been measured: vgg/schedule_free_alrao, " in text
  assert not lines[-1].startswith("Times of steps: ")


def test_tasks_without_runs_are_left_out():
  lines = Arena(LABELS, arena_runs(["gru"]), arena_costs()).lines()
  assert rows_of(lines, "method")[0][1] == "GRU, characters"
  assert "VGG" not in "\n".join(lines)
  assert Arena(LABELS, [], []).lines() == ["No task has been trained yet."]


def test_without_a_tuned_method_nothing_is_relative():
  lines = Arena(LABELS, arena_runs(methods=["alrao"]), []).lines()
  first, *_, losses = rows_of(lines, "Alrao |")
  assert first[1:] == [MISSING] * 4 + ["0"]
  assert losses[1:] == ["1.000", "1.000"]


def test_points_are_the_steps_at_which_a_curve_is_measured():
  found = standings.points({"num_steps": 500, "max_epochs": 8})
  assert found.tolist() == [62, 125, 187, 250, 312, 375, 437, 500]
  assert len(METHODS["adam_rates"].rates) == len(ADAM_HALF_DECADES) == 7
