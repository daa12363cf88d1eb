"""The studies' own workloads, and whole studies in miniature."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from training_cases import quiet, without_times

pytest.importorskip("matplotlib", reason="pictures need the extra 'bench'")

import alrao_jax
from benchmarks import records, training
from benchmarks.console import OptionError
from benchmarks.data import Split, Splits
from benchmarks.methods import ALRAO, METHODS
from benchmarks.models import build_model
from benchmarks.studies import guard
from benchmarks.studies._study import Arm, ImageRunner, Images, Trained
from benchmarks.studies.ablation import AblationStudy
from benchmarks.studies.adam import AdamStudy
from benchmarks.studies.averaging import AveragingStudy
from benchmarks.studies.bounds import BoundsStudy
from benchmarks.studies.collapse import CollapsedWorkload, CollapseStudy
from benchmarks.studies.fraction import FractionStudy
from benchmarks.studies.granularity import GranularityStudy, Texts
from benchmarks.studies.guard import GuardStudy
from benchmarks.studies.interval import IntervalStudy
from benchmarks.studies.posterior import PosteriorStudy
from benchmarks.studies.ranking import RankingStudy
from benchmarks.studies.seeds import (
  SeedsStudy,
  SideBySideWorkload,
  block_accuracies,
)
from benchmarks.studies.width import WidthStudy
from benchmarks.workloads.images import ImageData, ImageWorkload

SLOW = 1e-2  # a rate that lets no rounding grow
TINY = Images("digits", num_train=96, num_held_out=32, epochs=2)
ONE_EPOCH = dataclasses.replace(TINY, epochs=1)


def runner_in(folder, display=None):
  return ImageRunner(Trained("test", folder, display or quiet()), TINY)


# --- Workloads


@pytest.mark.slow
def test_collapsed_goes_on_from_the_first_epoch(tmp_path):
  runner = runner_in(tmp_path)
  arm = Arm("alrao", ALRAO, "alrao", network="mlp", width=1 / 32)
  plain = runner.workload(arm)
  workload = functools.partial(CollapsedWorkload, keep=1)
  collapsed = runner.workload(arm._replace(compiled="keep", workload=workload))
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
@pytest.mark.parametrize(
  "workload",
  [
    functools.partial(CollapsedWorkload, keep=2),
    functools.partial(SideBySideWorkload, draws=2),
  ],
  ids=["collapsed", "side by side"],
)
def test_a_killed_run_goes_on(workload, tmp_path, monkeypatch):
  size = {"network": "mlp", "width": 1 / 32, "workload": workload}
  arm = Arm("killed", ALRAO, "killed", **size)
  (whole,) = runner_in(tmp_path / "whole").run([arm], [1])
  display = quiet()

  def kill(_):
    raise KeyboardInterrupt

  monkeypatch.setattr(display, "end_epoch", kill)
  with pytest.raises(KeyboardInterrupt):
    runner_in(tmp_path / "killed", display).run([arm], [1])
  (found,) = runner_in(tmp_path / "killed").run([arm], [1])
  assert len(found.epochs) == 2
  assert without_times(found.epochs) == without_times(whole.epochs)


@pytest.mark.slow
def test_networks_side_by_side_train_as_they_would_alone(tmp_path):
  runner = runner_in(tmp_path)
  slow = ALRAO._replace(
    make=lambda setting: alrao_jax.alrao(setting.key, None, 1e-4, SLOW)
  )
  arm = Arm("alrao", slow, "alrao", network="mlp", width=1 / 32)
  plain = runner.workload(arm)
  workload = functools.partial(SideBySideWorkload, draws=3)
  draws = runner.workload(arm._replace(compiled="draws", workload=workload))
  state = draws.init(2, None)
  for epoch in (1, 2):
    state, outputs = draws.step(state, draws.data, draws.batches(2, epoch))
  assert state.finite.all() and outputs["loss"].shape == (3,)  # three steps
  snapshot, change = draws.snapshot(state, 2, 2), []
  accuracies = draws.evaluate(snapshot, "validation")["accuracies"]
  for i, seed in enumerate((6, 7, 8)):
    alone = plain.init(seed, None)
    start = jax.device_get(alone.params)
    for epoch in (1, 2):
      alone, _ = plain.step(alone, plain.data, plain.batches(seed, epoch))
    found = plain.evaluate(plain.snapshot(alone, seed, 2), "validation")
    # One of 32 images may fall on the other side.
    assert abs(accuracies[i] - found["accuracy"]) <= 1.5 / 32
    # Other sums round otherwise: gradients of about 1 by a few hundred roundings of
    # 6e-8 in each of six steps, whose rates are at most SLOW, and parameters of about 1
    # by one rounding a step.
    atol = 6 * (SLOW * 300 + 1) * 6e-8
    for got, want, before in zip(
      jax.tree.leaves(snapshot.predictions.params),
      jax.tree.leaves(alone.params),
      jax.tree.leaves(start),
      strict=True,
    ):
      np.testing.assert_allclose(got[i], want, rtol=0, atol=atol)
      change.append(np.abs(want - before).max())
    assert max(change) > 100 * atol


@pytest.mark.parametrize(
  ("survives", "train_loss", "loss", "expected"),
  [
    (False, np.nan, 1.0, np.nan),
    (False, 1.0, np.nan, np.nan),
    (False, 1.0, 1.0, 0.5),
    (True, np.nan, 1.0, 0.5),
    (True, 1.0, np.nan, 0.5),
  ],
)
def test_networks_side_by_side_fail_alone(
  survives, train_loss, loss, expected, monkeypatch
):
  generator = np.random.default_rng(0)
  noise = Split(
    generator.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8),
    generator.integers(0, 10, 8).astype(np.int32),
  )
  method = METHODS["adam"]._replace(has_heads=False)
  workload = SideBySideWorkload(
    build_model("mlp", num_heads=None, width=1 / 64),
    method,
    ImageData(Splits(noise, noise, noise)),
    batch_size=4,
    max_epochs=1,
    flip=False,
    draws=2,
  )
  workload._each_survives = survives
  losses = iter([1.0, loss])
  monkeypatch.setattr(
    ImageWorkload,
    "evaluate",
    lambda *_: {"loss": next(losses), "accuracy": 0.5},
  )

  def train(state, data, batch):
    return state, {"loss": batch, "head_weights": batch[..., None][..., :0]}

  monkeypatch.setattr(workload, "_train_step", train)
  state = workload.init(0, None)
  batch = np.array([1.0, train_loss], np.float32)
  state, outputs = workload._train_all(state, (), batch)
  np.testing.assert_array_equal(outputs["loss"], batch.mean())
  found = workload.evaluate(workload.snapshot(state, 0, 1), "validation")
  np.testing.assert_array_equal(found["accuracies"], [0.5, expected])


def test_a_block_of_networks_is_a_run_that_failures_do_not_end(tmp_path, monkeypatch):
  images = dataclasses.replace(TINY, epochs=1)
  runner = ImageRunner(Trained("seeds", tmp_path, quiet()), images, 1)
  workload = functools.partial(SideBySideWorkload, draws=2)
  arm = Arm("a", METHODS["adam"], "a", network="mlp", width=1 / 32, workload=workload)
  found = {"loss": float("nan"), "accuracies": [0.5, float("nan")]}
  monkeypatch.setattr(SideBySideWorkload, "evaluate", lambda *_: found)
  with jax.numpy_dtype_promotion("standard"):  # Adam's own arithmetic needs it
    (run,) = runner.run([arm], [0])
  assert run.summary["ending"] == "maximum"
  assert block_accuracies(run) == [0.5, 0.1]
  records.collect(tmp_path, tmp_path / "results" / "seeds.jsonl")
  (kept,) = records.load([tmp_path / "results"])
  assert block_accuracies(kept) == [0.5, 0.1]


# --- Whole studies


def tiny_text(folder):
  file = folder / "text.txt"
  words = np.random.default_rng(0).choice(["on", "no", "noon"], 800)
  file.write_text(" ".join(words))
  return Texts(0.5, num_held_out=100, batch_size=4, length=10, files=(file,))


def assert_equal_but_for_rounding(actual, expected):
  """An archive has six digits, which may turn the last one that a page shows."""
  number = r"\d+\.\d+"
  assert re.sub(number, "", actual) == re.sub(number, "", expected)
  found, wanted = re.findall(number, actual), re.findall(number, expected)
  for one, other in zip(found, wanted, strict=True):
    digits = len(other.partition(".")[2])
    assert abs(float(one) - float(other)) < 1.5 * 10.0**-digits


STUDIES = {
  "ablation": lambda at: AblationStudy(TINY, 2, "mlp"),
  "adam": lambda at: AdamStudy(TINY, 2, 2),
  "averaging": lambda at: AveragingStudy(TINY, 2),
  "bounds": lambda at: BoundsStudy(ONE_EPOCH, (16, 32), (0.1, 1.0), 2),
  "collapse": lambda at: CollapseStudy(TINY, 2, "mlp"),
  "fraction": lambda at: FractionStudy(
    TINY, 2, fractions=(0.1, 1.0), widths=(1 / 4,), network="mlp"
  ),
  "granularity": lambda at: GranularityStudy(tiny_text(at), 2, 0.1, (0.1, 1.0), 2),
  "guard": lambda at: GuardStudy(ONE_EPOCH, 2, 2, (1e3,), width=1 / 8, rounds=6),
  "interval": lambda at: IntervalStudy(TINY, 2, (-3, -1), (1.0,)),
  "posterior": lambda at: PosteriorStudy(
    dataclasses.replace(TINY, num_train=384), 2, "mlp"
  ),
  "ranking": lambda at: RankingStudy(ONE_EPOCH, num_digits=4, num_cifar10=0, seeds=2),
  "seeds": lambda at: SeedsStudy(ONE_EPOCH, 2, 4, 2, 2, 1 / 32, 1 / 8),
  "width": lambda at: WidthStudy(TINY, 2, ("mlp",), (1 / 16, 1 / 8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_writes_numbers_and_picture_and_repeats_no_run(
  name, tmp_path, capsys, monkeypatch
):
  study = dataclasses.replace(STUDIES[name](tmp_path), out=tmp_path / "out")
  with jax.numpy_dtype_promotion("standard"):  # Adam's own arithmetic needs it
    study()
  picture, numbers = (tmp_path / "out" / f"{name}.{end}" for end in ("png", "md"))
  assert picture.stat().st_size > 10_000
  text = numbers.read_text()
  assert text in capsys.readouterr().out
  assert "nan" not in text
  picture.unlink()
  monkeypatch.setattr(training, "train", None)
  monkeypatch.setattr(guard, "time_steps", None)
  study()
  assert picture.exists() and numbers.read_text() == text
  # The archive of these runs has the same page.
  records.collect(tmp_path / "out", tmp_path / "results" / f"{name}.jsonl")
  lines = [f"# {name}", "", *study.derive(tmp_path / "results")]
  assert_equal_but_for_rounding("\n".join(lines) + "\n", text)


@pytest.mark.parametrize(
  ("study", "option"),
  [
    (AblationStudy(ONE_EPOCH), "--epochs must be at least 2"),
    (CollapseStudy(ONE_EPOCH), "--epochs must be at least 2"),
    (
      GranularityStudy(max_learning_rates=(1e-4,)),
      "--max-learning-rates must be at least",
    ),
    (GranularityStudy(num_heads=0), "--num-heads must be at least 1"),
    (GranularityStudy(Texts(share=0.0)), r"--share must be in \(0, 1\], got 0"),
    (GuardStudy(runs=0), "--runs must be at least 1, got 0"),
    (GuardStudy(rounds=5), "--rounds must be at least 6, got 5"),
    (GuardStudy(limit=-1.0), r"--limit, --slowdown: guard\(limit=...\) must be"),
    (GuardStudy(intervals=(0.0,)), r"--intervals must be .* 1e-05, got \(0.0,\)"),
    (RankingStudy(num_digits=3), "--num-digits must be 0, or from 4 to 24, got 3"),
    (RankingStudy(num_cifar10=9), "--num-cifar10 must be 0, or from 4 to 8, got 9"),
    (
      RankingStudy(num_digits=0, num_cifar10=0),
      "--num-digits or --num-cifar10 must .* got 0 for both",
    ),
    (SeedsStudy(mlp_draws=75), r"--block must divide --mlp-draws \(75\), got 50"),
    (SeedsStudy(cnn_draws=0), "--cnn-draws must be at least 1, got 0"),
    (BoundsStudy(uppers=(1e-6,)), r"--uppers must .* above 1e-05, got \(1e-06,\)"),
    (BoundsStudy(uppers=()), r"--uppers must have at least one, .* got \(\)"),
    (BoundsStudy(batch_sizes=()), r"--batch-sizes must have at least one, got \(\)"),
    (
      BoundsStudy(dataclasses.replace(TINY, batch_size=16)),
      "--batch-size must be left out, for --batch-sizes, got 16",
    ),
    (PosteriorStudy(ONE_EPOCH), "--num-train and --epochs must give over 10 steps"),
    (AdamStudy(ONE_EPOCH), "--single-runs must be at least 1, --epochs at least 2"),
  ],
)
def test_bad_options_say_what_to_write(study, option, tmp_path):
  with pytest.raises(OptionError, match=option):
    dataclasses.replace(study, out=tmp_path)()
