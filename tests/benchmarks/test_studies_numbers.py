"""The numbers of the studies, from canned runs."""

import math

import numpy as np
import pytest

from benchmarks.records import Run
from benchmarks.studies import ablation, adam, bounds, guard, interval, ranking, seeds
from benchmarks.studies._study import share, threshold
from benchmarks.studies.posterior import PosteriorStudy
from benchmarks.studies.ranking import CIFAR10, DIGITS, Scores


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
  assert ranking.correlation(order, order**3) == pytest.approx(1)
  assert ranking.correlation(order, -order) == pytest.approx(-1)
  assert ranking.correlation(order, np.ones(4)) == 0
  # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15).
  swapped = np.array([2.0, 1.0, 4.0, 3.0])
  assert ranking.correlation(np.arange(4.0), swapped) == pytest.approx(0.6)


def test_interval_of_the_correlation_holds_its_mean_and_says_how_sure():
  generator = np.random.default_rng(0)
  truth = np.arange(24.0)
  noisy = [(truth + generator.normal(0, size, 24), truth) for size in (5.0, 6.0)]
  values = ranking.correlations(noisy)
  mean, low, high = ranking.with_interval(values)
  assert 0.5 < low < mean < high < 1
  # A perfect order stays one in every sample.
  perfect = ranking.correlations([(truth, truth)])
  np.testing.assert_allclose(ranking.with_interval(perfect), 1.0)


def test_differences_of_correlations_are_of_the_same_networks():
  generator = np.random.default_rng(0)
  truth = np.arange(24.0)
  noisy = truth + generator.normal(0, 9, 24)
  one = ranking.correlations([(noisy, truth)])
  same_order = ranking.correlations([(noisy**3, truth)])
  np.testing.assert_allclose(ranking.with_interval(one - same_order), 0, atol=1e-12)
  # Networks drawn apart would add up: its width would be 2 ** .5 times that of one.
  close = ranking.correlations([(noisy + generator.normal(0, 1, 24), truth)])
  _, low, high = ranking.with_interval(one)
  _, low_difference, high_difference = ranking.with_interval(one - close)
  assert high_difference - low_difference < high - low


def ended(ending, best_epoch):
  names = ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy")
  scores = dict(zip(names, (1.0, 0.5, 1.1, 0.4), strict=True))
  return Run({"ending": ending, "best_epoch": best_epoch, **scores}, [])


def test_a_run_that_failed_has_no_score_from_before():
  assert ranking.scores_of(ended("maximum", 2)) == [1.0, 0.5, 1.1, 0.4]
  lost = [np.inf, 0.1, np.inf, 0.1]
  assert ranking.scores_of(ended("failed", 2)) == lost
  assert ranking.scores_of(ended("maximum", None)) == lost


def sgd_scores():
  """Two networks, two rates, three seeds."""
  loss = np.array([[[1.0, 2.0, 9.0], [3.0, 3.0, 3.0]], [[5.0] * 3, [4.0] * 3]])
  accuracy = np.array([[[0.6, 0.8, 0.0], [0.9] * 3], [[0.9] * 3, [0.3, 0.5, 0.7]]])
  return Scores(loss, accuracy / 2, loss + 1, accuracy)


def test_rates_are_tuned_by_the_images_that_choose_and_scored_by_others():
  truth = ranking.tune(sgd_scores(), (0, 1))
  assert truth.rate.tolist() == [0, 1]
  np.testing.assert_allclose(truth.chosen_by, [1.5, 4.0])
  np.testing.assert_allclose(truth.loss, [2.5, 5.0])
  np.testing.assert_allclose(truth.accuracy, [0.7, 0.4])


def test_no_run_is_compared_with_itself():
  truths = ranking.tune_by_others(sgd_scores())
  # Seed 2 alone has lost the first network at the first rate.
  assert [truth.rate[0] for truth in truths] == [1, 1, 0]


def test_regret_is_what_the_shortlist_lacks():
  truth = ranking.Truth(
    rate=np.zeros(5, int),
    chosen_by=np.array([0.1, 0.2, 0.3, 0.4, 0.5]),
    loss=np.zeros(5),
    accuracy=np.array([0.9, 0.8, 0.7, 0.6, 0.5]),
  )
  assert ranking.regret(np.array([5, 4, 3, 2, 1]), truth) == 0
  assert ranking.regret(np.array([0, 0, 1, 2, 3]), truth) == pytest.approx(0.2)


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
    return Run({"ending": "maximum", "config": {"chance": 0.1}}, [last])

  runs = {
    (1e3, False): [run(0.1, finite=0.0), run(0.4, loss=None), run(0.4), run(0.2)],
    (1e3, True): [run(0.4)] * 4,
  }
  found = guard.GuardRuns(runs, 0.1, 0.3, np.ones((6, 3)))
  rows = guard.GuardStudy().table(found)[4:6]
  # The exact bounds of 2 and 1 of 4, and of 4 of 4: .025 ** (1 / 4).
  assert rows == [
    "| [1e-5, 1000] | no | 2 of 4 (7 to 93 %) | 1 of 4 (1 to 81 %) | 30.0 |  |",
    "| [1e-5, 1000] | yes | 4 of 4 (40 to 100 %) | 4 of 4 (40 to 100 %) | 40.0 | 25 |",
  ]


def test_time_of_a_step_comes_with_its_interval_and_control():
  # Ratios 1.1, 1.2, ..., 1.6: of six, least and greatest bound the median.
  ratios = 1 + np.arange(1, 7) / 10
  seconds = 1e-3 * np.stack([np.ones(6), np.ones(6), ratios], axis=1)
  text = guard.describe_cost(seconds)
  assert "with the guard 1.350 (1.100 to 1.600)" in text
  assert "for control, 1.000 (1.000 to 1.000)" in text


def test_ablation_says_how_many_runs_of_an_arm_failed_and_how_sure_it_is():
  def run(loss, ending="maximum"):
    last = {"train_loss": loss, "validation_loss": loss, "validation_accuracy": 0.5}
    return Run({"ending": ending, "config": {"chance": 0.1}}, [last])

  alrao = [run(loss) for loss in (1.0, 1.0, 1.0)]
  other = [run(loss) for loss in (1.1, 1.2, 1.3)]
  lost = [*other[:2], run(9.0, "failed")]
  found = {ablation.ALRAO: alrao, "other": other, "lost": lost}
  *_, row, lost = ablation.AblationStudy().table(found)
  # Student's t of two degrees of freedom: 4.303 * .1 / 3 ** .5 = .248.
  assert row.endswith("| +0.200 ± 0.100 (-0.048 to +0.448) |")
  assert lost.endswith("| 1 of 3 failed |")


def test_a_rise_is_the_largest_in_the_later_half_and_nan_of_one_epoch():
  def rise(*losses):
    return adam.largest_rise(Run({}, [{"validation_loss": loss} for loss in losses]))

  assert rise(1.0, 3.0, 2.0, 2.5, 2.25) == 0.5
  assert rise(3.0, 2.0, 1.0) == -1.0
  assert math.isnan(rise(1.0))
  assert math.isnan(rise(1.0, 1.0, None, 1.0))


def last_run(rate, accuracy, loss=1.0, ending="maximum", **config):
  last = {"train_loss": loss, "validation_loss": loss, "validation_accuracy": accuracy}
  epochs = [{**last, "head_weights": []}]
  config = {"rate": rate, "chance": 0.1, **config}
  return Run({"config": config, "ending": ending}, epochs)


def test_claim_counts_intervals_by_what_they_hold():
  runs = {
    (0.1, 0.1): [last_run(0.1, 0.5)],
    (10.0, 10.0): [last_run(10.0, 0.1)],
    (1e-3, 1e-3): [last_run(1e-3, 0.1)],
    (1e-3, 0.1): [last_run((1e-3, 0.1), 0.4), last_run((1e-3, 0.1), 0.2)],
    (1e-3, 10.0): [last_run((1e-3, 10.0), 0.4), last_run((1e-3, 10.0), 0.4)],
  }
  lines = interval.claim(runs)
  assert "above 30.0% held-out accuracy" in lines[0]
  assert "SGD learns: 0.1." in lines[0]
  assert lines[4:] == [
    "| holds a suitable rate | 3 of 4 |",
    "| ... and SGD fails at its upper end | 2 of 2 |",
    "| holds none | 0 of 0 |",
  ]


def test_diverged_runs_have_no_mean_loss():
  runs = [last_run(1.0, 0.1), last_run(1.0, 0.1, ending="failed")]
  assert np.isnan(interval.mean_losses(runs)).all()
  assert interval.mean_losses(runs[:1]) == [1.0, 1.0]


def test_posterior_table_finds_crossing_dead_heads_and_changes():
  # Twice the least share of a head: 2 / (11 * 3) = .061.
  weights = np.full((1, 30, 3), 1 / 3)
  weights[0, 5:] = [0.995, 0.004, 0.001]
  weights[0, 20:] = [0.3, 0.6, 0.1]
  row = PosteriorStudy().table(weights)[-1]
  assert row == "| 0 | 160 | 1 | 2, 3 | 2 | 1 |"


def test_the_best_bound_of_each_row_stands_out():
  means = np.array([[0.1, 0.3, 0.2], [0.5, 0.4, 0.1]])
  # Two seeds that far from their mean deviate by the root of two times that.
  accuracies = {"SGD": np.stack([means - 0.01, means + 0.01], axis=2)}
  study = bounds.BoundsStudy(batch_sizes=(8, 32), uppers=(0.1, 1.0, 10.0))
  *_, small, large = study.table(accuracies)
  assert small == "| SGD | 8 | 10.0 ± 1.4 | **30.0 ± 1.4** | 20.0 ± 1.4 |"
  assert large == "| SGD | 32 | **50.0 ± 1.4** | 40.0 ± 1.4 | 10.0 ± 1.4 |"


def test_networks_side_by_side_that_failed_are_at_chance():
  last = {"validation_accuracies": [0.5, None]}
  assert seeds.block_accuracies(Run({}, [{}, last])) == [0.5, 0.1]
