"""The control experiments: their optimizers, programs, numbers, and tiny runs."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from benchmark_cases import quiet, without_times

import alrao_jax
from benchmarks import data, engine
from benchmarks.optimizers import OPTIMIZERS, Setting
from benchmarks.planning import OptionError
from benchmarks.studies import guard, optimizers, ranking
from benchmarks.studies.ablation import Ablation
from benchmarks.studies.arms import Images, Trainer
from benchmarks.studies.collapse import Collapse
from benchmarks.studies.granularity import Granularity
from benchmarks.studies.programs import Collapsed, Draws
from benchmarks.studies.runner import Arm
from benchmarks.studies.seeds import Seeds
from benchmarks.studies.texts import Texts

KEY = jax.random.key(3)
SLOW = 1e-2  # a rate that lets no rounding grow
TINY = Images("digits", num_train=96, num_held_out=32, epochs=2)
PARAMS = {
  "body": {"Dense_0": {"kernel": jnp.ones((5, 6)), "bias": jnp.ones(6)}},
  "output": {"alrao_heads": {"kernel": jnp.ones((4, 6, 3))}},
}
LOG_LIKELIHOODS = {"head_log_likelihoods": jnp.zeros(4)}


def setting(rate=None):
  return Setting(KEY, rate, num_steps=10, has_batch_norm=True)


def gradients(step):
  keys = jax.random.split(jax.random.key(step), len(jax.tree.leaves(PARAMS)))
  leaves, treedef = jax.tree.flatten(PARAMS)
  drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(treedef, drawn)


def assert_close(actual, expected):
  # A few roundings of float32, of numbers of about 1.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
    actual,
    expected,
  )


# --- Records


def test_committed_records_are_still_found(tmp_path, monkeypatch):
  splits = data.load("digits").split(96, 32)
  found = dataclasses.replace(data.load("digits"))
  object.__setattr__(found, "split", lambda *_: splits)
  monkeypatch.setattr(data, "load", lambda *_: found)
  trainer = Trainer("posterior", Images(epochs=10), tmp_path, quiet())
  arm = Arm("alrao", optimizers.ALRAO, "alrao")
  names = {f"{trainer.plan(arm, seed).name}.jsonl" for seed in range(10)}
  folder = Path(__file__).parents[1] / "benchmarks/studies/results/posterior"
  assert names == {path.name for path in folder.glob("*.jsonl")}


# --- Optimizers


def test_unit_momentum_is_a_running_mean_with_each_units_own_share():
  momentum = optimizers.unit_momentum(KEY, 1e-2, 1.0)
  state = momentum.init(PARAMS)
  shares = alrao_jax.unit_rates(state.shares, PARAMS)
  kernel, bias = (shares["body"]["Dense_0"][name] for name in ("kernel", "bias"))
  np.testing.assert_array_equal(kernel, np.broadcast_to(bias, (5, 6)))
  assert len(np.unique(bias)) == 6 and 0.01 <= bias.min() < bias.max() < 1
  mean = jax.tree.map(jnp.zeros_like, PARAMS)
  for step in range(3):
    grads = gradients(step)
    mean = jax.tree.map(lambda m, s, g: (1 - s) * m + s * g, mean, shares, grads)
    updates, state = momentum.update(grads, state, PARAMS)
    assert_close(updates, mean)


def test_heads_and_units_of_share_one_have_no_momentum():
  momentum = optimizers.unit_momentum(KEY, 1.0, 1.0)
  state = momentum.init(PARAMS)
  for step in range(2):
    updates, state = momentum.update(gradients(step), state, PARAMS)
    assert_close(updates, gradients(step))
  heads = optimizers.unit_momentum(KEY, 1e-3, 1e-3)
  updates, _ = heads.update(gradients(0), heads.init(PARAMS), PARAMS)
  assert_close(updates["output"], gradients(0)["output"])
  assert_close(updates["body"], jax.tree.map(lambda g: 1e-3 * g, gradients(0)["body"]))


def test_momentum_and_rates_are_drawn_apart():
  made = optimizers.with_unit_momentum(1e-5, 10.0).make(setting())
  states = [
    state
    for state in jax.tree.leaves(
      made.init(PARAMS),
      is_leaf=lambda node: isinstance(node, alrao_jax.ScaleByUnitRatesState),
    )
    if isinstance(state, alrao_jax.ScaleByUnitRatesState)
  ]
  one, other = (np.asarray(state.quantiles) for state in states)
  assert np.abs(one - other).min() > 0


def test_mean_rate_is_that_of_the_interval():
  quantiles = jnp.asarray((np.arange(100_000) + 0.5) / 100_000, jnp.float32)
  mean = alrao_jax.log_uniform().quantile(quantiles).mean()
  # Float32's exponentials of up to 14, and its sum in pairs: about 1e-5.
  np.testing.assert_allclose(optimizers.MEAN_RATE, mean, rtol=1e-4)


def test_units_at_the_mean_rate_leave_the_heads_their_ladder():
  optimizer = optimizers.UNITS_AT_MEAN_RATE.make(setting())
  rates = alrao_jax.unit_rates(optimizer.init(PARAMS), PARAMS)
  np.testing.assert_allclose(
    rates["body"]["Dense_0"]["bias"], optimizers.MEAN_RATE, 1e-6
  )
  ladder = rates["output"]["alrao_heads"]["kernel"][:, 0, 0]
  np.testing.assert_allclose(ladder, [1e-5, 1e-3, 1e-1, 10.0], rtol=1e-5)


def test_redrawn_rates_differ_from_step_to_step():
  optimizer = optimizers.REDRAWN.make(setting())
  update = optax.with_extra_args_support(optimizer).update
  state, updates = optimizer.init(PARAMS), []
  for _ in range(2):
    found, state = update(gradients(0), state, PARAMS, **LOG_LIKELIHOODS)
    updates.append(found)
  assert (
    updates[0]["body"]["Dense_0"]["bias"] != updates[1]["body"]["Dense_0"]["bias"]
  ).all()
  assert_close(updates[0]["output"], updates[1]["output"])


def test_equal_heads_all_learn_as_adam_does():
  optimizer = optimizers.ADAM_EQUAL_HEADS.make(setting())
  update = optax.with_extra_args_support(optimizer).update
  with jax.numpy_dtype_promotion("standard"):  # Adam's own arithmetic needs it
    actual, _ = update(gradients(0), optimizer.init(PARAMS), PARAMS, **LOG_LIKELIHOODS)
    adam = optax.adam(1e-3)
    expected, _ = adam.update(gradients(0), adam.init(PARAMS), PARAMS)
  assert_close(actual, expected)


@pytest.mark.parametrize("granularity", ["per_unit", "per_weight"])
def test_upper_bound_is_read_from_the_state(granularity):
  optimizer = optimizers.upper(1e-3, granularity)
  state = optimizer.make(setting(10.0)).init(PARAMS)
  update = optax.with_extra_args_support(optimizer.make(setting(0.1))).update
  ones = jax.tree.map(jnp.ones_like, PARAMS)
  updates, _ = update(ones, state, PARAMS, **LOG_LIKELIHOODS)
  ladder = -updates["output"]["alrao_heads"]["kernel"][:, 0, 0]
  np.testing.assert_allclose(ladder[jnp.array([0, -1])], [1e-3, 10.0], rtol=1e-5)
  kernel = updates["body"]["Dense_0"]["kernel"]
  rates_of_a_unit = 1 if granularity == "per_unit" else 5
  assert all(len(np.unique(column)) == rates_of_a_unit for column in kernel.T)


def test_guard_of_the_study_stops_what_is_too_fast():
  optimizer = optimizers.guarded(alrao_jax.guard()).make(setting((10.0, 100.0)))
  update = optax.with_extra_args_support(optimizer).update
  ones = jax.tree.map(jnp.ones_like, PARAMS)
  updates, state = update(ones, optimizer.init(PARAMS), PARAMS, **LOG_LIKELIHOODS)
  assert not updates["body"]["Dense_0"]["kernel"].any()
  assert alrao_jax.scalars(state)["alrao/guard_trips"] == 6


# --- Programs


@pytest.mark.slow
def test_collapsed_goes_on_from_the_first_epoch(tmp_path):
  trainer = Trainer("test", TINY, tmp_path, quiet())
  arm = Arm("alrao", optimizers.ALRAO, "alrao", network="mlp", width=1 / 32)
  plain = trainer.program(arm)
  fewer = arm._replace(compiled="keep", program=functools.partial(Collapsed, keep=1))
  collapsed = trainer.program(fewer)
  after, _ = plain.step(plain.init(1, None), plain.data, plain.batches(1, 1))
  start = collapsed.init(1, None)
  jax.tree.map(
    np.testing.assert_array_equal, start.params["body"], after.params["body"]
  )
  (best,) = alrao_jax.best_heads(after.opt_state)
  for name, leaf in start.params["output"]["alrao_heads"].items():
    kept = after.params["output"]["alrao_heads"][name][best]
    np.testing.assert_array_equal(leaf[0], kept)
    assert leaf.shape[0] == 1
  np.testing.assert_array_equal(
    collapsed.batches(1, 1)["indices"], plain.batches(1, 2)["indices"]
  )


@pytest.mark.slow
def test_a_killed_collapsed_run_goes_on(tmp_path, monkeypatch):
  program = functools.partial(Collapsed, keep=2)
  size = {"network": "mlp", "width": 1 / 32, "program": program}
  arm = Arm("keep", optimizers.ALRAO, "keep", **size)
  (whole,) = Trainer("test", TINY, tmp_path / "whole", quiet()).run([arm], [1])
  display = quiet()

  def kill(_):
    raise KeyboardInterrupt

  monkeypatch.setattr(display, "end_epoch", kill)
  with pytest.raises(KeyboardInterrupt):
    Trainer("test", TINY, tmp_path / "killed", display).run([arm], [1])
  (found,) = Trainer("test", TINY, tmp_path / "killed", quiet()).run([arm], [1])
  assert len(found.epochs) == 2
  assert without_times(found.epochs) == without_times(whole.epochs)


@pytest.mark.slow
def test_draws_train_as_they_would_alone(tmp_path):
  trainer = Trainer("test", TINY, tmp_path, quiet())
  slow = optimizers.ALRAO._replace(
    make=lambda setting: alrao_jax.alrao(setting.key, None, 1e-4, SLOW)
  )
  arm = Arm("alrao", slow, "alrao", network="mlp", width=1 / 32)
  plain = trainer.program(arm)
  draws = trainer.program(arm._replace(compiled="draws", program=Draws))
  seeds, change = (5, 6, 7), []
  snapshots, failed = draws.train(seeds, 2, lambda *_: None)
  assert failed == [False] * 3
  for seed, actual in zip(seeds, snapshots, strict=True):
    state = plain.init(seed, None)
    start = jax.device_get(state.params)
    for epoch in (1, 2):
      state, _ = plain.step(state, plain.data, plain.batches(seed, epoch))
    # Other sums round otherwise: gradients of about 1 by a few hundred roundings of
    # 6e-8 in each of six steps, whose rates are at most SLOW, and parameters of about 1
    # by one rounding a step.
    atol = 6 * (SLOW * 300 + 1) * 6e-8
    for got, want, before in zip(
      jax.tree.leaves(actual.params),
      jax.tree.leaves(state.params),
      jax.tree.leaves(start),
      strict=True,
    ):
      np.testing.assert_allclose(got, want, rtol=0, atol=atol)
      change.append(np.abs(want - before).max())
    assert max(change) > 100 * atol


@pytest.mark.parametrize(
  ("survives", "loss", "expected"),
  [
    (False, np.nan, np.nan),
    (False, 1.0, 0.5),
    (True, np.nan, 0.5),
  ],
)
def test_draws_that_failed_have_no_accuracy(survives, loss, expected, monkeypatch):
  draws = object.__new__(Draws)
  draws.survives_divergence = survives
  draws.data = ()
  losses = np.array([[1.0, 1.0], [1.0, loss]], np.float32)
  monkeypatch.setattr(
    draws, "_side_by_side", lambda state, *_: (state, {"loss": losses}), raising=False
  )
  scripted = {
    "init": lambda seed, _: np.float32(seed),
    "batches": lambda seed, _: np.zeros(2),
    "snapshot": lambda state, *_: state,
    "evaluate": lambda *_: {"loss": 1.0, "accuracy": 0.5},
  }
  for name, call in scripted.items():
    monkeypatch.setattr(draws, name, call)
  found = draws.accuracies((0, 1), 1, lambda *_: None)
  np.testing.assert_array_equal(found, [0.5, expected])


def test_failed_draws_are_at_chance(tmp_path, monkeypatch):
  study = Seeds(TINY, mlp_draws=2, block=2, out=tmp_path)
  trainer = Trainer("seeds", TINY, tmp_path, quiet(), 1)
  monkeypatch.setattr(Draws, "accuracies", lambda *_: [0.5, float("nan")])
  arm = Arm("a", OPTIMIZERS["adam"], "a", network="mlp", width=1 / 32, program=Draws)
  for _ in range(2):  # trained, and read
    assert study._train_block(trainer, arm, 0, quiet()) == [0.5, 0.1]


def test_halves_of_the_held_out_images_choose_and_score(tmp_path):
  trainer = Trainer("test", TINY, tmp_path, quiet(), halve=True)
  parts, labels = trainer._data.parts, np.asarray(trainer._data.labels)
  assert [len(parts[name]) for name in ("train", "validation", "test")] == [96, 16, 16]
  held_out = data.load("digits").train_labels[-32:]
  np.testing.assert_array_equal(labels[parts["validation"]], held_out[0::2])
  np.testing.assert_array_equal(labels[parts["test"]], held_out[1::2])


# --- Whole studies


def tiny_text(folder):
  file = folder / "text.txt"
  words = np.random.default_rng(0).choice(["on", "no", "noon"], 800)
  file.write_text(" ".join(words))
  return Texts(0.5, num_held_out=100, batch_size=4, length=10, files=(file,))


ONE_EPOCH = dataclasses.replace(TINY, epochs=1)
STUDIES = {
  "granularity": lambda at: Granularity(tiny_text(at), 2, 0.1, (0.1, 1.0), 2),
  "ablation": lambda at: Ablation(TINY, 2, "mlp"),
  "collapse": lambda at: Collapse(TINY, 2, "mlp"),
  "guard": lambda at: guard.Guard(ONE_EPOCH, 2, 2, (1e3,), width=1 / 8, rounds=6),
  "ranking": lambda at: ranking.Ranking(
    ONE_EPOCH, num_digits=4, num_cifar10=0, seeds=2
  ),
  "seeds": lambda at: Seeds(ONE_EPOCH, 2, 4, 2, 2, 1 / 32, 1 / 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_writes_numbers_and_picture_and_repeats_no_run(
  name, tmp_path, capsys, monkeypatch
):
  study = dataclasses.replace(STUDIES[name](tmp_path), out=tmp_path)
  with jax.numpy_dtype_promotion("standard"):  # Adam's own arithmetic needs it
    study()
  picture, numbers = tmp_path / f"{name}.png", tmp_path / f"{name}.md"
  assert picture.stat().st_size > 10_000
  text = numbers.read_text()
  assert text in capsys.readouterr().out
  assert "nan" not in text
  picture.unlink()
  for owner, work in ((engine, "train"), (Draws, "accuracies"), (guard, "time_steps")):
    monkeypatch.setattr(owner, work, None)
  study()
  assert picture.exists() and numbers.read_text() == text


@pytest.mark.parametrize(
  ("study", "option"),
  [
    (Ablation(ONE_EPOCH), "--epochs must be at least 2"),
    (Collapse(ONE_EPOCH), "--epochs must be at least 2"),
    (Granularity(max_learning_rates=(1e-4,)), "--max-learning-rates must be at least"),
    (Granularity(num_heads=0), "--num-heads must be at least 1"),
    (Granularity(Texts(share=0.0)), r"--share must be in \(0, 1\], got 0"),
    (guard.Guard(runs=0), "--runs must be at least 1, got 0"),
    (guard.Guard(rounds=5), "--rounds must be at least 6, got 5"),
    (guard.Guard(limit=-1.0), r"--limit, --slowdown: guard\(limit=...\) must be"),
    (guard.Guard(intervals=(0.0,)), r"--intervals must be .* 1e-05, got \(0.0,\)"),
    (ranking.Ranking(num_digits=3), "--num-digits must be 0, or from 4 to 24, got 3"),
    (ranking.Ranking(num_cifar10=9), "--num-cifar10 must be 0, or from 4 to 8, got 9"),
    (
      ranking.Ranking(num_digits=0, num_cifar10=0),
      "--num-digits or --num-cifar10 must .* got 0 for both",
    ),
    (Seeds(mlp_draws=75), r"--block must divide --mlp-draws \(75\), got 50"),
    (Seeds(cnn_draws=0), "--cnn-draws must be at least 1, got 0"),
  ],
)
def test_bad_options_say_what_to_write(study, option, tmp_path):
  with pytest.raises(OptionError, match=option):
    dataclasses.replace(study, out=tmp_path)()
