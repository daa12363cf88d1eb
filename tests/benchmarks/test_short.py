"""Short tasks: their networks and data, their training, and the sweep of the arena."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import make_plan, quiet, without_times

import alrao_jax
from benchmarks import records, training
from benchmarks.console import OptionError
from benchmarks.methods import METHODS
from benchmarks.models.short_networks import Perceptron, Predictor, ResNet
from benchmarks.suites import arena
from benchmarks.suites.arena import ArenaSuite, ArenaSweep, ShortOptions, measure_costs
from benchmarks.workloads import short
from benchmarks.workloads.short import (
  ARENA_TASKS,
  LENGTH,
  NUM_POINTS,
  SHORT_TASKS,
  VOCABULARY,
  Examples,
  ShortData,
  ShortTask,
  ShortWorkload,
)


@pytest.fixture(autouse=True)
def _standard_promotion():
  # Other libraries' optimizers are not written for strict promotion.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


INPUTS = {
  "vgg": jnp.zeros((2, 32, 32, 3)),
  "resnet": jnp.zeros((2, 32, 32, 3)),
  "mixer": jnp.zeros((2, 32, 32, 3)),
  "vit": jnp.zeros((2, 32, 32, 3)),
  "gru": jnp.zeros((2, LENGTH), jnp.int32),
  "words": jnp.zeros((2, 4), jnp.int32),
  "diabetes": jnp.zeros((2, 10)),
  "digits": jnp.zeros((2, 64)),
}


@pytest.mark.parametrize("name", ARENA_TASKS)
def test_the_units_of_every_network_are_known_without_a_guess(name):
  model = ARENA_TASKS[name].model(7, 3)
  init = functools.partial(model.init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), INPUTS[name])
  specs = alrao_jax.unit_specs(shapes["params"], alrao_jax.UnitOptions(strict=True))
  assert len(specs) == len(jax.tree.leaves(shapes["params"]))
  apply = functools.partial(model.apply, train=False)
  heads = jax.eval_shape(apply, shapes, INPUTS[name])
  batch = INPUTS[name].shape[:2] if name == "gru" else (2,)
  assert heads.shared.shape == (3, *batch, 7)


def perceptron(num_outputs, num_heads):
  return Predictor(Perceptron((8,)), num_outputs, num_heads)


DIGITS = ShortTask("toy", "toy", short.digits, perceptron, num_steps=16, batch_size=16)
DIABETES = DIGITS._replace(load=short.diabetes)


@functools.cache
def workload_of(task, method):
  return ShortWorkload(task, task.load(None), METHODS[method])


def train(out, task, method, seed=0, rate=None):
  """Trains once; returns the workload and the records."""
  workload = workload_of(task, method)
  plan = make_plan(out, seed=seed, rate=rate, max_epochs=NUM_POINTS, patience=99)
  training.train(workload, plan, quiet())
  return workload, records.read(plan.path)


@pytest.mark.slow
def test_a_run_repeats_itself_and_records_its_curve(tmp_path):
  first, second = (
    train(tmp_path / name, DIABETES, "schedule_free_alrao", seed=3)[1]
    for name in ("a", "b")
  )
  assert without_times(first) == without_times(second)
  *epochs, summary = first
  assert len(epochs) == NUM_POINTS
  for epoch in epochs:
    assert epoch["steps"] == [0, 1]
    assert all(math.isfinite(epoch[f"{x}_loss"]) for x in ("train", "validation"))
    assert math.isclose(sum(epoch["head_weights"][-1]), 1, rel_tol=1e-4)
  best = epochs[summary["best_epoch"] - 1]
  assert summary["test_loss"] == best["test_loss"]  # measured at every point


@pytest.mark.slow
def test_a_run_whose_heads_leave_resumes_on_either_side(tmp_path, monkeypatch):
  # A head leaves when it has lost a little of the third that each has at first.
  method = METHODS["alrao_hopeful"]._replace(
    num_heads=3, keep=alrao_jax.hopeful(0.332, sizes=(2,))
  )
  workload = ShortWorkload(DIGITS, DIGITS.load(None), method)

  def run(name):
    plan = make_plan(tmp_path / name, max_epochs=NUM_POINTS, patience=99)
    training.train(workload, plan, quiet())
    return records.read(plan.path)

  *epochs, summary = whole = run("whole")
  left = [len(np.flatnonzero(epoch["head_weights"][-1])) for epoch in epochs]
  last = left.index(2)  # the first epoch without one, since the end of that before
  assert 0 < last < NUM_POINTS - 1 and set(left[last:]) == {2}
  write, calls = records.write, []

  def killed(*args):
    write(*args)
    calls.append(args)
    if len(calls) in (last, last + 2):  # after a checkpoint without, and later
      raise KeyboardInterrupt

  monkeypatch.setattr(records, "write", killed)
  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      run("killed")
  assert without_times(run("killed")) == without_times(whole)


def test_points_of_a_curve_need_not_be_equally_far_apart(tmp_path):
  workload, (*epochs, _) = train(tmp_path, DIGITS._replace(num_steps=19), "adam")
  assert [len(workload.batches(0, i)) for i in range(1, 9)] == [2, 2, 3, 2, 2, 3, 2, 3]
  assert [epoch["steps"][-1] + 1 for epoch in epochs] == [2, 2, 3, 2, 2, 3, 2, 3]


def test_all_examples_are_seen_before_one_is_seen_again():
  data = DIGITS.load(None)
  size = len(data.train.targets)
  task = DIGITS._replace(num_steps=2 * size // 16 + 4)
  workload = ShortWorkload(task, data, METHODS["adam"])
  batches = [workload.batches(1, i) for i in range(1, NUM_POINTS + 1)]
  order = np.concatenate(batches).ravel()
  assert len(order) == task.num_steps * 16
  for start in (0, size):
    assert sorted(order[start : start + size]) == list(range(size))
  assert not np.array_equal(order[:size], order[size : 2 * size])
  assert not np.array_equal(batches[0], workload.batches(2, 1))


def test_a_diverged_run_ends_and_records_no_number(tmp_path):
  *epochs, summary = train(tmp_path, DIABETES, "sgd_rates", rate=1e30)[1]
  assert summary["ending"] == "failed"
  assert epochs[-1]["test_loss"] is None


def test_predicting_the_mean_has_the_loss_of_chance():
  data = DIABETES.load(None)
  targets = np.concatenate([part.targets for part in data[:3]])
  np.testing.assert_allclose(np.square(targets).mean(), 1.0, rtol=1e-5)


def noise_images():
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
  part = Examples(images, generator.integers(0, 3, 24).astype(np.int32))
  return ShortData(part, part, part, 3)


def test_averaged_weights_are_evaluated_with_their_own_statistics():
  def model(num_outputs, num_heads):
    return Predictor(ResNet((2,)), num_outputs, num_heads)

  data = noise_images()
  task = ShortTask(
    "toy",
    "toy",
    lambda _: data,
    model,
    num_steps=8,
    batch_size=24,
    has_convolutions=True,
  )
  workload = ShortWorkload(task, data, METHODS["schedule_free_adamw"])
  state: Any = workload.init(0, None)
  for epoch in range(1, NUM_POINTS + 1):
    state, _ = workload.step(state, workload.data, workload.batches(0, epoch))
  snapshot = workload.snapshot(state, 0, NUM_POINTS)
  # The whole data is one batch: statistics of training are those to evaluate with.
  inputs = (data.train.inputs.astype(np.float32) / 255 - 0.5) / 0.25
  variables = {"params": snapshot.params, "batch_stats": snapshot.batch_stats}
  network = task.model(3, None)
  trained, _ = network.apply(variables, inputs, train=True, mutable=["batch_stats"])
  evaluated = network.apply(variables, inputs, train=False)
  np.testing.assert_allclose(trained, evaluated, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_sweep_trains_what_is_missing_and_times_it_next_to_sgd(tmp_path, monkeypatch):
  monkeypatch.setitem(SHORT_TASKS, "toy", DIGITS)
  monkeypatch.setattr(arena, "ROUNDS", 2)
  sweep = functools.partial(ArenaSweep, tasks=("toy",), seeds=1, out=tmp_path)
  sweep(methods=("adam",))()
  (cost,) = records.load_costs([tmp_path])
  assert (cost["task"], cost["optimizer"]) == ("toy", "adam")
  before = {path: path.read_bytes() for path in tmp_path.glob("toy-*.jsonl")}
  assert len(before) == 1
  sweep(methods=("adam", "adamw", "sgd_rates"))()
  assert all(path.read_bytes() == content for path, content in before.items())
  found = {run.summary["name"]: run for run in records.load([tmp_path])}
  assert len(found) == 1 + 1 + 7
  assert {run.config["suite"] for run in found.values()} == {"arena"}
  costs = {cost["optimizer"]: cost["ratio"] for cost in records.load_costs([tmp_path])}
  assert sorted(costs) == ["adam", "adamw", "sgd_rates"]
  assert costs["sgd_rates"] == 1.0
  # What has been timed is not timed again.
  monkeypatch.setattr(arena, "_timer", None)
  measure_costs("toy", DIGITS.load(None), ("adam", "adamw"), tmp_path, quiet())


def test_a_run_is_named_after_all_that_determines_it(tmp_path, monkeypatch):
  suite = ArenaSuite()
  plan = suite.plan(ShortOptions(optimizer="sgd_rates", rate=0.1), tmp_path)
  assert plan.config["chance"] == math.log(10)
  assert (plan.max_epochs, plan.config["num_steps"]) == (NUM_POINTS, 400)
  task = SHORT_TASKS["digits"]._replace(num_steps=200)
  monkeypatch.setitem(SHORT_TASKS, "digits", task)
  other = suite.plan(ShortOptions(optimizer="sgd_rates", rate=0.1), tmp_path)
  assert other.name != plan.name


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"tasks": ("chess",)}, "--tasks must be some of vgg"),
    ({"methods": ("magic",)}, "--methods must be some of alrao"),
    ({"seeds": 0}, "--seeds must be at least 1"),
  ],
)
def test_unknown_options_are_refused(options, text, tmp_path):
  with pytest.raises(OptionError, match=text):
    ArenaSweep(out=tmp_path, **options)()


@pytest.mark.data
def test_images_and_texts_are_cut_as_the_tasks_expect(
  cifar10_dir, ptb_dir, imagenette_dir
):
  cifar = short.cifar10(cifar10_dir.parent)
  assert [len(part.targets) for part in cifar[:3]] == [10_000, 2_000, 2_000]
  nette = short.imagenette(imagenette_dir.parent)
  assert nette.train.inputs.shape == (8_469, 32, 32, 3)
  assert set(nette.test.targets) == set(range(10))
  text = short.characters(LENGTH, ptb_dir.parent)
  np.testing.assert_array_equal(
    text.train.inputs[:, 1:].ravel(), text.train.targets[:, :-1].ravel()
  )
  words = short.words(4, VOCABULARY, ptb_dir.parent)
  assert words.train.targets.max() < VOCABULARY == words.train.inputs.max()
  np.testing.assert_array_equal(words.train.inputs.shape[1:], (4,))
