"""Whole tables of runs: which they hold, what is repeated, and what is refused."""

import dataclasses

import pytest
from training_cases import quiet

from benchmarks import records, suites, training
from benchmarks.console import OptionError, sparkline
from benchmarks.data import DataError
from benchmarks.methods import METHODS
from benchmarks.suites import _suite, cifar10
from benchmarks.suites.cifar10 import Cifar10, ImageOptions, ImagePlace

BASE = ImageOptions(
  dataset="digits", network="vgg19", num_train=64, num_validation=16, num_test=16
)


@pytest.fixture
def trained(monkeypatch):
  """Replaces training by canned records; returns the names of the runs trained."""
  names = []

  def train(workload, plan, display, *, resume=True, restart=False):
    del workload, display, resume
    assert restart  # a damaged checkpoint would end the sweep each time
    names.append(plan.name)
    loss, accuracy = {
      ("sgd", 0.1): (0.5, 0.90),
      ("sgd", 0.01): (0.4, 0.80),  # the best by validation loss
      ("sgd", 10.0): (None, None),
      ("alrao", None): (0.6, 0.70 + 0.05 * plan.seed),
      ("adam", None): (2.3, 0.10),
    }[plan.config["optimizer"], plan.config["rate"]]
    summary = {
      "kind": "summary",
      "name": plan.name,
      "config": plan.config,
      "ending": "failed" if loss is None else "maximum",
      "epochs": 2,
      "best_epoch": None if loss is None else 1,
      "validation_loss": loss,
      "test_loss": loss,
      "test_accuracy": accuracy,
      "seconds": 2.0,
      "date": "2020-01-02",
      "environment": {},
    }
    records.write(plan.path, [summary])
    return summary

  monkeypatch.setattr(training, "train", train)
  monkeypatch.setattr(Cifar10, "workload", lambda self, options: None)
  return names


PRESET = _suite.Preset(
  bases=(BASE,), optimizers=("alrao", "sgd", "adam"), rates=(0.1, 0.01, 10.0)
)


def test_sweep_repeats_the_best_rate_by_validation_loss(trained, tmp_path):
  summaries = _suite.sweep(PRESET, Cifar10(), tmp_path, quiet())
  runs = [
    tuple(s["config"][k] for k in ("optimizer", "rate", "seed")) for s in summaries
  ]
  assert runs == [
    *(("alrao", None, seed) for seed in range(3)),
    *(("sgd", rate, 0) for rate in (0.1, 0.01, 10.0)),
    *(("sgd", 0.01, seed) for seed in (1, 2)),
    *(("adam", None, seed) for seed in range(3)),
  ]


def test_sweep_skips_what_is_done(trained, tmp_path):
  first = _suite.sweep(PRESET, Cifar10(), tmp_path, quiet())
  assert len(trained) == len(first) == 11
  next(tmp_path.glob("*-adam-s1-*.jsonl")).unlink()
  again = _suite.sweep(PRESET, Cifar10(), tmp_path, quiet())
  assert again == first
  assert len(trained) == 12


def test_sweep_removes_the_checkpoint_of_a_run_that_has_ended(trained, tmp_path):
  (first, *_) = _suite.sweep(PRESET, Cifar10(), tmp_path, quiet())
  left = tmp_path / "checkpoints" / first["name"] / "3"
  left.mkdir(parents=True)
  _suite.sweep(PRESET, Cifar10(), tmp_path, quiet())
  assert not (tmp_path / "checkpoints").exists()


def test_a_preset_without_rates_tries_those_of_the_method():
  preset = PRESET._replace(rates=None)
  assert preset.rates_of("sgd") == METHODS["sgd"].rates
  assert preset.rates_of("adam") == PRESET.rates_of("adam") == ()
  assert PRESET.rates_of("sgd") == (0.1, 0.01, 10.0)


def test_other_options_never_take_the_place_of_results(tmp_path):
  suite = Cifar10()
  names = {
    suite.plan(options, tmp_path).name
    for options in (
      BASE,
      dataclasses.replace(BASE, max_epochs=3),
      dataclasses.replace(BASE, num_heads=5),
    )
  }
  assert len(names) == 3


@pytest.mark.parametrize("name", suites.names())
def test_every_preset_is_made_of_valid_options(name):
  suite = suites.load(name)
  assert suite.name == name
  assert suite.presets
  for preset in suite.presets.values():
    assert len({str(base) for base in preset.bases}) == len(preset.bases)
    for base in preset.bases:
      for method in preset.optimizers:
        rate = next(iter(preset.rates_of(method)), None)
        dataclasses.replace(base, optimizer=method, rate=rate).check()


@pytest.mark.parametrize("name", suites.names())
@pytest.mark.parametrize("seed", [-1, 2**32, 10**27])
def test_seeds_that_make_no_key_are_refused(name, seed):
  with pytest.raises(OptionError, match=r"--seed must be from 0 to 2\^32 - 1, got"):
    suites.load(name).options(seed=seed).check()
  suites.load(name).options(seed=2**32 - 1).check()


def test_sweep_goes_on_without_cifar10_where_the_preset_says_so(trained, tmp_path):
  preset = PRESET._replace(optimizers=("adam",), without_data={"dataset": "digits"})
  suite = Cifar10(ImagePlace(tmp_path / "nothing"))
  summaries = _suite.sweep(preset, suite, tmp_path / "out", quiet())
  assert {s["config"]["dataset"] for s in summaries} == {"digits"}
  assert not any(s["config"]["real_data"] for s in summaries)
  preset = PRESET._replace(bases=(ImageOptions(network="vgg19"),))
  with pytest.raises(DataError, match="no CIFAR-10 below"):
    _suite.sweep(preset, suite, tmp_path / "out", quiet())


def test_sweep_checks_all_options_before_it_trains(trained, tmp_path):
  wrong = dataclasses.replace(BASE, width=-1.0)
  with pytest.raises(OptionError, match="--width must be positive"):
    _suite.sweep(PRESET._replace(bases=(BASE, wrong)), Cifar10(), tmp_path, quiet())
  assert not trained


def test_selecting_what_a_preset_does_not_hold_is_an_error():
  picked = _suite.select(PRESET, ("vgg19",), ("adam",))
  assert (len(picked.bases), picked.optimizers) == (1, ("adam",))
  with pytest.raises(OptionError, match="googlenet"):
    _suite.select(PRESET, ("googlenet",), ())
  rl = suites.load("q_learning").presets["rl_pendulum"]
  assert _suite.select(rl, ("pendulum",), ()) == rl


def test_the_papers_table_has_their_networks():
  (papers,) = [cifar10.PRESETS["paper"]]
  networks = {base.network for base in papers.bases}
  assert networks == {"mobilenet_v2", "googlenet", "vgg19"}


def test_sparkline_shows_the_posterior():
  assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
