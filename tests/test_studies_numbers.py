"""The numbers of the control experiments, from canned records."""

import json
import math

import numpy as np
import pytest
from benchmark_cases import quiet

import alrao_jax
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.results import RunRecords
from benchmarks.studies import ablation, adam, guard, ranking, shortlist
from benchmarks.studies.architectures import CIFAR10, DIGITS
from benchmarks.studies.arms import Images, share, threshold
from benchmarks.studies.runner import Arm
from benchmarks.studies.shortlist import Scores
from benchmarks.studies.texts import Texts, TextTrainer

TINY = Images("digits", num_train=96, num_held_out=32, epochs=2)


def test_exact_intervals_of_shares():
  # All of n: the lower bound p has p ** n = .025; none: the upper has (1 - p) ** n.
  lowest = 100 * 0.025 ** (1 / 30)
  assert share([True] * 30) == f"30 of 30 ({lowest:.0f} to 100 %)"
  assert share([False] * 30) == f"0 of 30 (0 to {100 - lowest:.0f} %)"


def test_threshold_is_half_way_from_chance_to_the_best_rate():
  best, least = threshold({0.1: [0.4, 0.6], 1.0: [0.9, 0.05]})
  assert best == 0.1
  np.testing.assert_allclose(least, 0.3)


def test_correlation_of_ranks():
  order = np.array([0.1, 0.5, 0.2, 0.9])
  assert shortlist.correlation(order, order**3) == pytest.approx(1)
  assert shortlist.correlation(order, -order) == pytest.approx(-1)
  assert shortlist.correlation(order, np.ones(4)) == 0
  # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15).
  swapped = np.array([2.0, 1.0, 4.0, 3.0])
  assert shortlist.correlation(np.arange(4.0), swapped) == pytest.approx(0.6)


def test_interval_of_the_correlation_holds_its_mean_and_says_how_sure():
  generator = np.random.default_rng(0)
  truth = np.arange(24.0)
  noisy = [(truth + generator.normal(0, size, 24), truth) for size in (5.0, 6.0)]
  values = shortlist.correlations(noisy)
  mean, low, high = shortlist.with_interval(values)
  assert 0.5 < low < mean < high < 1
  # A perfect order stays one in every sample.
  perfect = shortlist.correlations([(truth, truth)])
  np.testing.assert_allclose(shortlist.with_interval(perfect), 1.0)


def test_differences_of_correlations_are_of_the_same_networks():
  generator = np.random.default_rng(0)
  truth = np.arange(24.0)
  noisy = truth + generator.normal(0, 9, 24)
  one = shortlist.correlations([(noisy, truth)])
  same_order = shortlist.correlations([(noisy**3, truth)])
  np.testing.assert_allclose(shortlist.with_interval(one - same_order), 0, atol=1e-12)
  # Networks drawn apart would add up: its width would be 2 ** .5 times that of one.
  close = shortlist.correlations([(noisy + generator.normal(0, 1, 24), truth)])
  _, low, high = shortlist.with_interval(one)
  _, low_difference, high_difference = shortlist.with_interval(one - close)
  assert high_difference - low_difference < high - low


def ended(ending, best_epoch):
  names = ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy")
  scores = dict(zip(names, (1.0, 0.5, 1.1, 0.4), strict=True))
  return RunRecords({"ending": ending, "best_epoch": best_epoch, **scores}, [])


def test_a_run_that_failed_has_no_score_from_before():
  assert ranking._scores(ended("maximum", 2)) == [1.0, 0.5, 1.1, 0.4]
  lost = [np.inf, 0.1, np.inf, 0.1]
  assert ranking._scores(ended("failed", 2)) == lost
  assert ranking._scores(ended("maximum", None)) == lost


def sgd_scores():
  """Two networks, two rates, three seeds."""
  loss = np.array([[[1.0, 2.0, 9.0], [3.0, 3.0, 3.0]], [[5.0] * 3, [4.0] * 3]])
  accuracy = np.array([[[0.6, 0.8, 0.0], [0.9] * 3], [[0.9] * 3, [0.3, 0.5, 0.7]]])
  return Scores(loss, accuracy / 2, loss + 1, accuracy)


def test_rates_are_tuned_by_the_images_that_choose_and_scored_by_others():
  truth = shortlist.tune(sgd_scores(), (0, 1))
  assert truth.rate.tolist() == [0, 1]
  np.testing.assert_allclose(truth.chosen_by, [1.5, 4.0])
  np.testing.assert_allclose(truth.loss, [2.5, 5.0])
  np.testing.assert_allclose(truth.accuracy, [0.7, 0.4])


def test_no_run_is_compared_with_itself():
  truths = shortlist.tune_by_others(sgd_scores())
  # Seed 2 alone has lost the first network at the first rate.
  assert [truth.rate[0] for truth in truths] == [1, 1, 0]


def test_regret_is_what_the_shortlist_lacks():
  truth = shortlist.Truth(
    rate=np.zeros(5, int),
    chosen_by=np.array([0.1, 0.2, 0.3, 0.4, 0.5]),
    loss=np.zeros(5),
    accuracy=np.array([0.9, 0.8, 0.7, 0.6, 0.5]),
  )
  assert shortlist.regret(np.array([5, 4, 3, 2, 1]), truth) == 0
  assert shortlist.regret(np.array([0, 0, 1, 2, 3]), truth) == pytest.approx(0.2)


def test_every_architecture_has_a_name_of_its_own():
  assert len(DIGITS) == 24 and len(CIFAR10) == 8
  for networks in (DIGITS, CIFAR10):
    assert len({network.title for network in networks}) == len(networks)


def test_runs_that_end_finite_and_learn_are_counted():
  def run(accuracy, finite=1.0, loss=1.0):
    last = {
      "validation_loss": loss,
      "validation_accuracy": accuracy,
      "validation_parameters_finite": finite,
      "validation_units_guarded": 0.25,
    }
    return RunRecords({"ending": "maximum", "config": {"chance": 0.1}}, [last])

  runs = {
    (1e3, False): [run(0.1, finite=0.0), run(0.4, loss=None), run(0.4), run(0.2)],
    (1e3, True): [run(0.4)] * 4,
  }
  rows = guard._table(runs, rate=0.1, least=0.3)[-2:]
  # The exact bounds of 2 and 1 of 4, and of 4 of 4: .025 ** (1 / 4).
  assert rows == [
    "| [1e-5, 1000] | no | 2 of 4 (7 to 93 %) | 1 of 4 (1 to 81 %) | 30.0 |  |",
    "| [1e-5, 1000] | yes | 4 of 4 (40 to 100 %) | 4 of 4 (40 to 100 %) | 40.0 | 25 |",
  ]


def test_a_share_of_the_text_trains(tmp_path):
  file = tmp_path / "text.txt"
  file.write_text("ab ba\n" * 500)
  texts = Texts(0.5, num_held_out=100, batch_size=2, length=5, files=(file,))
  trainer = TextTrainer("test", texts, tmp_path, quiet())
  arm = Arm("a", OPTIMIZERS["adam"], "a", network="lstm")
  config = trainer.plan(arm, 0).config
  assert config["num_train"] == 0.5 * 0.8 * 3000
  assert trainer.program(arm).steps_per_epoch == 1199 // 2 // 5
  json.dumps(config)  # as records are written
  with pytest.raises(ValueError, match=r"Arm\(width=...\) must be left at 1.0"):
    trainer.program(arm._replace(compiled="b", width=2.0))
  with pytest.raises(ValueError, match="small_cnn"):
    trainer.program(arm._replace(compiled="b", network="small_cnn"))


def test_time_of_a_step_comes_with_its_interval_and_control(tmp_path, monkeypatch):
  # Ratios 1.1, 1.2, ..., 1.6: of six, least and greatest bound the median.
  ratios = 1 + np.arange(1, 7) / 10
  seconds = 1e-3 * np.stack([np.ones(6), np.ones(6), ratios], axis=1)
  monkeypatch.setattr(guard, "time_steps", lambda *_: seconds)
  study = guard.Guard(TINY, rounds=6, out=tmp_path)
  text = study._cost(alrao_jax.guard())
  assert "with the guard 1.350 (1.100 to 1.600)" in text
  assert "for control, 1.000 (1.000 to 1.000)" in text
  (found,) = study.used
  assert {"environment", "date"} < set(found)


def test_ablation_says_how_many_runs_of_an_arm_failed_and_how_sure_it_is():
  def run(loss, ending="maximum"):
    last = {"train_loss": loss, "validation_loss": loss, "validation_accuracy": 0.5}
    return RunRecords({"ending": ending, "config": {"chance": 0.1}}, [last])

  alrao = [run(loss) for loss in (1.0, 1.0, 1.0)]
  other = [run(loss) for loss in (1.1, 1.2, 1.3)]
  *_, row, lost = ablation._table(
    {ablation.ALRAO: alrao, "other": other, "lost": [*other[:2], run(9.0, "failed")]}
  )
  # Student's t of two degrees of freedom: 4.303 * .1 / 3 ** .5 = .248.
  assert row.endswith("| +0.200 ± 0.100 (-0.048 to +0.448) |")
  assert lost.endswith("| 1 of 3 failed |")


def test_a_rise_is_the_largest_in_the_later_half_and_nan_of_one_epoch():
  def rise(*losses):
    return adam._rise(RunRecords({}, [{"validation_loss": loss} for loss in losses]))

  assert rise(1.0, 3.0, 2.0, 2.5, 2.25) == 0.5
  assert rise(3.0, 2.0, 1.0) == -1.0
  assert math.isnan(rise(1.0))
  assert math.isnan(rise(1.0, 1.0, None, 1.0))
