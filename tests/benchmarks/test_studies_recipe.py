"""The finished search for a recipe: its choices, its table, and what it led to."""

import inspect
import math

import numpy as np
import pytest

import alrao_jax
from benchmarks import records
from benchmarks.records import RecordError
from benchmarks.studies import recipe
from benchmarks.studies.recipe import START, Losses, Recipe


class FakeLosses(Losses):
  """Losses by a formula in place of records."""

  def __init__(self, loss):
    self.loss, self.count = loss, 0
    self.tasks = ["lstm", "cnn"]

  def candidate(self, numbers, task, seed=0):
    self.count += 1
    return self.loss(numbers)

  def reference(self, task):
    return 1e-3, 1.0

  def adam(self, task, rate, seed=0):
    return 1.0

  def peer(self, task, seed=0):
    return 1.1


def test_the_search_keeps_what_gains_more_than_the_margin():
  # Half the loss at three numbers, each in its own choice.
  goal = {"gamma": 8.0, "b2": 0.95, "weight_decay": 0.1}

  def loss(numbers):
    return 0.5 ** sum(numbers[name] == value for name, value in goal.items())

  trials = recipe.search(FakeLosses(loss))
  assert recipe.chosen(trials) == {**START, "share": 0.0, **goal}
  adopted = [trial for trial in trials if trial.adopted]
  np.testing.assert_allclose(
    [trial.score for trial in adopted], [-n * math.log(2) for n in range(4)], atol=1e-12
  )


def test_the_search_keeps_nothing_that_gains_less_than_the_margin():
  half = math.exp(-recipe.MARGIN / 2)
  trials = recipe.search(FakeLosses(lambda numbers: 1.0 if numbers == START else half))
  assert recipe.chosen(trials) == START


def recorded() -> Losses:
  return Losses(records.load([records.archive("recipe")]))


def test_the_search_needed_200_runs():
  assert recorded().count == 200


def test_the_records_lead_to_what_is_offered():
  winner = recipe.chosen(recipe.search(recorded()))
  assert winner == {
    **START,
    **recipe.interval(1e-4, 1e-1),
    "b1": 0.0,
    "beta": 0.8,
    "gamma": 2.0,
    "share": 0.0,
    "narrowest": 0.1,
    "by_posterior": 1.0,
  }
  offered = inspect.signature(alrao_jax.schedule_free_alrao).parameters
  for name, number in {
    "min_learning_rate": "low",
    "max_learning_rate": "high",
    "narrowest": "narrowest",
    "interpolation": "beta",
    "power": "gamma",
    "b2": "b2",
  }.items():
    assert offered[name].default == winner[number], name


def test_the_table_shows_every_trial_and_marks_the_adopted():
  def loss(numbers):
    return math.inf if numbers["power"] == 0 else 2.0 - numbers["beta"]

  fake = FakeLosses(loss)
  trials = recipe.search(fake)
  lines = recipe.table(fake, trials)
  rows = [line for line in lines if line.startswith("| ")]
  assert sum("inf" in row for row in rows) == sum(t.score == math.inf for t in trials)
  assert sum(row.startswith("| **") for row in rows) == sum(t.adopted for t in trials)
  assert "beta=0.95" in "\n".join(lines)


def test_a_run_without_a_finite_loss_counts_as_infinite():
  runs = [run for run in records.load([records.archive("recipe")])
          if run.config["optimizer"] == "adam"]  # fmt: skip
  task, rate = runs[0].config["task"], runs[0].config["rate"]
  runs[0].epochs[-1]["validation_loss"] = None
  assert Losses(runs).adam(task, rate) == math.inf


def test_a_missing_run_is_named(tmp_path):
  missing = ("transformer", recipe.PEER, 2)
  for run in records.load([records.archive("recipe")]):
    config = run.config
    if (config["task"], config["optimizer"], config["seed"]) != missing:
      records.write(tmp_path / f"{run.name}.jsonl", [*run.epochs, run.summary])
  records.collect(tmp_path, tmp_path / "recipe.jsonl")
  with pytest.raises(RecordError, match="lack the run of .* on transformer, seed 2"):
    Recipe().derive(tmp_path)
