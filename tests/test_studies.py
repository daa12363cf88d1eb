"""The studies: their optimizers, their numbers from canned records, a tiny run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from benchmark_cases import quiet

import alrao_jax
from benchmarks import data, engine, records
from benchmarks.optimizers import Setting
from benchmarks.planning import OptionError
from benchmarks.results import RunRecords
from benchmarks.studies import (
  adam,
  averaging,
  fraction,
  interval,
  optimizers,
  posterior,
)
from benchmarks.studies.architectures import DIGITS
from benchmarks.studies.arms import Images, Trainer
from benchmarks.studies.programs import Watched
from benchmarks.studies.runner import Arm
from benchmarks.studies.study import Study
from benchmarks.studies.width import Width

KEY = jax.random.key(3)
PARAMS = {
  "body": {"Dense_0": {"kernel": jnp.ones((5, 200)), "bias": jnp.ones(200)}},
  "output": {"kernel": jnp.ones((200, 3)), "bias": jnp.ones(3)},
}
TINY = Images("digits", num_train=96, num_held_out=32, epochs=2)


def setting(rate):
  return Setting(KEY, rate, num_steps=10, has_batch_norm=True)


def updates_of(optimizer, rate, params, made_with=None, **extra):
  """One update, by a transformation that was made for another rate."""
  state = optimizer.make(setting(rate)).init(params)
  other = optimizer.make(Setting(jax.random.key(0), made_with or rate, 10, True))
  update = optax.with_extra_args_support(other).update
  return update(params, state, params, **extra)[0]


def test_interval_is_read_from_the_state():
  params = {
    "body": PARAMS["body"],
    "output": {"alrao_heads": {"kernel": jnp.ones((4, 200, 3))}},
  }
  extra = {"head_log_likelihoods": jnp.zeros(4)}
  plain = alrao_jax.alrao(KEY, None, 1e-4, 1e-1)
  expected, _ = plain.update(params, plain.init(params), params, **extra)
  actual = updates_of(
    optimizers.ALRAO_INTERVAL, (1e-4, 1e-1), params, made_with=(1e-9, 1e7), **extra
  )
  for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    # The bounds' logarithms are rounded to float32 once more: 1e-7 of about 10.
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_fraction_of_all_units_is_sgd():
  actual = updates_of(optimizers.FRACTION, (0.1, 1.0), PARAMS, made_with=(0.1, 0.5))
  expected = jax.tree.map(lambda g: -0.1 * g, PARAMS)
  for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_fraction_freezes_whole_units_and_never_the_output_layer():
  actual = updates_of(optimizers.FRACTION, (0.1, 0.3), PARAMS, made_with=(0.1, 1.0))
  layer = actual["body"]["Dense_0"]
  learns = layer["bias"] != 0
  np.testing.assert_array_equal(layer["kernel"] != 0, np.broadcast_to(learns, (5, 200)))
  # 200 draws at .3: standard deviation 6.5; five of them.
  assert abs(int(learns.sum()) - 60) < 33
  assert jnp.all(actual["output"]["kernel"] != 0)


def run_of(rate, accuracy, loss=1.0, ending="maximum", **config):
  last = {"train_loss": loss, "validation_loss": loss, "validation_accuracy": accuracy}
  epochs = [{**last, "head_weights": []}]
  config = {"rate": rate, "chance": 0.1, **config}
  return RunRecords({"config": config, "ending": ending}, epochs)


def test_claim_counts_intervals_by_what_they_hold():
  runs = {
    (0.1, 0.1): [run_of(0.1, 0.5)],
    (10.0, 10.0): [run_of(10.0, 0.1)],
    (1e-3, 1e-3): [run_of(1e-3, 0.1)],
    (1e-3, 0.1): [run_of((1e-3, 0.1), 0.4), run_of((1e-3, 0.1), 0.2)],
    (1e-3, 10.0): [run_of((1e-3, 10.0), 0.4), run_of((1e-3, 10.0), 0.4)],
  }
  lines = interval._claim(runs)
  assert "above 30.0% held-out accuracy" in lines[0]
  assert "SGD learns: 0.1." in lines[0]
  assert lines[4:] == [
    "| holds a suitable rate | 3 of 4 |",
    "| ... and SGD fails at its upper end | 2 of 2 |",
    "| holds none | 0 of 0 |",
  ]


def test_diverged_runs_have_no_mean_loss():
  runs = [run_of(1.0, 0.1), run_of(1.0, 0.1, ending="failed")]
  assert np.isnan(interval._mean_losses(runs)).all()
  assert interval._mean_losses(runs[:1]) == (1.0, 1.0)


def test_posterior_table_finds_crossing_dead_heads_and_changes():
  # Twice the least share of a head: 2 / (11 * 3) = .061.
  weights = np.full((1, 30, 3), 1 / 3)
  weights[0, 5:] = [0.995, 0.004, 0.001]
  weights[0, 20:] = [0.3, 0.6, 0.1]
  row = posterior._table(weights, batch_size=32)[-1]
  assert row == "| 0 | 160 | 1 | 2, 3 | 2 | 1 |"


@pytest.fixture
def counted(monkeypatch):
  """The names of the runs that are trained."""
  names, train = [], engine.train

  def counting(program, plan, display, **options):
    names.append(plan.name)
    return train(program, plan, display, **options)

  monkeypatch.setattr(engine, "train", counting)
  return names


@pytest.mark.slow
def test_trainer_shares_programs_and_never_repeats_a_run(tmp_path, counted):
  arms = [
    Arm(f"sgd-{rate:g}", optimizers.SGD, "sgd", rate, width=1 / 8)
    for rate in (0.1, 0.01)
  ]
  trainer = Trainer("test", TINY, tmp_path, quiet())
  first = trainer.run(arms, range(2))
  assert trainer._program[1].step.num_traces == 1
  assert len(counted) == 4
  again = Trainer("test", TINY, tmp_path, quiet()).run(arms, range(2))
  assert len(counted) == 4
  assert [run.summary for run in again] == [run.summary for run in first]
  assert [run.config["arm"] for run in first] == ["sgd-0.1"] * 2 + ["sgd-0.01"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
  "study",
  [
    interval.Interval(TINY, 2, (-3, -1), (1.0,)),
    posterior.Posterior(dataclasses.replace(TINY, num_train=384), 2),
    fraction.Fraction(TINY, 2, fractions=(0.1, 1.0), widths=(1 / 4,)),
    averaging.Averaging(TINY, 2),
    adam.Adam(TINY, 2, 2),
    Width(TINY, 2, ("mlp",), (1 / 16, 1 / 8)),
  ],
  ids=lambda study: type(study).__name__,
)
def test_every_study_writes_numbers_and_picture(study, tmp_path, capsys):
  name = type(study).__name__.lower()
  with jax.numpy_dtype_promotion("standard"):  # Adam's own arithmetic needs it
    dataclasses.replace(study, out=tmp_path)()
  assert (tmp_path / f"{name}.png").stat().st_size > 10_000
  text = (tmp_path / f"{name}.md").read_text()
  assert text in capsys.readouterr().out
  assert "nan" not in text


def test_a_study_tells_what_its_records_were_measured_on(tmp_path, capsys):
  def record(commit, date):
    names = ("device", "cores", "jax", "flax", "optax", "alrao_jax")
    environment = {**dict.fromkeys(names, "1.0"), "commit": commit}
    return {"environment": environment, "date": date}

  class Two(Study):
    images, seeds, out = TINY, 2, tmp_path

    def measure(self):
      self.used.append(record("b" * 40 + "+", "2026-02-03"))
      self.used.append(record("a" * 40, "2026-01-02"))
      self.used.append(record("a" * 40, "2026-01-02"))
      return []

  study = Two()
  for _ in range(2):  # the second call forgets the first one's records
    study()
  last = (tmp_path / "two.md").read_text().splitlines()[-1]
  commits = f"commit {'a' * 12} and {'b' * 12}+"
  assert last.endswith(f"alrao_jax 1.0, {commits}; 2026-01-02 and 2026-02-03.")


def test_records_that_are_found_again_tell_their_day(tmp_path):
  used = []
  trainer = Trainer("test", TINY, tmp_path, quiet(), used=used)
  arm = Arm("sgd", optimizers.SGD, "sgd", 0.1)
  summary = {"kind": "summary", "date": "2026-01-02", "environment": {}}
  records.write(trainer.plan(arm, 0).path, [summary])
  trainer.run([arm], [0])
  assert used == [summary]


def test_test_images_have_no_part(tmp_path):
  images = Trainer("test", TINY, tmp_path, quiet())._data
  held_out = data.load("digits").train_labels[-32:]
  for part in ("validation", "test"):
    labels = np.asarray(images.labels)[images.parts[part]]
    np.testing.assert_array_equal(labels, held_out)


def test_programs_are_shared_by_equal_arms_only(tmp_path):
  trainer = Trainer("test", TINY, tmp_path, quiet())
  arm = Arm("sgd", optimizers.SGD, "same", 0.1, network="mlp", width=1 / 32)
  first = trainer.program(arm)
  assert trainer.program(arm._replace(name="other", rate=0.2)) is first
  watched = trainer.program(arm._replace(program=Watched))
  assert isinstance(watched, Watched)
  body = trainer.program(arm._replace(body=DIGITS[0]))
  assert body.num_parameters != first.num_parameters


def test_counts_are_in_the_right_number():
  assert (
    dataclasses.replace(TINY, epochs=1).describe().endswith("1 epoch, batches of 32")
  )
  assert TINY.describe().endswith("2 epochs, batches of 32")


def test_one_seed_is_refused(tmp_path):
  with pytest.raises(OptionError, match="--seeds must be at least 2"):
    Width(TINY, 1, out=tmp_path)()
