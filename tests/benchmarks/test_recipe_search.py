"""The search for the next recipe: its candidates, its tasks, and its rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_cases import quiet

import alrao_jax
from benchmarks.methods import ADAMW_COSINE as ADAMW
from benchmarks.records import Run
from benchmarks.studies import recipe_search
from benchmarks.studies._candidates import CANDIDATES, TODAY, variant
from benchmarks.studies._horizons import HorizonRun, HorizonTrainer
from benchmarks.studies.recipe_search import (
  HORIZONS,
  NOISE_SEEDS,
  TRAINED,
  Known,
  finalists,
  phases,
)
from benchmarks.workloads import search
from benchmarks.workloads.search import SCREENING, TASKS


@pytest.fixture(autouse=True)
def _standard_promotion():
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


PARAMS = {
  "hidden": {"kernel": jnp.linspace(-1, 1, 12).reshape(4, 3), "bias": jnp.ones(3)},
  "output": {"alrao_heads": {"kernel": jnp.linspace(0, 1, 20).reshape(5, 2, 2)}},
}


def steps(optimizer, count=4):
  """Parameters, and their average, after some steps on x^4 / 4."""
  params, state = PARAMS, optimizer.init(PARAMS)
  for number in range(count):
    told = jnp.array([-2.0, -1.5, -1.0, -2.0, -3.0])
    told = jnp.where(number == 1, jnp.nan, told)  # a batch without judges
    grads = jax.tree.map(lambda x: x**3, params)
    moves, state = optimizer.update(grads, state, params, head_log_likelihoods=told)
    params = optax.apply_updates(params, moves)
  return params, alrao_jax.eval_params(state, params)


def test_the_variant_without_changes_is_todays_recipe():
  key = jax.random.key(0)
  found, expected = steps(variant(key)), steps(TODAY.make(key))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), found, expected
  )


@pytest.mark.parametrize("name", ["judges_16_liked", "momentum", "muon",
                                  "unit_squares", "by_time"])  # fmt: skip
def test_the_variants_step_on_their_own_way(name):
  (candidate,) = (one for one in CANDIDATES if one.name == name)
  params, average = steps(candidate.make(jax.random.key(0)), 3)
  today, _ = steps(TODAY.make(jax.random.key(0)), 3)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((params, average)))
  moved = params["hidden"]["kernel"] - PARAMS["hidden"]["kernel"]
  assert moved.any()
  if name != "judges_16_liked":  # which differs after a hundred steps
    assert not np.allclose(params["hidden"]["kernel"], today["hidden"]["kernel"])


def test_there_are_24_candidates_of_different_names():
  assert len({one.name for one in (TODAY, *CANDIDATES)}) == 25


@pytest.mark.parametrize(
  "load", [search.rows, search.flipped, search.cancer, search.noise, search.tiles]
)
def test_parts_do_not_overlap_and_test_data_is_left_alone(load):
  data = load(None)
  assert data.test is data.validation
  train, held_out = ({x.tobytes() for x in part.inputs} for part in data[:2])
  assert not train & held_out
  assert len(train) == len(data.train.inputs)


def test_points_are_whole_numbers_of_steps_at_every_horizon():
  assert all(task.short.num_steps % 32 == 0 for task in TASKS.values())


def fake(losses):
  """Runs by a formula of their trial."""

  def run(trial):
    epochs = [{"validation_loss": losses(trial)}] * 8
    return Run({"config": trial._asdict()}, epochs)

  return run


def walk(losses):
  known, run = Known(), fake(losses)
  for phase in phases(known):
    for trial in phase:
      if trial not in known.runs:
        known.add(run(trial))
  return known


def test_the_search_trains_the_best_on_all_tasks_and_the_last_two_again():
  gains = {one.name: 0.01 * number for number, one in enumerate(CANDIDATES)}

  def losses(trial):
    if trial.arm == ADAMW.name:
      return 1 + abs(trial.rate - 1e-2) + trial.decay
    # Reruns differ by a thousandth.
    return 1 - gains.get(trial.arm, 0) + 1e-3 * (trial.seed in NOISE_SEEDS[::2])

  known = walk(losses)
  best = [one.name for one in CANDIDATES[:-9:-1]]
  assert finalists(known) == best
  trained = {trial.arm for trial in known.runs if trial.task not in SCREENING}
  assert trained == {ADAMW.name, TODAY.name, *best}
  third = {t.arm for t in known.runs if t.seed == 2 and t.arm in gains}
  assert third == set(best[:2])
  assert known.setting("rows", 0.5) == HorizonRun(
    "rows", ADAMW.name, 0, 0.5, 1e-2, 1e-2
  )
  text = "\n".join(recipe_search.table(known))
  assert "All tasks, three seeds" in text and "24 of 24 candidates were tried" in text


def test_what_gains_less_than_twice_the_noise_ends_the_search():
  known = walk(lambda trial: 1 + 0.1 * (trial.seed % 2) - 0.05 * (trial.arm == "upper"))
  assert finalists(known) == []
  assert {trial.task for trial in known.runs} == set(SCREENING)


def test_a_failed_run_counts_as_ten_times_the_loss():
  known = walk(lambda trial: np.inf if trial.arm == "upper" else 1.0)
  found = known.difference("upper", SCREENING, (0,))
  np.testing.assert_allclose(found, np.log(10))


@pytest.mark.slow
def test_judges_and_a_horizon_of_the_reference_train(tmp_path, monkeypatch):
  task = TASKS["noise"]
  short = task.short._replace(num_steps=32)
  monkeypatch.setitem(TASKS, "noise", task._replace(short=short))
  trainer = HorizonTrainer(
    "test", "search", TASKS, TRAINED, out=tmp_path, data_dir=None, display=quiet()
  )
  known = Known()
  trials = [
    HorizonRun("noise", "judges_4", 1),
    HorizonRun("noise", ADAMW.name, 0, 0.5, 1e-2, 0.1),
  ]
  for trial in trials:
    known.add(trainer.train(trial))
  assert np.isfinite(known.losses(trials[0])).all()
  assert known.losses(trials[1])[-1] < known.losses(trials[1])[0]
  assert {run.config["num_steps"] for run in known.runs.values()} == {16, 32}
  assert HORIZONS[1] == 0.5
