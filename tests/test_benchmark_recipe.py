"""The search for a recipe: its family of optimizers, its records, its choices."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alrao_jax as alrao
from benchmarks import records
from benchmarks.arena.problem import Data, Part, Task
from benchmarks.optimizers import Setting
from benchmarks.planning import OptionError
from benchmarks.recipe import runs as runs_module
from benchmarks.recipe import search
from benchmarks.recipe.__main__ import Search
from benchmarks.recipe.candidates import FAMILY, OFFERED, Candidate
from benchmarks.recipe.runs import Runs
from benchmarks.recipe.table import table
from benchmarks.recipe.tasks import TASKS

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def optax_may_promote():
  with jax.numpy_dtype_promotion("standard"):
    yield


def train(optimizer, steps=6):
  params = {
    "body": {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4)},
    "output": {"alrao_heads": {"kernel": jnp.linspace(-1, 1, 24).reshape(3, 4, 2)}},
  }
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  observed = jnp.array([-2.0, -0.5, -3.0])
  for step in range(steps):
    grads = jax.tree.map(lambda p, step=step: jnp.cos(p + step), params)
    updates, state = update(grads, state, params, head_log_likelihoods=observed)
    params = optax.apply_updates(params, updates)
  return params, state


def train_candidate(candidate):
  return train(FAMILY.make(Setting(KEY, candidate.numbers(), 10, False)))


def assert_close(a, b):
  # Steps of a quarter at most, in float32, a few roundings each.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b
  )


@pytest.mark.parametrize(
  ("changes", "base", "high"),
  [
    ({}, optax.scale_by_adam(), 1e-1),
    ({**search.SGD, "b1": 0.0, **search.interval(1e-5, 10.0)}, None, 10.0),
  ],
)
def test_the_family_holds_alrao_on_adam_and_on_sgd(changes, base, high):
  params, _ = train_candidate(Candidate(**changes, share=1.0))
  expected, _ = train(alrao.alrao(KEY, base, 1e-5, high))
  assert_close(params, expected)


def test_share_one_averages_nothing():
  params, state = train_candidate(Candidate(share=1.0))
  assert_close(FAMILY.averaged_params(state, params), params)


def test_the_family_holds_the_offered_recipe():
  params, state = train_candidate(OFFERED)
  expected, expected_state = train(alrao.schedule_free_alrao(KEY))
  assert_close(params, expected)
  averaged = FAMILY.averaged_params(state, params)
  assert_close(averaged, alrao.eval_params(expected_state, expected))


class FakeRuns:
  """Losses by a formula in place of training."""

  def __init__(self, loss):
    self.loss, self.count = loss, 0
    self.tasks = {"one": TASKS["lstm"], "two": TASKS["cnn"]}

  def candidate(self, candidate, task, seed=0):
    self.count += 1
    return self.loss(candidate)

  def reference(self, task):
    return 1e-3, 1.0

  def adam(self, task, rate, seed=0):
    return 1.0

  def peer(self, task, seed=0):
    return 1.1


def test_the_search_keeps_what_gains_more_than_the_margin():
  # Half the loss at three numbers, each in its own choice.
  goal = {"gamma": 8.0, "b2": 0.95, "weight_decay": 0.1}

  def loss(candidate):
    found = dataclasses.asdict(candidate)
    return 0.5 ** sum(found[name] == value for name, value in goal.items())

  trials = search.search(FakeRuns(loss))
  winner = search.chosen(trials)
  assert winner == dataclasses.replace(search.START, share=0.0, **goal)
  adopted = [trial for trial in trials if trial.adopted]
  np.testing.assert_allclose(
    [trial.score for trial in adopted], [-n * math.log(2) for n in range(4)], atol=1e-12
  )


def test_the_search_keeps_nothing_that_gains_less_than_the_margin():
  half = math.exp(-search.MARGIN / 2)
  trials = search.search(
    FakeRuns(lambda candidate: 1.0 if candidate == search.START else half)
  )
  assert search.chosen(trials) == search.START


def test_the_search_needs_at_most_200_runs():
  fake = FakeRuns(lambda candidate: 1.0)
  trials = search.search(fake)
  search.confirm(fake, search.chosen(trials))
  per_task = len(trials) + len(runs_module.REFERENCE_RATES) + 1
  confirming = 4 * len(search.CONFIRM_SEEDS)
  assert len(TASKS) * (per_task + confirming) <= 200


def test_the_records_lead_to_what_is_offered(monkeypatch):
  monkeypatch.setattr(runs_module, "Program", None)  # nothing is to be trained
  recorded = Runs(TASKS, records.ROOT / Search().out, None, lambda line: None)
  trials = search.search(recorded)
  assert search.chosen(trials) == OFFERED
  written = (records.ROOT / Search().out / "SEARCH.md").read_text(encoding="utf-8")
  assert table(recorded, trials) == written


def test_the_table_shows_every_trial_and_marks_the_adopted():
  def loss(candidate):
    return math.inf if candidate.power == 0 else 2.0 - candidate.beta

  fake = FakeRuns(loss)
  trials = search.search(fake)
  text = table(fake, trials)
  rows = [line for line in text.splitlines() if line.startswith("| ")]
  assert sum("inf" in row for row in rows) == sum(t.score == math.inf for t in trials)
  assert sum(row.startswith("| **") for row in rows) == sum(t.adopted for t in trials)
  assert "beta=0.95" in text


TOY = Task("toy", "toy", lambda data_dir: toy_data(), lambda *_: None, num_steps=8)


def toy_data():
  part = Part(np.zeros((4, 2), np.float32), np.zeros(4, np.int32))
  return Data(part, part, part, 2)


class FakeProgram:
  """Counts runs; a loss of one over the learning rate, none at the largest."""

  runs = 0

  def __init__(self, task, data, optimizer, **_):
    pass

  def run(self, starts, parts):
    FakeProgram.runs += len(starts)
    return [
      {
        "seed": start.seed,
        "rate": start.rate,
        "steps": [8],
        "validation_loss": [None if start.rate == 1e-1 else 1 / start.rate],
        "seconds": 0.0,
      }
      for start in starts
    ]


@pytest.fixture
def make_runs(tmp_path, monkeypatch):
  monkeypatch.setattr(runs_module, "Program", FakeProgram)
  FakeProgram.runs = 0
  return lambda task=TOY: Runs({"toy": task}, tmp_path, None, lambda line: None)


def test_the_best_rate_is_found_once_and_kept(make_runs):
  assert make_runs().reference("toy") == (3e-2, 1 / 3e-2)
  assert FakeProgram.runs == len(runs_module.REFERENCE_RATES)
  again = make_runs()
  assert again.reference("toy") == (3e-2, 1 / 3e-2)
  assert again.count == FakeProgram.runs == len(runs_module.REFERENCE_RATES)


def test_a_run_without_a_finite_loss_is_recorded_and_counts_as_infinite(make_runs):
  assert make_runs().adam("toy", 1e-1) == math.inf
  assert make_runs().adam("toy", 1e-1) == math.inf
  assert FakeProgram.runs == 1


def test_runs_of_another_length_are_refused(make_runs):
  make_runs().adam("toy", 1e-3)
  with pytest.raises(OptionError, match="toy.jsonl has runs of"):
    make_runs(TOY._replace(num_steps=9))


def test_every_run_says_where_it_was_made(make_runs, tmp_path):
  make_runs().adam("toy", 1e-3)
  (record,) = records.read(tmp_path / "toy.jsonl")
  assert {"jax", "commit", "device"} <= set(record["environment"])
