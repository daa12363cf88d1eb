"""The long suite: what it trains, and what its table shows."""

import jax
import numpy as np
import pytest
from training_cases import quiet

from benchmarks.records import Run
from benchmarks.studies import long
from benchmarks.studies._horizons import HorizonRun, HorizonTrainer, KnownRuns
from benchmarks.studies.long import ADAMW, ARMS, losses_on_test, phases
from benchmarks.workloads import long_tasks, search
from benchmarks.workloads.long_tasks import TASKS, LongWorkload
from benchmarks.workloads.short import SHORT_TASKS


@pytest.fixture(autouse=True)
def _standard_promotion():
  # Other libraries' optimizers are not written for strict promotion.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def walk(curve):
  """All runs, with losses by a formula of the run and the part."""
  known = KnownRuns()
  for phase in phases(known, tuple(TASKS)):
    for one in phase:
      epochs = [
        {f"{part}_loss": loss for part, loss in zip(("validation", "test"), pair)}  # noqa: B905
        for pair in zip(curve(one, "validation"), curve(one, "test"))  # noqa: B905
      ]
      known.add(Run({"config": one._asdict()}, epochs))
  return known


def curve(one, part):
  # Held-out data prefers .01; test data would prefer .001. All overfit after point 4.
  preferred = 1e-2 if part == "validation" else 1e-3
  away = abs((one.rate or preferred) - preferred) + (one.decay or 0.0)
  gain = 0.8 if one.arm == "schedule_free_alrao" else 1.0
  return gain * (1 + away + 0.1 * abs(np.arange(8) - 3))


def test_held_out_data_chooses_and_test_data_is_shown():
  known = walk(curve)
  assert known.best(long.settings("wine", ADAMW, 0.5)).rate == 1e-2
  end, best = losses_on_test(known, "wine", ADAMW, 1.0, 2)
  np.testing.assert_allclose((end, best), (1 + 0.009 + 0.01 + 0.4, 1.019))
  # Without a horizon, an arm is read at a quarter of its only run.
  found = losses_on_test(known, "wine", "schedule_free_alrao", 0.25, 0)
  np.testing.assert_allclose(found, (0.8 * 1.2, 0.8 * 1.2))
  assert losses_on_test(known, "wine", "prodigy_cosine", 0.25, 0) is None
  text = "\n".join(long.table(known))
  assert "| AdamW, warm-up and cosine | 1.000 | 1.00 |" in text


def test_the_large_task_has_fewer_runs():
  runs = walk(curve).runs
  adamw = [one for one in runs if one.arm == ADAMW]
  assert len([one for one in adamw if one.task == "wine"]) == 3 * (8 + 2)
  assert len([one for one in adamw if one.task == long.LARGE]) == 4 + 1


def test_no_task_is_one_of_the_arenas_or_the_searchs():
  assert not set(TASKS) & {*SHORT_TASKS, *search.TASKS}
  assert all(task.short.num_steps % 32 == 0 for task in TASKS.values())


@pytest.mark.parametrize("load", [long_tasks.wine, long_tasks.flipped])
def test_parts_do_not_overlap(load):
  parts = [{x.tobytes() for x in part.inputs} for part in load(None)[:3]]
  assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains(arm, tmp_path, monkeypatch):
  task = TASKS["wine"]
  short = task.short._replace(num_steps=32)
  monkeypatch.setitem(TASKS, "wine", task._replace(short=short))
  trainer = HorizonTrainer(
    "test",
    "long",
    TASKS,
    ARMS,
    out=tmp_path,
    data_dir=None,
    display=quiet(),
    workload=LongWorkload,
  )
  rate, decay = next(iter(ARMS[arm].method.rates), (None, None))
  known, one = KnownRuns(), HorizonRun("wine", arm, 0, 1.0, rate, decay)
  known.add(trainer.train(one))
  assert np.isfinite(known.losses(one, "test")).all()


@pytest.mark.slow
def test_a_fine_tuning_begins_with_the_trained_body():
  data = long_tasks.wine(None)
  plain = LongWorkload(TASKS["wine"], data, ARMS["schedule_free_alrao"].method)
  params = plain.init(0, None).params["body"]
  zeros = jax.tree.map(np.zeros_like, params["Dense_0"])
  body = {"params": {**params, "Dense_0": zeros}, "batch_stats": {}}
  tuned = LongWorkload(
    TASKS["wine"], data._replace(body=body), ARMS["schedule_free_alrao"].method
  )
  state = tuned.init(0, None)
  assert not state.params["body"]["Dense_0"]["kernel"].any()
  averaged = state.opt_state.average["body"]["Dense_0"]["kernel"]
  assert not averaged.any()
