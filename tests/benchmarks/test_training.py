"""The benchmarks' training loop: stopping, keeping the best, recording, resuming."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import ScriptedWorkload, make_plan, quiet, without_times

from benchmarks import records, training
from benchmarks.suites.cifar10 import Cifar10, ImageOptions
from benchmarks.training import Checkpoints, Loop

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _standard_promotion():
  # Other libraries' optimizers are not written for strict promotion.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def test_scan_and_loop_agree():
  def step(carry, data, batch):
    return carry * data + batch["x"], {"carry": carry, "x": batch["x"]}

  batches = {"x": np.arange(5, dtype=np.float32)}
  results = [
    Loop(step, scan=scan)(jnp.ones([]), jnp.float32(2), batches)
    for scan in (False, True)
  ]
  for looped, scanned in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_array_equal(looped, scanned)


def test_loop_compiles_once_and_donates_its_carry():
  loop = Loop(lambda carry, data, batch: (carry + batch, {}))
  first = jnp.zeros([])
  carry, _ = loop(first, (), np.ones(3, np.float32))
  loop(carry, (), np.ones(2, np.float32))
  assert loop.num_traces == 1
  assert first.is_deleted()


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_heads_leave_between_steps_and_at_the_end(backend, monkeypatch):
  class Halved:
    """A carry loses half of its entries whenever it may."""

    may_leave = True

    def left(self, carry):
      return list(range(len(carry)))

    def dismiss(self, carry):
      return carry[: max(len(carry) // 2, 1)]

  def step(carry, data, batch):
    return carry + batch, {"size": jnp.full([], len(carry))}

  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(training, "DISMISSAL_STEPS", 2)
  loop = Loop(step, scan=True, heads=Halved())
  carry, outputs = loop(jnp.zeros(8), (), np.ones(5, np.float32))
  assert outputs["size"].tolist() == [8, 8, 4, 4, 2]
  carry, outputs = loop(carry, (), np.ones(3, np.float32))
  assert outputs["size"].tolist() == [1, 1, 1]
  np.testing.assert_array_equal(carry, [8.0])
  assert loop.num_traces == 4


def test_early_stopping_tests_the_best_epoch_with_its_posterior(tmp_path):
  workload = ScriptedWorkload([3.0, 1.0, 2.0, 1.0, 4.0, 0.0])
  summary = training.train(workload, make_plan(tmp_path, patience=3), quiet())
  # Epoch 4 equals epoch 2 and is not better, so epoch 5 is the third without progress.
  assert summary["ending"] == "early"
  assert summary["epochs"] == 5
  assert summary["best_epoch"] == 2
  assert workload.tested == [{"steps": 8.0, "posterior": pytest.approx(1 / 9)}]
  assert summary["test_accuracy"] == 0.2


def test_run_says_that_it_hit_the_maximum(tmp_path):
  workload = ScriptedWorkload([3.0, 2.0, 1.0])
  summary = training.train(workload, make_plan(tmp_path, max_epochs=3), quiet())
  assert (summary["ending"], summary["epochs"]) == ("maximum", 3)


def test_baseline_fails_at_a_loss_that_is_not_finite(tmp_path):
  workload = ScriptedWorkload([3.0, 2.0, 1.0], train_losses={2: math.nan})
  plan = make_plan(tmp_path)
  summary = training.train(workload, plan, quiet())
  assert (summary["ending"], summary["epochs"]) == ("failed", 2)
  first, second, last = records.read(plan.path)
  assert (first["nonfinite_steps"], second["nonfinite_steps"]) == (0, 4)
  assert second["train_loss"] is None
  assert last == summary


def test_run_without_a_finite_validation_loss_has_no_test_figures(tmp_path):
  workload = ScriptedWorkload([math.inf])
  summary = training.train(workload, make_plan(tmp_path), quiet())
  assert summary["ending"] == "failed"
  assert summary["best_epoch"] is None
  assert summary["test_accuracy"] is None
  assert workload.tested == []


def test_alrao_goes_on_after_a_loss_that_is_not_finite(tmp_path):
  losses = [3.0, math.inf, 1.0]
  workload = ScriptedWorkload(
    losses, survives_divergence=True, train_losses={2: math.inf}
  )
  summary = training.train(workload, make_plan(tmp_path, max_epochs=3), quiet())
  assert (summary["ending"], summary["best_epoch"]) == ("maximum", 3)


def test_run_that_has_ended_is_not_repeated(tmp_path):
  plan = make_plan(tmp_path, max_epochs=2)
  summary = training.train(ScriptedWorkload([2.0, 1.0]), plan, quiet())
  again = ScriptedWorkload([2.0, 1.0])
  assert training.train(again, plan, quiet()) == summary
  assert again.epochs_trained == []
  training.train(again, plan, quiet(), resume=False)
  assert again.epochs_trained == [1, 2]


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_interrupted_run_continues_after_the_last_whole_epoch(tmp_path, epoch):
  losses = [3.0, 1.0, 2.0, 1.5]
  whole = make_plan(tmp_path / "whole", max_epochs=4, patience=9)
  training.train(ScriptedWorkload(losses), whole, quiet())

  plan = make_plan(tmp_path / "interrupted", max_epochs=4, patience=9)
  interrupted = ScriptedWorkload(losses)
  evaluate, calls = interrupted.evaluate, []

  def interrupt(snapshot, part):
    calls.append(part)
    if len(calls) == epoch:
      raise KeyboardInterrupt
    return evaluate(snapshot, part)

  interrupted.evaluate = interrupt
  with pytest.raises(KeyboardInterrupt):
    training.train(interrupted, plan, quiet())
  resumed = ScriptedWorkload(losses)
  training.train(resumed, plan, quiet())
  assert resumed.epochs_trained == list(range(epoch, 5))
  both = [without_times(records.read(p.path)) for p in (whole, plan)]
  assert both[0] == both[1]
  assert [path.name for path in plan.out.iterdir()] == [plan.path.name]


def test_checkpoint_keeps_every_kind_of_leaf(tmp_path):
  tree = {
    "empty": np.zeros(0, np.float32),
    "flag": jnp.array(True),
    "half": jnp.ones(2, jnp.bfloat16),
    "nested": (jnp.arange(3), [np.full((2, 2), np.nan, np.float32)]),
  }
  with Checkpoints(tmp_path / "checkpoint") as checkpoints:
    assert checkpoints.restore(lambda notes: tree) is None
    checkpoints.save(1, jax.tree.map(jnp.zeros_like, tree), {"epoch": 1})
    checkpoints.save(2, tree, {"epoch": 2, "loss": math.inf})
  with Checkpoints(tmp_path / "checkpoint") as checkpoints:
    found = checkpoints.restore(lambda notes: jax.tree.map(jnp.ones_like, tree))
  assert found is not None
  restored, notes = found
  assert notes == {"epoch": 2, "loss": math.inf}
  assert jax.tree.structure(restored) == jax.tree.structure(tree)
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def tiny(**changes) -> ImageOptions:
  options = {
    "dataset": "digits",
    "network": "small_cnn",
    "width": 1 / 4,
    "batch_size": 16,
    "max_epochs": 1,
    "num_train": 48,
    "num_validation": 20,
    "num_test": 20,
  }
  return ImageOptions(**{**options, **changes})


@pytest.mark.slow
def test_one_compilation_serves_all_rates_and_seeds(tmp_path):
  suite, workloads = Cifar10(), set()
  for rate, seed in ((0.1, 0), (0.01, 0), (0.1, 1)):
    options = tiny(optimizer="sgd", rate=rate, seed=seed)
    workload = suite.workload(options)
    training.train(workload, suite.plan(options, tmp_path), quiet())
    workloads.add(workload)
  (workload,) = workloads
  assert workload.step.num_traces == 1
  assert len(list(tmp_path.glob("*.jsonl"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alrao_trains_images_with_one_compilation(tmp_path, norm, dtype):
  suite, workloads = Cifar10(), set()
  for seed in (0, 1):
    options = tiny(seed=seed, norm=norm, dtype=dtype, max_epochs=2)
    workloads.add(suite.workload(options))
    plan = suite.plan(options, tmp_path)
    summary = training.train(suite.workload(options), plan, quiet())
    assert math.isfinite(summary["test_loss"])
    heads = np.array(records.read(plan.path)[0]["head_weights"])
    assert heads.shape == (3, 10)
    np.testing.assert_allclose(heads.sum(axis=1), 1.0, atol=1e-4)  # rounded to 5 digits
  (workload,) = workloads
  assert workload.step.num_traces == 1


@pytest.mark.slow
def test_scan_and_loop_train_the_same_network():
  workload = Cifar10().workload(tiny())
  losses = []
  for loop in (workload.step, Loop(workload.step.step, scan=True)):
    state, batches = workload.init(0, None), workload.batches(0, 1)
    losses.append(loop(state, workload.data, batches)[1]["loss"])
  # The first step is the same sum in another order; later ones amplify that.
  np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-5)
  np.testing.assert_allclose(*losses, rtol=1e-2)


@pytest.mark.slow
def test_averaged_weights_are_evaluated_with_their_own_statistics():
  workload = Cifar10().workload(tiny(optimizer="dog"))
  state = workload.init(0, None)
  state, _ = workload.step(state, workload.data, workload.batches(0, 1))
  snapshot = workload.snapshot(state, 0, 1)
  for got, average in zip(
    jax.tree.leaves(snapshot.params),
    jax.tree.leaves(state.opt_state.average),
    strict=True,
  ):
    np.testing.assert_array_equal(got, average)
  # Three batches through momentum .9, from the statistics that training left behind.
  means = [
    tree["body"]["ConvBlock_0"]["BatchNorm_0"]["mean"]
    for tree in (snapshot.batch_stats, state.batch_stats)
  ]
  assert not np.array_equal(*means)
  assert np.isfinite(workload.evaluate(snapshot, "test")["loss"])


@pytest.mark.slow
def test_resume_after_sigkill_in_mid_epoch_is_bit_exact(tmp_path):
  def run(out, result, kill_at):
    script = Path(__file__).with_name("training_cases.py")
    environment = {
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    }
    command = [sys.executable, str(script), str(out), str(result), str(kill_at)]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode

  whole, resumed = tmp_path / "whole.npz", tmp_path / "resumed.npz"
  # Epochs have 6 steps: killed within the third.
  assert run(tmp_path / "a", whole, 0) == 0
  assert run(tmp_path / "b", resumed, 15) == -signal.SIGKILL
  assert run(tmp_path / "b", resumed, 0) == 0
  with np.load(whole) as a, np.load(resumed) as b:
    assert (int(a["epochs"]), int(b["epochs"])) == (4, 2)
    assert str(a["records"]) == str(b["records"])
    leaves = [name for name in a if name.startswith("leaf")]
    assert len(leaves) > 20
    for name in leaves:
      np.testing.assert_array_equal(a[name], b[name])
